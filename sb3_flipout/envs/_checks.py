"""Argument checks that the environments share."""

import math

import numpy as np
from gymnasium import spaces


def checked_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return ``value`` as a Python int if it is a whole number in ``[low, high]``.

    :param name: Name of the argument, for the error message.
    :param value: What the caller passed. Python and numpy integers are accepted, ``bool`` is not.
    :param low: Smallest allowed value.
    :param high: Largest allowed value; ``None`` for no upper limit.
    :return: The value as an ``int``.
    :raises TypeError: If ``value`` is not an integer.
    :raises ValueError: If ``value`` is outside ``[low, high]``.
    """
    allowed = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    remedy = f"pass for example {name}={max(low, 10)}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}; {remedy}.")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {allowed}, got {value}; {remedy}.")
    return int(value)


def checked_cost(name: str, value: object) -> float:
    """Return ``value`` as a Python float if it is a finite number that is not negative.

    :param name: Name of the argument, for the error message.
    :param value: What the caller passed. Python and numpy real numbers are accepted, ``bool`` is not.
    :return: The value as a ``float``.
    :raises TypeError: If ``value`` is not a real number.
    :raises ValueError: If ``value`` is negative, infinite or NaN.
    """
    allowed, remedy = "a finite number >= 0", f"pass for example {name}=0.01"
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}; {remedy}.")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be {allowed}, got {value}; {remedy}.")
    return float(value)


def checked_bool(name: str, value: object) -> bool:
    """Return ``value`` if it is a ``bool``.

    :param name: Name of the argument, for the error message.
    :param value: What the caller passed; numpy booleans are accepted too.
    :return: The value as a ``bool``.
    :raises TypeError: If ``value`` is not a boolean.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}; pass {name}=True or =False."
        )
    return bool(value)


def checked_action(space: spaces.Space[np.int64], action: np.int64 | int, *, running: bool) -> int:
    """Return ``action`` as a Python int if the episode is running and the action is in ``space``.

    :param space: The action space of the environment, ``Discrete(2)``.
    :param action: What the caller passed to ``step``.
    :param running: Whether an episode has been started by ``reset`` and has not ended yet.
    :return: The action, 0 or 1, as an ``int``.
    :raises RuntimeError: If no episode is running.
    :raises ValueError: If ``action`` is not an element of ``space``.
    """
    if not running:
        raise RuntimeError("step() was called while no episode is running; call reset() first and after each episode.")
    if not space.contains(action):
        raise ValueError(f"action must be 0 or 1 as a scalar integer, got {action!r}; pass an element of env.action_space.")
    return int(action)
