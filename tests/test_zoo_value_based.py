"""RL Zoo's commands work on zoo_configs/dqn.yml and qrdqn.yml, and these differ from RL Zoo's only as they say."""

from __future__ import annotations

import importlib.util
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium import spaces
from rl_zoo3.utils import get_class_by_name, get_wrapper_class
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from test_zoo import REPOSITORY, zoo

from sb3_flipout.envs import minatar
from sb3_flipout.policies import FlipoutPolicyMixin
from sb3_flipout.policies.extractors import MinAtarCNN

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {"dqn": DQN, "qrdqn": QRDQN}
CONFIGS = {name: yaml.safe_load((REPOSITORY / "zoo_configs" / f"{name}.yml").read_text()) for name in ALGORITHMS}
CASES = [(algorithm, env) for algorithm, config in CONFIGS.items() for env in config]
NO_EPSILON = {"exploration_initial_eps": 0.0, "exploration_final_eps": 0.0}

# Written out, since LunarLander needs Box2D to be made: (observations, number of actions).
SPACES: dict[str, tuple[spaces.Box, int]] = {
    "CartPole-v1": (spaces.Box(-1, 1, (4,)), 2),
    "MountainCar-v0": (spaces.Box(-1, 1, (2,)), 3),
    "LunarLander-v3": (spaces.Box(-1, 1, (8,)), 4),
    "Acrobot-v1": (spaces.Box(-1, 1, (6,)), 3),
    "atari": (spaces.Box(0, 255, (4, 84, 84), np.uint8), 6),
    # Behind ChannelsFirst; the channels differ.
    "MinAtar/Breakout-v1": (spaces.Box(0, 1, (4, 10, 10)), 3),
    "MinAtar/Asterix-v1": (spaces.Box(0, 1, (4, 10, 10)), 5),
    "MinAtar/Freeway-v1": (spaces.Box(0, 1, (7, 10, 10)), 3),
    "MinAtar/Seaquest-v1": (spaces.Box(0, 1, (10, 10, 10)), 6),
    "MinAtar/SpaceInvaders-v1": (spaces.Box(0, 1, (6, 10, 10)), 4),
}
MINATAR = [env for env in SPACES if env.startswith("MinAtar/")]  # of these RL Zoo has no settings
NAMES = {"get_class_by_name": get_class_by_name}  # of what RL Zoo lets policy_kwargs use, what ours do


class SpacesOnly(gym.Env):
    """Has the spaces of an environment, and cannot be played."""

    def __init__(self, env: str) -> None:
        self.observation_space, n_actions = SPACES[env]
        self.action_space = spaces.Discrete(n_actions)


