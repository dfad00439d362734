"""Environments and a probe for what happens inside real training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_flipout import perturbed


class RandomEnv(gym.Env):
    """Random observations and episode ends from the seed alone, a reward that depends on the action; for any spaces."""

    def __init__(self, action_space: spaces.Space[Any], observation_space: spaces.Space[Any] | None = None) -> None:
        self.observation_space = observation_space or spaces.Box(-1, 1, (5,), np.float32)
        self.action_space = action_space

    def _draw(self, space: Any) -> Any:
        if isinstance(space, spaces.Dict):
            return {name: self._draw(part) for name, part in space.items()}
        if isinstance(space, spaces.Discrete):
            return int(self.np_random.integers(space.n))
        if space.dtype == np.uint8:  # whose own arithmetic wraps round: 255 + 1 is 0
            return self.np_random.integers(space.low, space.high, dtype=np.uint8, endpoint=True)
        return self.np_random.uniform(space.low, space.high).astype(space.dtype)

    def _observation(self) -> Any:
        return self._draw(self.observation_space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        ends = self.np_random.random() < 0.1
        truncated = bool(ends and self.np_random.random() < 0.5)
        return self._observation(), float(np.mean(action)), bool(ends and not truncated), truncated, {}


ACTION_SPACES: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-1, 1, (3,), np.float32),
    "discrete": spaces.Discrete(4),
    "multidiscrete": spaces.MultiDiscrete([3, 2]),
    "multibinary": spaces.MultiBinary(3),
}


IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)
OBSERVATION_SPACES: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-1, 1, (5,), np.float32),
    "image": IMAGE,
    "discrete": spaces.Discrete(6),
    "dict": spaces.Dict({"vector": spaces.Box(-1, 1, (3,), np.float32), "image": IMAGE, "index": spaces.Discrete(4)}),
}


def vector_env(action: str = "box", n_envs: int = 3, seed: int = 0, observation: str = "vector") -> VecEnv:
    return make_vec_env(lambda: RandomEnv(ACTION_SPACES[action], OBSERVATION_SPACES[observation]), n_envs=n_envs, seed=seed)


def image_env(n_envs: int = 2) -> VecEnv:
    return vector_env("discrete", n_envs, observation="image")


#: Every space and wrapper that replay has to survive: name -> (policy, environment, arguments of the algorithm).
CASES: dict[str, tuple[str, Callable[[], VecEnv], dict[str, Any]]] = {
    **{f"mlp-{name}": ("FlipoutMlpPolicy", lambda name=name: vector_env(name), {}) for name in ACTION_SPACES},
    "discrete-observations": ("FlipoutMlpPolicy", lambda: vector_env(observation="discrete"), {}),
    "dict": ("FlipoutMultiInputPolicy", lambda: vector_env("discrete", 2, observation="dict"), {}),
    "image": ("FlipoutCnnPolicy", image_env, {}),
    "image-frame-stack": ("FlipoutCnnPolicy", lambda: VecFrameStack(image_env(), 2), {}),
    "vec-normalize": ("FlipoutMlpPolicy", lambda: VecNormalize(vector_env()), {}),
    "frame-stack": ("FlipoutMlpPolicy", lambda: VecFrameStack(vector_env(), 3), {}),
    "sde": ("FlipoutMlpPolicy", vector_env, dict(use_sde=True, sde_sample_freq=4)),
    "sde-squash": ("FlipoutMlpPolicy", vector_env, dict(use_sde=True, policy_kwargs=dict(squash_output=True))),
    "separate-extractors": (
        "FlipoutCnnPolicy",
        image_env,
        dict(policy_kwargs=dict(share_features_extractor=False, perturb="all")),
    ),
}


class ReplayProbe(BaseCallback):
    """At the end of each rollout, before the first optimiser step, evaluate the batches as the update will."""

    def __init__(self, batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.worst_ratio = self.worst_value = self.least_effect = 0.0
        self.rollouts = 0

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        policy, effects = self.model.policy, []
        policy.set_training_mode(True)
        for batch in self.model.rollout_buffer.get(self.batch_size):
            actions = batch.actions
            if isinstance(self.model.action_space, spaces.Discrete):
                actions = actions.long().flatten()
            masks = {"action_masks": batch.action_masks} if hasattr(batch, "action_masks") else {}
            with th.no_grad():
                values, log_prob, _ = policy.evaluate_actions(batch.observations, actions, **masks)
                with perturbed(policy, None):
                    _, of_mean, _ = policy.evaluate_actions(batch.observations, actions, **masks)
            ratio = th.exp(log_prob - batch.old_log_prob)
            self.worst_ratio = max(self.worst_ratio, float((ratio - 1).abs().max()))
            gaps = (values.flatten() - batch.old_values).abs() / batch.old_values.abs().clamp(min=1.0)
            self.worst_value = max(self.worst_value, float(gaps.max()))
            effects.append(float((th.exp(of_mean - batch.old_log_prob) - 1).abs().mean()))
        policy.set_training_mode(False)
        self.least_effect = np.mean(effects) if not self.rollouts else min(self.least_effect, np.mean(effects))
        self.rollouts += 1


class NoiseRecorder(BaseCallback):
    """Remember the keys and scales of every rollout, and the base of every layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[np.ndarray] = []
        self.scales: list[np.ndarray] = []
        self.base_keys: list[int] = []
        self.actions: list[np.ndarray] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        self.keys.append(buffer.noise_keys.copy())
        self.scales.append(buffer.noise_scales.copy())
        self.base_keys.append(self.model.policy.perturbed_network.layers[0].base_key)
        self.actions.append(buffer.actions.copy())

    def all_keys(self) -> np.ndarray:
        return np.concatenate(self.keys)
