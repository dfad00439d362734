"""Every layer, family, sharing and scale against weights materialised row by row in `oracle.py`."""

from typing import Any

import oracle
import pytest
import torch as th
from cases import KEYS, SCALES, N, every_family, every_geometry, every_noise, inputs, make, plain_twin
from torch import nn

from sb3_flipout.layers import effective_weight, perturb, perturbed, redraw

TIGHT = {"rtol": 0, "atol": 1e-10}


def scale_list(scale: Any) -> list[float]:
    return [float(c) for c in th.ones(N) * (1.0 if scale is None else scale)]


@every_geometry
@every_noise
def test_each_row_sees_its_own_weights(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer, x = make(geometry, **noise), inputs(geometry)
    for scale in (SCALES["one"], SCALES["per_row"]):
        with perturbed(layer, KEYS, scale):
            th.testing.assert_close(layer(x), oracle.forward(layer, x, KEYS, scale_list(scale)), **TIGHT)


@pytest.mark.parametrize("geometry", [("linear", "plain"), ("conv", "groups")], ids="-".join)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@every_noise
def test_scales(geometry: tuple[str, str], noise: dict[str, str], scale: Any) -> None:
    layer, x = make(geometry, **noise), inputs(geometry)
    expected = oracle.forward(layer, x, KEYS, scale_list(scale))
    with perturbed(layer, KEYS, scale):
        th.testing.assert_close(layer(x), expected, **TIGHT)
        with th.no_grad():  # another path for linear layers
            th.testing.assert_close(layer(x), expected, **TIGHT)


@every_geometry
@every_noise
def test_gradients_are_those_of_the_materialised_weights(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer, x = make(geometry, **noise), inputs(geometry).requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    scale = SCALES["per_row"]
    slow = th.autograd.grad(oracle.forward(layer, x, KEYS, scale_list(scale)).square().sum(), wanted)
    with perturbed(layer, KEYS, scale):
        fast = th.autograd.grad(layer(x).square().sum(), wanted)
    for a, b in zip(fast, slow, strict=True):
        th.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@every_geometry
@every_noise
def test_effective_weight_is_the_oracles(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer = make(geometry, **noise)
    for key, scale in [(5, 1.0), (-3, -0.25), (2**62, 0.0)]:
        expected_weight, expected_bias = oracle.row_weights(layer, key, scale)
        for asked in (key, th.tensor(key), th.tensor([key])):
            weight, bias = effective_weight(layer, asked, scale)
            th.testing.assert_close(weight, expected_weight, **TIGHT)
            assert (bias is None) == (layer.bias is None)
            if bias is not None:
                th.testing.assert_close(bias, expected_bias, **TIGHT)


@every_geometry
@every_noise
def test_without_noise_it_is_the_plain_layer(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer, x = make(geometry, dtype=th.float32, **noise), inputs(geometry, dtype=th.float32)
    twin = plain_twin(geometry, layer)
    assert th.equal(layer(x), twin(x))
    assert th.equal(layer.eval()(x), twin(x)) and th.equal(layer.train()(x), twin(x))
    with perturbed(layer, KEYS), perturbed(layer, None):
        assert th.equal(layer(x), twin(x))
    gradients = [th.autograd.grad(net(x).square().sum(), [net.weight])[0] for net in (layer, twin)]
    assert th.equal(*gradients)


def is_bitwise(noise: dict[str, str], layer: Any) -> bool:
    """A draw for each row means one product per row, in another order of summation."""
    return not (noise["noise_sharing"] == "independent" and layer.noise_config.spec.row_draw)


@every_geometry
@every_noise
def test_scale_zero_is_the_plain_layer(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer, x = make(geometry, dtype=th.float32, **noise), inputs(geometry, dtype=th.float32)
    tolerance = {"rtol": 0, "atol": 0} if is_bitwise(noise, layer) else {"rtol": 1e-5, "atol": 1e-5}
    with perturbed(layer, KEYS, 0.0):
        th.testing.assert_close(layer(x), plain_twin(geometry, layer)(x), **tolerance)
    mixed = th.where(th.arange(N) % 2 == 0, 0.0, 1.0)
    with perturbed(layer, KEYS, mixed):
        found = layer(x)
    th.testing.assert_close(found[::2], plain_twin(geometry, layer)(x)[::2], **tolerance)
    assert not th.allclose(found[1::2], plain_twin(geometry, layer)(x)[1::2])


@every_geometry
@every_noise
def test_sigma_zero_is_the_plain_layer_with_its_gradients(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer, x = make(geometry, dtype=th.float32, **noise), inputs(geometry, dtype=th.float32).requires_grad_()
    if layer.weight_sigma is None:
        assert layer.noise_config.spec.sigma == "none"  # the family has no sigma to be 0
        return
    with th.no_grad():
        layer.weight_sigma.zero_()
        if layer.bias_sigma is not None:
            layer.bias_sigma.zero_()
    twin, tolerance = plain_twin(geometry, layer), {"rtol": 0, "atol": 0}
    tolerance = tolerance if is_bitwise(noise, layer) else {"rtol": 1e-4, "atol": 1e-4}
    with perturbed(layer, KEYS):
        found = layer(x)
    expected = twin(x)
    th.testing.assert_close(found, expected, **tolerance)
    ours, theirs = ([x, *(p for n, p in net.named_parameters() if "sigma" not in n)] for net in (layer, twin))
    upstream = th.randn(found.shape, generator=th.Generator().manual_seed(1))
    for a, b in zip(th.autograd.grad(found, ours, upstream), th.autograd.grad(expected, theirs, upstream), strict=True):
        th.testing.assert_close(a, b, **tolerance)


@every_noise
def test_rows_do_not_care_for_their_batch(noise: dict[str, str]) -> None:
    for geometry in [("linear", "plain"), ("linear", "tokens"), ("conv", "groups")]:
        layer, x, scale = make(geometry, **noise), inputs(geometry), SCALES["per_row"]
        with perturbed(layer, KEYS, scale):
            whole = layer(x)
        order = th.tensor([3, 0, 5, 1, 4, 2])
        with perturbed(layer, KEYS[order], scale[order]):
            th.testing.assert_close(layer(x[order]), whole[order], **TIGHT)
        parts = []
        for rows in th.arange(N).split(4):
            with perturbed(layer, KEYS[rows], scale[rows]):
                parts.append(layer(x[rows]))
        th.testing.assert_close(th.cat(parts), whole, **TIGHT)
        with perturbed(layer, KEYS[:1]):
            th.testing.assert_close(layer(x[:1]), whole[:1], **TIGHT)


@every_noise
def test_rows_with_one_key_see_the_same_weights_and_others_do_not(noise: dict[str, str]) -> None:
    for geometry in [("linear", "plain"), ("conv", "plain")]:
        layer = make(geometry, **noise)
        x = inputs(geometry, 1).expand(N, *inputs(geometry, 1).shape[1:])
        with perturbed(layer, KEYS):
            y = layer(x)
        th.testing.assert_close(y[4], y[0], **TIGHT)  # KEYS[4] == KEYS[0]
        same = noise["noise_sharing"] == "shared"
        assert all(bool(th.allclose(y[n], y[0])) == same for n in (1, 2, 3, 5))


@every_noise
def test_a_convolution_stays_one_kernel_per_row(noise: dict[str, str]) -> None:
    """With circular padding a kernel commutes with shifts; a sign per pixel would not."""
    layer, x = make(("conv", "circular_same"), **noise), inputs(("conv", "circular_same"))
    with perturbed(layer, KEYS, SCALES["per_row"]):
        shifted = layer(x.roll((2, 3), dims=(2, 3)))
        th.testing.assert_close(shifted, layer(x).roll((2, 3), dims=(2, 3)), **TIGHT)
        assert not th.allclose(shifted, layer(x))


@every_noise
def test_a_whole_network_against_the_oracle(noise: dict[str, str]) -> None:
    """Numbers tell its layers apart, also those of one shape."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    perturb(net, base_key=9, **noise)
    redraw(net, 21)
    x, scale = th.randn(N, 4, dtype=th.float64, generator=th.Generator().manual_seed(2)), SCALES["per_row"]
    expected = x
    for number, layer in enumerate(net):
        if isinstance(layer, nn.Linear):
            assert layer.noise_index == number // 2
            expected = oracle.forward(layer, expected, KEYS, scale_list(scale))
        else:
            expected = layer(expected)
    with perturbed(net, KEYS, scale):
        th.testing.assert_close(net(x), expected, **TIGHT)


@every_family
def test_the_base_is_the_documented_draw(family: str) -> None:
    """A pure function of base key and number, on a generator of its own."""
    for number, base_key in [(0, 0), (3, 11), (3, -5), (4, 2**63 + 1)]:
        layer = make(("linear", "plain"), family=family)
        layer.noise_index = number
        redraw(layer, base_key)
        weight, bias = oracle.base(layer)
        key, draws = layer.bases()
        assert key == base_key and set(draws) <= {"weight_base", "bias_base"}
        for found, expected in [(draws.get("weight_base"), weight), (draws.get("bias_base"), bias)]:
            assert (found is None) == (expected is None) and (found is None or th.equal(found, expected))


@every_family
def test_bfloat16_and_autocast_are_the_same_up_to_rounding(family: str) -> None:
    layer, x = make(("linear", "plain"), dtype=th.float32, family=family), inputs(("linear", "plain"), dtype=th.float32)
    with perturbed(layer, KEYS):
        exact = layer(x)
        with th.autocast("cpu", dtype=th.bfloat16):
            rough = layer(x)
    th.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.3)
    layer.bfloat16()
    with perturbed(layer, KEYS):
        th.testing.assert_close(layer(x.bfloat16()).float(), exact, rtol=0.1, atol=0.3)
