"""Base draws: slices of a table, with the statistics of a draw of their own."""

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import oracle
import pytest
import torch as th
from stats import z_bound
from torch import nn

from sb3_flipout.layers import FlipoutLinear, effective_weight
from sb3_flipout.noise import bases, signs, tables
from sb3_flipout.noise.bases import base_draws, table_size
from sb3_flipout.noise.keys import fold

LIKE = th.zeros(())
SHAPE = th.Size((64, 64))


def draws(law: str, n: int, shape: th.Size = SHAPE) -> th.Tensor:
    return th.stack([base_draws(law, fold(7, i), [shape], LIKE)[0].flatten() for i in range(n)]).double()


@pytest.mark.parametrize("n", [1, 2**20, 2**20 + 1, 1_606_144, 2**23])
def test_the_table_is_at_least_four_times_as_long(n: int) -> None:
    size = table_size(n)
    assert size >= max(4 * n, 2**22) and size & (size - 1) == 0 and (size == 2**22 or size < 8 * n)


@pytest.mark.parametrize("law", ["normal", "sign"])
def test_moments_and_correlations(law: str) -> None:
    """Over 400 draws of 4096 weights, false-fail rate 1e-6 in all; slices that overlap count a number more than once."""
    found = draws(law, 400)
    z = z_bound(comparisons=4) * math.sqrt(1 + found.numel() / table_size(SHAPE.numel()))
    assert abs(found.mean()) < z / math.sqrt(found.numel())
    kurtosis = 3.0 if law == "normal" else 1.0
    assert abs(found.square().mean() - 1) <= z * math.sqrt((kurtosis - 1) / found.numel()) + 1e-12
    # Neighbouring weights of one draw, and the same weight in two draws, have nothing in common.
    assert abs((found[:, :-1] * found[:, 1:]).mean()) < z / math.sqrt(found[:, 1:].numel())
    assert abs((found[:-1] * found[1:]).mean()) < z / math.sqrt(found[1:].numel())


@pytest.mark.parametrize("law", ["normal", "sign"])
def test_every_number_of_a_draw_changes_from_key_to_key(law: str) -> None:
    """P(a weight is the same in 40 draws) is 0 for normals, 2^-39 for signs: 4096 * 2^-39 < 1e-8."""
    found = draws(law, 40)
    assert not (found == found[0]).all(dim=0).any()


def test_weight_and_bias_are_neighbours_not_copies() -> None:
    weight, bias = base_draws("normal", 3, [th.Size((4, 5)), th.Size((4,))], LIKE)
    assert weight.shape == (4, 5) and bias.shape == (4,)
    flat = base_draws("normal", 3, [th.Size((24,))], LIKE)[0]
    assert th.equal(th.cat([weight.flatten(), bias]), flat)


@pytest.mark.parametrize("key", [0, -1, 2**63 - 1, -(2**63), 2**70])
def test_any_integer_is_a_key(key: int) -> None:
    assert base_draws("normal", key, [th.Size((3,))], LIKE)[0].shape == (3,)


def test_no_global_generator_moves() -> None:
    before = th.get_rng_state()
    base_draws("sign", 1, [SHAPE], LIKE)
    assert th.equal(before, th.get_rng_state())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_have_the_same_draws_and_no_table(duplicate: Callable[[FlipoutLinear], FlipoutLinear]) -> None:
    layer = FlipoutLinear(3, 2)
    twin = duplicate(layer)
    assert th.equal(twin.bases()[1]["weight_base"], layer.bases()[1]["weight_base"])
    assert len(pickle.dumps(nn.Sequential(layer))) < 10_000
    for mine, its in zip(effective_weight(layer, 5), effective_weight(twin, 5), strict=True):
        assert th.equal(mine, its)
    assert "weight_base" not in twin.state_dict()


def test_the_table_is_hashed_element_by_element() -> None:
    """Against Python's integers: no generator, whose normals would depend on the processor."""
    for law in ("normal", "sign"):
        start = 12345 % (table_size(50) - 50 + 1)
        assert th.equal(
            base_draws(law, 12345, [th.Size((50,))], LIKE)[0].double(), oracle.base_elements(law, start, 50).float().double()
        )


@pytest.mark.parametrize("mode", ["inference", "float64", "meta"])
def test_a_table_made_in_any_mode_serves_everybody(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_TABLES", {})
    monkeypatch.setattr(tables, "_TABLES", {})
    before = th.get_default_dtype()
    context = {"inference": th.inference_mode(), "meta": th.device("meta")}.get(mode, nullcontext())
    try:
        th.set_default_dtype(th.float64 if mode == "float64" else before)
        with context:
            base_draws("normal", 5, [SHAPE], th.zeros((), device="cpu", dtype=th.float32))
            signs(th.arange(3, device="cpu"), 0, 4)
    finally:
        th.set_default_dtype(before)
    draw = base_draws("normal", 5, [SHAPE], LIKE)[0]
    assert draw.dtype == th.float32 and draw.device.type == "cpu" and not draw.is_inference()
    sigma = th.ones(SHAPE, requires_grad=True)
    (sigma * draw).sum().backward()  # an inference tensor cannot be saved for it
    assert th.equal(sigma.grad, draw) and not signs(th.arange(3), 0, 4).is_inference()


def test_nothing_of_the_process_is_in_a_layers_books() -> None:
    """Who writes into all buffers (distributed training, averaging) writes into no table."""
    layer = FlipoutLinear(64, 64)
    assert not list(layer.buffers())
    before = base_draws("normal", 9, [SHAPE], LIKE)[0].clone()
    for tensor in layer.state_dict().values():
        tensor.zero_()
    assert th.equal(base_draws("normal", 9, [SHAPE], LIKE)[0], before)
