"""A noise scale that keeps the perturbed policy at a set distance from the mean one (Plappert et al. 2018, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import LinearSchedule

from sb3_flipout.callbacks._schedules import scheduled
from sb3_flipout.callbacks.common import ScaleCallback, Schedule
from sb3_flipout.checks import check_choice, check_integer, check_number, warn_user
from sb3_flipout.diagnostics.distances import MEASURES, MeasureName, count_actions, policy_distance
from sb3_flipout.diagnostics.recent import recent_replayed, recent_rollout
from sb3_flipout.noise import RowNoise, Stream, fold, fold_in
from sb3_flipout.noise.keys import restrict

_MEASURING = fold(Stream.ADAPT)  # seed of the keys for measuring
_LIMITS = (1e-4, 1e4)  # of the scale: where the target is out of reach it would run away


class AdaptNoise(ScaleCallback):
    r"""
    Multiply the noise scale by alpha while the perturbed policy is closer to the mean one than the target, else divide it.

    Measured on recent real observations, under the base that acts and keys that training never sees; rewards, stored
    actions and batches stay as they are. On-policy the scale changes at the starts of rollouts only.

    =====================  ===========================================================  ==========================
    ``measure``            distance                                                     for actions that are
    =====================  ===========================================================  ==========================
    ``"kl"``               :math:`D_{KL}(\pi \| \tilde\pi)` in nats; of DQN and QRDQN:  discrete
                           between the softmax of their values
    ``"action_distance"``  root mean squared difference of the deterministic actions    continuous
    ``"disagreement"``     share of observations whose likeliest action differs         discrete
    =====================  ===========================================================  ==========================

    :param target: Distance to keep: a number above 0, or a function of the progress that remains
    :param measure: ``"kl"``, ``"action_distance"`` or ``"disagreement"``
    :param alpha: Factor, at least 1
    :param every: How often: in rollouts on-policy (default 1), in collection steps off-policy (default 10)
    :param epsilon: In place of ``target``, for discrete actions: keep the distance that an epsilon-greedy policy has from
        the greedy one, for KL :math:`-\log(1 - \epsilon + \epsilon / |A|)`. A number, a function of the progress that
        remains, or (initial, final, fraction) as DQN's epsilon
    :param repeats: How often the rule is applied each time, with fresh keys: the finest control takes 1, more are faster
    :param batch_size: Number of observations
    :param verbose: Verbosity level of SB3's callbacks
    :raises TypeError: If a number is none
    :raises ValueError: If a value is unknown or out of range, or not exactly one of ``target`` and ``epsilon`` is given
    """

    def __init__(
        self,
        target: float | Schedule | None = None,
        measure: MeasureName = "kl",
        alpha: float = 1.01,
        every: int | None = None,
        epsilon: float | Sequence[float] | Schedule | None = None,
        repeats: int = 1,
        batch_size: int = 256,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        check_choice("measure", measure, MEASURES)
        if (target is None) == (epsilon is None):
            raise ValueError(f"give either target or epsilon, got target={target!r} and epsilon={epsilon!r}.")
        self.measure = measure
        self.alpha = check_number("alpha", alpha, 1.0)
        self.every = None if every is None else check_integer("every", every, 1)
        self.repeats, self.batch_size = check_integer("repeats", repeats, 1), check_integer("batch_size", batch_size, 1)
        self.target = target if target is None or callable(target) else check_number("target", target, 0.0, above=True)
        self.epsilon = None if epsilon is None else _checked_epsilon(epsilon, measure)
        self.distance = math.nan  # as last measured
        self._measurements = self._rollouts = 0
        self._observations: Any = None
        self._generator = np.random.default_rng(0)
        self._warned = False

    def target_at(self, progress_remaining: float) -> float:
        """
        Compute the target at a point of training.

        :param progress_remaining: Share of training that remains, from 1 to 0
        :return: Distance
        :raises ValueError: If a schedule gives what is no finite number >= 0, or no epsilon
        """
        remaining = max(0.0, progress_remaining)
        if self.epsilon is not None:
            of_epsilon = MEASURES[self.measure].of_epsilon
            assert of_epsilon is not None, "checked when made"
            epsilon = scheduled("epsilon", self.epsilon, remaining, 1.0)
            return of_epsilon(epsilon, count_actions(self.model.action_space))
        return scheduled("target", self.target, remaining) if callable(self.target) else float(self.target or 0.0)

    # ---- when ---------------------------------------------------------------------------------------------------

    def _init_callback(self) -> None:
        super()._init_callback()
        space, fitting = self.model.action_space, MEASURES[self.measure].action_spaces
        if not isinstance(space, fitting):
            names = ", ".join(f'"{name}"' for name, other in MEASURES.items() if isinstance(space, other.action_spaces))
            raise ValueError(f'measure="{self.measure}" does not fit the action space {space}; use {names}.')
        if not (hasattr(self.model, "rollout_buffer") or self.off_policy):
            raise ValueError(
                f"{self.name} measures on observations of a rollout or replay buffer, and {type(self.model).__name__} has "
                "none. Use AnnealNoise."
            )
        if hasattr(self.policy, "lstm_actor"):
            raise ValueError(
                f"{self.name} cannot measure {type(self.policy).__name__}: observations without the states of the LSTM do not "
                "say how a recurrent policy acts. Use AnnealNoise."
            )
        self._observations = None

    def _on_training_start(self) -> None:
        super()._on_training_start()
        if self.policy.noise_scale == 0:
            raise ValueError(
                f"{self.name} multiplies the noise scale, which is 0 and would stay so. Set model.policy.noise_scale to what "
                "it shall start from, 1.0 say."
            )
        for progress_remaining in (self.progress_remaining, 0.0):
            self.target_at(progress_remaining)

    def _on_rollout_start(self) -> None:
        if not self.off_policy and self._observations is not None:  # not before the first rollout
            if self._rollouts % (self.every or 1) == 0:
                self._adapt()

    def _on_rollout_end(self) -> None:
        if not self.off_policy:
            self._rollouts += 1
            self._observations = recent_rollout(self.model, self.batch_size, self._generator)

    def _on_step(self) -> bool:
        if self.off_policy and self.n_calls % (self.every or 10) == 0:
            self._observations = recent_replayed(self.model, self.batch_size, self._generator)
            if self._observations is not None:
                self._adapt()
        return True

    # ---- the rule -----------------------------------------------------------------------------------------------

    def _adapt(self) -> None:
        """Plappert et al. 2018, eq. (1)."""
        target, scale = self.target_at(self.progress_remaining), self.policy.noise_scale
        for _ in range(self.repeats):
            self.distance = self._measure(scale)
            if math.isfinite(self.distance):  # else the weights are broken, which no scale mends
                scale = scale * self.alpha if self.distance < target else scale / self.alpha
        self._set_scale(self._limited(scale))
        self.logger.record("noise/distance", self.distance)
        self.logger.record("noise/target", target)

    def _measure(self, scale: float) -> float:
        """Distance under a scale, which is not set for it."""
        keys = fold_in(fold(_MEASURING, self._measurements), th.arange(self.batch_size, device=self.policy.device))
        self._measurements += 1
        keys = restrict(keys, self.policy.members)
        ladder = self.policy.noise_ladder or (1.0,)  # its rungs in turn: each has its share of the observations
        scales = scale * th.tensor(ladder, device=keys.device).repeat(-(-len(keys) // len(ladder)))[: len(keys)]
        return policy_distance(self.policy, self._observations, RowNoise(keys, scales), MEASURES[self.measure])

    def _limited(self, scale: float) -> float:
        limited = min(max(scale, _LIMITS[0]), _LIMITS[1])
        if limited != scale and not self._warned:
            self._warned = True
            warn_user(
                f"{self.name} has driven the noise scale to its limit {limited:g} at step {self.num_timesteps}, at a "
                f"distance of {self.distance:.3g}: the target is out of reach of this noise. Check the target, and sigma.",
            )
        return limited


def _checked_epsilon(epsilon: Any, measure: str) -> Schedule:
    """Take epsilon as a schedule, whatever it came as."""
    if MEASURES[measure].of_epsilon is None:
        raise ValueError(f'epsilon does not fit measure="{measure}", which is for continuous actions; give target instead.')
    if callable(epsilon):
        return epsilon
    if isinstance(epsilon, Sequence) and not isinstance(epsilon, str):
        if len(epsilon) != 3:
            raise ValueError(f"epsilon must be a number, a function, or (initial, final, fraction), got {epsilon!r}.")
        initial, final = (check_number(f"epsilon[{i}]", epsilon[i], 0.0, 1.0) for i in (0, 1))
        return LinearSchedule(initial, final, check_number("epsilon[2]", epsilon[2], 0.0, 1.0, above=True))
    value = check_number("epsilon", epsilon, 0.0, 1.0, above=True)
    return lambda _: value
