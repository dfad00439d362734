"""Key streams: which key each environment has at each step, as a pure function of a seed and a step counter.

Environment i's key is ``fold(seed, t, i)``, where t is the step at which the environment last drew. Nothing has to be
stored but the counter, and another number of environments needs nothing converted.
"""

import numpy as np
import torch as th

from sb3_flipout.noise.keys import fold, fold_in
from sb3_flipout.noise.rows import RowNoise

RESAMPLE_WORDS = ("step", "episode", "rollout")

# With a new key at every step, the noise of this many steps is hashed at once: the operations, not the hashing, cost.
_STEPS_AHEAD = 64


def check_resample(resample: str | int) -> None:
    """
    Refuse what ``resample`` cannot be.

    :param resample: What the user gave
    :raises ValueError: If it is not one of the words or a positive number of steps
    """
    number = isinstance(resample, int) and not isinstance(resample, bool) and resample >= 1
    if not number and resample not in RESAMPLE_WORDS:
        words = ", ".join(f'"{word}"' for word in RESAMPLE_WORDS)
        raise ValueError(f"resample must be one of {words} or a number of steps >= 1, got {resample!r}.")


def restrict(keys: th.Tensor, members: int | None) -> th.Tensor:
    """
    Map keys to those of an ensemble's members.

    :param keys: Keys, int64
    :param members: Number K of members, whose keys are 0 to K - 1; ``None`` leaves the keys as they are
    :return: Keys, same shape
    """
    return keys if members is None else th.remainder(keys, members)


class KeyStream:
    """
    The collection noise of the environments, step after step.

    :param seed: Seed of the stream
    :param resample: How long an environment keeps its key: ``"step"``, ``"episode"``, ``"rollout"``, or a number of steps
    :param members: Number of keys that exist; ``None`` for no end of them
    """

    def __init__(self, seed: int, resample: str | int, members: int | None = None) -> None:
        self.seed = seed
        self.resample = resample
        self.members = members
        self.step = 0  # collection steps so far; together with the seed, all that has to be saved
        self._drawn: np.ndarray | None = None  # (n_envs,) the step at which each environment drew its key
        self._unit: RowNoise | None = None  # the noise that is held, at scale 1
        self._held: RowNoise | None = None  # the same at the present scale
        self._ahead: tuple[int, RowNoise] | None = None  # that of the steps from this one on, at scale 1
        self._scale: th.Tensor | None = None  # the present scale, told by identity: no GPU sync
        self._is_one = False

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

    def next(self, n_envs: int, scale: th.Tensor) -> RowNoise:
        """
        Give the noise of the next collection step, and count it.

        :param n_envs: Number of environments
        :param scale: Noise scale of each environment, shape (n_envs,), on the policy's device; give the same tensor
            as long as it does not change
        :return: Row noise of the step, one row per environment
        """
        if scale is not self._scale:
            self._rescale(scale)
        noise = self._step_noise(n_envs, scale) if self.resample == "step" else self._held_noise(n_envs, scale)
        self.step += 1
        return noise

    def _rescale(self, scale: th.Tensor) -> None:
        """Keep keys and factors: a callback may move the scale at each step, and hashing costs more than the rest."""
        known = self._scale is not None and len(self._scale) == len(scale) and self._scale.device == scale.device
        self._scale, self._is_one, self._held = scale, bool((scale == 1).all()), None
        if not known:
            self._unit = self._ahead = None

    def _scaled(self, unit: RowNoise, scale: th.Tensor) -> RowNoise:
        return unit if self._is_one else unit.at_scale(scale)

    def _step_noise(self, n_envs: int, scale: th.Tensor) -> RowNoise:
        if self._ahead is None or not 0 <= self.step - self._ahead[0] < _STEPS_AHEAD:
            steps = np.arange(self.step, self.step + _STEPS_AHEAD)
            keys = self._keys(np.repeat(steps, n_envs), np.tile(np.arange(n_envs), _STEPS_AHEAD), scale.device)
            self._ahead = (self.step, RowNoise(keys))
        first = (self.step - self._ahead[0]) * n_envs
        return self._scaled(self._ahead[1][first : first + n_envs], scale)

    def _held_noise(self, n_envs: int, scale: th.Tensor) -> RowNoise:
        drawn = self._drawn
        if drawn is None or len(drawn) != n_envs:
            drawn = self._draw(np.full(n_envs, self.step))
        if isinstance(self.resample, int) and drawn[0] != self.step - self.step % self.resample:
            # Counted from step 0, not from the last draw, so that a loaded model continues in the same rhythm.
            drawn = self._draw(np.full(n_envs, self.step - self.step % self.resample))
        if self._unit is None:
            self._unit = RowNoise(self._keys(drawn, np.arange(n_envs), scale.device))
        if self._held is None:
            self._held = self._scaled(self._unit, scale)
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
    :param members: Number of keys that exist; ``None`` for no end of them
    """

    def __init__(self, seed: int, calls: int = 0, members: int | None = None) -> None:
        self.seed = seed
        self.calls = calls
        self.members = members

    def next(self, n_rows: int, scale: float, device: th.device) -> RowNoise:
        """
        Give noise for one batch of predictions.

        :param n_rows: Rows of the batch
        :param scale: Noise scale
        :param device: Device of the policy
        :return: Row noise with a fresh key for each row
        """
        keys = fold_in(fold(self.seed, self.calls), th.arange(n_rows, device=device))
        self.calls += 1
        return RowNoise(restrict(keys, self.members), scale)
