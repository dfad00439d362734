"""Models small enough for tests, and a probe of the noise scale."""

from __future__ import annotations

from typing import Any

import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN, TRPO, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_flipout.noise import Scales

SMALL: dict[type[BaseAlgorithm], dict[str, Any]] = {
    PPO: dict(n_steps=8, batch_size=8, n_epochs=2),
    A2C: dict(n_steps=8),
    DQN: dict(learning_starts=16, train_freq=4, batch_size=8, buffer_size=200, exploration_initial_eps=0.0),
    SAC: dict(learning_starts=16, batch_size=8, buffer_size=200),
    TD3: dict(learning_starts=16, batch_size=8, buffer_size=200),
    TRPO: dict(n_steps=8, batch_size=8),
    MaskablePPO: dict(n_steps=8, batch_size=8, n_epochs=2),
}
SMALL[QRDQN] = SMALL[DQN]


def make(
    algorithm: type[BaseAlgorithm], env: VecEnv | None = None, action: str = "discrete", n_envs: int = 2, **kwargs: Any
) -> BaseAlgorithm:
    """Make a small flipout model of either kind."""
    noise: dict[str, Any] = dict(learn_sigma=True, schedule="constant")  # of every algorithm the same, and to the last step
    noise = noise if kwargs.get("policy", "Flipout").startswith("Flipout") else {}
    settings = {**SMALL[algorithm], "policy_kwargs": dict(net_arch=[16], **noise), "seed": 0, "device": "cpu", **kwargs}
    if algorithm in (DQN, QRDQN):
        settings["exploration_final_eps"] = 0.0
    policy = settings.pop("policy", "FlipoutMlpPolicy")
    return algorithm(policy, vector_env(action, n_envs) if env is None else env, **settings)


class ScaleProbe(BaseCallback):
    """Remember under which scales each step was made, and at which number of timesteps before it."""

    def __init__(self) -> None:
        super().__init__()
        self.acted: list[tuple[int, list[float]]] = []
        self.keys: list[list[int]] = []
        self.learned: list[tuple[int, float]] = []

    def _init_callback(self) -> None:
        keys, timesteps = self.model.policy._keys, lambda: self.model.num_timesteps
        stock_next, stock_train = type(keys).next, self.model.train

        def following(n_envs: int, scales: Scales, device: th.device) -> Any:
            noise = stock_next(keys, n_envs, scales, device)
            self.keys.append(noise.keys.tolist())
            self.acted.append((timesteps(), noise.scale.tolist()))
            return noise

        def train(*args: Any, **kwargs: Any) -> None:
            self.learned.append((timesteps(), self.model.policy.noise_scale))
            stock_train(*args, **kwargs)

        keys.next, self.model.train = following, train

    def _on_step(self) -> bool:
        return True


def parameters(model: BaseAlgorithm) -> list[th.Tensor]:
    return [value.detach().clone() for value in model.policy.parameters()]
