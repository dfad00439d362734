"""Tolerances of statistical tests, computed from the sample and the false-fail rate. Every test allows itself 1e-6."""

import math
from statistics import NormalDist

import torch as th

FALSE_FAIL = 1e-6


def z_bound(false_fail: float = FALSE_FAIL, comparisons: int = 1) -> float:
    """Two-sided bound on a standard normal, for all comparisons together (Bonferroni)."""
    return -NormalDist().inv_cdf(false_fail / (2 * comparisons))


def hoeffding(n: int, comparisons: int = 1, false_fail: float = FALSE_FAIL) -> float:
    """Bound on the mean of n independent variables in [-1, 1] with mean 0; exact, no normal approximation."""
    return math.sqrt(2 * math.log(2 * comparisons / false_fail) / n)


def assert_mean(samples: th.Tensor, expected: th.Tensor | float, slack: float = 0.0, comparisons: int = 0) -> None:
    """The mean over dimension 0 (independent samples) is as expected; ``slack`` is added to the sampling error."""
    mean, error = samples.mean(0), samples.std(0) / math.sqrt(len(samples))
    bound = z_bound(comparisons=comparisons or mean.numel()) * error + slack
    worst = ((mean - expected).abs() - bound).max()
    assert worst <= 1e-12, f"mean {mean} is not {expected} within {bound}"


def assert_same_mean(a: th.Tensor, b: th.Tensor) -> None:
    """Two sets of independent samples (dimension 0) have the same mean in every component."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    bound = z_bound(comparisons=error.numel()) * error
    difference = (a.mean(0) - b.mean(0)).abs()
    assert (difference <= bound + 1e-12).all(), f"means differ by {difference}, allowed {bound}"


def assert_sign_correlations(a: th.Tensor, b: th.Tensor) -> None:
    """No column of signs ``a`` (samples, i) is correlated with one of ``b`` (samples, j)."""
    correlation = a.double().T @ b.double() / len(a)
    assert correlation.abs().max() <= hoeffding(len(a), correlation.numel())
