"""The noise settings of a policy: what the user writes into ``policy_kwargs``.

One table per kind of policy, as a frozen dataclass; the constructors of policies have the same names and types, so that an
editor shows them, and hand them over by :func:`~sb3_flipout.policies.arguments.settings_from`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

from typing_extensions import Self

from sb3_flipout.checks import check_choice, check_flag, check_integer, check_number, check_strings, warn_user
from sb3_flipout.layers import LayerNoise
from sb3_flipout.layers.convert import LAYERS
from sb3_flipout.noise.schedule import SCHEDULES, scheduled_factor
from sb3_flipout.noise.stream import check_resample
from sb3_flipout.policies.legacy import moved_hint
from sb3_flipout.policies.sigma_units import UNITS

Perturb = Literal["policy", "heads", "all"]
PERTURB_CHOICES: tuple[str, ...] = get_args(Perturb)


@dataclass(frozen=True)
class NoiseSettings:
    """
    The noise settings of every policy, flat and plain so that YAML can say them; checked when made.

    :param family: How weights are perturbed: a name in ``sb3_flipout.noise.FAMILIES``
    :param sigma_init: Initial sigma, >= 0, in the family's unit; ``None`` is 0.5 (0.017 for ``"gaussian"`` with
        ``init="noisynet"``, as there); ``"dropconnect"`` has none
    :param sigma_unit: ``"weights"`` (the family's unit), or ``"inputs"``: sigma of weights is divided, once, by the root mean
        square of what each layer gets of the first observations, so that it is the standard deviation that their noise adds to
        an output, whatever the scale of observations
    :param learn_sigma: Whether sigma is trained; ``"isotropic"``, ``"lowrank"`` and ``"dropconnect"`` have none to train
    :param resample: How long an environment keeps its noise: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps
    :param noise_sharing: ``"flipout"``: signs per row; ``"shared"``: one perturbation for the batch; ``"independent"``: a full
        draw of its own per row, the slow reference
    :param perturb: Which part of the network: ``"policy"`` (all that the action depends on), ``"heads"`` (its last layer) or
        ``"all"`` (values too)
    :param layers: Which kinds of layer in it: ``"all"``, ``"linear"`` (linear layers alone, as NoisyNet) or ``"hidden"`` (the
        hidden-to-hidden weights of LSTMs and GRUs alone)
    :param skip: Names of modules to leave out, as in ``policy.named_modules()``; ``*`` stands for anything
    :param perturb_frozen: Whether layers are perturbed whose weights do not learn (``requires_grad`` is False)
    :param init: ``"keep"`` SB3's initialisation, or ``"noisynet"``: means and sigmas of Fortunato et al. 2018, section 3.2,
        for ``"gaussian"`` and ``"factorised"``
    :param schedule: How the noise falls over training: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``;
        ``None`` for the policy's default, which gives way to a callback that steers the noise
    :param schedule_end: What is left of the noise at the end of the schedule, as a share of the noise scale; ``None`` is 0,
        for ``"exponential"`` 0.01
    :param schedule_fraction: Share of training over which it falls; ``None`` for 0.3
    :raises TypeError: If a value has a wrong type
    :raises ValueError: If a value is unknown, out of range, does not fit another one, or would have no effect
    """

    family: str = "gaussian"
    sigma_init: float | None = None
    sigma_unit: str = "weights"
    learn_sigma: bool = True
    resample: str | int = "step"
    noise_sharing: str = "flipout"
    perturb: str = "policy"
    layers: str = "all"
    skip: str | Sequence[str] = ()
    perturb_frozen: bool = False
    init: str = "keep"
    schedule: str | None = None
    schedule_end: float | None = None
    schedule_fraction: float | None = None

    #: Of this kind of policy.
    _DEFAULT_SCHEDULE: ClassVar[str] = "constant"

    def __post_init__(self) -> None:
        noise = self.layer_noise()
        self._set(**{field.name: getattr(noise, field.name) for field in fields(LayerNoise)})
        self._set(
            resample=check_resample(self.resample),
            perturb=check_choice("perturb", self.perturb, PERTURB_CHOICES, moved_hint(self.perturb)),
            layers=check_choice("layers", self.layers, LAYERS),
            skip=check_strings("skip", self.skip),
            perturb_frozen=check_flag("perturb_frozen", self.perturb_frozen),
            sigma_unit=check_choice("sigma_unit", self.sigma_unit, UNITS),
        )
        if self.sigma_unit == "inputs" and (noise.spec.relative or noise.spec.sigma == "none"):
            raise ValueError(
                f'sigma_unit="inputs" does not fit family={self.family!r}, whose noise is relative to the mean weights. Leave '
                'it out, or use family="gaussian".'
            )
        self._check_schedule()

    def _set(self, **values: Any) -> None:
        """Put plain values in the place of what came: they are saved with the model."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_schedule(self) -> None:
        if self.schedule is not None:
            self._set(schedule=check_choice("schedule", self.schedule, SCHEDULES))
        if self.schedule_end is not None:
            exponential = self.falls == "exponential"
            hint = 'schedule="exponential" never reaches 0; end at a small share, 0.01 say.' if exponential else ""
            self._set(schedule_end=check_number("schedule_end", self.schedule_end, 0.0, hint=hint, above=exponential))
        if self.schedule_fraction is not None:
            self._set(schedule_fraction=check_number("schedule_fraction", self.schedule_fraction, 0.0, 1.0, above=True))
        if self.falls == "constant":
            for name in ("schedule_end", "schedule_fraction"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f'{name}={getattr(self, name)!r} has no effect with schedule="constant"; give schedule="linear", or '
                        f"leave {name} out."
                    )

    @property
    def falls(self) -> str:
        """How the noise falls over training: what the user chose, or else the default."""
        return self._DEFAULT_SCHEDULE if self.schedule is None else self.schedule

    @property
    def learns_by_mean(self) -> bool:
        """Whether the mean weights learn, and the noise is that of the behaviour alone; some actors can be told so."""
        return False

    @property
    def insists_on_schedule(self) -> bool:
        """Whether the user has asked for a falling noise, so that it is said where it cannot fall."""
        return self.schedule not in (None, "constant")

    def as_saved(self, saved: Mapping[str, Any]) -> Self:
        """
        Keep the noise of a training constant that began when this was the default.

        :param saved: Settings by name, of the training that goes on
        :return: Settings
        """
        chosen = (self.schedule, self.schedule_end, self.schedule_fraction) != (None, None, None)
        learned = bool(saved.get("learn_sigma")) and not self.learn_sigma
        # What names no schedule and learned sigma was made when both were the default.
        was_constant = saved.get("schedule", "constant") == "constant" or (saved["schedule"] is None and learned)
        if not was_constant or chosen or self.falls == "constant":
            return self
        if learned and saved.get("schedule") is None:
            warn_user(
                "the model was saved by 0.1.0, which learned sigma by default; it goes on with sigma as it is, fixed. To go "
                'on learning it, load with custom_objects={"policy_kwargs": dict(learn_sigma=True, ...)}.',
            )
        return replace(self, schedule="constant")

    def layer_noise(self) -> LayerNoise:
        """
        Take the part of the settings that concerns layers.

        :return: How each layer is perturbed
        """
        return LayerNoise(**{field.name: getattr(self, field.name) for field in fields(LayerNoise)})

    def factor_at(self, progress: float) -> float:
        """
        Compute what the schedule multiplies the noise scale by.

        :param progress: Share of training that is done, from 0 to 1
        :return: Factor
        """
        end = self.schedule_end if self.schedule_end is not None else 0.01 if self.falls == "exponential" else 0.0
        fraction = 0.3 if self.schedule_fraction is None else self.schedule_fraction
        return scheduled_factor(self.falls, 1.0, end, fraction, progress)

    #: Settings that two policies must have in common for the weights of one to mean the same in the other.
    SHAPING: ClassVar[tuple[str, ...]] = ("perturb", "layers", "skip", "perturb_frozen")

    def unlike(self, saved: Mapping[str, Any]) -> list[str]:
        """
        Compare with saved settings, as far as weights depend on them.

        :param saved: Settings by name
        :return: What differs, in words; nothing where the saved weights fit
        """
        found = [
            f"{name}: saved {saved[name]!r}, here {getattr(self, name)!r}"
            for name in self.SHAPING
            if name in saved and _plain(saved[name]) != _plain(getattr(self, name))
        ]
        family, sharing = (saved.get(name, getattr(self, name)) for name in ("family", "noise_sharing"))
        own, theirs = self.layer_noise(), LayerNoise(family, noise_sharing=sharing)
        ensemble = saved.get("members") is not None  # its base is a weight
        if theirs.spec.sigma != own.spec.sigma or (ensemble and theirs.spec.base != own.spec.base):
            found.append(f"family: saved {family!r}, here {self.family!r}")
        elif ensemble and theirs.draws_base != own.draws_base:
            found.append(f"noise_sharing: saved {sharing!r}, here {self.noise_sharing!r}")
        return found


@dataclass(frozen=True)
class OnPolicySettings(NoiseSettings):
    """
    The settings of policies that learn from rollouts; arguments as in :class:`NoiseSettings`, and

    :param learn_sigma: As there; by default it is not
    :param base_every_rollouts: How often the base perturbation is redrawn, in rollouts; ``None`` for never; by default at the
        start of each rollout
    """

    learn_sigma: bool = False
    base_every_rollouts: int | Literal["default"] | None = "default"

    _DEFAULT_SCHEDULE: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_every_rollouts == "default":
            self._set(base_every_rollouts=1 if self.layer_noise().draws_base else None)
        else:
            self._set(base_every_rollouts=checked_period("base_every_rollouts", self.base_every_rollouts, self.layer_noise()))
        if self.noise_sharing == "shared" and self.resample != "rollout":
            raise ValueError(
                f'noise_sharing="shared" with resample={self.resample!r} could not be replayed: the shared draw is the base '
                'perturbation, which must hold from a rollout to the end of its update. Use resample="rollout", or '
                'noise_sharing="flipout", whose rows differ by their keys.'
            )

    @property
    def rollouts_per_base(self) -> int | None:
        """How often the base perturbation is redrawn, in rollouts; ``None`` for never."""
        every = self.base_every_rollouts
        assert every != "default", "replaced by a number when the settings are made"
        return every


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def checked_period(name: str, every: Any, noise: LayerNoise) -> int | None:
    """
    Check how often the base is redrawn.

    :param name: Name of the setting
    :param every: What came
    :param noise: How each layer is perturbed
    :return: A number of rollouts or steps; ``None`` for never
    :raises TypeError: If it is no integer
    :raises ValueError: If it is below 1, or there is no base to redraw
    """
    if every is None:
        return None
    number = check_integer(name, every, 1, hint="Use None for never.")
    follows_keys = name == "base_every_steps" and noise.noise_sharing == "shared"
    if follows_keys or not noise.draws_base:
        why = "where the draw changes with the keys, as resample says" if follows_keys else "where rows share no base draw"
        raise ValueError(
            f"{name}={number} has no effect with family={noise.family!r} and noise_sharing={noise.noise_sharing!r}, {why}. "
            f"Leave {name} out."
        )
    return number
