"""A check that the environments share."""

import numpy as np
from gymnasium import spaces


def checked_action(space: spaces.Space[np.int64], action: np.int64 | int, *, running: bool) -> int:
    """Return ``action`` as a Python int if the episode is running and the action is in ``space``.

    :param space: The action space of the environment, ``Discrete(2)``.
    :param action: What the caller passed to ``step``.
    :param running: Whether an episode has been started by ``reset`` and has not ended yet.
    :return: The action, 0 or 1, as an ``int``.
    :raises RuntimeError: If no episode is running.
    :raises ValueError: If ``action`` is not an element of ``space``.
    """
    if not running:
        raise RuntimeError("step() was called while no episode is running; call reset() first and after each episode.")
    if not space.contains(action):
        raise ValueError(f"action must be 0 or 1 as a scalar integer, got {action!r}; pass an element of env.action_space.")
    return int(action)
