"""Arguments of a policy as JSON, and back: numbers, texts, spaces, classes of a fixed list. Nothing is imported by name."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from torch import nn

from sb3_flipout.policies.extractors import MinAtarCNN, OneHotExtractor

_ACTIVATIONS: tuple[str, ...] = (
    "CELU",
    "ELU",
    "GELU",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LeakyReLU",
    "Mish",
    "ReLU",
    "ReLU6",
    "SELU",
)
_ACTIVATIONS += ("SiLU", "Sigmoid", "Softplus", "Softsign", "Tanh")
_OPTIMIZERS = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")

#: The classes that a description can name.
CLASSES: dict[str, type] = {
    **{name: getattr(nn, name) for name in _ACTIVATIONS},
    **{name: getattr(th.optim, name) for name in _OPTIMIZERS},
    **{kind.__name__: kind for kind in (RMSpropTFLike, FlattenExtractor, NatureCNN, CombinedExtractor, MinAtarCNN)},
    OneHotExtractor.__name__: OneHotExtractor,
}
_NUMBERS = 16_000_000  # of an observation or action: two images of 1080 lines in colour; more is no policy's
_DEPTH, _LENGTH = 20, 1000  # of what is told of an argument


def described(value: Any, name: str) -> Any:
    """
    Describe a value.

    :param value: Argument of a policy
    :param name: Name of the argument
    :return: What JSON can hold
    :raises TypeError: If it cannot be described
    :raises ValueError: If it is a space so large that nobody would believe the description
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return described(value.item(), name)
    if isinstance(value, (list, tuple)):
        parts = [described(part, name) for part in value]
        return parts if isinstance(value, list) else {"tuple": parts}
    if isinstance(value, spaces.Space):
        return {"space": _described_space(_within(value, name), name)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: described(part, name) for key, part in value.items()}}
    if isinstance(value, type) and value in CLASSES.values():
        return {"class": value.__name__}
    kind = value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
    raise TypeError(
        f"{name} is {kind}, which cannot be described without code: only SB3's and this package's extractors, torch's "
        "activations and optimizers, numbers and texts can. Save policy.state_dict() as safetensors and build the policy in "
        "your own code, or export policy.to_plain_policy() by torch.onnx."
    )


def _described_space(space: spaces.Space[Any], name: str) -> dict[str, Any]:
    if isinstance(space, spaces.Box):
        bounds = {end: _bounds(getattr(space, end)) for end in ("low", "high")}
        return dict(kind="Box", shape=list(space.shape), dtype=str(space.dtype), **bounds)
    if isinstance(space, spaces.Discrete):
        return dict(kind="Discrete", n=int(space.n), start=int(space.start))
    if isinstance(space, spaces.MultiDiscrete):
        if space.nvec.ndim > 1:
            raise TypeError(f"{name} is a MultiDiscrete of more than one dimension, which SB3's policies do not take.")
        return dict(kind="MultiDiscrete", nvec=space.nvec.tolist(), start=space.start.tolist())
    if isinstance(space, spaces.MultiBinary):
        return dict(kind="MultiBinary", n=list(space.n) if isinstance(space.n, (tuple, list)) else int(space.n))
    if isinstance(space, spaces.Dict):
        return dict(kind="Dict", spaces={key: _described_space(part, name) for key, part in space.spaces.items()})
    raise TypeError(f"{name} is a {type(space).__name__}, which no policy of SB3's takes.")


def _bounds(of_space: np.ndarray) -> Any:
    """One number where all are the same; infinite ones as texts, which JSON has no numbers for."""
    numbers = [float(one) if math.isfinite(one) else repr(float(one)) for one in of_space.flatten()]
    return numbers[0] if len(set(numbers)) == 1 else numbers


def value_of(told: Any, name: str, depth: int = 0) -> Any:
    """
    Make a value of its description.

    :param told: What :func:`described` gave
    :param name: Name of the argument
    :param depth: How deep in the argument it stands
    :return: The value
    :raises ValueError: If it is no such description
    """
    depth += 1
    if depth > _DEPTH or (isinstance(told, (str, list, dict)) and len(told) > _LENGTH):
        raise ValueError(f"{name} is told in more than {_LENGTH} parts or {_DEPTH} levels, as no argument of a policy is.")
    if told is None or isinstance(told, (bool, float, str)) or (isinstance(told, int) and abs(told) < 1 << 63):
        return told
    if isinstance(told, list):
        return [value_of(part, name, depth) for part in told]
    if isinstance(told, dict) and len(told) == 1:
        ((kind, inner),) = told.items()
        if kind == "float" and inner in ("inf", "-inf", "nan"):
            return float(inner)
        if kind == "tuple" and isinstance(inner, list):
            return tuple(value_of(part, name, depth) for part in inner)
        if kind == "dict" and isinstance(inner, dict):
            return {key: value_of(part, name, depth) for key, part in inner.items()}
        if kind == "space" and isinstance(inner, dict):
            return _within(_space(inner, name), name)
        if kind == "class" and isinstance(inner, str) and inner in CLASSES:
            return CLASSES[inner]
    raise ValueError(f"{name} is told as {str(told)[:80]!r}, which is no description of a value.")


def _space(told: dict[str, Any], name: str) -> spaces.Space[Any]:
    kind = told.get("kind")
    try:
        if kind == "Box":
            shape = _sizes(told["shape"], name)
            dtype: Any = np.dtype(told["dtype"]).type
            low, high = (_array(told[end], shape).astype(dtype) for end in ("low", "high"))
            return spaces.Box(low, high, shape, dtype)
        if kind == "Discrete":
            return spaces.Discrete(_sizes([told["n"]], name)[0], start=int(told["start"]))
        if kind == "MultiDiscrete":
            return spaces.MultiDiscrete(
                np.array(_sizes(told["nvec"], name)), start=np.array([int(one) for one in told["start"]])
            )
        if kind == "MultiBinary":
            n = told["n"]
            return spaces.MultiBinary(_sizes(n, name) if isinstance(n, list) else _sizes([n], name)[0])
        if kind == "Dict":
            # In the order of the policy that was exported, which gymnasium would sort: networks join the parts in it.
            return spaces.Dict(OrderedDict((key, _space(part, name)) for key, part in told["spaces"].items()))
    except (KeyError, TypeError, AttributeError, AssertionError, OverflowError) as error:
        raise ValueError(f"{name} is told as {str(told)[:80]!r}, which is no description of a space: {error!r}.") from error
    raise ValueError(f"{name} is told to be a space of the kind {str(kind)[:80]!r}, which there is not.")


def _within(space: spaces.Space[Any], name: str) -> spaces.Space[Any]:
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
    if len(parts) > _LENGTH or sum(flatdim(part) for part in parts) > _NUMBERS:
        raise ValueError(f"{name} has more than {_NUMBERS} numbers, or {_LENGTH} parts, which no policy's has.")
    return space


def _sizes(told: Any, name: str) -> tuple[int, ...]:
    sizes = tuple(told)[:_LENGTH]
    if not all(type(size) is int and size > 0 for size in sizes) or math.prod(sizes) > _NUMBERS:
        raise ValueError(
            f"{name} is told to have the sizes {str(sizes)[:80]}; they must be positive, and {_NUMBERS} in all at most."
        )
    return sizes


def _array(told: Any, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.array([float(one) for one in told] if isinstance(told, list) else float(told))
    return np.broadcast_to(numbers if numbers.ndim == 0 else numbers.reshape(shape), shape)
