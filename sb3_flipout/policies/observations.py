"""Batches of observations, and the extractors that fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
from torch import nn


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


def to_take_from(obs: Any) -> Any:
    """
    Hand a dictionary of observations to one of several networks, which may take parts out of it.

    :param obs: Tensor, or dictionary of tensors
    :return: The same; a dictionary is another one
    """
    return dict(obs) if isinstance(obs, dict) else obs


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
