"""A noise scale that follows a schedule, and a ladder of scales over the environments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sb3_flipout.callbacks._schedules import scheduled
from sb3_flipout.callbacks.common import ScaleCallback, Schedule
from sb3_flipout.checks import check_choice, check_number
from sb3_flipout.noise.ladder import geometric_ladder
from sb3_flipout.noise.schedule import SHAPES


class AnnealNoise(ScaleCallback):
    """
    Let the noise scale follow a schedule, by SB3's convention: a function of the progress of training that remains.

    On-policy the scale changes at the starts of rollouts, and is constant until the update after the rollout is done; once
    more when training has ended, so that the model is left at the end of the schedule. Off-policy it changes at every step.
    It depends on nothing but ``model.num_timesteps`` and the total of the present call of ``learn``, so that a loaded model
    continues where it was; with ``reset_num_timesteps=False`` the total counts what went before.

    :param start: Scale at the start of training
    :param end: Scale at the end
    :param fraction: Share of training over which the scale goes from start to end; it stays at the end afterwards
    :param shape: ``"linear"``, ``"cosine"``, ``"exponential"`` (needs scales above 0), or a function f of the remaining share
        r of the annealing, from 1 to 0, which gives the scale ``end + (start - end) * f(r)``. So a schedule of SB3's gives the
        scale itself with ``start=1, end=0``
    :param ladder: Multipliers (low, high) of the first and the last environment, between which those of the others are spread
        geometrically: environment i acts under ``scale * low * (high / low) ** (i / (n_envs - 1))``; a single one under
        ``scale * sqrt(low * high)``. ``None`` leaves ``policy.noise_ladder`` as it is
    :param verbose: Verbosity level of SB3's callbacks
    :raises TypeError: If a number is none
    :raises ValueError: If a value is unknown or out of range, or the schedule gives a scale that is negative or not finite
    """

    def __init__(
        self,
        start: float,
        end: float,
        fraction: float = 1.0,
        shape: Literal["linear", "cosine", "exponential"] | Schedule = "linear",
        ladder: Sequence[float] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if not callable(shape):
            check_choice("shape", shape, SHAPES, "It can be a function of the progress that remains, too.")
        hint = 'shape="exponential" never reaches 0; end at a small scale, 0.01 say.' if shape == "exponential" else ""
        self.start = check_number("start", start, 0.0, hint=hint, above=bool(hint))
        self.end = check_number("end", end, 0.0, hint=hint, above=bool(hint))
        self.fraction = check_number("fraction", fraction, 0.0, 1.0, above=True)
        self.shape = shape
        self.ladder = None if ladder is None else _checked_ends(ladder)
        for progress_remaining in (1.0, 0.5, 0.0):
            self.scale_at(progress_remaining)

    def _on_training_start(self) -> None:
        super()._on_training_start()
        if self.scale_at(0.0) < self.scale_at(1.0):
            self.policy.warn_of_merging_members(self.name)

    def scale_at(self, progress_remaining: float) -> float:
        """
        Compute the noise scale at a point of training.

        :param progress_remaining: Share of training that remains, from 1 to 0; below 0 where SB3 has gone beyond the total
        :return: Noise scale
        :raises ValueError: If the schedule gives a scale that is negative or not finite
        """
        remaining = max(0.0, 1.0 - (1.0 - progress_remaining) / self.fraction)
        return scheduled("shape", self._shaped, remaining)

    def _shaped(self, remaining: float) -> float:
        if callable(self.shape):
            return self.end + (self.start - self.end) * self.shape(remaining)
        return SHAPES[self.shape](self.start, self.end, remaining)

    def _on_rollout_start(self) -> None:
        # Told when SB3's own progress is stale on-policy, but both numbers of timesteps are right.
        scale = self.scale_at(self.progress_remaining)
        if self.ladder is not None:
            self.policy.noise_ladder = geometric_ladder(*self.ladder, self.model.n_envs)
        self._set_scale(scale)

    def _on_training_end(self) -> None:
        self._set_scale(self.scale_at(self.progress_remaining))

    def _on_step(self) -> bool:
        if self.off_policy:
            self._set_scale(self.scale_at(self.progress_remaining))
        return True


def _checked_ends(ladder: Any) -> tuple[float, float]:
    if isinstance(ladder, str) or not isinstance(ladder, Sequence) or len(ladder) != 2:
        raise ValueError(f"ladder must be two multipliers (low, high), or None for no ladder, got {ladder!r}.")
    low = check_number("ladder[0]", ladder[0], 0.0, above=True)
    return low, check_number("ladder[1]", ladder[1], low)
