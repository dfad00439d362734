"""RL Zoo's own commands work on the configurations in zoo_configs/, and these differ from RL Zoo's only as they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import rl_zoo3.import_envs  # noqa: F401  (registers environments without velocities)
import torch as th
import yaml
from sb3_contrib import TRPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecEnv

from sb3_flipout.policies import FlipoutPolicyMixin

REPOSITORY = Path(__file__).parent.parent
ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "a2c": A2C, "trpo": TRPO, "ppo_lstm": RecurrentPPO}
CONFIGS = {name: yaml.safe_load((REPOSITORY / "zoo_configs" / f"{name}.yml").read_text()) for name in ALGORITHMS}
CASES = [(algorithm, env) for algorithm, config in CONFIGS.items() for env in config]
NAMES = {"th": th, "nn": th.nn, "RMSpropTFLike": RMSpropTFLike}  # what RL Zoo lets policy_kwargs use


def policy_kwargs(algorithm: str, env: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = eval(CONFIGS[algorithm][env]["policy_kwargs"], dict(NAMES))
    return kwargs


def tiny_env(env: str, n_envs: int) -> VecEnv:
    if env != "atari":
        return make_vec_env(env, n_envs=n_envs)
    return make_vec_env(lambda: FakeImageEnv(84, 84, n_channels=4, channel_first=True, discrete=True), n_envs=n_envs)


def test_configurations_are_there() -> None:
    assert set(CONFIGS) == set(ALGORITHMS)
    for algorithm, config in CONFIGS.items():
        needs_memory = "NoVel" if algorithm == "ppo_lstm" else ""
        assert {f"CartPole{needs_memory}-v1", "Acrobot-v1", f"Pendulum{needs_memory}-v1"} <= set(config)
        assert ("atari" in config) == (algorithm != "trpo")  # RL Zoo has none for it


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_header_gives_the_command(algorithm: str) -> None:
    header = (REPOSITORY / "zoo_configs" / f"{algorithm}.yml").read_text()
    path, first = f"zoo_configs/{algorithm}.yml", next(iter(CONFIGS[algorithm]))
    assert f"--algo {algorithm} --env {first} --conf-file {path} --gym-packages sb3_flipout\n" in header


@pytest.mark.parametrize(("algorithm", "env"), CASES)
def test_policy_is_registered_and_takes_its_settings(algorithm: str, env: str) -> None:
    config, algorithm_class = CONFIGS[algorithm][env], ALGORITHMS[algorithm]
    policy_class = algorithm_class.policy_aliases[config["policy"]]
    assert issubclass(policy_class, FlipoutPolicyMixin)

    known = set(signature(algorithm_class).parameters) - {
        "learning_rate",
        "clip_range",
        "policy_kwargs",
    }  # strings that RL Zoo reads
    settings = {name: value for name, value in config.items() if name in known}
    model = algorithm_class(
        env=tiny_env(env, config["n_envs"]), policy_kwargs=policy_kwargs(algorithm, env), device="cpu", **settings
    )
    assert type(model.policy) is policy_class
    for name, value in policy_kwargs(algorithm, env).items():
        if hasattr(model.policy.noise_settings, name):
            assert getattr(model.policy.noise_settings, name) == value
    assert {"family", "sigma_init", "resample"} <= set(policy_kwargs(algorithm, env))  # the noise is stated


@pytest.mark.parametrize(("algorithm", "env"), CASES)
def test_differs_from_rl_zoo_only_as_stated(algorithm: str, env: str) -> None:
    spec = importlib.util.find_spec("rl_zoo3")
    assert spec is not None
    assert spec.origin is not None
    stock = yaml.safe_load((Path(spec.origin).parent / "hyperparams" / f"{algorithm}.yml").read_text())[env]
    ours = dict(CONFIGS[algorithm][env])
    if env == "atari":
        assert (stock.pop("ent_coef"), ours.pop("ent_coef")) == (0.01, 0.0)
    assert ours.pop("policy") == "Flipout" + stock.pop("policy")
    kwargs, stock_kwargs = (eval(config.pop("policy_kwargs", "dict()"), dict(NAMES)) for config in (ours, stock))
    assert stock_kwargs.items() <= kwargs.items()
    assert ours == stock


# ---- the commands ---------------------------------------------------------------------------------------------------


def zoo(module: str, *arguments: str) -> str:
    """Run one of RL Zoo's commands in the repository and give what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", f"rl_zoo3.{module}", *arguments, "--num-threads", "1", "--device", "cpu"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def train(algorithm: str, env: str, steps: int, folder: Path, *arguments: str) -> BaseAlgorithm:
    """Train by the command of the header, shortened, and load what it saved."""
    command = [
        "--algo",
        algorithm,
        "--env",
        env,
        "--conf-file",
        f"zoo_configs/{algorithm}.yml",
        "--gym-packages",
        "sb3_flipout",
    ]
    zoo("train", *command, "-n", str(steps), "-f", str(folder), "--seed", "1", *arguments)
    model = ALGORITHMS[algorithm].load(folder / algorithm / f"{env}_1" / f"{env}.zip", device="cpu")
    assert isinstance(model.policy, FlipoutPolicyMixin)
    assert model.num_timesteps >= steps
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "env", "steps"),
    [
        ("ppo", "CartPole-v1", 1024),
        ("a2c", "CartPole-v1", 800),
        ("trpo", "CartPole-v1", 4096),
        ("ppo", "Pendulum-v1", 4096),
        ("a2c", "Pendulum-v1", 640),
        ("trpo", "Pendulum-v1", 4096),
        ("trpo", "Acrobot-v1", 4096),
        ("ppo_lstm", "CartPoleNoVel-v1", 512),
        ("ppo_lstm", "PendulumNoVel-v1", 4096),
    ],
)
def test_train_then_enjoy(algorithm: str, env: str, steps: int, tmp_path: Path) -> None:
    model = train(algorithm, env, steps, tmp_path)
    noise = model.policy.noise_settings
    stated = policy_kwargs(algorithm, env)
    assert (noise.family, noise.sigma_init, noise.resample) == (stated["family"], stated["sigma_init"], stated["resample"])

    play = ["--algo", algorithm, "--env", env, "--folder", str(tmp_path), "--no-render", "-n", "600"]
    rewards = [
        [line for line in zoo("enjoy", *play, *packages).splitlines() if line.startswith("Mean reward")]
        for packages in ([], ["--gym-packages", "sb3_flipout"])  # the saved policy imports the plugin by itself
    ]
    assert len(rewards[0]) == 1
    assert rewards[0] == rewards[1]


@pytest.mark.slow
def test_noise_from_the_command_line(tmp_path: Path) -> None:
    override = "policy_kwargs:dict(family='factorised', sigma_init=0.3)"
    model = train("ppo", "CartPole-v1", 256, tmp_path, "--hyperparams", override)
    assert model.policy.noise_settings.family == "factorised"
    assert model.policy.noise_settings.sigma_init == 0.3


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [algorithm for algorithm, env in CASES if env == "atari"])
def test_atari(algorithm: str, tmp_path: Path) -> None:
    small = ["n_envs:2", "n_steps:64", *(["batch_size:64", "n_epochs:1"] if algorithm.startswith("ppo") else [])]
    model = train(algorithm, "PongNoFrameskip-v4", 256, tmp_path, "--hyperparams", *small)
    assert type(model.policy) is ALGORITHMS[algorithm].policy_aliases[CONFIGS[algorithm]["atari"]["policy"]]
    assert model.policy.noise_settings.sigma_init == policy_kwargs(algorithm, "atari")["sigma_init"]
    assert model.observation_space.shape == (4, 84, 84)
