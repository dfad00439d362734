"""Policies for DQN and QRDQN: explore by weight noise alone, or by an implicit ensemble whose members have priors."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import CnnPolicy, DQNPolicy, MultiInputPolicy, QNetwork
from torch import nn

from sb3_flipout.layers import NoisyNetwork
from sb3_flipout.noise import RowNoise, fold
from sb3_flipout.policies.base import n_rows
from sb3_flipout.policies.learning import NoisyNet, NoisyValueNet
from sb3_flipout.policies.off_policy import OffPolicyNoise
from sb3_flipout.policies.prior import Prior
from sb3_flipout.policies.settings import ValueSettings

_PRIOR_BASE = 18  # a stream beside those in policies/base.py and policies/learning.py


class FlipoutQNetwork(NoisyValueNet, QNetwork):
    """DQN's network."""


class ValueNoise(OffPolicyNoise):
    """
    Mixin that gives a value-based policy its noise.

    :param observation_space: Observation space
    :param action_space: Action space, Discrete
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of SB3's policy
    :param kwargs: Noise settings, see :class:`ValueSettings`, and further keyword arguments of SB3's policy
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    noise_settings: ValueSettings
    settings_class = ValueSettings
    online_name: ClassVar[str]

    def _make_noisy(self, lr_schedule: Schedule) -> None:
        for role, net in enumerate((self.online, self.target)):
            self._perturb([self._head(net) if self.noise_settings.perturb == "heads" else net])
            net.role, net.learning = role, self.learning
        self.target.load_state_dict(self.online.state_dict())  # as SB3 does; `init` may have drawn
        self._add_prior()
        for net in (self.online, self.target):
            net.noisy = NoisyNetwork(net, self._parts(net))
        self._own_network(self._parts(self.online))
        self.optimizer = self._make_optimizer(self.online.parameters(), lr_schedule)

    @property
    def online(self) -> NoisyValueNet:
        """The network that acts and learns."""
        return getattr(self, self.online_name)

    @property
    def target(self) -> NoisyValueNet:
        """The target network."""
        return getattr(self, f"{self.online_name}_target")

    @property
    def acting(self) -> NoisyNet:
        """The network that acts."""
        return self.online

    @property
    def step_optimizer(self) -> th.optim.Optimizer:
        """The optimizer that makes one step in each gradient step."""
        return self.optimizer

    def _noisy_nets(self) -> list[NoisyNet]:
        return [self.online, self.target]

    def _parts(self, net: NoisyValueNet) -> list[nn.Module]:
        return [net, net.prior[0]] if net.prior else [net]

    def _head(self, net: NoisyValueNet) -> nn.Module:
        return [module for module in net.modules() if type(module) is nn.Linear][-1]

    def _add_prior(self) -> None:
        """Add a frozen random function per member to the values of both networks."""
        if self.noise_settings.prior_scale == 0:
            return
        with th.random.fork_rng(devices=[]):
            self.prior = Prior(self._make_value_net(), fold(self._noise_seed, _PRIOR_BASE))
        for net in (self.online, self.target):
            net.__dict__["prior"] = (self.prior, float(self.noise_settings.prior_scale))

    @abstractmethod
    def _make_value_net(self) -> NoisyValueNet:
        """Make one more network of the same form."""

    # ---- predictions --------------------------------------------------------------------------------------------

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        if self._is_explicit():
            return self._greedy(observation)
        if deterministic and self._acting_noise is None and self.noise_settings.members is not None:
            return self._vote(observation)
        noise = self._acting_noise or self._prediction_noise(observation, deterministic)
        with self.online.noisy.activate(noise):
            return self._greedy(observation)

    def _greedy(self, observation: PyTorchObs) -> th.Tensor:
        return self.online._predict(observation, deterministic=True)

    def _vote(self, observation: PyTorchObs) -> th.Tensor:
        """Action that most members prefer; among equals, the one with the larger mean value."""
        values = self.member_values(observation)
        votes = nn.functional.one_hot(values.argmax(dim=2), values.shape[2]).sum(dim=0)
        mean = values.mean(dim=0)
        ranks = mean.argsort(dim=1).argsort(dim=1)
        return (votes * values.shape[2] + ranks).argmax(dim=1)

    def member_values(self, observation: PyTorchObs | np.ndarray | dict[str, np.ndarray]) -> th.Tensor:
        """
        Give the values of all members, in one pass: look at their spread for the ensemble's uncertainty.

        :param observation: N observations, as arrays or tensors
        :return: Values, shape (K, N, n_actions); means over quantiles for QRDQN
        :raises ValueError: If the policy has no members
        """
        members = self.noise_settings.members
        if members is None:
            raise ValueError("member_values needs an ensemble, this policy has members=None; give members=10, say.")
        tensors: Any = observation if isinstance(observation, th.Tensor) else self._as_tensors(observation)
        n = n_rows(tensors)
        repeated = (
            {name: value.repeat(members, *[1] * (value.dim() - 1)) for name, value in tensors.items()}
            if isinstance(tensors, dict)
            else tensors.repeat(members, *[1] * (tensors.dim() - 1))
        )
        keys = th.arange(members, device=self.device).repeat_interleave(n)
        with th.no_grad(), self.online.noisy.activate(RowNoise(keys, self._noise_scale)):
            values = self.online(repeated)
        values = values.mean(dim=1) if values.dim() == 3 else values
        return values.view(members, n, -1)

    def _as_tensors(self, observation: Any) -> Any:
        if isinstance(observation, dict) and all(isinstance(value, th.Tensor) for value in observation.values()):
            return observation
        return self.obs_to_tensor(observation)[0]

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`get_extra_state` gave
        """
        super().set_extra_state(state)
        if self.online.prior is not None:
            self.prior.redraw(fold(self._noise_seed, _PRIOR_BASE))


class FlipoutDQNPolicy(ValueNoise, DQNPolicy):
    """``"FlipoutMlpPolicy"`` of DQN; arguments as in :class:`ValueNoise`."""

    online_name = "q_net"

    def make_q_net(self) -> QNetwork:
        """
        Make a network as SB3 does, of the class that knows of learning noise.

        :return: Network
        """
        net = super().make_q_net()
        net.__class__ = FlipoutQNetwork
        return net

    def _make_value_net(self) -> NoisyValueNet:
        net = self.make_q_net()
        assert isinstance(net, NoisyValueNet), "make_q_net has just made it one"
        return net


class FlipoutDQNCnnPolicy(FlipoutDQNPolicy, CnnPolicy):
    """``"FlipoutCnnPolicy"`` of DQN; arguments as in :class:`ValueNoise`."""


class FlipoutDQNMultiInputPolicy(FlipoutDQNPolicy, MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of DQN; arguments as in :class:`ValueNoise`."""
