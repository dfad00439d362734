"""A ladder of noise scales over the environments, as Ape-X has one of epsilons (Horgan et al. 2018, section 4.1).

Environment i acts under the scale ``c * ladder[i]``: the policy has one noise scale c, the ladder multiplies it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch as th


def geometric_ladder(low: float, high: float, n_envs: int) -> tuple[float, ...]:
    r"""
    Spread multipliers evenly in their logarithm: :math:`m_i = low \, (high / low)^{i / (N - 1)}`, from low to high.

    Ape-X's :math:`\varepsilon^{1 + \alpha i / (N - 1)}` is such a ladder, from :math:`\varepsilon` down to
    :math:`\varepsilon^{1 + \alpha}`. A single environment gets the middle, :math:`\sqrt{low \cdot high}`.

    :param low: Multiplier of the first environment, above 0
    :param high: Multiplier of the last environment, at least ``low``
    :param n_envs: Number N of environments
    :return: One multiplier per environment
    """
    if n_envs == 1:
        return (math.sqrt(low * high),)
    return tuple(low * (high / low) ** (i / (n_envs - 1)) for i in range(n_envs))


def checked_ladder(ladder: Any) -> tuple[float, ...] | None:
    """
    Turn what a user gave as ladder into plain numbers.

    :param ladder: One multiplier per environment, or ``None`` for no ladder
    :return: Multipliers
    :raises ValueError: If it is neither ``None`` nor finite numbers >= 0, at least one
    """
    if ladder is None:
        return None
    numbers = tuple(ladder) if isinstance(ladder, Sequence) and not isinstance(ladder, str) else ()
    right = all(isinstance(item, Real) and not isinstance(item, bool) and 0 <= float(item) < math.inf for item in numbers)
    if not (numbers and right):
        raise ValueError(
            f"noise_ladder must be a tuple of finite numbers >= 0, one per environment, or None for no ladder, got {ladder!r}."
        )
    return tuple(float(item) for item in numbers)


def environment_scales(scale: float, ladder: tuple[float, ...] | None, n_envs: int, device: th.device) -> th.Tensor:
    """
    Compute the noise scale of each environment.

    :param scale: Noise scale c of the policy
    :param ladder: Multiplier of each environment; ``None`` for 1
    :param n_envs: Number of environments
    :param device: Device of the policy
    :return: Scales, shape (n_envs,), float32
    :raises ValueError: If the ladder is for another number of environments
    """
    if ladder is None:
        return th.full((n_envs,), scale, device=device, dtype=th.float32)
    if len(ladder) != n_envs:
        raise ValueError(
            f"the policy's noise_ladder is for {len(ladder)} environments, here are {n_envs}. Set "
            "model.policy.noise_ladder = None for no ladder, or give one multiplier per environment."
        )
    return th.tensor([scale * multiplier for multiplier in ladder], dtype=th.float32, device=device)
