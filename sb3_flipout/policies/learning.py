"""The noise of gradient steps, and the value networks that ask for it while SB3 trains."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_flipout.layers import NoisyNetwork
from sb3_flipout.noise import RowNoise, fold, fold_in
from sb3_flipout.noise.stream import restrict
from sb3_flipout.policies.base import n_rows
from sb3_flipout.policies.settings import ValueSettings

_ONLINE, _TARGET = 0, 1
_KEYS, _BASE = 16, 17  # streams of a policy's seed, beside those in policies/base.py


class LearningNoise:
    """
    The noise of gradient steps, shared by a policy and its networks.

    :param seed: Seed of the policy's noise
    :param settings: Settings of the policy
    """

    def __init__(self, seed: int, settings: ValueSettings) -> None:
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
        return _ONLINE if self.settings.target_noise == "same" else role

    def rows(self, role: int, n: int, device: th.device) -> RowNoise | None:
        """
        Give the noise of a batch in the present gradient step.

        :param role: Online or target network
        :param n: Rows of the batch
        :param device: Device of the network
        :return: Row noise; ``None`` for mean weights
        """
        if role == _TARGET and self.settings.target_noise == "mean":
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


class NoisyValueNet(BasePolicy):
    """Mixin of a value network that draws learning noise while SB3 trains, and adds its members' prior."""

    role: int = _ONLINE
    learning: LearningNoise | None = None
    noisy: NoisyNetwork
    # In a tuple, so that the prior is no part of this network's parameters: it is neither trained nor copied by polyak.
    prior: tuple[BasePolicy, float] | None = None
    explicit_noise: tuple[RowNoise | None] | None = None
    drawn_base_key: int | None = None  # of the learning base that is bound now

    def _draw_base(self, base_key: int) -> None:
        if base_key != self.drawn_base_key:
            self.noisy.redraw(base_key)
            self.drawn_base_key = base_key

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Compute values under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :return: Values, shape (N, n_actions), or quantiles, shape (N, n_quantiles, n_actions)
        """
        if self.explicit_noise is None and self.learning is not None and self.learning.active:
            noise = self.learning.rows(self.role, n_rows(obs), self.device)
            if noise is not None and self.learning.base_moves:
                self._draw_base(self.learning.base_key(self.role))
            with self.noisy.activate(noise):
                return self.forward(obs)
        values: th.Tensor = super().forward(obs)
        if self.prior is None:
            return values
        network, scale = self.prior
        with th.no_grad():
            prior = network(obs)
        return values + scale * prior
