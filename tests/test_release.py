"""What a release is made of is there, agrees, and can be read; a tree with changes is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import sb3_flipout

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = [REPOSITORY / "CITATION.cff", *sorted((REPOSITORY / ".github").rglob("*.yml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_can_be_read(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load(FILES[0].read_text())["version"] == sb3_flipout.__version__
    assert "pip install sb3_flipout\n" not in (REPOSITORY / "README.md").read_text()  # it is on no index yet


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
