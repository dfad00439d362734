"""The demo end to end: weight noise learns the treasure, epsilon-greedy does not, and what it leaves is what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from stable_baselines3 import DQN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sb3_flipout.envs import DeepSea
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
def test_weight_noise_learns_the_treasure_and_epsilon_greedy_does_not(demo: tuple[Path, str]) -> None:
    found, dives, stock = map(
        int, re.findall(r"found the treasure (\d+) times in (\d+) dives; .* found it (\d+) times", demo[1])[0]
    )
    assert found > 90
    assert dives <= 800
    assert stock < 10
    assert "np." not in demo[1]


@pytest.mark.slow
def test_the_model_loads_and_its_members_vote_for_the_treasure(demo: tuple[Path, str]) -> None:
    model = DQN.load(demo[0] / "demo_output" / "flipout_dqn_deep_sea.zip", device="cpu")
    assert isinstance(model.policy, FlipoutPolicyMixin)
    env = DeepSea(14, mapping_seed=0)
    obs, info = env.reset(seed=0)
    for _ in range(14):
        obs, _, _, _, info = env.step(model.predict(obs, deterministic=True)[0])
    assert info["reached_goal"]
    stock = DQN.load(demo[0] / "demo_output" / "stock_dqn_deep_sea.zip", device="cpu")
    assert not isinstance(stock.policy, FlipoutPolicyMixin)


@pytest.mark.slow
def test_there_is_a_picture(demo: tuple[Path, str]) -> None:
    image = matplotlib.image.imread(demo[0] / "demo_output" / "treasure.png")
    assert image.shape[0] > 300
    assert image.shape[1] > 900
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flipout", "stock"])
def test_tensorboard_logs_hold_the_scalars(demo: tuple[Path, str], name: str) -> None:
    events = EventAccumulator(str(demo[0] / "demo_output" / "tensorboard" / f"{name}_1")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"rollout/ep_rew_mean", "rollout/treasure_rate", "train/loss"} <= tags
    assert any(tag.startswith("noise/") for tag in tags) == (name == "flipout")


@pytest.mark.slow
def test_what_it_prints_is_true(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    for name in ("picture", "model", "logs"):
        (path,) = re.findall(rf"^{name}  +(\S+)$", printed, re.MULTILINE)
        assert (folder / path).exists()
    assert f"tensorboard --logdir {Path('demo_output') / 'tensorboard'}" in printed
    for script in re.findall(r"python (examples/\S+\.py)", printed):
        assert (DEMO.parent.parent / script).exists()


def test_a_small_sea_is_learned_at_once(tmp_path: Path) -> None:
    """The fast tier: the same script on a sea of 3 x 3, without the comparison."""
    result = run_demo("--size", "3", "--no-comparison", "--out", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Learned: weight noise found the treasure" in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"flipout_dqn_deep_sea.zip", "tensorboard", "treasure.png"}
