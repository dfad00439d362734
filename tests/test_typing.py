"""What an editor and a type checker say of a user's script: nothing where it is right, and each wrong word is an error."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]  # whose settings are strict
SCRIPT = Path(__file__).parent / "typed" / "user_script.py"
WRONG = {number for number, line in enumerate(SCRIPT.read_text().splitlines(), start=1) if "# type: ignore[" in line}


def run(*command: str) -> str:
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False, cwd=ROOT).stdout


def test_there_are_wrong_words() -> None:
    assert len(WRONG) >= 12


def test_mypy_strict_finds_each_wrong_word_and_nothing_else() -> None:
    """An ignore that nothing needs is an error, too."""
    assert run("mypy", str(SCRIPT)).startswith("Success")


def test_pyright_finds_each_wrong_word_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("basedpyright")
    script = shutil.copy(SCRIPT, tmp_path)  # away from the project's own configuration
    settings = {"typeCheckingMode": "standard", "enableTypeIgnoreComments": False}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    told = json.loads(run("basedpyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path), str(script)))
    errors = [one for one in told["generalDiagnostics"] if one["severity"] == "error"]
    assert {one["range"]["start"]["line"] + 1 for one in errors} == WRONG
