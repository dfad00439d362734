"""Rollout buffers that store the noise of each transition and hand it back with the observations.

Collection hangs the row noise on the log-probabilities (``policies/passes.py``); ``add`` reads it there, and the
samples carry it on their observations, so the update finds exactly the noise under which each action was drawn. It
costs 12 bytes per transition: an int64 key and a float32 scale.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, ClassVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_flipout.noise import NoiseOwner, RowNoise, noise_of, with_noise
from sb3_flipout.noise.rows import SEVERAL_BASES
from sb3_flipout.samples import with_parts


class KeyedBufferMixin(RolloutBuffer):
    """Stands before a rollout buffer class in the bases of the class that :func:`keyed` makes."""

    noise_keys: np.ndarray  # (n_steps, n_envs) int64
    noise_scales: np.ndarray  # (n_steps, n_envs) float32
    _noise: RowNoise | None
    LOG_PROB_AT: ClassVar[int] = 5  # the place of log_prob among the arguments of `add`
    MAKES_SAMPLES: ClassVar[bool] = False  # whether the samples are made by a class of the user's
    _owner: NoiseOwner | None = None  # whose noise it is
    _base: int | str | None = None  # the base under which it acted

    def reset(self) -> None:
        """Empty the buffer; a user's class can keep what it has, and add to it."""
        super().reset()
        self._noise = None
        if self.pos == 0:
            self.reset_noise()

    def reset_noise(self) -> None:
        """Empty the part of the buffer that holds the noise."""
        shape = (self.buffer_size, self.n_envs)
        self.noise_keys = np.zeros(shape, dtype=np.int64)
        self.noise_scales = np.zeros(shape, dtype=np.float32)
        self._noise = self._base = None

    def add(self, *args: Any, **kwargs: Any) -> None:
        """
        Store a step of all environments with its noise.

        :param args: What the stock buffer takes: observation, action, reward, episode start, value, log-probability
        :param kwargs: The same by name
        :raises ValueError: If the log-probability carries no noise
        """
        at = self.LOG_PROB_AT
        noise = noise_of(args[at] if len(args) > at else kwargs["log_prob"])
        if noise is None:
            raise ValueError(
                "the rollout buffer got a transition whose log_prob carries no noise keys, so the update could not replay it. "
                "Hand it the very log-probabilities that policy(obs) gave: operations on them lose the keys. Collect neither "
                "inside perturbed(policy, None) nor with a policy replaced since. A policy of yours that overrides forward "
                "stands behind the flipout class: class Mine(FlipoutActorCriticPolicy, MyPolicy)."
            )
        self._owner, position = noise.owner, self.pos
        self._base = noise.base if self._base in (None, noise.base) else SEVERAL_BASES
        super().add(*args, **kwargs)
        # A user's class may store a step more than once, mirrored for example: all of it has been made under this noise.
        self.noise_keys[position : self.pos] = noise.keys.cpu().numpy()
        self.noise_scales[position : self.pos] = noise.scale.cpu().numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """
        Pickle by the class it was made from, since the class itself is made at run time.

        :param protocol: Pickle protocol
        :return: How to make it again
        """
        derived_from = vars(type(self)).get("DERIVED_FROM")
        if derived_from is None:  # a class of the user's, who derived it from one of ours
            return super().__reduce_ex__(protocol)
        return _empty_keyed, (derived_from,), *super().__reduce_ex__(max(2, protocol))[2:]

    def _rollout_noise(self) -> RowNoise:
        """Noise of padding, then of all transitions in the order of the flattened buffer; made once per rollout."""
        if self._noise is None:
            keys, scales = (_padded(self.swap_and_flatten(array)[:, 0]) for array in (self.noise_keys, self.noise_scales))
            noise = RowNoise(keys.to(self.device), scales.to(self.device), self._owner)
            self._noise = noise.under_base(self._base)
        return self._noise

    def row_noise(self, batch_inds: np.ndarray) -> RowNoise:
        """
        Look up the noise of some transitions, for a ``get`` of your own: hang it on what you yield with ``with_noise``.

        :param batch_inds: Places in the flattened buffer, as ``_get_samples`` takes them
        :return: Noise of these transitions
        """
        # Recurrent buffers have just bound the method that pads the sequences of this batch. It pads with zeros, and row 0
        # is there for them: key 0 at scale 0.
        pad = getattr(self, "pad_and_flatten", None)
        return self._rollout_noise()[batch_inds + 1 if pad is None else pad(batch_inds + 1)]

    def _get_samples(self, batch_inds: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        if len(self.log_probs) != self.noise_keys.size:
            raise ValueError(
                f"the rollout buffer gives samples out of {len(self.log_probs)} rows, and holds the noise of "
                f"{self.noise_keys.size}, so it cannot be told which noise a row has acted under. Where a get of your own "
                "leaves rows out, let it take all of them into its arrays, and choose among the places for _get_samples."
            )
        samples = super()._get_samples(batch_inds, *args, **kwargs)
        if noise_of(samples.observations) is not None:  # hung on by the places that a user's class asked for
            return samples
        if self.MAKES_SAMPLES:
            self._check_places(samples, batch_inds)
        return with_parts(samples, observations=with_noise(samples.observations, self.row_noise(batch_inds)))

    def _check_places(self, samples: Any, batch_inds: np.ndarray) -> None:
        """Look whether a user's class has taken the rows that it was asked for: by their log-probabilities."""
        asked, found = self.log_probs.flatten()[batch_inds], getattr(samples, "old_log_prob", None)
        if isinstance(found, th.Tensor) and found.numel() == len(asked):
            given = found.detach().flatten().cpu().numpy()
            if not np.array_equal(given, asked.astype(given.dtype), equal_nan=True):
                raise ValueError(
                    "the _get_samples of the rollout buffer gives other rows than the places that it was asked for, so it "
                    "cannot be told which noise they acted under. Hang it on there, "
                    "with_noise(observations, self.row_noise(places))."
                )


def _padded(rows: np.ndarray) -> th.Tensor:
    """Rows behind one of zeros."""
    padded = np.empty(len(rows) + 1, dtype=rows.dtype)
    padded[0], padded[1:] = 0, rows
    return th.from_numpy(padded)


class _SamplesByPlace(RolloutBuffer):
    """
    Stands between a user's buffer class and the stock one: the user's may ask for other places than it was asked for, sorted
    ones for example.
    """

    def _get_samples(self, batch_inds: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        samples = super()._get_samples(batch_inds, *args, **kwargs)
        assert isinstance(self, KeyedBufferMixin), "keyed puts the mixin before it"
        return with_parts(samples, observations=with_noise(samples.observations, self.row_noise(batch_inds)))


@cache
def keyed(buffer_class: type[RolloutBuffer]) -> type[RolloutBuffer]:
    """
    Derive the key-storing version of a rollout buffer class.

    :param buffer_class: Stock class, or a user's subclass of one
    :return: Subclass that stores and returns the noise; a class that does so already is returned as it is
    :raises TypeError: If it is no subclass of ``RolloutBuffer``
    """
    if not (isinstance(buffer_class, type) and issubclass(buffer_class, RolloutBuffer)):
        raise TypeError(
            f"rollout_buffer_class={buffer_class!r} cannot store noise keys: it must be a subclass of RolloutBuffer "
            "(DictRolloutBuffer for Dict observations). Derive it from one, or leave rollout_buffer_class out."
        )
    if issubclass(buffer_class, KeyedBufferMixin):
        return buffer_class
    # __module__ would be "abc" otherwise, which confuses readers of tracebacks.
    members: dict[str, Any] = {
        "DERIVED_FROM": buffer_class,
        "__module__": __name__,
        "__doc__": f"{buffer_class.__name__} that stores noise keys.",
    }
    arguments = list(signature(buffer_class.add).parameters)  # a user's class may take more, costs for example
    if "log_prob" in arguments:
        members["LOG_PROB_AT"] = arguments.index("log_prob") - 1
    stock = next(base for base in buffer_class.__mro__ if base.__module__.startswith(("stable_baselines3.", "sb3_contrib.")))
    members["MAKES_SAMPLES"] = buffer_class._get_samples is not stock._get_samples  # type: ignore[attr-defined]
    behind = () if stock is buffer_class else (type(f"Keyed{stock.__name__}", (_SamplesByPlace, stock), {}),)
    return type(f"Keyed{buffer_class.__name__}", (KeyedBufferMixin, buffer_class, *behind), members)


def store_noise(buffer: RolloutBuffer) -> None:
    """
    Turn an empty rollout buffer into the key-storing version of itself, in place.

    :param buffer: Rollout buffer, as an algorithm has made it
    :raises TypeError: If it is no ``RolloutBuffer``
    """
    buffer.__class__ = keyed(type(buffer))
    assert isinstance(buffer, KeyedBufferMixin), "that is what keyed makes"
    buffer.reset_noise()


def _empty_keyed(buffer_class: type[RolloutBuffer]) -> RolloutBuffer:
    keyed_class = keyed(buffer_class)
    return keyed_class.__new__(keyed_class)
