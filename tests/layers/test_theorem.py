"""Theorem 1 of Wen et al. 2018: each row sees a draw of the ordinary law; rows are uncorrelated; gradients are unbiased.

Every test compares with the ordinary perturbation (`noise_sharing="shared"`), so that a new family needs no new test. Each
fails falsely with probability 1e-6 at most: independent draws, tolerances of `stats.py`.
"""

import functools
import math

import pytest
import torch as th
from cases import every_family, make
from stats import assert_mean, assert_same_mean, hoeffding, z_bound

from sb3_flipout.layers import FlipoutLayer, FlipoutLinear, effective_weight, perturbed, redraw
from sb3_flipout.noise import FAMILIES, fold

DRAWS, GRADIENT_DRAWS = 1000, 800
GEOMETRY = ("linear", "plain")
# Variance and fourth moment over squared variance, in units of sigma, the mean weight, or both.
LAWS = {
    "gaussian": (1.0, 3.0),
    "factorised": (2 / math.pi, (math.pi / 2) ** 2),
    "multiplicative": (1.0, 3.0),
    "dropconnect": (1.0, 1.0),
    "isotropic": (1.0, 3.0),
    "lowrank": (1.0, 9.0),  # a product of two normals
}


def unit(layer: FlipoutLayer) -> th.Tensor:
    """What the noise of each weight is a multiple of."""
    parts = [layer.weight_sigma, layer.weight if layer.noise_config.spec.relative else None]
    product = th.ones_like(layer.weight)
    for part in parts:
        product = product if part is None else product * part
    return product.detach()


@functools.cache
def draws(family: str, sharing: str, first: int, keys_vary: bool = True) -> th.Tensor:
    """Noise of the weights of one row, one draw of base and key after another; shape (draws, O, I). Not to be written to."""
    layer = make(GEOMETRY, family=family, noise_sharing=sharing)
    found = []
    with th.no_grad():
        for draw in range(first, first + DRAWS):
            redraw(layer, draw)
            weight, bias = effective_weight(layer, draw if keys_vary else 4)
            assert bias is not None
            found.append((weight - layer.weight) / unit(layer))
    return th.stack(found)


def moments(noise: th.Tensor) -> th.Tensor:
    """First four powers, averaged over the weights of a draw: one independent sample of each per draw."""
    return th.stack([noise.pow(order).mean((1, 2)) for order in (1, 2, 3, 4)], dim=1)


@every_family
def test_a_rows_weights_have_the_ordinary_law(family: str) -> None:
    """Over draws of base and key: mean, variance, symmetry and fourth moment, which tells a Gaussian."""
    flipout, ordinary = draws(family, "flipout", 0), draws(family, "shared", DRAWS)
    assert_same_mean(moments(flipout), moments(ordinary))
    assert_same_mean(flipout.flatten(1), ordinary.flatten(1))
    assert_same_mean(flipout.square().flatten(1), ordinary.square().flatten(1))
    assert_same_mean(moments(draws(family, "independent", 2 * DRAWS)), moments(ordinary))


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.base is not None])
def test_a_rows_weights_have_the_ordinary_law_for_any_fixed_key(family: str) -> None:
    """The theorem conditions on the signs: the base alone gives the law."""
    flipout, ordinary = draws(family, "flipout", 0, keys_vary=False), draws(family, "shared", DRAWS)
    assert_same_mean(moments(flipout), moments(ordinary))


@every_family
def test_the_law_is_the_published_one(family: str) -> None:
    if family not in LAWS:
        pytest.fail(f"state the law of {family!r} here")
    variance, kurtosis = LAWS[family]
    found = moments(draws(family, "flipout", 0))
    slack = th.tensor([0.0, 1e-3, 0.0, 1e-3]) * variance**2 * kurtosis  # the 16-bit quantile table
    for order, expected in enumerate((0.0, variance, 0.0, kurtosis * variance**2)):
        assert_mean(found[:, order], expected, slack=float(slack[order]), comparisons=4)


@every_family
def test_distinct_weights_of_a_row_are_uncorrelated(family: str) -> None:
    noise = draws(family, "flipout", 0).flatten(1)
    pairs = th.triu_indices(noise.shape[1], noise.shape[1], 1)
    assert_mean(noise[:, pairs[0]] * noise[:, pairs[1]], 0.0)


