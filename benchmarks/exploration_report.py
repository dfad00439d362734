"""Table, statistics and figure of the exploration benchmark; `exploration.py --report` writes them next to the runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from exploration_tasks import ARMS, BASELINES, OURS, TASKS
from exploration_training import WINDOW
from runs import Row, versions_of

HEADER = """# Exploration of DQN variants

Made by `python benchmarks/exploration.py --report` from [the runs]({runs}) ({versions}). Settings are in each run's line; arms
and tasks in `benchmarks/exploration_tasks.py`. Members and their prior were chosen on seeds 0 to 4 of DeepSea 20; the others
have what their papers say, or our defaults, and the runs below are of other seeds. How far members reach with settings chosen
for it: [DeepSea to size 100](deep_sea.md); [MinAtar](minatar.md).

A run is **solved** when more than 90 of the last 100 training episodes reached the goal *and* the mean weights (with members:
their vote) reached it afterwards. Episodes are median (min to max) over seeds; a run that is not solved counts as more than
the cap, `>2000`. *Learned* counts runs that met the training criterion, whatever the mean weights then did. *First success* is
the median of the first training episode that reached the goal.
"""


class Cell(NamedTuple):
    """What arms are compared on."""

    task: str
    n_envs: int
    cap: int | None

    @property
    def has_goal(self) -> bool:
        return TASKS[self.task].steps is None

    def __str__(self) -> str:
        return f"{self.task}, {self.n_envs} env{'s' if self.n_envs > 1 else ''}"


@dataclass
class Summary:
    """One arm on one cell."""

    rows: list[Row]

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def solved(self) -> int:
        return sum(row["solved_episode"] is not None for row in self.rows)

    def column(self, name: str) -> np.ndarray:
        """Give one number per seed; infinite where it did not happen."""
        return np.array([np.inf if row[name] is None else row[name] for row in self.rows], dtype=float)

    def rank(self, cell: Cell) -> tuple[float, ...]:
        """Give what decides between two arms; the smaller, the better."""
        if not cell.has_goal:
            return (-float(self.column("evaluation_return").mean()),)
        return (-self.solved / self.n, float(np.median(self.column("solved_episode"))))

    def words(self, cell: Cell) -> str:
        if not cell.has_goal:
            return f"return {self.column('evaluation_return').mean():.2f}"
        return f"{self.solved}/{self.n}, {episodes(float(np.median(self.column('solved_episode'))), cell.cap)} episodes"


Table = dict[Cell, dict[str, Summary]]


def table_of(rows: list[Row]) -> Table:
    """Group runs by cell and arm, in the order of the tables."""
    known = [row for row in rows if row["task"] in TASKS and row["arm"] in ARMS]
    tasks, arms = list(TASKS), list(ARMS)
    table: Table = {}
    for row in sorted(
        known, key=lambda r: (tasks.index(r["task"]), r["n_envs"], r["cap"] or 0, arms.index(r["arm"]), r["seed"])
    ):
        arm = table.setdefault(Cell(row["task"], row["n_envs"], row["cap"]), {})
        arm.setdefault(row["arm"], Summary([])).rows.append(row)
    return table


def episodes(value: float, cap: int | None) -> str:
    return f">{cap}" if np.isinf(value) else f"{value:.0f}"


def goal_table(table: Table) -> list[str]:
    lines = [
        "| task | envs | cap | arm | solved | learned | episodes to solve | first success |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, arms in table.items():
        for arm, found in arms.items() if cell.has_goal else ():
            solved, first = found.column("solved_episode"), found.column("first_success_episode")
            low, middle, high = (episodes(float(of(solved)), cell.cap) for of in (np.min, np.median, np.max))
            learned = int(np.isfinite(found.column("learned_episode")).sum())
            lines.append(
                f"| {cell.task} | {cell.n_envs} | {cell.cap} | {arm} | {found.solved} of {found.n} | {learned} of {found.n} "
                f"| {middle} ({low} to {high}) | {episodes(float(np.median(first)), cell.cap)} |"
            )
    return lines


def return_table(table: Table) -> list[str]:
    lines = [
        "| task | arm | seeds | return of mean weights: mean (min to max) | training return at the end |",
        "|---|---|---|---|---|",
    ]
    for cell, arms in table.items():
        for arm, found in arms.items() if not cell.has_goal else ():
            scores = found.column("evaluation_return")
            last = np.mean([row["curve"][-1][1] for row in found.rows if row["curve"]] or [np.nan])
            spread = f"{scores.mean():.2f} ({scores.min():.2f} to {scores.max():.2f})"
            lines.append(f"| {cell.task} | {arm} | {found.n} | {spread} | {last:.2f} |")
    return lines


def losses(table: Table) -> list[str]:
    """Name every cell in which an arm of ours does worse than the best of the others'."""
    lines = []
    for cell, arms in table.items():
        others = {arm: arms[arm] for arm in BASELINES if arm in arms}
        if not others:
            continue
        best = min(others, key=lambda arm: others[arm].rank(cell))
        for arm in OURS:
            if arm in arms and arms[arm].rank(cell) > others[best].rank(cell):
                lines.append(f"- {cell}: `{arm}` {arms[arm].words(cell)}; `{best}` {others[best].words(cell)}.")
    compared = any(set(arms) & set(BASELINES) and set(arms) & set(OURS) for arms in table.values())
    return lines or ["In no task so far." if compared else "Nothing to compare yet."]


