"""Policies for SAC, TD3 and DDPG: an actor that explores and learns under weight noise.

The actor is perturbed in collection and in its own loss; where SB3 asks it for the actions of a target, by ``target_noise``.
Critics see mean weights, unless ``perturb="all"`` asks for their noise too.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac import policies as sac
from stable_baselines3.td3 import policies as td3
from torch import nn

from sb3_flipout.layers import FlipoutLayer, NoisyNetwork
from sb3_flipout.policies.learning import (
    ONLINE,
    TARGET,
    NoisyCritic,
    NoisyDeterministicActor,
    NoisyNet,
    NoisyStochasticActor,
)
from sb3_flipout.policies.off_policy import OffPolicyNoise
from sb3_flipout.policies.settings import ActorSettings


class FlipoutContinuousCritic(NoisyCritic, ContinuousCritic):
    """Critic of SAC, TD3 and DDPG."""


class FlipoutSACActor(NoisyStochasticActor, sac.Actor):
    """SAC's actor."""


class FlipoutTD3Actor(NoisyDeterministicActor, td3.Actor):
    """TD3's actor."""


class ActorNoise(OffPolicyNoise):
    """
    Mixin that gives an off-policy actor-critic its noise.

    :param observation_space: Observation space
    :param action_space: Action space, Box
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of SB3's policy
    :param kwargs: Noise settings, see :class:`ActorSettings`, and further keyword arguments of SB3's policy
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    settings_class = ActorSettings
    #: What networks become; each is derived from the plain class that it takes the place of.
    noisy_classes: ClassVar[tuple[type[NoisyNet], ...]]
    #: Names of the target networks, with the network that each follows by polyak averaging.
    targets: ClassVar[tuple[tuple[str, str], ...]] = (("critic_target", "critic"),)
    actor: Any
    critic: Any

    def _make_noisy(self, lr_schedule: Schedule) -> None:
        perturbs_critics = self.noise_settings.perturb == "all"
        online = ["actor", "critic"] if perturbs_critics else ["actor"]
        # In one call: a shared extractor is perturbed once, and no two layers have the same number.
        self._perturb([*self._actor_modules(self.actor), *([self.critic] if perturbs_critics else [])])
        for name in online:
            self._learn_under_noise(getattr(self, name), ONLINE)
        for name, followed in self.targets:
            make = self._perturb_target if followed in online else self._match_shared_layers
            make(getattr(self, name), getattr(self, followed))
            getattr(self, name).load_state_dict(getattr(self, followed).state_dict())  # as SB3 does; `init` may have drawn
        self._own_network([self.actor])
        for name in online:
            net = getattr(self, name)
            net.optimizer = self._make_optimizer(_with_sigma(net, net.optimizer), lr_schedule)

    def _actor_modules(self, actor: Any) -> list[nn.Module]:
        if self.noise_settings.perturb != "heads":
            return [actor]
        last = [module for module in actor.mu.modules() if isinstance(module, nn.Linear)][-1]
        return [last, actor.log_std] if isinstance(getattr(actor, "log_std", None), nn.Linear) else [last]

    def _learn_under_noise(self, net: Any, role: int) -> None:
        plain = type(net)
        noisy = next((noisy for noisy in self.noisy_classes if plain in noisy.__bases__), None)
        if noisy is None:
            known = ", ".join(
                f"{base.__module__}.{base.__name__}" for noisy in self.noisy_classes for base in noisy.__bases__[1:]
            )
            raise TypeError(
                f"{plain.__module__}.{plain.__name__} cannot learn under weight noise: {type(self).__name__} knows {known}. "
                "Derive a noisy class from it as sb3_flipout.policies.actor_critic does, and add it to noisy_classes."
            )
        net.__class__ = noisy
        net.role, net.learning, net.noisy = role, self.learning, NoisyNetwork(net)

    def _perturb_target(self, target: Any, followed: NoisyNet) -> None:
        self._perturb(self._actor_modules(target) if followed is self.actor else [target])
        # The same numbers as in the network that it follows, for `target_noise="same"`.
        for layer, model in zip(NoisyNetwork(target).layers, followed.noisy.layers, strict=True):
            layer.noise_index = model.noise_index
            layer.redraw(model.base_key)
        self._learn_under_noise(target, TARGET)

    def _match_shared_layers(self, target: nn.Module, followed: nn.Module) -> None:
        """Give a target the sigma of layers that its critic shares with the actor: polyak pairs parameters by their order."""
        pairs = zip(target.modules(), followed.modules(), strict=True)
        shared = [layer for layer, model in pairs if isinstance(model, FlipoutLayer)]
        if shared:
            self._perturb(shared)

    @property
    def acting(self) -> NoisyNet:
        """The network that acts."""
        return self.actor

    @property
    def step_optimizer(self) -> th.optim.Optimizer:
        """The optimizer that makes one step in each gradient step; the actor's may be delayed."""
        return self.critic.optimizer

    def _noisy_nets(self) -> list[NoisyNet]:
        nets = [self.actor, self.critic, *(getattr(self, name) for name, _ in self.targets)]
        return [net for net in nets if isinstance(net, NoisyNet)]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self._is_explicit():
            return self.actor._predict(observation, deterministic)
        noise = self._acting_noise or self._prediction_noise(observation, deterministic)
        with self.actor.noisy.activate(noise):
            return self.actor._predict(observation, deterministic)


def _with_sigma(net: nn.Module, optimizer: th.optim.Optimizer) -> list[nn.Parameter]:
    """Give the parameters that an optimizer has, in their order, with the sigma of each layer among them."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = []
    for module in net.modules():
        of_module = list(module.parameters(recurse=False))
        if any(id(parameter) in known for parameter in of_module):
            found += of_module
    return found


class FlipoutSACPolicy(ActorNoise, sac.SACPolicy):
    """``"FlipoutMlpPolicy"`` of SAC; arguments as in :class:`ActorNoise`."""

    noisy_classes = (FlipoutSACActor, FlipoutContinuousCritic)


class FlipoutSACCnnPolicy(FlipoutSACPolicy, sac.CnnPolicy):
    """``"FlipoutCnnPolicy"`` of SAC; arguments as in :class:`ActorNoise`."""


class FlipoutSACMultiInputPolicy(FlipoutSACPolicy, sac.MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of SAC; arguments as in :class:`ActorNoise`."""


class FlipoutTD3Policy(ActorNoise, td3.TD3Policy):
    """``"FlipoutMlpPolicy"`` of TD3 and DDPG; arguments as in :class:`ActorNoise`."""

    noisy_classes = (FlipoutTD3Actor, FlipoutContinuousCritic)
    targets = (("actor_target", "actor"), ("critic_target", "critic"))


class FlipoutTD3CnnPolicy(FlipoutTD3Policy, td3.CnnPolicy):
    """``"FlipoutCnnPolicy"`` of TD3 and DDPG; arguments as in :class:`ActorNoise`."""


class FlipoutTD3MultiInputPolicy(FlipoutTD3Policy, td3.MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of TD3 and DDPG; arguments as in :class:`ActorNoise`."""