def outputs(family: str, sharing: str) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Noise in the outputs of three rows on one input, under random bases and keys; each (draws, O)."""
    layer = make(GEOMETRY, family=family, noise_sharing=sharing)
    x = th.randn(1, 5, dtype=th.float64, generator=th.Generator().manual_seed(1)).expand(3, 5)
    found = []
    with th.no_grad():
        for draw in range(DRAWS):
            redraw(layer, draw)
            with perturbed(layer, th.tensor([fold(draw, row) for row in range(3)])):
                found.append(layer(x) - th.nn.functional.linear(x, layer.weight, layer.bias))
    noise = th.stack(found)
    return noise[:, 0], noise[:, 1], noise[:, 2]


@every_family
def test_rows_are_uncorrelated_and_shared_rows_are_one(family: str) -> None:
    for sharing in ("flipout", "independent"):
        rows = outputs(family, sharing)
        for a, b in [(0, 1), (0, 2), (1, 2)]:
            assert_mean(rows[a] * rows[b], 0.0, comparisons=2 * 3 * rows[0].shape[1])
    a, b, _ = outputs(family, "shared")
    th.testing.assert_close(a, b)
    correlation = (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()
    th.testing.assert_close(correlation, th.ones_like(correlation))


@every_family
def test_layers_of_one_network_are_uncorrelated(family: str) -> None:
    """Two layers of one shape, under one base key and one row key."""
    layers = [make(GEOMETRY, number=number, family=family) for number in (0, 1)]
    found = []
    with th.no_grad():
        for draw in range(DRAWS):
            for layer in layers:
                redraw(layer, draw)
            noise = [effective_weight(layer, draw)[0] - layer.weight for layer in layers]
            found.append((noise[0] * noise[1] / unit(layers[0]) / unit(layers[1])).flatten())
    assert_mean(th.stack(found), 0.0)


@every_family
def test_successive_bases_are_uncorrelated(family: str) -> None:
    layer, weights = make(GEOMETRY, family=family, noise_sharing="shared"), []
    with th.no_grad():
        for _ in range(DRAWS):
            redraw(layer)
            weights.append((effective_weight(layer, 0)[0] - layer.weight).flatten() / unit(layer).flatten())
    noise = th.stack(weights)
    assert_mean(noise[1::2] * noise[::2], 0.0, comparisons=2 * noise.shape[1])
    assert_mean(noise[1:-1:2] * noise[2::2], 0.0, comparisons=2 * noise.shape[1])


def gradients(family: str, sharing: str, first: int) -> th.Tensor:
    """Gradient estimators of a nonlinear loss averaged over a batch of rows, one per draw; every parameter in a row."""
    layer = make(("linear", "plain"), family=family, noise_sharing=sharing)
    generator = th.Generator().manual_seed(4)
    x, target = (th.randn(8, n, dtype=th.float64, generator=generator) for n in (5, 7))
    wanted = [p for p in layer.parameters() if p.requires_grad]
    found = []
    for draw in range(first, first + GRADIENT_DRAWS):
        redraw(layer, draw)
        with perturbed(layer, th.tensor([fold(draw, row) for row in range(8)])):
            loss = (layer(x).tanh() - target).square().mean()
        found.append(th.cat([g.flatten() for g in th.autograd.grad(loss, wanted)]))
    return th.stack(found)


@every_family
def test_gradients_are_unbiased(family: str) -> None:
    """The theorem's second half: the mean over draws is that of the ordinary perturbation."""
    flipout, ordinary = gradients(family, "flipout", 0), gradients(family, "shared", GRADIENT_DRAWS)
    assert_same_mean(flipout, ordinary)
    assert_same_mean(gradients(family, "independent", 2 * GRADIENT_DRAWS), ordinary)


def test_dropconnect_drops_or_doubles_with_probability_one_half() -> None:
    for sharing in ("flipout", "shared", "independent"):
        layer = FlipoutLinear(7, 5, family="dropconnect", noise_sharing=sharing)
        doubled = []
        for draw in range(DRAWS):
            redraw(layer, draw)
            for found, mean in zip(effective_weight(layer, draw), (layer.weight, layer.bias), strict=True):
                ratio = (found / mean).detach()
                assert ((ratio == 0) | (ratio == 2)).all()
                doubled.append(ratio.flatten() - 1)
        weights = th.stack(doubled[::2])
        assert weights.mean(0).abs().max() <= hoeffding(DRAWS, comparisons=3 * 35)


def test_the_helpers_see_a_wrong_mean() -> None:
    sample = th.randn(1000, 3, dtype=th.float64, generator=th.Generator().manual_seed(0))
    assert_mean(sample, 0.0)
    shift = 2 * z_bound(comparisons=3) / math.sqrt(1000)
    with pytest.raises(AssertionError):
        assert_mean(sample + shift, 0.0)
    with pytest.raises(AssertionError):
        assert_same_mean(sample, -sample - 2 * shift)
