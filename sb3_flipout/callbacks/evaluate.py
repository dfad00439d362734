"""NoiseEvalCallback: SB3's EvalCallback for the mean weights, the sampled ones, and the vote of members, side by side."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback

from sb3_flipout.callbacks.common import flipout_policy
from sb3_flipout.callbacks.statistics import has_members
from sb3_flipout.diagnostics import base_kept
from sb3_flipout.layers import perturbed, redraw
from sb3_flipout.noise import EvaluationStream, RowNoise, fold

_STREAM = 0x6576616C  # of the keys that only evaluation sees
_TAGS = {"eval/mean_reward": "return", "eval/mean_ep_length": "ep_length", "eval/success_rate": "success_rate"}

# Student's t at 99.9 %, one-sided, by the number of evaluations: what chance alone exceeds once in a thousand times.
_T_999 = {5: 7.173, 6: 5.893, 7: 5.208, 8: 4.785, 9: 4.501, 10: 4.297}
_LEAST_LAG = 0.1  # of the larger return: what is smaller is significant perhaps, but nothing to warn of


class _Arm:
    """
    A way of acting with a model's weights, in place of the model for ``EvalCallback`` and ``evaluate_policy``.

    Its ``predict`` is the model's under the weights of the arm, here the mean ones; its logger is its own; all else is the
    model's.
    """

    def __init__(self, model: BaseAlgorithm, logger: Any) -> None:
        self._model, self.logger = model, logger
        self._policy: Any = flipout_policy(model, NoiseEvalCallback.__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def weights(self, episode_start: np.ndarray) -> AbstractContextManager[None]:
        """Activate the weights for environments, some of which start an episode."""
        return perturbed(self._policy, None)

    def predict(self, observation: Any, state: Any, episode_start: np.ndarray, deterministic: bool) -> tuple[np.ndarray, Any]:
        with self.weights(episode_start):
            return self._model.predict(observation, state, episode_start, deterministic)


class _Sampled(_Arm):
    """Each environment acts with one draw of the weights for a whole episode; where all share one, so do their episodes."""

    def __init__(self, model: BaseAlgorithm, logger: Any) -> None:
        super().__init__(model, logger)
        members = getattr(self._policy.noise_settings, "members", None)
        self._stream = EvaluationStream(fold(_STREAM, model.num_timesteps), 0, members)
        self._noise: RowNoise | None = None

    def weights(self, episode_start: np.ndarray) -> AbstractContextManager[None]:
        if self._noise is None or episode_start.any():
            policy = self._policy
            fresh = self._stream.next(len(episode_start), policy.noise_scale, policy.device)
            keys = fresh.keys
            if self._noise is not None:
                keys = th.where(th.as_tensor(episode_start, device=policy.device), keys, self._noise.keys)
            self._noise = RowNoise(keys, policy.noise_scale)
        shared = self._policy.noise_settings.noise_sharing == "shared"
        return self._drawn(self._noise) if shared else perturbed(self._policy, self._noise)

    @contextmanager
    def _drawn(self, noise: RowNoise) -> Iterator[None]:
        """The base is the draw, and follows the first environment's key, as in training."""
        with base_kept(self._policy), perturbed(self._policy, noise):
            redraw(self._policy, int(noise.keys[0]))
            yield


class _Vote(_Arm):
    """What the policy does by itself where it has members and is to act without chance."""

    def weights(self, episode_start: np.ndarray) -> AbstractContextManager[None]:
        return nullcontext()


ARMS: dict[str, type[_Arm]] = {"mean": _Arm, "sampled": _Sampled, "vote": _Vote}


class _ArmLogger:
    """Writes what EvalCallback logs under the arm's own tags; the arm whose model is saved keeps SB3's too."""

    def __init__(self, logger: Any, arm: str, before_dump: Callable[[Any], None] | None) -> None:
        self._logger, self._arm, self._before_dump = logger, arm, before_dump

    def record(self, key: str, value: Any, exclude: Any = None) -> None:
        if key in _TAGS:
            self._logger.record(f"noise_eval/{self._arm}/{_TAGS[key]}", value, exclude)
        if self._before_dump is not None:
            self._logger.record(key, value, exclude)

    def dump(self, step: int) -> None:
        if self._before_dump is not None:
            self._before_dump(self._logger)
            self._logger.dump(step)


@contextmanager
def _acting_as(callback: EvalCallback, arm: _Arm) -> Iterator[None]:
    """Let a callback take an arm for its model."""
    model: Any = getattr(callback, "model", None)
    callback.model = arm  # type: ignore[assignment]
    try:
        yield
    finally:
        callback.model = model


def mean_lags(mean: Sequence[float], sampled: Sequence[float]) -> bool:
    """
    Decide whether mean weights lag behind sampled ones, by the rule in :class:`NoiseEvalCallback`.

    :param mean: Mean returns of the mean weights, evaluation by evaluation, 10 at most
    :param sampled: Those of sampled weights
    :return: Whether they lag; never with less than 5 evaluations
    """
    n = len(mean)
    if n < min(_T_999):
        return False
    differences = np.subtract(sampled, mean)
    gap, error = differences.mean(), differences.std(ddof=1) / math.sqrt(n)
    larger = max(abs(np.mean(mean)), abs(np.mean(sampled)))
    return bool(gap > _T_999[n] * error and gap >= _LEAST_LAG * larger and gap > 0)


