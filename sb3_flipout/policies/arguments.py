"""From the keyword arguments of a policy to its table of settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from inspect import signature
from typing import Any, TypeVar

from sb3_flipout.checks import did_you_mean
from sb3_flipout.policies.settings import NoiseSettings

S = TypeVar("S", bound=NoiseSettings)

#: What looks like a setting of any policy and is none of it.
_ELSEWHERE = {
    "noise_scale": "is set on the policy: sb3_flipout.flipout_policy(model).noise_scale = ...",
    "noise_ladder": "is set on the policy: sb3_flipout.flipout_policy(model).noise_ladder = (...)",
    "members": "is for algorithms with a replay buffer",
    "target_noise": "is for algorithms with a replay buffer",
    "prior_scale": "is for DQN and QRDQN",
    "keys_per_transition": "is for DQN and QRDQN with members",
    "bootstrap": "is for DQN and QRDQN with members",
    "reward_noise": "is for DQN and QRDQN with members",
    "act_by_mode": "is for SAC, TQC and CrossQ",
    "update_noise": "is for actor-critics such as SAC and TD3",
    "base_every": "is base_every_rollouts for PPO and its kin, base_every_steps for algorithms with a replay buffer; load "
    'what 0.1.0 saved with custom_objects={"policy_kwargs": dict(...)}, in which it has its new name',
    "base_every_rollouts": "is for PPO and its kin; algorithms with a replay buffer have base_every_steps",
    "base_every_steps": "is for algorithms with a replay buffer; PPO and its kin have base_every_rollouts",
}


def arguments_of(policy_class: type) -> set[str]:
    """
    Name the arguments of a policy: those of its constructor, and of all constructors that this hands them on to.

    :param policy_class: Policy class
    :return: Names
    """
    constructors = [vars(base)["__init__"] for base in policy_class.__mro__ if "__init__" in vars(base)]
    return {name for constructor in constructors for name in signature(constructor).parameters}


def settings_among(kind: type[NoiseSettings], given: Mapping[str, Any]) -> dict[str, Any]:
    """
    Pick the settings out of a constructor's arguments.

    :param kind: Table of settings
    :param given: Arguments by name, such as ``locals()`` at the start of the constructor
    :return: Settings by name
    :raises KeyError: If the constructor has no argument for one
    """
    return {field.name: given[field.name] for field in fields(kind)}


def settings_from(kind: type[S], kwargs: dict[str, Any], known: Collection[str]) -> S:
    """
    Take the noise settings out of the keyword arguments of a policy.

    :param kind: Table of settings
    :param kwargs: Keyword arguments; those that are settings are taken out
    :param known: Names of the arguments of SB3's policy, for suggestions
    :return: The settings, checked
    :raises TypeError: If an argument is no setting of this policy, or a value has a wrong type
    :raises ValueError: If a value is unknown, out of range or unfit
    """
    names = [field.name for field in fields(kind)]
    given = {name: kwargs.pop(name) for name in names if name in kwargs}
    for name, value in kwargs.items():
        if name in _ELSEWHERE:
            raise TypeError(f"policy_kwargs={{{name!r}: {value!r}}} is no setting of this policy: {name} {_ELSEWHERE[name]}.")
        near = did_you_mean(name, names)
        if near and name not in known:
            raise TypeError(f"policy_kwargs={{{name!r}: {value!r}}} is no argument of this policy.{near}")
    return kind(**given)
