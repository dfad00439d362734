"""Ring 2: policies for the stock algorithms, one file per seam of SB3.

==========================  =====================================
algorithms                  file
==========================  =====================================
PPO, A2C                    :mod:`sb3_flipout.policies.on_policy`
==========================  =====================================
"""

from sb3_flipout.policies.base import FlipoutPolicy
from sb3_flipout.policies.on_policy import (
    FlipoutActorCriticCnnPolicy,
    FlipoutActorCriticPolicy,
    FlipoutMultiInputActorCriticPolicy,
)
from sb3_flipout.policies.settings import NoiseSettings

__all__ = [
    "FlipoutActorCriticCnnPolicy",
    "FlipoutActorCriticPolicy",
    "FlipoutMultiInputActorCriticPolicy",
    "FlipoutPolicy",
    "NoiseSettings",
]
