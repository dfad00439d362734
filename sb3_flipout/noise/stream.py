"""Key streams: which key each environment has at each step, as a pure function of a seed and a step counter.

Environment i's key is ``fold(seed, t, i)``, where t is the step at which the environment last drew. Nothing has to be
stored but the counter, and another number of environments needs nothing converted.
"""

from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch as th

from sb3_flipout.checks import check_choice
from sb3_flipout.noise.keys import fold, fold_in, restrict
from sb3_flipout.noise.ladder import environment_scales
from sb3_flipout.noise.rows import NoiseOwner, RowNoise

Resample = Literal["step", "episode", "rollout"]
RESAMPLE_WORDS: tuple[str, ...] = get_args(Resample)

# With a new key at every step, the noise of this many steps is hashed at once: the operations, not the hashing, cost.
_STEPS_AHEAD = 64


def check_resample(resample: Any) -> str | int:
    """
    Refuse what ``resample`` cannot be.

    :param resample: What the user gave
    :return: A word, or a number of steps, as a plain Python value
    :raises ValueError: If it is neither one of the words nor a positive number of steps
    """
    if isinstance(resample, Integral) and not isinstance(resample, bool) and int(resample) >= 1:
        return int(resample)
    return check_choice("resample", resample, RESAMPLE_WORDS, "A whole number >= 1 is a number of steps.")


class Scales(NamedTuple):
    """
    The noise scales of the environments, as a value: two that are equal are the same.

    :param scale: Noise scale c of the policy
    :param ladder: Multiplier of each environment; ``None`` for 1
    """

    scale: float
    ladder: tuple[float, ...] | None = None


