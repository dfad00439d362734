"""NoiseEvalCallback: SB3's EvalCallback for the mean weights, the sampled ones, and the vote of members, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import signature
from typing import Any, Literal

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_flipout.callbacks.common import flipout_policy
from sb3_flipout.checks import check_choice, warn_user
from sb3_flipout.diagnostics import base_kept
from sb3_flipout.diagnostics.lag import LagTest, excelling
from sb3_flipout.diagnostics.statistics import has_members
from sb3_flipout.layers import perturbed, redraw
from sb3_flipout.noise import EvaluationStream, RowNoise, Stream, fold

BestBy = Literal["mean", "sampled", "vote"]
_MASKS = "action_masks"  # sb3-contrib's name for the method of environments and the argument of `predict`
_TAGS = {"eval/mean_reward": "return", "eval/mean_ep_length": "ep_length", "eval/success_rate": "success_rate"}


def _takes_masks(model: BaseAlgorithm) -> bool:
    return _MASKS in signature(model.predict).parameters  # sb3-contrib's MaskablePPO, and what a user derives from it


class _Arm:
    """
    A way of acting with a model's weights, in place of the model for ``EvalCallback`` and ``evaluate_policy``.

    Its ``predict`` is the model's under the weights of the arm, here the mean ones; its logger is its own; all else is the
    model's.
    """

    def __init__(self, model: BaseAlgorithm, logger: Any, env: VecEnv) -> None:
        self._model, self.logger, self._env = model, logger, env
        self._policy: Any = flipout_policy(model, NoiseEvalCallback.__name__)
        self._is_masked = _takes_masks(model) and env.has_attr(_MASKS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def weights(self, n_envs: int) -> AbstractContextManager[None]:
        """Activate the weights for the next step of the environments."""
        return perturbed(self._policy, None)

    def end_episode(self, environment: int) -> None:
        """Learn that an episode has ended that counts as one: lives that a wrapper makes episodes of do not."""

    def predict(self, observation: Any, state: Any, episode_start: np.ndarray, deterministic: bool) -> tuple[np.ndarray, Any]:
        masks: dict[str, Any] = {_MASKS: np.stack(self._env.env_method(_MASKS))} if self._is_masked else {}
        with self.weights(len(episode_start)):
            return self._model.predict(observation, state, episode_start, deterministic, **masks)


class _Sampled(_Arm):
    """Each environment acts with one draw of the weights for a whole episode; where all share one, so do their episodes."""

    def __init__(self, model: BaseAlgorithm, logger: Any, env: VecEnv) -> None:
        super().__init__(model, logger, env)
        members = self._policy.members
        self._stream = EvaluationStream(fold(Stream.NOISE_EVAL, model.num_timesteps), 0, members)
        self._noise: RowNoise | None = None
        self._over: set[int] = set()  # environments whose next episode has no draw yet

    def end_episode(self, environment: int) -> None:
        self._over.add(environment)

    def weights(self, n_envs: int) -> AbstractContextManager[None]:
        if self._noise is None or self._over:
            policy = self._policy
            keys = self._stream.next(n_envs, policy.effective_scale, policy.device).keys
            if self._noise is not None:
                over = th.as_tensor([i in self._over for i in range(n_envs)], device=policy.device)
                keys = th.where(over, keys, self._noise.keys)
            self._noise, self._over = RowNoise(keys, policy.effective_scale), set()
        shared = self._policy.noise_settings.noise_sharing == "shared"
        return self._drawn(self._noise) if shared else perturbed(self._policy, self._noise)

    @contextmanager
    def _drawn(self, noise: RowNoise) -> Iterator[None]:
        """The base is the draw, and follows the first environment's key, as in training."""
        with base_kept(self._policy), perturbed(self._policy, noise):
            redraw(self._policy, int(noise.keys[0]))
            yield


