"""Policies for sb3-contrib's MaskablePPO: those of PPO under another base class. Needs sb3-contrib.

Masks are applied to the action distribution after the perturbed layers, so a masked action has probability zero whatever
the noise.
"""

from __future__ import annotations

from sb3_contrib.common.maskable.policies import (
    MaskableActorCriticCnnPolicy,
    MaskableActorCriticPolicy,
    MaskableMultiInputActorCriticPolicy,
)

from sb3_flipout.policies.on_policy import OnPolicyNoise


class FlipoutMaskableActorCriticPolicy(OnPolicyNoise, MaskableActorCriticPolicy):
    """``"FlipoutMlpPolicy"`` of MaskablePPO; arguments as in :class:`OnPolicyNoise`."""


class FlipoutMaskableActorCriticCnnPolicy(OnPolicyNoise, MaskableActorCriticCnnPolicy):
    """``"FlipoutCnnPolicy"`` of MaskablePPO; arguments as in :class:`OnPolicyNoise`."""


class FlipoutMaskableMultiInputActorCriticPolicy(OnPolicyNoise, MaskableMultiInputActorCriticPolicy):
    """``"FlipoutMultiInputPolicy"`` of MaskablePPO; arguments as in :class:`OnPolicyNoise`."""
