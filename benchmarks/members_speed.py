"""What does a gradient step of DQN with members cost? Over stock's, and over a batch of as many rows without members.

    taskset -c 1 python benchmarks/members_speed.py --rounds 30 --out docs/benchmarks/members_speed.md

One process, one torch thread; in each round every arm makes a few gradient steps, in shuffled order; process time. A batch
holds B transitions. Where members learn all of each (M = K = 10), it has B * K rows, and so have the arms that it is held
against:

- stock, B: SB3's DQN on B rows; B * K: on as many rows as all members together
- flipout: weight noise without members on B * K rows, each a transition and a key of its own
- members, M = 1: B rows, each under one member; M = K: each transition under all members

Stock is given the fused Adam that the flipout policies use. Reading: ratios are those of medians.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from ensemble import NETWORKS, Network
from runs import head_of
from stable_baselines3 import DQN
from stable_baselines3.common.logger import Logger

import sb3_flipout  # noqa: F401  (registers the policies)

K = 10
TRANSITIONS = {"MLP 64-64": 64, "MLP 256-256": 64, "NatureCNN": 32}
_MEMBERS: dict[str, Any] = dict(members=K)
_ALIKE: dict[str, Any] = dict(learn_sigma=True, schedule="constant")  # as members have it
_ALL: dict[str, Any] = dict(members=K, keys_per_transition=K)

#: Name -> (whether weights are perturbed, rows per transition, policy_kwargs).
ARMS: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "stock, B": (False, 1, {}),
    "stock, B * K": (False, K, {}),
    "flipout, B": (True, 1, _ALIKE),
    "flipout, B * K": (True, K, _ALIKE),
    "members, M = 1": (True, 1, _MEMBERS),
    "members, M = 1, prior": (True, 1, dict(_MEMBERS, prior_scale=0.35)),
    "members, M = K": (True, K, _ALL),
    "members, M = K, prior": (True, K, dict(_ALL, prior_scale=0.35)),
}


class Random(gym.Env[np.ndarray, np.int64]):
    """Random observations, to fill a buffer with."""

    def __init__(self, network: Network) -> None:
        self.observation_space, self.action_space = network.observations, gym.spaces.Discrete(network.n_actions)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(self.np_random.normal()), bool(self.np_random.random() < 0.05), False, {}


def build(name: str, arm: str) -> DQN:
    network, (perturbed, rows, noise) = NETWORKS[name], ARMS[arm]
    kind = "CnnPolicy" if name == "NatureCNN" else "MlpPolicy"
    kwargs: dict[str, Any] = {**network.policy_kwargs, **noise}
    if not perturbed:
        kwargs["optimizer_kwargs"] = dict(fused=True)
    model = DQN(
        f"Flipout{kind}" if perturbed else kind,
        Random(network),
        policy_kwargs=kwargs,
        batch_size=TRANSITIONS[name] * rows,
        buffer_size=1000,
        learning_starts=500,
        exploration_initial_eps=0.0,
        exploration_final_eps=0.0,
        seed=0,
        device="cpu",
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model.learn(501)


def measured(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds per gradient step, by arm."""
    models = {arm: build(name, arm) for arm in ARMS}
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    steps = 1 if name == "NatureCNN" else 5
    order, generator = list(ARMS), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for arm in order:
            begun = time.process_time()
            models[arm].train(steps, models[arm].batch_size)
            found[arm].append((time.process_time() - begun) / steps * 1e3)
    return {arm: median(times) for arm, times in found.items()}


def table(rounds: int) -> list[str]:
    lines = [
        "| network | B | arm | ms | over stock, B | over stock, B * K | over flipout, B * K |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for name in TRANSITIONS:
        found = measured(name, rounds)
        for arm, ms in found.items():
            ratios = " | ".join(f"{ms / found[other]:.2f}" for other in ("stock, B", "stock, B * K", "flipout, B * K"))
            lines.append(f"| {name} | {TRANSITIONS[name]} | {arm} | {ms:.2f} | {ratios} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/members_speed.md"))
    args = parser.parse_args()
    th.set_num_threads(1)
    text = [head_of("A gradient step with members", __doc__).strip(), "\n".join(table(args.rounds))]
    args.out.write_text("\n\n".join(text) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    sys.exit(main())
