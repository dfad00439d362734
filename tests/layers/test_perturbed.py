"""The contexts in which rows see noise, and the drawing of bases."""

import re
import threading
from typing import Any

import pytest
import torch as th
from cases import KEYS, SCALES, N, every_noise, image, inputs, make, small_net
from torch import nn

from sb3_flipout.layers import (
    FlipoutConv2d,
    FlipoutLayer,
    FlipoutLinear,
    attach,
    effective_weight,
    flipout_layers,
    perturb,
    perturbed,
)
from sb3_flipout.noise import RowNoise


@pytest.fixture
def net() -> nn.Sequential:
    th.manual_seed(0)
    return perturb(small_net(), base_key=3)


def test_noise_is_on_inside_and_off_outside(net: nn.Sequential) -> None:
    plain = net(image())
    with perturbed(net, KEYS):
        first, second = net(image()), net(image())
    assert th.equal(first, second) and not th.allclose(first, plain)
    assert th.equal(net(image()), plain)
    with perturbed(net, KEYS):
        assert th.equal(net(image()), first)


def test_train_and_eval_make_no_difference(net: nn.Sequential) -> None:
    found = []
    for mode in (net.train, net.eval):
        mode()
        with perturbed(net, KEYS):
            found.append(net(image()))
    assert th.equal(*found)


def test_contexts_nest(net: nn.Sequential) -> None:
    plain = net(image())
    with perturbed(net, KEYS):
        outer = net(image())
    with perturbed(net, KEYS + 1):
        inner = net(image())
    with perturbed(net, KEYS):
        with perturbed(net, KEYS + 1):
            assert th.equal(net(image()), inner)
            with perturbed(net, None):
                assert th.equal(net(image()), plain)
            assert th.equal(net(image()), inner)
        assert th.equal(net(image()), outer)
    assert th.equal(net(image()), plain)


def test_an_exception_restores_what_was_before(net: nn.Sequential) -> None:
    plain = net(image())
    with perturbed(net, KEYS):
        outer = net(image())
        with pytest.raises(RuntimeError, match="inside"), perturbed(net, KEYS + 1):
            raise RuntimeError("inside")
        assert th.equal(net(image()), outer)
    with pytest.raises(ValueError), perturbed(net, KEYS[:2]):
        net(image())
    assert th.equal(net(image()), plain)


def test_a_context_that_is_never_entered_does_nothing(net: nn.Sequential) -> None:
    plain = net(image())
    perturbed(net, KEYS)
    assert th.equal(net(image()), plain)


def test_it_concerns_one_network_only(net: nn.Sequential) -> None:
    th.manual_seed(0)
    other, plain = perturb(small_net(), base_key=3), net(image())
    with perturbed(net, KEYS):
        assert th.equal(other(image()), plain)
        with perturbed(other, KEYS):
            assert th.equal(other(image()), net(image()))


