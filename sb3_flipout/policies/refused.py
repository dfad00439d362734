"""Policy names that exist to say why there is no such policy."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.policies import BasePolicy


class NoFlipoutForARS(BasePolicy):
    """
    What ``ARS("FlipoutMlpPolicy", env)`` meets.

    :param args: Not used
    :param kwargs: Not used
    :raises ValueError: Always
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "ARS has no flipout policy: it is parameter noise itself. It perturbs the whole parameter vector, in which sigma "
            'would stand too, and learns from returns alone. Use ARS("MlpPolicy", env); for weight noise with gradients, PPO '
            'or SAC with "FlipoutMlpPolicy". FlipES, the evolution strategy over flipout layers, is to come.'
        )

    def _predict(self, observation: Any, deterministic: bool = False) -> Any:
        raise NotImplementedError  # SB3 asks every policy class for it; of this one there is no instance
