"""What policies share that learn from replayed transitions: act under row noise, learn under fresh row noise.

Nothing of the acting noise is replayed: an off-policy update is right under any weights. So there are two streams. Acting:
one key per environment, held as ``resample`` says, under the acting base. Learning: keys and base are pure functions of
(gradient step, role of the network), so that no state has to be threaded through SB3's ``train``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule

from sb3_flipout.layers import NoisyNetwork
from sb3_flipout.noise import RowNoise
from sb3_flipout.policies.base import FlipoutPolicy, check_extractor
from sb3_flipout.policies.learning import LearningNoise, NoisyNet
from sb3_flipout.policies.settings import LearningSettings, refuse_misplaced


class OffPolicyNoise(FlipoutPolicy):
    """
    Mixin that gives an off-policy policy its two streams of noise.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule
    :param args: Further arguments of SB3's policy
    :param kwargs: Noise settings, see :class:`LearningSettings`, and further keyword arguments of SB3's policy
    :raises ValueError: If a noise setting is unknown, out of range or unfit
    """

    noise_settings: LearningSettings
    settings_class: ClassVar[type[LearningSettings]] = LearningSettings

    def __init__(
        self, observation_space: spaces.Space[Any], action_space: Any, lr_schedule: Schedule, *args: Any, **kwargs: Any
    ) -> None:
        names = [field.name for field in fields(self.settings_class) if field.name in kwargs]
        settings = self.settings_class(**{name: kwargs.pop(name) for name in names})
        refuse_misplaced(kwargs)
        check_extractor(observation_space, type(self), kwargs)
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        self._init_noise(settings)
        self.learning = LearningNoise(self._noise_seed, settings)
        self._acting_noise: RowNoise | None = None
        self._acting_base_key = self._base_key(0)
        self._make_noisy(lr_schedule)

    @abstractmethod
    def _make_noisy(self, lr_schedule: Schedule) -> None:
        """Perturb the networks, and make the optimizers anew where sigma is new."""

    @property
    @abstractmethod
    def acting(self) -> NoisyNet:
        """The network that acts."""

    @property
    @abstractmethod
    def step_optimizer(self) -> th.optim.Optimizer:
        """The optimizer that makes one step in each gradient step."""

    @abstractmethod
    def _noisy_nets(self) -> list[NoisyNet]:
        """Give all networks that learn, and those of the target."""

    # ---- what the algorithm tells -------------------------------------------------------------------------------

    def begin_rollout(self) -> None:
        """Tell that a rollout starts."""
        self._keys.begin_rollout()

    @contextmanager
    def collecting(self, n_envs: int) -> Iterator[None]:
        """
        Mark one collection step: predictions inside it act in the training environments.

        :param n_envs: Number of environments
        :return: Context manager
        """
        step = self._keys.step
        self._acting_noise = self._collection_noise(n_envs)
        self._move_acting_base(step, self._acting_noise)
        try:
            yield
        finally:
            self._acting_noise = None

    def _move_acting_base(self, step: int, noise: RowNoise) -> None:
        settings = self.noise_settings
        if settings.noise_sharing == "shared":  # the base is the draw, so it changes when the first environment's key does
            self._bind_acting_base(int(noise.keys[0]))
        elif settings.base_every is not None and self.learning.base_moves:
            self._bind_acting_base(self._base_key(step // settings.base_every))

    def _bind_acting_base(self, base_key: int) -> None:
        if base_key != self._acting_base_key:
            self._acting_base_key = base_key
            self.acting.noisy.redraw(base_key)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """
        Mark the gradient steps of an update; inside it, networks that are given no noise draw that of the gradient step.

        ``perturbed(policy, None)`` around an update goes before it: mean weights learn then.

        :return: Context manager; the acting base is as before when it is left
        """
        acting_bases = self.acting.noisy.bases()
        self.learning.active, self.learning.scale = self.explicit_noise is None, self._noise_scale
        # Hung on here, not once for all: copies of an optimizer, and another one put in its place, have no hooks.
        hook = self.step_optimizer.register_step_post_hook(self.learning.count)
        try:
            yield
        finally:
            hook.remove()
            self.learning.active = False
            self.acting.noisy.bind(acting_bases)

    # ---- predictions --------------------------------------------------------------------------------------------

    def _is_explicit(self) -> bool:
        """Whether somebody has activated noise by name, on the policy or on its acting network."""
        return self.explicit_noise is not None or self.acting.explicit_noise is not None

    # ---- save and load ------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Any]:
        """
        Give the noise state; torch puts it into ``state_dict``.

        :return: Settings, seed, counters, noise scale and acting base, as plain Python values
        """
        return {**super().get_extra_state(), "gradient_steps": self.learning.step, "acting_base": self._acting_base_key}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """
        Continue from a saved noise state.

        :param state: What :meth:`get_extra_state` gave
        """
        super().set_extra_state(state)
        self.learning.seed, self.learning.step = self._noise_seed, state["gradient_steps"]
        self._acting_base_key = state.get("acting_base", self._base_key(0))
        for net in self._noisy_nets():
            net.noisy.redraw(self._acting_base_key)

    def _own_network(self, parts: list[Any]) -> None:
        """Let `perturbed(policy, keys)` be about what acts; other networks' layers may have the same numbers, on purpose."""
        NoisyNetwork(self, parts)
