"""Schedules of the noise scale: how it falls from a start to an end over a share of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine", "exponential"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

#: Scale by start, end and the remaining share r of the annealing, which goes from 1 to 0.
SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, r: end + (start - end) * r,
    "cosine": lambda start, end, r: end + (start - end) * 0.5 * (1 - math.cos(math.pi * r)),
    "exponential": lambda start, end, r: start**r * end ** (1 - r),
}


def scheduled_factor(schedule: str, start: float, end: float, fraction: float, progress: float) -> float:
    """
    Evaluate a schedule.

    :param schedule: ``"constant"``, ``"linear"``, ``"cosine"`` or ``"exponential"``
    :param start: Value at the start
    :param end: Value at the end of the schedule, and afterwards
    :param fraction: Share of training that the schedule takes, above 0
    :param progress: Share of training that is done; above 1 where SB3 has gone beyond the total
    :return: Value
    """
    if schedule == "constant":
        return start
    return SHAPES[schedule](start, end, max(0.0, 1.0 - progress / fraction))
