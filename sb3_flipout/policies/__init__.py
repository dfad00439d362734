"""Ring 2: policies for the stock algorithms, one file per seam of SB3.

==========================  ================================================
algorithms                  file
==========================  ================================================
PPO, A2C, TRPO              :mod:`sb3_flipout.policies.on_policy`
MaskablePPO                 :mod:`sb3_flipout.policies.maskable`
RecurrentPPO                :mod:`sb3_flipout.policies.recurrent`
DQN                         :mod:`sb3_flipout.policies.value_based`
QRDQN                       :mod:`sb3_flipout.policies.quantile`
SAC, TD3, DDPG              :mod:`sb3_flipout.policies.actor_critic`
TQC, CrossQ                 :mod:`sb3_flipout.policies.actor_critic_contrib`
==========================  ================================================

Policies for sb3-contrib are found here by name too, and are imported when they are asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sb3_flipout.policies.actor_critic import (
    FlipoutSACCnnPolicy,
    FlipoutSACMultiInputPolicy,
    FlipoutSACPolicy,
    FlipoutTD3CnnPolicy,
    FlipoutTD3MultiInputPolicy,
    FlipoutTD3Policy,
)
from sb3_flipout.policies.base import FlipoutPolicy, NoiseStateError
from sb3_flipout.policies.on_policy import (
    FlipoutActorCriticCnnPolicy,
    FlipoutActorCriticPolicy,
    FlipoutMultiInputActorCriticPolicy,
)
from sb3_flipout.policies.settings import ActorSettings, LearningSettings, NoiseSettings, ValueSettings
from sb3_flipout.policies.value_based import FlipoutDQNCnnPolicy, FlipoutDQNMultiInputPolicy, FlipoutDQNPolicy

__all__ = [
    "ActorSettings",
    "FlipoutActorCriticCnnPolicy",
    "FlipoutActorCriticPolicy",
    "FlipoutDQNCnnPolicy",
    "FlipoutDQNMultiInputPolicy",
    "FlipoutDQNPolicy",
    "FlipoutMultiInputActorCriticPolicy",
    "FlipoutPolicy",
    "FlipoutSACCnnPolicy",
    "FlipoutSACMultiInputPolicy",
    "FlipoutSACPolicy",
    "FlipoutTD3CnnPolicy",
    "FlipoutTD3MultiInputPolicy",
    "FlipoutTD3Policy",
    "LearningSettings",
    "NoiseSettings",
    "NoiseStateError",
    "ValueSettings",
]

#: Beginning of the class names of policies that need sb3-contrib, and their file.
_CONTRIB = {
    "FlipoutQRDQN": "quantile",
    "FlipoutTQC": "actor_critic_contrib",
    "FlipoutCrossQ": "actor_critic_contrib",
    "FlipoutMaskable": "maskable",
    "FlipoutRecurrent": "recurrent",
}


def __getattr__(name: str) -> Any:
    """
    Import a policy for sb3-contrib, which is an extra, when it is asked for.

    :param name: Name of the policy class
    :return: The class
    :raises ImportError: If sb3-contrib is not installed
    :raises AttributeError: If there is no policy of this name
    """
    file = next((file for beginning, file in _CONTRIB.items() if name.startswith(beginning)), None)
    if file is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("sb3_contrib") is None:
        raise ImportError(
            f"{name} needs sb3-contrib, which is not installed; install the extra with: pip install 'sb3_flipout[contrib]'"
        )
    return getattr(import_module(f"{__name__}.{file}"), name)
