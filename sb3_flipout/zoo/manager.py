"""rl_zoo3's ExperimentManager, told of weight noise: its methods are wrapped, none is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from pprint import pprint
from typing import Any

import optuna
from rl_zoo3 import ALGOS, exp_manager
from rl_zoo3.callbacks import TrialEvalCallback
from rl_zoo3.exp_manager import ExperimentManager

from sb3_flipout.callbacks import NoiseEvalCallback
from sb3_flipout.zoo import search, studies
from sb3_flipout.zoo import storage as storages
from sb3_flipout.zoo.space import Refused

Method = Callable[..., Any]


class NoiseTrialCallback(NoiseEvalCallback):
    """
    Evaluate a trial by what will be used of it, the mean weights or the members' vote, and stop it where it is not promising.

    It takes the place of rl_zoo3's ``TrialEvalCallback``.

    :param eval_env: Environments to evaluate in
    :param trial: Optuna's trial, which is told of each evaluation
    :param kwargs: As of ``NoiseEvalCallback``
    """

    def __init__(self, eval_env: Any, trial: optuna.Trial, **kwargs: Any) -> None:
        super().__init__(eval_env, **kwargs)
        self.trial, self.is_pruned, self._evaluations = trial, False, 0

    def _init_callback(self) -> None:
        self.best_by = "vote" if getattr(self.model.policy, "members", None) is not None and _votes(self.model) else "mean"
        super()._init_callback()

    def _on_step(self) -> bool:
        go_on = super()._on_step()
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return go_on
        self._evaluations += 1
        self.trial.report(float(self.last_mean_reward), self._evaluations)
        self.is_pruned = self.trial.should_prune()
        return go_on and not self.is_pruned


def _votes(model: Any) -> bool:
    return hasattr(model.policy, "member_values")


def _trial_callback(eval_env: Any, trial: optuna.Trial, **kwargs: Any) -> Any:
    kind = NoiseTrialCallback if search.searches_noise() else TrialEvalCallback
    return kind(eval_env, trial, **kwargs)


def _check(hyperparams: Mapping[str, Any]) -> None:
    if isinstance(hyperparams.get("rollout_buffer_class"), str):
        raise Refused(
            "rollout_buffer_class: rl_zoo3 hands the name on as a text, which no algorithm can call. Weight noise needs none; "
            "for one of your own, give --conf-file a Python file whose `hyperparams` hold the class itself."
        )


def _evaluated(policy_kwargs: Any) -> dict[str, Any]:
    """policy_kwargs as rl_zoo3 makes them of the YAML, with the names that it has there."""
    return dict(eval(policy_kwargs, vars(exp_manager)) if isinstance(policy_kwargs, str) else policy_kwargs or {})


def _read_hyperparameters(original: Method, self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the YAML says of the policy stays where a trial says nothing of it; trial 0 is one, too."""
    trial_id, self.trial_id = self.trial_id, None
    try:
        hyperparams, saved = original(self)
    finally:
        self.trial_id = trial_id
    _check(hyperparams)
    if not self.eval_env_kwargs and isinstance(hyperparams.get("env_kwargs"), dict):
        self.eval_env_kwargs = dict(hyperparams["env_kwargs"])  # rl_zoo3 gives those of the YAML to the training alone
    if trial_id is None or not (self.storage and self.study_name):
        return hyperparams, saved
    found = self.load_trial(self.storage, self.study_name, trial_id)
    if search.is_flipout(self.algo, hyperparams.get("policy")):
        # --hyperparams are among those of the YAML, as they were when the trial was made.
        found = {**hyperparams, **search.with_noise(found, {}, _evaluated(hyperparams.get("policy_kwargs")))}
    else:
        found = {**hyperparams, **found, **(self.custom_hyperparams or {})}  # rl_zoo3's own order
    print(f"Hyperparameters with those of trial {trial_id} of {self.study_name}:")
    pprint(found)
    return found, type(saved)(sorted(found.items()))


def _load_trial(original: Method, self: Any, storage: Any, study_name: str, trial_id: int | None = None, *args: Any) -> Any:
    if isinstance(storage, str) and storage.endswith(".log") and not Path(storage).is_file():
        raise Refused(f"--storage: there is no file {storage}.")
    with storages.one_line_errors(storage):
        open_storage = storages.open_storage(storage)
        study = studies.load_study(open_storage, study_name)
        if trial_id is not None and not -len(study.trials) <= trial_id < len(study.trials):
            raise Refused(f"--trial-id must be one of the {len(study.trials)} trials of {study_name!r}, got {trial_id}.")
        try:
            return original(self, open_storage, study_name, trial_id, *args)
        except KeyError as error:
            raise Refused(
                f"trial {trial_id} of {study_name!r} has no {error}, which {self.algo} needs: it is another algorithm's."
            ) from error


def _objective(original: Method, self: Any, trial: optuna.Trial) -> float:
    try:
        with search.given(self.algo, self._hyperparams):
            return float(original(self, trial))
    except KeyboardInterrupt:
        self.interrupted = True  # rl_zoo3 takes it for the end of the search
        raise


def _hyperparameters_optimization(original: Method, self: Any) -> None:
    """In a study that is shared, trials of workers that die are made again."""
    storage = self.storage
    with storages.one_line_errors(storage):
        self.storage = storages.open_storage(storage)
        study = studies.join_study(self.storage, self.study_name) if storage and self.study_name else None
        original(self)
        while study is not None and self.max_total_trials is not None and not getattr(self, "interrupted", False):
            if not studies.await_others(study, self.max_total_trials):
                break
            self.seed += len(study.trials)  # or the sampler would begin with the choices that it has made
            original(self)


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "read_hyperparameters": _read_hyperparameters,
    "load_trial": _load_trial,
    "objective": _objective,
    "hyperparameters_optimization": _hyperparameters_optimization,
}


def _wrapped(original: Method, wrapper: Callable[..., Any]) -> Method:
    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    method.of_sb3_flipout = True  # type: ignore[attr-defined]
    return method


def install(algorithms: Mapping[str, Any]) -> None:
    """
    Tell rl_zoo3 of our algorithms, and wrap the methods of its ExperimentManager; a second time changes nothing.

    :param algorithms: Class by the name that ``--algo`` takes
    """
    ALGOS.update(algorithms)
    for name, wrapper in _WRAPPERS.items():
        original = getattr(ExperimentManager, name)
        if not hasattr(original, "of_sb3_flipout"):
            setattr(ExperimentManager, name, _wrapped(original, wrapper))
    vars(exp_manager)["TrialEvalCallback"] = _trial_callback
