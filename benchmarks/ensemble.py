"""What does an ensemble of K = 20 value functions cost as `members=20`, and what as twenty networks?

    taskset -c 1 python benchmarks/ensemble.py --rounds 100 --out docs/benchmarks/ensemble.md

Memory: numbers held by DQN's networks (online, target, and priors where there are any) and by Adam, after one gradient step.
"20 networks" is twenty times SB3's own policy, with twenty frozen networks more as priors. The draws of the base are not
parameters: they are slices of one table, the same for all layers and policies of a process, and its size is given apart. It is
larger than twenty of the small networks: there, flipout saves no memory.

Acting: greedy actions for N environments, each under a member of its own; one process, one torch thread, no gradients. In each
round every arm runs once untimed and then a few times, in shuffled order, on the same observations.

- flipout, held: members stay, as they do within an episode, so their signs are known already
- flipout, drawn: every environment gets a new member at each step, as with `resample="step"`
- batched: `torch.func.vmap` over the weights of each environment, a batched matrix product (a grouped convolution). The N
  copies of the weights are laid out beforehand, and changing members is not timed: the best case
- loop: twenty networks one after the other, each on the rows of its member

Reading: times are medians in milliseconds; ratios are those of medians, and in brackets are the quartiles of the ratios within
rounds. Below 1: flipout is faster.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from runs import head_of
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.dqn.policies import CnnPolicy, DQNPolicy
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from sb3_flipout.noise import RowNoise
from sb3_flipout.noise.bases import _TABLES
from sb3_flipout.policies import FlipoutDQNCnnPolicy, FlipoutDQNPolicy

K, PRIOR_SCALE = 20, 3.0
Act = Callable[[], th.Tensor]  # gives greedy actions

VECTOR, IMAGE = spaces.Box(-1, 1, (8,), np.float32), spaces.Box(0, 255, (4, 84, 84), np.uint8)


@dataclass(frozen=True)
class Network:
    """A network of DQN's, by stock SB3 and by flipout."""

    observations: spaces.Box
    n_actions: int
    policies: tuple[type[DQNPolicy], type[FlipoutDQNPolicy]]
    policy_kwargs: dict[str, Any]

    def stock(self) -> DQNPolicy:
        return self.policies[0](self.observations, spaces.Discrete(self.n_actions), lambda _: 1e-3, **self.policy_kwargs)

    def flipout(self, prior_scale: float) -> FlipoutDQNPolicy:
        kwargs = dict(self.policy_kwargs, members=K, prior_scale=prior_scale)
        return self.policies[1](self.observations, spaces.Discrete(self.n_actions), lambda _: 1e-3, **kwargs)

    def sample(self, n: int) -> th.Tensor:
        self.observations.seed(0)
        return th.as_tensor(np.stack([self.observations.sample() for _ in range(n)]))


NETWORKS: dict[str, Network] = {
    "MLP 64-64": Network(VECTOR, 4, (DQNPolicy, FlipoutDQNPolicy), dict(net_arch=[64, 64])),
    "MLP 256-256": Network(VECTOR, 4, (DQNPolicy, FlipoutDQNPolicy), dict(net_arch=[256, 256])),
    "NatureCNN": Network(IMAGE, 6, (CnnPolicy, FlipoutDQNCnnPolicy), {}),
}


# ---- memory ---------------------------------------------------------------------------------------------------------


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def adam_numbers(policy: DQNPolicy, values: th.Tensor) -> int:
    """Numbers that the optimizer holds after a gradient step; its step counters are left out."""
    values.square().mean().backward()
    policy.optimizer.step()
    states = policy.optimizer.state.values()
    return sum(value.numel() for state in states for name, value in state.items() if name.startswith("exp_avg"))


def memory(network: Network, prior_scale: float) -> tuple[tuple[int, int], tuple[int, int]]:
    """Numbers held by the networks and by Adam: of flipout, and of twenty networks."""
    obs = network.sample(K)
    ours, stock = network.flipout(prior_scale), network.stock()
    with ours.online.perturbed_network.activate(RowNoise(th.arange(K))):
        own_adam = adam_numbers(ours, ours.online(obs))
    priors = numbers(stock.q_net) if prior_scale else 0
    theirs = (K * (numbers(stock) + priors), K * adam_numbers(stock, stock.q_net(obs)))
    return (numbers(ours), own_adam), theirs


def memory_rows(name: str) -> list[str]:
    lines = []
    for prior_scale in (0.0, PRIOR_SCALE):
        (own, own_adam), (their, their_adam) = memory(NETWORKS[name], prior_scale)
        ratios = f"{own / their:.3f} | {own_adam / their_adam:.3f} | {(own + own_adam) / (their + their_adam):.3f}"
        with_priors = "yes" if prior_scale else "no"
        lines.append(f"| {name} | {with_priors} | {own:,} | {own_adam:,} | {their:,} | {their_adam:,} | {ratios} |")
    return lines


# ---- acting ---------------------------------------------------------------------------------------------------------


def plain(policy: DQNPolicy) -> nn.Module:
    """A stock network without SB3's wrapping, which costs time."""
    net = policy.q_net if isinstance(policy, DQNPolicy) else policy
    return nn.Sequential(net.features_extractor, net.q_net)


