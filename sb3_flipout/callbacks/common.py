"""What the callbacks share: finding the flipout policy, and steering its noise scale, which one callback at a time may do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_flipout.noise.compiling import uncompiled
from sb3_flipout.policies.base import FlipoutPolicyMixin

#: A function of the progress that remains, from 1 at the start of training to 0 at its end.
Schedule = Callable[[float], float]

_STEERED_BY = "noise_scale_steered_by"


def flipout_policy(model: BaseAlgorithm, callback_name: str = "flipout_policy") -> FlipoutPolicyMixin:
    """
    Take the flipout policy of a model, with its type, so that an editor knows ``flipout_policy(model).noise_scale``.

    :param model: SB3 model; of a compiled policy it is the policy itself
    :param callback_name: Who needs it, for the error
    :return: Its policy
    :raises ValueError: If the policy of the model is no flipout policy
    """
    policy: Any = uncompiled(model.policy)
    if isinstance(policy, FlipoutPolicyMixin):
        return policy
    algorithm = type(model).__name__
    names = [name for name, known in model.policy_aliases.items() if issubclass(known, FlipoutPolicyMixin)]
    listed = ", ".join(f'"{name}"' for name in names)
    remedy = f"Make the model with one of {listed}." if names else f"There is none for {algorithm} yet."
    raise ValueError(f"{callback_name} needs a flipout policy, got {algorithm} with {type(policy).__name__}. {remedy}")


class NoiseCallback(BaseCallback):
    """
    A callback about the noise of a flipout policy; other callbacks find ``self.policy`` in it.

    :param verbose: Verbosity level of SB3's callbacks
    """

    policy: FlipoutPolicyMixin

    @property
    def name(self) -> str:
        """Name of the callback, for messages."""
        return type(self).__name__

    @property
    def off_policy(self) -> bool:
        """Whether the algorithm learns from a replay buffer."""
        return isinstance(self.model, OffPolicyAlgorithm)

    @property
    def progress_remaining(self) -> float:
        """Share of training that remains; below 0 where SB3 has gone beyond the total."""
        return 1.0 - self.model.num_timesteps / max(self.model._total_timesteps, 1)

    def _init_callback(self) -> None:
        self.policy = flipout_policy(self.model, self.name)
        self._refuse_parent()

    def _on_training_start(self) -> None:
        self._refuse_parent()

    def _refuse_parent(self) -> None:
        """A child of an event callback is not told when rollouts start."""
        if self.parent is not None:
            raise ValueError(
                f"{self.name} was given to {type(self.parent).__name__}, which does not tell it when rollouts start. Pass it "
                "to learn() itself, alone or in a list."
            )

    def _on_step(self) -> bool:
        return True


class ScaleCallback(NoiseCallback):
    """
    A callback that steers ``policy.noise_scale``. Only one of them may, in one call of ``learn``.

    :param verbose: Verbosity level of SB3's callbacks
    """

    def _on_training_start(self) -> None:
        super()._on_training_start()
        # SB3 hands one dictionary to all callbacks of a call of learn(), and another one to those of the next.
        first: ScaleCallback = self.locals.setdefault(_STEERED_BY, self)
        if first is not self:
            raise ValueError(
                f"{first.name} and {self.name} would both steer the noise scale in one call of learn(). Leave one of them "
                "out, or use them in calls of their own, one after the other."
            )
        self.policy.leave_schedule()

    def _set_scale(self, scale: float) -> None:
        """Set the noise scale and log it."""
        self.policy.noise_scale = scale
        self.logger.record("noise/scale", self.policy.effective_scale)
