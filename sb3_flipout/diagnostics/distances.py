"""How far a perturbed policy acts from the policy of the mean weights (Plappert et al. 2018, appendix C), as numbers.

Measuring reads: it draws nothing from the policy's streams nor from a global generator, and leaves no trace in the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_flipout.diagnostics.actions import divergence
from sb3_flipout.diagnostics.views import ActionView, action_view, stacked
from sb3_flipout.layers import perturbed
from sb3_flipout.noise import RowNoise
from sb3_flipout.policies.base import FlipoutPolicyMixin

MeasureName = Literal["kl", "action_distance", "disagreement"]


def kl_distance(reference: ActionView, other: ActionView) -> float:
    r"""
    Compute the mean over rows of :math:`D_{KL}(\pi \,\|\, \tilde\pi)`; of value-based policies, between softmaxes of values.

    :param reference: What pi does with N observations
    :param other: What the other policy does with them
    :return: Mean divergence in nats, summed over independent parts of the action
    """
    return divergence(stacked([reference.compared]), stacked([other.compared]))  # one draw


def rms_distance(reference: ActionView, other: ActionView) -> float:
    """
    Compute the root mean squared difference of preferred actions, over rows and components.

    :param reference: What a policy does with N observations
    :param other: What another does with them
    :return: Distance in the unit of the actions
    """
    return float((reference.choice - other.choice).double().square().mean().sqrt())


def disagreement(reference: ActionView, other: ActionView) -> float:
    """
    Compute the share of rows whose preferred actions differ.

    :param reference: What a policy does with N observations
    :param other: What another does with them
    :return: Share, from 0 to 1
    """
    return float((reference.choice != other.choice).reshape(len(reference.choice), -1).any(1).double().mean())


def epsilon_to_kl(epsilon: float, n_actions: int) -> float:
    r"""
    Compute the divergence of an epsilon-greedy policy from the greedy one: :math:`-\log(1 - \epsilon + \epsilon / |A|)`.

    :param epsilon: Share of random actions
    :param n_actions: Number of actions
    :return: Divergence in nats
    """
    return -math.log(1 - epsilon + epsilon / n_actions)


def epsilon_to_disagreement(epsilon: float, n_actions: int) -> float:
    r"""
    Compute the disagreement of an epsilon-greedy policy with the greedy one: :math:`\epsilon (1 - 1 / |A|)`.

    :param epsilon: Share of random actions
    :param n_actions: Number of actions
    :return: Share of other actions
    """
    return epsilon * (1 - 1 / n_actions)


@dataclass(frozen=True)
class Measure:
    """
    One way of measuring.

    :param distance: How what two policies do is compared, reference first
    :param action_spaces: For which kinds of actions
    :param of_epsilon: Distance of an epsilon-greedy policy for a number of actions, where that has a meaning
    """

    distance: Callable[[ActionView, ActionView], float]
    action_spaces: tuple[type[spaces.Space[Any]], ...]
    of_epsilon: Callable[[float, int], float] | None = None


_DISCRETE = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)

MEASURES: dict[str, Measure] = {
    "kl": Measure(kl_distance, _DISCRETE, epsilon_to_kl),
    "action_distance": Measure(rms_distance, (spaces.Box,)),
    "disagreement": Measure(disagreement, _DISCRETE, epsilon_to_disagreement),
}
assert tuple(MEASURES) == get_args(MeasureName), "the table and its names are one"


@th.no_grad()
def policy_distance(policy: FlipoutPolicyMixin, obs: Any, noise: RowNoise, measure: Measure) -> float:
    """
    Measure how far the policy acts under row noise from how it acts under the mean weights.

    :param policy: Flipout policy
    :param obs: N observations, as the policy's networks take them
    :param noise: Row noise of N rows
    :param measure: How
    :return: Distance
    """
    with perturbed(policy, None):
        reference = action_view(policy, obs)
    with perturbed(policy, noise):
        return measure.distance(reference, action_view(policy, obs))


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
