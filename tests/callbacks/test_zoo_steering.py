"""The callbacks work from RL Zoo's YAML files, by dotted name with plain arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm

CONFIGS = {
    "ppo": """
CartPole-v1:
  policy: FlipoutMlpPolicy
  n_envs: 2
  n_timesteps: 512
  n_steps: 64
  batch_size: 64
  callback:
    - sb3_flipout.callbacks.AnnealNoise:
        start: 1.0
        end: 0.25
        fraction: 0.5
        shape: cosine
        ladder: [0.5, 2.0]
    - sb3_flipout.callbacks.StopOnNonFinite:
        save_path: {folder}/good.zip
        save_every: 200
""",
    "dqn": """
CartPole-v1:
  policy: FlipoutMlpPolicy
  n_timesteps: 400
  learning_starts: 50
  exploration_initial_eps: 0.0
  exploration_final_eps: 0.0
  callback:
    - sb3_flipout.callbacks.AdaptNoise:
        epsilon: [1.0, 0.1, 0.5]
        measure: kl
        alpha: 1.1
        every: 4
    - sb3_flipout.callbacks.StopOnNonFinite:
        save_path: {folder}/good.zip
""",
}
ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "dqn": DQN}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", CONFIGS)
def test_rl_zoo_trains_with_them(algorithm: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    config.write_text(CONFIGS[algorithm].format(folder=tmp_path))
    command = ["--algo", algorithm, "--env", "CartPole-v1", "--conf-file", str(config), "-f", str(tmp_path), "--seed", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "rl_zoo3.train", *command, "--gym-packages", "sb3_flipout", "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    policy = ALGORITHMS[algorithm].load(tmp_path / algorithm / "CartPole-v1_1" / "CartPole-v1.zip").policy
    if algorithm == "ppo":
        assert (policy.noise_scale, policy.noise_ladder) == (0.25, (0.5, 2.0))
    else:
        assert policy.noise_scale != 1.0
    assert (tmp_path / "good.zip").exists()
