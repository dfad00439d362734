"""Base draws: slices of a table, with the statistics of a draw of their own."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch as th
from stats import z_bound
from torch import nn

from sb3_flipout.layers import FlipoutLinear, effective_weight
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
def test_copies_hold_their_draws_not_the_table(duplicate: Callable[[FlipoutLinear], FlipoutLinear]) -> None:
    layer = FlipoutLinear(3, 2)
    twin = duplicate(layer)
    assert twin.weight_base.untyped_storage().nbytes() == 4 * 6
    assert len(pickle.dumps(nn.Sequential(layer))) < 10_000
    for mine, its in zip(effective_weight(layer, 5), effective_weight(twin, 5), strict=True):
        assert th.equal(mine, its)
    assert "weight_base" not in twin.state_dict()
