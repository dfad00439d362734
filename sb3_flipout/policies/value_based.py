"""Policies for DQN and QRDQN: act under row noise, and learn under fresh row noise in each gradient step.

Nothing of the acting noise is replayed: a value-based update is right under any weights. So there are two streams. Acting:
one key per environment, held as ``resample`` says, under the acting base. Learning: keys and base are pure functions of
(gradient step, role of the network), so that no state has to be threaded through SB3's ``train``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import CnnPolicy, DQNPolicy, MultiInputPolicy, QNetwork
from torch import nn

from sb3_flipout.layers import NoisyNetwork, perturb
from sb3_flipout.noise import RowNoise, fold
from sb3_flipout.policies.base import FlipoutPolicy, check_extractor, n_rows
from sb3_flipout.policies.learning import LearningNoise, NoisyValueNet
from sb3_flipout.policies.settings import ValueSettings

_PRIOR_BASE = 18  # a stream beside those in policies/base.py and policies/learning.py
_PRIOR_NUMBERS = 1000  # the layers of the prior are numbered from here


class FlipoutQNetwork(NoisyValueNet, QNetwork):
    """DQN's network."""


class ValueNoise(FlipoutPolicy):
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
    online_name: ClassVar[str]

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: Any, lr_schedule: Schedule, *args: Any, **kwargs: Any
    ) -> None:
        names = [field.name for field in fields(ValueSettings) if field.name in kwargs]
        settings = ValueSettings(**{name: kwargs.pop(name) for name in names})
        check_extractor(observation_space, type(self), kwargs)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self._init_noise(settings)
        self.learning = LearningNoise(self._noise_seed, settings)
        self._acting_noise: RowNoise | None = None
        self._acting_base_key = self._base_key(0)
        for role, net in enumerate((self.online, self.target)):
            self._perturb([self._head(net) if settings.perturb == "heads" else net])
            net.role, net.learning = role, self.learning
        self._add_prior()
        for net in (self.online, self.target):
            net.noisy = NoisyNetwork(net, self._parts(net))
        # `perturbed(policy, keys)` is about what acts. The target network's layers have the same numbers, on purpose.
        NoisyNetwork(self, self._parts(self.online))
        self.optimizer = self._make_optimizer(self.online.parameters(), lr_schedule)

    @property
    def online(self) -> NoisyValueNet:
        """The network that acts and learns."""
        return getattr(self, self.online_name)

    @property
    def target(self) -> NoisyValueNet:
        """The target network."""
        return getattr(self, f"{self.online_name}_target")

    def _parts(self, net: NoisyValueNet) -> list[nn.Module]:
        return [net, net.prior[0]] if net.prior else [net]

    def _head(self, net: NoisyValueNet) -> nn.Module:
        return [module for module in net.modules() if type(module) is nn.Linear][-1]

    def _add_prior(self) -> None:
        """Add a frozen random value per member: a network of zero means, whose perturbation alone is the prior."""
        if self.noise_settings.prior_scale == 0:
            return
        with th.random.fork_rng(devices=[]):
            self.prior = self._make_value_net()
        base_key = fold(self._noise_seed, _PRIOR_BASE)
        # sigma 1/sqrt(fan_in) keeps the size of activations from layer to layer.
        perturb(self.prior, base_key=base_key, family="gaussian", sigma_init=1.0, learn_sigma=False)
        for layer in NoisyNetwork(self.prior).layers:
            # Apart from the numbers of the learned network, so that the two perturbations have nothing in common.
            layer.noise_index = _PRIOR_NUMBERS + (layer.noise_index or 0)
            layer.redraw(base_key)
            for mean in (layer.weight, layer.bias):
                if mean is not None:
                    nn.init.zeros_(mean)
        self.prior.requires_grad_(False)
        for net in (self.online, self.target):
            net.__dict__["prior"] = (self.prior, float(self.noise_settings.prior_scale))

    @abstractmethod
    def _make_value_net(self) -> NoisyValueNet:
        """Make one more network of the same form."""

    # ---- what the algorithm tells -------------------------------------------------------------------------------

    def begin_rollout(self) -> None:
        """Tell that a rollout starts."""
        self._keys.begin_rollout()

    @contextmanager
    def collecting(self, n_envs: int) -> Iterator[None]:
        """
        Mark one collection step: predictions inside it act in the training environments.

        :param n_envs: Number of environments
        :return: Context manager
        """
        step = self._keys.step
        self._acting_noise = self._collection_noise(n_envs)
        self._move_acting_base(step, self._acting_noise)
        try:
            yield
        finally:
            self._acting_noise = None

    def _move_acting_base(self, step: int, noise: RowNoise) -> None:
        settings = self.noise_settings
        if settings.noise_sharing == "shared":  # the base is the draw, so it changes when the first environment's key does
            self._bind_acting_base(int(noise.keys[0]))
        elif settings.base_every is not None and self.learning.base_moves:
            self._bind_acting_base(self._base_key(step // settings.base_every))

    def _bind_acting_base(self, base_key: int) -> None:
        if base_key != self._acting_base_key:
            self._acting_base_key = base_key
            self.online.noisy.redraw(base_key)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """
        Mark the gradient steps of an update; inside it, networks that are given no noise draw that of the gradient step.

        :return: Context manager; the acting base is as before when it is left
        """
        acting_bases = self.online.noisy.bases()
        self.learning.active, self.learning.scale = True, self._noise_scale
        # Hung on here, not once for all: copies of an optimizer, and another one put in its place, have no hooks.
        hook = self.optimizer.register_step_post_hook(self.learning.count)
        try:
            yield
        finally:
            hook.remove()
            self.learning.active = False
            self.online.drawn_base_key = None
            self.online.noisy.bind(acting_bases)

    # ---- predictions --------------------------------------------------------------------------------------------

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        if self.explicit_noise is not None or self.online.explicit_noise is not None:
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
            raise ValueError("member_values needs an ensemble, this policy has members=None; give members=20, say.")
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

    # ---- save and load ------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """
        Give the noise state; torch puts it into ``state_dict``.

        :return: Settings, seed, counters and noise scale, as plain Python values
        """
        return {**super().get_extra_state(), "gradient_steps": self.learning.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`get_extra_state` gave
        """
        super().set_extra_state(state)
        self.learning.seed, self.learning.step = self._noise_seed, state["gradient_steps"]
        self._acting_base_key = self._base_key(0)
        for net in (self.online, self.target):
            for layer in net.noisy.layers:
                prior = (layer.noise_index or 0) >= _PRIOR_NUMBERS
                layer.redraw(fold(self._noise_seed, _PRIOR_BASE) if prior else self._acting_base_key)


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
