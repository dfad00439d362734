"""Diagnostics against cases that can be computed by hand: Theorem 2 of Wen et al. 2018 on one linear layer, above all.

Each statistical test fails falsely with probability 1e-6 at most: independent repeats, tolerances of `stats.py`.
"""

import math

import pytest
import torch as th
from stats import z_bound
from torch import nn

from sb3_flipout import perturb
from sb3_flipout.diagnostics import (
    Batch,
    Estimate,
    gradient_variance,
    log_log_slope,
    perturbed_outputs,
    row_correlation,
)
from sb3_flipout.layers import FlipoutConv2d, FlipoutLayer, FlipoutLinear

SHARINGS = ("flipout", "shared", "independent")
SIZES = [2**power for power in range(11)]  # 1 to 1024
SIGMA, TARGET, INPUTS, OUTPUTS = 0.3, 0.2, 5, 2


def square_loss(network: nn.Module, batch: Batch) -> th.Tensor:
    """Half the squared error, summed over outputs and averaged over rows."""
    return (network(batch[0]) - batch[1]).square().sum() / (2 * len(batch[0]))


def linear(sharing: str, inputs: int = INPUTS, bias: bool = True) -> FlipoutLinear:
    """A layer of mean 0, each of whose weights has the standard deviation SIGMA."""
    layer = FlipoutLinear(inputs, OUTPUTS, bias, noise_sharing=sharing, sigma_init=SIGMA * math.sqrt(inputs))
    with th.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.zero_()
    return layer


def coins(size: int, repeat: int) -> Batch:
    """Rows of +1 and -1, and targets of +TARGET and -TARGET, new ones in each repeat."""
    generator = th.Generator().manual_seed(repeat * 2048 + size)
    flips = th.randint(0, 2, (size, INPUTS + OUTPUTS), generator=generator) * 2.0 - 1.0
    return flips[:, :INPUTS], flips[:, INPUTS:] * TARGET


def assert_estimates(found: Estimate, expected: float, least_precision: float) -> None:
    assert abs(found.value - expected) <= z_bound() * found.error, f"{found} is not {expected}"
    assert found.error <= least_precision * expected, f"{found} is too rough to tell"


# ---- gradient variance --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
def test_gradient_variance_on_fixed_data_is_that_of_the_formula(sharing: str) -> None:
    """dL/dW_oi is the mean over rows of (y_no - t_no) x_ni, and y_no has the variance sigma^2 (|x_n|^2 + 1)."""
    x = th.rand(6, INPUTS, generator=th.Generator().manual_seed(0)) + 0.5
    with_one = th.cat([x, th.ones(6, 1)], dim=1)
    noise = SIGMA**2 * with_one @ with_one.T  # covariance of two rows' outputs under one draw
    noise = noise if sharing == "shared" else noise.diag().diag()
    expected = float(th.einsum("ni,nm,mi->i", with_one, noise, with_one).mean()) / 36
    found = gradient_variance(linear(sharing), square_loss, (x, th.zeros(6, OUTPUTS)), 2000)
    assert_estimates(found, expected, least_precision=0.05)


@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_theorem_2_for_the_means(sharing: str, size: int) -> None:
    """alpha = sigma^2 (I + 1) + t^2; what rows share is sigma^2 under one draw, and nothing under flipout."""
    alpha, common = SIGMA**2 * (INPUTS + 1) + TARGET**2, SIGMA**2 if sharing == "shared" else 0.0
    found = gradient_variance(linear(sharing), square_loss, lambda repeat: coins(size, repeat), 1500)
    assert_estimates(found, alpha / size + common * (size - 1) / size, least_precision=0.05)


@pytest.mark.parametrize("size", [1, 32])
def test_theorem_2_for_sigma_whose_gradient_keeps_the_base(size: int) -> None:
    """dL/dsigma_i goes with base_i^2, which flipout's rows share: alpha = sigma^2 (I + 2) + t^2 and gamma = 2 sigma^2."""
    layer = linear("flipout")
    assert layer.weight_sigma is not None
    alpha, gamma = SIGMA**2 * (INPUTS + 2) + TARGET**2, 2 * SIGMA**2
    found = gradient_variance(layer, square_loss, lambda repeat: coins(size, repeat), 1500, [layer.weight_sigma])
    assert_estimates(found, alpha / size + gamma * (size - 1) / size, least_precision=0.06)


def test_the_variance_error_is_that_of_a_normal_sample() -> None:
    """One input and one shared draw: the gradient is normal, and the variance of its variance is 2 sigma^4 / repeats."""
    repeats = 2000
    found = gradient_variance(linear("shared", 1, bias=False), square_loss, (th.ones(1, 1), th.zeros(1, OUTPUTS)), repeats)
    expected = SIGMA**2 * math.sqrt(2 / (repeats * OUTPUTS))
    # The error is a standard deviation over repeats; (kurtosis - 1) / (4 repeats) is its squared relative error, and the mean
    # of two squared normals has the kurtosis 3 + 12 / 2.
    assert abs(found.error / expected - 1) <= z_bound() * math.sqrt((9 - 1) / (4 * repeats))
    assert_estimates(found, SIGMA**2, least_precision=0.05)


