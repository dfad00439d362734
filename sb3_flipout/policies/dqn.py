"""Policies for DQN (QRDQN stands on them): explore by weight noise, or by an implicit ensemble whose members have priors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.dqn.policies import CnnPolicy, DQNPolicy, MultiInputPolicy
from torch import nn

from sb3_flipout.layers import FlipoutLayer, attach
from sb3_flipout.layers.config import Init
from sb3_flipout.layers.convert import Layers
from sb3_flipout.layers.interface import flipout_layers
from sb3_flipout.noise import RowNoise, Stream, fold
from sb3_flipout.noise.compiling import uncompiled
from sb3_flipout.noise.families import FamilyName, NoiseSharing
from sb3_flipout.noise.schedule import Schedule as NoiseSchedule
from sb3_flipout.noise.stream import Resample
from sb3_flipout.policies.arguments import settings_among
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.extractors import GivesNumbers
from sb3_flipout.policies.learning import LearningValueNetwork, LearnsUnderNoise, mixed_in
from sb3_flipout.policies.learning_noise import Role
from sb3_flipout.policies.learning_settings import TargetNoise, ValueSettings
from sb3_flipout.policies.observations import check_batch, each_for, n_rows
from sb3_flipout.policies.off_policy import OffPolicyMixin
from sb3_flipout.policies.prior import Prior
from sb3_flipout.policies.probing import layouts_in, takes_inputs_once
from sb3_flipout.policies.settings import Perturb


class ValueMixin(OffPolicyMixin):
    """
    Mixin that gives a value-based policy its noise.

    A network of your own (dueling heads, action masks) is given as SB3 has it: a policy whose ``make_q_net`` returns it.
    Put the flipout class before that policy, ``class Mine(FlipoutDQNPolicy, MyPolicy)``, or override ``make_q_net`` in a
    subclass.

    :param observation_space: Observation space
    :param action_space: Action space, Discrete
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of SB3's policy
    :param family: How weights are perturbed: ``"gaussian"``, ``"factorised"``, ``"multiplicative"``, ``"dropconnect"``,
        ``"isotropic"`` or ``"lowrank"``
    :param sigma_init: Initial sigma in the family's unit (1/sqrt(fan_in), or relative to the mean weights); ``None``: 0.5
    :param learn_sigma: Whether sigma is trained; by default only with members
    :param resample: How long an environment keeps its noise: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps;
        by default ``"step"``, with members ``"episode"``
    :param base_every_steps: How often the acting base is redrawn, in collection steps; ``None`` for never
    :param noise_sharing: ``"flipout"``, ``"shared"`` or ``"independent"``
    :param perturb: Which part of the network: ``"policy"`` and ``"all"`` (all of it) or ``"heads"``
    :param layers: Which kinds of layer in it: ``"all"``, ``"linear"`` (as NoisyNet) or ``"hidden"``
    :param skip: Names of modules to leave out, as in ``policy.named_modules()``; ``*`` stands for anything
    :param perturb_frozen: Whether layers are perturbed whose weights do not learn
    :param sigma_unit: ``"weights"`` (the family's unit), or ``"inputs"``: sigma of weights is divided, once, by the root mean
        square of what each layer gets of the first observations
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``
    :param schedule: How the noise falls over training: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``; by
        default ``"linear"``, with members it is constant
    :param schedule_end: What is left of the noise at the end, as a share of the noise scale; default 0, ``"exponential"`` 0.01
    :param schedule_fraction: Share of training over which it falls; default 0.3
    :param target_noise: Noise of the target network: ``"independent"`` (NoisyNet's rule, the default), the ``"same"`` (the
        default with members), or ``"mean"`` weights
    :param members: Number K of members of an implicit ensemble; ``None``: no ensemble
    :param prior_scale: Scale of the members' frozen random priors; 0 for none
    :param keys_per_transition: Number M of members that each sampled transition is learned under: of the ``batch_size`` rows
        of a gradient step (a multiple of M), M each have the same transition and different members. With M = K it is the
        update of bootstrapped DQN (Osband et al. 2016)
    :param bootstrap: Probability that a stored transition is in a member's bootstrap sample; 1: all are in all of them
    :param reward_noise: Standard deviation of what each member adds to the reward of each stored transition (under
        ``VecNormalize`` the normalised one); 0 for none
    :param kwargs: Further keyword arguments of SB3's policy
    :raises TypeError: If an argument is unknown, or a value has a wrong type
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    noise_settings: ValueSettings
    online_name: ClassVar[str]
    _known_modules: tuple[nn.Module, ...] = ()

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: Any,
        lr_schedule: Schedule,
        *args: Any,
        family: FamilyName = "gaussian",
        sigma_init: float | None = None,
        learn_sigma: bool | None = None,
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
        prior_scale: float = 0.0,
        keys_per_transition: int = 1,
        bootstrap: float = 1.0,
        reward_noise: float = 0.0,
        **kwargs: Any,
    ) -> None:
        noise = settings_among(ValueSettings, locals())
        self._init_off_policy(ValueSettings, noise, (observation_space, action_space), lr_schedule, args, kwargs)

    def _make_noisy(self, lr_schedule: Schedule) -> None:
        for role, net in ((Role.ONLINE, self.online), (Role.TARGET, self.target)):
            part = self._last_linear(net) if self.noise_settings.perturb == "heads" else net
            self._perturb([part], quietly=role == Role.TARGET)
            self._refuse_shared()
            network = attach(flipout_layers([net]), of_policy=True)
            mixed_in(net, LearningValueNetwork).join_noise(network, self.learning, role)
            if self.noise_settings.members is not None:
                for layer in network.layers:
                    layer.keep_base()
        self.target.load_state_dict(self.online.state_dict())  # as SB3 does; `init` may have drawn
        self.perturbed_network = self.online.perturbed_network
        self._find_layouts(self.perturbed_network, self.online)
        for layer, model in self._paired_layers(f"{self.online_name}_target", self.online_name):
            layer.row_layout = model.row_layout
        self._add_prior()
        self._find_inputs_once()
        self.optimizer = self._make_optimizer(self.online.parameters(), lr_schedule, self.optimizer)

    def _refuse_shared(self) -> None:
        theirs = set(self.target.modules())
        both = [(name, module) for name, module in self.online.named_modules() if module in theirs]
        shared = [name for name, module in both if isinstance(module, FlipoutLayer)]
        if shared:
            names = [f"{self.online_name}.{name}" for name in shared]
            raise ValueError(
                f"{self.online_name} and {self.online_name}_target share the layers {', '.join(shared)}, which cannot be "
                "under the noise of both. Give each network layers of its own, freeze what they share "
                f"(requires_grad_(False)), or leave it out: policy_kwargs=dict(skip={names})."
            )

    def _find_inputs_once(self) -> None:
        """Find out whether networks may get a repeated observation once, if that is not known of their present modules."""
        modules = tuple(module for module in self.online.modules() if uncompiled(module) is module)
        times = self.noise_settings.keys_per_transition
        if times > 1 and modules != self._known_modules:
            self._known_modules = modules
            self.learning.inputs_once = takes_inputs_once(self.online, self.perturbed_network, self, times)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """
        Mark the gradient steps of an update, before which modules can have been put into the networks.

        :return: Context manager
        """
        if self.perturbed_network.active is None:  # else the mean weights learn
            self._find_inputs_once()
        with super().updating():
            yield

    def _left_out(self) -> tuple[str, ...]:
        """What is left out of one network is left out of the other, which is copied from it."""
        ours, theirs = self.online_name, f"{self.online_name}_target"
        found: list[str] = []
        for pattern in super()._left_out():
            root, dot, inside = pattern.partition(".")
            found += [pattern] if root not in (ours, theirs) else [f"{net}{dot}{inside}" for net in (ours, theirs)]
        return tuple(found)

    @property
    def online(self) -> LearningValueNetwork:
        """The network that acts and learns."""
        return getattr(self, self.online_name)

    @property
    def target(self) -> LearningValueNetwork:
        """The target network."""
        return getattr(self, f"{self.online_name}_target")

    @property
    def step_optimizer(self) -> th.optim.Optimizer:
        """The optimizer whose step ends a gradient step."""
        return self.optimizer

    def _acting_network(self) -> nn.Module:
        return self.online

    def _learning_networks(self) -> list[LearnsUnderNoise]:
        return [self.online, self.target]

    def _add_prior(self) -> None:
        """Add a frozen random function per member to the values of both networks."""
        if self.noise_settings.prior_scale == 0:
            return
        with th.random.fork_rng(devices=[]):
            network, twin = self._make_value_net(), self._make_value_net()
            self.prior = Prior(network, fold(self._noise_seed, Stream.PRIOR), layouts_in(twin, self))
        for net in (self.online, self.target):
            net.prior = (self.prior, float(self.noise_settings.prior_scale))

    def _make_value_net(self) -> nn.Module:
        """Make one more network of the same form and type, which shares nothing with the others."""
        made = copy.deepcopy(getattr(self, f"make_{self.online_name}")())  # a user's may hold one encoder for all
        net: nn.Module = mixed_in(made, GivesNumbers)
        return net.to(next(self.online.parameters()))

    # ---- predictions --------------------------------------------------------------------------------------------

    def _predict(self, observation: PyTorchObs, deterministic: bool = True) -> th.Tensor:
        votes = deterministic and self._acting_noise is None and self.noise_settings.members is not None
        if votes and self.perturbed_network.active is None:
            return self._vote(observation)
        with self._acts(observation, deterministic):
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
        Compute the values of all members, in one pass: look at their spread for the ensemble's uncertainty.

        :param observation: N observations, as arrays or tensors
        :return: Values, shape (K, N, n_actions); means over quantiles for QRDQN
        :raises ValueError: If the policy has no members, or a tensor is one observation and not a batch
        """
        members = self.noise_settings.members
        if members is None:
            raise ValueError("member_values needs an ensemble, this policy has members=None; give members=10, say.")
        shape = self.observation_space.shape
        if isinstance(observation, th.Tensor) and shape == () and observation.dim() == 2 and observation.shape[1] == 1:
            observation = observation[:, 0]  # as replay buffers give them
        check_batch(self.observation_space, observation)
        tensors: Any = observation if isinstance(observation, th.Tensor) else self._as_tensors(observation)
        keys = th.arange(members, device=self.device).repeat_interleave(n_rows(tensors))
        with th.no_grad(), self.perturbed_network.activate(RowNoise(keys, self.effective_scale)):
            values = self.online(each_for(members, tensors))
        values = values.mean(dim=1) if values.dim() == 3 else values
        return values.view(members, n_rows(tensors), -1)

    def _as_tensors(self, observation: Any) -> Any:
        if isinstance(observation, dict) and all(isinstance(value, th.Tensor) for value in observation.values()):
            return observation
        return self.obs_to_tensor(observation)[0]

    # ---- save, load, compare ------------------------------------------------------------------------------------

    @staticmethod
    def outputs_of(policy: Any, obs: Any) -> list[th.Tensor]:
        """
        Compute what a policy of this kind says, plain or not.

        :param policy: Policy
        :param obs: Observations, as tensors
        :return: Values, or quantiles
        """
        net: Any = next(getattr(policy, name) for name in ("q_net", "quantile_net") if hasattr(policy, name))
        return [net(obs)]


class FlipoutDQNPolicy(ValueMixin, DQNPolicy):
    """``"FlipoutMlpPolicy"`` of DQN; arguments as in :class:`ValueMixin`."""

    online_name, targets = "q_net", (("q_net_target", "q_net"),)


class FlipoutDQNCnnPolicy(FlipoutDQNPolicy, CnnPolicy):
    """``"FlipoutCnnPolicy"`` of DQN; arguments as in :class:`ValueMixin`."""


class FlipoutDQNMultiInputPolicy(FlipoutDQNPolicy, MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of DQN; arguments as in :class:`ValueMixin`."""


#: The names of these policies, by algorithm.
ALIASES: Mapping[type[BaseAlgorithm], dict[str, type[FlipoutPolicyMixin]]] = {
    DQN: {
        "FlipoutMlpPolicy": FlipoutDQNPolicy,
        "FlipoutCnnPolicy": FlipoutDQNCnnPolicy,
        "FlipoutMultiInputPolicy": FlipoutDQNMultiInputPolicy,
    }
}
