"""Schedules that users give to callbacks."""

from __future__ import annotations

import math

from sb3_flipout.callbacks.common import Schedule
from sb3_flipout.checks import check_number


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
