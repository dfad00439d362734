"""What a release is made of is there, agrees, and can be read; a tree with changes is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import sb3_flipout

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / ".ci"))

import package_metadata  # noqa: E402

FILES = [REPOSITORY / "CITATION.cff", *sorted((REPOSITORY / ".github").rglob("*.yml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_can_be_read(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load(FILES[0].read_text())["version"] == sb3_flipout.__version__
    assert "pip install sb3_flipout\n" not in (REPOSITORY / "README.md").read_text()  # it is on no index yet


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("README.md", "sb3_flipout/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    git(tmp_path, "init", "-q")
    return tmp_path


@pytest.mark.parametrize("known", [True, False])
def test_links_of_the_readme_work_on_an_index(known: bool, checkout: Path) -> None:
    if known:
        git(checkout, "remote", "add", "origin", "git@github.com:someone/sb3_flipout.git")
    made: dict[str, Any] = {}
    package_metadata.Addresses(str(checkout), {}).update(made)
    text, readme = made["readme"]["text"], (REPOSITORY / "README.md").read_text()
    if not known:
        assert text == readme and "urls" not in made
        return
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("#")]
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    at = f"someone/sb3_flipout/v{sb3_flipout.__version__}/docs/images/treasure.png"
    assert f"](https://raw.githubusercontent.com/{at})" in text
    assert made["urls"]["Repository"] == "https://github.com/someone/sb3_flipout"


def test_links_of_the_readme_lead_to_files() -> None:
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", (REPOSITORY / "README.md").read_text()):
        assert (REPOSITORY / link).exists(), link


def test_badges_and_code() -> None:
    found = package_metadata.with_absolute_links("[![b](docs/a.png)](docs/b.md) `names[0](x)`", "https://github.com/a/b", "1")
    raw = "https://raw.githubusercontent.com/a/b/v1/docs/a.png"
    assert found == f"[![b]({raw})](https://github.com/a/b/blob/v1/docs/b.md) `names[0](x)`"


def test_gits_address_is_understood(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for remote in ("git@github.com:some-one/sb3_flipout.git", "https://github.com/some-one/sb3_flipout"):
        git(checkout, "remote", "add", "origin", remote)
        assert package_metadata.repository(checkout) == "https://github.com/some-one/sb3_flipout"
        inside = checkout / "sb3_flipout"  # a copy inside another repository
        assert package_metadata.repository(inside) is None
        git(checkout, "remote", "remove", "origin")
    assert package_metadata.repository(checkout) is None
    monkeypatch.setenv("PATH", "")
    assert package_metadata.repository(checkout) is None  # no git


def test_workflows_call_what_there_is() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for path in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            for step in job["steps"]:
                command = step.get("run", "")
                if command.startswith("make "):
                    assert command.split()[1] in targets, command
                elif command.startswith(".ci/"):
                    assert (REPOSITORY / command).exists()


def test_a_tree_with_changes_is_no_release(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPOSITORY / ".ci" / "release_check", tmp_path / ".ci")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "changed.py").write_text("")
    found = subprocess.run([tmp_path / ".ci" / "release_check"], capture_output=True, text=True)
    assert found.returncode == 1 and "changes that are not committed" in found.stderr and "changed.py" in found.stderr
    assert not (tmp_path / "dist").exists()
