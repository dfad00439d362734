"""The policy that FlipES evaluates: a network from observations to actions, without values and without distributions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import (
    BaseFeaturesExtractor,
    CombinedExtractor,
    FlattenExtractor,
    NatureCNN,
    create_mlp,
)
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_flipout.layers import attach
from sb3_flipout.layers.convert import Layers
from sb3_flipout.layers.interface import flipout_layers
from sb3_flipout.noise.families import FamilyName, NoiseSharing
from sb3_flipout.noise.schedule import Schedule as NoiseSchedule
from sb3_flipout.policies.arguments import arguments_of, settings_from
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.observations import check_extractor
from sb3_flipout.policies.settings import NoiseSettings, Perturb


@dataclass(frozen=True)
class EvolutionSettings(NoiseSettings):
    """
    The settings of a population's noise; arguments as in :class:`~sb3_flipout.policies.settings.NoiseSettings`, and

    :param sigma_init: As there; ``None`` for 0.5
    :param learn_sigma: Must be False
    :param resample: As there: a member keeps its noise for its episodes
    """

    sigma_init: float | None = 0.25
    learn_sigma: bool = False
    resample: str | int = "episode"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learn_sigma:
            raise ValueError(
                "learn_sigma=True does not fit FlipES, in which no loss has a gradient for sigma. Leave it out, and let the "
                'noise fall by schedule="linear".'
            )
        if self.noise_sharing == "shared":
            raise ValueError(
                'noise_sharing="shared" does not fit FlipES: all members of a population would be the same. Use "flipout", or '
                '"independent" for a full draw of each member.'
            )
        if self.family == "dropconnect":
            raise ValueError(
                'family="dropconnect" does not fit FlipES, whose members are small steps away from the mean weights. Use '
                '"gaussian", or "lowrank".'
            )


class FlipESPolicy(FlipoutPolicyMixin):
    """
    ``"FlipoutMlpPolicy"`` of FlipES: one network for all members, each with its own perturbation of the weights.

    Actions in a Box are squashed by tanh into its limits; of Discrete ones the action with the largest output is taken.

    :param observation_space: Observation space
    :param action_space: Action space, Box or Discrete
    :param lr_schedule: Learning rate schedule
    :param net_arch: Units of the hidden layers behind the features extractor; by default two of 64, behind a CNN none
    :param activation_fn: Activation function
    :param features_extractor_class: Features extractor; ``None`` for that of the policy's name
    :param features_extractor_kwargs: Its keyword arguments
    :param normalize_images: Whether images are divided by 255
    :param optimizer_class: Optimizer of the mean weights
    :param optimizer_kwargs: Its keyword arguments, ``weight_decay`` for example
    :param family: How weights are perturbed: ``"gaussian"``, ``"factorised"``, ``"multiplicative"``, ``"isotropic"`` or
        ``"lowrank"``
    :param sigma_init: Sigma in the family's unit (1/sqrt(fan_in), or relative to the mean weights); ``None``: 0.5
    :param learn_sigma: Must be False
    :param noise_sharing: ``"flipout"``, or ``"independent"`` (the paper's IdealES)
    :param perturb: ``"policy"`` (all of it) or ``"heads"`` (its last layer)
    :param layers: Which kinds of layer in it: ``"all"`` or ``"linear"``
    :param skip: Names of modules to leave out, as in ``policy.named_modules()``; ``*`` stands for anything
    :param perturb_frozen: Whether layers are perturbed whose weights do not learn
    :param sigma_unit: ``"weights"`` (the family's unit), or ``"inputs"``: sigma of weights is divided, once, by the root mean
        square of what each layer gets of the first observations
    :param schedule: How the noise falls over training: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``
    :param schedule_end: What is left of the noise at the end of the schedule, as a share of the noise scale
    :param schedule_fraction: Share of training over which it falls; default 0.3
    :param kwargs: Nothing else: refused, with a suggestion
    :raises TypeError: If an argument is unknown, or a value has a wrong type
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    noise_settings: EvolutionSettings
    #: Features extractor where none is given.
    DEFAULT_EXTRACTOR: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: list[int] | None = None,
        activation_fn: type[nn.Module] = nn.Tanh,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        family: FamilyName = "gaussian",
        sigma_init: float | None = 0.25,
        learn_sigma: bool = False,
        noise_sharing: NoiseSharing = "flipout",
        perturb: Perturb = "policy",
        layers: Layers = "all",
        skip: str | Sequence[str] = (),
        perturb_frozen: bool = False,
        sigma_unit: str = "weights",
        schedule: NoiseSchedule | None = None,
        schedule_end: float | None = None,
        schedule_fraction: float | None = None,
        **kwargs: Any,
    ) -> None:
        extractor = self.DEFAULT_EXTRACTOR if features_extractor_class is None else features_extractor_class
        noise: dict[str, Any] = dict(family=family, sigma_init=sigma_init, learn_sigma=learn_sigma)
        noise |= dict(noise_sharing=noise_sharing, perturb=perturb, layers=layers, skip=skip, perturb_frozen=perturb_frozen)
        noise |= dict(sigma_unit=sigma_unit)
        noise |= dict(schedule=schedule, schedule_end=schedule_end, schedule_fraction=schedule_fraction)
        kwargs.pop("resample", None)  # a copy's: a member is kept for its episodes
        kwargs.pop("init", None)
        settings = settings_from(EvolutionSettings, noise | kwargs, arguments_of(type(self)))
        unknown = sorted(kwargs.keys() - noise.keys())
        if unknown:
            named = ", ".join(unknown)
            raise TypeError(f"policy_kwargs has {named}, which {type(self).__name__} does not know; leave it out.")
        check_extractor(observation_space, type(self), dict(features_extractor_class=extractor))
        super().__init__(
            observation_space,
            action_space,
            extractor,
            features_extractor_kwargs,
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=isinstance(action_space, spaces.Box),
        )
        self.net_arch = [] if net_arch is None and extractor is NatureCNN else net_arch
        self.activation_fn = activation_fn
        self._make_network()
        self._init_noise(settings)
        self._perturb([self._last_linear(self.action_net)] if settings.perturb == "heads" else [self])
        self.perturbed_network = attach(flipout_layers([self]), of_policy=True)
        self._find_layouts(self.perturbed_network, lambda obs: self.outputs_of(self, obs))
        self.optimizer = self._make_optimizer(self.parameters(), lr_schedule)

    def _make_network(self) -> None:
        self.features_extractor = self.make_features_extractor()
        hidden = [64, 64] if self.net_arch is None else list(self.net_arch)
        outputs = int(self.action_space.n) if isinstance(self.action_space, spaces.Discrete) else int(np.prod(_shape(self)))
        layers = create_mlp(
            self.features_extractor.features_dim, outputs, hidden, self.activation_fn, squash_output=self.squash_output
        )
        self.action_net = nn.Sequential(*layers)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        Compute the outputs of the network under the active noise, else under the mean weights.

        :param obs: Observations, shape (N, ...)
        :return: Outputs, shape (N, n_actions), or actions in [-1, 1], shape (N, size of the action)
        """
        assert self.features_extractor is not None, "made by the constructor"
        outputs: th.Tensor = self.action_net(self.extract_features(obs, self.features_extractor))
        return outputs

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self.perturbed_network.active is not None:
            return self._actions(self(observation))
        with self.perturbed_network.activate(self._prediction_noise(observation, deterministic)):
            return self._actions(self(observation))

    def _actions(self, outputs: th.Tensor) -> th.Tensor:
        return outputs.argmax(dim=1) + self.action_space.start if isinstance(self.action_space, spaces.Discrete) else outputs

    @staticmethod
    def outputs_of(policy: Any, obs: Any) -> list[th.Tensor]:
        """
        Compute what a policy of this kind says.

        :param policy: Policy
        :param obs: Observations, as tensors
        :return: Its outputs
        """
        return [policy(obs)]

    def to_plain_policy(self) -> BasePolicy:
        """
        Say that SB3 has no such policy.

        :raises ValueError: Always
        """
        raise ValueError(
            "SB3 has no policy of this kind without noise. Turn the network itself back: "
            "sb3_flipout.restore(copy.deepcopy(policy.action_net)), and the features extractor likewise."
        )

    def begin_rollout(self) -> None:
        """Tell that a generation starts; the population draws its noise itself."""

    @contextmanager
    def collecting(self, n_envs: int) -> Iterator[None]:
        """
        Mark a generation's episodes.

        :param n_envs: Number of environments
        :return: Context manager
        """
        with self.guard.collection(self, self.perturbed_network):
            yield

    def updating(self) -> AbstractContextManager[None]:
        """
        Refuse: an evolution strategy has no update that passes through the network.

        :raises RuntimeError: Always
        """
        raise RuntimeError(
            "FlipES estimates its gradient from returns, so no pass through the network learns. For an update under noise use "
            "an algorithm with gradients, PPO for example."
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        told = super()._get_constructor_parameters()
        return {**told, "net_arch": self.net_arch, "activation_fn": self.activation_fn, "lr_schedule": self._dummy_schedule}


def _shape(policy: BasePolicy) -> tuple[int, ...]:
    return policy.action_space.shape or ()


class FlipESCnnPolicy(FlipESPolicy):
    """``"FlipoutCnnPolicy"`` of FlipES: NatureCNN and one linear layer; arguments as in :class:`FlipESPolicy`."""

    DEFAULT_EXTRACTOR = NatureCNN


class FlipESMultiInputPolicy(FlipESPolicy):
    """``"FlipoutMultiInputPolicy"`` of FlipES, for Dict observations; arguments as in :class:`FlipESPolicy`."""

    DEFAULT_EXTRACTOR = CombinedExtractor
