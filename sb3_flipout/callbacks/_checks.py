"""Checks of what users give to callbacks."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from sb3_flipout.callbacks.common import Schedule


def check_number(name: str, value: Any, low: float, high: float = math.inf, hint: str = "", above: bool = False) -> float:
    """
    Refuse what is no finite number in a range.

    :param name: Name of the argument
    :param value: What the user gave
    :param low: Least value
    :param high: Largest value
    :param hint: What to do instead, if it needs saying
    :param above: Whether the least value itself is refused
    :return: The number, as a float
    :raises TypeError: If it is no number
    :raises ValueError: If it is not finite or out of range
    """
    bounds = f"{'>' if above else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {bounds}, got {value!r}.{hint}")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high and not (above and number == low)):
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}.{hint}")
    return number


def check_count(name: str, value: Any) -> int:
    """
    Refuse what is no integer >= 1.

    :param name: Name of the argument
    :param value: What the user gave
    :return: The integer
    :raises ValueError: If it is none
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")
    return int(value)


def scheduled(name: str, schedule: Schedule, progress_remaining: float, high: float = math.inf) -> float:
    """
    Evaluate a schedule of the user's, and refuse what it may not return.

    :param name: Name of the argument
    :param schedule: Function of the progress that remains, from 1 at the start of training to 0 at its end
    :param progress_remaining: Where to evaluate it
    :param high: Largest value that is allowed
    :return: Its value
    :raises ValueError: If it is no finite number >= 0 or too large
    """
    value = schedule(progress_remaining)
    try:
        return check_number(name, float(value), 0.0, high)
    except (TypeError, ValueError) as error:
        at_most = "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(
            f"the schedule in {name} must give a finite number >= 0{at_most}, got {value!r} at "
            f"progress_remaining={progress_remaining:g}."
        ) from error
