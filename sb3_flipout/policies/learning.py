"""The noise of gradient steps, and the value networks that ask for it while SB3 trains."""

from __future__ import annotations

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

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Compute values under the active noise; while SB3 trains, under that of the gradient step.

        :param obs: Observations, shape (N, ...)
        :return: Values, shape (N, n_actions), or quantiles, shape (N, n_quantiles, n_actions)
        """
        if self.explicit_noise is None and self.learning is not None and self.learning.active:
            with self.noisy.activate(self.learning.rows(self.role, n_rows(obs), self.device)):
                return self.forward(obs)
        values: th.Tensor = super().forward(obs)
        if self.prior is None:
            return values
        network, scale = self.prior
        with th.no_grad():
            prior = network(obs)
        return values + scale * prior
