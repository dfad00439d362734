"""The noise settings of a policy: what the user writes into ``policy_kwargs``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from sb3_flipout.layers import LayerNoise
from sb3_flipout.layers.config import one_of
from sb3_flipout.noise.stream import check_resample

PERTURB_CHOICES = ("policy", "heads", "linear", "hidden", "all")


@dataclass(frozen=True)
class NoiseSettings:
    """
    The noise settings of a policy, flat and plain so that YAML can say them; checked when made.

    :param family: How weights are perturbed: a name in ``sb3_flipout.noise.FAMILIES``
    :param sigma_init: Initial sigma in the family's unit; ``None`` for the default
    :param learn_sigma: Whether sigma is trained
    :param resample: How long an environment keeps its noise: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps
    :param base_every: How often the base perturbation is redrawn, in rollouts; ``None`` for never
    :param noise_sharing: ``"flipout"``, ``"shared"`` or ``"independent"``
    :param perturb: Which modules: ``"policy"`` (all that the action depends on), ``"heads"`` (its last layer),
        ``"linear"`` (as ``"policy"``, linear layers alone), ``"hidden"`` (the hidden-to-hidden weights of the LSTM alone),
        ``"all"`` (values too)
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``
    :raises ValueError: If a value is unknown, out of range, or does not fit another one
    """

    family: str = "gaussian"
    sigma_init: float | None = None
    learn_sigma: bool = True
    resample: str | int = "step"
    base_every: int | None = 1
    noise_sharing: str = "flipout"
    perturb: str = "policy"
    init: str = "keep"

    def __post_init__(self) -> None:
        # Plain Python numbers: the settings are saved with the model, and torch loads no others.
        _plain(self, "sigma_init", Real, float)
        for name in ("resample", "base_every"):
            _plain(self, name, Integral, int)
        self.layer_noise()
        check_resample(self.resample)
        one_of("perturb", self.perturb, PERTURB_CHOICES)
        number = isinstance(self.base_every, int) and not isinstance(self.base_every, bool) and self.base_every >= 1
        if self.base_every is not None and not number:
            raise ValueError(f"base_every must be an integer >= 1, or None for never, got {self.base_every!r}.")

    def layer_noise(self) -> LayerNoise:
        """
        Give the part of the settings that concerns layers.

        :return: How each layer is perturbed
        """
        names = [field.name for field in fields(LayerNoise)]
        return LayerNoise(**{name: getattr(self, name) for name in names})


def _plain(settings: object, name: str, kind: type, plain: type) -> None:
    """Turn a number of numpy's into one of Python's; what is no such number stays, for the checks to refuse."""
    value = getattr(settings, name)
    if isinstance(value, kind) and not isinstance(value, bool):
        object.__setattr__(settings, name, plain(value))


TARGET_NOISE_CHOICES = ("independent", "same", "mean")


@dataclass(frozen=True)
class LearningSettings(NoiseSettings):
    """
    The settings of policies that learn from replayed transitions: those of every policy, and the noise of gradient steps.

    :param resample: As above; by default ``"episode"`` with members and for actors, else ``"step"``
    :param base_every: How often the acting base is redrawn, in collection steps; ``None`` for never
    :param target_noise: Noise of the networks in the target: ``"independent"`` of the online ones (NoisyNet's rule, and the
        default of value-based policies), the ``"same"`` (the default with members: each learns from its own target), or
        ``"mean"`` weights (the default of actors)
    :param members: Number K of keys that exist; the base is frozen then, so each key is a member of an implicit ensemble.
        ``None``: no end of keys
    :raises ValueError: If a value is unknown, out of range, or does not fit another one
    """

    resample: str | int | None = None  # type: ignore[assignment]
    base_every: int | None = None
    target_noise: str | None = None
    members: int | None = None

    #: Without members.
    _default_resample: ClassVar[str] = "step"
    _default_target_noise: ClassVar[str] = "independent"

    def __post_init__(self) -> None:
        _plain(self, "members", Integral, int)
        ensemble = self.members is not None
        if self.resample is None:
            object.__setattr__(self, "resample", "episode" if ensemble else self._default_resample)
        if self.target_noise is None:
            object.__setattr__(self, "target_noise", "same" if ensemble else self._default_target_noise)
        super().__post_init__()
        one_of("target_noise", self.target_noise, TARGET_NOISE_CHOICES)
        if ensemble:
            self._check_members()

    def _check_members(self) -> None:
        if not isinstance(self.members, int) or isinstance(self.members, bool) or self.members < 2:
            raise ValueError(f"members must be an integer >= 2, or None for no ensemble, got {self.members!r}.")
        if self.noise_sharing == "shared":
            raise ValueError(
                f'members={self.members} does not fit noise_sharing="shared", where all rows see the same weights. Use '
                '"flipout", whose rows each pick a member.'
            )
        if self.base_every is not None:
            raise ValueError(
                f"members={self.members} does not fit base_every={self.base_every}: a member is a key under one frozen base. "
                "Leave base_every out."
            )


@dataclass(frozen=True)
class ActorSettings(LearningSettings):
    """
    The settings of actors that learn from replayed transitions; arguments as in :class:`LearningSettings`.

    By default their noise is that of the behaviour, as in Plappert et al. 2018: it is held for an episode, and the critic
    learns the values of the mean weights.
    """

    #: Without members.
    _default_resample: ClassVar[str] = "episode"
    _default_target_noise: ClassVar[str] = "mean"


@dataclass(frozen=True)
class ValueSettings(LearningSettings):
    """
    The settings of value-based policies: those of learning from replayed transitions, and the members' prior.

    :param prior_scale: Scale of the frozen random prior that is added to each member's values (Osband et al. 2018);
        0 for none
    :raises ValueError: If a value is unknown, out of range, or does not fit another one
    """

    prior_scale: float = 0.0

    def __post_init__(self) -> None:
        _plain(self, "prior_scale", Real, float)
        super().__post_init__()
        number = isinstance(self.prior_scale, (int, float)) and not isinstance(self.prior_scale, bool)
        if not (number and math.isfinite(self.prior_scale) and self.prior_scale >= 0):
            raise ValueError(f"prior_scale must be a finite number >= 0, got {self.prior_scale!r}; use 0.0 for no prior.")
        if self.prior_scale > 0 and self.members is None:
            raise ValueError(
                f"prior_scale={self.prior_scale} needs members: a prior belongs to a member. Give members=10, say."
            )


#: What looks like a setting of any policy and is none.
_ELSEWHERE = {
    "noise_scale": "is set on the policy: model.policy.noise_scale = ...",
    "noise_ladder": "is set on the policy: model.policy.noise_ladder = (...)",
    "members": "is for algorithms with a replay buffer",
    "target_noise": "is for algorithms with a replay buffer",
    "prior_scale": "is for DQN and QRDQN",
}


def refuse_misplaced(kwargs: Mapping[str, Any]) -> None:
    """
    Refuse settings that belong elsewhere.

    :param kwargs: What is left of ``policy_kwargs`` for SB3's policy
    :raises TypeError: If one of them is known to be no setting of this policy
    """
    for name, where in _ELSEWHERE.items():
        if name in kwargs:
            raise TypeError(f"policy_kwargs={{{name!r}: {kwargs[name]!r}}} is no setting of this policy: {name} {where}.")
