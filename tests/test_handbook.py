"""The handbook: every public name is in it, and every block of Python in README and pages runs when pasted."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "docs"))

import make_api  # noqa: E402
import make_settings  # noqa: E402

PACKAGE = REPOSITORY / "sb3_flipout"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCS = REPOSITORY / "docs"
PAGES = [page for page in (REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))) if BLOCK.search(page.read_text())]
SLOW = {"distributed.md": pytest.mark.slow, "evolution.md": pytest.mark.slow}  # Ray's cluster; a population of 128
COMMIT = re.compile(r"[0-9a-f]{7,40}\+?")
STEPS = re.compile(r"(\.learn\(\s*)\d[\d_]*(?: - model\.num_timesteps)?")


def cases() -> list[Any]:
    return [pytest.param(page, id=page.name, marks=SLOW.get(page.name, ())) for page in PAGES]


@pytest.mark.filterwarnings("ignore:this call of learn:UserWarning")  # which goes on where a training of 600 steps was over
@pytest.mark.parametrize("page", cases())
def test_blocks_run_when_pasted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as a reader pastes them; trainings are cut to 600 steps."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(BLOCK.findall(page.read_text())):
        code = STEPS.sub(r"\g<1>600", block.replace("every=10_000", "every=500").replace("workers=4", "workers=1"))
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)


def docstring_blocks() -> list[Any]:
    """Blocks of code in docstrings, behind `::`; those of shell commands are tried where their programs are."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for number, block in enumerate(re.findall(r"^ *::\n\n((?: +.*\n|\n)+)", path.read_text(), re.MULTILINE)):
            lines = block.splitlines()
            indent = len(lines[0]) - len(lines[0].lstrip())
            # A block ends where the docstring goes on, less indented.
            inside = itertools.takewhile(lambda line, least=indent: not line or line.startswith(" " * least), lines)
            code = textwrap.dedent("\n".join(inside)).strip()
            if not code.startswith("python -m"):
                marks = pytest.mark.slow if "RayWorkers" in code else ()
                found.append(pytest.param(code, id=f"{path.relative_to(PACKAGE)}-{number}", marks=marks))
    return found


@pytest.mark.parametrize("code", docstring_blocks())
def test_blocks_of_docstrings_run_when_pasted(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(
        compile(STEPS.sub(r"\g<1>600", code.replace("workers=4", "workers=1")), "docstring", "exec"), {"__name__": "__main__"}
    )


def test_the_tables_of_settings_are_those_of_the_dataclasses() -> None:
    text = make_settings.PAGE.read_text()
    assert text == make_settings.page(text), "run python docs/make_settings.py"


def runs_in(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return list(json.loads(text)) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


RESULTS = DOCS / "benchmarks"
TOLD_ELSEWHERE = {"index.md", "summary.md"}  # lists of the other pages


@pytest.mark.parametrize("path", sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*.jsonl")]), ids=lambda path: path.name)
def test_every_run_says_its_commit_and_versions(path: Path) -> None:
    for run in runs_in(path):
        assert COMMIT.fullmatch(str(run.get("commit"))), run
        assert run["torch"], run


@pytest.mark.parametrize(
    "path", [page for page in sorted(RESULTS.glob("*.md")) if page.name not in TOLD_ELSEWHERE], ids=lambda path: path.name
)
def test_every_page_of_results_says_command_commit_day_and_versions(path: Path) -> None:
    text = path.read_text()
    command = re.search(r"`python (benchmarks/\w+\.py)", text)
    assert command and (REPOSITORY / command.group(1)).exists()
    assert re.search(rf"commits? {COMMIT.pattern}", text) and re.search(r"20\d\d-\d\d-\d\d", text)
    assert re.search(r"torch \d+\.\d+", text)


@pytest.mark.parametrize("path", sorted([*RESULTS.glob("*.json"), *RESULTS.glob("*.jsonl")]), ids=lambda path: path.name)
def test_every_page_of_trainings_says_which_seeds_chose_and_which_confirmed(path: Path) -> None:
    text = re.sub(r"\s+", " ", path.with_suffix(".md").read_text())
    if any("seed" in run for run in runs_in(path)):
        assert re.search(r"[Cc]hosen", text), "what was chosen, and on which seeds?"
        confirmed = r"[Cc]onfirmed|[Ff]resh seeds|on (?:none|any) of these seeds|[Nn]othing was chosen|of other seeds"
        assert re.search(confirmed, text)


def test_the_page_of_all_names_is_up_to_date() -> None:
    assert (DOCS / "api.rst").read_text() == make_api.page(), "run python docs/make_api.py"


@pytest.mark.parametrize("name", make_api.MODULES)
def test_every_public_name_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for one in make_api.public_names(module):
        value = getattr(module, one)
        if make_api.is_documented(value):
            assert value.__doc__ and value.__doc__.strip(), f"{name}.{one}"


def test_every_module_with_public_names_is_listed() -> None:
    """Packages whose ``__init__`` says what is public."""
    packages = {path.parent for path in (REPOSITORY / "sb3_flipout").rglob("__init__.py") if "__all__" in path.read_text()}
    named = {".".join(folder.relative_to(REPOSITORY).parts) for folder in packages}
    private = {name for name in named if any(part.startswith("_") for part in name.split("."))}
    assert named - private - set(make_api.MODULES) <= {"sb3_flipout.layers.recurrent", "sb3_flipout.hooks"}


def test_titles_are_unique() -> None:
    titles = [
        re.search(r"^# (.*)$", page.read_text(), re.MULTILINE)
        for page in (REPOSITORY / "docs").rglob("*.md")
        if "_build" not in page.parts
    ]
    found = [title.group(1) for title in titles if title is not None]
    assert len(found) == len(set(found)), sorted({title for title in found if found.count(title) > 1})
