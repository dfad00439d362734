"""Small environments whose exploration difficulty is one number: :class:`Chain` and :class:`DeepSea`; help with others.

Importing this module registers ``sb3_flipout/Chain-v0`` and ``sb3_flipout/DeepSea-v0`` with gymnasium, so that
``gymnasium.make("sb3_flipout/Chain-v0", length=20)`` and ``gymnasium.make("sb3_flipout/DeepSea-v0", size=10)`` work.
:func:`atari_id` checks the name of an Atari game; importing :mod:`sb3_flipout.envs.minatar` registers the MinAtar games.
"""

import gymnasium as gym

from sb3_flipout.envs.atari import atari_id
from sb3_flipout.envs.chain import Chain
from sb3_flipout.envs.deep_sea import DeepSea

__all__ = ["Chain", "DeepSea", "atari_id", "register_envs"]

_ENTRY_POINTS = {
    "sb3_flipout/Chain-v0": "sb3_flipout.envs.chain:Chain",
    "sb3_flipout/DeepSea-v0": "sb3_flipout.envs.deep_sea:DeepSea",
}


def register_envs() -> None:
    """Register the environments of this module with gymnasium; calling it again changes nothing.

    No ``max_episode_steps`` is registered: each environment ends its own episodes, at a length that depends on its
    keyword arguments.
    """
    for env_id, entry_point in _ENTRY_POINTS.items():
        # gymnasium warns when an id is registered twice, as happens when this module is reloaded.
        if env_id not in gym.registry:
            gym.register(id=env_id, entry_point=entry_point)


register_envs()
