"""The noise settings of policies that learn from replayed transitions; those of all policies stand in ``settings.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from sb3_flipout.checks import check_choice, check_flag, check_integer, check_number
from sb3_flipout.policies.settings import NoiseSettings, checked_period

TargetNoise = Literal["independent", "same", "mean"]
UpdateNoise = Literal["independent", "mean"]
TARGET_NOISE_CHOICES: tuple[str, ...] = get_args(TargetNoise)
UPDATE_NOISE_CHOICES: tuple[str, ...] = get_args(UpdateNoise)


@dataclass(frozen=True)
class LearningSettings(NoiseSettings):
    """
    The settings of policies that learn from replayed transitions; arguments as in :class:`NoiseSettings`, and

    :param resample: As there; by default ``"episode"`` with members and for actors, else ``"step"``
    :param base_every_steps: How often the acting base is redrawn, in collection steps; ``None`` for never
    :param target_noise: Noise of the networks in the target: ``"independent"`` of the online ones (NoisyNet's rule, and the
        default of value-based policies), the ``"same"`` (the default with members: each learns from its own target), or
        ``"mean"`` weights (the default of actors)
    :param members: Number K of keys that exist; the base is frozen then, so each key is a member of an implicit ensemble.
        ``None``: keys are drawn without limit
    """

    resample: str | int | None = None  # type: ignore[assignment]
    base_every_steps: int | None = None
    target_noise: str | None = None
    members: int | None = None

    #: Without members.
    _DEFAULT_RESAMPLE: ClassVar[str] = "step"
    _DEFAULT_TARGET_NOISE: ClassVar[str] = "independent"
    SHAPING = (*NoiseSettings.SHAPING, "members")

    def __post_init__(self) -> None:
        if self.members is not None:
            hint = "Use None for no ensemble."
            self._set(members=check_integer("members", self.members, 2, hint=hint))
        ensemble = self.members is not None
        if self.resample is None:
            self._set(resample="episode" if ensemble else self._DEFAULT_RESAMPLE)
        if self.target_noise is None:
            self._set(target_noise="same" if ensemble else self._DEFAULT_TARGET_NOISE)
        super().__post_init__()
        self._set(target_noise=check_choice("target_noise", self.target_noise, TARGET_NOISE_CHOICES))
        if ensemble:
            self._check_members()
        elif self.base_every_steps is not None:
            self._set(base_every_steps=checked_period("base_every_steps", self.base_every_steps, self.layer_noise()))

    def _check_members(self) -> None:
        if self.noise_sharing == "shared":
            raise ValueError(
                f'members={self.members} does not fit noise_sharing="shared", where all rows see the same weights. Use '
                '"flipout", whose rows each pick a member.'
            )
        if self.base_every_steps is not None:
            raise ValueError(
                f"members={self.members} does not fit base_every_steps={self.base_every_steps}: a member is a key under one "
                "frozen base. Leave base_every_steps out."
            )
        if not self._members_differ:
            raise ValueError(
                f"members={self.members} does not fit sigma_init=0.0 with learn_sigma=False: all of them would be the mean "
                "weights. Leave sigma_init out; value-based policies can have members that differ by prior_scale alone."
            )

    @property
    def _members_differ(self) -> bool:
        return self.sigma_init != 0 or self.layer_noise().learns


@dataclass(frozen=True)
class ActorSettings(LearningSettings):
    """
    The settings of actors that learn from replayed transitions; arguments as in :class:`LearningSettings`.

    By default their noise is that of the behaviour, as in Plappert et al. 2018: it is held for an episode, and the critic
    learns the values of the mean weights.

    :param act_by_mode: Whether collection takes the most likely action of each row's perturbed actor, so that weight noise
        alone explores; else one is sampled
    :param update_noise: Noise of the actor in its own loss: ``"independent"`` draws, or ``"mean"`` weights, so that the noise
        is that of the behaviour alone; needs ``learn_sigma=False``
    """

    act_by_mode: bool = False
    update_noise: str = "independent"

    #: Without members.
    _DEFAULT_RESAMPLE: ClassVar[str] = "episode"
    _DEFAULT_TARGET_NOISE: ClassVar[str] = "mean"

    @property
    def learns_by_mean(self) -> bool:
        """Whether the mean weights learn, and the noise is that of the behaviour alone."""
        return self.update_noise == "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(
            act_by_mode=check_flag("act_by_mode", self.act_by_mode),
            update_noise=check_choice("update_noise", self.update_noise, UPDATE_NOISE_CHOICES),
        )
        if self.update_noise == "mean" and self.layer_noise().learns:
            raise ValueError(
                'update_noise="mean" does not fit learn_sigma=True: no loss would see sigma. Give learn_sigma=False, or use '
                'update_noise="independent".'
            )
        if self.update_noise == "mean" and self.members is not None:
            raise ValueError(
                f'update_noise="mean" does not fit members={self.members}: a member learns under its own weights. Leave one '
                "of them out."
            )


#: Settings that say something of members, each with the value that says nothing, and what it says.
_OF_MEMBERS: Mapping[str, tuple[float, str]] = {
    "prior_scale": (0.0, "a prior belongs to a member"),
    "keys_per_transition": (1, "it says how many of them learn from each transition"),
    "bootstrap": (1.0, "it says what each of them learns from"),
    "reward_noise": (0.0, "it says what each of them learns from"),
}


_LEAST_SHARE = 2.0**-53  # one step of the draws that are compared with it


@dataclass(frozen=True)
class ValueSettings(LearningSettings):
    """
    The settings of value-based policies; arguments as in :class:`LearningSettings`, and

    :param learn_sigma: As there; by default only with members
    :param schedule: As there; by default the noise falls, with members it is constant: they are what the noise makes of the
        weights
    :param prior_scale: Scale of the frozen random prior that is added to each member's values (Osband et al. 2018);
        0 for none
    :param keys_per_transition: Number M of members that each sampled transition is learned under, M <= K. ``batch_size``
        counts rows, and must be a multiple of M: a batch holds batch_size / M transitions, each under M different members
    :param bootstrap: Probability, in (0, 1], that a stored transition is in a member's bootstrap sample, from which alone it
        learns (Osband et al. 2016)
    :param reward_noise: Standard deviation, in units of the reward, of what each member adds to the reward of each stored
        transition: a normal draw of mean 0, always the same for the two (Osband et al. 2018); with ``n_steps`` above 1, one
        draw is added to their return
    """

    learn_sigma: bool | None = None  # type: ignore[assignment]
    prior_scale: float = 0.0
    keys_per_transition: int = 1
    bootstrap: float = 1.0
    reward_noise: float = 0.0

    @property
    def falls(self) -> str:
        """How the noise falls over training: what the user chose, or else the default."""
        return self.schedule or ("linear" if self.members is None else "constant")

    @property
    def _members_differ(self) -> bool:
        return super()._members_differ or self.prior_scale != 0

    def __post_init__(self) -> None:
        if self.learn_sigma is None:
            self._set(learn_sigma=self.members is not None)
        super().__post_init__()
        self._set(prior_scale=check_number("prior_scale", self.prior_scale, 0.0, hint="Use 0.0 for no prior."))
        hint = "Use 1 to learn each transition under one key."
        self._set(keys_per_transition=check_integer("keys_per_transition", self.keys_per_transition, 1, hint=hint))
        if self.members is not None and self.keys_per_transition > self.members:
            raise ValueError(
                f"keys_per_transition={self.keys_per_transition} is more than members={self.members}: no member learns twice "
                f"from one transition. Use {self.members}, with which all of them do."
            )
        self._check_bootstrap()
        for name, (nothing, what) in _OF_MEMBERS.items():
            value = getattr(self, name)
            if self.members is None and value != nothing:
                raise ValueError(f"{name}={value} needs members: {what}. Give members=10, say.")

    def _check_bootstrap(self) -> None:
        hint = "Use 1.0 to let each member learn from all transitions."
        share = check_number("bootstrap", self.bootstrap, 0.0, 1.0, hint, above=True)
        if share < _LEAST_SHARE:
            raise ValueError(f"bootstrap={share} is so small that nothing would be in a sample, and no member learn. {hint}")
        noise = check_number("reward_noise", self.reward_noise, 0.0, hint="Use 0.0 for none.")
        self._set(bootstrap=share, reward_noise=noise)

    def unlike(self, saved: Mapping[str, Any]) -> list[str]:
        """
        Compare with saved settings, as far as weights depend on them.

        :param saved: Settings by name
        :return: What differs, in words
        """
        found = super().unlike(saved)
        if bool(saved.get("prior_scale", self.prior_scale)) != bool(self.prior_scale):
            found.append(f"prior_scale: saved {saved['prior_scale']!r}, here {self.prior_scale!r}")
        return found
