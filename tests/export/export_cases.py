"""A model of each kind of policy."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from torch import nn

from sb3_flipout import FlipES
from sb3_flipout.policies.extractors import OneHotExtractor

VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT = spaces.Dict({"vector": VECTOR, "number": spaces.Discrete(3)})
BOX, DISCRETE = spaces.Box(-2, 2, (2,)), spaces.Discrete(3)
SMALL: dict[str, Any] = dict(net_arch=[8])


class Spaces(gym.Env[Any, Any]):
    """Has spaces, and random transitions."""

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space = observation, action

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**kwargs)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


CASES: dict[str, tuple[Any, str, Any, Any, dict[str, Any]]] = {
    "ppo": (PPO, "FlipoutMlpPolicy", VECTOR, BOX, dict(SMALL, activation_fn=nn.ELU, log_std_init=-1.0)),
    "ppo, image": (PPO, "FlipoutCnnPolicy", IMAGE, DISCRETE, {}),
    "a2c, dict": (A2C, "FlipoutMultiInputPolicy", DICT, spaces.MultiDiscrete([2, 3]), SMALL),
    "trpo": (TRPO, "FlipoutMlpPolicy", spaces.MultiBinary(4), spaces.MultiBinary(2), dict(SMALL, family="factorised")),
    "maskable": (MaskablePPO, "FlipoutMlpPolicy", VECTOR, DISCRETE, SMALL),
    "lstm": (RecurrentPPO, "FlipoutMlpLstmPolicy", VECTOR, DISCRETE, dict(SMALL, lstm_hidden_size=8)),
    "dqn, members": (DQN, "FlipoutMlpPolicy", VECTOR, DISCRETE, dict(SMALL, members=3, prior_scale=0.5)),
    "dqn, integers": (DQN, "FlipoutMlpPolicy", spaces.Discrete(9), DISCRETE, SMALL),
    "dqn, look-up": (
        DQN,
        "FlipoutMlpPolicy",
        spaces.Discrete(9),
        DISCRETE,
        dict(SMALL, members=3, prior_scale=0.5, features_extractor_class=OneHotExtractor),
    ),
    "qrdqn": (QRDQN, "FlipoutMlpPolicy", VECTOR, DISCRETE, dict(SMALL, n_quantiles=5, skip=["*.0"])),
    "sac": (SAC, "FlipoutMlpPolicy", VECTOR, BOX, SMALL),
    "td3": (TD3, "FlipoutMlpPolicy", VECTOR, BOX, dict(SMALL, sigma_init=0.1)),
    "ddpg": (DDPG, "FlipoutMlpPolicy", VECTOR, BOX, SMALL),
    "tqc": (TQC, "FlipoutMlpPolicy", VECTOR, BOX, SMALL),
    "crossq": (CrossQ, "FlipoutMlpPolicy", VECTOR, BOX, SMALL),
    "sac, matrix of actions": (SAC, "FlipoutMlpPolicy", VECTOR, spaces.Box(-2, 2, (1, 2)), SMALL),
    "ppo, matrix of actions": (PPO, "FlipoutMlpPolicy", VECTOR, spaces.Box(-2, 2, (2, 2)), SMALL),
    "flipes": (FlipES, "FlipoutMlpPolicy", VECTOR, BOX, SMALL),
}


def build(case: str) -> Any:
    kind, policy, observation, action, kwargs = CASES[case]
    greedy = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0) if kind in (DQN, QRDQN) else {}
    return kind(policy, Spaces(observation, action), policy_kwargs=dict(kwargs), seed=3, device="cpu", **greedy)
