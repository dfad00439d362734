"""`OneHotLinear` by look-up against matrix products with one-hot vectors, and against weights written down row by row."""

import math
from typing import Any

import pytest
import torch as th
from cases import every_noise, shake
from torch import nn

from sb3_flipout.layers import FlipoutLinear, FlipoutOneHotLinear, OneHotLinear, effective_weight, perturb, perturbed, redraw

VALUES, OUTPUTS = 70, 5
INDEX = th.tensor([0, 69, 3, 3, 64, 63])
KEYS = th.tensor([5, -3, 2**62, 77, 5, -(2**63)])
SCALE = th.tensor([1.0, 0.0, -1.0, 0.25, 2.0, -0.5])


def pair(**noise: Any) -> tuple[FlipoutOneHotLinear, FlipoutLinear]:
    """The layer, and the linear layer with the same means, sigma and base."""
    found, linear = FlipoutOneHotLinear(VALUES, OUTPUTS, **noise).double(), FlipoutLinear(VALUES, OUTPUTS, **noise).double()
    shake(found)
    for layer in (found, linear):
        layer.noise_index = 4
        redraw(layer, 11)
    for name, parameter in linear.named_parameters():
        value = getattr(found, name).detach()
        parameter.data.copy_(value.t() if value.dim() == 2 else value)
    return found, linear


def by_hand(layer: FlipoutOneHotLinear) -> th.Tensor:
    rows = []
    for index, key, c in zip(INDEX.tolist(), KEYS.tolist(), SCALE.tolist(), strict=True):
        weight, bias = effective_weight(layer, key, c)
        assert bias is not None
        rows.append(weight[index] + bias)
    return th.stack(rows)


@every_noise
def test_each_row_looks_up_its_own_weights(noise: dict[str, str]) -> None:
    layer, _ = pair(**noise)
    with perturbed(layer, KEYS, SCALE):
        found = layer(INDEX)
    th.testing.assert_close(found, by_hand(layer), rtol=0, atol=1e-10)
    learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    expected = th.autograd.grad(by_hand(layer).square().sum(), learned)
    for a, b in zip(th.autograd.grad(found.square().sum(), learned), expected, strict=True):
        th.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["gaussian", "factorised"])
def test_it_is_the_linear_layer_on_one_hot_inputs(family: str) -> None:
    layer, linear = pair(family=family)
    if family == "gaussian":  # the base of a weight is drawn in the layout of the layer
        sigma = [layer.weight_sigma, layer.bias_sigma]
        draws = layer.deltas()
        assert sigma[0] is not None and sigma[1] is not None and draws[1] is not None
        linear.bind((0, {"weight_base": (draws[0] / sigma[0]).detach().t(), "bias_base": (draws[1] / sigma[1]).detach()}))
    x = nn.functional.one_hot(INDEX, VALUES).double()
    th.testing.assert_close(layer(INDEX), linear(x), rtol=0, atol=1e-10)
    with perturbed(layer, KEYS, SCALE), perturbed(linear, KEYS, SCALE):
        th.testing.assert_close(layer(INDEX), linear(x), rtol=0, atol=1e-10)


def test_it_begins_as_the_linear_layer_does() -> None:
    """Uniform within 1/sqrt(n): extremes of 35,000 draws are within 0.1 % of the bound with probability 1 - 1e-15."""
    layer = FlipoutOneHotLinear(7000, OUTPUTS)
    bound = 1 / math.sqrt(7000)
    assert 0.999 * bound < float(layer.weight.detach().abs().max()) <= bound
    assert float(layer.bias.detach().abs().max()) <= bound
    assert layer.weight_sigma is not None and th.allclose(layer.weight_sigma, th.full_like(layer.weight_sigma, 0.5 * bound))
    plain = perturb(nn.Sequential(OneHotLinear(6, 2)))
    assert isinstance(plain[0], FlipoutOneHotLinear)


def test_it_can_be_drawn_anew_and_not_made_of_a_table() -> None:
    layer = OneHotLinear(100, 8)
    nn.init.constant_(layer.bias, 3.0)
    layer.reset_parameters()
    assert float(layer.weight.detach().abs().max()) <= 0.1 and float(layer.bias.detach().abs().max()) <= 0.1
    with pytest.raises(TypeError, match="OneHotLinear cannot be made from a table alone"):
        OneHotLinear.from_pretrained(th.zeros(3, 2))
