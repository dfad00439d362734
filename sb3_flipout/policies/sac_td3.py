"""Policies for SAC, TD3 and DDPG (TQC and CrossQ stand on them): an actor that explores and learns under weight noise.

The actor is perturbed in collection and in its own loss; where SB3 asks it for the actions of a target, by ``target_noise``.
Critics see mean weights, unless ``perturb="all"`` asks for their noise too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac import policies as sac
from stable_baselines3.td3 import policies as td3
from torch import nn

from sb3_flipout.layers import FlipoutLayer, attach
from sb3_flipout.layers.config import Init
from sb3_flipout.layers.convert import Layers
from sb3_flipout.layers.interface import flipout_layers
from sb3_flipout.noise.families import FamilyName, NoiseSharing
from sb3_flipout.noise.schedule import Schedule as NoiseSchedule
from sb3_flipout.noise.stream import Resample
from sb3_flipout.policies.arguments import settings_among
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.learning import (
    LearningCritic,
    LearningDeterministicActor,
    LearningStochasticActor,
    LearnsUnderNoise,
    mixed_in,
)
from sb3_flipout.policies.learning_noise import Role
from sb3_flipout.policies.learning_settings import ActorSettings, TargetNoise, UpdateNoise
from sb3_flipout.policies.off_policy import OffPolicyMixin
from sb3_flipout.policies.settings import Perturb


class ActorMixin(OffPolicyMixin):
    """
    Mixin that gives an off-policy actor-critic its noise.

    Networks of your own are given as SB3 has them: a policy whose ``make_actor`` and ``make_critic`` return them. Put the
    flipout class before that policy, ``class Mine(FlipoutSACPolicy, MyPolicy)``, or override these methods in a subclass.

    :param observation_space: Observation space
    :param action_space: Action space, Box
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of SB3's policy
    :param family: How weights are perturbed: ``"gaussian"``, ``"factorised"``, ``"multiplicative"``, ``"dropconnect"``,
        ``"isotropic"`` or ``"lowrank"``
    :param sigma_init: Initial sigma in the family's unit (1/sqrt(fan_in), or relative to the mean weights); ``None``: 0.5
    :param learn_sigma: Whether sigma is trained
    :param resample: How long an environment keeps its noise: ``"step"``, ``"episode"`` (the default), ``"rollout"``, or a
        number of steps
    :param base_every_steps: How often the acting base is redrawn, in collection steps; ``None`` for never
    :param noise_sharing: ``"flipout"``, ``"shared"`` or ``"independent"``
    :param perturb: Which part: ``"policy"`` (the actor), ``"heads"`` (its last layers) or ``"all"`` (critics too)
    :param layers: Which kinds of layer in it: ``"all"``, ``"linear"`` or ``"hidden"``
    :param skip: Names of modules to leave out, as in ``policy.named_modules()``; ``*`` stands for anything
    :param perturb_frozen: Whether layers are perturbed whose weights do not learn
    :param sigma_unit: ``"weights"`` (the family's unit), or ``"inputs"``: sigma of weights is divided, once, by the root mean
        square of what each layer gets of the first observations
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``
    :param schedule: How the noise falls over training: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``; by
        default it is constant
    :param schedule_end: What is left of the noise at the end, as a share of the noise scale; default 0, ``"exponential"`` 0.01
    :param schedule_fraction: Share of training over which it falls; default 0.3
    :param target_noise: Noise of the next actions, and of target critics where critics have noise: ``"mean"`` weights (the
        default), ``"independent"`` of the online networks, or the ``"same"`` (the default with members)
    :param members: Number K of keys that exist; ``None``: keys are drawn without limit
    :param act_by_mode: Whether collection takes the most likely action of each row's perturbed actor, so that weight noise
        alone explores; for actors that sample
    :param update_noise: Noise of the networks that learn, in their losses: ``"independent"`` draws, or ``"mean"`` weights, so
        that the noise is that of the behaviour alone; needs ``learn_sigma=False``
    :param kwargs: Further keyword arguments of SB3's policy
    :raises TypeError: If an argument is unknown, or a value has a wrong type
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    noise_settings: ActorSettings
    #: What actor and critics become.
    actor_mixin: ClassVar[type[LearnsUnderNoise]] = LearningStochasticActor
    critic_mixin: ClassVar[type[LearningCritic]] = LearningCritic
    targets: ClassVar[tuple[tuple[str, str], ...]] = (("critic_target", "critic"),)
    #: Whose step ends a gradient step: the last one that SB3 makes in it, so that each loss has the noise of one step.
    last_to_step: ClassVar[str] = "actor"
    actor: Any
    critic: Any

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: Any,
        lr_schedule: Schedule,
        *args: Any,
        family: FamilyName = "gaussian",
        sigma_init: float | None = None,
        learn_sigma: bool = True,
        resample: Resample | int | None = None,
        base_every_steps: int | None = None,
        noise_sharing: NoiseSharing = "flipout",
        perturb: Perturb = "policy",
        layers: Layers = "all",
        skip: str | Sequence[str] = (),
        perturb_frozen: bool = False,
        sigma_unit: str = "weights",
        init: Init = "keep",
        schedule: NoiseSchedule | None = None,
        schedule_end: float | None = None,
        schedule_fraction: float | None = None,
        target_noise: TargetNoise | None = None,
        members: int | None = None,
        act_by_mode: bool = False,
        update_noise: UpdateNoise = "independent",
        **kwargs: Any,
    ) -> None:
        noise = settings_among(ActorSettings, locals())
        self._init_off_policy(ActorSettings, noise, (observation_space, action_space), lr_schedule, args, kwargs)

    def _make_noisy(self, lr_schedule: Schedule) -> None:
        if self.noise_settings.act_by_mode and self.actor_mixin is LearningDeterministicActor:
            raise ValueError(
                f"act_by_mode=True has no effect in {type(self).__name__}, whose actor is deterministic. Leave it out."
            )
        perturbs_critics = self.noise_settings.perturb == "all"
        online = [self.actor, self.critic] if perturbs_critics else [self.actor]
        # In one call: a shared extractor is perturbed once, and no two layers have the same number.
        self._perturb([*self._actor_modules(self.actor), *([self.critic] if perturbs_critics else [])])
        self.perturbed_network = attach(flipout_layers(online), of_policy=True)
        mixed_in(self.actor, self.actor_mixin).join_noise(self.perturbed_network, self.learning, Role.ONLINE)
        self._join_critic(perturbs_critics)
        self._perturb_targets(perturbs_critics)
        self._keep_members()
        self._find_layouts(self.perturbed_network, lambda obs: self.outputs_of(self, obs))
        for target, followed in self.targets:
            for layer, model in self._paired_layers(target, followed):
                layer.row_layout = model.row_layout
        for net in online:
            net.optimizer = self._make_optimizer(_with_sigma(net, net.optimizer), lr_schedule, net.optimizer)

    def _actor_modules(self, actor: Any) -> list[nn.Module]:
        if self.noise_settings.perturb != "heads":
            return [actor]
        last = self._last_linear(actor.mu)
        return [last, actor.log_std] if isinstance(getattr(actor, "log_std", None), nn.Linear) else [last]

    def _join_critic(self, perturbs_critics: bool) -> None:
        shares = bool(flipout_layers([self.critic]))
        if shares:  # layers of its own, or of an extractor that it shares with the actor
            mixed_in(self.critic, self.critic_mixin).join_noise(
                self.perturbed_network, self.learning, Role.ONLINE, is_perturbed=perturbs_critics
            )

    def _perturb_targets(self, perturbs_critics: bool) -> None:
        """Give target networks the perturbed layers of those that they follow, with the same numbers, for the same keys."""
        found: list[FlipoutLayer] = []
        noisy: list[tuple[Any, str]] = []
        for name, followed_name in self.targets:
            target, followed = getattr(self, name), getattr(self, followed_name)
            pairs = list(zip(target.modules(), followed.modules(), strict=True))
            wanted = [layer for layer, model in pairs if isinstance(model, FlipoutLayer)]
            if not wanted:
                continue
            self._perturb_as(pairs)
            target.load_state_dict(followed.state_dict())  # as SB3 does; `init` may have drawn
            if followed_name == "actor" or perturbs_critics:
                found += flipout_layers([target])
            noisy.append((target, followed_name))
        if not found:
            return
        network = attach(list({id(layer): layer for layer in found}.values()), of_policy=True)
        for target, followed_name in noisy:
            is_actor = followed_name == "actor"
            if is_actor or perturbs_critics or any(layer.network is network for layer in flipout_layers([target])):
                mixed_in(target, self.actor_mixin if is_actor else self.critic_mixin).join_noise(
                    network, self.learning, Role.TARGET, is_perturbed=is_actor or perturbs_critics
                )

    def _perturb_as(self, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Perturb layers as the ones that they follow: polyak pairs parameters by their order."""
        for layer, model in pairs:
            if isinstance(model, FlipoutLayer) and not isinstance(layer, FlipoutLayer):
                layer.__class__ = type(model)
                assert isinstance(layer, FlipoutLayer), "that is what its class says now"
                layer.init_noise(model.noise_config, model.base_key, model.noise_index, model.noise_on)
            elif (
                type(model) is not type(layer)
                and issubclass(type(model), type(layer))
                and not isinstance(model, LearnsUnderNoise)
            ):
                layer.__class__ = type(model)  # a parent that goes round its children

    def _keep_members(self) -> None:
        if self.noise_settings.members is not None:
            for network in self._perturbed_networks():
                for layer in network.layers:
                    layer.keep_base()
            # Not strictly: a critic that shares its extractor has the base draws of the actor's, and its target none.
            for name, followed in self.targets:
                getattr(self, name).load_state_dict(getattr(self, followed).state_dict(), strict=False)

    @property
    def step_optimizer(self) -> th.optim.Optimizer:
        """The optimizer whose step ends a gradient step."""
        optimizer: th.optim.Optimizer = getattr(self, self.last_to_step).optimizer
        return optimizer

    def _acting_network(self) -> nn.Module:
        actor: nn.Module = self.actor
        return actor

    def _learning_networks(self) -> list[LearnsUnderNoise]:
        nets = [self.actor, self.critic, *(getattr(self, name) for name, _ in self.targets)]
        return [net for net in nets if isinstance(net, LearnsUnderNoise)]

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        by_mode = self._acting_noise is not None and self.noise_settings.act_by_mode
        with self._acts(observation, deterministic):
            return self.actor._predict(observation, deterministic or by_mode)

    @staticmethod
    def outputs_of(policy: Any, obs: Any) -> list[th.Tensor]:
        """
        Compute what a policy of this kind says, plain or not.

        :param policy: Policy
        :param obs: Observations, as tensors
        :return: Deterministic actions, and the values of them
        """
        actions = policy.actor._predict(obs, deterministic=True)
        return [actions, *policy.critic(obs, actions)]


def _with_sigma(net: nn.Module, optimizer: th.optim.Optimizer) -> list[nn.Parameter]:
    """List the parameters that an optimizer has, in their order, with the sigma of each layer among them."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = []
    for module in net.modules():
        of_module = list(module.parameters(recurse=False))
        if any(id(parameter) in known for parameter in of_module):
            found += of_module
    return found


class FlipoutSACPolicy(ActorMixin, sac.SACPolicy):
    """``"FlipoutMlpPolicy"`` of SAC; arguments as in :class:`ActorMixin`."""


class FlipoutSACCnnPolicy(FlipoutSACPolicy, sac.CnnPolicy):
    """``"FlipoutCnnPolicy"`` of SAC; arguments as in :class:`ActorMixin`."""


class FlipoutSACMultiInputPolicy(FlipoutSACPolicy, sac.MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of SAC; arguments as in :class:`ActorMixin`."""


class FlipoutTD3Policy(ActorMixin, td3.TD3Policy):
    """``"FlipoutMlpPolicy"`` of TD3 and DDPG; arguments as in :class:`ActorMixin`."""

    actor_mixin = LearningDeterministicActor
    targets = (("actor_target", "actor"), ("critic_target", "critic"))
    last_to_step = "critic"  # the actor's steps are delayed, and its whole loss comes after the critic's


class FlipoutTD3CnnPolicy(FlipoutTD3Policy, td3.CnnPolicy):
    """``"FlipoutCnnPolicy"`` of TD3 and DDPG; arguments as in :class:`ActorMixin`."""


class FlipoutTD3MultiInputPolicy(FlipoutTD3Policy, td3.MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of TD3 and DDPG; arguments as in :class:`ActorMixin`."""


_TD3_ALIASES: dict[str, type[FlipoutPolicyMixin]] = {
    "FlipoutMlpPolicy": FlipoutTD3Policy,
    "FlipoutCnnPolicy": FlipoutTD3CnnPolicy,
    "FlipoutMultiInputPolicy": FlipoutTD3MultiInputPolicy,
}

#: The names of these policies, by algorithm.
ALIASES: Mapping[type[BaseAlgorithm], dict[str, type[FlipoutPolicyMixin]]] = {
    SAC: {
        "FlipoutMlpPolicy": FlipoutSACPolicy,
        "FlipoutCnnPolicy": FlipoutSACCnnPolicy,
        "FlipoutMultiInputPolicy": FlipoutSACMultiInputPolicy,
    },
    TD3: _TD3_ALIASES,
    DDPG: _TD3_ALIASES,
}