def policy_kwargs(algorithm: str, env: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = eval(CONFIGS[algorithm][env]["policy_kwargs"], dict(NAMES))
    return kwargs


def test_environments() -> None:
    for config in CONFIGS.values():
        assert set(config) == set(SPACES)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_header_gives_the_commands(algorithm: str) -> None:
    path = f"zoo_configs/{algorithm}.yml"
    header = (REPOSITORY / path).read_text()
    assert f"rl_zoo3.train --algo {algorithm} --env CartPole-v1 --conf-file {path} --gym-packages sb3_flipout\n" in header
    assert f"rl_zoo3.enjoy --algo {algorithm} --env CartPole-v1 --folder logs --no-render\n" in header


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
    assert model.exploration_initial_eps == model.exploration_final_eps == 0.0
    assert model.exploration_fraction > 0  # SB3 divides by it


@pytest.mark.parametrize(("algorithm", "env"), [case for case in CASES if case[1] not in MINATAR])
def test_differs_from_rl_zoo_only_as_stated(algorithm: str, env: str) -> None:
    spec = importlib.util.find_spec("rl_zoo3")
    assert spec is not None
    assert spec.origin is not None
    stock = yaml.safe_load((Path(spec.origin).parent / "hyperparams" / f"{algorithm}.yml").read_text())[env]
    ours = dict(CONFIGS[algorithm][env])
    assert {name: ours.pop(name) for name in NO_EPSILON} == NO_EPSILON
    for name in NO_EPSILON:
        stock.pop(name, None)
    assert ours.pop("policy") == "Flipout" + stock.pop("policy")
    kwargs, stock_kwargs = (eval(config.pop("policy_kwargs", "dict()")) for config in (ours, stock))
    assert stock_kwargs.items() <= kwargs.items()
    assert ours == stock


@pytest.mark.parametrize(("algorithm", "env"), [case for case in CASES if case[1] in MINATAR])
def test_minatar_games_get_these_spaces(algorithm: str, env: str) -> None:
    config = CONFIGS[algorithm][env]
    assert config == CONFIGS[algorithm][MINATAR[0]]
    wrap = get_wrapper_class(config)
    assert wrap is not None
    game = wrap(gym.spec(env).make(**config["env_kwargs"]))
    assert (game.observation_space, game.action_space.n) == SPACES[env]
    assert isinstance(game, minatar.ChannelsFirst)
    assert game.spec.max_episode_steps == 5000


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_minatar_commands_are_there(algorithm: str) -> None:
    path = f"zoo_configs/{algorithm}.yml"
    text = (REPOSITORY / path).read_text().replace(" \\\n#    ", "")
    packages = "--gym-packages sb3_flipout.envs.minatar\n"
    assert f"rl_zoo3.train --algo {algorithm} --env MinAtar/Breakout-v1 --conf-file {path} {packages}" in text
    assert f"rl_zoo3.enjoy --algo {algorithm} --env MinAtar/Breakout-v1 --folder logs --no-render {packages}" in text


# ---- the commands ---------------------------------------------------------------------------------------------------


def package(env: str) -> str:
    return "sb3_flipout.envs.minatar" if env in MINATAR else "sb3_flipout"


def train(algorithm: str, env: str, steps: int, folder: Path, *arguments: str) -> BaseAlgorithm:
    """Train by the command of the header, shortened, and load what it saved."""
    path = f"zoo_configs/{algorithm}.yml"
    command = ["--algo", algorithm, "--env", env, "--conf-file", path, "--gym-packages", package(env)]
    zoo("train", *command, "-n", str(steps), "-f", str(folder), "--seed", "1", *arguments)
    name = env.replace("/", "-")
    saved = folder / algorithm / f"{name}_1" / f"{name}.zip"
    # The buffer is not in the zip, and would be made anew.
    model = ALGORITHMS[algorithm].load(saved, device="cpu", custom_objects={"buffer_size": 1})
    assert model.num_timesteps >= steps
    assert model.policy.learning.step > 0  # gradient steps were taken
    return model


def assert_stated_noise(model: BaseAlgorithm, algorithm: str, env: str) -> None:
    assert type(model.policy) is ALGORITHMS[algorithm].policy_aliases[CONFIGS[algorithm][env]["policy"]]
    stated = policy_kwargs(algorithm, env)
    for name in ("family", "sigma_init", "learn_sigma", "resample", "perturb", "target_noise"):
        assert getattr(model.policy.noise_settings, name) == stated[name]
    assert model.exploration_rate == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_train_then_enjoy(algorithm: str, tmp_path: Path) -> None:
    env = "CartPole-v1"
    model = train(algorithm, env, 1536, tmp_path)
    assert_stated_noise(model, algorithm, env)
    if algorithm == "qrdqn":
        assert model.policy.n_quantiles == policy_kwargs(algorithm, env)["n_quantiles"]

    play = ["--algo", algorithm, "--env", env, "--folder", str(tmp_path), "--no-render", "-n", "600"]
    rewards = [
        [line for line in zoo("enjoy", *play, *packages).splitlines() if line.startswith("Mean reward")]
        for packages in ([], ["--gym-packages", "sb3_flipout"])  # the saved policy imports the plugin by itself
    ]
    assert len(rewards[0]) == 1
    assert rewards[0] == rewards[1]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_noise_from_the_command_line(algorithm: str, tmp_path: Path) -> None:
    override = "policy_kwargs:dict(net_arch=[16], members=5, prior_scale=1.0, resample='episode')"
    model = train(algorithm, "CartPole-v1", 1280, tmp_path, "--hyperparams", override)
    assert (model.policy.noise_settings.members, model.policy.noise_settings.prior_scale) == (5, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_atari(algorithm: str, tmp_path: Path) -> None:
    small = ["--hyperparams", "learning_starts:100", "buffer_size:1000"]
    model = train(algorithm, "PongNoFrameskip-v4", 200, tmp_path, *small)
    assert_stated_noise(model, algorithm, "atari")
    assert model.observation_space.shape == (4, 84, 84)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_minatar(algorithm: str, tmp_path: Path) -> None:
    env = "MinAtar/Breakout-v1"
    small = ["--hyperparams", "learning_starts:100", "buffer_size:1000"]
    limit = ["--eval-env-kwargs", "max_episode_steps:50", "disable_env_checker:True"]
    model = train(algorithm, env, 400, tmp_path, *small, "--eval-freq", "200", "--eval-episodes", "2", *limit)
    assert_stated_noise(model, algorithm, env)
    assert isinstance(model.policy.online.features_extractor, MinAtarCNN)
    assert model.observation_space.shape == (4, 10, 10)

    play = ["--algo", algorithm, "--env", env, "--folder", str(tmp_path), "--no-render", "-n", "300"]
    printed = zoo("enjoy", *play, "--gym-packages", package(env))
    assert "Mean reward" in printed
