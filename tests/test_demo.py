"""The demo end to end: it reaches its threshold, and leaves what it says it leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_flipout.policies import FlipoutPolicyMixin

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def run_demo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DEMO), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280, env=environment, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the demo once, with its default seed, and give its folder and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    result = run_demo(cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr + result.stdout
    return folder, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flipout", "stock"])
def test_evaluations_end_at_the_threshold(demo: tuple[Path, str], name: str) -> None:
    log = np.load(demo[0] / "demo_output" / "evaluations" / name / "evaluations.npz")
    scores = log["results"].mean(axis=1)
    assert log["results"].shape[1] == 20
    assert scores[-1] >= 475
    assert np.all(scores[:-1] < 475)
    assert log["timesteps"][-1] <= 100_000


@pytest.mark.slow
def test_model_loads_and_plays_with_mean_weights(demo: tuple[Path, str]) -> None:
    model = PPO.load(demo[0] / "demo_output" / "flipout_ppo_cartpole.zip", device="cpu")
    assert isinstance(model.policy, FlipoutPolicyMixin)
    score, _ = evaluate_policy(model, make_vec_env("CartPole-v1", n_envs=5, seed=7), n_eval_episodes=10)
    assert score > 300  # other episodes than those that stopped the training
    stock = PPO.load(demo[0] / "demo_output" / "stock_ppo_cartpole.zip", device="cpu")
    assert not isinstance(stock.policy, FlipoutPolicyMixin)


@pytest.mark.slow
def test_learning_curve_is_a_picture(demo: tuple[Path, str]) -> None:
    image = matplotlib.image.imread(demo[0] / "demo_output" / "learning_curve.png")
    assert image.shape[0] > 300
    assert image.shape[1] > 300
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flipout", "stock"])
def test_tensorboard_logs_hold_the_scalars(demo: tuple[Path, str], name: str) -> None:
    events = EventAccumulator(str(demo[0] / "demo_output" / "tensorboard" / f"{name}_1")).Reload()
    assert {"rollout/ep_rew_mean", "train/loss", "eval/mean_reward"} <= set(events.Tags()["scalars"])


@pytest.mark.slow
def test_what_it_prints_is_true(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for name in ("model", "learning curve", "evaluations", "logs"):
        (path,) = re.findall(rf"^{name}  +(\S+)$", printed, re.MULTILINE)
        assert (folder / path).exists()
    assert f"tensorboard --logdir {Path('demo_output') / 'tensorboard'}\n" in printed
    snippet = "\n".join(line.strip() for line in re.findall(r"Load and play:\n((?:    .+\n){3})", printed)[0].splitlines())
    played = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert played.returncode == 0, played.stderr
    assert float(re.findall(r"\d+\.\d+", played.stdout)[0]) > 300
