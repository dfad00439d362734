"""Action distributions under weight noise: how uncertain, and how far from each other.

An action of several components, drawn independently of each other given the weights, is a list of torch distributions, one
per component or group of components. What is written (draws, N) below is the batch shape of a ``Categorical``, and the
beginning of that of a ``Bernoulli`` or ``Normal``, whose further dimension is that of the components.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, kl_divergence
from torch.nn import functional as F


class EntropySplit(NamedTuple):
    """
    Entropy of actions, in nats, and where it comes from: ``total = action + weights``.

    :param total: Entropy of the action when the weights are drawn too
    :param action: Expected entropy of the action distribution under drawn weights
    :param weights: Mutual information of action and weights
    """

    total: float
    action: float
    weights: float


# The distribution of a component when the draw of the weights is not known, from those under each draw.
_MARGINALS: dict[type[Distribution], Callable[[Any], Distribution]] = {
    Categorical: lambda given: Categorical(probs=given.probs.mean(0)),
    Bernoulli: lambda given: Bernoulli(probs=given.probs.mean(0)),
    # The normal distribution of the same mean and, by the law of total variance, the same variance.
    Normal: lambda given: Normal(
        given.mean.mean(0), (given.variance.mean(0) + given.mean.var(0, unbiased=False)).sqrt(), validate_args=False
    ),
}


def _marginal(given: Distribution) -> Distribution:
    return next(make for kind, make in _MARGINALS.items() if isinstance(given, kind))(given)


def _per_row(values: th.Tensor, rows: int) -> th.Tensor:
    """Add up what the dimensions after (..., N) hold: independent components."""
    return values.flatten(rows).sum(-1) if values.dim() > rows else values


def entropy_split(components: Sequence[Distribution]) -> EntropySplit:
    r"""
    Split the entropy of actions into the part of the action distribution and that of the weights: Houlsby et al. 2011.

    :math:`H[\mathbb E_k \pi_k] = \mathbb E_k H[\pi_k] + I(a; k)`, averaged over rows, added up over components, with the
    expectation over the given draws. For discrete actions this is exact, and the part of the weights is at most the logarithm
    of the number of draws. A mixture of normal distributions has no entropy in closed form; the normal distribution of the
    same variance stands for it, whose entropy is the largest possible.

    :param components: Action distributions under each draw of the weights, (draws, N)
    :return: Total entropy and its two parts
    """
    total = sum((_per_row(_marginal(given).entropy(), 1).mean() for given in components), th.zeros(()))
    action = sum((_per_row(given.entropy(), 2).mean() for given in components), th.zeros(()))
    return EntropySplit(float(total), float(action), float(total - action))


def _log_probs(given: Any) -> th.Tensor:
    """Logarithms of the probabilities of a discrete component, choices last."""
    return F.logsigmoid(th.stack([given.logits, -given.logits], dim=-1)) if isinstance(given, Bernoulli) else given.logits


def _kl(own: Any, given: Any) -> th.Tensor:
    """By logarithms: torch calls the divergence infinite where a probability is so small that it is rounded to 0."""
    if isinstance(own, Normal):
        return kl_divergence(own, given)
    log_own = _log_probs(own)
    terms = log_own.exp() * (log_own - _log_probs(given))
    return terms.masked_fill(log_own == -math.inf, 0.0).sum(-1)


def divergence(reference: Sequence[Distribution], components: Sequence[Distribution]) -> float:
    r"""
    Compute :math:`\mathbb E_k D_{\mathrm{KL}}(\pi \,\|\, \pi_k)`, averaged over rows, in nats.

    :param reference: Action distributions of the reference policy, (draws, N), usually the same for all draws
    :param components: Action distributions under each draw of the weights, (draws, N)
    :return: Mean divergence
    """
    pairs = zip(reference, components, strict=True)
    return float(sum((_per_row(_kl(own, given), 2).mean() for own, given in pairs), th.zeros(())))


def pairwise_disagreement(choices: th.Tensor) -> float:
    """
    Estimate how often two different draws choose different actions.

    :param choices: Chosen discrete actions, shape (draws, N) or (draws, N, components); at least 2 draws
    :return: Share of pairs of draws, averaged over rows, that differ in any component
    :raises ValueError: If there are fewer than 2 draws
    """
    if len(choices) < 2:
        raise ValueError(f"choices must be those of 2 draws or more, got {len(choices)}.")
    differ = choices[:, None] != choices[None]
    differ = differ.flatten(3).any(-1) if differ.dim() > 3 else differ
    pairs = len(choices) * (len(choices) - 1)
    return float(differ.sum((0, 1)).double().mean() / pairs)
