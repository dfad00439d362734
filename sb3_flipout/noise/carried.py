"""Noise that travels with data: observations that carry the noise of their rows.

:func:`with_noise` hangs row noise on a tensor or a dictionary of tensors, :func:`noise_of` reads it back. What users do to
observations on the way from the buffer to the policy keeps it as far as rows stay rows: slicing takes the noise of the slice,
arithmetic, casts and reshapes behind the first dimension keep it, ``torch.cat`` joins it. Whatever else gives a plain
tensor that
remembers which operation lost the noise, so that the error in the update can say so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch as th

from sb3_flipout.noise.rows import Index, RowNoise

_LOST_BY = "noise_lost_by"

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
_NAMED_DIMENSIONS = {"dim", "dims", "start_dim", "dim0", "dim1", "axis0", "axis1", "source", "destination"}


class KeyedTensor(th.Tensor):
    """Observations that carry the noise of their rows."""

    row_noise: RowNoise

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """
        Apply an operation to the plain tensors, and hang on its result the noise that its rows still have.

        :param func: Operation
        :param types: Types of its inputs
        :param args: Its arguments
        :param kwargs: Its arguments by name
        :return: Its result
        """
        kwargs = kwargs or {}
        with th._C.DisableTorchFunctionSubclass():
            result = func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__", "__repr__") or not isinstance(result, (th.Tensor, tuple, list)):
            return result
        if isinstance(result, (tuple, list)) and not any(isinstance(part, th.Tensor) for part in result):
            return result  # numbers, as `tolist` gives them
        noise = _noise_after(name, args, kwargs, result)
        if isinstance(result, (tuple, list)):
            noises = noise if isinstance(noise, list) else [None] * len(result)
            return type(result)([_hung(part, of_part, name) for part, of_part in zip(result, noises, strict=True)])
        return _hung(result, None if isinstance(noise, list) else noise, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """
        Pickle and copy as a plain tensor: noise belongs to a run, not to what is stored of it.

        :param protocol: Pickle protocol
        :return: How to make the tensor again
        """
        return _plain(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> th.Tensor:
        """
        Copy the tensor; the copy carries the same noise.

        :param memo: What has been copied already
        :return: Copy
        """
        return with_noise(_plain(self).clone(), self.row_noise)


class KeyedDict(dict[str, Any]):
    """Dictionary observations that carry the noise of their rows, on the dictionary and on each tensor in it."""

    row_noise: RowNoise

    def copy(self) -> KeyedDict:
        """
        Copy the dictionary, not its tensors.

        :return: Dictionary with the same noise
        """
        return with_noise(without_noise(self), self.row_noise)

    def __deepcopy__(self, memo: Any) -> KeyedDict:
        """
        Copy the dictionary and its tensors; the copy carries the same noise, of the same policy.

        :param memo: What has been copied already
        :return: Copy
        """
        return with_noise({name: copy.deepcopy(part, memo) for name, part in self.items()}, self.row_noise)


def with_noise(data: Any, noise: RowNoise) -> Any:
    """
    Hang row noise on observations.

    :param data: Tensor, or dictionary of tensors, of N rows
    :param noise: Noise of these rows
    :return: The same observations, carrying the noise
    """
    if isinstance(data, dict):
        keyed: Any = KeyedDict({name: with_noise(part, noise) for name, part in data.items()})
    else:
        keyed = _plain(data).as_subclass(KeyedTensor)
    keyed.row_noise = noise
    return keyed


def noise_of(data: Any) -> RowNoise | None:
    """
    Read the row noise that data carries.

    :param data: Anything; of a plain dictionary, the tensors in it count
    :return: Its row noise, or ``None`` if it carries none
    """
    noise: RowNoise | None = getattr(data, "row_noise", None)
    if isinstance(data, Mapping):
        # What was put into a dictionary since it got its noise counts: rows may have been taken in another order.
        found = [part for part in map(noise_of, data.values()) if part is not None]
        if noise is None and len(found) < len(data):
            return None
        noise = noise if not found else found[0] if all(_same(part, found[0]) for part in found) else None
    return noise


def lost_by(data: Any) -> str | None:
    """
    Tell which operation took the noise off data.

    :param data: Observations without noise
    :return: Name of the operation; ``None`` if there never was any, as far as is known
    """
    if isinstance(data, Mapping):
        return next(filter(None, map(lost_by, data.values())), None)
    return getattr(data, _LOST_BY, None)


def without_noise(data: Any) -> Any:
    """
    Take observations without their noise.

    :param data: Observations
    :return: The same storage as plain tensors
    """
    if type(data) is th.Tensor:  # the usual case of what is collected
        return data
    if isinstance(data, KeyedDict):
        return {name: _plain(part) for name, part in data.items()}
    return _plain(data)


def _plain(value: Any) -> Any:
    if isinstance(value, KeyedTensor):
        with th._C.DisableTorchFunctionSubclass():
            return value.as_subclass(th.Tensor)
    if type(value) in (list, tuple) and any(isinstance(part, KeyedTensor) for part in value):
        return type(value)(map(_plain, value))
    return value


def _hung(result: Any, noise: RowNoise | None, name: str) -> Any:
    if not isinstance(result, th.Tensor):
        return result
    if noise is not None and result.dim() and result.shape[0] == len(noise):
        return with_noise(result, noise)
    setattr(result, _LOST_BY, name)
    return result


def _noise_after(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> RowNoise | list[RowNoise] | None:
    """Noise of the rows of a result; ``None`` where it cannot be told what its rows are."""
    found = list(_noises((*args, *kwargs.values())))
    first = found[0]
    if name in ("cat", "concat", "concatenate"):
        return _after_cat(args, kwargs, found)
    if name in ("split", "chunk", "tensor_split"):
        return _after_split(args[2:], kwargs, first, result)
    if not all(_same(noise, first) for noise in found):
        return None
    if name == "__getitem__":
        return _after_index(args[0], args[1], first, result)
    if name == "index_select" and (args[1] if len(args) > 1 else kwargs.get("dim")) == 0:
        return first[args[2] if len(args) > 2 else kwargs["index"]]
    if name in ("view", "reshape", "expand", "repeat", "permute"):
        return first if _keeps_rows(name, args, first) else None
    if name in _ON_DIMENSIONS:
        n_dims = args[0].dim() + (name == "unsqueeze")  # of the result, where the new dimension is counted
        return first if _spares_first(args[_ON_DIMENSIONS[name]], kwargs, n_dims) else None
    if not isinstance(result, th.Tensor) or name not in _ROW_BY_ROW:
        return None
    # With more dimensions than before, broadcasting has put another one first.
    widened = any(isinstance(value, KeyedTensor) and value.dim() != result.dim() for value in (*args, *kwargs.values()))
    return None if widened else first


def _noises(values: Any) -> Iterator[RowNoise]:
    for value in values:
        if isinstance(value, KeyedTensor):
            yield value.row_noise
        elif type(value) in (list, tuple):
            yield from _noises(value)


def _same(a: RowNoise, b: RowNoise | None) -> bool:
    if a is b:
        return True
    if b is None or len(a) != len(b):
        return False
    return bool((a.keys == b.keys).all() and (a.scale == b.scale).all()) and a.owner is b.owner


def _after_cat(args: tuple[Any, ...], kwargs: dict[str, Any], found: list[RowNoise]) -> RowNoise | None:
    parts = args[0] if args else kwargs["tensors"]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if dim not in (0, -parts[0].dim()):
        return found[0] if all(_same(noise, found[0]) for noise in found) else None
    return RowNoise.cat(found) if all(isinstance(part, KeyedTensor) for part in parts) else None


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
    if rows is None or isinstance(rows, (int, bool)):  # a single row is no batch any more
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


def _keeps_rows(name: str, args: tuple[Any, ...], noise: RowNoise) -> bool:
    """Whether a change of shape leaves the first dimension what it was."""
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
