"""Ring 2: policies for the stock algorithms. Each file says in its ``ALIASES`` which algorithms get which of its policies.

==========================  ================================================
algorithms                  file
==========================  ================================================
PPO, A2C                    :mod:`sb3_flipout.policies.on_policy`
DQN                         :mod:`sb3_flipout.policies.dqn`
SAC, TD3, DDPG              :mod:`sb3_flipout.policies.sac_td3`
those of sb3-contrib        :mod:`sb3_flipout.policies.contrib`
==========================  ================================================

Policies for sb3-contrib are found here by name too, and are imported when they are asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.dqn import FlipoutDQNCnnPolicy, FlipoutDQNMultiInputPolicy, FlipoutDQNPolicy
from sb3_flipout.policies.learning_settings import ActorSettings, LearningSettings, ValueSettings
from sb3_flipout.policies.legacy import register_moved_modules
from sb3_flipout.policies.on_policy import (
    FlipoutActorCriticCnnPolicy,
    FlipoutActorCriticPolicy,
    FlipoutMultiInputActorCriticPolicy,
)
from sb3_flipout.policies.sac_td3 import (
    FlipoutSACCnnPolicy,
    FlipoutSACMultiInputPolicy,
    FlipoutSACPolicy,
    FlipoutTD3CnnPolicy,
    FlipoutTD3MultiInputPolicy,
    FlipoutTD3Policy,
)
from sb3_flipout.policies.settings import NoiseSettings, OnPolicySettings
from sb3_flipout.policies.state import NoiseStateError

__all__ = [
    "ActorSettings",
    "FlipoutActorCriticCnnPolicy",
    "FlipoutActorCriticPolicy",
    "FlipoutDQNCnnPolicy",
    "FlipoutDQNMultiInputPolicy",
    "FlipoutDQNPolicy",
    "FlipoutMultiInputActorCriticPolicy",
    "FlipoutPolicyMixin",
    "FlipoutSACCnnPolicy",
    "FlipoutSACMultiInputPolicy",
    "FlipoutSACPolicy",
    "FlipoutTD3CnnPolicy",
    "FlipoutTD3MultiInputPolicy",
    "FlipoutTD3Policy",
    "LearningSettings",
    "NoiseSettings",
    "NoiseStateError",
    "OnPolicySettings",
    "ValueSettings",
]

#: Beginnings of the class names of policies that need sb3-contrib.
_CONTRIB = ("FlipoutQRDQN", "FlipoutTQC", "FlipoutCrossQ", "FlipoutMaskable", "FlipoutRecurrent")
_HAS_CONTRIB = find_spec("sb3_contrib") is not None

register_moved_modules(["dqn", "sac_td3", *(["contrib"] if _HAS_CONTRIB else [])])


def __getattr__(name: str) -> Any:
    """
    Import a policy for sb3-contrib, which is an extra, when it is asked for.

    :param name: Name of the policy class
    :return: The class
    :raises ImportError: If sb3-contrib is not installed
    :raises AttributeError: If there is no policy of this name
    """
    if not name.startswith(_CONTRIB):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HAS_CONTRIB:
        raise ImportError(
            f"{name} needs sb3-contrib, which is not installed; install the extra with: pip install 'sb3_flipout[contrib]'"
        )
    return getattr(import_module(f"{__name__}.contrib"), name)
