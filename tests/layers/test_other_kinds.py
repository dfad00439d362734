"""Transposed and other convolutions, cells and embeddings: outputs and gradients are those of one torch module per row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch as th
from cases import every_noise
from kinds import KEYS, KINDS, SCALES, Made, N, build, floats
from torch import nn
from torch.func import functional_call
from weights_of_rows import weights_of_row

from sb3_flipout.layers import FlipoutLayer, perturb, perturbed
from sb3_flipout.layers.embedding import OneHotLinear
from sb3_flipout.layers.recurrent import FlipoutGRUCell
from sb3_flipout.layers.row_layout import RowLayout


def plain_of(layer: FlipoutLayer, made: Made) -> nn.Module:
    own = made().double()
    own.load_state_dict({name: value for name, value in layer.state_dict().items() if name in own.state_dict()})
    return own


def row_by_row(layer: FlipoutLayer, made: Made, given: tuple[th.Tensor, ...], owners: list[int] | None = None) -> th.Tensor:
    """The slow way: each row by the plain module, with that row's weights."""
    plain, found = plain_of(layer, made), []
    for place, row in enumerate(range(N) if owners is None else owners):
        weights = weights_of_row(layer, KEYS[row], float(SCALES[row]))
        found.append(functional_call(plain, weights, tuple(x[place : place + 1] for x in given)))
    return th.cat(found)


def gradients(layer: nn.Module, outputs: th.Tensor, given: tuple[th.Tensor, ...]) -> dict[str, th.Tensor | None]:
    what = {**dict(layer.named_parameters()), **{f"input {i}": x for i, x in enumerate(given) if x.is_floating_point()}}
    what = {name: value for name, value in what.items() if value.requires_grad}
    found = th.autograd.grad((outputs * outputs.detach().cos()).sum(), list(what.values()), allow_unused=True)
    return dict(zip(what, found, strict=True))


@pytest.mark.parametrize(("made", "inputs"), KINDS.values(), ids=KINDS)
@every_noise
def test_each_row_sees_its_own_weights(made: Made, inputs: Any, noise: dict[str, Any]) -> None:
    layer = build(made, noise)
    given = tuple(x.requires_grad_() if x.is_floating_point() else x for x in inputs())
    expected = row_by_row(layer, made, given)
    with perturbed(layer, KEYS, SCALES):
        found = layer(*given)
    th.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    slow, fast = (gradients(layer, outputs, given) for outputs in (expected, found))
    for name, gradient in fast.items():
        th.testing.assert_close(
            th.zeros(()) if gradient is None else gradient, _or_zeros(slow[name], gradient), rtol=0, atol=1e-10
        )


def _or_zeros(gradient: th.Tensor | None, like: th.Tensor | None) -> th.Tensor:
    if gradient is None:
        return th.zeros(()) if like is None else th.zeros_like(like)
    return gradient


@pytest.mark.parametrize(("made", "inputs"), KINDS.values(), ids=KINDS)
def test_without_noise_it_is_the_plain_layer(made: Made, inputs: Any) -> None:
    layer, given = build(made, {}), inputs()
    assert th.equal(layer(*given), plain_of(layer, made)(*given))


@pytest.mark.parametrize("order", ["interleaved", "tiled"])
@pytest.mark.parametrize("kind", ["cell", "embedding", "embedding of several", "one-hot", "transposed 1d"])
@every_noise
def test_rows_that_are_folded(kind: str, order: Any, noise: dict[str, Any]) -> None:
    made, inputs = KINDS[kind]
    layer = build(made, noise)
    layer.row_layout = RowLayout(0, order)
    given = tuple(th.cat([x, x.flip(0)]) for x in inputs())
    owners = [row for row in range(N) for _ in range(2)] if order == "interleaved" else list(range(N)) * 2
    with perturbed(layer, KEYS, SCALES), th.no_grad():
        th.testing.assert_close(layer(*given), row_by_row(layer, made, given, owners), rtol=0, atol=1e-12)


def test_an_output_size_is_torch_s_without_noise() -> None:
    made, inputs = (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2)), floats(2, 4)
    layer, (x,) = build(made, {}), inputs()
    assert th.equal(layer(x, [10]), plain_of(layer, made)(x, [10])) and layer(x, output_size=[10]).shape == (N, 3, 10)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.ConvTranspose2d(4, 6, (2, 3), groups=2), 12),
        (nn.ConvTranspose2d(4, 6, (4, 4), stride=2), 16),
        (nn.ConvTranspose2d(1, 6, 1, stride=3), 1),
        (nn.Embedding(5, 3), 1),
        (OneHotLinear(5, 3), 5),
        (nn.ConvTranspose1d(3, 6, 5, stride=2), 8),  # 7.5: half of the outputs meet two taps, the others three
    ],
)
def test_inputs_that_an_output_adds_up(layer: nn.Module, inputs: int) -> None:
    made = perturb(nn.Sequential(layer))[0]
    assert isinstance(made, FlipoutLayer) and made.fan_in(made.blocks[0]) == inputs


@pytest.mark.parametrize("order", [0, 1])
def test_a_constructed_cell(order: int) -> None:
    th.manual_seed(1)
    given = [(3, 4, False), (3, 4)][order]
    cell = FlipoutGRUCell(*given, sigma_init=0.5, family="multiplicative")
    assert (cell.bias is False) == (order == 0) and cell.noise_config.sigma_init == 0.5
    assert [(block.weight, block.bias, block.number) for block in cell.blocks] == [
        ("weight_ih", "bias_ih" if order else None, 0),
        ("weight_hh", "bias_hh" if order else None, 1),
    ]
    again = copy.deepcopy(cell)
    x = th.randn(N, 3)
    with perturbed(cell, KEYS), perturbed(again, KEYS):
        assert th.equal(cell(x), again(x)) and not th.equal(cell(x), nn.GRUCell.forward(cell, x))
    with pytest.raises(TypeError):
        FlipoutGRUCell(3, 4, sigma=1.0)