def test_the_network_stays_as_it_was() -> None:
    layer, data = linear("flipout"), coins(3, 0)
    layer.redraw(17)
    before, generator_before = layer.bases()[1]["weight_base"], th.get_rng_state()
    first = gradient_variance(layer, square_loss, data, 4)
    assert gradient_variance(layer, square_loss, data, 4) == first
    assert gradient_variance(layer, square_loss, data, 4, seed=1) != first
    perturbed_outputs(layer, data[0], 2)
    with pytest.raises(RuntimeError, match="boom"):
        gradient_variance(layer, lambda network, batch: _boom(), data, 4)
    assert (
        before is not None
        and layer.bases()[1]["weight_base"] is not None
        and th.equal(layer.bases()[1]["weight_base"], before)
    )
    assert layer.base_key == 17 and all(parameter.grad is None for parameter in layer.parameters())
    assert th.equal(th.get_rng_state(), generator_before)


def _boom() -> th.Tensor:
    raise RuntimeError("boom")


@pytest.mark.parametrize("call", [gradient_variance, perturbed_outputs])
def test_one_draw_and_plain_networks_are_refused(call: object) -> None:
    if call is gradient_variance:
        with pytest.raises(ValueError, match="repeats must be 2 or more"):
            gradient_variance(linear("flipout"), square_loss, coins(3, 0), 1)
        with pytest.raises(ValueError, match="no perturbed layer"):
            gradient_variance(nn.Linear(INPUTS, OUTPUTS), square_loss, coins(3, 0), 2)
    else:
        with pytest.raises(ValueError, match="draws must be 2 or more"):
            perturbed_outputs(linear("flipout"), coins(3, 0)[0], 1)
        with pytest.raises(ValueError, match="no perturbed layer"):
            perturbed_outputs(nn.Linear(INPUTS, OUTPUTS), coins(3, 0)[0], 2)


# ---- its slope over batch sizes -----------------------------------------------------------------------------------


def layer_of(kind: str, sharing: str) -> tuple[FlipoutLayer, tuple[int, ...], tuple[int, ...]]:
    """One layer, the shape of its inputs and that of its outputs."""
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        if kind == "fc":
            return FlipoutLinear(8, 4, noise_sharing=sharing), (8,), (4,)
        return FlipoutConv2d(2, 4, 2, noise_sharing=sharing), (2, 3, 3), (4, 2, 2)


def network_of(kind: str, sharing: str) -> tuple[nn.Module, tuple[int, ...], tuple[int, ...]]:
    """The same for a network of several layers, with tanh between them."""
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        if kind == "fc":
            return perturb(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), noise_sharing=sharing), (8,), (3,)
        layers = [nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)]
        return perturb(nn.Sequential(*layers), noise_sharing=sharing), (2, 6, 6), (3,)


def slope(network: tuple[nn.Module, tuple[int, ...], tuple[int, ...]], sizes: list[int], repeats: int) -> Estimate:
    """Slope of the gradient's variance, with fresh data, base and keys in each repeat and at each size."""
    module, shape_in, shape_out = network

    def estimate(size: int) -> Estimate:
        def data(repeat: int) -> Batch:
            generator = th.Generator().manual_seed(repeat * 2048 + size)
            return [th.randn(size, *shape, generator=generator) for shape in (shape_in, shape_out)]

        return gradient_variance(module, square_loss, data, repeats, seed=size)

    values, errors = zip(*map(estimate, sizes), strict=True)
    return log_log_slope(sizes, values, errors)


@pytest.mark.parametrize("kind", ["fc", "conv"])
@pytest.mark.parametrize("sharing", ["flipout", "independent"])
def test_the_variance_falls_as_one_over_the_batch_size(kind: str, sharing: str) -> None:
    """On one layer and a squared error the slope is -1 exactly: under flipout rows share nothing that the means see."""
    whole = kind == "fc" or sharing == "flipout"  # a convolution with its own kernel for each row goes row by row
    found = slope(layer_of(kind, sharing), SIZES if whole else SIZES[:7], 100 if whole else 200)
    assert z_bound() * found.error <= (0.05 if whole else 0.1)
    assert abs(found.value + 1) <= z_bound() * found.error


@pytest.mark.parametrize("kind", ["fc", "conv"])
def test_one_draw_for_all_rows_stops_the_fall(kind: str) -> None:
    """What rows share is about a tenth of a row's own variance here, so from 64 rows on hardly anything is gained."""
    found = slope(layer_of(kind, "shared"), SIZES[6:], 100)
    assert found.value - z_bound() * found.error > -0.6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fc", "conv"])
@pytest.mark.parametrize("sharing", ["flipout", "independent"])
def test_the_slope_of_whole_networks(kind: str, sharing: str) -> None:
    """
    -1.00 +- 0.05. In a network flipout's rows share a little, the size of the base in the layers below and above: the true
    slopes are -0.985 (fc) and -0.996 (conv) within 0.002, by 600 repeats; independent rows share nothing. So 0.05 is 0.035
    and 0.05 away, and keeping `z_bound * error` below that keeps false failures under 1e-6.
    """
    by_row = (kind, sharing) == ("conv", "independent")  # a kernel for each row, row by row: slow
    found = slope(network_of(kind, sharing), SIZES[:8] if by_row else SIZES, 200)
    assert z_bound() * found.error <= (0.05 if sharing == "independent" else 0.03)
    assert abs(found.value + 1) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fc", "conv"])
