"""What a policy does with observations, in one form for all algorithms: outputs, action distributions, preferred action."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.nn import functional as F

from sb3_flipout.policies.observations import n_rows


class ActionView(NamedTuple):
    """
    What a policy does with N observations under one draw of the noise.

    :param outputs: Outputs of the network: logarithms of probabilities, means or action values, shape (N, D)
    :param acting: Distributions that actions are drawn from, one per group of components; none where a continuous action is
        chosen without chance
    :param compared: Distributions by which policies are compared; softmax of the values where the greedy action is taken
    :param choice: Preferred action: integers, shape (N,) or (N, components), or continuous, shape (N, D)
    """

    outputs: th.Tensor
    acting: list[Distribution]
    compared: list[Distribution]
    choice: th.Tensor

    @property
    def discrete(self) -> bool:
        """Whether actions can only be equal or different."""
        return bool(self.acting) and not isinstance(self.acting[0], Normal)


def components(distribution: Any) -> list[Any]:
    """
    List the independent parts of an action distribution.

    :param distribution: SB3's or sb3-contrib's distribution
    :return: One of torch's distributions for each part
    """
    parts: Any = getattr(distribution, "distributions", None) or distribution.distribution  # the former: with action masks
    return list(parts) if isinstance(parts, Sequence) else [parts]


def _of_distribution(distribution: Any) -> ActionView:
    parts = components(distribution)
    outputs = th.cat([part.mean if isinstance(part, Normal) else part.logits for part in parts], dim=1)
    return ActionView(outputs, parts, parts, distribution.mode())


def _of_actor_critic(policy: Any, obs: PyTorchObs) -> ActionView:
    lstm = getattr(policy, "lstm_actor", None)
    if lstm is None:
        return _of_distribution(policy.get_distribution(obs))
    n = n_rows(obs)  # as at the first step of an episode, where the state is zero
    states = tuple(th.zeros(lstm.num_layers, n, lstm.hidden_size, device=policy.device) for _ in range(2))
    return _of_distribution(policy.get_distribution(obs, states, th.ones(n, device=policy.device))[0])


def _of_stochastic_actor(policy: Any, obs: PyTorchObs) -> ActionView:
    mean, log_std, kwargs = policy.actor.get_action_dist_params(obs)
    return _of_distribution(policy.actor.action_dist.proba_distribution(mean, log_std, **kwargs))


def _of_values(policy: Any, obs: PyTorchObs) -> ActionView:
    values = policy.online(obs)
    values = values.mean(dim=1) if values.dim() == 3 else values  # quantiles
    choice = values.argmax(dim=1)
    greedy = Categorical(probs=F.one_hot(choice, values.shape[1]).to(values.dtype), validate_args=False)
    return ActionView(values, [greedy], [Categorical(logits=values, validate_args=False)], choice)


def _of_actions(policy: Any, obs: PyTorchObs) -> ActionView:
    actions = policy._predict(obs, deterministic=True)
    return ActionView(actions, [], [], actions)


# What tells a kind of policy, and how it is looked at; the first that fits.
_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[Any, PyTorchObs], ActionView]], ...] = (
    (lambda policy: hasattr(policy, "get_distribution"), _of_actor_critic),
    (lambda policy: hasattr(policy, "online"), _of_values),
    (lambda policy: hasattr(getattr(policy, "actor", None), "get_action_dist_params"), _of_stochastic_actor),
    (lambda policy: True, _of_actions),
)


def action_view(policy: Any, obs: PyTorchObs) -> ActionView:
    """
    Look at what a policy does, under the noise that is active.

    :param policy: Flipout policy
    :param obs: N observations, as tensors
    :return: Outputs, action distributions and preferred actions
    """
    return next(look for fits, look in _KINDS if fits(policy))(policy, obs)


_STACKS: dict[type[Distribution], Callable[[Any], Distribution]] = {
    Categorical: lambda each: Categorical(logits=th.stack([one.logits for one in each]), validate_args=False),
    Bernoulli: lambda each: Bernoulli(logits=th.stack([one.logits for one in each]), validate_args=False),
    Normal: lambda each: Normal(
        th.stack([one.mean for one in each]), th.stack([one.stddev for one in each]), validate_args=False
    ),
}


def stacked(draws: Sequence[Sequence[Distribution]]) -> list[Distribution]:
    """
    Join the distributions of several draws.

    :param draws: For each draw its distributions, (N,)
    :return: The same distributions, (draws, N)
    """
    columns = zip(*draws, strict=True)
    return [next(stack for kind, stack in _STACKS.items() if isinstance(each[0], kind))(each) for each in columns]
