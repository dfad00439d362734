"""The handbook: every public name is in it, and every block of Python in README and pages runs when pasted."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "docs"))

import make_api  # noqa: E402

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCS = REPOSITORY / "docs"
PAGES = [page for page in (REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))) if BLOCK.search(page.read_text())]
SLOW = {"distributed.md": pytest.mark.slow, "evolution.md": pytest.mark.slow}  # Ray's cluster; a population of 128
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
