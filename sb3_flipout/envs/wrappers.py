"""Wrappers of environments whose observations SB3 cannot use as they are."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class ChannelsFirst(gym.ObservationWrapper[np.ndarray, Any, np.ndarray]):
    """
    Boolean planes of shape (height, width, channels), as MinAtar gives them, to float32 of shape (channels, height, width).

    :param env: Environment with such observations
    :raises ValueError: If its observations have not three dimensions
    """

    def __init__(self, env: gym.Env[np.ndarray, Any]) -> None:
        super().__init__(env)
        shape = env.observation_space.shape or ()
        if len(shape) != 3:
            raise ValueError(
                f"env must have observations of shape (height, width, channels), got {env.observation_space}; "
                "leave this wrapper out."
            )
        self.observation_space = spaces.Box(0.0, 1.0, (shape[2], *shape[:2]), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """
        Turn one observation.

        :param observation: Planes, shape (height, width, channels)
        :return: The same in float32, shape (channels, height, width)
        """
        return observation.transpose(2, 0, 1).astype(np.float32)


class AllowAllActions(gym.Wrapper[Any, Any, Any, Any]):
    """
    Say of each discrete action that it is allowed: what sb3_contrib's MaskablePPO asks of an environment that has no masks.

    :param env: Environment with discrete actions
    :raises TypeError: If its actions are not Discrete
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        if not isinstance(env.action_space, spaces.Discrete):
            raise TypeError(f"env must have Discrete actions to be masked, got {env.action_space}; leave this wrapper out.")
        self._allowed = np.ones(int(env.action_space.n), dtype=bool)

    def action_masks(self) -> np.ndarray:
        """
        Say which actions are allowed.

        :return: True for each action, shape (n,)
        """
        return self._allowed.copy()
