"""What torch's operations do to rows: which rows their results have, as far as it can be told."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch as th

from sb3_flipout.noise.rows import Index, RowNoise

# Operations whose result has, row by row, what its inputs have in the same rows, whatever their further arguments are.
_ROW_BY_ROW = frozenset(
    """
    __abs__ __add__ __and__ __eq__ __ge__ __gt__ __iadd__ __imul__ __invert__ __isub__ __itruediv__ __le__ __lt__ __mod__
    __mul__ __ne__ __neg__ __or__ __pow__ __radd__ __rmod__ __rmul__ __rpow__ __rsub__ __rtruediv__ __sub__ __truediv__
    __floordiv__ abs abs_ add add_ alias ascontiguous atan bfloat16 bool byte ceil clamp clamp_ clamp_max clamp_min clip clip_
    clone contiguous cos cpu cuda detach detach_ div div_ double exp expm1 float floor half int lerp log log1p log2 long
    masked_fill masked_fill_ maximum minimum mul mul_ multiply nan_to_num neg negative pin_memory pow relu remainder
    requires_grad_ round rsqrt rsub sigmoid sign sin sqrt square sub sub_ subtract tanh to to_dense true_divide trunc type
    type_as where zero_ copysign divide empty_like fill_ full_like normal_ ones_like rand_like randn_like zeros_like
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout
    """.split()
)
# Operations on dimensions that keep rows if the first dimension takes no part: where their dimension arguments stand.
_ON_DIMENSIONS = {
    "flatten": slice(1, 2),
    "unflatten": slice(1, 2),
    "unsqueeze": slice(1, 2),
    "squeeze": slice(1, 2),
    "transpose": slice(1, 3),
    "swapaxes": slice(1, 3),
    "movedim": slice(1, 3),
    "flip": slice(1, None),
    "roll": slice(2, 3),
    "softmax": slice(1, 2),
    "log_softmax": slice(1, 2),
    "cumsum": slice(1, 2),
}
# Operations that write the rows of their later arguments into their first.
_WRITES = {"__setitem__", "copy_", "index_copy_", "index_put_", "scatter_", "masked_scatter_", "set_"}
_NAMED_DIMENSIONS = {"dim", "dims", "start_dim", "dim0", "dim1", "axis0", "axis1", "source", "destination"}


def noise_after(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> RowNoise | list[RowNoise] | None:
    """
    Find out which noise the rows of a result have.

    :param name: Name of torch's operation
    :param args: Its arguments, in which tensors that carry noise have it as ``row_noise``
    :param kwargs: Its arguments by name
    :param result: Its result
    :return: Noise of the rows, one for each part where there are several; ``None`` where it cannot be told what they are
    """
    found = list(_noises((*args, *kwargs.values())))
    if not found:
        return None
    first = found[0]
    if name in ("cat", "concat", "concatenate"):
        return _after_cat(args, kwargs, found)
    if name in ("split", "chunk", "tensor_split"):
        return _after_split(args[2:], kwargs, first, result)
    if not all(same_noise(noise, first) for noise in found):
        return None
    if name == "__getitem__":
        return _after_index(args[0], args[1], first, result)
    if name == "index_select" and (args[1] if len(args) > 1 else kwargs.get("dim")) == 0:
        return first[args[2] if len(args) > 2 else kwargs["index"]]
    if name in ("view", "reshape", "expand", "repeat", "permute", "pad"):
        return first if _keeps_rows(name, args, kwargs, first) else None
    if name in _ON_DIMENSIONS:
        n_dims = args[0].dim() + (name == "unsqueeze")  # of the result, where the new dimension is counted
        return first if _spares_first(args[_ON_DIMENSIONS[name]], kwargs, n_dims) else None
    if not isinstance(result, th.Tensor) or name not in _ROW_BY_ROW:
        return None
    # With more dimensions than before, broadcasting has put another one first.
    widened = any(_is_keyed(value) and value.dim() != result.dim() for value in (*args, *kwargs.values()))
    return None if widened else first


def overwrites(name: str, args: tuple[Any, ...]) -> bool:
    """
    Tell whether an operation has written rows with other noise into a tensor, which then no longer knows whose rows it has.

    :param name: Name of torch's operation
    :param args: Its arguments, the tensor first
    :return: Whether it has
    """
    written = [noise for noise in _noises(args[1:])] if name in _WRITES else []
    return bool(written) and not all(same_noise(noise, getattr(args[0], "row_noise", None)) for noise in written)


def _noises(values: Any) -> Iterator[RowNoise]:
    for value in values:
        if _is_keyed(value):
            yield value.row_noise
        elif type(value) in (list, tuple):
            yield from _noises(value)


def _is_keyed(value: Any) -> bool:
    return isinstance(value, th.Tensor) and getattr(value, "row_noise", None) is not None


def same_noise(a: RowNoise, b: RowNoise | None) -> bool:
    """
    Tell whether two are the same noise of the same rows.

    :param a: Row noise
    :param b: Row noise
    :return: Whether they are
    """
    if a is b:
        return True
    if b is None or len(a) != len(b):
        return False
    if a.owner is not b.owner or a.base != b.base:
        return False
    return bool((a.keys == b.keys).all() and (a.scale == b.scale).all())


def _after_cat(args: tuple[Any, ...], kwargs: dict[str, Any], found: list[RowNoise]) -> RowNoise | None:
    parts = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if dim not in (0, -parts[0].dim()):
        return found[0] if all(same_noise(noise, found[0]) for noise in found) else None
    return RowNoise.cat(found) if all(map(_is_keyed, parts)) else None


def _after_split(further: tuple[Any, ...], kwargs: dict[str, Any], noise: RowNoise, parts: Any) -> list[RowNoise] | None:
    if (further[0] if further else kwargs.get("dim", 0)) != 0:
        return [noise] * len(parts)
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))
    return [noise[start:stop] for start, stop in pairwise(starts)]


def _after_index(data: th.Tensor, index: Index, noise: RowNoise, result: th.Tensor) -> RowNoise | None:
    """Noise of the rows that an index selects; ``None`` where the first dimension is no longer that of the rows."""
    rows = index[0] if isinstance(index, tuple) and index else index
    if isinstance(rows, th.Tensor) and rows.dim() == 0:
        rows = int(rows) if rows.dtype != th.bool else None
    if rows is None or isinstance(rows, (int, np.integer)):  # a single row is no batch any more
        return None
    if isinstance(index, tuple) and (rows is Ellipsis or isinstance(rows, slice)) and _come_first(index):
        return None
    if rows is Ellipsis:
        taken = index if isinstance(index, tuple) else (index,)
        return noise if len([part for part in taken if part is not None]) <= data.dim() else None
    if isinstance(rows, th.Tensor) and rows.dim() != 1:
        return None
    return noise[rows] if result.dim() else None


def _come_first(index: tuple[Any, ...]) -> bool:
    """Whether tensors stand apart in an index: torch then puts what they select before all other dimensions."""
    kept = [part is None or part is Ellipsis or isinstance(part, slice) for part in index]
    places = [place for place, keeps in enumerate(kept) if not keeps]
    return len(places) > 1 and places[-1] - places[0] >= len(places)


def _keeps_rows(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], noise: RowNoise) -> bool:
    """Whether a change of shape leaves the first dimension what it was."""
    if name == "pad":  # from the last dimension on, two numbers for each
        return len(args[1] if len(args) > 1 else kwargs["pad"]) <= 2 * (args[0].dim() - 1)
    sizes = args[1] if len(args) > 1 and isinstance(args[1], (tuple, list, th.Size)) else args[1:]
    if not sizes or isinstance(sizes[0], th.dtype):
        return False
    if name == "permute":
        return int(sizes[0]) == 0
    more = len(sizes) - args[0].dim()
    if name in ("expand", "repeat"):
        return more == 0 and int(sizes[0]) in ((1,) if name == "repeat" else (-1, len(noise)))
    if int(sizes[0]) == len(noise):
        return True
    rest = [int(size) for size in sizes[1:]]
    return int(sizes[0]) == -1 and args[0].numel() == len(noise) * int(th.Size(rest).numel())


def _spares_first(dimensions: tuple[Any, ...], kwargs: dict[str, Any], n_dims: int) -> bool:
    """Whether the dimensions that an operation is about are given, and none of them is the first one."""
    named = [value for name, value in kwargs.items() if name in _NAMED_DIMENSIONS]
    given: list[Any] = []
    for value in (*dimensions, *named):
        given += list(value) if isinstance(value, (tuple, list)) else [value]
    numbers = [value for value in given if isinstance(value, int)]
    return bool(numbers) and all(number % max(n_dims, 1) != 0 for number in numbers)