class KeyStream:
    """
    The collection noise of the environments, step after step.

    :param seed: Seed of the stream
    :param resample: How long an environment keeps its key: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps
    :param members: Number of keys that exist; ``None`` for keys without limit
    :param owner: Whose noise it is
    """

    def __init__(self, seed: int, resample: str | int, members: int | None = None, owner: NoiseOwner | None = None) -> None:
        self.seed = seed
        self.resample = resample
        self.members = members
        self.owner = owner
        self.step = 0  # collection steps so far; together with the seed, all that has to be saved
        self._drawn: np.ndarray | None = None  # (n_envs,) the step at which each environment drew its key
        self._unit: RowNoise | None = None  # the noise that is held, at scale 1
        self._held: RowNoise | None = None  # the same at the present scale
        self._ahead: tuple[int, RowNoise] | None = None  # that of the steps from this one on, at scale 1
        self._ahead_scaled: RowNoise | None = None  # the same at the present scale, once that has stood for a step
        self._shape: tuple[int, th.device] | None = None  # environments and device that these are for
        self._scales: Scales | None = None
        self._row_scale: th.Tensor | None = None  # (n_envs,) the present scales; None for 1 in every row
        self._scale_moved = False  # whether they are other than at the step before
        self._silent = False  # whether all of them are 0

    def restart(self, step: int, seed: int) -> None:
        """
        Continue from a saved state; environments draw anew at the next step.

        :param step: Step counter
        :param seed: Seed of the stream
        """
        self.step, self.seed = step, seed
        self._drawn = self._unit = self._held = self._ahead = None

    def begin_rollout(self) -> None:
        """Tell that a rollout starts."""
        if self.resample == "rollout":
            self._drawn = None

    def end_episodes(self, dones: np.ndarray) -> None:
        """
        Tell which environments have ended their episode with the step just made.

        :param dones: One flag per environment, shape (n_envs,)
        """
        if self.resample == "episode" and self._drawn is not None and len(dones) == len(self._drawn) and np.any(dones):
            self._draw(np.where(dones, self.step, self._drawn))

    def next(self, n_envs: int, scales: Scales, device: th.device) -> RowNoise:
        """
        Draw the noise of the next collection step, and count it.

        :param n_envs: Number of environments
        :param scales: Their noise scales
        :param device: Device of the policy
        :return: Row noise of the step, one row per environment
        :raises ValueError: If there is a ladder for another number of environments
        """
        if self._shape != (n_envs, device) or self._scales != scales:
            self._prepare(n_envs, scales, device)
        noise = self._step_noise(n_envs, device) if self.resample == "step" else self._held_noise(n_envs, device)
        self.step += 1
        return noise

    def _prepare(self, n_envs: int, scales: Scales, device: th.device) -> None:
        """Keep keys and factors: a callback may move the scale at each step, and hashing costs more than the rest."""
        row_scale = environment_scales(*scales, n_envs, device)
        at_one = all(scales.scale * multiplier == 1 for multiplier in scales.ladder or (1.0,))  # no device is asked
        self._row_scale = None if at_one else row_scale
        self._silent = scales.scale == 0 or not any(scales.ladder or (1.0,))
        if self._shape != (n_envs, device):
            self._unit = self._ahead = None
        self._shape, self._scales, self._held = (n_envs, device), scales, None
        self._ahead_scaled, self._scale_moved = None, True

    def _step_noise(self, n_envs: int, device: th.device) -> RowNoise:
        if self._ahead is None or not 0 <= self.step - self._ahead[0] < _STEPS_AHEAD:
            steps = np.arange(self.step, self.step + _STEPS_AHEAD)
            keys = self._keys(np.repeat(steps, n_envs), np.tile(np.arange(n_envs), _STEPS_AHEAD), device)
            self._ahead, self._ahead_scaled = (self.step, RowNoise(keys, owner=self.owner)), None
        first = (self.step - self._ahead[0]) * n_envs
        here, scale, moved, self._scale_moved = slice(first, first + n_envs), self._row_scale, self._scale_moved, False
        if scale is None:
            return self._ahead[1][here]
        if moved:  # and will again, perhaps: then scaling what is ahead would be for nothing
            return self._ahead[1][here].at_scale(scale, self._silent)
        if self._ahead_scaled is None:
            self._ahead_scaled = self._ahead[1].at_scale(scale.repeat(_STEPS_AHEAD), self._silent)
        return self._ahead_scaled[here]

    def _held_noise(self, n_envs: int, device: th.device) -> RowNoise:
        drawn, start = self._drawn, self.step
        if isinstance(self.resample, int):
            # Counted from step 0, not from the last draw, so that a loaded model continues in the same rhythm.
            start -= start % self.resample
        if drawn is None or len(drawn) != n_envs or (isinstance(self.resample, int) and drawn[0] != start):
            drawn = self._draw(np.full(n_envs, start))
        if self._unit is None:
            self._unit = RowNoise(self._keys(drawn, np.arange(n_envs), device), owner=self.owner)
        if self._held is None:
            self._held = self._unit if self._row_scale is None else self._unit.at_scale(self._row_scale, self._silent)
        return self._held

    def _draw(self, drawn: np.ndarray) -> np.ndarray:
        self._drawn, self._unit, self._held = drawn, None, None
        return drawn

    def _keys(self, steps: np.ndarray, rows: np.ndarray, device: th.device) -> th.Tensor:
        of_steps = fold_in(self.seed, th.as_tensor(steps, dtype=th.int64, device=device))
        return restrict(fold_in(of_steps, th.as_tensor(rows, dtype=th.int64, device=device)), self.members)


class EvaluationStream:
    """
    Fresh keys for ``predict(deterministic=False)``, from a stream that training never reads.

    :param seed: Seed of the stream
    :param calls: How many batches of keys have been given out
    :param members: Number of keys that exist; ``None`` for keys without limit
    :param owner: Whose noise it is
    """

    def __init__(self, seed: int, calls: int = 0, members: int | None = None, owner: NoiseOwner | None = None) -> None:
        self.seed = seed
        self.calls = calls
        self.members = members
        self.owner = owner

    def next(self, n_rows: int, scale: float, device: th.device) -> RowNoise:
        """
        Draw noise for one batch of predictions.

        :param n_rows: Rows of the batch
        :param scale: Noise scale
        :param device: Device of the policy
        :return: Row noise with a fresh key for each row
        """
        keys = fold_in(fold(self.seed, self.calls), th.arange(n_rows, device=device))
        self.calls += 1
        return RowNoise(restrict(keys, self.members), scale, self.owner)
