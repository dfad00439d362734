"""Fitness shaping: what each member of a population counts in the estimate of a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch as th

Shaping = Callable[[th.Tensor, th.Tensor, float], th.Tensor]


def centred_ranks(fitness: th.Tensor, pairs: th.Tensor, top: float) -> th.Tensor:
    """
    Ranks, from -1/2 of the worst to 1/2 of the best; members of equal fitness share their ranks' mean (Salimans et al. 2017).

    :param fitness: Fitness of each member, shape (N,)
    :param pairs: Not used
    :param top: Not used
    :return: Utilities, shape (N,)
    """
    _, which, counts = th.unique(fitness, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    ranks = first.to(fitness.dtype) + (counts.to(fitness.dtype) - 1) / 2
    return (ranks / max(len(fitness) - 1, 1) - 0.5)[which]


def plain(fitness: th.Tensor, pairs: th.Tensor, top: float) -> th.Tensor:
    """
    Fitness as it is, so that the estimate is that of the gradient of the mean fitness.

    :param fitness: Fitness of each member, shape (N,)
    :param pairs: Not used
    :param top: Not used
    :return: Utilities, shape (N,)
    """
    return fitness


def normalised(fitness: th.Tensor, pairs: th.Tensor, top: float) -> th.Tensor:
    """
    Fitness less its mean, over its standard deviation.

    :param fitness: Fitness of each member, shape (N,)
    :param pairs: Not used
    :param top: Not used
    :return: Utilities, shape (N,)
    """
    deviation = fitness.std(correction=0)
    return (fitness - fitness.mean()) / deviation if deviation > 0 else th.zeros_like(fitness)


def top_pairs(fitness: th.Tensor, pairs: th.Tensor, top: float) -> th.Tensor:
    """
    Fitness of the best pairs, judged by the better of the two, over its standard deviation (Mania et al. 2018, ARS).

    :param fitness: Fitness of each member, shape (N,)
    :param pairs: Number of the antithetic pair of each member, shape (N,)
    :param top: Share of the pairs that is used, in (0, 1]
    :return: Utilities, shape (N,): 0 for those that are not used
    """
    names, which = th.unique(pairs, return_inverse=True)
    best = fitness.new_full((len(names),), -th.inf).scatter_reduce(0, which, fitness, "amax")
    kept = max(1, round(top * len(names)))
    used = th.zeros(len(names), dtype=th.bool, device=fitness.device)
    used[best.argsort(descending=True, stable=True)[:kept]] = True
    of_member = used[which]
    deviation = fitness[of_member].std(correction=0)
    if not deviation > 0:
        return th.zeros_like(fitness)
    share = len(names) / kept  # the estimate is a mean over all members
    return th.where(of_member, share * fitness / deviation, th.zeros_like(fitness))


#: By name; a new way is one row.
SHAPINGS: dict[str, Shaping] = {
    "centred_ranks": centred_ranks,
    "none": plain,
    "normalised": normalised,
    "top": top_pairs,
}