# ---- statistics -----------------------------------------------------------------------------------------------------


def score(row: Row, cell: Cell, best_return: float) -> float:
    """Normalise: 1 is solved in the fewest episodes possible, 0 not solved; MinAtar: relative to the task's best run."""
    if not cell.has_goal:
        return row["evaluation_return"] / best_return if best_return > 0 else 0.0
    if row["solved_episode"] is None:
        return 0.0
    assert cell.cap is not None, "tasks with a goal have a cap"
    return 1.0 - (row["solved_episode"] - WINDOW) / max(cell.cap - WINDOW + 1, 1)


def score_matrices(table: Table, cells: list[Cell]) -> dict[str, np.ndarray]:
    """Give, for each arm that has all the cells, scores of shape (seeds, cells), over the seeds that all of them have."""
    arms = [arm for arm in ARMS if all(arm in table[cell] for cell in cells)]
    found = [{row["seed"]: row for row in table[cell][arm].rows} for arm in arms for cell in cells]
    seeds = sorted(set.intersection(*(set(rows) for rows in found))) if found else []
    best = {cell: max(row["evaluation_return"] for arm in table[cell].values() for row in arm.rows) for cell in cells}
    matrices = {}
    for number, arm in enumerate(arms):
        of_arm = found[number * len(cells) : (number + 1) * len(cells)]
        matrices[arm] = np.array(
            [[score(rows[seed], cell, best[cell]) for rows, cell in zip(of_arm, cells, strict=True)] for seed in seeds]
        )
    return matrices if seeds else {}


def groups(table: Table) -> list[list[Cell]]:
    """Give the sets of cells on which two arms or more can be compared, the largest first."""
    sets = {tuple(cell for cell in table if arm in table[cell]) for arm in ARMS}
    shared = [cells for cells in sets if cells and sum(all(arm in table[cell] for cell in cells) for arm in ARMS) > 1]
    return [list(cells) for cells in sorted(shared, key=lambda cells: (-len(cells), str(cells)))]


