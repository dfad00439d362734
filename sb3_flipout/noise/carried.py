"""Noise that travels with data: observations that carry the noise of their rows.

:func:`with_noise` hangs row noise on a tensor or a dictionary of tensors, :func:`noise_of` reads it back. What users do to
observations on the way from the buffer to the policy keeps it as far as rows stay rows: slicing takes the noise of the slice,
arithmetic, casts and reshapes behind the first dimension keep it, ``torch.cat`` joins it. Whatever else gives a
plain tensor that remembers which operation lost the noise, so that the error in the update can say so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch as th

from sb3_flipout.noise.row_operations import noise_after, overwrites, same_noise
from sb3_flipout.noise.rows import RowNoise

_LOST_BY = "noise_lost_by"

# What is about the tensor itself, and not about its numbers: a plain view of it would be another leaf of autograd's graph.
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
_OF_THE_TENSOR = frozenset(("__get__", "__set__", "requires_grad_", "retain_grad", "backward", "grad", *_HOOKS))


class KeyedTensor(th.Tensor):
    """Observations that carry the noise of their rows."""

    row_noise: RowNoise | None  # None after rows of other noise were written into it

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
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _OF_THE_TENSOR:
            with th._C.DisableTorchFunctionSubclass():
                found = func(*args, **kwargs)
            return _plain(found) if name == "__get__" else found  # `real` of a real tensor is the tensor itself
        with th._C.DisableTorchFunctionSubclass():
            result = func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
        if overwrites(name, args) and isinstance(args[0], KeyedTensor):
            args[0].__dict__.update({"row_noise": None, _LOST_BY: name})
        if not isinstance(result, (th.Tensor, tuple, list)):
            return result
        if isinstance(result, (tuple, list)) and not any(isinstance(part, th.Tensor) for part in result):
            return result  # numbers, as `tolist` gives them
        noise = noise_after(name, args, kwargs, result)
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
        copied = _plain(self).clone()
        return copied if self.row_noise is None else with_noise(copied, self.row_noise)


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
        noise = noise if not found else found[0] if all(same_noise(part, found[0]) for part in found) else None
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
    if isinstance(data, dict):
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
