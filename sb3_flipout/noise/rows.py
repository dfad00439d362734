"""Row noise: what one row of a batch carries in every host, its noise key and its noise scale.

It travels with the data: see :mod:`sb3_flipout.noise.carried`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch as th

from sb3_flipout.noise.signs import FactorPlan, check_keys

# A parent expands its factors for all its slices at once up to this size (64 MiB in float32); beyond it, and in
# networks with wide convolutions over long rollouts, each slice expands its own.
_SHARED_EXPANSION = 1 << 24

Index = Any  # whatever indexes the first dimension of a tensor: slice, integer array, integer tensor


#: Said in place of a base key where rows have acted under several.
SEVERAL_BASES = "several"


class NoiseOwner:
    """Says which policy drew some noise. Compared by identity: a copy of a policy is another policy, and owns none of it."""


class RowNoise:
    """
    Keys and scales of a batch of rows, with the factors expanded from them remembered.

    :param keys: Noise keys, shape (N,), int64
    :param scale: Noise scales c: shape (N,), or one number for all rows, finite (negative: the antithetic twin);
        ``None`` for 1. A tensor is looked at once: do not write into it afterwards
    :param owner: Whose noise it is: another policy ignores it when it finds it on data; ``None`` for anybody's
    :raises TypeError: If ``keys`` is not an int64 tensor
    :raises ValueError: If ``keys`` or ``scale`` has a wrong shape or device, or a scale is not finite
    """

    #: For how many rows each input is; :meth:`for_rows` says where they lie. What is perturbed may get each input once.
    rows_per_input: int = 1
    #: How many rows, next to each other, have the same key, so that what is made of keys need not be made of each row.
    rows_per_key: int = 1
    #: Key of the base under which the rows have acted, or that there are several; ``None``: it is the present one.
    base: int | str | None = None

    def __init__(self, keys: th.Tensor, scale: th.Tensor | float | None = None, owner: NoiseOwner | None = None) -> None:
        check_keys(keys)
        self.owner = owner
        self._keys: th.Tensor | None = keys
        self._scale: th.Tensor | None = None if scale is None else _checked_scale(scale, keys)
        self._parent: tuple[RowNoise, Index] | None = None
        self._plain = scale is None  # at scale 1, so that the factors need no multiplication
        #: Whether the scale of every row is 0: then all of them see the mean weights, and nothing need be computed for it.
        self.silent = scale is not None and _all_zero(scale)
        self._unit: RowNoise | None = None  # the same rows at scale 1, where their factors are shared
        self._factors: dict[tuple[FactorPlan, th.dtype], th.Tensor] = {}

    @property
    def keys(self) -> th.Tensor:
        """Noise keys, shape (N,), int64."""
        if self._keys is None:
            assert self._parent is not None, "a slice of row noise knows its parent"
            self._keys = _take(self._parent[0].keys, self._parent[1])
        return self._keys

    @property
    def scale(self) -> th.Tensor:
        """Noise scales, shape (N,), float32."""
        if self._scale is None:
            parent = self._parent
            self._scale = th.ones_like(self.keys, dtype=th.float32) if parent is None else _take(parent[0].scale, parent[1])
        return self._scale

    def under_base(self, base: int | str | None) -> RowNoise:
        """
        Note the base under which the rows have acted. These rows may be held for steps under another one, so they stay.

        :param base: As :attr:`base` says
        :return: The same rows
        """
        noted = self[:]
        noted.base = base
        return noted

    def materialise(self) -> int:
        """
        Take keys and scales out of the parent now, so that compiled code finds tensors and no index that changes.

        :return: Number of rows
        """
        if self._keys is None or self._scale is None:
            self._keys, self._scale = self.keys, self.scale
        return int(self._keys.shape[0])

    def __len__(self) -> int:
        return self.keys.shape[0]

    def __getitem__(self, index: Index) -> RowNoise:
        """
        Take some of the rows; nothing is copied or hashed before it is needed.

        :param index: Slice, integers or a mask over the rows
        :return: Noise of those rows
        """
        child = object.__new__(RowNoise)
        child._keys = child._scale = child._unit = None
        child.owner, child._plain, child.silent, child._factors = self.owner, self._plain, self.silent, {}
        child.base = self.base
        child._parent = (self, index)
        return child

    def at_scale(self, scale: th.Tensor, silent: bool | None = None) -> RowNoise:
        """
        Set other scales for the same rows. Where a scale moves at each step, their keys are not hashed again for it.

        :param scale: Noise scales, shape (N,), on the device of the keys
        :param silent: Whether all of them are 0, if the caller knows; ``None`` asks the device
        :return: Noise of these rows at those scales
        """
        if not self._plain:
            return RowNoise(self.keys, scale, self.owner).under_base(self.base)
        twin = self[:]
        twin._scale, twin._plain, twin._unit = scale, False, self
        twin.silent = _all_zero(scale) if silent is None else silent
        return twin

    def factors(self, plan: FactorPlan, dtype: th.dtype) -> th.Tensor:
        """
        Expand the factors of these rows for all layers of a network.

        Rows that come out of one rollout are expanded once, in the parent, and sliced for each mini-batch and epoch.

        :param plan: The network's plan
        :param dtype: Floating-point type of its layers
        :return: Block of factors, shape (N, ``plan.width``)
        """
        name = (plan, dtype)
        if name not in self._factors:
            with th.inference_mode(False) if th.is_inference_mode_enabled() else nullcontext():
                self._factors[name] = self._expand(plan, dtype)  # kept, and training may ask for it next
        return self._factors[name]

    def _expand(self, plan: FactorPlan, dtype: th.dtype) -> th.Tensor:
        if self._unit is not None:
            return plan.scaled(self._unit.factors(plan, dtype), self.scale)
        parent = self._parent
        if parent is not None and len(parent[0]) * plan.width <= _SHARED_EXPANSION:
            return _take(parent[0].factors(plan, dtype), parent[1])
        return plan.expand(self.keys, None if self._plain else self.scale, dtype)

    def for_rows(self, of_inputs: th.Tensor) -> th.Tensor:
        """
        Repeat what there is of each input for the rows that have it: here neighbours.

        :param of_inputs: Something of each input, shape (N / ``rows_per_input``, ...)
        :return: The same of each row, shape (N, ...)
        """
        return of_inputs if self.rows_per_input == 1 else of_inputs.repeat_interleave(self.rows_per_input, dim=0)

    def repeat_keys(self, factors: th.Tensor) -> th.Tensor:
        """
        Repeat what there is of each key for the rows that have it.

        :param factors: Something of each key, shape (N / ``rows_per_key``, ...)
        :return: The same of each row, shape (N, ...)
        """
        return factors if self.rows_per_key == 1 else factors.repeat_interleave(self.rows_per_key, dim=0)

    def in_order(self, of_rows: th.Tensor) -> th.Tensor:
        """
        Bring what there is of each row into the order of the batch.

        :param of_rows: Something of each row, shape (N, ...)
        :return: The same, in the order of the batch; here it is in it already
        """
        return of_rows

    @staticmethod
    def cat(parts: Sequence[RowNoise]) -> RowNoise:
        """
        Join the noise of several batches, in their order.

        :param parts: Row noise, at least one
        :return: Noise of all rows; nobody's, where the parts are of several policies
        """
        owners = {id(part.owner): part.owner for part in parts}
        owner = next(iter(owners.values())) if len(owners) == 1 else None
        found = RowNoise(th.cat([part.keys for part in parts]), th.cat([part.scale for part in parts]), owner)
        bases = {part.base for part in parts}
        return found.under_base(bases.pop() if len(bases) == 1 else SEVERAL_BASES)


class RowsByKey(RowNoise):
    """
    Every input under every one of K keys, sorted by key: the rows of the first key, in the order of the inputs, then those of
    the second. With few keys their weights can be made, once for all inputs.

    :param keys: Keys, shape (K,), int64
    :param scale: Noise scale of all rows
    :param order: Where each row of the batch stands in here, shape (N,), int64; N is a multiple of K
    :raises ValueError: If it is none
    """

    def __init__(self, keys: th.Tensor, scale: float, order: th.Tensor) -> None:
        if not len(keys) or not len(order) or len(order) % len(keys):
            raise ValueError(
                f"order must have a multiple of {len(keys)} rows, got {len(order)}: each input is under each of the keys."
            )
        self.rows_per_input, self.rows_per_key = len(keys), len(order) // len(keys)
        super().__init__(self.repeat_keys(keys), scale)
        self._each = RowNoise(keys, scale)
        self._order = order

    def factors(self, plan: FactorPlan, dtype: th.dtype) -> th.Tensor:
        """
        Expand the factors of the keys.

        :param plan: The network's plan
        :param dtype: Floating-point type of its layers
        :return: Block of factors, shape (K, ``plan.width``): one row for each key
        """
        return self._each.factors(plan, dtype)

    def for_rows(self, of_inputs: th.Tensor) -> th.Tensor:
        """
        Repeat what there is of each input for the rows that have it: all inputs, once for each key.

        :param of_inputs: Something of each input, shape (N / K, ...)
        :return: The same of each row, shape (N, ...)
        """
        return of_inputs.repeat(self.rows_per_input, *[1] * (of_inputs.dim() - 1))

    def __getitem__(self, index: Index) -> RowNoise:
        """
        Take some of the rows, which are sorted by nothing then.

        :param index: Slice, integers or a mask over the rows
        :return: Noise of those rows
        """
        return RowNoise(self.keys, self.scale, self.owner)[index]

    def in_order(self, of_rows: th.Tensor) -> th.Tensor:
        """
        Bring what there is of each row into the order of the batch.

        :param of_rows: Shape (N, ...), sorted by key
        :return: The same, in the order of the batch
        """
        return of_rows.index_select(0, self._order)


def _take(rows: th.Tensor, index: Index) -> th.Tensor:
    if isinstance(index, np.ndarray):
        index = th.as_tensor(index, device=rows.device)
    if not (isinstance(index, th.Tensor) and index.dtype == th.int64):
        return rows[index]
    # index_select moves whole rows; tensor[index] goes element by element and takes six times as long. It counts from 0 alone.
    return rows.index_select(0, th.where(index < 0, index + len(rows), index))


def _all_zero(scale: th.Tensor | float) -> bool:
    return not (scale.any() if isinstance(scale, th.Tensor) else scale)


def _checked_scale(scale: th.Tensor | float, keys: th.Tensor) -> th.Tensor:
    if not isinstance(scale, th.Tensor):
        if not np.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}; use 0.0 for mean weights.")
        return th.full(keys.shape, float(scale), device=keys.device, dtype=th.float32)
    if scale.shape != keys.shape or scale.device != keys.device:
        raise ValueError(
            f"scale must be one number or have the shape {tuple(keys.shape)} and the device {keys.device} of the keys, "
            f"got shape {tuple(scale.shape)} on {scale.device}."
        )
    if not bool(th.isfinite(scale).all()):
        raise ValueError("scale must be finite, got NaN or infinity; use 0.0 for mean weights.")
    return scale.to(th.float32)
