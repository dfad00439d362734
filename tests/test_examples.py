"""The examples run as their docstrings say, and print what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, *arguments: str) -> str:
    """Run an example with warnings as errors where they come from the example itself, and give what it printed."""
    command = [sys.executable, "-W", "error:::__main__", str(EXAMPLES / name), *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return result.stdout


def number(pattern: str, text: str) -> float:
    """Give the number that the pattern's group finds, which must occur exactly once."""
    (found,) = re.findall(pattern, text)
    return float(found)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_states_its_command(path: Path) -> None:
    docstring = path.read_text().split('"""')[1]
    assert f"python examples/{path.name}" in docstring


@pytest.mark.slow
def test_ppo_in_five_lines_learns() -> None:
    out = run_example("01_ppo_in_five_lines.py")
    mean = number(r"mean weights \(deterministic=True\)\s+([\d.]+) \+-", out)
    sampled = number(r"sampled actions \(deterministic=False\)\s+([\d.]+) \+-", out)
    assert mean > 100  # a random policy gets about 22
    assert 0 < sampled < mean


def test_keys_and_replay() -> None:
    out = run_example("02_keys_and_replay.py")
    assert "rows 0 and 2 equal: True; row 1 another: True" in out
    assert "one key per transition, shape (64, 4)" in out
    assert "256 different keys in 256 transitions" in out
    assert number(r"stored keys\s+(\S+)", out) < 1e-5  # float32 rounding of log-probabilities of order one
    assert number(r"other keys\s+(\S+)", out) > 0.1
    assert number(r"(?<=\n)   mean weights  (\S+)", out) > 0.1


@pytest.mark.slow
def test_cnn_pong() -> None:
    out = run_example("03_cnn_pong.py", "--steps", "256")
    assert "PongNoFrameskip-v4, observations (4, 84, 84), 4 environments" in out
    assert re.search(r"perturbed layers: (FlipoutConv2d, ){3}FlipoutLinear, FlipoutLinear\n", out)
    own, mean = (
        [float(value) for value in re.search(rf"{name}\s+\[(.+)\]", out)[1].split(", ")]
        for name in ("own keys", "mean weights")
    )
    assert len(set(own)) == 4
    assert len(set(mean)) == 1
    assert "256 steps in" in out
    changes = [float(change) for change in re.findall(r"changed by ([\d.]+)%", out)]
    assert len(changes) == 5
    assert all(change > 0 for change in changes)


def test_cnn_pong_names_the_extra_when_ale_is_missing() -> None:
    script = f"import sys, runpy; sys.modules['ale_py'] = None; runpy.run_path({str(EXAMPLES / '03_cnn_pong.py')!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode != 0
    assert "pip install 'sb3_flipout[atari]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_plain_torch_spreads_outside_the_data() -> None:
    out = run_example("04_plain_torch.py")
    rows = [line.split() for line in out.splitlines() if re.match(r" *-?\d\.\d ", line)]
    assert len(rows) == 13
    assert sum(row[-1] == "data" for row in rows) == 5
    truth, mean = ([float(row[column]) for row in rows if abs(float(row[0])) <= 0.5] for column in (1, 2))
    assert max(abs(a - b) for a, b in zip(truth, mean, strict=True)) < 0.3  # fits where there are data
    assert number(r"outside, ratio ([\d.]+)", out) > 2


@pytest.mark.slow
def test_dqn_deep_exploration_learns_what_random_actions_do_not_reach() -> None:
    out = run_example("05_dqn_deep_exploration.py")
    assert number(r"10 members\s+learned after (\d+) episodes", out) < 1000  # a random policy reaches it once in 1,024
    visited = number(r"mean over\s+\d+ visited states\s+([\d.]+)", out)
    assert number(r"mean over\s+\d+ unvisited states\s+([\d.]+)", out) > 2 * visited


@pytest.mark.slow
def test_anneal_and_watch_ends_with_mean_weights_that_have_learned(tmp_path: Path) -> None:
    out = run_example("06_anneal_and_watch.py", "--logs", str(tmp_path))
    assert number(r"first success: step (\d+) of", out) < 3000  # stock PPO: 3,100 at the earliest in five seeds
    rows = [[float(value) for value in line.split()] for line in out.splitlines() if re.match(r" +\d+   ", line)]
    assert len(rows) == 8
    assert rows[-1][1] > 80
    assert number(r"noise scale at the end: (\S+)", out) == 0.02
    assert list(tmp_path.glob("PPO_1/events.*"))


@pytest.mark.slow
def test_flipes_on_ray_learns() -> None:
    out = run_example("08_ray_workers.py", "--generations", "12")
    means = [float(found) for found in re.findall(r"steps: +([\d.]+)", out)]
    assert len(means) == 12 and means[-1] > 2 * means[0]


def test_flipes_learns() -> None:
    out = run_example("07_flipes.py", "--steps", "400000")
    best = max(float(found) for found in re.findall(r"mean weights\s+([\d.]+)", out))
    assert best > 150
    assert number(r"(\d+) environment steps per second", out.replace(",", "")) > 0
