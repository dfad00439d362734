"""Do the defaults lose against stock? rl_zoo3's hyperparameters, mean weights, dense tasks, ten fresh seeds.

    python benchmarks/defaults.py --jobs 2                                     # stock and defaults, seeds 100 to 109
    python benchmarks/defaults.py --arms linear@.5 --seeds 3 --first-seed 0    # an arm that the choice was made among
    python benchmarks/defaults.py --report

Each run appends one line to --out as it finishes, and a run that has its line is not made again. Needs
`pip install ".[bench,zoo]" "gymnasium[box2d]"`.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

from runs import Row, execute, read
from zoo_runs import Run, Task, train

CONFIRMING = 100  # seeds from here on; those below had a part in the choice

NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)

TASKS: dict[str, Task] = {
    "PPO CartPole-v1": Task("ppo", "CartPole-v1"),
    "PPO Acrobot-v1": Task("ppo", "Acrobot-v1", 100_000),  # a tenth of rl_zoo3's
    "PPO Pendulum-v1": Task("ppo", "Pendulum-v1"),
    "PPO LunarLander-v3": Task("ppo", "LunarLander-v3", 300_000),  # a third of rl_zoo3's
    "A2C CartPole-v1": Task("a2c", "CartPole-v1"),
    "DQN CartPole-v1": Task("dqn", "CartPole-v1", flipout_changes=NO_EPSILON),
    "DQN MountainCar-v0": Task("dqn", "MountainCar-v0", flipout_changes=NO_EPSILON),
    "DQN LunarLander-v3": Task("dqn", "LunarLander-v3", flipout_changes=NO_EPSILON),
    "SAC Pendulum-v1": Task("sac", "Pendulum-v1"),
    "TD3 Pendulum-v1": Task("td3", "Pendulum-v1", flipout_changes=dict(noise_type=None, noise_std=None)),
}

_LINEAR = dict(schedule="linear")

#: policy_kwargs of the arms with weight noise, and changes of the algorithm's arguments.
ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flipout": ({}, {}),
    "constant": (dict(schedule="constant"), {}),
    "linear@.5": (dict(_LINEAR, schedule_fraction=0.5), {}),
    "linear@.3": (dict(_LINEAR, schedule_fraction=0.3), {}),
    "linear@.3 sigma .25": (dict(_LINEAR, schedule_fraction=0.3, sigma_init=0.25), {}),
    "linear@.5 fixed": (dict(_LINEAR, schedule_fraction=0.5, learn_sigma=False), {}),
    "linear@.3 fixed": (dict(_LINEAR, schedule_fraction=0.3, learn_sigma=False), {}),
    "linear@.3 no gSDE": (dict(_LINEAR, schedule_fraction=0.3), dict(use_sde=False, sde_sample_freq=-1)),
    "mode": (dict(act_by_mode=True), {}),
    "mode linear@.5": (dict(_LINEAR, schedule_fraction=0.5, act_by_mode=True), {}),
    "episode": (dict(resample="episode"), {}),
    "episode linear@.3": (dict(_LINEAR, schedule_fraction=0.3, resample="episode"), {}),
    "members": (dict(members=10, prior_scale=0.35), {}),
}


def make(run: Run) -> Row:
    task = TASKS[run.task]
    if run.arm == "stock":
        return train(task, run, task.changes, {})
    policy_kwargs, changes = ARMS[run.arm]
    policy = dict(policy="FlipoutMlpPolicy")
    return train(task, run, {**task.changes, **task.flipout_changes, **policy, **changes}, policy_kwargs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--arms", nargs="+", choices=["stock", *ARMS], default=["stock", "flipout"], metavar="ARM")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=CONFIRMING)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/defaults.jsonl"))
    args = parser.parse_args()
    done = {Run(row["task"], row["arm"], row["seed"]) for row in read(args.out)}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [Run(task, arm, seed) for seed, task, arm in product(seeds, args.tasks, args.arms)]
    left = [run for run in runs if run not in done]
    return execute(
        make, left, args.out, args.jobs, lambda row: f"{row['task']}, {row['arm']}, {row['seed']}: {row['score']:.1f}"
    )


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
