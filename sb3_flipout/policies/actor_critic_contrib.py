"""Policies for sb3-contrib's TQC and CrossQ: the seam of ``actor_critic.py`` with other networks. Needs sb3-contrib."""

from __future__ import annotations

from typing import Any

from gymnasium import spaces
from sb3_contrib.crossq import policies as crossq
from sb3_contrib.tqc import policies as tqc
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import Schedule

from sb3_flipout.policies.actor_critic import ActorNoise
from sb3_flipout.policies.learning import NoisyCritic, NoisyStochasticActor


class FlipoutTQCActor(NoisyStochasticActor, tqc.Actor):
    """TQC's actor."""


class FlipoutTQCCritic(NoisyCritic, tqc.Critic):
    """TQC's critic."""


class FlipoutCrossQActor(NoisyStochasticActor, crossq.Actor):
    """CrossQ's actor."""


class FlipoutCrossQCritic(NoisyCritic, crossq.CrossQCritic):
    """CrossQ's critic, which sees present and next transitions in one batch and has no target network."""


class FlipoutTQCPolicy(ActorNoise, tqc.TQCPolicy):
    """``"FlipoutMlpPolicy"`` of TQC; arguments as in :class:`ActorNoise`."""

    noisy_classes = (FlipoutTQCActor, FlipoutTQCCritic)


class FlipoutTQCCnnPolicy(FlipoutTQCPolicy, tqc.CnnPolicy):
    """``"FlipoutCnnPolicy"`` of TQC; arguments as in :class:`ActorNoise`."""


class FlipoutTQCMultiInputPolicy(FlipoutTQCPolicy, tqc.MultiInputPolicy):
    """``"FlipoutMultiInputPolicy"`` of TQC; arguments as in :class:`ActorNoise`."""


class FlipoutCrossQPolicy(ActorNoise, crossq.CrossQPolicy):
    """
    ``"FlipoutMlpPolicy"`` of CrossQ.

    Its critic sees present and next transitions in one batch. So with ``perturb="all"`` both are under the online noise;
    ``target_noise`` is that of the next actions alone.

    :param observation_space: Observation space, of vectors
    :param action_space: Action space, Box
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of sb3-contrib's policy
    :param kwargs: As in :class:`ActorNoise`
    :raises ValueError: If observations are images or dictionaries, for which CrossQ has no policy
    """

    noisy_classes = (FlipoutCrossQActor, FlipoutCrossQCritic)
    targets = ()

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: Any, lr_schedule: Schedule, *args: Any, **kwargs: Any
    ) -> None:
        own = "features_extractor_class" in kwargs
        if not own and (isinstance(observation_space, spaces.Dict) or is_image_space(observation_space)):
            raise ValueError(
                f"CrossQ has no policy for the observation space {observation_space}: sb3-contrib gives it vectors only. Use "
                'SAC or TQC with "FlipoutCnnPolicy" or "FlipoutMultiInputPolicy", or give a features_extractor_class.'
            )
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