class NoiseEvalCallback(EvalCallback):
    """
    Evaluate the mean weights, sampled weights and, with members, their vote; save the best by one of them.

    ===========  =======================================================================================================
    ``mean``     the mean weights, what ``predict(deterministic=True)`` uses without members
    ``sampled``  perturbed weights at the present noise scale and base, a fresh draw for each episode, held until it ends
                 (with ``noise_sharing="shared"`` one draw for all environments, fresh for each episode of the first)
    ``vote``     the action that most members prefer, what ``predict(deterministic=True)`` does with members
    ===========  =======================================================================================================

    Each takes the most likely action (unless ``deterministic=False``), so that what differs is the weights. Each plays
    ``n_eval_episodes``, so an evaluation takes two or three times as long as ``EvalCallback``'s. Keys come from a stream of
    their own: training is bit for bit what it is without, as long as ``deterministic`` is left ``True``.

    The one named by ``best_by`` is evaluated by ``EvalCallback``'s own code: what it logs as ``eval/...``, stores in
    ``evaluations.npz`` and saves as ``best_model`` is that one's. Every one is logged as ``noise_eval/...`` too, and the
    others have an ``evaluations.npz`` of the same form in ``log_path/<name>/``.

    **Warning.** With constant weight noise an agent learns a policy that is good on average over the perturbations, and
    nothing asks the mean weights alone to be good. So the callback warns, once, when the mean weights lag behind the sampled
    ones: over the last 10 evaluations (5 at least), the mean of the differences of their returns exceeds its standard error
    by Student's t at 99.9 %, so that chance alone warns once in a thousand times; it is a tenth of the larger return at
    least; and the noise scale has not fallen meanwhile, since annealing it is the remedy.

    :param args: As for ``EvalCallback``
    :param best_by: ``"mean"``, ``"sampled"`` or ``"vote"``
    :param kwargs: As for ``EvalCallback``: ``eval_env``, ``n_eval_episodes``, ``eval_freq``, ``log_path``,
        ``best_model_save_path``, ...; ``deterministic`` is about actions, not about weights
    :raises ValueError: If ``best_by`` is none of them; at the start of training, if the policy is no flipout policy, or
        ``best_by="vote"`` and it has no members
    """

    def __init__(self, *args: Any, best_by: str = "mean", **kwargs: Any) -> None:
        if best_by not in ARMS:
            names = ", ".join(f'"{name}"' for name in ARMS)
            raise ValueError(f"best_by must be one of {names}, got {best_by!r}.")
        super().__init__(*args, **kwargs)
        self.best_by = best_by
        self.returns: dict[str, list[float]] = {}  # mean return of each evaluation, by how it acted
        self._scales: list[float] = []
        self._warned = False

    def _init_callback(self) -> None:
        super()._init_callback()
        policy = flipout_policy(self.model, type(self).__name__)
        if self.best_by == "vote" and not has_members(policy):
            raise ValueError(
                'best_by="vote" needs members that vote, this policy has none. Give policy_kwargs=dict(members=10) to a '
                'value-based algorithm, or use best_by="mean".'
            )
        self._policy = policy
        self.returns = self.returns or {name: [] for name in ARMS if name != "vote" or has_members(policy)}
        self._others = {name: self._other(name) for name in self.returns if name != self.best_by}

    def _other(self, name: str) -> EvalCallback:
        """EvalCallback of an arm by which nothing is saved."""
        folder = None if self.log_path is None else os.path.join(os.path.dirname(self.log_path), name)
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        return EvalCallback(
            self.eval_env,
            n_eval_episodes=self.n_eval_episodes,
            eval_freq=1,
            log_path=folder,
            deterministic=self.deterministic,
            render=self.render,
            verbose=0,
            warn=False,
        )

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        self._scales.append(self._policy.noise_scale)
        for name, callback in self._others.items():
            with _acting_as(callback, self._arm(name, None)):
                callback.on_step()
            self.returns[name].append(callback.last_mean_reward)
        with _acting_as(self, self._arm(self.best_by, self._record_lag)):
            continue_training = super()._on_step()
        self._warn_of_lag()
        return continue_training

    def _arm(self, name: str, before_dump: Callable[[Any], None] | None) -> _Arm:
        return ARMS[name](self.model, _ArmLogger(self.logger, name, before_dump))

    def _record_lag(self, logger: Any) -> None:
        self.returns[self.best_by].append(self.last_mean_reward)
        logger.record("noise_eval/lag", self.returns["sampled"][-1] - self.returns["mean"][-1])

    def _warn_of_lag(self) -> None:
        mean, sampled = (self.returns[name][-max(_T_999) :] for name in ("mean", "sampled"))
        falling = self._scales[-1] < self._scales[-len(mean)]
        if not self._warned and not falling and mean_lags(mean, sampled):
            self._warned = True
            warnings.warn(
                f"the mean weights lag behind the sampled ones: over the last {len(mean)} evaluations, up to step "
                f"{self.num_timesteps}, their mean return is {np.mean(mean):.4g}, that of perturbed weights "
                f"{np.mean(sampled):.4g}. Under constant weight noise nothing asks the mean weights alone to be good. Let the "
                f"noise fall to 0 before training ends, AnnealNoise(start={self._policy.noise_scale:g}, end=0.0), or act with "
                "sampled weights, predict(deterministic=False).",
                stacklevel=2,
            )