def test_one_draw_stops_the_fall_in_whole_networks(kind: str) -> None:
    found = slope(network_of(kind, "shared"), SIZES[6:], 200)
    assert found.value - z_bound() * found.error > -0.6


def test_slope_of_a_power_law_and_of_three_points() -> None:
    exact = log_log_slope(SIZES, [3.0 / size for size in SIZES])
    assert exact.value == pytest.approx(-1) and exact.error == pytest.approx(0, abs=1e-7)
    # Logarithms (to base 2) 0, 1, 2 and 0, -1, -1: residuals 1/6, -1/3, 1/6, one degree of freedom.
    assert log_log_slope([1, 2, 4], [1, 0.5, 0.5]) == pytest.approx((-0.5, math.sqrt(1 / 12)))


def test_slope_weighs_by_the_errors() -> None:
    # Equal relative errors e: e / sqrt(sum of squares), and that sum is 2 log(2)^2.
    assert log_log_slope([1, 2, 4], [1, 0.5, 0.5], [0.1, 0.05, 0.05]) == pytest.approx(
        (-0.5, 0.1 / math.sqrt(2) / math.log(2))
    )
    # A point without weight leaves the line through the two others.
    assert log_log_slope([1, 2, 4], [1, 0.5, 0.5], [1e-3, 5e-4, 1e6]).value == pytest.approx(-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [1.0]), "one number per point"),
        (([1, 2, 4], [1.0, 0.0, 1.0]), "variances must be positive"),
        (([1, 2, 4], [1.0, 1.0, math.inf]), "variances must be positive"),
        (([0, 2, 4], [1.0, 1.0, 1.0]), "sizes must be positive"),
        (([1, 2], [1.0, 1.0], [1.0, 0.0]), "errors must be positive"),
        (([1, 2], [1.0, 1.0]), "needs 3 points"),
        (([2, 2], [1.0, 1.0], [1.0, 1.0]), "2 different sizes"),
    ],
)
def test_slopes_that_are_none_are_refused(arguments: tuple[list[float], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_log_slope(*arguments)


# ---- correlation of rows ------------------------------------------------------------------------------------------


def test_row_correlation_of_four_draws() -> None:
    a, b = th.tensor([1.0, -1.0, 1.0, -1.0]), th.tensor([1.0, 1.0, -1.0, -1.0])
    assert row_correlation(th.stack([a, 3 * a + 2], dim=1)) == pytest.approx((1, 0))
    assert row_correlation(th.stack([a, -a], dim=1)) == pytest.approx((-1, 0))
    # Products of a and b are 1, -1, -1, 1: mean 0, sample variance 4/3, four draws.
    assert row_correlation(th.stack([a, b], dim=1)) == pytest.approx((0, math.sqrt(1 / 3)))
    assert row_correlation(th.stack([a, a, b], dim=1)).value == pytest.approx(1 / 3)
    entries = th.stack([th.stack([a, a], dim=1), th.stack([a, b], dim=1)], dim=2)
    assert row_correlation(entries).value == pytest.approx(1 / 2)


def test_the_correlation_error_is_that_of_a_normal_sample() -> None:
    """(1 - rho^2) / sqrt(draws), for two rows with rho = 0.6."""
    draws, rho = 4000, 0.6
    z = th.randn(draws, 2, dtype=th.float64, generator=th.Generator().manual_seed(0))
    found = row_correlation(th.stack([z[:, 0], rho * z[:, 0] + math.sqrt(1 - rho**2) * z[:, 1]], dim=1))
    # The influence of a draw is (1 - rho^2) times a product of two independent standard normals, whose kurtosis is 9.
    assert abs(found.error * math.sqrt(draws) / (1 - rho**2) - 1) <= z_bound() * math.sqrt((9 - 1) / (4 * draws))
    assert abs(found.value - rho) <= z_bound() * found.error


@pytest.mark.parametrize("sharing", SHARINGS)
def test_rows_of_a_layer_are_uncorrelated_unless_they_share_the_draw(sharing: str) -> None:
    x = th.randn(1, 8, generator=th.Generator().manual_seed(2)).expand(3, 8)
    found = row_correlation(perturbed_outputs(layer_of("fc", sharing)[0], x, 1000))
    if sharing == "shared":
        assert found == pytest.approx((1, 0), abs=1e-5)
    else:
        assert found.error < 0.02 and abs(found.value) <= z_bound() * found.error


def test_correlations_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="must vary over the draws"):
        row_correlation(th.tensor([[1.0, 2.0], [1.0, 3.0]]))
    for shape in [(4,), (1, 3), (4, 1)]:
        with pytest.raises(ValueError, match="2 draws and 2 rows"):
            row_correlation(th.randn(shape))