def flipout_arms(network: Network, prior_scale: float, obs: th.Tensor, members: th.Tensor) -> dict[str, Act]:
    policy = network.flipout(prior_scale)
    held, scale = RowNoise(members), th.ones(len(members))

    def act(noise: RowNoise) -> th.Tensor:
        with policy.online.perturbed_network.activate(noise):
            return policy.online(obs).argmax(dim=1)

    def drawn() -> th.Tensor:
        return act(RowNoise(th.randint(K, members.shape), scale))

    expected = policy.member_values(obs)[members, th.arange(len(members))].argmax(dim=1)
    assert th.equal(act(held), expected), "every row acts by its own member"
    return {"held": lambda: act(held), "drawn": drawn}


def network_arms(network: Network, prior_scale: float, obs: th.Tensor, members: th.Tensor) -> dict[str, Act]:
    ensembles = [([plain(network.stock()) for _ in range(K)], 1.0)]
    if prior_scale:
        ensembles.append(([plain(network.stock()) for _ in range(K)], prior_scale))
    inputs = lambda: preprocess_obs(obs, network.observations)  # noqa: E731
    rows = [(int(member), (members == member).nonzero().flatten()) for member in members.unique()]
    laid_out = [(_weights_of_rows(nets, members), scale) for nets, scale in ensembles]
    shell = ensembles[0][0][0]

    def one(weights: dict[str, th.Tensor], row: th.Tensor) -> th.Tensor:
        return functional_call(shell, weights, (row[None],))[0]

    over_rows = vmap(one)

    def batched() -> th.Tensor:
        x = inputs()
        return sum(scale * over_rows(weights, x) for weights, scale in laid_out).argmax(dim=1)

    def loop() -> th.Tensor:
        x, values = inputs(), th.empty(len(obs), network.n_actions)
        for member, index in rows:
            values[index] = sum(scale * nets[member](x[index]) for nets, scale in ensembles)
        return values.argmax(dim=1)

    assert th.equal(batched(), loop()), "both give the same actions"
    return {"batched": batched, "loop": loop}


def _weights_of_rows(nets: list[nn.Module], members: th.Tensor) -> dict[str, th.Tensor]:
    stacked, _ = stack_module_state(nets)
    return {name: weights.detach()[members] for name, weights in stacked.items()}


def milliseconds(act: Act, passes: int) -> float:
    act()
    start = time.perf_counter()
    for _ in range(passes):
        act()
    return (time.perf_counter() - start) / passes * 1000


@th.no_grad()
def acting(network: Network, prior_scale: float, n_envs: int, rounds: int) -> dict[str, list[float]]:
    th.manual_seed(0)
    obs, members = network.sample(n_envs), th.randint(K, (n_envs,))
    arms = flipout_arms(network, prior_scale, obs, members) | network_arms(network, prior_scale, obs, members)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    order, shuffle = list(arms), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for arm in order:
            times[arm].append(milliseconds(arms[arm], 1 if network.observations is IMAGE else 20))
    return times


def acting_rows(name: str, rounds: int) -> list[str]:
    lines = []
    for n_envs in (8, 64):
        for prior_scale in (0.0, PRIOR_SCALE):
            times = acting(NETWORKS[name], prior_scale, n_envs, rounds)
            cells = [f"{median(own):.3f}" for own in times.values()]
            cells += [_ratio(times[own], times[their]) for own in ("held", "drawn") for their in ("batched", "loop")]
            lines.append(f"| {name} | {n_envs} | {'yes' if prior_scale else 'no'} | {' | '.join(cells)} |")
    return lines


def _ratio(own: list[float], their: list[float]) -> str:
    low, _, high = quantiles([ours / theirs for ours, theirs in zip(own, their, strict=True)], n=4)
    return f"{median(own) / median(their):.2f} [{low:.2f}, {high:.2f}]"


# ---- report ---------------------------------------------------------------------------------------------------------

MEMORY_HEADER = [
    "| network | priors | flipout: networks | Adam | 20 networks: networks | Adam | ratio, networks | Adam | together |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|",
]
ACTING_HEADER = [
    "| network | N | priors | flipout, held | drawn | batched | loop "
    "| held / batched | held / loop | drawn / batched | drawn / loop |",
    "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
]


def report(names: list[str], rounds: int) -> list[str]:
    sizes = [line for name in names for line in memory_rows(name)]
    table = sum(numbers.numel() for numbers in _TABLES.values())
    note = f"The table of the base draws, once for the process: {table:,} numbers, {table * 4 / 2**20:.0f} MiB."
    times = [line for name in names for line in acting_rows(name, rounds)]
    return ["## Memory, in numbers", "", *MEMORY_HEADER, *sizes, "", note, "", "## Acting, in ms", "", *ACTING_HEADER, *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, help="where to write the tables, such as docs/benchmarks/ensemble.md")
    args = parser.parse_args()
    th.set_num_threads(1)
    lines = report(args.network, args.rounds)
    print("\n".join(lines))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join([head_of("An ensemble of twenty", __doc__, f"{args.rounds} rounds"), *lines]) + "\n")


if __name__ == "__main__":
    main()