class _Vote(_Arm):
    """What the policy does by itself where it has members and is to act without chance; with chance it would not vote."""

    def weights(self, n_envs: int) -> AbstractContextManager[None]:
        return nullcontext()

    def predict(self, observation: Any, state: Any, episode_start: np.ndarray, deterministic: bool) -> tuple[np.ndarray, Any]:
        return super().predict(observation, state, episode_start, deterministic=True)


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


class _EpisodesEval(EvalCallback):
    """EvalCallback that keeps the returns of the episodes of its last evaluation."""

    def _on_step(self) -> bool:
        self.episodes: list[float] = []
        return super()._on_step()

    def _log_success_callback(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        super()._log_success_callback(locals_, globals_)
        ended, i = locals_["info"].get("episode"), locals_["i"]
        # As evaluate_policy counts: where a Monitor is inside, what it reports, since wrappers around it may split episodes.
        if locals_["done"] and not (locals_["is_monitor_wrapped"] and ended is None):
            self.episodes.append(float(ended["r"] if locals_["is_monitor_wrapped"] else locals_["current_rewards"][i]))
            arm: Any = self.model
            arm.end_episode(i)


class NoiseEvalCallback(_EpisodesEval):
    """
    Evaluate the mean weights, sampled weights and, with members, their vote; save the best by one of them.

    ===========  =======================================================================================================
    ``mean``     the mean weights, what ``predict(deterministic=True)`` uses (DQN and QRDQN: without members)
    ``sampled``  perturbed weights at the present noise scale and base, a fresh draw for each episode, held until it ends
                 (with ``noise_sharing="shared"`` one draw for all environments, fresh for each episode of the first)
    ``vote``     the action that most members prefer, what ``predict(deterministic=True)`` of DQN and QRDQN does with
                 members; a vote has no chance in it, whatever ``deterministic`` says
    ===========  =======================================================================================================

    Each takes the most likely action (unless ``deterministic=False``), so that what differs is the weights. Each plays
    ``n_eval_episodes``, so an evaluation takes two or three times as long as ``EvalCallback``'s. Keys come from a stream of
    their own: training is bit for bit what it is without, as long as ``deterministic`` is left ``True``. Actions that
    MaskablePPO's environments forbid are masked here too.

    The one named by ``best_by`` is evaluated by ``EvalCallback``'s own code: what it logs as ``eval/...``, stores in
    ``evaluations.npz`` and saves as ``best_model`` is that one's. Every one is logged as ``noise_eval/...`` too, and the
    others have an ``evaluations.npz`` of the same form in ``log_path/<name>/``.

    **Warning.** With constant weight noise an agent learns a policy that is good on average over the perturbations, and
    nothing asks the mean weights alone to be good. So the callback warns, once, when the mean weights lag behind the sampled
    ones, unless the noise scale has fallen meanwhile, since annealing it is the remedy, or there are members: their vote acts,
    and they are to keep their noise. It looks at every fifth evaluation, at the later half of them all (the last 10 at least,
    where there are so many), and is strict enough that chance alone warns in one *training* of a thousand, however long: the
    k-th look may err in 1/(k(k+1)) of a thousandth. They lag when

    - the mean of the differences of their returns exceeds 0 by Student's t, and is a tenth of the larger return at least;
    - or, from 10 evaluations on, a tenth of the perturbed episodes or more exceed *every* episode of the mean weights, by a
      tenth of the larger of the two at least, and more of them than chance would make (that the best k episodes are all
      perturbed ones); and the mean weights do not improve, from the earlier half of those evaluations to the later by a tenth
      of what those episodes are better. Failing perturbations that cost much hide on average what others reach.

    :param args: As for ``EvalCallback``
    :param best_by: ``"mean"``, ``"sampled"`` or ``"vote"``
    :param kwargs: As for ``EvalCallback``: ``eval_env``, ``n_eval_episodes``, ``eval_freq``, ``log_path``,
        ``best_model_save_path``, ...; ``deterministic`` is about actions, not about weights
    :raises ValueError: If ``best_by`` is none of them; at the start of training, if the policy is no flipout policy, or
        ``best_by="vote"`` and it has no members, or the training environments mask actions and ``eval_env`` does not
    """

    def __init__(self, *args: Any, best_by: BestBy = "mean", **kwargs: Any) -> None:
        best = check_choice("best_by", best_by, ARMS)
        super().__init__(*args, **kwargs)
        self.best_by = best
        self.returns: dict[str, list[float]] = {}  # mean return of each evaluation, by how it acted
        self._episodes: dict[str, list[list[float]]] = {name: [] for name in ("mean", "sampled")}
        self._others: dict[str, _EpisodesEval] = {}
        self._scales: list[float] = []
        self._lag = LagTest()
        self._warned = False

    def _init_callback(self) -> None:
        super()._init_callback()
        policy = flipout_policy(self.model, type(self).__name__)
        if self.best_by == "vote" and not has_members(policy):
            raise ValueError(
                'best_by="vote" needs members that vote, this policy has none. Give policy_kwargs=dict(members=10) to a '
                'value-based algorithm, or use best_by="mean".'
            )
        masked = _takes_masks(self.model) and self.training_env.has_attr(_MASKS)
        if masked and not self.eval_env.has_attr(_MASKS):
            raise ValueError(
                f"eval_env has no method {_MASKS}, and the training environments have one: forbidden actions would be "
                "evaluated. Wrap it as these are, in an ActionMasker, say."
            )
        self._policy = policy
        self.returns = self.returns or {name: [] for name in ARMS if name != "vote" or has_members(policy)}
        # Kept from one call of learn() to the next, as EvalCallback keeps its own evaluations.
        self._others = self._others or {name: self._other(name) for name in self.returns if name != self.best_by}

    def _other(self, name: str) -> _EpisodesEval:
        """EvalCallback of an arm by which nothing is saved."""
        folder = None if self.log_path is None else os.path.join(os.path.dirname(self.log_path), name)
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
        return _EpisodesEval(
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
        self._scales.append(self._policy.effective_scale)
        for name, callback in self._others.items():
            with _acting_as(callback, self._arm(name, None)):
                callback.on_step()
            self.returns[name].append(callback.last_mean_reward)
        with _acting_as(self, self._arm(self.best_by, self._record_lag)):
            continue_training = super()._on_step()
        for name, kept in self._episodes.items():
            kept.append(self.episodes if name == self.best_by else self._others[name].episodes)
        self._warn_of_lag()
        return continue_training

    def _arm(self, name: str, before_dump: Callable[[Any], None] | None) -> _Arm:
        return ARMS[name](self.model, _ArmLogger(self.logger, name, before_dump), self.eval_env)

    def _record_lag(self, logger: Any) -> None:
        self.returns[self.best_by].append(self.last_mean_reward)
        logger.record("noise_eval/lag", self.returns["sampled"][-1] - self.returns["mean"][-1])

    def _warn_of_lag(self) -> None:
        if has_members(self._policy):
            return
        episodes, perturbed_episodes = self._episodes["mean"], self._episodes["sampled"]
        lags = self._lag.look(episodes, perturbed_episodes)
        last = self._lag.window(len(episodes))
        mean, sampled = (self.returns[name][-last:] for name in ("mean", "sampled"))
        falling = self._scales[-1] < self._scales[-last]
        if lags and not self._warned and not falling:
            self._warned = True
            own, others = ([one for played in kept[-last:] for one in played] for kept in (episodes, perturbed_episodes))
            better = len(excelling(own, others)) / len(others)
            warn_user(
                f"the mean weights lag behind the sampled ones: over the last {len(mean)} evaluations, up to step "
                f"{self.num_timesteps}, their mean return is {np.mean(mean):.4g}, that of perturbed weights "
                f"{np.mean(sampled):.4g}, and {better:.0%} of the perturbed episodes are far better than any of theirs. Under "
                "constant weight noise nothing asks the mean weights alone to be good. Let the noise fall to 0 before "
                f"training ends, AnnealNoise(start={self._policy.noise_scale:g}, end=0.0), or act with sampled weights, "
                "predict(deterministic=False).",
            )
