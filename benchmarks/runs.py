"""Many training runs, over seeds, in processes, that can be stopped and repeated: one line of JSON for each that is done."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

Row = dict[str, Any]
RunT = TypeVar("RunT")


def read(path: Path) -> list[Row]:
    """Read the lines; a last one that a stopped process left half-written does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(
                f"{path}, line {number} is no JSON: {line[:60]!r}. Remove the line; its run is made again."
            ) from error
    return rows


def append(path: Path, row: Row) -> None:
    """Append a run, after taking a half-written last line away: the new one must not be glued to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ""
    if text and not text.endswith("\n"):
        whole = text[: text.rfind("\n") + 1]
        try:
            json.loads(text[len(whole) :])
        except json.JSONDecodeError:
            path.write_text(whole)
        else:
            path.write_text(text + "\n")
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def results(train: Callable[[RunT], Row], runs: Sequence[RunT], jobs: int) -> Iterator[tuple[RunT, Callable[[], Row]]]:
    """Give each run with the function that returns its row, or raises what the run raised."""
    if jobs == 1:
        yield from ((run, lambda run=run: train(run)) for run in runs)
        return
    # Not forked: a process that torch has been used in cannot be forked safely.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train, run): run for run in runs}
        try:
            yield from ((futures[future], future.result) for future in as_completed(futures))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def execute(train: Callable[[RunT], Row], left: Sequence[RunT], out: Path, jobs: int, brief: Callable[[Row], str]) -> int:
    """Make runs, and append each as it ends; give how many failed."""
    failed = 0
    with tqdm(total=len(left), unit="run") as bar:
        for run, result in results(train, left, jobs):
            try:
                row = result()
            except Exception as error:  # the other runs are worth having
                failed += 1
                tqdm.write(f"{run} failed: {error!r}", file=sys.stderr)
            else:
                append(out, row)
                tqdm.write(brief(row))
            bar.update()
    return failed


def options(description: str | None, out: str, seeds: int, first_seed: int) -> argparse.ArgumentParser:
    """Give a command line with what all studies have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"how many, default {seeds}")
    parser.add_argument("--first-seed", type=int, default=first_seed, help=f"default {first_seed}")
    parser.add_argument("--jobs", type=int, default=1, help="processes, default 1")
    parser.add_argument("--report", action="store_true", help="only write the page, next to --out")
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def left_of(runs: Sequence[RunT], rows: Sequence[Row]) -> list[RunT]:
    """Give the runs, named tuples of one kind, that have no row yet."""
    names = type(runs[0])._fields if runs else ()  # type: ignore[attr-defined]
    done = {tuple(row[name] for name in names) for row in rows}
    return [run for run in runs if run not in done]


def versions_of(rows: Sequence[Row]) -> str:
    """Say what runs were made with: each commit and its day, and the versions that all of them share or do not."""
    commits = {row["commit"]: min(_day(other) for other in rows if other["commit"] == row["commit"]) for row in rows}
    told = ", ".join(f"{commit} of {day}" for commit, day in sorted(commits.items(), key=lambda item: item[::-1]))
    versions = sorted({(row["torch"], row["stable_baselines3"]) for row in rows})
    made = "; ".join(f"torch {torch}, SB3 {sb3}" for torch, sb3 in versions)
    return f"commit{'s' if len(commits) > 1 else ''} {told}; {made}"


def _day(row: Row) -> str:
    """The day on which a run was made; where its line does not say it, that of its commit."""
    return str(row.get("date") or _git("show", "-s", "--format=%cs", row["commit"].rstrip("+")))


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def made_with() -> Row:
    """Say what a run was made with: the commit of the working tree ("+" if it was changed), the day, and versions."""
    versions = {name: version(name) for name in ("sb3_flipout", "stable_baselines3", "torch", "gymnasium")}
    return dict(commit=_git("describe", "--always", "--dirty=+"), date=str(date.today()), **versions)


def head_of(title: str, docstring: str | None, *more: str) -> str:
    """
    Give the head of a page of timings: what made them, and what the script says of itself after its commands.

    :param title: Title of the page
    :param docstring: Docstring of the script: a line, its commands, and what the page is to say
    :param more: What else made the numbers, the rounds say
    """
    made = made_with()
    told = [f"`python {' '.join(sys.argv)}`", made["date"], f"commit {made['commit']}", *more, f"{cpu_model()}, one thread"]
    told += [f"Python {platform.python_version()}", f"torch {made['torch']}", f"SB3 {made['stable_baselines3']}"]
    about = (docstring or "").split("\n\n", 2)[2].strip()
    return f"# {title}\n\n{', '.join(told)}.\n\n{about}\n"


def cpu_model() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
