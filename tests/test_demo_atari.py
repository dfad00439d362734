"""The Atari demo end to end, with tiny settings: it leaves what it says it leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stable_baselines3 import DQN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.policies import FlipoutPolicyMixin

DEMO = Path(__file__).parent.parent / "examples" / "demo_atari.py"


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=280, env=environment, check=False
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the demo once, past the start of learning, and give its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo_atari")
    result = run(str(DEMO), "--minutes", "4", "--steps", "1200", "--frames", "60", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr + result.stdout
    return folder, result.stdout


@pytest.mark.slow
def test_model_loads_and_has_learned(demo: tuple[Path, str]) -> None:
    path = demo[0] / "demo_output" / "atari" / "flipout_dqn_pong.zip"
    model = DQN.load(path, device="cpu", custom_objects={"buffer_size": 1})
    assert isinstance(model.policy, FlipoutPolicyMixin)
    assert (model.policy.noise_settings.perturb, model.policy.noise_settings.layers) == ("policy", "linear")
    assert model.num_timesteps == 1200
    assert model.policy.learning.step == 2 * (1200 - 1000) // 8
    assert model.exploration_rate == 0.0
    for layer in model.policy.q_net.modules():
        if isinstance(layer, FlipoutLayer):
            assert layer.weight_sigma.std() > 0  # sigma starts as one number per layer


@pytest.mark.slow
def test_film_shows_the_game(demo: tuple[Path, str]) -> None:
    with Image.open(demo[0] / "demo_output" / "atari" / "pong.gif") as film:
        assert film.n_frames > 10
        assert film.size == (160, 210)
        frames = []
        for index in range(film.n_frames):
            film.seek(index)
            frames.append(np.asarray(film.convert("RGB")))
    assert len(np.unique(frames[-1].reshape(-1, 3), axis=0)) >= 3  # court, paddles, in colour
    assert any(np.any(frame != frames[0]) for frame in frames)


@pytest.mark.slow
def test_tensorboard_logs_hold_the_scalars(demo: tuple[Path, str]) -> None:
    events = EventAccumulator(str(demo[0] / "demo_output" / "atari" / "tensorboard" / "flipout_1")).Reload()
    assert {"train/loss", "rollout/exploration_rate"} <= set(events.Tags()["scalars"])
    assert all(event.value == 0.0 for event in events.Scalars("rollout/exploration_rate"))


@pytest.mark.slow
def test_what_it_prints_is_true(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for name in ("model", "film", "logs"):
        (path,) = re.findall(rf"^{name}  +(\S+)$", printed, re.MULTILINE)
        assert (folder / path).exists()
    assert f"tensorboard --logdir {Path('demo_output') / 'atari' / 'tensorboard'}\n" in printed
    assert "do not make a good player" in printed


@pytest.mark.slow
def test_the_clock_stops_it(tmp_path: Path) -> None:
    result = run(str(DEMO), "--minutes", "0.02", "--frames", "12", "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (steps,) = re.findall(r"FlipoutCnnPolicy: (\d+) steps in", result.stdout)
    assert int(steps) < 30_000
    assert (tmp_path / "out" / "flipout_dqn_pong.zip").exists()


@pytest.mark.parametrize("missing", ["ale_py", "cv2"])
def test_names_the_extra_when_it_is_missing(missing: str, tmp_path: Path) -> None:
    result = run("-c", f"import sys, runpy; sys.modules[{missing!r}] = None; runpy.run_path({str(DEMO)!r})", cwd=tmp_path)
    assert result.returncode != 0
    assert "pip install 'sb3_flipout[atari]'" in result.stderr
    assert "Traceback" not in result.stderr
