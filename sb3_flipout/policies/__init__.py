"""Ring 2: policies for the stock algorithms, one file per seam of SB3.

==========================  =====================================
algorithms                  file
==========================  =====================================
PPO, A2C                    :mod:`sb3_flipout.policies.on_policy`
DQN                         :mod:`sb3_flipout.policies.value_based`
QRDQN                       :mod:`sb3_flipout.policies.quantile`
==========================  =====================================
"""

from sb3_flipout.policies.base import FlipoutPolicy
from sb3_flipout.policies.on_policy import (
    FlipoutActorCriticCnnPolicy,
    FlipoutActorCriticPolicy,
    FlipoutMultiInputActorCriticPolicy,
)
from sb3_flipout.policies.settings import NoiseSettings, ValueSettings
from sb3_flipout.policies.value_based import FlipoutDQNCnnPolicy, FlipoutDQNMultiInputPolicy, FlipoutDQNPolicy

__all__ = [
    "FlipoutActorCriticCnnPolicy",
    "FlipoutActorCriticPolicy",
    "FlipoutDQNCnnPolicy",
    "FlipoutDQNMultiInputPolicy",
    "FlipoutDQNPolicy",
    "FlipoutMultiInputActorCriticPolicy",
    "FlipoutPolicy",
    "NoiseSettings",
    "ValueSettings",
]