def statistics(table: Table) -> list[str]:
    try:
        from rliable import library, metrics
    except ImportError:
        return ["Left out: the package rliable is missing. Run `make bench-install`, then `exploration.py --report` again."]
    lines = [
        "Interquartile means of normalised scores with 95 % stratified bootstrap intervals, by rliable, on the tasks and",
        "seeds that all arms shown have run. 1: solved in the fewest episodes possible; 0: not solved; MinAtar: relative to",
        "its best run.",
    ]
    for cells in groups(table):
        matrices = score_matrices(table, cells)
        if not matrices:
            continue
        np.random.seed(0)  # rliable 1.2 draws from numpy's own generator, whatever it is given
        middle, interval = library.get_interval_estimates(
            matrices, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=20_000
        )
        n_seeds = len(next(iter(matrices.values())))
        lines += [
            "",
            f"{n_seeds} seeds of: {'; '.join(map(str, cells))}",
            "",
            "| arm | IQM | 95 % interval |",
            "|---|---|---|",
        ]
        lines += [
            f"| {arm} | {middle[arm][0]:.3f} | {interval[arm][0][0]:.3f} to {interval[arm][1][0]:.3f} |" for arm in matrices
        ]
    return lines


# ---- figure ---------------------------------------------------------------------------------------------------------


def draw(table: Table, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    goals = [cell for cell in table if cell.has_goal]
    rows = [[cell for cell in goals if cell.n_envs == n] for n in sorted({cell.n_envs for cell in goals})]
    arms = [arm for arm in ARMS if any(arm in table[cell] for cell in goals)]
    width = 3 + 0.09 * max(map(len, rows)) * (len(arms) + 2)
    figure = Figure(figsize=(max(7.0, width), 0.5 + 3.2 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), squeeze=False)[:, 0]
    for axes, cells in zip(panels, rows, strict=True):
        for number, arm in enumerate(arms):
            shift = 0.8 * (number + 0.5) / len(arms) - 0.4
            draw_arm(axes, arm, [(place + shift, cell) for place, cell in enumerate(cells)], table)
        axes.set_xticks(range(len(cells)), [f"{cell.task}\ncap {cell.cap}" for cell in cells], fontsize=7)
        axes.set(yscale="log", ylabel="episodes to solve", xlim=(-0.5, len(cells) - 0.5))
        axes.set_title(
            f"{cells[0].n_envs} environment(s): median and range over seeds; hollow: not solved within the cap", fontsize=9
        )
        axes.grid(axis="y", which="both", alpha=0.3)
    handles = [Line2D([], [], **look(arm), label=arm) for arm in arms]
    figure.legend(handles=handles, fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=130)


def look(arm: str) -> dict[str, Any]:
    number = list(ARMS).index(arm)
    return dict(color=f"C{number % 10}", marker="os^DvP"[number % 6], markersize=5, linestyle="none")


def draw_arm(axes: Any, arm: str, places: list[tuple[float, Cell]], table: Table) -> None:
    for x, cell in places:
        if arm not in table[cell]:
            continue
        solved = table[cell][arm].column("solved_episode")
        # Runs that were not solved are drawn at the cap.
        low, middle, high = np.minimum([solved.min(), np.median(solved), solved.max()], cell.cap)
        axes.plot([x, x], [low, high], color=look(arm)["color"], linewidth=1)
        axes.plot([x], [middle], **look(arm), fillstyle="full" if np.isfinite(np.median(solved)) else "none")


def write_report(rows: list[Row], out: Path) -> str:
    """
    Write the report next to the runs.

    :param rows: The runs
    :param out: File of the runs
    :return: The report, as Markdown
    """
    table = table_of(rows)
    figure = out.with_suffix(".png")
    parts = [HEADER.format(runs=out.name, versions=versions_of(rows)), *goal_table(table)]
    if any(not cell.has_goal for cell in table):
        parts += ["", "## Tasks without a goal", "", *return_table(table)]
    parts += [
        "",
        "## Where we lose",
        "",
        f"Arms of this package ({', '.join(OURS)}) against the best of {', '.join(BASELINES)},",
    ]
    parts += ["by runs solved and then by the median; with few seeds, much of it is chance.", "", *losses(table)]
    parts += ["", "## Statistics", "", *statistics(table)]
    if any(cell.has_goal for cell in table):
        draw(table, figure)
        parts += ["", f"![Episodes to solve]({figure.name})"]
    text = "\n".join(parts) + "\n"
    out.with_suffix(".md").write_text(text)
    return text
