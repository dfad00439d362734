"""Factors look like independent draws of their law. Keys are consecutive, the worst case for a weak hash.

Each test fails falsely with probability 1e-6 at most: `stats.hoeffding` for signs, a normal bound on means otherwise.
"""

import math

import oracle
import pytest
import torch as th
from stats import assert_mean, assert_sign_correlations, hoeffding, z_bound

from sb3_flipout.noise import FAMILIES, signs
from sb3_flipout.noise.signs import factors, salts

KINDS = sorted({family.factor for family in FAMILIES.values()} | {"normal"})
MOMENTS = {"sign": (1.0, 1.0), "normal": (1.0, 3.0), "sqrt_normal": (math.sqrt(2 / math.pi), 1.0)}  # E f^2, E f^4


@pytest.fixture(params=[4096, pytest.param(1 << 18, marks=pytest.mark.slow)])
def keys(request: pytest.FixtureRequest) -> th.Tensor:
    return th.arange(request.param)


def test_bounds_are_those_of_the_tables() -> None:
    assert z_bound(0.05) == pytest.approx(1.959964, abs=1e-6)
    assert z_bound(1e-6) == pytest.approx(4.891638, abs=1e-6)
    assert z_bound(1e-6, comparisons=100) == pytest.approx(z_bound(1e-8))
    assert hoeffding(200) == pytest.approx(math.sqrt(2 * math.log(2e6) / 200))


def test_signs_are_balanced_in_every_column(keys: th.Tensor) -> None:
    for layer, vector in [(0, 0), (0, 1), (1, 0), (9, 1)]:
        mean = signs(keys, layer, 128, vector).double().mean(0)
        assert mean.abs().max() <= hoeffding(len(keys), comparisons=4 * 128)


def test_columns_are_uncorrelated(keys: th.Tensor) -> None:
    both = signs(keys, 2, 130)
    correlation = both.double().T @ both.double() / len(keys)
    off_diagonal = correlation - th.diag(correlation.diag())
    assert off_diagonal.abs().max() <= hoeffding(len(keys), comparisons=130 * 129 // 2)


@pytest.mark.parametrize(("a", "b"), [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 1), (1, 1)), ((3, 1), (4, 0))])
def test_layers_and_vectors_are_uncorrelated(keys: th.Tensor, a: tuple[int, int], b: tuple[int, int]) -> None:
    assert_sign_correlations(signs(keys, a[0], 64, a[1]), signs(keys, b[0], 64, b[1]))


@pytest.mark.parametrize("lag", [1, 2, 64, 0x10000])
def test_neighbouring_keys_are_uncorrelated(keys: th.Tensor, lag: int) -> None:
    assert_sign_correlations(signs(keys, 1, 64), signs(keys + lag, 1, 64))


def test_rows_are_uncorrelated_pair_by_pair() -> None:
    n = 1 << 14  # one long sign vector per row
    rows = signs(th.arange(64), 0, n).double()
    correlation = rows @ rows.T / n
    assert (correlation - th.eye(64)).abs().max() <= hoeffding(n, comparisons=64 * 63 // 2)


def test_products_of_row_factors_are_uncorrelated(keys: th.Tensor) -> None:
    """r_i s_j is what multiplies a weight: products of two layers' factors must look independent, too."""
    products = [signs(keys, layer, 8, 1)[:, :, None] * signs(keys, layer, 8)[:, None, :] for layer in (0, 1)]
    assert_sign_correlations(products[0].flatten(1), products[1].flatten(1))


@pytest.mark.parametrize("kind", KINDS)
def test_factors_have_the_moments_of_their_law(keys: th.Tensor, kind: str) -> None:
    found = factors(keys, salts(3, 0, 4, kind), kind, th.float64)[:, :4]
    table = th.tensor([oracle.CUTS[kind][1](0x0001_0001_0001_0001 * piece)[0] for piece in range(65536)])
    for order, expected in zip((2, 4), MOMENTS[kind], strict=True):
        discretisation = 0.0 if kind == "sign" else abs(float(table.double().pow(order).mean()) - expected)
        assert discretisation <= 1e-3 * expected, "the 16-bit table is too coarse"
        assert_mean(found.pow(order), expected, slack=discretisation)
    assert_mean(found, 0.0)
    assert_mean(found.pow(3), 0.0)


def test_factorised_noise_has_variance_two_over_pi(keys: th.Tensor) -> None:
    """Var f(z_i) f(z_j) = (E|z|)^2 = 2/pi (Fortunato et al. 2018, eq. (10) and (11))."""
    row = th.tensor(oracle.normal_table()).abs().mean()
    s, r = (factors(keys, salts(0, vector, 3, "sqrt_normal"), "sqrt_normal", th.float64)[:, :3] for vector in (0, 1))
    noise = (r[:, :, None] * s[:, None, :]).flatten(1)
    assert_mean(noise, 0.0)
    assert_mean(noise.square(), 2 / math.pi, slack=abs(float(row.square()) - 2 / math.pi))


@pytest.mark.parametrize("kind", ["normal", "sqrt_normal"])
def test_real_factors_are_uncorrelated(keys: th.Tensor, kind: str) -> None:
    a, b, c = (
        factors(keys + shift, salts(layer, vector, 8, kind), kind, th.float64)
        for shift, layer, vector in [(0, 0, 0), (0, 0, 1), (1, 0, 0)]
    )
    for left, right in [(a, b), (a, c), (b, c)]:
        assert_mean((left[:, :, None] * right[:, None, :]).flatten(1), 0.0, comparisons=3 * 64)
    pairs = th.triu_indices(8, 8, 1)
    assert_mean(a[:, pairs[0]] * a[:, pairs[1]], 0.0)
