"""GuardedSubprocVecEnv tells which environment raised, died or hangs, by each start method, and leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import sb3_flipout
from sb3_flipout.envs.subprocesses import GuardedSubprocVecEnv

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other processes cannot import tests

SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in ("forkserver", "spawn")]  # each imports torch anew
METHODS = pytest.mark.parametrize("method", ["fork", *SLOW])


class Counting(gym.Env[Any, Any]):
    """Goes wrong in one of its steps."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, fault: str = "", at: int = 3) -> None:
        if fault == "made":
            raise ArithmeticError("not made")
        self.fault, self.at, self.steps = fault, at, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self.fault == "reset":
            raise ArithmeticError("not reset")
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == self.at:
            if self.fault == "raises":
                raise ArithmeticError("what went wrong")
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "hangs":
                time.sleep(3600)
        return np.full(1, self.steps, np.float32), 1.0, False, self.steps % 20 == 0, {}


def envs(fault: str, method: str, timeout: float | None = 60.0) -> GuardedSubprocVecEnv:
    return GuardedSubprocVecEnv([Counting, lambda: Counting(fault), Counting], start_method=method, timeout=timeout)


def gone(env: Any) -> bool:
    return not any(process.is_alive() for process in env.processes)


@METHODS
def test_what_goes_right_is_as_in_sb3s(method: str) -> None:
    found, expected = envs("", method), DummyVecEnv([Counting] * 3)
    try:
        assert np.array_equal(found.reset(), expected.reset())
        for _ in range(25):
            for one, other in zip(found.step(np.zeros(3, int))[:3], expected.step(np.zeros(3, int))[:3], strict=True):
                assert np.array_equal(one, other)
        assert found.get_attr("steps") == [25, 25, 25] and isinstance(found, SubprocVecEnv)
    finally:
        found.close()
    assert gone(found) and not found._notes.exists()
    found.close()


@METHODS
def test_an_error_is_told_with_where_it_was(method: str) -> None:
    env = envs("raises", method)
    env.reset()
    with pytest.raises(RuntimeError, match=r"(?s)^environment 1 of 3 raised, in its process:\nTraceback.*: what went wrong"):
        for _ in range(3):
            env.step(np.zeros(3, int))
    assert gone(env)
    with pytest.raises(RuntimeError, match=r"have been closed, by close\(\) or because one of them failed"):
        env.step(np.zeros(3, int))
    env.close()


@METHODS
def test_an_environment_that_cannot_be_made(method: str) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)^environment 1 of 3 raised, in its process:\n.*not made"):
        envs("made", method)
    assert not [one for one in multiprocessing.active_children() if one.name.startswith(("Fork", "Spawn"))]


def test_an_error_of_a_reset() -> None:
    env = envs("reset", "fork")
    with pytest.raises(RuntimeError, match=r"(?s)^environment 1 of 3 raised.*not reset"):
        env.reset()
    env.close()


@METHODS
def test_a_process_that_is_killed(method: str) -> None:
    env = envs("dies", method)
    env.reset()
    with pytest.raises(RuntimeError, match=r"^the process of environment 1 of 3 was killed by signal 9, and said nothing"):
        for _ in range(3):
            env.step(np.zeros(3, int))
    assert gone(env)
    env.close()


def test_a_process_that_is_killed_between_steps() -> None:
    env = envs("", "fork")
    env.reset()
    env.processes[2].kill()
    env.processes[2].join()
    with pytest.raises(RuntimeError, match=r"^the process of environment 2 of 3 was killed by signal 9"):
        env.step(np.zeros(3, int))
    env.close()


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_a_training_whose_environment_hangs_ends_and_can_be_resumed(algorithm: Any, tmp_path: Path) -> None:
    def make(fault: str, at: int = 1000) -> GuardedSubprocVecEnv:
        return GuardedSubprocVecEnv([Counting, lambda: Counting(fault, at)], start_method="fork", timeout=2.0)

    off_policy = dict(learning_starts=8, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    settings: dict[str, Any] = dict(n_steps=8, batch_size=8) if algorithm is PPO else off_policy
    env = make("hangs", 20)
    model = algorithm("FlipoutMlpPolicy", env, device="cpu", policy_kwargs=dict(net_arch=[8], schedule="constant"), **settings)
    with pytest.raises(TimeoutError, match=r"^environment 1 of 2 has not answered within timeout=2.0 seconds"):
        model.learn(200, callback=sb3_flipout.Checkpoints(tmp_path, every=16))
    assert gone(env)
    env.close()
    again = make("")
    try:
        assert sb3_flipout.resume(tmp_path, again).learn(32, reset_num_timesteps=False).num_timesteps == 64
    finally:
        again.close()


def test_it_is_made_as_sb3s_are() -> None:
    env = make_vec_env("CartPole-v1", 2, vec_env_cls=GuardedSubprocVecEnv, vec_env_kwargs=dict(start_method="fork"), seed=3)
    other = make_vec_env("CartPole-v1", 2, seed=3)
    try:
        assert np.array_equal(env.reset(), other.reset()) and env.timeout == 600.0
    finally:
        env.close()


@pytest.mark.parametrize(
    ("timeout", "error"), [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_bad_timeouts_are_refused(timeout: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout"):
        GuardedSubprocVecEnv([Counting], timeout=timeout)


class Levels(gym.Env[Any, Any]):
    """Its reward is its level, which a curriculum moves."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)
    render_mode = "rgb_array"
    level = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), float(self.level), False, False, {}

    def raised(self, by: int) -> int:
        return self.level + by

    def action_masks(self) -> Any:
        raise KeyError("no table of masks")

    def render(self) -> Any:
        raise ArithmeticError("nothing to see")


@pytest.mark.parametrize("kind", [SubprocVecEnv, GuardedSubprocVecEnv])
def test_attributes_are_the_environments(kind: Any) -> None:
    env = kind([Levels, lambda: gym.wrappers.TimeLimit(Levels(), 9)], start_method="fork")
    try:
        env.reset()
        env.set_attr("level", 7, indices=0)
        assert env.get_attr("level") == [7, 0] and env.step(np.array([0, 0]))[1].tolist() == [7.0, 0.0]
        assert env.env_method("raised", 2) == [9, 2]
        env.set_attr("action_space", spaces.Discrete(5))
        assert env.get_attr("action_space") == [spaces.Discrete(5)] * 2
    finally:
        env.close()


@pytest.mark.parametrize(("name", "error"), [("action_masks", "no table of masks"), ("render", "nothing to see")])
def test_what_a_method_raises_is_told(name: str, error: str) -> None:
    env = GuardedSubprocVecEnv([Levels], start_method="fork")
    env.reset()
    with pytest.raises(RuntimeError, match=error):
        env.env_method(name)
