"""RL Zoo's commands work on the configurations of SAC, TD3, DDPG, TQC and CrossQ, and these differ from RL Zoo's as stated."""

from __future__ import annotations

import importlib.util
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml
from gymnasium import spaces
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from test_zoo import REPOSITORY, zoo

from sb3_flipout.policies import FlipoutPolicyMixin

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"sac": SAC, "td3": TD3, "ddpg": DDPG, "tqc": TQC, "crossq": CrossQ}
CONFIGS = {name: yaml.safe_load((REPOSITORY / "zoo_configs" / f"{name}.yml").read_text()) for name in ALGORITHMS}
CASES = [(algorithm, env) for algorithm, config in CONFIGS.items() for env in config]

# Exploration that weight noise takes the place of.
ACTION_NOISE = {"noise_type", "noise_std"}
GSDE, GSDE_POLICY = {"use_sde"}, {"log_std_init", "use_expln"}

# Written out, since LunarLander needs Box2D to be made: lengths of observations and actions.
SIZES = {"Pendulum-v1": (3, 1), "MountainCarContinuous-v0": (2, 1), "LunarLanderContinuous-v3": (8, 2)}


class SpacesOnly(gym.Env):
    """Has the spaces of an environment, and cannot be played."""

    def __init__(self, env: str) -> None:
        n_observations, n_actions = SIZES[env]
        self.observation_space = spaces.Box(-1, 1, (n_observations,))
        self.action_space = spaces.Box(-1, 1, (n_actions,))


def policy_kwargs(algorithm: str, env: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = eval(CONFIGS[algorithm][env]["policy_kwargs"])
    return kwargs


def test_environments() -> None:
    for config in CONFIGS.values():
        assert set(config) == set(SIZES)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_header_gives_the_commands(algorithm: str) -> None:
    path = f"zoo_configs/{algorithm}.yml"
    header = (REPOSITORY / path).read_text()
    assert f"rl_zoo3.train --algo {algorithm} --env Pendulum-v1 --conf-file {path} --gym-packages sb3_flipout\n" in header
    assert f"rl_zoo3.enjoy --algo {algorithm} --env Pendulum-v1 --folder logs --no-render\n" in header


@pytest.mark.parametrize(("algorithm", "env"), CASES)
def test_policy_takes_its_settings(algorithm: str, env: str) -> None:
    config, algorithm_class, stated = CONFIGS[algorithm][env], ALGORITHMS[algorithm], policy_kwargs(algorithm, env)
    # RL Zoo turns the learning rate into a schedule; of the buffer only a small one is made.
    known = set(signature(algorithm_class).parameters) - {"learning_rate", "policy_kwargs"}
    settings = {name: value for name, value in config.items() if name in known} | {"buffer_size": 100}
    model = algorithm_class(env=SpacesOnly(env), policy_kwargs=stated, device="cpu", **settings)

    assert type(model.policy) is algorithm_class.policy_aliases[config["policy"]]
    assert isinstance(model.policy, FlipoutPolicyMixin)
    noise = {name: value for name, value in stated.items() if hasattr(model.policy.noise_settings, name)}
    assert {"family", "sigma_init", "resample", "target_noise"} <= set(noise)  # the noise is stated
    for name, value in noise.items():
        assert getattr(model.policy.noise_settings, name) == value
    assert model.action_noise is None
    assert not model.use_sde
    assert noise["resample"] == "episode"


@pytest.mark.parametrize(("algorithm", "env"), CASES)
def test_differs_from_rl_zoo_only_as_stated(algorithm: str, env: str) -> None:
    spec = importlib.util.find_spec("rl_zoo3")
    assert spec is not None
    assert spec.origin is not None
    stock = yaml.safe_load((Path(spec.origin).parent / "hyperparams" / f"{algorithm}.yml").read_text())[env]
    ours = dict(CONFIGS[algorithm][env])
    assert ours.pop("policy") == "Flipout" + stock.pop("policy")
    kwargs, stock_kwargs = (eval(config.pop("policy_kwargs", "dict()")) for config in (ours, stock))
    left_out = ACTION_NOISE if algorithm in ("td3", "ddpg") else GSDE
    assert {name: value for name, value in stock.items() if name not in left_out} == ours
    noise = {name for name in kwargs if name not in stock_kwargs}
    assert noise == {"family", "sigma_init", "learn_sigma", "resample", "perturb", "target_noise"}
    assert {name: kwargs.get(name) for name in stock_kwargs.keys() - GSDE_POLICY} == {
        name: value for name, value in stock_kwargs.items() if name not in GSDE_POLICY
    }


# ---- the commands ---------------------------------------------------------------------------------------------------

#: Steps of training, the last 300 of them with gradient steps; CrossQ's critics are wide.
STEPS = {"sac": 2000, "td3": 2000, "ddpg": 2000, "tqc": 2000, "crossq": 400}


def train(algorithm: str, env: str, steps: int, folder: Path, *arguments: str) -> BaseAlgorithm:
    """Train by the command of the header, shortened, and load what it saved."""
    path = f"zoo_configs/{algorithm}.yml"
    command = ["--algo", algorithm, "--env", env, "--conf-file", path, "--gym-packages", "sb3_flipout"]
    zoo("train", *command, "-n", str(steps), "-f", str(folder), "--seed", "1", *arguments)
    saved = folder / algorithm / f"{env}_1" / f"{env}.zip"
    # The buffer is not in the zip, and would be made anew.
    model = ALGORITHMS[algorithm].load(saved, device="cpu", custom_objects={"buffer_size": 1})
    assert model.num_timesteps >= steps
    assert model.policy.learning.step > 0  # gradient steps were taken
    return model


def assert_stated_noise(model: BaseAlgorithm, algorithm: str, env: str) -> None:
    assert type(model.policy) is ALGORITHMS[algorithm].policy_aliases["FlipoutMlpPolicy"]
    stated = policy_kwargs(algorithm, env)
    for name in ("family", "sigma_init", "learn_sigma", "resample", "perturb", "target_noise"):
        assert getattr(model.policy.noise_settings, name) == stated[name]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_train_then_enjoy(algorithm: str, tmp_path: Path) -> None:
    env = "Pendulum-v1"
    steps = STEPS[algorithm]
    model = train(algorithm, env, steps, tmp_path, "--hyperparams", f"learning_starts:{steps - 300}")
    assert_stated_noise(model, algorithm, env)

    play = ["--algo", algorithm, "--env", env, "--folder", str(tmp_path), "--no-render", "-n", "600"]
    rewards = [
        [line for line in zoo("enjoy", *play, *packages).splitlines() if line.startswith("Mean reward")]
        for packages in ([], ["--gym-packages", "sb3_flipout"])  # the saved policy imports the plugin by itself
    ]
    assert len(rewards[0]) == 1
    assert rewards[0] == rewards[1]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mountain_car(algorithm: str, tmp_path: Path) -> None:
    env = "MountainCarContinuous-v0"
    model = train(algorithm, env, 256, tmp_path)
    assert_stated_noise(model, algorithm, env)


@pytest.mark.slow
def test_noise_from_the_command_line(tmp_path: Path) -> None:
    override = "policy_kwargs:dict(net_arch=[16], family='isotropic', sigma_init=0.2, resample='episode')"
    model = train("ddpg", "Pendulum-v1", 400, tmp_path, "--hyperparams", override, "learning_starts:100")
    settings = model.policy.noise_settings
    assert (settings.family, settings.sigma_init, settings.resample) == ("isotropic", 0.2, "episode")
