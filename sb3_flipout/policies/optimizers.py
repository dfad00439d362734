"""Optimizers that a user's policy has made, with groups and options of their own: they are kept, and sigma joins them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers import FlipoutLayer


def is_of_the_user(made: th.optim.Optimizer, stock: th.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """
    Tell whether an optimizer is another than SB3 makes: of another class, with other groups or options, or about other
    parameters.

    :param made: The optimizer that the plain policy has made
    :param stock: One that SB3 would make, whatever it is about
    :param parameters: What SB3 would make it about
    :return: Whether it is
    """
    about = {id(parameter) for group in made.param_groups for parameter in group["params"]}
    return type(made) is not type(stock) or _options(made) != _options(stock) or about != set(map(id, parameters))


def count_steps(optimizer: th.optim.Optimizer, count: Callable[..., None]) -> Callable[[], None]:
    """
    Count the steps of an optimizer. One of the user's that has none of torch's hooks (an object round another optimizer, or a
    class that never calls ``super().__init__``) is not counted here: its steps are found as those that nobody has counted.

    :param optimizer: Optimizer
    :param count: What is called after each step
    :return: Ends the counting
    """
    try:
        return optimizer.register_step_post_hook(count).remove
    except AttributeError:
        return lambda: None


def _options(optimizer: th.optim.Optimizer) -> list[dict[str, Any]]:
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def sigmas_of(layers: Iterable[FlipoutLayer]) -> list[tuple[th.Tensor, nn.Parameter]]:
    """
    List the sigmas of layers.

    :param layers: Perturbed layers
    :return: Each mean weight or bias with its sigma
    """
    of_blocks = [zip(block.means(layer), block.sigmas(layer), strict=True) for layer in layers for block in layer.blocks]
    pairs = [pair for of_block in of_blocks for pair in of_block]
    return [(mean, sigma) for mean, sigma in pairs if mean is not None and isinstance(sigma, nn.Parameter)]


def join_sigma(optimizer: th.optim.Optimizer, layers: Iterable[FlipoutLayer]) -> None:
    """
    Put each sigma that learns into the group of its mean weight; where that is in none, it does not learn, nor does sigma.

    :param optimizer: Optimizer without state yet
    :param layers: Perturbed layers
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for mean, sigma in sigmas_of(layers):
        group = groups.get(id(mean))
        if group is not None and sigma.requires_grad and id(sigma) not in groups:
            group["params"].append(sigma)
            groups[id(sigma)] = group
