"""What a policy does without chance, as modules of tensors alone: what can be traced and exported.

Each is the plain policy with the mean weights; the vote is that of K plain networks with the members' weights. No noise is in
them, and none of torch's distributions, whose checks cannot be traced.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from torch import nn

from sb3_flipout.layers import FlipoutLayer, restore


class Graph(nn.Module, ABC):
    """
    From observations to the actions that ``predict(deterministic=True)`` gives.

    :param policy: Plain policy
    """

    #: Names of what goes in beside the observations, and of what comes out beside the actions.
    states: tuple[str, ...] = ()

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        space = policy.action_space
        if isinstance(space, spaces.Box):
            self.register_buffer("low", th.as_tensor(space.low))
            self.register_buffer("high", th.as_tensor(space.high))
        self.names = list(policy.observation_space.spaces) if isinstance(policy.observation_space, spaces.Dict) else None

    def forward(self, *given: th.Tensor) -> Any:
        """
        Compute actions.

        :param given: Observations: one tensor, or one for each name of a dictionary; then states, where there are
        :return: Actions, and states, where there are
        """
        count = 1 if self.names is None else len(self.names)
        obs: Any = given[0] if self.names is None else dict(zip(self.names, given[:count], strict=True))
        return self.answer(obs, given[count:])

    def answer(self, obs: Any, states: Sequence[th.Tensor]) -> Any:
        """
        Compute the actions of observations.

        :param obs: Observations, as the policy takes them
        :param states: States
        :return: Actions, and states, where there are
        """
        return self.in_space(self.act(obs))

    @abstractmethod
    def act(self, obs: Any) -> th.Tensor:
        """
        Compute actions as the network has them.

        :param obs: Observations
        :return: Actions, before they are scaled or clipped
        """

    def in_space(self, actions: th.Tensor) -> th.Tensor:
        """
        Bring actions into the action space, as ``predict`` does.

        :param actions: Actions of the network
        :return: Actions of the environment
        """
        space = self.policy.action_space
        if not isinstance(space, spaces.Box):
            return actions
        actions = actions.reshape(-1, *space.shape)
        if self.policy.squash_output:
            return self.low + 0.5 * (actions + 1.0) * (self.high - self.low)  # type: ignore[operator]
        return th.clamp(actions, self.low, self.high)  # type: ignore[arg-type]


class ActorCriticGraph(Graph):
    """PPO and its kin: the most likely action."""

    def act(self, obs: Any) -> th.Tensor:
        """
        Compute the most likely action.

        :param obs: Observations
        :return: Actions
        """
        policy = self.policy
        extractor = policy.features_extractor if policy.share_features_extractor else policy.pi_features_extractor
        return self.mode(policy.mlp_extractor.forward_actor(_features(policy, obs, extractor)))

    def mode(self, latent: th.Tensor) -> th.Tensor:
        """
        Compute the mode of the action distribution.

        :param latent: Last features of the actor
        :return: Actions
        """
        found, space = self.policy.action_net(latent), self.policy.action_space
        if isinstance(space, spaces.Discrete):
            return found.argmax(dim=1)
        if isinstance(space, spaces.MultiDiscrete):
            return th.stack([part.argmax(dim=1) for part in found.split(space.nvec.tolist(), dim=1)], dim=1)
        if isinstance(space, spaces.MultiBinary):
            return (th.sigmoid(found) > 0.5).to(found.dtype)
        return th.tanh(found) if self.policy.squash_output else found  # squashed: by gSDE alone


class RecurrentGraph(ActorCriticGraph):
    """RecurrentPPO: one step; hidden and cell state go in and come out, ``episode_start`` says where they begin anew."""

    states = ("hidden", "cell", "episode_start")

    def answer(self, obs: Any, states: Sequence[th.Tensor]) -> Any:
        """
        Compute one step.

        :param obs: Observations
        :param states: Hidden and cell state, shape (layers, N, units), and 1 where an episode begins, shape (N,)
        :return: Actions, hidden and cell state
        """
        hidden, cell, start = states
        policy, keep = self.policy, (1.0 - start).view(1, -1, 1)
        features = _features(policy, obs, policy.pi_features_extractor)
        latent, (hidden, cell) = policy.lstm_actor(features.unsqueeze(0), (keep * hidden, keep * cell))
        actions = self.mode(policy.mlp_extractor.forward_actor(latent.squeeze(0)))
        return self.in_space(actions), hidden, cell


class ActorGraph(Graph):
    """SAC, TD3 and their kin."""

    def act(self, obs: Any) -> th.Tensor:
        """
        Compute the most likely action.

        :param obs: Observations
        :return: Actions in [-1, 1]
        """
        actor = self.policy.actor
        if hasattr(actor, "get_action_dist_params"):
            return th.tanh(actor.get_action_dist_params(obs)[0])
        found: th.Tensor = actor(obs)
        return found


class ValueGraph(Graph):
    """DQN and QRDQN: the action of the largest value."""

    def act(self, obs: Any) -> th.Tensor:
        """
        Compute the best action.

        :param obs: Observations
        :return: Actions
        """
        net = self.policy.q_net if hasattr(self.policy, "q_net") else self.policy.quantile_net
        return _values(net, obs).argmax(dim=1)


class NetworkGraph(Graph):
    """
    FlipES: what its network says, under the mean weights.

    :param policy: Flipout policy
    """

    def __init__(self, policy: Any) -> None:
        super().__init__(restore(copy.deepcopy(policy)))
        self.policy.set_training_mode(False)

    def act(self, obs: Any) -> th.Tensor:
        """
        Compute the best action.

        :param obs: Observations
        :return: Actions
        """
        policy, space = self.policy, self.policy.action_space
        found = policy.action_net(_features(policy, obs, policy.features_extractor))
        if isinstance(space, spaces.Discrete):
            best: th.Tensor = found.argmax(dim=1) + int(space.start)
            return best
        return found.view(-1, *space.shape)


class VoteGraph(Graph):
    """
    DQN and QRDQN with members: the action that most of them prefer; among equals, the one with the larger mean value.

    :param policy: Flipout policy
    """

    def __init__(self, policy: Any) -> None:
        super().__init__(policy.to_plain_policy())
        self.policy.set_training_mode(False)
        members = range(policy.noise_settings.members)
        self.members = nn.ModuleList([_member(policy, policy.online, k) for k in members])
        prior = policy.online.prior
        self.priors = nn.ModuleList(
            [] if prior is None else [_member(policy, prior[0].network, k, at_scale_1=True) for k in members]
        )
        self.weight = 0.0
        if prior is not None:
            unit = float(prior[0].unit)
            self.weight = float(prior[1]) * float(policy.effective_scale) / (unit if math.isfinite(unit) else 1.0)

    def act(self, obs: Any) -> th.Tensor:
        """
        Let the members vote.

        :param obs: Observations
        :return: Actions
        """
        values = th.stack([_values(net, obs) for net in self.members])
        if len(self.priors):
            values = values + self.weight * th.stack([_values(net, obs) for net in self.priors])
        count = values.shape[2]
        votes = nn.functional.one_hot(values.argmax(dim=2), count).sum(dim=0)
        mean = values.mean(dim=0)
        # The rank of each mean value: how many are smaller, or as large and before it.
        earlier = th.ones(count, count, dtype=th.bool, device=mean.device).triu(1).T
        smaller = (mean[:, None, :] < mean[:, :, None]) | ((mean[:, None, :] == mean[:, :, None]) & earlier)
        return (votes * count + smaller.sum(dim=2)).argmax(dim=1)


def _features(policy: Any, obs: Any, extractor: Any) -> th.Tensor:
    found: th.Tensor = BaseModel.extract_features(policy, obs, extractor)
    return found


def _values(net: Any, obs: Any) -> th.Tensor:
    found: th.Tensor = net(obs)
    return found.mean(dim=1) if found.dim() == 3 else found


def _member(policy: Any, network: nn.Module, member: int, at_scale_1: bool = False) -> nn.Module:
    """A plain network with the weights of one member."""
    weights = dict(network.state_dict())
    scale = 1.0 if at_scale_1 else float(policy.effective_scale)
    for name, layer in network.named_modules():
        if isinstance(layer, FlipoutLayer):
            key, c = (th.tensor([value], device=layer.like.device) for value in (member, scale))
            for block in layer.blocks:
                pair = layer.row_weights(key, c, block)
                for own, value in zip((block.weight, block.bias), pair, strict=True):
                    if own is not None and value is not None:
                        weights[f"{name}.{own}"] = value[0].detach()
    plain_policy = policy.to_plain_policy()
    net: Any = plain_policy.q_net if hasattr(plain_policy, "q_net") else plain_policy.quantile_net
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    net.eval()
    return net
