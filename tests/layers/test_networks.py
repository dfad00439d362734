"""Which network a layer is of, and what is perturbed of it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_flipout.layers import (
    effective_weight,
    flipout_layers,
    perturb,
    perturbed,
    redraw,
    restore,
)
from sb3_flipout.layers.config import LayerNoise
from sb3_flipout.layers.interface import attach, network_of, without
from sb3_flipout.layers.network import PerturbedNetwork
from sb3_flipout.layers.row_view import Ask, RowView
from sb3_flipout.noise import RowNoise

KEYS = th.arange(3)


def two() -> nn.Sequential:
    net: nn.Sequential = perturb(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), sigma_init=1.0)
    return net


def compiled(net: nn.Module) -> Any:
    """As ``torch.compile`` wraps it; importing that takes seconds."""
    return SimpleNamespace(_orig_mod=net)


def test_the_network_of_a_module_and_of_its_parts() -> None:
    net = two()
    network = network_of(net)
    assert network_of(net) is network, "it is made once"
    assert network_of(net[0]) is network and network_of(compiled(net)) is network
    assert network_of(SimpleNamespace(perturbed_network=network)) is network  # type: ignore[arg-type]
    assert list(network.layers) == [net[0], net[1]] and not network.of_policy


def test_a_network_is_made_anew_where_it_is_no_longer_whole() -> None:
    net = two()
    before = network_of(net)
    restore(net[0])
    after = network_of(net)
    assert list(after.layers) == [net[1]]
    x = th.ones(3, 2)
    with perturbed(net, KEYS):
        assert th.equal(net[0](x), nn.Linear.forward(net[0], x)) and not th.equal(net[1](x), nn.Linear.forward(net[1], x))
    joined = nn.Sequential(two(), two())
    assert len({layer.noise_index for layer in flipout_layers([joined])}) == 2, "each numbered by itself"
    whole = network_of(joined)
    assert sorted(layer.noise_index for layer in whole.layers) == [0, 1, 2, 3]  # type: ignore[type-var]
    assert network_of(joined) is whole and before is not whole


def test_networks_of_two_policies_are_not_joined() -> None:
    net = nn.Sequential(two(), two())
    attach(flipout_layers([net[0]]), of_policy=True)
    with pytest.raises(ValueError) as told:
        network_of(net)
    assert str(told.value) == (
        "Sequential holds layers of several networks, that of a policy among them, so one noise cannot be about all of them. "
        "Name the policy itself, or one of its networks."
    )


def test_layers_that_leave_take_no_other_with_them() -> None:
    net = two()
    network = attach(flipout_layers([net]), of_policy=True)
    without([net[0]])  # type: ignore[list-item]
    assert list(network.layers) == [net[1]] and network.of_policy


class Names(nn.Module):
    """Names its network, as policies do, and holds a part of it alone."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.perturbed_network, self.part = network_of(net), net[0]


def test_a_module_that_names_its_network_means_all_of_it() -> None:
    net = two()
    names = Names(net)
    for module in (names, compiled(names)):
        with perturbed(module, KEYS):
            assert all(layer.row_view() is not None for layer in net)
        redraw(module, 9)
        assert [layer.base_key for layer in net] == [9, 9]
        redraw(net, 8)


def test_a_layer_that_left_belongs_to_the_old_network_no_more() -> None:
    net = two()
    network = network_of(net)
    other = attach(flipout_layers([net[1]]))
    assert network_of(net[1]) is other
    alone = network_of(net[0])
    assert alone is not network and list(alone.layers) == [net[0]]


def test_a_layer_that_is_perturbed_otherwise_is_planned_anew() -> None:
    net = two()
    network = network_of(net)
    net[0].init_noise(LayerNoise(family="factorised"), 3, 0)
    assert network_of(net) is not network


def test_what_was_said_of_the_rows() -> None:
    net = two()
    network = network_of(net)
    assert network.active is None and network.visits is None
    assert PerturbedNetwork(network.layers).of_policy is False and PerturbedNetwork(network.layers, True).of_policy is True
    with perturbed(net, None):
        assert network.active is Ask.MEAN_WEIGHTS
    with network.activate(Ask.EXPLICIT):
        assert network.active is None
        with pytest.raises(RuntimeError) as told:
            net(th.ones(3, 2))
        with perturbed(net, KEYS):
            net(th.ones(3, 2))
    assert str(told.value) == (
        "a perturbed FlipoutLinear was called in an update without noise, so what it learned from would not be what was "
        "collected. Call the policy's own methods with the observations of the batch, which carry their noise; in an "
        "evaluate_actions of your own, write its lines into `with sb3_flipout.perturbed(self, "
        "sb3_flipout.noise.noise_of(obs)):`; off-policy, ask the whole network, self.q_net(samples.observations) say, and not "
        "parts of it; ask for mean weights with `with sb3_flipout.perturbed(policy, None):`; or leave "
        'the module out with policy_kwargs=dict(skip=["its.name"]).'
    )


