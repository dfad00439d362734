"""The state of the noise in a saved model, and the seed that begins it anew."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from typing_extensions import Self

from sb3_flipout.evolution.policy import FlipESPolicy

_STATE = "flipout_noise"  # where the noise state stands in a saved model, as with all algorithms


class KeepsNoise(BaseAlgorithm):
    """Mixin of an algorithm that saves and loads the state of its policy's noise, and seeds it."""

    policy: FlipESPolicy
    #: Steps before the generation that is being played; ``None`` between two.
    _began: int | None = None

    def _restore_noise(self) -> None:
        state = self.__dict__.pop(_STATE, None)
        if state is not None:
            self.policy.set_noise_state(state)

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed everything, the noise of the generations that follow included.

        :param seed: Seed; ``None`` changes nothing
        """
        super().set_random_seed(seed)
        if seed is not None and getattr(self, "policy", None) is not None:
            self.policy.reseed_noise(seed)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """
        Save the model with the state of its noise.

        :param args: As of SB3's algorithms
        :param kwargs: The same by name
        """
        now, self.__dict__[_STATE] = self.num_timesteps, self.policy.noise_state()
        # Who goes on plays the generation again, from its start; its steps must not count twice.
        self.num_timesteps = now if self._began is None else self._began
        try:
            super().save(*args, **kwargs)
        finally:
            self.num_timesteps = now
            self.__dict__.pop(_STATE, None)

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Self:
        """
        Load a model, which goes on with the generation that follows; where a seed is given, with one of other noise.

        :param args: As of SB3's algorithms
        :param kwargs: The same by name
        :return: Model
        """
        model = super().load(*args, **kwargs)
        if kwargs.get("seed") is not None:
            model.policy.reseed_noise(kwargs["seed"])
        return model
