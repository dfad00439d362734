"""Policies for PPO and A2C (TRPO and others stand on them): explore under row noise, and replay it exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import nn

from sb3_flipout.layers import Ask, attach
from sb3_flipout.layers.config import Init
from sb3_flipout.layers.convert import Layers
from sb3_flipout.layers.interface import flipout_layers
from sb3_flipout.noise.families import FamilyName, NoiseSharing
from sb3_flipout.noise.schedule import Schedule as NoiseSchedule
from sb3_flipout.noise.stream import Resample
from sb3_flipout.policies.arguments import arguments_of, settings_among, settings_from
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.observations import check_extractor
from sb3_flipout.policies.passes import OnPolicyPasses
from sb3_flipout.policies.settings import OnPolicySettings, Perturb


class OnPolicyMixin(OnPolicyPasses):
    """
    Mixin that gives an actor-critic policy its settings and its noise, and learns from the algorithm when rollouts start.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of SB3's policy
    :param family: How weights are perturbed: ``"gaussian"``, ``"factorised"``, ``"multiplicative"``, ``"dropconnect"``,
        ``"isotropic"`` or ``"lowrank"``
    :param sigma_init: Initial sigma in the family's unit (1/sqrt(fan_in), or relative to the mean weights); ``None``: 0.5
    :param learn_sigma: Whether sigma is trained; by default it is not
    :param resample: How long an environment keeps its noise: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps
    :param base_every_rollouts: How often the base perturbation is redrawn, in rollouts; ``None`` for never; by default at the
        start of each rollout
    :param noise_sharing: ``"flipout"``, ``"shared"`` (with ``resample="rollout"``) or ``"independent"``
    :param perturb: Which part of the network: ``"policy"`` (all that the action depends on), ``"heads"`` or ``"all"``
    :param layers: Which kinds of layer in it: ``"all"``, ``"linear"`` or ``"hidden"`` (of LSTMs and GRUs the hidden-to-hidden
        weights alone)
    :param skip: Names of modules to leave out, as in ``policy.named_modules()``; ``*`` stands for anything
    :param perturb_frozen: Whether layers are perturbed whose weights do not learn
    :param sigma_unit: ``"weights"`` (the family's unit), or ``"inputs"``: sigma of weights is divided, once, by the root mean
        square of what each layer gets of the first observations
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``
    :param schedule: How the noise falls over training: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``; by
        default it falls linearly
    :param schedule_end: What is left of the noise at the end of the schedule, as a share of the noise scale; default 0, for
        ``"exponential"`` 0.01
    :param schedule_fraction: Share of training over which it falls; default 0.3
    :param kwargs: Further keyword arguments of SB3's policy
    :raises TypeError: If an argument is unknown, or a value has a wrong type
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    pi_features_extractor: Any  # these three are made by SB3's policy classes
    mlp_extractor: Any
    action_net: Any
    noise_settings: OnPolicySettings
    action_outputs = (0, 2)  # the likeliest actions, of which discrete ones have no gradient, and their probabilities
    where_layers_belong = 'Put them into the features extractor or mlp_extractor, or make them in _build and use perturb="all"'

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *args: Any,
        family: FamilyName = "gaussian",
        sigma_init: float | None = None,
        learn_sigma: bool = False,
        resample: Resample | int = "step",
        base_every_rollouts: int | Literal["default"] | None = "default",
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
        **kwargs: Any,
    ) -> None:
        noise = settings_among(OnPolicySettings, locals())
        settings = settings_from(OnPolicySettings, noise | kwargs, arguments_of(type(self)))
        check_extractor(observation_space, type(self), kwargs)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self._init_noise(settings)
        self._perturb(self._modules_to_perturb(settings.perturb))
        self.perturbed_network = attach(flipout_layers([self]), of_policy=True)
        self._find_layouts(self.perturbed_network, lambda obs: self.outputs_of(self, obs))
        self._rollouts = 0
        # Made once more, over sigma too. The first one has no state yet, so nothing is lost.
        self.optimizer = self._make_optimizer(self.parameters(), lr_schedule, self.optimizer)

    def _modules_to_perturb(self, perturb: str) -> list[nn.Module]:
        if perturb == "all":
            return [self]
        if perturb == "heads":
            return [self.action_net]
        hidden = [self.mlp_extractor]
        if hasattr(self.mlp_extractor, "policy_net"):  # what a user's own has beside it may stand before both nets
            hidden = [net for name, net in self.mlp_extractor.named_children() if name != "value_net"]
        return [self.pi_features_extractor, *hidden, self.action_net]

    # ---- what the algorithm tells -------------------------------------------------------------------------------

    def begin_rollout(self) -> None:
        """Tell that a rollout starts: the base is redrawn if it is time, and holds until the update after it is done."""
        every = self.noise_settings.rollouts_per_base
        if every is not None and self._rollouts % every == 0:
            self.perturbed_network.redraw(self._base_key(self._rollouts // every))
        self._rollouts += 1
        self._keys.begin_rollout()

    @contextmanager
    def collecting(self, n_envs: int) -> Iterator[None]:
        """
        Mark a rollout: in it the algorithm's own steps act in the training environments.

        :param n_envs: Number of environments
        :return: Context manager
        """
        self.marks.collects = self.marks.step_due = True
        try:
            with self.guard.collection(self, self.perturbed_network), self.perturbed_network.keeping_deltas():
                yield
        finally:
            self.marks.collects = False

    @contextmanager
    def updating(self) -> Iterator[None]:
        """
        Mark an update: in it, every batch has to bring its noise.

        :return: Context manager
        """
        self.marks.updates = True
        try:
            network = self.perturbed_network
            with nullcontext() if network.active is not None else network.activate(Ask.EXPLICIT), network.keeping_deltas():
                yield
            self.guard.compare(self, network)
        finally:
            self.marks.updates = False

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """
        List parameters; during an update of TRPO only those that learn, since it differentiates by all that it finds here.

        :param args: As of ``torch.nn.Module``
        :param kwargs: As of ``torch.nn.Module``
        :return: Names and parameters
        """
        named = super().named_parameters(*args, **kwargs)
        return (item for item in named if item[1].requires_grad) if self._differentiates_all() else named

    def _differentiates_all(self) -> bool:
        marks = self.__dict__.get("marks")  # SB3 asks for parameters before there are any
        return marks is not None and marks.updates and marks.differentiates_all

    # ---- save, load, compare ------------------------------------------------------------------------------------

    def noise_state(self) -> dict[str, Any]:
        """
        Take what a resumed training has to know, as plain values.

        :return: As of every policy, and the number of rollouts and the present base
        """
        return {**super().noise_state(), "rollouts": self._rollouts, "base": self.perturbed_network.layers[0].base_key}

    def set_noise_state(self, state: Mapping[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`noise_state` gave
        :raises NoiseStateError: If the weights saved with it mean something else under the settings of this policy
        """
        rollouts, base = int(state["rollouts"]), state.get("base")
        base = None if base is None else int(base)
        super().set_noise_state(state)
        self._rollouts = rollouts
        if base is None:  # 0.1.0 saved none, and it follows from the seed unless the noise has been reseeded since
            every = self.noise_settings.rollouts_per_base
            base = self._base_key(0 if every is None else max(self._rollouts - 1, 0) // every)
        self.perturbed_network.redraw(base)

    @staticmethod
    def outputs_of(policy: Any, obs: Any) -> list[th.Tensor]:
        """
        Compute what a policy of this kind says, plain or not.

        :param policy: Policy
        :param obs: Observations, as tensors
        :return: Most likely actions, values, and logarithms of their probabilities
        """
        actions, values, log_prob = policy.forward(obs, deterministic=True)
        return [actions, values, log_prob]


class FlipoutActorCriticPolicy(OnPolicyMixin, ActorCriticPolicy):
    """``"FlipoutMlpPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyMixin`."""


class FlipoutActorCriticCnnPolicy(OnPolicyMixin, ActorCriticCnnPolicy):
    """``"FlipoutCnnPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyMixin`."""


class FlipoutMultiInputActorCriticPolicy(OnPolicyMixin, MultiInputActorCriticPolicy):
    """``"FlipoutMultiInputPolicy"`` of PPO, A2C and TRPO; arguments as in :class:`OnPolicyMixin`."""


ACTOR_CRITIC_ALIASES: dict[str, type[FlipoutPolicyMixin]] = {
    "FlipoutMlpPolicy": FlipoutActorCriticPolicy,
    "FlipoutCnnPolicy": FlipoutActorCriticCnnPolicy,
    "FlipoutMultiInputPolicy": FlipoutMultiInputActorCriticPolicy,
}

#: The names of these policies, by algorithm.
ALIASES: dict[type[BaseAlgorithm], dict[str, type[FlipoutPolicyMixin]]] = {
    PPO: ACTOR_CRITIC_ALIASES,
    A2C: ACTOR_CRITIC_ALIASES,
}