@pytest.mark.parametrize("rows_per_input", [1, 2, 3])
def test_rows_of_one_input_are_all_there_at_scale_0(rows_per_input: int) -> None:
    net: nn.Module = perturb(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), learn_sigma=False)
    noise = RowNoise(th.arange(2 * rows_per_input), 0.0)
    noise.rows_per_input = rows_per_input
    x = th.randn(2, 2)
    with perturbed(net, noise):
        th.testing.assert_close(net(x), net(x.repeat_interleave(rows_per_input, 0)))
        assert len(net(x)) == 2 * rows_per_input


def test_layers_leave_every_network_they_are_in() -> None:
    first, second = two(), two()
    networks = [network_of(net) for net in (first, second)]
    without([first[0], second[1]])  # type: ignore[list-item]
    assert [list(network.layers) for network in networks] == [[first[1]], [second[0]]]


def test_bases_of_another_network_are_refused() -> None:
    network = network_of(two())
    for bases in (network.bases()[:1], network.bases() * 2):
        with pytest.raises(ValueError, match="zip"):
            network.bind(bases)


def test_a_copy_has_seen_nothing() -> None:
    net = two()
    network = network_of(net)
    with network.noting() as visits, perturbed(net, KEYS), network.keeping_deltas():
        net(th.ones(3, 2))
        copied = copy.deepcopy(Names(net)).perturbed_network
        assert visits.given_noise and visits.called == {0, 1} and network.active is not None
    assert (copied.visits, copied.active, copied._kept) == (None, None, None)
    assert network_of(copied.layers[0]) is copied is not network and [layer._slot for layer in copied.layers] == [0, 1]


TYPES = [(th.float64, th.float32), (th.float32, th.float64), (th.bfloat16, th.float32), (th.float64, th.float64)]


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("family", ["factorised", "gaussian"])
def test_networks_of_several_types(types: tuple[th.dtype, ...], family: Any) -> None:
    """Each layer has its factors as precisely as its type can tell."""
    net: Any = perturb(nn.Sequential(*(nn.Linear(4, 3).to(dtype) for dtype in types)), family=family)
    x, scale = th.randn(3, 4, dtype=th.float64), float(th.tensor(0.3))  # as precise as scales are
    with perturbed(net, KEYS, scale):
        for layer, dtype in zip(net, types, strict=True):
            rows = [nn.functional.linear(x[i].to(dtype), *effective_weight(layer, i, scale)) for i in range(3)]
            found = layer(x.to(dtype))
            assert found.dtype == dtype
            eps = th.finfo(dtype).eps
            th.testing.assert_close(found, th.stack(rows), rtol=20 * eps, atol=20 * eps)
            assert {vector.dtype for vector in layer.row_view().vectors()} == {dtype}


@pytest.mark.parametrize("dtype", [th.int32, th.int64])
def test_a_key_of_any_integer_type(dtype: th.dtype) -> None:
    layer = two()[0]
    expected = effective_weight(layer, 5)
    assert all(
        th.equal(one, other) for one, other in zip(effective_weight(layer, th.tensor(5, dtype=dtype)), expected, strict=True)
    )


def test_a_part_alone_is_perturbed_and_another_has_mean_weights() -> None:
    net, x = two(), th.ones(3, 2)
    mean = nn.Linear.forward(net[0], x), nn.Linear.forward(net[1], x)

    def noisy() -> list[bool]:
        return [not th.equal(layer(x), plain) for layer, plain in zip(net, mean, strict=True)]

    with perturbed(net, KEYS):
        assert noisy() == [True, True]
        with perturbed(net[0], None):
            assert noisy() == [False, True]
        with perturbed(net, None):
            assert noisy() == [False, False]
        with perturbed(compiled(net), None):
            assert noisy() == [False, False]
        assert noisy() == [True, True]
    with perturbed(net[1], KEYS):
        assert noisy() == [False, True] and isinstance(network_of(net).active, RowNoise)
    assert noisy() == [False, False]


def test_one_layer_is_drawn_anew() -> None:
    net, x = two(), th.ones(3, 2)

    def outputs() -> list[th.Tensor]:
        with perturbed(net, KEYS), th.no_grad():
            return [net[0](x), net[1](x)]

    before = outputs()
    redraw(net[0], 7)
    after = outputs()
    assert not th.equal(after[0], before[0]) and th.equal(after[1], before[1])
    redraw(net, 7)
    last = outputs()
    assert th.equal(last[0], after[0]) and not th.equal(last[1], before[1])
    redraw(net)
    assert not th.equal(outputs()[0], last[0])


@pytest.mark.parametrize(
    ("shape", "rows", "times", "once"),
    [
        ((2, 3), 4, 2, True),
        ((2,), 4, 2, True),
        ((1,), 3, 3, True),
        ((4,), 4, 2, False),
        ((4,), 4, 1, False),
        ((), 2, 2, False),
        ((0, 3), 0, 2, False),
    ],
)
def test_inputs_that_are_given_once(shape: tuple[int, ...], rows: int, times: int, once: bool) -> None:
    view = RowView(SimpleNamespace(rows_per_input=times), (), rows)  # type: ignore[arg-type]
    assert view.is_once(th.zeros(shape)) is once
