"""Recent real observations of a model, drawn without touching a global generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.utils import obs_as_tensor

_RECENT = 1_000  # how many of the newest collection steps of a replay buffer count as recent


def recent_replayed(model: BaseAlgorithm, n_rows: int, generator: np.random.Generator) -> Any:
    """
    Draw observations out of the newest steps of a replay buffer, normalised as training sees them.

    :param model: Off-policy model
    :param n_rows: Number of observations
    :param generator: What draws, with replacement
    :return: Observations as tensors on the model's device; ``None`` while there are none
    """
    buffer: ReplayBuffer = model.replay_buffer  # type: ignore[attr-defined]
    newest = min(buffer.size(), _RECENT)
    if newest == 0:
        return None
    steps = (buffer.pos - 1 - generator.integers(newest, size=n_rows)) % buffer.buffer_size
    environments = generator.integers(buffer.n_envs, size=n_rows)
    raw = _rows(buffer.observations, lambda array: array[steps, environments])
    return obs_as_tensor(buffer._normalize_obs(raw, model.get_vec_normalize_env()), model.device)


def recent_rollout(model: BaseAlgorithm, n_rows: int, generator: np.random.Generator) -> Any:
    """
    Draw observations of the rollout that has just been collected.

    :param model: On-policy model, at the end of a rollout
    :param n_rows: Number of observations
    :param generator: What draws, with replacement
    :return: Observations as tensors on the model's device
    """
    buffer: RolloutBuffer = model.rollout_buffer  # type: ignore[attr-defined]
    steps, environments = generator.integers(buffer.pos, size=n_rows), generator.integers(buffer.n_envs, size=n_rows)
    return obs_as_tensor(_rows(buffer.observations, lambda array: array[steps, environments]), model.device)


def _rows(observations: Any, take: Callable[[np.ndarray], np.ndarray]) -> Any:
    if isinstance(observations, dict):
        return {name: take(array) for name, array in observations.items()}
    return take(observations)
