"""Bootstrapped DQN with K networks and priors, and HyperAgent's linear index head, written plainly: what members are held to.

One loop serves both. An agent says its values under J indices at once: an ensemble under all its K networks, an index head
under J points drawn on the unit sphere. Settings are those that the arms of ``deep_sea.py`` have.

Sources: Osband et al. 2016 and 2018 (bootstrapped DQN, randomized prior functions), Li et al. 2024 (HyperAgent).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_flipout.layers import OneHotLinear

UNITS = 50


def network(states: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(OneHotLinear(states, UNITS), nn.ReLU(), nn.Linear(UNITS, UNITS), nn.ReLU(), nn.Linear(UNITS, outputs))


def prior_network(states: int, outputs: int) -> nn.Sequential:
    """Give a frozen random function: weights N(0, 1/fan_in), biases 0, the law of the members' priors."""
    net = network(states, outputs).requires_grad_(False)
    for layer in net[::2]:
        fan_in = states if isinstance(layer, OneHotLinear) else layer.weight.shape[1]
        nn.init.normal_(layer.weight, std=fan_in**-0.5)
        nn.init.zeros_(layer.bias)
    return net


class Agent(nn.Module, ABC):
    """Values under several indices, with a prior in units of its root mean square over the first batch."""

    def __init__(self, prior_scale: float) -> None:
        super().__init__()
        self.prior_scale, self.unit = prior_scale, None

    @abstractmethod
    def learned(self, obs: th.Tensor, indices: th.Tensor) -> th.Tensor:
        """Give what is learned, shape (B, J, actions)."""

    @abstractmethod
    def prior(self, obs: th.Tensor, indices: th.Tensor) -> th.Tensor:
        """Give what is not, shape (B, J, actions)."""

    @abstractmethod
    def draw(self, n: int | None) -> th.Tensor:
        """Draw one index to act under (``None``), or those to learn under in a gradient step."""

    def values(self, obs: th.Tensor, indices: th.Tensor) -> th.Tensor:
        with th.no_grad():
            prior = self.prior(obs, indices)
            if self.unit is None and len(obs) > 1:
                self.unit = prior.square().mean().sqrt()
        return self.learned(obs, indices) + self.prior_scale * (prior if self.unit is None else prior / self.unit)


class Ensemble(Agent):
    """K networks, each with a prior network; an index is the number of one."""

    def __init__(self, states: int, actions: int, members: int, prior_scale: float) -> None:
        super().__init__(prior_scale)
        self.members = members
        self.nets = nn.ModuleList(network(states, actions) for _ in range(members))
        self.priors = nn.ModuleList(prior_network(states, actions) for _ in range(members))

    def learned(self, obs: th.Tensor, indices: th.Tensor) -> th.Tensor:
        return th.stack([self.nets[k](obs) for k in indices.tolist()], dim=1)

    def prior(self, obs: th.Tensor, indices: th.Tensor) -> th.Tensor:
        return th.stack([self.priors[k](obs) for k in indices.tolist()], dim=1)

    def draw(self, n: int | None) -> th.Tensor:
        return th.arange(self.members) if n is not None else th.randint(self.members, (1,))


class IndexHead(Agent):
    """One trunk, and a last layer ``W x + sum_m xi_m dW_m x``; an index is a point on the unit sphere in R^dimensions."""

    def __init__(self, states: int, actions: int, prior_scale: float, dimensions: int = 4) -> None:
        super().__init__(prior_scale)
        self.actions, self.dimensions = actions, dimensions
        self.net = network(states, actions * (1 + dimensions))
        self.prior_net = prior_network(states, actions * dimensions)

    def learned(self, obs: th.Tensor, indices: th.Tensor) -> th.Tensor:
        outputs = self.net(obs).view(len(obs), 1 + self.dimensions, self.actions)
        return outputs[:, :1] + th.einsum("jm,bma->bja", indices, outputs[:, 1:])

    def prior(self, obs: th.Tensor, indices: th.Tensor) -> th.Tensor:
        outputs = self.prior_net(obs).view(len(obs), self.dimensions, self.actions)
        return th.einsum("jm,bma->bja", indices, outputs)

    def draw(self, n: int | None) -> th.Tensor:
        return nn.functional.normalize(th.randn(n or 1, self.dimensions), dim=1)


def learn(
    agent: Agent,
    env: Any,
    seed: int,
    steps: int,
    finished: Callable[[bool], bool],
    batch: int,
    keys: int,
    gradient_steps: int = 1,
    learning_rate: float = 1e-3,
    target_interval: int = 4,
    learning_starts: int = 100,
    gamma: float = 0.99,
) -> int:
    """Learn until ``finished``, which is told after each episode whether it was good, or for ``steps``; give the steps."""
    generator, target = np.random.default_rng(seed), copy.deepcopy(agent)
    optimizer = th.optim.Adam([p for p in agent.parameters() if p.requires_grad], learning_rate)
    stored: tuple[np.ndarray, ...] = tuple(
        np.zeros(steps, dtype) for dtype in (np.int64, np.int64, np.float32, np.float32, np.int64)
    )
    (obs, _), index = env.reset(seed=seed), agent.draw(None)
    for step in range(steps):
        with th.no_grad():
            action = int(agent.values(th.tensor([int(obs)]), index)[0, 0].argmax())
        if step < learning_starts:  # as SB3 does
            action = int(generator.integers(env.action_space.n))
        then, reward, terminated, _, info = env.step(action)
        for array, value in zip(stored, (obs, action, reward, terminated, then), strict=True):
            array[step] = value
        obs = then
        if step >= learning_starts:
            for _ in range(gradient_steps):
                rows = generator.integers(step + 1, size=batch)
                _update(agent, target, optimizer, [th.from_numpy(array[rows]) for array in stored], keys, gamma)
        if step % target_interval == 0:
            target.load_state_dict(agent.state_dict())
            target.unit = agent.unit
        if terminated:
            if finished(info["reached_goal"]):
                return step + 1
            (obs, _), index = env.reset(), agent.draw(None)
    return steps


def _update(agent: Agent, target: Agent, optimizer: Any, batch: list[th.Tensor], keys: int, gamma: float) -> None:
    obs, actions, rewards, dones, then = batch
    indices = agent.draw(keys)
    values = agent.values(obs, indices)
    target.unit = agent.unit  # one prior for both, measured once
    with th.no_grad():
        best = target.values(then, indices).amax(dim=2)
        goal = rewards[:, None] + (1 - dones[:, None]) * gamma * best
    chosen = values.gather(2, actions[:, None, None].expand(-1, values.shape[1], 1))[:, :, 0]
    loss = nn.functional.smooth_l1_loss(chosen, goal)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), 10)
    optimizer.step()


def vote(agent: Agent, obs: th.Tensor, keys: int) -> th.Tensor:
    """Give the action that most indices prefer."""
    with th.no_grad():
        chosen = agent.values(obs, agent.draw(keys)).argmax(dim=2)
    return chosen.mode(dim=1).values
