"""Numbers that are not finite: finding them, and the error that tells of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch as th
from torch import nn


class NonFiniteError(ValueError):
    """
    NaN or infinity where a training cannot go on with it: in a reward, an observation, a weight or sigma.

    :param message: What was found
    :param where: Name of the parameter, or what came in: ``"reward of environment 0"``
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where


def first_non_finite(named: Mapping[str, th.Tensor]) -> str | None:
    """
    Find a parameter with an element that is NaN or infinite.

    One norm over all of them answers for most; they are looked at one by one only where it is not finite.

    :param named: Parameters by name
    :return: Name of the first such parameter; ``None`` if all are finite
    """
    with th.no_grad():
        if bool(th.isfinite(nn.utils.get_total_norm(named.values()))):
            return None
        return next((name for name, value in named.items() if not bool(th.isfinite(value).all())), None)


def is_finite(numbers: Any) -> bool:
    """
    Tell whether there is no NaN and no infinity in arrays.

    The product of an array with itself answers for most, in half a microsecond; where it is not finite, all are looked at.

    :param numbers: An array, or a dictionary of them; what is no array, or of integers, has none
    :return: Whether there is none
    """
    if isinstance(numbers, np.ndarray):
        if numbers.dtype.kind != "f":
            return True
        return math.isfinite(np.vdot(numbers, numbers)) or bool(np.isfinite(numbers).all())
    return not isinstance(numbers, Mapping) or all(map(is_finite, numbers.values()))


def not_finite(array: Any) -> np.ndarray | None:
    """
    Find where an array has NaN or infinity.

    :param array: Array, or what is no array, in which there is nothing to find
    :return: Mask of the same shape; ``None`` if all is finite
    """
    return None if is_finite(array) else ~np.isfinite(array)


def parts(observations: Any) -> Iterator[tuple[str, Any]]:
    """
    Give the arrays of observations.

    :param observations: An array, or a dictionary of them
    :return: What each is called, in a sentence, and the array
    """
    if isinstance(observations, Mapping):
        yield from ((f"observation {name!r}", array) for name, array in observations.items())
    else:
        yield "observation", observations
