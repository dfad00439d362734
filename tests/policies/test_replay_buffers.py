"""SB3's other replay buffers work with value-based policies: no noise is stored, so they need to know nothing of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_flipout.layers import FlipoutLayer

HER = dict(n_sampled_goal=4, goal_selection_strategy="future")
#: Name -> (class of the buffer, arguments of the algorithm).
BUFFERS: dict[str, tuple[type[ReplayBuffer], dict[str, Any]]] = {
    "her": (HerReplayBuffer, dict(replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs=HER)),
    "n-steps": (NStepReplayBuffer, dict(n_steps=3)),
    "memory": (
        ReplayBuffer,
        dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
    ),
}
CASES = [(DQN, "her"), (DQN, "n-steps"), (DQN, "memory"), (QRDQN, "her"), (QRDQN, "memory")]  # QRDQN has no n_steps


def bits(n_envs: int) -> VecEnv:
    return make_vec_env(lambda: BitFlippingEnv(n_bits=4, continuous=False, max_steps=4), n_envs=n_envs, seed=0)


def build(algorithm: type[BaseAlgorithm], buffer: str, policy: str = "Flipout", **kwargs: Any) -> BaseAlgorithm:
    env, network = (bits(2), "MultiInputPolicy") if buffer == "her" else (vector_env("discrete", 2), "MlpPolicy")
    arguments = dict(learning_starts=20, batch_size=8, buffer_size=60, train_freq=2, target_update_interval=10, seed=1)
    epsilon = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    return algorithm(policy + network, env, **{**arguments, **epsilon, **BUFFERS[buffer][1], **kwargs}, device="cpu")


@pytest.mark.parametrize(("algorithm", "buffer"), CASES)
@pytest.mark.parametrize(
    "noise", [{}, dict(resample="episode", base_every_steps=4), dict(members=5, prior_scale=2.0, target_noise="same")]
)
def test_learns_under_fresh_noise(algorithm: type[BaseAlgorithm], buffer: str, noise: dict[str, Any]) -> None:
    model = build(algorithm, buffer, policy_kwargs=dict(noise, learn_sigma=True))
    assert type(model.replay_buffer) is BUFFERS[buffer][0]
    layers = [layer for layer in model.policy.online.modules() if isinstance(layer, FlipoutLayer)]
    before = [layer.weight_sigma.clone() for layer in layers]
    drawn: list[tuple[int, int, th.Tensor]] = []
    rows = model.policy.learning.rows

    def record(role: int, n: int, device: th.device, *batch: Any) -> Any:
        drawn.append((model.policy.learning.step, role, rows(role, n, device, *batch).keys))
        return rows(role, n, device, *batch)

    model.policy.learning.rows = record
    model.learn(150)  # more than the buffer holds
    assert model.replay_buffer.full
    for layer, old in zip(layers, before, strict=True):
        assert not th.equal(layer.weight_sigma, old)
    steps = model.policy.learning.step
    assert steps > 30
    assert [(step, role) for step, role, _ in drawn] == [(step, role) for step in range(steps) for role in (1, 0)]
    keys = th.cat([keys for _, role, keys in drawn if role == 0])
    assert keys.numel() == 8 * steps
    if "members" not in noise:
        assert keys.unique().numel() == keys.numel()


@pytest.mark.parametrize(("algorithm", "buffer"), CASES)
def test_sigma_frozen_at_zero_is_stock_bit_for_bit(algorithm: type[BaseAlgorithm], buffer: str) -> None:
    theirs = build(algorithm, buffer, policy="").learn(150)
    ours = build(algorithm, buffer, policy_kwargs=dict(sigma_init=0.0, learn_sigma=False)).learn(150)
    own = ours.policy.state_dict()
    for name, value in theirs.policy.state_dict().items():
        assert th.equal(value, own[name]), name
    np.testing.assert_array_equal(ours.replay_buffer.actions, theirs.replay_buffer.actions)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [{}, dict(members=5, prior_scale=1.0, resample="episode", target_noise="same")])
def test_hindsight_solves_bit_flipping(noise: dict[str, Any]) -> None:
    settings = dict(learning_rate=1e-3, buffer_size=10_000, batch_size=64, train_freq=1, target_update_interval=50, gamma=0.9)
    kwargs = dict(net_arch=[64], **noise)
    model = build(DQN, "her", policy_kwargs=kwargs, **settings).learn(3000)
    states = np.array([list(np.binary_repr(number, 4)) for number in range(15)], dtype=np.int8)  # all but the goal, 1111
    goals = np.ones_like(states)
    actions, _ = model.predict(dict(observation=states, achieved_goal=states, desired_goal=goals), deterministic=True)
    assert np.all(states[np.arange(15), actions] == 0), "in every state it flips a bit that is wrong"
