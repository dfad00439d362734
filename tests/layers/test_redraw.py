"""Drawing bases: when, from which key, and that nothing else draws."""

from typing import Any

import pytest
import torch as th
from cases import KEYS, every_geometry, every_noise, image, inputs, make, small_net
from lstm_cases import every_option, make_lstm
from torch import nn

from sb3_flipout.layers import (
    FlipoutLayer,
    FlipoutLinear,
    attach,
    effective_weight,
    flipout_layers,
    network_of,
    perturb,
    perturbed,
    redraw,
)
from sb3_flipout.noise import RowNoise, fold
from sb3_flipout.noise.signs import factors_at


@pytest.fixture
def net() -> nn.Sequential:
    th.manual_seed(0)
    return perturb(small_net(), base_key=3)


def bases(net: nn.Module) -> list[th.Tensor]:
    return [
        layer.bases()[1].get("weight_base", th.empty(0)).clone() for layer in net.modules() if isinstance(layer, FlipoutLayer)
    ]


def test_redraw_follows_from_the_present_key(net: nn.Sequential) -> None:
    th.manual_seed(0)
    twin = perturb(small_net(), base_key=3)
    seen = [bases(net)]
    for _ in range(3):
        redraw(net)
        redraw(twin)
        assert all(th.equal(a, b) for a, b in zip(bases(net), bases(twin), strict=True))
        assert all(not th.equal(a, b) for old in seen for a, b in zip(old, bases(net), strict=True))
        seen.append(bases(net))
    redraw(twin, fold(3, 0))
    assert all(th.equal(a, b) for a, b in zip(seen[1], bases(twin), strict=True))


@every_noise
@pytest.mark.parametrize("base_key", [0, 1, -1, 2**63, 2**64 + 5, -(2**70)])
def test_a_given_base_key_is_reproducible(noise: dict[str, str], base_key: int) -> None:
    net = perturb(small_net(), base_key=3, **noise)
    redraw(net, base_key)
    first = bases(net)
    redraw(net)
    redraw(net, base_key)
    assert all(th.equal(a, b) for a, b in zip(first, bases(net), strict=True))
    assert {layer.base_key for layer in net.modules() if isinstance(layer, FlipoutLayer)} == {base_key}


SHARED = dict(family="factorised", noise_sharing="shared")


@every_geometry
@pytest.mark.parametrize("number", [0, 3])
def test_a_factorised_draw_is_the_outer_product_of_its_hashed_vectors(geometry: tuple[str, str], number: int) -> None:
    """Against the vectors hashed one by one, each element by itself."""
    layer = make(geometry, number, **SHARED)
    for base_key in (11, -(2**63), 2**64 + 11):
        redraw(layer, base_key)
        assert_outer_products(layer, 11 if base_key > 11 else base_key, number)


@every_option
def test_each_block_of_a_factorised_draw_has_vectors_of_its_own(options: dict[str, Any]) -> None:
    assert_outer_products(make_lstm(**options, **SHARED), 11, 3)


def assert_outer_products(layer: FlipoutLayer, key: int, number: int) -> None:
    for block in layer.blocks:
        sizes = layer._sizes(block)
        s, r = (
            factors_at(th.full((n,), key), th.arange(n), number, 2 * block.number + vector, "sqrt_normal", th.float64)
            for vector, n in enumerate(sizes)
        )
        weight, bias = layer.base_of(block)
        assert th.equal(weight, layer._outer(r[None], s[None])[0])
        assert bias is None or th.equal(bias, r)


@pytest.mark.parametrize("base_key", [True, 1.0, "1", th.tensor(1)])
def test_a_bad_base_key_is_refused_and_changes_nothing(net: nn.Sequential, base_key: Any) -> None:
    before = bases(net)
    with pytest.raises(TypeError, match=r"base_key must be an integer, got .* of type " + type(base_key).__name__):
        redraw(net, base_key)
    assert all(th.equal(a, b) for a, b in zip(before, bases(net), strict=True))


@every_noise
def test_layers_of_one_shape_have_bases_of_their_own(noise: dict[str, str]) -> None:
    net = perturb(nn.Sequential(*[nn.Linear(5, 5) for _ in range(3)]), base_key=1, **noise)
    for draw in (1, 2):
        redraw(net, draw)
        found = [layer.bases()[1]["weight_base"] for layer in net if layer.noise_config.draws_base]
        assert all(not layer.bases()[1] for layer in net if not layer.noise_config.draws_base)
        if found:
            assert len(found) == 3
            assert all(not th.equal(a, b) for i, a in enumerate(found) for b in found[:i])
        weights = [effective_weight(layer, 4)[0] - layer.weight for layer in net]
        assert all(not th.allclose(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_redraw_of_one_layer_leaves_the_others(net: nn.Sequential) -> None:
    before = bases(net)
    redraw(net[3], 77)
    same = [th.equal(a, b) for a, b in zip(before, bases(net), strict=True)]
    assert same == [True, False, True, True]


def test_redraw_without_noise_changes_no_output(net: nn.Sequential) -> None:
    plain = net(image())
    redraw(net)
    assert th.equal(net(image()), plain)


@every_noise
def test_perturbed_alone_never_draws(noise: dict[str, str]) -> None:
    layer = make(("linear", "plain"), **noise)
    key, before = layer.bases()
    assert set(before) == ({"weight_base", "bias_base"} if layer.noise_config.draws_base else set())
    for _ in range(3):
        with perturbed(layer, KEYS):
            layer(inputs(("linear", "plain"))).sum().backward()
    now_key, now = layer.bases()
    assert now_key == key and set(now) == set(before) and all(now[name] is before[name] for name in before)


@every_noise
def test_base_draws_can_be_bound_again(noise: dict[str, str]) -> None:
    net = perturb(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), base_key=1, **noise)
    network, x = network_of(net), th.ones(len(KEYS), 5)
    with perturbed(net, KEYS):
        before = net(x)
    kept, keys = network.bases(), [layer.base_key for layer in network.layers]
    redraw(net)
    with perturbed(net, KEYS):
        other = net(x)
    network.bind(kept)
    with perturbed(net, KEYS):
        assert th.equal(net(x), before)
    assert [layer.base_key for layer in network.layers] == keys
    assert th.equal(other, before) == (not kept[0][1])
    assert all(name not in net.state_dict() for name in ("0.weight_base", "1.bias_base"))


def test_networks_beside_it_see_the_same_noise() -> None:
    """What is no part of the module, but sees its rows: they are numbered, redrawn and switched together."""
    net, beside = (nn.Sequential(FlipoutLinear(4, 4)) for _ in range(2))
    network = attach(flipout_layers([net, beside]))
    assert network_of(net) is network_of(beside) is network and (net[0].noise_index, beside[0].noise_index) == (0, 1)
    x = th.ones(len(KEYS), 4)
    plain = beside(x)
    with network.activate(RowNoise(KEYS)):
        for layer in (net[0], beside[0]):
            expected = [
                nn.functional.linear(row, *effective_weight(layer, key)) for row, key in zip(x, KEYS.tolist(), strict=True)
            ]
            th.testing.assert_close(layer(x), th.stack(expected))
    assert th.equal(beside(x), plain)
    network.redraw(9)
    assert net[0].base_key == beside[0].base_key == 9
    with perturbed(net, KEYS):  # one of them by name
        assert not th.allclose(net(x), nn.functional.linear(x, net[0].weight, net[0].bias))
        assert th.equal(beside(x), plain)
    redraw(net, 10)
    assert (net[0].base_key, beside[0].base_key) == (10, 9)
