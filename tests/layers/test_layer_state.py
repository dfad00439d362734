"""What a layer keeps, leaves behind and follows: defaults, copies, types, devices, kept perturbations."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch as th
from cases import every_noise
from torch import nn

from sb3_flipout.layers import FlipoutLinear, FlipoutLSTM, FlipoutMultiheadAttention, LayerNoise, perturb, perturbed
from sb3_flipout.layers.block import Block
from sb3_flipout.layers.interface import network_of
from sb3_flipout.layers.row_layout import RowLayout
from sb3_flipout.noise import FAMILIES
from sb3_flipout.noise.bases import drawn_base_key

KEYS = th.arange(3)


def test_all_weights_are_perturbed_by_default() -> None:
    layer = FlipoutLSTM(2, 2, noise_on="hidden")
    assert len(layer.blocks) == 1
    layer.init_noise(LayerNoise(), 3)
    assert layer.noise_on == "all" and len(layer.blocks) == 2


def test_layers_inside_follow_to_another_type() -> None:
    layer = FlipoutMultiheadAttention(4, 2)
    layer._apply(lambda tensor: tensor.double(), recurse=False)
    assert layer.in_proj_weight.dtype == th.float64 and layer.out_proj.weight.dtype == th.float32
    layer.double()
    assert {parameter.dtype for parameter in layer.parameters()} == {th.float64}


def test_pickles_hold_nothing_of_the_run() -> None:
    layer = FlipoutLinear(2, 2)
    with perturbed(layer, KEYS):
        layer(th.ones(3, 2))
    state: dict[str, Any] = layer.__getstate__()
    assert not {"_base_draws", "_network", "_slot"} & set(state) and {"_base_draws", "_network", "_slot"} <= set(vars(layer))


def test_layers_that_keep_their_base_follow_in_copies_too() -> None:
    layer = FlipoutLinear(2, 2)
    layer.keep_base()
    again = pickle.loads(pickle.dumps(layer)).double()
    assert th.equal(again.weight_base, layer.weight_base.double())


def test_a_base_key_is_drawn_where_torch_s_generator_is() -> None:
    th.manual_seed(3)
    expected = drawn_base_key()
    th.manual_seed(3)
    with th.device("meta"):
        assert drawn_base_key() == expected


@pytest.mark.parametrize("name", ["weight_sigma", "bias_sigma"])
@pytest.mark.parametrize("way", ["written into", "replaced", "data replaced", "learns"])
def test_kept_perturbations_follow_every_sigma(name: str, way: str) -> None:
    net: Any = perturb(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), learn_sigma=False)
    x = th.randn(3, 2)

    def seen() -> th.Tensor:
        with perturbed(net, KEYS):
            return net(x)

    with network_of(net).keeping_deltas():
        before = seen()
        assert th.equal(seen(), before)
        sigma = getattr(net[1], name)
        if way == "written into":
            with th.no_grad():
                sigma.mul_(2)
        elif way == "replaced":
            setattr(net[1], name, nn.Parameter(sigma * 2, requires_grad=False))
        elif way == "data replaced":
            sigma.data = sigma.data * 2
        else:
            sigma.requires_grad_()
            seen().sum().backward()
            assert sigma.grad is not None
            return
        kept = seen()
    assert not th.equal(kept, before) and th.equal(kept, seen())


SILENT: dict[str, Any] = {
    "gru": (lambda: nn.GRU(4, 5, 2), lambda: (th.randn(6, 3, 4),)),
    "lstm": (lambda: nn.LSTM(4, 5, 2), lambda: (th.randn(6, 3, 4),)),
    "cell": (lambda: nn.GRUCell(4, 5), lambda: (th.randn(3, 4),)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), lambda: (th.randn(6, 3, 4),) * 3),
    "transposed": (lambda: nn.ConvTranspose1d(4, 5, 3), lambda: (th.randn(3, 4, 6),)),
}


@pytest.mark.parametrize("kind", SILENT)
def test_rows_that_draw_for_themselves_and_are_not_heard_get_torch_s_own_operations(kind: str) -> None:
    """Bit for bit: row by row, sums would be rounded in another order."""
    made, inputs = SILENT[kind]
    layer: Any = perturb(made(), noise_sharing="independent", sigma_init=0.0, learn_sigma=False)
    given = inputs()
    plain = layer(*given)
    with perturbed(layer, KEYS):
        noisy = layer(*given)
    pairs = [(noisy, plain)] if isinstance(plain, th.Tensor) else [(noisy[0], plain[0])]
    assert all(th.equal(one, other) for one, other in pairs)
    learned: Any = perturb(made(), noise_sharing="independent", sigma_init=0.5, learn_sigma=False)
    with perturbed(learned, KEYS):
        noisy = learned(*given)
    first = noisy if isinstance(noisy, th.Tensor) else noisy[0]
    plain = learned(*given)
    assert not th.allclose(first, plain if isinstance(plain, th.Tensor) else plain[0])


def test_a_block_s_names() -> None:
    block = Block()
    assert (block.weight, block.bias, block.number) == ("weight", "bias", 0)
    assert block.noise_names() == ["weight_sigma", "bias_sigma", "weight_base", "bias_base"]
    assert Block("w", None, 2).noise_names() == ["w_sigma", "w_base"]


def test_what_is_held_are_the_numbers_themselves() -> None:
    layer = FlipoutLinear(2, 2, learn_sigma=False)
    made_of = layer.fixed_delta()
    assert made_of is not None
    held = made_of.held()
    assert [sigma.data_ptr() for sigma in held.sigmas] == [layer.weight_sigma.data_ptr(), layer.bias_sigma.data_ptr()]  # type: ignore[union-attr]
    layer.weight_sigma.data = layer.weight_sigma.data.clone()  # type: ignore[union-attr]
    again = layer.fixed_delta()
    assert again is not None and not again.still(held) and made_of.still(held)


def test_what_is_noisy_is_remembered() -> None:
    layer: Any = perturb(nn.LSTM(2, 2), layers="hidden")
    assert layer.noise_on == "hidden" and [block.weight for block in layer.blocks] == ["weight_hh_l0"]


@every_noise
@pytest.mark.parametrize("bias", [True, False])
def test_base_draws_are_those_of_the_family(noise: dict[str, str], bias: bool) -> None:
    layer = FlipoutLinear(3, 4, bias, **noise)  # type: ignore[arg-type]
    _, draws = layer.bases()
    drawn = layer.noise_config.draws_base
    assert set(vars(layer)["_base_draws"]) == set(draws)
    names = ["weight_base", "bias_base"] if bias else ["weight_base"]
    assert list(draws) == (names if drawn else [])
    law = FAMILIES[noise["family"]].base
    if drawn and law == "sign":
        assert all(set(draw.unique().tolist()) <= {-1.0, 1.0} for draw in draws.values())
    elif drawn:
        assert len(draws["weight_base"].unique()) > 4


def test_rows_in_a_dimension_that_inputs_have_not_are_refused() -> None:
    layer = FlipoutLinear(2, 2)
    layer.row_layout = RowLayout(2)
    with perturbed(layer, KEYS), pytest.raises(ValueError, match=r"got an input of shape \(3, 2\) and keys for 3 rows"):
        layer(th.ones(3, 2))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_in_another_dimension(dim: int) -> None:
    layer = FlipoutLinear(2, 4)
    x = th.randn(3, 5, 6, 2)
    with perturbed(layer, KEYS):
        expected = layer(x)
        layer.row_layout = RowLayout(dim)
        th.testing.assert_close(layer(x.movedim(0, dim)), expected.movedim(0, dim))
