"""Policies for PPO and A2C: explore under row noise, and replay it exactly in the update.

One transition's noise: :meth:`OnPolicyNoise.forward` draws keys, acts under them and hangs them on the log-probabilities;
the rollout buffer stores them and hands them back on the observations; :meth:`OnPolicyNoise.evaluate_actions` activates
them again. Values are replayed with the same keys; bootstrap values, asked for without keys, use mean weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_flipout.layers import NoisyNetwork
from sb3_flipout.noise.rows import without_noise
from sb3_flipout.policies.base import FlipoutPolicy, check_extractor, n_rows
from sb3_flipout.policies.settings import NoiseSettings


class OnPolicyNoise(FlipoutPolicy, ActorCriticPolicy):
    """
    Mixin that gives an actor-critic policy its noise.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of SB3's policy
    :param family: How weights are perturbed: ``"gaussian"``, ``"factorised"``, ``"multiplicative"``, ``"dropconnect"`` or
        ``"isotropic"``
    :param sigma_init: Initial sigma in the family's unit (1/sqrt(fan_in), or relative to the mean weights); ``None``: 0.5
    :param learn_sigma: Whether sigma is trained
    :param resample: How long an environment keeps its noise: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps
    :param base_every: How often the base perturbation is redrawn, in rollouts; ``None`` for never
    :param noise_sharing: ``"flipout"``, ``"shared"`` (with ``resample="rollout"``) or ``"independent"``
    :param perturb: ``"policy"`` (all that the action depends on), ``"heads"``, ``"linear"`` (no convolutions) or ``"all"``
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``
    :param kwargs: Further keyword arguments of SB3's policy
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    network: NoisyNetwork

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        family: str = "gaussian",
        sigma_init: float | None = None,
        learn_sigma: bool = True,
        resample: str | int = "step",
        base_every: int | None = 1,
        noise_sharing: str = "flipout",
        perturb: str = "policy",
        init: str = "keep",
        **kwargs: Any,
    ) -> None:
        settings = NoiseSettings(family, sigma_init, learn_sigma, resample, base_every, noise_sharing, perturb, init)
        _check_replayable(settings)
        check_extractor(observation_space, type(self), kwargs)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self._init_noise(settings)
        self._perturb(self._modules_to_perturb(perturb))
        self.network = NoisyNetwork.of(self)
        self._rollouts = 0
        self._collects = self._updates = False
        # Made once more, over sigma too. The first one has no state yet, so nothing is lost.
        self.optimizer = self._make_optimizer(self.parameters(), lr_schedule)

    def _modules_to_perturb(self, perturb: str) -> list[nn.Module]:
        if perturb == "all":
            return [self]
        if perturb == "heads":
            return [self.action_net]
        # A user's own mlp_extractor need not have a policy_net; then it is perturbed as a whole.
        hidden = getattr(self.mlp_extractor, "policy_net", self.mlp_extractor)
        return [self.pi_features_extractor, hidden, self.action_net]

    def begin_rollout(self) -> None:
        """Tell that a rollout starts: the base is redrawn if it is time, and holds until the update after it is done."""
        every = self.noise_settings.base_every
        if every is not None and self._rollouts % every == 0:
            self.network.redraw(self._base_key(self._rollouts // every))
        self._rollouts += 1
        self._keys.begin_rollout()

    @contextmanager
    def collecting(self, n_envs: int) -> Iterator[None]:
        """
        Mark a rollout: forward passes inside it act in the training environments.

        :param n_envs: Number of environments
        :return: Context manager
        """
        self._collects = True
        try:
            yield
        finally:
            self._collects = False

    @contextmanager
    def updating(self) -> Iterator[None]:
        """
        Mark an update: inside it, every batch has to bring its noise.

        :return: Context manager
        """
        self._updates = True
        try:
            yield
        finally:
            self._updates = False

    def get_extra_state(self) -> dict[str, Any]:
        """
        Give the noise state; torch puts it into ``state_dict``.

        :return: Settings, seed, counters and noise scale, as plain Python values
        """
        return {**super().get_extra_state(), "rollouts": self._rollouts}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`get_extra_state` gave
        """
        super().set_extra_state(state)
        self._rollouts = state["rollouts"]
        every = self.noise_settings.base_every
        self.network.redraw(self._base_key(0 if every is None else max(self._rollouts - 1, 0) // every))

    def forward(self, obs: th.Tensor, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Act in the environments: the collection step of a rollout, one row per environment.

        The noise of the rows hangs on the returned log-probabilities as their attribute ``row_noise``. Outside
        ``collect_rollouts`` it comes from the stream of evaluation, so that training does not notice.

        :param obs: Observations, shape (n_envs, ...)
        :param deterministic: Most likely actions under the mean weights, as exports use it; draws nothing
        :return: Actions, values and log-probabilities
        """
        if self.explicit_noise is None:
            collects = self._collects and not deterministic
            noise = self._collection_noise(n_rows(obs)) if collects else self._prediction_noise(obs, deterministic)
            with self.network.activate(noise):
                return self.forward(obs, deterministic)
        actions, values, log_prob = super().forward(obs, deterministic)
        log_prob.row_noise = self.explicit_noise[0]  # type: ignore[attr-defined]
        return actions, values, log_prob

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Evaluate actions under the noise that the observations carry: the update.

        :param obs: Observations of N transitions, carrying their noise
        :param actions: Actions of these transitions
        :return: Values, log-probabilities and entropies
        :raises ValueError: In training mode, if the observations carry no noise
        """
        if self.explicit_noise is None:
            with self.network.activate(self._replayed_noise(obs, needed=self.training)):
                return self.evaluate_actions(obs, actions)
        return super().evaluate_actions(without_noise(obs), actions)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """
        Give the action distribution under the noise that the observations carry, else under the mean weights.

        :param obs: Observations
        :return: Action distribution
        :raises ValueError: During an update, if the observations carry no noise
        """
        if self.explicit_noise is None:
            with self.network.activate(self._replayed_noise(obs, needed=self._updates)):
                return self.get_distribution(obs)
        return super().get_distribution(without_noise(obs))

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        Give values under the noise that the observations carry, else under the mean weights (bootstrapping).

        :param obs: Observations
        :return: Values, shape (N, 1)
        :raises ValueError: During an update, if the observations carry no noise
        """
        if self.explicit_noise is None:
            with self.network.activate(self._replayed_noise(obs, needed=self._updates)):
                return self.predict_values(obs)
        return super().predict_values(without_noise(obs))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self.explicit_noise is None:
            with self.network.activate(self._prediction_noise(observation, deterministic)):
                return self._predict(observation, deterministic)
        return super()._predict(observation, deterministic)


def _check_replayable(settings: NoiseSettings) -> None:
    if settings.noise_sharing == "shared" and settings.resample != "rollout":
        raise ValueError(
            f'noise_sharing="shared" with resample={settings.resample!r} could not be replayed: the shared draw is the base '
            'perturbation, which must hold from a rollout to the end of its update. Use resample="rollout", or '
            'noise_sharing="flipout", whose rows differ by their keys.'
        )


class FlipoutActorCriticPolicy(OnPolicyNoise, ActorCriticPolicy):
    """``"FlipoutMlpPolicy"`` of PPO and A2C; arguments as in :class:`OnPolicyNoise`."""


class FlipoutActorCriticCnnPolicy(OnPolicyNoise, ActorCriticCnnPolicy):
    """``"FlipoutCnnPolicy"`` of PPO and A2C; arguments as in :class:`OnPolicyNoise`."""


class FlipoutMultiInputActorCriticPolicy(OnPolicyNoise, MultiInputActorCriticPolicy):
    """``"FlipoutMultiInputPolicy"`` of PPO and A2C; arguments as in :class:`OnPolicyNoise`."""
