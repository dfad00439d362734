"""What does MonitorNoise cost a training, at its default period?

    taskset -c 1 python benchmarks/monitor_cost.py --out docs/benchmarks/monitor_cost.md

One process, one torch thread, tensorboard on in both arms. Times are processor times of the process, which other processes
disturb little. Two figures for each task, medians over rounds with the smallest and the largest:

- *by its own clock*: the time inside MonitorNoise, and that of writing its values to tensorboard, over the time of the rest of
  the same training. This is the cost, and it is not blurred by what else moves between two trainings.
- *by whole trainings*: with over without the callback, alternating, from the same seed (so both take the same steps, bit for
  bit).

A short training with the callback goes before: it imports matplotlib, which takes a second, once per process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch as th
from runs import head_of
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import TensorBoardOutputFormat

from sb3_flipout.callbacks import MonitorNoise


@dataclass(frozen=True)
class Task:
    """An algorithm on CartPole-v1."""

    algorithm: type[BaseAlgorithm]
    n_envs: int
    steps: int
    settings: dict[str, Any] = field(default_factory=dict)


NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0, learning_starts=1_000)
TASKS: dict[str, Task] = {
    "PPO, 8 environments": Task(PPO, 8, 49_152),
    "PPO, 8 environments, zoo": Task(
        PPO, 8, 32_768, dict(n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20, learning_rate=1e-3)
    ),
    "DQN": Task(DQN, 1, 20_000, NO_EPSILON),
    "DQN, 10 members with priors": Task(DQN, 1, 20_000, NO_EPSILON | dict(policy_kwargs=dict(members=10, prior_scale=1.0))),
}


class Clock:
    """Adds up the time spent in calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        return timed


class Timed(MonitorNoise):
    """MonitorNoise that counts the time of its hooks, and of writing its values."""

    def _init_callback(self) -> None:
        super()._init_callback()
        self.clock = Clock()
        for name in ("on_training_start", "on_rollout_start", "on_step", "on_rollout_end"):
            setattr(self, name, self.clock.around(getattr(self, name)))

    def _on_training_start(self) -> None:
        super()._on_training_start()
        writer = next(o for o in self.logger.output_formats if isinstance(o, TensorBoardOutputFormat)).writer
        for name in ("add_scalar", "add_histogram", "add_figure"):
            setattr(writer, name, self._if_own(getattr(writer, name)))

    def _if_own(self, write: Any) -> Any:
        timed = self.clock.around(write)
        return lambda tag, *args, **kwargs: (timed if tag.startswith("noise/") else write)(tag, *args, **kwargs)


def train(task: Task, seed: int, callback: MonitorNoise | None, steps: int) -> float:
    """Processor seconds of a training."""
    with tempfile.TemporaryDirectory() as folder:
        env = make_vec_env("CartPole-v1", n_envs=task.n_envs, seed=seed)
        model = task.algorithm("FlipoutMlpPolicy", env, seed=seed, device="cpu", tensorboard_log=folder, **task.settings)
        start = time.process_time()
        model.learn(steps, callback=callback)
        seconds = time.process_time() - start
        model.logger.close()
        env.close()
    return seconds


def measure(name: str, rounds: int, steps: int | None) -> str:
    task = TASKS[name]
    train(task, 0, MonitorNoise(every=1_000), 2_100)
    shares, ratios, counts = [], [], []
    for number in range(rounds):
        callback, seconds = Timed(), {}
        for arm in (None, callback) if number % 2 else (callback, None):
            seconds[arm] = train(task, number, arm, steps or task.steps)
        shares.append(callback.clock.seconds / (seconds[callback] - callback.clock.seconds))
        ratios.append(seconds[callback] / seconds[None])
        counts.append(callback._measurements)
    per_measurement = median(share * seconds[None] for share in shares) / counts[-1]
    return (
        f"| {name} | {(steps or task.steps) / seconds[None]:.0f} | {counts[-1]} | {1000 * per_measurement:.0f} ms | "
        f"{100 * median(shares):.2f} % [{100 * min(shares):.2f}, {100 * max(shares):.2f}] | "
        f"{100 * (median(ratios) - 1):+.1f} % [{100 * (min(ratios) - 1):+.1f}, {100 * (max(ratios) - 1):+.1f}] |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="environment steps of one training; by default those of the task")
    parser.add_argument("--out", type=Path, help="where to write the table, such as docs/benchmarks/monitor_cost.md")
    args = parser.parse_args()
    th.set_num_threads(1)
    head = "| task on CartPole-v1 | steps per second | measurements | each | cost by its own clock | cost by whole trainings |"
    lines = [head, "|---|---:|---:|---:|---:|---:|"]
    print("\n".join(lines), flush=True)
    for name in args.task:
        lines.append(measure(name, args.rounds, args.steps))
        print(lines[-1], flush=True)
    if args.out is not None:
        head = head_of("Cost of MonitorNoise", __doc__, f"{args.rounds} rounds")
        period = f"\nDefault period: `every={MonitorNoise().every}`, a figure at every tenth measurement.\n"
        args.out.write_text("\n".join([head, period, *lines]) + "\n")


if __name__ == "__main__":
    main()
