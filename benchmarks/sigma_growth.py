"""Why does learned sigma grow in PPO with new noise at each step? CartPole-v1, rl_zoo3's hyperparameters, 100,000 steps.

    python benchmarks/sigma_growth.py --jobs 2

Four arms: noise held per step or per episode; advantages as they are, or `shuffled` over the rollout, so that they say nothing
of the actions. Sigma of the hidden layer in units of 1/sqrt(fan-in), started at 0.5: its mean (with sign) grows where learning
pulls all sigmas up; its spread grows where each walks at random, and then the mean of abs(sigma), which is the size of the
noise, grows without anything to gain.
"""

from __future__ import annotations

import math
import sys
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from rl_zoo3.utils import ALGOS
from runs import Row, execute, left_of, options, read, versions_of
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from zoo_runs import Run as ZooRun
from zoo_runs import Task, train

TASK = Task("ppo", "CartPole-v1")


class Run(NamedTuple):
    """One training run."""

    resample: str
    advantages: str
    seed: int


class Shuffling(PPO):
    """PPO whose advantages say nothing of the actions."""

    def train(self) -> None:
        order = np.random.default_rng(self.num_timesteps).permutation(self.rollout_buffer.advantages.size)
        advantages = self.rollout_buffer.advantages
        self.rollout_buffer.advantages = advantages.flatten()[order].reshape(advantages.shape)
        super().train()


class LookAtSigma(BaseCallback):
    """Note sigma of the hidden layer when training ends."""

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        layer: Any = self.model.policy.mlp_extractor.policy_net[2]
        sigma = layer.weight_sigma.detach().numpy() * math.sqrt(layer.in_features)
        self.found = dict(mean=float(sigma.mean()), spread=float(sigma.std()), size=float(np.abs(sigma).mean()))


def make(run: Run) -> Row:
    ALGOS["ppo"] = PPO if run.advantages == "real" else Shuffling
    noise = dict(resample=run.resample, learn_sigma=True, schedule="constant")
    look = LookAtSigma()
    row = train(TASK, ZooRun("PPO CartPole-v1", run.resample, run.seed), dict(policy="FlipoutMlpPolicy"), noise, look)
    return dict(row, **run._asdict(), **look.found)


def table(rows: list[Row]) -> str:
    lines = [
        "| noise held per | advantages | mean sigma | spread | mean abs(sigma) | score |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for resample, advantages in product(("step", "episode"), ("real", "shuffled")):
        found = [row for row in rows if (row["resample"], row["advantages"]) == (resample, advantages)]
        numbers = [np.mean([row[name] for row in found]) for name in ("mean", "spread", "size", "score")]
        lines.append(f"| {resample} | {advantages} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    return f"""# Why learned sigma grows in PPO

Made by `python benchmarks/sigma_growth.py --report` from [the runs](sigma_growth.jsonl) ({versions_of(rows)}): PPO on
CartPole-v1, 100,000 steps, rl_zoo3's hyperparameters, learned sigma, constant noise. Sigma of the hidden layer at the end, in
units of 1/sqrt(fan-in), started at 0.5; `shuffled`: advantages that say nothing of the actions.

Nothing was chosen by these runs: all seeds are shown.

{table(rows)}

The mean with sign stays where it was, and the spread grows, with something to learn or without: each sigma walks at random.
"""


def main() -> int:
    args = options(__doc__, "docs/benchmarks/sigma_growth.jsonl", 3, 0).parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        return 0
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [Run(*case) for case in product(("step", "episode"), ("real", "shuffled"), seeds)]
    return execute(make, left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    return f"{row['resample']}, {row['advantages']}, {row['seed']}: {row['size']:.2f}"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
