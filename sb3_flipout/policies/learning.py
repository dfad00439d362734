"""The noise of gradient steps, and the networks that ask for it while SB3 trains."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch as th
from stable_baselines3.common.policies import BaseModel, BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_flipout.layers import NoisyNetwork
from sb3_flipout.noise import RowNoise, fold, fold_in
from sb3_flipout.noise.stream import restrict
from sb3_flipout.policies.base import n_rows
from sb3_flipout.policies.prior import Prior
from sb3_flipout.policies.settings import LearningSettings

ONLINE, TARGET = 0, 1  # roles
_KEYS, _BASE = 16, 17  # streams of a policy's seed, beside those in policies/base.py


class LearningNoise:
    """
    The noise of gradient steps, shared by a policy and its networks.

    :param seed: Seed of the policy's noise
    :param settings: Settings of the policy
    """

    def __init__(self, seed: int, settings: LearningSettings) -> None:
        self.seed = seed
        self.settings = settings
        self.step = 0  # gradient steps so far
        self.active = False  # whether SB3's `train` is running
        self.scale = 1.0
        # Whether gradient steps need bases of their own: not with members, whose base is frozen, and not where the factors
        # alone are the noise.
        drawn = settings.layer_noise().spec.base is not None or settings.noise_sharing == "shared"
        self.base_moves = drawn and settings.members is None and settings.noise_sharing != "independent"

    def count(self, *_: Any) -> None:
        """
        Count a gradient step; hung on the optimizer.

        :param _: What torch hands to hooks
        """
        self.step += 1

    def _role(self, role: int) -> int:
        return ONLINE if self.settings.target_noise == "same" else role

    def rows(self, role: int, n: int, device: th.device) -> RowNoise | None:
        """
        Give the noise of a batch in the present gradient step.

        :param role: Online or target network
        :param n: Rows of the batch
        :param device: Device of the network
        :return: Row noise; ``None`` for mean weights
        """
        if role == TARGET and self.settings.target_noise == "mean":
            return None
        keys = fold_in(fold(self.seed, _KEYS, self.step, self._role(role)), th.arange(n, device=device))
        return RowNoise(restrict(keys, self.settings.members), self.scale)

    def base_key(self, role: int) -> int:
        """
        Give the key of the learning base in the present gradient step.

        :param role: Online or target network
        :return: Base key
        """
        return fold(self.seed, _BASE, self.step, self._role(role))


class NoisyNet(BaseModel):
    """
    Mixin of a network that draws the noise of the gradient step while SB3 trains.

    Noise that was activated by name, with ``perturbed`` or by the policy, goes before it.
    """

    role: int = ONLINE
    learning: LearningNoise | None = None
    noisy: NoisyNetwork
    explicit_noise: tuple[RowNoise | None] | None = None

    def _step_noise(self, obs: PyTorchObs, role: int) -> AbstractContextManager[None] | None:
        """Activate the noise of the present gradient step; ``None`` where the network is to run as it is."""
        learning = self.learning
        if self.explicit_noise is not None or learning is None or not learning.active:
            return None
        noise = learning.rows(role, n_rows(obs), self.device)
        if noise is not None and learning.base_moves:
            self.noisy.redraw(learning.base_key(role))
        return self.noisy.activate(noise)


class NoisyValueNet(NoisyNet, BasePolicy):
    """Mixin of a value network that learns under noise, and adds its members' prior."""

    # In a tuple, so that the prior is no part of this network's parameters: it is neither trained nor copied by polyak.
    prior: tuple[Prior, float] | None = None

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Compute values under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :return: Values, shape (N, n_actions), or quantiles, shape (N, n_quantiles, n_actions)
        """
        step_noise = self._step_noise(obs, self.role)
        if step_noise is not None:
            with step_noise:
                if self.prior is not None:
                    self.prior[0].measure(obs)
                return self.forward(obs)
        values: th.Tensor = super().forward(obs)
        if self.prior is None:
            return values
        prior, scale = self.prior
        return values + scale * prior(obs)


class NoisyCritic(NoisyNet):
    """
    Mixin of a critic that learns under noise.

    SB3 computes the actor's loss after the critic's optimizer step, which is what counts gradient steps: there the critic has
    the noise of its next step.
    """

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> Any:
        """
        Compute the values of actions under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :param actions: Actions, shape (N, n_actions)
        :return: What the plain critic gives
        """
        step_noise = self._step_noise(obs, self.role)
        if step_noise is None:
            return super().forward(obs, actions)
        with step_noise:
            return self.forward(obs, actions)

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Compute the values of the first critic alone, as TD3's actor loss asks for them.

        :param obs: Observations, shape (N, ...)
        :param actions: Actions, shape (N, n_actions)
        :return: Values, shape (N, 1)
        """
        step_noise = self._step_noise(obs, self.role)
        if step_noise is None:
            return super().q1_forward(obs, actions)  # type: ignore[misc]
        with step_noise:
            return self.q1_forward(obs, actions)


class _NoisyActor(NoisyNet, BasePolicy):
    """What actors share: where SB3 asks for actions without gradients, they are part of a target."""

    def _actor_role(self) -> int:
        return self.role if th.is_grad_enabled() else TARGET


class NoisyDeterministicActor(_NoisyActor):
    """Mixin of TD3's actor, whose output is the action."""

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Compute actions under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :return: Actions, shape (N, n_actions)
        """
        step_noise = self._step_noise(obs, self._actor_role())
        if step_noise is None:
            return super().forward(obs)
        with step_noise:
            return self.forward(obs)


class NoisyStochasticActor(_NoisyActor):
    """Mixin of an actor like SAC's: acting and learning both ask for the parameters of its action distribution."""

    def get_action_dist_params(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        """
        Compute the action distribution under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :return: Mean, logarithm of the standard deviation, further arguments of the distribution
        """
        step_noise = self._step_noise(obs, self._actor_role())
        if step_noise is None:
            return super().get_action_dist_params(obs)  # type: ignore[misc]
        with step_noise:
            return self.get_action_dist_params(obs)
