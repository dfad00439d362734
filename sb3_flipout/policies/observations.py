"""Batches of observations, and the extractors that fit them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import nn

_LARGE = 1e6


def n_rows(obs: Any) -> int:
    """
    Count the rows of a batch of observations.

    :param obs: Tensor, or dictionary of tensors
    :return: Size of the first dimension
    """
    return len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)


def each_once(obs: Any, times: int) -> Any:
    """
    Take each of the observations once that a batch repeats, copy next to copy.

    :param obs: Tensor, or dictionary of tensors
    :param times: How often each one stands in the batch
    :return: The observations, 1 / times as many
    """
    if times == 1:
        return obs
    return {name: part[::times] for name, part in obs.items()} if isinstance(obs, dict) else obs[::times]


def each_for(members: int, obs: Any) -> Any:
    """
    Repeat a batch of observations for each of several members, one after the other.

    :param members: How many
    :param obs: Tensor, or dictionary of tensors, N rows
    :return: The same with members * N rows
    """
    if isinstance(obs, dict):
        return {name: each_for(members, part) for name, part in obs.items()}
    return obs.repeat(members, *[1] * (obs.dim() - 1))


def check_batch(space: spaces.Space[Any], obs: Any) -> None:
    """
    Refuse tensors of one observation, or of another shape than the space's.

    :param space: Observation space
    :param obs: Tensor, or dictionary of tensors; arrays are not looked at
    :raises ValueError: If a tensor is no batch
    """
    of_parts = getattr(space, "spaces", {None: space})
    for name, part in (obs if isinstance(obs, dict) else {None: obs}).items():
        shape = getattr(of_parts.get(name), "shape", None)
        if shape is None or not isinstance(part, th.Tensor):
            continue
        dims = {len(shape) + 1}
        if name is not None and shape == ():
            dims.add(2)  # replay buffers give a Discrete part of a dictionary as (N, 1)
        if part.dim() not in dims:
            of = "" if name is None else f" of {name!r}"
            raise ValueError(
                f"member_values takes tensors{of} of the shape (N, {', '.join(map(str, shape)) or '...'}), got "
                f"{tuple(part.shape)}; of one observation, observation[None]."
            )


def to_take_from(obs: Any) -> Any:
    """
    Hand a dictionary of observations to one of several networks, which may take parts out of it.

    :param obs: Tensor, or dictionary of tensors
    :return: The same; a dictionary is another one
    """
    return dict(obs) if isinstance(obs, dict) else obs


def drawn(space: spaces.Space[Any], seed: int = 0) -> Iterator[Any]:
    """
    Draw observations of ordinary size, to look at networks by.

    :param space: Observation space, whose own generator is not moved
    :param seed: Seed
    :return: Observations, without end
    """
    ordinary = _without_largest_bounds(space)
    ordinary.seed(seed)
    while True:
        yield ordinary.sample()


def _without_largest_bounds(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """Bounds such as those of the largest float say that there are none; between them, samples would be as large."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _without_largest_bounds(part) for name, part in space.spaces.items()})
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        kind: Any = space.dtype
        low, high = np.where(space.low < -_LARGE, -np.inf, space.low), np.where(space.high > _LARGE, np.inf, space.high)
        return spaces.Box(low.astype(kind), high.astype(kind), dtype=kind)
    return copy.deepcopy(space)


def stacked(rows: Sequence[Any]) -> Any:
    """
    Make a batch of observations.

    :param rows: Observations: arrays, numbers, or dictionaries of them
    :return: Array, or dictionary of arrays
    """
    if isinstance(rows[0], dict):
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return np.stack(rows)


@contextmanager
def looked_at(*networks: nn.Module) -> Iterator[None]:
    """
    Run networks to see what they do, in evaluation mode, and leave everything as it was: modes, torch's generator, and
    buffers, which a network may write into in each forward pass (running statistics).

    :param networks: Networks
    :return: Context manager
    """
    modules = [module for network in networks for module in network.modules()]
    modes = [(module, module.training) for module in modules]
    known = [(module._buffers, name) for module in modules for name, buffer in module._buffers.items() if _is_filled(buffer)]
    kept: list[Any] = [(buffers, name, buffers[name], buffers[name].clone()) for buffers, name in known]  # type: ignore[union-attr]
    try:
        with th.no_grad(), th.random.fork_rng(devices=[]):
            for network in networks:
                network.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with th.no_grad():
            for buffers, name, buffer, value in kept:
                buffers[name] = buffer
                if not th.equal(buffer, value):
                    buffer.copy_(value)


def _is_filled(buffer: th.Tensor | None) -> bool:
    return buffer is not None and not th.nn.parameter.is_lazy(buffer)


def check_extractor(observation_space: spaces.Space[Any], policy_class: type, kwargs: Mapping[str, Any]) -> None:
    """
    Refuse dictionary observations for extractors of single ones; SB3 does so for its own policy names only.

    :param observation_space: Observation space
    :param policy_class: Policy class, whose constructor says which features extractor is the default
    :param kwargs: Keyword arguments of the policy
    :raises ValueError: If the space and the extractor do not fit
    """
    constructors = (vars(base)["__init__"] for base in policy_class.__mro__ if "__init__" in vars(base))
    defaults = (signature(constructor).parameters.get("features_extractor_class") for constructor in constructors)
    default = next(parameter.default for parameter in defaults if parameter is not None)
    extractor = kwargs.get("features_extractor_class", default)
    if isinstance(observation_space, spaces.Dict) and extractor in (FlattenExtractor, NatureCNN):
        raise ValueError(
            'the observation space is a Dict, which needs "FlipoutMultiInputPolicy" (or a features_extractor_class of your '
            f"own), got a policy with {extractor.__name__}."
        )
