"""The MinAtar games (Young and Tian 2019), under their usual names: importing this module registers them with gymnasium.

``gymnasium.make("MinAtar/Breakout-v1")`` works then, and so does rl_zoo3 with ``--gym-packages sb3_flipout.envs.minatar``.
The games have no time limit: give ``max_episode_steps`` where a policy that never loses would be evaluated for ever.
"""

import gymnasium as gym

try:
    from minatar.gym import register_envs as _register_games
except ImportError as error:
    raise ImportError(
        "the MinAtar games need minatar, which is not installed; install it with: pip install 'sb3_flipout[minatar]'",
        name="minatar",
    ) from error

from sb3_flipout.envs.wrappers import ChannelsFirst

__all__ = ["ChannelsFirst", "register_envs"]


def register_envs() -> None:
    """Register the games with gymnasium; calling it again changes nothing."""
    # gymnasium warns when an id is registered twice.
    if "MinAtar/Breakout-v1" not in gym.registry:
        _register_games()


register_envs()
