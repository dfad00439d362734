"""Warnings point to the user's line, however many lines of SB3's and ours lie between."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

import sb3_flipout
from sb3_flipout.callbacks import AnnealNoise
from sb3_flipout.checks import warn_user

REPLAY: dict[str, Any] = dict(learning_starts=4, batch_size=4, buffer_size=100, device="cpu")
GREEDY = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)


class Bilinear(BaseFeaturesExtractor):
    """Has a layer that stays plain."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 4)
        self.layer = nn.Bilinear(4, 4, 4)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layer(observations, observations)


def dqn(**kwargs: Any) -> DQN:
    return DQN("FlipoutMlpPolicy", "CartPole-v1", **{**REPLAY, **GREEDY, **kwargs})


def a2c(**noise: Any) -> A2C:
    return A2C("FlipoutMlpPolicy", "CartPole-v1", n_steps=5, device="cpu", policy_kwargs=noise)


def epsilon() -> None:
    dqn(exploration_initial_eps=0.5).learn(6)


def noise_that_is_over() -> None:
    a2c().learn(50).learn(10, reset_num_timesteps=False)


def noise_that_is_over_off_policy() -> None:
    dqn().learn(50).learn(10, reset_num_timesteps=False)


def numbers() -> None:
    model = dqn(policy_kwargs=dict(members=4, bootstrap=0.5))
    model.replay_buffer = dqn().learn(6).replay_buffer
    model.learn(6)


def numbers_by_hand() -> None:
    model = dqn(policy_kwargs=dict(members=4, bootstrap=0.5)).learn(6)
    model.replay_buffer = dqn().learn(6).replay_buffer
    model.train(1, 4)


def steered() -> None:
    a2c(schedule="linear").learn(10, callback=AnnealNoise(1.0, 0.5))


def plain_layers_of_a_policy() -> None:
    kwargs = dict(features_extractor_class=Bilinear)
    PPO("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu", policy_kwargs=kwargs)


def plain_layers() -> None:
    sb3_flipout.perturb(nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (epsilon, "epsilon-greedy at once"),
        (noise_that_is_over, "without weight noise"),
        (noise_that_is_over_off_policy, "without weight noise"),
        (numbers, "without the numbers"),
        (numbers_by_hand, "without the numbers"),
        (steered, "has no effect in it"),
        (plain_layers_of_a_policy, "some layers stay plain"),
        (plain_layers, "some layers stay plain"),
        (lambda: warn_user("by itself"), "by itself"),
    ],
)
def test_where_a_warning_points(call: Callable[[], Any], words: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert [one.filename for one in caught] == [__file__] and words in str(caught[0].message)
    assert caught[0].lineno in {line for *_, line in call.__code__.co_lines()}, "not the line that called it"
