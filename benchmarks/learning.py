"""What the learning benchmarks share: runs over seeds in processes, a file of results, a table with intervals."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path

import numpy as np
from runs import Row, made_with, versions_of

_NAMES = ("task", "arm", "seed")


def difference_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def mean_difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return float(ours[0] - theirs[0]), float(ours[0] - theirs[0])
    result = bootstrap((ours, theirs), mean_difference, n_resamples=20_000, method="percentile", rng=0)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def mean_interval(scores: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    if np.ptp(scores) == 0:
        return float(scores[0]), float(scores[0])
    found = bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)


def run(
    description: str | None,
    train: Callable[[str, str, int, int], Row],
    tasks: Collection[str],
    arms: Collection[str],
    default_arms: list[str],
    steps: int,
    header: str,
    out: str,
    table: Callable[[list[Row]], str],
) -> None:
    """Read the command line, make the runs that the file does not have, and write the table next to it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=tasks, default=list(tasks))
    parser.add_argument("--arm", nargs="+", choices=arms, default=default_arms)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=100, help="default 100: seeds that nothing was chosen by")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="make runs that the file has already once more")
    parser.add_argument("--out", type=Path, default=Path(out))
    args = parser.parse_args()
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    known = {tuple(row[name] for name in _NAMES) for row in rows if row["steps"] == args.steps and not args.again}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    left = [of_run for of_run in product(args.task, args.arm, seeds) if of_run not in known]
    # Not forked: a process that torch has been used in cannot be forked safely.
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, *of_run, args.steps) for of_run in left]):
            row = {**future.result(), **made_with()}
            print(row, flush=True)
            same = tuple(row[name] for name in _NAMES)
            rows = [other for other in rows if tuple(other[name] for name in _NAMES) != same] + [row]
            rows.sort(key=lambda row: (list(tasks).index(row["task"]), list(arms).index(row["arm"]), row["seed"]))
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(f"{header}Made with {versions_of(rows)}.\n\n{table(rows)}\n")
    print(table(rows))
