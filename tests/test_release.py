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

import metadata  # noqa: E402
from metadata import Addresses  # noqa: E402

FILES = [REPOSITORY / "CITATION.cff", *sorted((REPOSITORY / ".github").rglob("*.yml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_can_be_read(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load(FILES[0].read_text())["version"] == sb3_flipout.__version__
    assert "pip install sb3_flipout\n" not in (REPOSITORY / "README.md").read_text()  # it is on no index yet


@pytest.mark.parametrize("repository", [None, "someone/sb3_flipout"])
def test_links_of_the_readme_work_on_an_index(repository: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the address is known: from the environment, as on GitHub. A folder that is no repository knows none."""
    monkeypatch.setenv("GITHUB_REPOSITORY", repository or "")
    for name in ("README.md", "sb3_flipout/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    made: dict[str, Any] = {}
    Addresses(str(tmp_path), {}).update(made)
    links = re.findall(r"\]\(([^)]+)\)", made["readme"]["text"])
    there = [link for link in links if not link.startswith("#")]
    assert len(there) > 20
    if repository is None:
        assert made["readme"]["text"] == (REPOSITORY / "README.md").read_text() and "urls" not in made
        return
    assert all(link.startswith("https://") for link in there)
    at = f"{repository}/v{sb3_flipout.__version__}/docs/images/treasure.png"
    assert f"](https://raw.githubusercontent.com/{at})" in made["readme"]["text"]
    assert made["urls"]["Repository"] == f"https://github.com/{repository}"


def test_gits_address_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for remote in ("git@github.com:some-one/sb3_flipout.git", "https://github.com/some-one/sb3_flipout"):
        subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", remote], check=True)
        assert metadata.repository(tmp_path) == "https://github.com/some-one/sb3_flipout"
        subprocess.run(["git", "-C", str(tmp_path), "remote", "remove", "origin"], check=True)
    assert metadata.repository(tmp_path) is None


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
