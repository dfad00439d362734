"""Which DQN explores? Chain, DeepSea, MountainCar and MinAtar; epsilon-greedy and NoisyNet against flipout and members.

    python benchmarks/exploration.py --quick --jobs 2                        # within 20 minutes on two cores
    python benchmarks/exploration.py --tasks chain-30 deep-sea-20 --arms epsilon members --n-envs 1 8 --seeds 5 --jobs 2
    python benchmarks/exploration.py --list                                  # all runs: done, left, core-hours left
    python benchmarks/exploration.py --report                                # table and figure from the runs so far

Each run appends one line to --out as it finishes, and a run that has its line is not made again, so the command can be stopped
and repeated. Change a setting in exploration_tasks.py, and the runs it concerns count as left again. Runs with other --cap
are other runs.

How to read the table: training stops once more than 90 of the last 100 training episodes reach the goal, or at the cap of
episodes. "Solved" asks for the former *and* that the mean weights (with members: their vote) reach the goal afterwards, in one
episode of the same mapping (MountainCar: in more than 90 % of 30 episodes). Episodes to solve are the median over seeds, where
a run that is not solved counts as more than the cap: >2000. MinAtar has no goal: its score is the mean return of the mean
weights over 30 episodes after 300,000 steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import runs as runs_file
from exploration_tasks import ARMS, TASKS, Run, settings
from exploration_training import Row, train

QUICK: dict[str, Any] = dict(
    tasks=["chain-20", "chain-30", "deep-sea-6", "deep-sea-10"],
    arms=["epsilon", "noisynet-step", "flipout-step", "members"],
    n_envs=[1],
    seeds=2,
    cap=500,
)
FULL: dict[str, Any] = dict(tasks=list(TASKS), arms=list(ARMS), n_envs=[1, 8], seeds=5, cap=None)


# ---- the file of runs -----------------------------------------------------------------------------------------------


def key(row: Row) -> Run:
    return Run(*(row[name] for name in Run._fields))


def read(path: Path) -> dict[Run, Row]:
    """Read the runs, of each the newest."""
    return {key(row): row for row in runs_file.read(path)}


def is_done(run: Run, rows: dict[Run, Row]) -> bool:
    # Through JSON, as the file was: what it cannot tell apart is no difference.
    return run in rows and rows[run]["settings"] == json.loads(json.dumps(settings(run)))


# ---- many runs ------------------------------------------------------------------------------------------------------


def all_runs(
    tasks: list[str], arms: list[str], n_envs: list[int], seeds: int, cap: int | None, first_seed: int = 0
) -> list[Run]:
    """Give the runs seed by seed, so that a benchmark stopped half-way has the same seeds in all arms."""
    cases = product(range(first_seed, first_seed + seeds), tasks, n_envs, arms)
    return [Run(t, arm, n, seed, cap or TASKS[t].cap) for seed, t, n, arm in cases if n in TASKS[t].n_envs]


def execute(runs: list[Run], out: Path, jobs: int) -> int:
    """Make the runs that are left; give how many failed."""
    rows = read(out)
    left = [run for run in runs if not is_done(run, rows)]
    for task in {run.task for run in left}:
        TASKS[task].make(0).close()  # a package that is missing is told now, not after hours
    print(f"{len(runs) - len(left)} runs are done already, {len(left)} are left.")
    return runs_file.execute(train, left, out, jobs, brief)


def brief(row: Row) -> str:
    return f"{row['task']} {row['arm']} {row['seed']}: {row['solved_episode'] or row['evaluation_return']}"


def seconds(run: Run, rows: dict[Run, Row]) -> float:
    """Guess what a run costs: what its like did cost, of the same arm if there are, else steps times a guess per step."""
    of_cell = [row for other, row in rows.items() if (other.task, other.n_envs, other.cap) == (run.task, run.n_envs, run.cap)]
    of_arm = [row for row in of_cell if row["arm"] == run.arm]
    if of_cell:
        return float(np.mean([row["cpu_seconds"] for row in of_arm or of_cell]))
    return TASKS[run.task].total_steps(run) * TASKS[run.task].seconds_per_step


def listing(runs: list[Run], rows: dict[Run, Row]) -> str:
    done, hours, cells = Counter[Any](), Counter[Any](), Counter[Any]()
    for run in runs:
        cell = (run.task, run.n_envs, run.cap, run.arm)
        cells[cell] += 1
        if is_done(run, rows):
            done[cell] += 1
        else:
            hours[cell] += seconds(run, rows) / 3600
    lines = [f"{'task':18}{'envs':>5}{'cap':>7}  {'arm':28}{'done':>5}{'left':>5}{'core-hours left':>17}"]
    for cell, n in cells.items():
        task, n_envs, cap, arm = cell
        lines.append(f"{task:18}{n_envs:>5}{cap or '-':>7}  {arm:28}{done[cell]:>5}{n - done[cell]:>5}{hours[cell]:>17.2f}")
    total, left = done.total(), len(runs) - done.total()
    lines.append(f"total: {total} done, {left} left, about {hours.total():.1f} core-hours (those not timed yet: to their cap)")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"default all: {', '.join(TASKS)}")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"default all: {', '.join(ARMS)}")
    parser.add_argument("--n-envs", nargs="+", type=int, choices=(1, 8), help="default both, where a task has both")
    parser.add_argument("--seeds", type=int, help="how many, default 5")
    parser.add_argument("--first-seed", type=int, default=0, help="default 0")
    parser.add_argument("--cap", type=int, metavar="EPISODES", help="default: the task's own")
    parser.add_argument("--jobs", type=int, default=1, help="processes, default 1")
    parser.add_argument("--quick", action="store_true", help=f"defaults for a first look: {QUICK}")
    parser.add_argument("--list", action="store_true", help="print the runs and what is left of them, and make none")
    parser.add_argument("--report", action="store_true", help="only write table and figure, next to --out")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/exploration.jsonl"))
    args = parser.parse_args(argv)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("seeds", "jobs", "cap"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.report:
        from exploration_report import write_report

        print(write_report(list(read(args.out).values()), args.out))
        return 0
    runs = all_runs(args.tasks, args.arms, args.n_envs, args.seeds, args.cap, args.first_seed)
    if args.list:
        print(listing(runs, read(args.out)))
        return 0
    failed = execute(runs, args.out, args.jobs)
    print(f"Table and figure: python benchmarks/exploration.py --report --out {args.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
