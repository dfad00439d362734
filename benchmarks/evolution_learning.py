"""Does FlipES learn as well as evolution strategies that draw every member's weights, or one after another?

    python benchmarks/evolution_learning.py --jobs 2
    python benchmarks/evolution_learning.py --tasks CartPole-v1 --arms flipout ARS --seeds 2 --first-seed 0
    python benchmarks/evolution_learning.py --report

Arms: `flipout`; `ideal`, the same with a full draw of each member's weights (Wen et al.'s IdealES,
noise_sharing="independent"); `lowrank` (EGGROLL's rank-one noise); `ARS` of sb3-contrib with rl_zoo3's settings (Swimmer:
Mania et al. 2018). Equal environment steps. Needs `pip install ".[bench,contrib]"`.
"""

from __future__ import annotations

import sys
import time
from itertools import product
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from intervals import difference_interval
from runs import Row, execute, left_of, made_with, options, read, versions_of
from sb3_contrib import ARS
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flipout.evolution import FlipES

CONFIRMING = 100  # seeds below were looked at when settings were chosen
MEMBERS, LEARNING_RATE, SIGMA = 8, 0.05, 0.25
NET: list[int] = []  # a linear policy, as ARS's

TASKS = {
    "CartPole-v1": 200_000,
    "Acrobot-v1": 200_000,
    "Pendulum-v1": 400_000,
    "MountainCarContinuous-v0": 200_000,
    "Swimmer-v5": 500_000,
}
ARMS: dict[str, dict[str, Any]] = {
    "flipout": {},
    "ideal": dict(noise_sharing="independent"),
    "lowrank": dict(family="lowrank"),
}
_SMALL: dict[str, Any] = dict(policy="MlpPolicy", learning_rate=0.018, n_delta=4, n_top=1, zero_policy=False)
_SMALL["policy_kwargs"] = dict(net_arch=[16])
OF_ARS: dict[str, tuple[dict[str, Any], bool]] = {  # and whether observations are normalised
    "CartPole-v1": (dict(policy="LinearPolicy", n_delta=2), False),
    "Acrobot-v1": (dict(_SMALL, delta_std=0.1), True),
    "Pendulum-v1": (dict(_SMALL, delta_std=0.1), True),
    "MountainCarContinuous-v0": (dict(_SMALL, delta_std=0.2), True),
    "Swimmer-v5": (dict(policy="LinearPolicy", n_delta=1, n_top=1, delta_std=0.02, learning_rate=0.02), True),
}


class Run(NamedTuple):
    """One training run."""

    task: str
    arm: str
    seed: int


def train(run: Run) -> Row:
    th.set_num_threads(1)
    model, env = _ars(run) if run.arm == "ARS" else _flipes(run)
    began, wall = time.process_time(), time.perf_counter()
    model.learn(TASKS[run.task])
    cpu, wall = time.process_time() - began, time.perf_counter() - wall
    if isinstance(env, VecNormalize):
        env.training = False
    env.seed(10_000 + run.seed)
    returns, _ = evaluate_policy(model, env, 100, return_episode_rewards=True, warn=False)
    told = dict(score=float(np.mean(returns)), cpu_seconds=round(cpu, 1), seconds=round(wall, 1), steps=model.num_timesteps)
    return dict(**run._asdict(), **told, **made_with())


def _flipes(run: Run) -> tuple[Any, Any]:
    env = VecNormalize(make_vec_env(run.task, MEMBERS, seed=run.seed), norm_reward=False)
    noise = dict(net_arch=NET, sigma_init=SIGMA, **ARMS[run.arm])
    settings: dict[str, Any] = dict(population_size=MEMBERS, learning_rate=LEARNING_RATE, policy_kwargs=noise)
    return FlipES("FlipoutMlpPolicy", env, seed=run.seed, device="cpu", **settings), env


def _ars(run: Run) -> tuple[Any, Any]:
    settings, normalised = OF_ARS[run.task]
    env: Any = make_vec_env(run.task, 1, seed=run.seed)
    env = VecNormalize(env, norm_reward=False) if normalised else env
    return ARS(env=env, seed=run.seed, device="cpu", **settings), env


def report(rows: list[Row]) -> str:
    return f"""# Evolution strategies: equal environment steps

Made by `python benchmarks/evolution_learning.py --report` from [the runs](evolution_learning.jsonl) ({versions_of(rows)}).

One setting for all tasks: {MEMBERS} members in as many environments, antithetic, centred ranks, linear policy on normalised
observations, sigma {SIGMA} / sqrt(fan-in), Adam {LEARNING_RATE}. ARS: rl_zoo3's settings, on Swimmer those of Mania et al.
Score: mean return of the mean weights over 100 episodes at the end. Interval: 95 % bootstrap of the difference of means. Seeds
below {CONFIRMING} were looked at when the setting was chosen.

## Fresh seeds

{table([row for row in rows if row["seed"] >= CONFIRMING])}

## Seeds that the setting was chosen on

{table([row for row in rows if row["seed"] < CONFIRMING])}
"""


def table(rows: list[Row]) -> str:
    lines = [
        "| task | arm | seeds | flipout: mean (worst) | arm: mean (worst) | flipout less arm, 95 % interval | "
        "a loss of 10 % | CPU seconds: flipout, arm |",
        "|---|---|---:|---:|---:|---:|---|---:|",
    ]
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row["task"], row["arm"]), {})[row["seed"]] = row
    for task, arm in product(TASKS, ["ideal", "lowrank", "ARS"]):
        ours, theirs = found.get((task, "flipout"), {}), found.get((task, arm), {})
        seeds = sorted(ours.keys() & theirs.keys())
        if len(seeds) > 1:
            lines.append(_compared(task, arm, *([of[seed] for seed in seeds] for of in (ours, theirs))))
    return "\n".join(lines)


def _compared(task: str, arm: str, ours: list[Row], theirs: list[Row]) -> str:
    scores = [np.array([row["score"] for row in rows]) for rows in (ours, theirs)]
    low, high = difference_interval(*scores)
    excluded = "excluded" if low > -0.1 * abs(scores[1].mean()) else "**not excluded**"
    pair = [f"{score.mean():.1f} ({score.min():.1f})" for score in scores]
    seconds = ", ".join(f"{np.median([row['cpu_seconds'] for row in rows]):.0f}" for rows in (ours, theirs))
    return f"| {task} | {arm} | {len(ours)} | {pair[0]} | {pair[1]} | [{low:.1f}, {high:.1f}] | {excluded} | {seconds} |"


def main() -> int:
    parser = options(__doc__, "docs/benchmarks/evolution_learning.jsonl", 5, CONFIRMING)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "ARS"], default=[*ARMS, "ARS"])
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        return 0
    gym.logger.min_level = gym.logger.ERROR
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [Run(task, arm, seed) for seed, task, arm in product(seeds, args.tasks, args.arms)]
    return execute(train, left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    return f"{row['task']}, {row['arm']}, {row['seed']}: {row['score']:.1f}, {row['cpu_seconds']} s"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
