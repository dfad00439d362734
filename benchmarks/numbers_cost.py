"""What does it cost to look for numbers that are not finite, and does a long training grow?

    taskset -c 1 python benchmarks/numbers_cost.py --cost --rounds 3
    python benchmarks/numbers_cost.py --growth           # a million steps of PPO and 200,000 of DQN, half an hour
    python benchmarks/numbers_cost.py --report

Cost: processor time inside the looks of `sb3_flipout.hooks`, over that of the rest of the same training. Growth: resident
memory of the process, and numbers in the noise's own tables, after a tenth of the way and at the end.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch as th
from runs import Row, append, made_with, read, versions_of
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

import sb3_flipout  # noqa: F401  (registers the policies)
from sb3_flipout.hooks import _finite
from sb3_flipout.noise import bases, tables

NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
TASKS: dict[str, tuple[type[BaseAlgorithm], str, int, int, dict[str, Any]]] = {
    "PPO, 8 environments": (PPO, "CartPole-v1", 8, 50_000, {}),
    "A2C, 8 environments": (A2C, "CartPole-v1", 8, 30_000, {}),
    "DQN": (DQN, "CartPole-v1", 1, 20_000, dict(learning_starts=1_000, **NO_EPSILON)),
    "DQN, a gradient step in 16 steps": (DQN, "CartPole-v1", 1, 40_000, dict(train_freq=16, learning_starts=0, **NO_EPSILON)),
    "SAC": (SAC, "Pendulum-v1", 1, 5_000, {}),
}
LONG: dict[str, tuple[type[BaseAlgorithm], int, dict[str, Any]]] = {
    "PPO": (PPO, 1_000_000, dict(n_steps=256, batch_size=256, n_epochs=4)),
    "DQN": (DQN, 200_000, dict(buffer_size=10_000, **NO_EPSILON)),
}


class Clock:
    """Adds up the time inside the functions that look."""

    names = ("check_parameters", "check_rollout", "check_first_observations", "is_finite", "_found")

    def __init__(self) -> None:
        self.inside, self.own = False, {name: getattr(_finite, name) for name in self.names}
        self.seconds, self.calls = 0.0, 0
        nothing = self._timed(lambda: None)
        for _ in range(10_000):
            nothing()
        self.of_the_clock = self.seconds / self.calls  # in each call: asking for the time takes as long as looking
        self.seconds, self.calls = 0.0, 0

    @property
    def inside_looks(self) -> float:
        """Seconds in the functions, without the clock's own."""
        return self.seconds - self.calls * self.of_the_clock

    def __enter__(self) -> Clock:
        for name, function in self.own.items():
            setattr(_finite, name, self._timed(function))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, function in self.own.items():
            setattr(_finite, name, function)

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # one of them calls another
                return function(*args, **kwargs)
            self.inside, start = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start
                self.calls += 1
                self.inside = False

        return timed


def cost(name: str, seed: int) -> float:
    algorithm, env, n_envs, steps, settings = TASKS[name]
    model = algorithm("FlipoutMlpPolicy", make_vec_env(env, n_envs, seed=seed), seed=seed, device="cpu", **settings)
    with Clock() as clock:
        start = time.process_time()
        model.learn(steps)
        seconds = time.process_time() - start
    return clock.inside_looks / (seconds - clock.seconds)


def resident() -> float:
    """MiB of this process."""
    gc.collect()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def in_tables() -> int:
    """Numbers in the tables of the noise, which belong to the process."""
    return sum(t.numel() for t in bases._TABLES.values()) + sum(t.numel() for t, _ in tables._TABLES.values())


class Memory(BaseCallback):
    """Notes memory at tenths of the way."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.found = every, []  # type: ignore[var-annotated]

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.every * (len(self.found) + 1):
            self.found.append((resident(), in_tables()))
        return True


def growth(name: str) -> Row:
    algorithm, steps, settings = LONG[name]
    env = make_vec_env("CartPole-v1", 8 if algorithm is PPO else 1, seed=0)
    kwargs = dict(schedule="constant", learn_sigma=True)
    model = algorithm("FlipoutMlpPolicy", env, seed=0, device="cpu", policy_kwargs=kwargs, **settings)
    memory = Memory(steps // 10)
    model.learn(steps, callback=memory)
    return dict(
        kind="growth",
        task=name,
        steps=steps,
        mebibytes=[round(m, 1) for m, _ in memory.found],
        in_tables=[n for _, n in memory.found],
    )


def report(rows: list[Row]) -> str:
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "cost":
            shares.setdefault(row["task"], []).append(100 * row["share"])
    costs = [f"| {name} | {median(all_):.2f} % [{min(all_):.2f}, {max(all_):.2f}] |" for name, all_ in shares.items()]
    grown = [_grown(row) for row in rows if row["kind"] == "growth"]
    return f"""# Looking for numbers that are not finite, and memory of long trainings

Made by `python benchmarks/numbers_cost.py --report` from [the runs](numbers_cost.jsonl) ({versions_of(rows)}).

Nothing was chosen by these runs: all seeds are shown.

## Cost of the looks

Processor time inside the looks at rewards, observations and parameters, over that of the rest of the same training; median
over rounds, with the smallest and the largest. Default settings of SB3 where nothing is said.

| training | cost |
|---|---:|
{chr(10).join(costs)}

## Memory

Resident memory of the process in MiB, and numbers in the tables of the noise, after a tenth of the training and at its end.
Learned sigma, noise to the last step.

| training | steps | after a tenth | at the end | growth | in tables after a tenth | at the end |
|---|---:|---:|---:|---:|---:|---:|
{chr(10).join(grown)}
"""


def _grown(row: Row) -> str:
    (first, *_, last), tables = row["mebibytes"], row["in_tables"]
    return (
        f"| {row['task']} | {row['steps']:,} | {first:.1f} | {last:.1f} | {100 * (last / first - 1):+.2f} % | {tables[0]:,} | "
        f"{tables[-1]:,} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--report", action="store_true", help="only write the page, next to --out")
    parser.add_argument("--tasks", nargs="+", help="of --growth", choices=LONG, default=list(LONG))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/numbers_cost.jsonl"))
    args = parser.parse_args()
    th.set_num_threads(1)
    for seed in range(args.rounds if args.cost else 0):
        for name in TASKS:
            append(args.out, dict(kind="cost", task=name, seed=seed, share=cost(name, seed), **made_with()))
    for name in args.tasks if args.growth else ():
        append(args.out, {**growth(name), **made_with()})
    args.out.with_suffix(".md").write_text(report(read(args.out)))


if __name__ == "__main__":
    main()
