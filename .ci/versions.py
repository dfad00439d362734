"""Run the tests under the lowest and the newest versions that are supported, each in a clean environment.

    make test-versions                       # all rows of the table; some gigabytes and minutes each
    make test-versions ROWS="lowest newest"
    make test-versions ROWS=newest PYTEST="-x -n 2"

Interpreters are looked for on the path (python3.10 and so on) and among pyenv's. What came of each row is appended to
docs/versions.jsonl, and docs/versions.md is made of it. The fast tests run without those that need more than sb3-contrib: a
row is about what this package stands on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS, PAGE = ROOT / "docs" / "versions.jsonl", ROOT / "docs" / "versions.md"
PACKAGES = ("stable-baselines3", "sb3-contrib", "torch", "gymnasium", "numpy")

#: Python, and what is asked for beside the ranges of pyproject.toml.
ROWS: dict[str, tuple[str, list[str]]] = {
    "lowest": (
        "3.10",
        ["stable-baselines3==2.9.0", "sb3-contrib==2.9.0", "torch==2.8.0", "gymnasium==1.1.0", "numpy==2.0.2"],
    ),
    "between": ("3.11", ["stable-baselines3==2.9.2", "torch==2.10.0", "gymnasium==1.2.3", "numpy<2.3"]),
    "recent": ("3.12", ["torch==2.13.0", "gymnasium<1.4"]),
    "newest": ("3.13", []),
}
TOOLS = ["pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "safetensors", "scipy", "pyyaml"]
#: What needs more than the package and sb3-contrib, or is about this checkout and not about versions.
LEFT_OUT = (
    "tests/zoo tests/test_zoo.py tests/evolution/test_workers.py tests/export/test_onnx.py tests/envs/test_against_bsuite.py "
    "tests/envs/test_minatar.py tests/envs/test_atari_names.py tests/test_demo_atari.py tests/callbacks/test_zoo_steering.py "
    "tests/test_typing.py tests/test_studies.py tests/test_examples.py tests/test_concurrency.py tests/test_architecture.py "
    "tests/test_handbook.py tests/test_release.py tests/test_exploration_benchmark.py tests/test_deep_sea_benchmark.py "
    "tests/test_docs_algorithms.py"
).split()


def interpreter(wanted: str) -> str:
    """Find a Python of this version."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in (f"python{wanted}", *sorted(map(str, pyenv.glob(f"{wanted}.*/bin/python")), reverse=True)):
        found = shutil.which(candidate)
        if found is not None:
            code = "import sys; print('%d.%d' % sys.version_info[:2])"
            if subprocess.run([found, "-c", code], capture_output=True, text=True).stdout.strip() == wanted:
                return found
    raise SystemExit(f"Python {wanted} is neither on the path nor among pyenv's versions; install it, or leave it out.")


def tried(name: str, folder: Path, pytest_args: list[str]) -> dict[str, object]:
    """Build the environment of a row, and run the tests in it."""
    python, wanted = ROWS[name]
    here = folder / name
    shutil.rmtree(here, ignore_errors=True)
    subprocess.run([interpreter(python), "-m", "venv", here], check=True)
    inside = str(here / "bin" / "python")
    install = [inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*install, f"{ROOT}[contrib]", *wanted, *TOOLS], check=True)
    shown = subprocess.run([inside, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True)
    versions = {one["name"].replace("_", "-").lower(): one["version"] for one in json.loads(shown.stdout)}
    command = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"--ignore={one}" for one in LEFT_OUT), *pytest_args]
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **one_thread, "MPLBACKEND": "Agg"}, capture_output=True, text=True
    )
    print(run.stdout[-6000:], run.stderr[-2000:])
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", run.stdout.splitlines()[-1])}
    shutil.rmtree(here)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    found = dict(row=name, python=python, versions={one: versions.get(one) for one in PACKAGES}, passes=run.returncode == 0)
    return {**found, **counts, "date": str(date.today()), "commit": commit}


def page(rows: list[dict[str, object]]) -> str:
    """Make the page of the last try of each row."""
    last = {row["row"]: row for row in rows}
    lines = [
        f"| {name} | {row['python']} | {' | '.join(str(row['versions'][one]) for one in PACKAGES)} | "  # type: ignore[index]
        f"{'yes' if row['passes'] else '**no**'}: {row.get('passed', 0):,} passed, {row.get('failed', 0)} failed, "
        f"{row.get('skipped', 0)} skipped | {row['date']}, {row['commit']} |"
        for name, row in ((name, last[name]) for name in ROWS if name in last)
    ]
    return f"""# Versions

Made by `make test-versions` from [the runs](versions.jsonl): the fast tests in clean environments, but for those that need
more than the package and sb3-contrib. The ranges in `pyproject.toml` are what passes here.

| | Python | {" | ".join(PACKAGES)} | tests pass | when |
|---|---|{"---|" * len(PACKAGES)}---|---|
{chr(10).join(lines)}
"""


def main() -> None:
    """Try the rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="of the environments, which are removed")
    parser.add_argument("--pytest", default="-n 2 --dist worksteal", help="further arguments of pytest")
    args = parser.parse_args()
    failed = False
    for name in args.rows:
        row = tried(name, args.folder, args.pytest.split())
        failed |= not row["passes"]
        with RUNS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        PAGE.write_text(page([json.loads(line) for line in RUNS.read_text().splitlines()]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
