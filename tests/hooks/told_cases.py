"""Small models, and what is told of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from stable_baselines3 import A2C, DQN
from stable_baselines3.common.env_util import make_vec_env


def build(algorithm: Any = A2C, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    sizes: dict[str, Any] = dict(n_steps=4)
    if algorithm is DQN:
        sizes = dict(buffer_size=100, learning_starts=4, batch_size=4, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    return algorithm("FlipoutMlpPolicy", env, **{**sizes, **kwargs}, policy_kwargs=policy_kwargs, seed=1, device="cpu")


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught]


class Spied:
    """A policy's calls in their order, each made all the same."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.calls: list[Any] = []
        for name in names:
            monkeypatch.setattr(model.policy, name, self._recorded(name, getattr(model.policy, name)))

    def _recorded(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, *kwargs.values()))
            return method(*args, **kwargs)

        return call
