"""The MinAtar games under their usual names, with what DQN needs to learn from them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN

from sb3_flipout.envs import minatar
from sb3_flipout.envs.wrappers import ChannelsFirst
from sb3_flipout.layers import FlipoutConv2d
from sb3_flipout.policies.extractors import MinAtarCNN

GAMES = ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")


class Planes(gym.Env):
    """One pixel set, in a place that tells all three dimensions apart."""

    observation_space = spaces.Box(0.0, 1.0, (10, 9, 4), bool)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        observation = np.zeros((10, 9, 4), bool)
        observation[2, 5, 3] = True
        return observation, {}


def game(name: str) -> gym.Env:
    return gym.make(f"MinAtar/{name}-v1", disable_env_checker=True)  # which warns of observations that reset to bool


def test_importing_registers_the_games() -> None:
    assert {f"MinAtar/{name}-v1" for name in GAMES} <= set(gym.registry)


def test_registering_again_changes_nothing() -> None:
    before = dict(gym.registry)
    minatar.register_envs()  # a warning of gymnasium's would fail the test
    assert gym.registry == before


def test_channels_come_first() -> None:
    env = ChannelsFirst(Planes())
    observation, _ = env.reset()
    assert env.observation_space == spaces.Box(0.0, 1.0, (4, 10, 9), np.float32)
    assert env.observation_space.contains(observation)
    assert observation[3, 2, 5] == 1
    assert observation.sum() == 1


def test_channels_first_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"env must have .*\(height, width, channels\), got Box.*leave this wrapper out"):
        ChannelsFirst(gym.make("CartPole-v1"))


@pytest.mark.parametrize("name", GAMES)
def test_steps_of_a_game(name: str) -> None:
    env = ChannelsFirst(game(name))
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    for _ in range(50):
        assert env.observation_space.contains(observation)
        observation, _, terminated, _, _ = env.step(env.action_space.sample())
        if terminated:
            observation, _ = env.reset()


def test_extractor_has_the_published_sizes() -> None:
    space = spaces.Box(0.0, 1.0, (4, 10, 10), np.float32)
    extractor = MinAtarCNN(space)
    shapes = [tuple(parameter.shape) for parameter in extractor.parameters()]
    assert shapes == [(16, 4, 3, 3), (16,), (128, 16 * 8 * 8), (128,)]
    assert extractor(th.zeros(5, 4, 10, 10)).shape == (5, 128)
    assert MinAtarCNN(spaces.Box(0.0, 1.0, (2, 7, 9), np.float32), 10)(th.zeros(1, 2, 7, 9)).shape == (1, 10)


def test_dqn_learns_from_them(tmp_path: Path) -> None:
    policy_kwargs = dict(net_arch=[], features_extractor_class=MinAtarCNN)
    no_epsilon = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    env = ChannelsFirst(game("Breakout"))
    model = DQN("FlipoutMlpPolicy", env, buffer_size=100, learning_starts=20, policy_kwargs=policy_kwargs, **no_epsilon)
    model.learn(60)
    assert model.policy.learning.step == 10
    assert any(isinstance(module, FlipoutConv2d) for module in model.policy.q_net.modules())
    model.save(tmp_path / "model.zip")
    again = DQN.load(tmp_path / "model.zip", custom_objects={"buffer_size": 1})
    observation = th.rand(3, 4, 10, 10)
    assert th.equal(model.policy.q_net(observation), again.policy.q_net(observation))


@pytest.mark.parametrize("missing", ["minatar", "minatar.gym"])
def test_names_the_extra_when_the_package_is_missing(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import sb3_flipout.envs; import sb3_flipout.envs.minatar"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert "ImportError: the MinAtar games need minatar" in result.stderr
    assert "pip install 'sb3_flipout[minatar]'" in result.stderr
