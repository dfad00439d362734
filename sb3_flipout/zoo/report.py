"""Table and picture of a benchmark, from its folders, with rliable's intervals (Agarwal et al. 2021)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rliable import library, metrics

ARMS = ("flipout", "stock")
_COLOURS = {"flipout": "tab:blue", "stock": "tab:gray"}
_REPETITIONS = 2000  # of the bootstrap

_HEAD = """\
Score: mean return of the trained agent, which acts without chance, in environments of other seeds. IQM: interquartile mean
over seeds; intervals: 95 %, stratified bootstrap (rliable). P: that a run of flipout ends above one of stock."""

Task = tuple[str, str]  # algorithm, environment
Runs = dict[Task, dict[str, dict[int, Path]]]  # folder of each run, by arm and seed


def runs_in(folder: Path) -> Runs:
    """
    Find the runs that have a score.

    :param folder: Folder of the benchmark
    :return: Folder of each, by task, arm and seed
    """
    found: Runs = {}
    for path in sorted(folder.glob("*/*/*/seed-*/score.json")):
        row = json.loads(path.read_text())
        found.setdefault((row["algo"], row["env"]), {}).setdefault(row["arm"], {})[row["seed"]] = path.parent
    return found


def _paired(arms: dict[str, dict[int, Path]]) -> list[int]:
    """Seeds that both arms have, with as many steps and episodes."""
    both = set.intersection(*(set(arms.get(arm, {})) for arm in ARMS))
    return sorted(seed for seed in both if len({_length(arms[arm][seed]) for arm in ARMS}) == 1)


def _length(folder: Path) -> tuple[Any, Any]:
    settings = json.loads((folder / "score.json").read_text())["settings"]
    return settings.get("steps"), settings.get("episodes")


def _left_out(runs: Runs) -> str:
    """Say which runs are compared with nothing."""
    alone = [
        f"{arm} {algo} {env} {seed}"
        for (algo, env), arms in runs.items()
        for arm, of_arm in arms.items()
        for seed in sorted(set(of_arm) - set(_paired(arms)))
    ]
    return (
        f"\nLeft out, since the other arm has no such seed with as many steps and episodes: {', '.join(alone)}."
        if alone
        else ""
    )


def _score(folder: Path) -> float:
    return float(np.mean(json.loads((folder / "score.json").read_text())["returns"]))


def _interval(values: dict[str, np.ndarray], of: Any) -> dict[str, tuple[float, float, float]]:
    """An estimate and its 95 % stratified bootstrap interval, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # rliable asks arch for its older generator
        points, intervals = library.get_interval_estimates(
            values, lambda *scores: np.array([of(*scores)]), reps=_REPETITIONS, random_state=np.random.RandomState(0)
        )
    found = {}
    for name in values:
        low, high = (float(end[0]) for end in intervals[name])
        found[name] = (float(points[name][0]), low, high)
    return found


def table(runs: Runs) -> str:
    """
    Compare the arms on the seeds that both have.

    :param runs: Runs
    :return: Table in Markdown
    """
    lines = [
        "| algorithm | environment | seeds | flipout: IQM, 95 % interval | stock: IQM, 95 % interval | P(flipout > stock) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (algo, env), arms in runs.items():
        seeds = _paired(arms)
        if not seeds:
            continue
        scores = {arm: np.array([[_score(arms[arm][seed])] for seed in seeds]) for arm in ARMS}
        iqm = _interval(scores, metrics.aggregate_iqm)
        pair: Any = {"pair": tuple(scores[arm] for arm in ARMS)}
        better = _interval(pair, metrics.probability_of_improvement)["pair"]
        told = [f"{point:.1f} [{low:.1f}, {high:.1f}]" for point, low, high in (iqm[arm] for arm in ARMS)]
        chance = f"{better[0]:.2f} [{better[1]:.2f}, {better[2]:.2f}]"
        lines.append(f"| {algo} | {env} | {len(seeds)} | {told[0]} | {told[1]} | {chance} |")
    return "\n".join(lines)


def _curve(folders: list[Path]) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps, and mean returns of each seed's evaluations, of shape (seeds, evaluations)."""
    found = [sorted(folder.glob("*/*/evaluations.npz"), key=lambda path: path.stat().st_mtime)[-1:] for folder in folders]
    loaded = [np.load(paths[0]) for paths in found if paths]
    if not loaded:
        return None
    length = min(len(one["timesteps"]) for one in loaded)
    return loaded[0]["timesteps"][:length], np.array([one["results"][:length].mean(axis=1) for one in loaded])


def draw(runs: Runs, path: Path) -> None:
    """
    Draw the returns during training, interquartile mean and 95 % interval over seeds, one panel for each task.

    :param runs: Runs
    :param path: File of the picture
    """
    tasks = [task for task, arms in runs.items() if _paired(arms)]
    columns = min(3, max(1, len(tasks)))
    rows = max(1, -(-len(tasks) // columns))
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    for place, task in enumerate(tasks):
        axes = figure.add_subplot(rows, columns, place + 1)
        for arm in ARMS:
            curve = _curve([runs[task][arm][seed] for seed in _paired(runs[task])])
            if curve is None:
                continue
            steps, returns = curve
            bands = [_interval({arm: returns[:, at : at + 1]}, metrics.aggregate_iqm)[arm] for at in range(len(steps))]
            points, low, high = np.array(bands).T
            axes.plot(steps, points, color=_COLOURS[arm], label=arm)
            axes.fill_between(steps, low, high, color=_COLOURS[arm], alpha=0.2, linewidth=0)
        axes.set(title=f"{task[0]}, {task[1]}", xlabel="environment steps", ylabel="return")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def write_report(folder: Path) -> str:
    """
    Write ``benchmark.md`` and ``benchmark.png`` into the folder of a benchmark.

    :param folder: Folder
    :return: The table, and where both are
    :raises SystemExit: If no task has been run by both arms
    """
    runs = runs_in(folder)
    if not any(_paired(arms) for arms in runs.values()):
        raise SystemExit(
            f"{folder} holds no task with scores of both arms, {' and '.join(ARMS)}, on one seed: nothing to compare."
        )
    found = table(runs) + _left_out(runs)
    (folder / "benchmark.md").write_text(f"# Flipout against stock\n\n{_HEAD}\n\n{found}\n\n![Returns](benchmark.png)\n")
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        draw(runs, folder / "benchmark.png")
    return f"{found}\nWritten: {folder / 'benchmark.md'}, {folder / 'benchmark.png'}"
