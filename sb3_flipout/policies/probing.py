"""
What is found out about a policy's networks by running them when it is built: where the rows of a batch lie in what layers get,
and whether an observation that several rows share may be given once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_flipout.layers import FlipoutLayer, PerturbedNetwork
from sb3_flipout.layers.config import layer_noise
from sb3_flipout.layers.convert import Wanted, perturb_named
from sb3_flipout.layers.row_layout import PROBED_ROWS, RowLayout, find_layouts
from sb3_flipout.noise import RowNoise, RowsByKey
from sb3_flipout.policies.observations import drawn, looked_at, stacked

_INPUTS = (1, 16)  # batches of so many: a single one, and enough that a rare dropout shows
_TRIES = 3  # sets of observations: units that are dead for one may live for another
# Packages whose networks are known; what is not of them is a user's.
_KNOWN = ("torch", "stable_baselines3", "sb3_contrib", "sb3_flipout", "builtins", "abc", "typing")


def give_layouts(layers: Mapping[str, FlipoutLayer], run: Callable[[Any], Any], policy: BasePolicy) -> bool:
    """
    Find out where the rows of a batch lie in the inputs of layers, and tell the layers.

    :param layers: Layers by their names in the policy
    :param run: Runs on a batch of observations what calls the layers
    :param policy: The policy, in which nothing changes
    :return: Whether a layer was called
    :raises ValueError: If what a layer gets has no rows of the batch
    """
    if _is_stock(policy, layers):
        return True
    with looked_at(policy):
        found = _found(layers, run, policy)
    for name, layout in found.items():
        if layout is None:
            raise ValueError(
                f"{name} ({type(layers[name]).__name__}) gets an input in which it cannot be told which entry belongs to "
                "which row of the batch: it mixes rows (attention and recurrent layers do that to input that is batch first, "
                "unless they are made with batch_first=True), or is the same for all of them. So no row could have weights of "
                "its own there. "
                f"Leave the module out: policy_kwargs=dict(skip=[{name!r}])."
            )
        layers[name].row_layout = layout
    return bool(found)


def layouts_in(network: nn.Module, policy: BasePolicy) -> dict[str, RowLayout | None]:
    """
    Find out where rows lie in the inputs of all layers of a plain network that can be perturbed.

    :param network: Plain network, which is perturbed for it
    :param policy: The policy that it is of, in which nothing changes
    :return: Layout by the layer's name, nothing where all is as usual; ``None`` for layers in which no row can have weights of
        its own, since rows are mixed in what they get, or nobody calls them
    """
    perturb_named(dict(network.named_modules()), layer_noise({}), Wanted("all", (), True), lambda: 0)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, FlipoutLayer)}
    if _is_stock(policy, layers):
        return {}
    with looked_at(policy, network):
        found = _found(layers, network, policy)
    return {name: found.get(name) for name in layers} if found else {}


def takes_inputs_once(net: Callable[[Any], th.Tensor], network: PerturbedNetwork, policy: BasePolicy, times: int) -> bool:
    """
    Find out whether a network says the same when it gets each observation once that several neighbouring rows have.

    It does not where a branch without perturbed layers meets one with them, where something is drawn for each row (dropout),
    or where a layer cannot tell its rows: those networks get all rows.

    :param net: Runs on a batch of observations, each of them once where the active noise says so
    :param network: The network of its perturbed layers
    :param policy: The policy, in which nothing changes
    :param times: How many rows each observation is for
    :return: Whether it does
    """
    observations = drawn(policy.observation_space)
    with looked_at(policy):
        policy.train()  # as when it learns
        return all(_says_the_same(net, network, policy, times, list(islice(observations, n))) for n in _INPUTS)


def _says_the_same(
    net: Callable[[Any], th.Tensor], network: PerturbedNetwork, policy: BasePolicy, times: int, rows: list[Any]
) -> bool:
    keys = th.arange(times, device=policy.device)
    noise = RowNoise(keys.repeat(len(rows)))
    by_key = RowsByKey(keys, 1.0, th.arange(times * len(rows), device=policy.device).view(times, -1).T.flatten())
    try:
        obs = policy.obs_to_tensor(stacked([row for row in rows for _ in range(times)]))[0]
        with network.activate(noise):
            of_rows = net(obs)
        noise.rows_per_input = times
        with network.activate(noise):
            of_inputs = net(obs)
        with network.activate(by_key):
            sorted_by_key = net(obs)
    except Exception:  # it cannot take such a batch, so it will not be given one
        return False
    tolerance = 1e-5 * float(of_rows.abs().max())
    return all(
        found.shape == of_rows.shape and th.allclose(found, of_rows, 1e-4, tolerance, equal_nan=True)
        for found in (of_inputs, sorted_by_key)
    )


def nothing_own(module: nn.Module) -> bool:
    """
    Tell whether no module in a policy or network is of a class of the user's.

    :param module: Policy or network
    :return: Whether all are of torch, SB3 or this package
    """
    classes = {base for one in module.modules() for base in type(one).__mro__}
    return all(base.__module__.split(".")[0] in _KNOWN for base in classes)


def is_seen_by_us_alone(network: nn.Module) -> bool:
    """
    Tell whether nobody but us sees the rows inside a network, where they may be sorted by member.

    :param network: Network
    :return: Whether it has no module of the user's, no hooks, and no forward that is put on an instance
    """
    return nothing_own(network) and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in network.modules()
    )


def _is_stock(policy: BasePolicy, layers: Mapping[str, FlipoutLayer]) -> bool:
    """Whether nothing in a policy is the user's: then linear layers and convolutions get rows first, as SB3 builds them."""
    return nothing_own(policy) and all(isinstance(layer, (nn.Linear, nn.Conv2d)) for layer in layers.values())


def _found(layers: Mapping[str, FlipoutLayer], run: Callable[[Any], Any], policy: BasePolicy) -> dict[str, Any]:
    """Layouts of the layers that are called. What some observations do not show, others may."""
    observations = drawn(policy.observation_space)
    found: dict[str, Any] = {}
    for _ in range(_TRIES):
        rows, others = (list(islice(observations, PROBED_ROWS)) for _ in range(2))

        def changed(batch: list[Any], row: int, others: list[Any] = others) -> list[Any]:
            return [*batch[:row], others[row], *batch[row + 1 :]]

        try:
            new = find_layouts(
                layers, lambda batch: run(policy.obs_to_tensor(stacked(batch))[0]), rows, changed, _batch_dimension
            )
        except Exception:  # a network that cannot take such a batch is taken as it is: rows first
            return found
        found = {name: new.get(name) or found.get(name) for name in {**found, **new}}
        if all(layout is not None for layout in found.values()):
            break
    return found


def _batch_dimension(layer: nn.Module, x: th.Tensor) -> int:
    """The dimension that torch calls the batch's."""
    if isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)) and x.dim() == 3:
        return 0 if layer.batch_first else 1
    return 0
