"""The search space of the weight noise: what a trial chooses, and what one has chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

from sb3_flipout.policies import ActorSettings, NoiseSettings, OnPolicySettings, ValueSettings

#: Version of the space: a trial of another one cannot be made again. Count up where an option comes, goes or changes.
VERSION = 1
PREFIX = "flipout_"

Options = dict[str, Any]


class Refused(ValueError):
    """Something that a user asked for and cannot have; ``python -m sb3_flipout.zoo`` tells it in one line."""


FAMILIES = ("gaussian", "factorised", "isotropic")
#: How long a draw may be held, by what the algorithm learns: a policy from rollouts, values, or an actor from a buffer.
RESAMPLE = {"rollouts": ("step", "episode", "rollout"), "values": ("step", "episode"), "actors": ("episode", "rollout")}
MEMBERS = (0, 10, 20)  # 0 for none: Optuna stores numbers
_SETTINGS: dict[str, type[NoiseSettings]] = {"rollouts": OnPolicySettings, "values": ValueSettings, "actors": ActorSettings}


class _Choice(Protocol):
    """Chooses values: a trial that suggests them, or one that says what they were."""

    def among(self, name: str, options: Sequence[Any]) -> Any:
        """Choose one of several values."""

    def between(self, name: str, low: float, high: float, log: bool = False) -> float:
        """Choose a number; ``log``: its logarithm is uniform."""

    def asks(self, name: str, wanted: bool) -> bool:
        """Say whether an option is chosen at all; a new trial does what is wanted."""


class _Suggested:
    """What a new trial suggests."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def among(self, name: str, options: Sequence[Any]) -> Any:
        return self._trial.suggest_categorical(PREFIX + name, options)

    def between(self, name: str, low: float, high: float, log: bool = False) -> float:
        return float(self._trial.suggest_float(PREFIX + name, low, high, log=log))

    def asks(self, name: str, wanted: bool) -> bool:
        return wanted


class _Remembered:
    """What a trial suggested when it was made; what nobody has asked for yet is left."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self.left = {name[len(PREFIX) :]: value for name, value in params.items() if name.startswith(PREFIX)}

    def among(self, name: str, options: Sequence[Any]) -> Any:
        if name not in self.left or self.left[name] not in options:
            came = repr(self.left[name]) if name in self.left else "nothing"
            raise Refused(
                f"the trial has {came} for {PREFIX}{name}, which is one of {list(options)} in this version of sb3_flipout: "
                "the study was made with another one. Use that version, or start another study by --study-name."
            )
        return self.left.pop(name)

    def between(self, name: str, low: float, high: float, log: bool = False) -> float:
        return float(self.among(name, [self.left.get(name, low)]))

    def asks(self, name: str, wanted: bool) -> bool:
        return name in self.left


def _fits(learns: str, given: Mapping[str, Any], choice: Options) -> bool:
    """Whether a policy takes a choice beside what the YAML says of it."""
    kind = _SETTINGS[learns]
    names = {field.name for field in fields(kind)}
    try:
        kind(**{**{name: value for name, value in given.items() if name in names}, **choice})
    except ValueError:
        return False
    return True


def _of_members(members: int) -> Options:
    """Settings of so many members; without any, what the YAML says of them is taken back."""
    found = dict(members=members or None, prior_scale=0.0, target_noise="same" if members else "independent")
    return found if members else {**found, "bootstrap": 1.0, "reward_noise": 0.0}


def _noise_settings(choice: _Choice, learns: str, given: Mapping[str, Any]) -> Options:
    families = [family for family in FAMILIES if _fits(learns, given, dict(family=family, sigma_init=1.0))]
    found: Options = dict(
        family=choice.among("family", families or FAMILIES),
        sigma_init=choice.between("sigma_init", 0.05, 2.0, log=True),
        resample=choice.among("resample", RESAMPLE[learns]),
        schedule=choice.among("schedule", ("constant", "linear")),
        schedule_fraction=None,
    )
    if found["schedule"] == "constant":
        found["schedule_end"] = None  # the YAML's would have no effect
    if choice.asks("learn_sigma", given.get("update_noise") != "mean"):  # with which no loss sees sigma
        found["learn_sigma"] = choice.among("learn_sigma", (False, True))
    if choice.asks("schedule_fraction", found["schedule"] == "linear"):
        found["schedule_fraction"] = choice.between("schedule_fraction", 0.1, 1.0)
    # How many of them learn from a transition is said for a number of members.
    numbers = [number for number in MEMBERS if learns == "values" and _fits(learns, given, _of_members(number))]
    if choice.asks("members", any(numbers) and given.get("keys_per_transition", 1) == 1):
        members = choice.among("members", numbers)
        found |= _of_members(members)
        if choice.asks("prior_scale", members > 0):
            found["prior_scale"] = choice.between("prior_scale", 0.0, 1.0)
    return found


def suggested(trial: Any, learns: str, given: Mapping[str, Any]) -> Options:
    """
    Let a trial choose the settings of the weight noise.

    :param trial: Optuna's trial
    :param learns: ``"rollouts"``, ``"values"`` or ``"actors"``: from what the algorithm learns, or what
    :param given: ``policy_kwargs`` of the YAML, with which they must fit
    :return: policy_kwargs
    """
    return _noise_settings(_Suggested(trial), learns, given)


def remembered(params: Mapping[str, Any], learns: str) -> Options:
    """
    Make the settings of the weight noise again that a trial has chosen.

    :param params: Parameters of the trial
    :param learns: As for :func:`suggested`
    :return: policy_kwargs; empty if it has chosen none
    :raises Refused: If the trial was made with another version of the space
    """
    trial = _Remembered(params)
    if not trial.left:
        return {}
    found = _noise_settings(trial, learns, {})
    if trial.left:
        raise Refused(
            f"the trial has options that this version of sb3_flipout does not know: {', '.join(trial.left)}. Use the version "
            "that the study was made with, or start another study by --study-name."
        )
    return found