def test_two_networks_in_two_threads_do_not_meet() -> None:
    nets = [perturb(small_net(), base_key=key) for key in (1, 2)]
    expected = []
    for net in nets:
        with perturbed(net, KEYS):
            expected.append(net(image()))
    meet, found = threading.Barrier(2, timeout=60), [[], []]

    def work(me: int) -> None:
        for _ in range(20):
            with perturbed(nets[me], KEYS):
                meet.wait()
                found[me].append(nets[me](image()).detach())
                meet.wait()
            found[me].append(nets[me](image()).detach())

    threads = [threading.Thread(target=work, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for net, outputs, noisy in zip(nets, found, expected, strict=True):
        assert len(outputs) == 40
        assert all(th.equal(y, noisy) for y in outputs[::2]) and all(th.equal(y, net(image())) for y in outputs[1::2])


def test_a_layer_by_itself_sees_what_it_sees_in_its_network(net: nn.Sequential) -> None:
    plain = net[3](th.ones(N, 27))
    with perturbed(net[0], KEYS):
        part = net[0](image())
        assert th.equal(net[3](th.ones(N, 27)), plain)
    with perturbed(net, KEYS):
        assert th.equal(net[0](image()), part)


def test_row_noise_serves_as_keys(net: nn.Sequential) -> None:
    noise = RowNoise(KEYS, SCALES["per_row"])
    with perturbed(net, KEYS, SCALES["per_row"]):
        expected = net(image())
    with perturbed(net, noise):
        assert th.equal(net(image()), expected)
    with perturbed(net, noise[2:4]):
        th.testing.assert_close(net(image()[2:4]), expected[2:4])


def test_a_scale_beside_row_noise_is_not_ignored(net: nn.Sequential) -> None:
    noise = RowNoise(KEYS)
    with perturbed(net, KEYS, 0.5):
        expected = net(image())
    try:
        with perturbed(net, noise, 0.5):
            assert th.equal(net(image()), expected)
    except (TypeError, ValueError):
        pass  # refusing it is fine, too


@every_noise
def test_scales_of_rows(noise: dict[str, str]) -> None:
    """One number is that number for every row; a negative one is the antithetic twin."""
    layer, x = make(("linear", "plain"), **noise), inputs(("linear", "plain"))
    found = {}
    for c in (0.5, -0.5):
        with perturbed(layer, KEYS, c):
            found[c] = layer(x)
        with perturbed(layer, KEYS, th.full((N,), c)):
            assert th.equal(layer(x), found[c])
    mean = th.nn.functional.linear(x, layer.weight, layer.bias)
    th.testing.assert_close(found[0.5] - mean, mean - found[-0.5])
    assert not th.allclose(found[0.5], mean)


ROW_MISMATCHES = [KEYS[:2], KEYS.repeat(2), KEYS[:0]]


@pytest.mark.parametrize("keys", ROW_MISMATCHES, ids=len)
@every_noise
def test_another_number_of_rows_is_refused(noise: dict[str, str], keys: th.Tensor) -> None:
    for geometry in [("linear", "plain"), ("linear", "tokens"), ("conv", "plain")]:
        layer = make(geometry, **noise)
        with pytest.raises(ValueError, match=rf"got an input of shape .* keys for {len(keys)} rows"), perturbed(layer, keys):
            layer(inputs(geometry))
        assert layer(inputs(geometry)).shape[0] == N


@every_noise
def test_inputs_without_a_dimension_of_rows_are_refused(noise: dict[str, str]) -> None:
    """One unbatched input looks like rows of scalars, or like channels."""
    for layer, x in [(FlipoutLinear(N, 2, **noise), th.ones(N)), (FlipoutConv2d(N, 2, 1, **noise), th.ones(N, 3, 3))]:
        shape = re.escape(str(tuple(x.shape)))
        match = (
            rf"{type(layer).__name__} got an input of shape {shape} and keys for {N} rows\. "
            r"The rows of a batch must be the first dimension .* perturb\(net, skip="
        )
        with pytest.raises(ValueError, match=match), perturbed(layer, KEYS):
            layer(x)


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        (KEYS.float(), TypeError, r"int64 tensor.*torch\.float32"),
        (KEYS.int(), TypeError, r"torch\.int32"),
        (7, TypeError, "got int"),
        (KEYS[None], ValueError, r"shape \(1, 6\)"),
        (KEYS.to("meta"), ValueError, r"network's device cpu, got meta; use keys\.to\('cpu'\)"),
    ],
)
def test_bad_keys_are_refused_and_change_nothing(net: nn.Sequential, keys: Any, error: type[Exception], match: str) -> None:
    plain = net(image())
    with pytest.raises(error, match=match), perturbed(net, keys):
        pass
    assert th.equal(net(image()), plain)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), th.ones(2), th.full((N,), th.nan)])
def test_bad_scales_are_refused_and_change_nothing(net: nn.Sequential, scale: Any) -> None:
    plain = net(image())
    with pytest.raises(ValueError, match="scale must"), perturbed(net, KEYS, scale):
        pass
    assert th.equal(net(image()), plain)


def test_a_network_without_perturbed_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no perturbed layer; call sb3_flipout\.perturb"):
        perturbed(small_net(), KEYS)
    with perturbed(small_net(), None):  # mean weights are all it has
        pass


def test_converting_after_the_first_use_is_noticed() -> None:
    net = small_net()
    with perturbed(net, None):
        plain = net(image())
    perturb(net, layers="linear")
    with perturbed(net, KEYS):
        linear_only = net(image())
    perturb(net)
    with perturbed(net, KEYS):
        assert not th.equal(net(image()), linear_only)
    assert not th.equal(linear_only, plain)
    net.append(FlipoutLinear(2, 2))
    with perturbed(net, KEYS):
        net(image())
    assert len({layer.noise_index for layer in net.modules() if isinstance(layer, FlipoutLayer)}) == 5


def test_hand_built_layers_are_numbered_in_order() -> None:
    net = nn.Sequential(FlipoutLinear(4, 4), nn.Sequential(FlipoutLinear(4, 4), FlipoutLinear(4, 4)))
    layers = [layer for layer in net.modules() if isinstance(layer, FlipoutLayer)]
    assert len({layer.base_key for layer in layers}) == 3  # drawn as weights are
    for layer in layers:
        layer.redraw(5)
    assert th.equal(net[0].bases()[1]["weight_base"], net[1][0].bases()[1]["weight_base"])  # not numbered yet
    attach(flipout_layers([net]))
    assert [layer.noise_index for layer in layers] == [0, 1, 2]
    assert len({layer.bases()[1]["weight_base"].sum().item() for layer in layers}) == 3


@every_noise
def test_mixed_networks_serve_each_layer_in_its_way(noise: dict[str, str]) -> None:
    layers = [FlipoutLinear(4, 4), FlipoutLinear(4, 4, **noise), FlipoutLinear(4, 4, family="factorised")]
    net, x = nn.Sequential(*layers), th.randn(N, 4, generator=th.Generator().manual_seed(0))
    with perturbed(net, KEYS):
        found = net(x)
    expected = []
    for row, key in zip(x, KEYS.tolist(), strict=True):
        for layer in layers:
            row = nn.functional.linear(row, *effective_weight(layer, key))
        expected.append(row)
    th.testing.assert_close(found, th.stack(expected))


@pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.Sequential(FlipoutLinear(2, 2)), None])
def test_effective_weight_of_what_is_no_perturbed_layer(layer: Any) -> None:
    with pytest.raises(TypeError, match="layer must be a perturbed layer, got"):
        effective_weight(layer, 0)
