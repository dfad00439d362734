"""How far a perturbed policy acts from the policy of the mean weights (Plappert et al. 2018, appendix C), as numbers.

Measuring reads: it draws nothing from the policy's streams nor from a global generator, and leaves no trace in the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from torch.distributions import Bernoulli

from sb3_flipout.callbacks.views import components
from sb3_flipout.layers import perturbed
from sb3_flipout.noise import RowNoise
from sb3_flipout.policies.base import FlipoutPolicy

# ---- tensors in, a number out ---------------------------------------------------------------------------------------


def kl_distance(reference: list[th.Tensor], other: list[th.Tensor]) -> float:
    r"""
    Give the mean over rows of :math:`D_{KL}(\pi \,\|\, \tilde\pi)`.

    :param reference: Logarithms of the probabilities under pi, one tensor (N, ..., n_choices) per independent part of the
        action, over whose divergences is summed
    :param other: The same under the other policy
    :return: Mean divergence in nats
    """
    parts = [
        th.nn.functional.kl_div(q, p, reduction="none", log_target=True).flatten(1).sum(1)
        for p, q in zip(reference, other, strict=True)
    ]
    return float(th.stack(parts).sum(0).mean())


def rms_distance(reference: th.Tensor, other: th.Tensor) -> float:
    """
    Give the root mean squared difference, over rows and components.

    :param reference: Actions, shape (N, ...)
    :param other: Actions, same shape
    :return: Distance in the unit of the actions
    """
    return float((reference - other).double().square().mean().sqrt())


def disagreement(reference: th.Tensor, other: th.Tensor) -> float:
    """
    Give the share of rows that differ.

    :param reference: Actions, shape (N, ...)
    :param other: Actions, same shape
    :return: Share, from 0 to 1
    """
    return float((reference != other).reshape(len(reference), -1).any(1).double().mean())


def epsilon_to_kl(epsilon: float, n_actions: int) -> float:
    r"""
    Give the divergence of an epsilon-greedy policy from the greedy one: :math:`-\log(1 - \epsilon + \epsilon / |A|)`.

    :param epsilon: Share of random actions
    :param n_actions: Number of actions
    :return: Divergence in nats
    """
    return -math.log(1 - epsilon + epsilon / n_actions)


def epsilon_to_disagreement(epsilon: float, n_actions: int) -> float:
    r"""
    Give the disagreement of an epsilon-greedy policy with the greedy one: :math:`\epsilon (1 - 1 / |A|)`.

    :param epsilon: Share of random actions
    :param n_actions: Number of actions
    :return: Share of other actions
    """
    return epsilon * (1 - 1 / n_actions)


# ---- what a policy says ---------------------------------------------------------------------------------------------


def action_log_probs(policy: Any, obs: Any) -> list[th.Tensor]:
    """
    Give the logarithms of action probabilities; a value-based policy's are the softmax of its values.

    :param policy: Policy for discrete actions, under whichever noise is active
    :param obs: Observations
    :return: One tensor (N, ..., n_choices) per independent part of the action
    """
    if not hasattr(policy, "get_distribution"):
        values = policy.acting(obs)
        return [th.log_softmax(values.mean(1) if values.dim() == 3 else values, dim=-1)]  # quantiles: their mean
    parts = components(policy.get_distribution(obs))  # MaskablePPO's without masks, which are no part of an observation
    if isinstance(parts[0], Bernoulli):
        return [th.nn.functional.logsigmoid(th.stack([part.logits, -part.logits], dim=-1)) for part in parts]
    return [part.logits for part in parts]


def likeliest_actions(policy: Any, obs: Any) -> th.Tensor:
    """
    Give the deterministic actions.

    :param policy: Policy, under whichever noise is active
    :param obs: Observations
    :return: Actions, shape (N, ...)
    """
    return policy._predict(obs, deterministic=True)


@dataclass(frozen=True)
class Measure:
    """
    One way of measuring.

    :param output: What of the policy is compared
    :param distance: How it is compared, reference first
    :param action_spaces: For which kinds of actions
    :param of_epsilon: Distance of an epsilon-greedy policy for a number of actions, where that has a meaning
    """

    output: Callable[[Any, Any], Any]
    distance: Callable[[Any, Any], float]
    action_spaces: tuple[type[spaces.Space[Any]], ...]
    of_epsilon: Callable[[float, int], float] | None = None


_DISCRETE = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)

MEASURES: dict[str, Measure] = {
    "kl": Measure(action_log_probs, kl_distance, _DISCRETE, epsilon_to_kl),
    "action_distance": Measure(likeliest_actions, rms_distance, (spaces.Box,)),
    "disagreement": Measure(likeliest_actions, disagreement, _DISCRETE, epsilon_to_disagreement),
}


@th.no_grad()
def policy_distance(policy: FlipoutPolicy, obs: Any, noise: RowNoise, measure: Measure) -> float:
    """
    Measure how far the policy acts under row noise from how it acts under the mean weights.

    :param policy: Flipout policy
    :param obs: N observations, as the policy's networks take them
    :param noise: Row noise of N rows
    :param measure: How
    :return: Distance
    """
    with perturbed(policy, None):
        reference = measure.output(policy, obs)
    with perturbed(policy, noise):
        return measure.distance(reference, measure.output(policy, obs))


def count_actions(space: spaces.Space[Any]) -> int:
    """
    Count the actions of a space.

    :param space: Space of discrete actions
    :return: Number of different actions
    """
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(np.prod(space.nvec))
    assert isinstance(space, spaces.MultiBinary), "the measures that need it are for discrete actions"
    return int(2 ** np.prod(space.shape))
