"""How noisy perturbed networks are: variance of gradients, its slope over batch sizes, correlation of rows.

Each function returns an :class:`Estimate`, the number with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_flipout.layers import network_of, perturbed, redraw
from sb3_flipout.noise import fold, fold_in

#: Tensors with the N rows of a batch in their first dimension; the first one tells N.
Batch = Sequence[th.Tensor]


class Estimate(NamedTuple):
    """
    An estimated number.

    :param value: The estimate
    :param error: Its standard error, in the same unit
    """

    value: float
    error: float


def gradient_variance(
    network: nn.Module,
    loss: Callable[[nn.Module, Batch], th.Tensor],
    batch: Batch | Callable[[int], Batch],
    repeats: int,
    parameters: Sequence[th.Tensor] | None = None,
    seed: int = 0,
) -> Estimate:
    r"""
    Estimate the variance of a mini-batch gradient: Wen et al. 2018, section 4.1, figure 1.

    Each repeat draws base and keys anew, and the data too where ``batch`` is a function. By their Theorem 2 the variance is
    :math:`\alpha / N + \gamma (N - 1) / N`: :math:`\alpha` is that of one row, :math:`\gamma` the covariance of two rows
    through what they share, the base. Under flipout :math:`\gamma` is small for mean weights, which the paper looks at, but
    **not for sigma**, whose gradient goes with the square of the base. Memory: ``repeats`` gradients.

    :param network: Network with perturbed layers
    :param loss: Gives the loss of a batch, a mean over its rows, as a scalar; called as ``loss(network, batch)`` with the
        noise active
    :param batch: Tensors of N rows each, the same in all repeats; or what gives those of a repeat, called with its number
    :param repeats: Number of gradients, 2 or more
    :param parameters: With respect to what; by default the trained mean weights and biases of the perturbed layers
    :param seed: Seed of bases and keys
    :return: Variance of one entry of the gradient, averaged over entries, in units of (loss / parameter) squared
    :raises ValueError: If ``repeats`` is below 2, or the network has no perturbed layer
    """
    _check_count("repeats", repeats)
    wanted = _means(network) if parameters is None else list(parameters)
    found = []
    with base_kept(network):
        for repeat in range(repeats):
            data = batch(repeat) if callable(batch) else batch
            with _fresh_noise(network, len(data[0]), data[0].device, fold(seed, repeat)):
                gradients = th.autograd.grad(loss(network, data), wanted)
            found.append(th.cat([gradient.flatten() for gradient in gradients]).double())
    samples = th.stack(found)
    deviations = (samples - samples.mean(0)).square().mean(1) * repeats / (repeats - 1)
    return _mean(deviations)


def perturbed_outputs(network: nn.Module, inputs: th.Tensor, draws: int, seed: int = 0) -> th.Tensor:
    """
    Collect what a network says to the same inputs under draw after draw of base and keys.

    :param network: Network with perturbed layers that gives one tensor
    :param inputs: Inputs of N rows, shape (N, ...)
    :param draws: Number of draws, 2 or more
    :param seed: Seed of bases and keys
    :return: Outputs, shape (draws, N, ...)
    :raises ValueError: If ``draws`` is below 2, or the network has no perturbed layer
    """
    _check_count("draws", draws)
    found = []
    with th.no_grad(), base_kept(network):
        for draw in range(draws):
            with _fresh_noise(network, len(inputs), inputs.device, fold(seed, draw)):
                found.append(network(inputs))
    return th.stack(found)


def row_correlation(outputs: th.Tensor) -> Estimate:
    """
    Estimate how two rows (two environments, say) are correlated over draws: flipout's rows are not, shared ones are one.

    :param outputs: One output entry per draw, row and whatever follows, shape (draws, N, ...), N at least 2; draws must be
        independent, as those of :func:`perturbed_outputs` are
    :return: Pearson's correlation, averaged over pairs of rows and over entries; the error is that of the delta method
    :raises ValueError: If there are fewer than 2 draws or rows, or an output is the same in all draws
    """
    if outputs.dim() < 2 or min(outputs.shape[:2]) < 2:
        raise ValueError(
            f"outputs must have the shape (draws, rows, ...) with 2 draws and 2 rows or more, got {tuple(outputs.shape)}."
        )
    centred = outputs.detach().flatten(2).double() if outputs.dim() > 2 else outputs.detach()[..., None].double()
    centred = centred - centred.mean(0)
    spread = centred.square().mean(0).sqrt()
    if not bool((spread > 0).all()):
        raise ValueError(
            "outputs must vary over the draws in every row and entry, got some that do not, whose correlation is undefined; "
            "leave them out, and check that sigma and noise scale are not 0."
        )
    z = centred / spread  # (draws, N, entries)
    # Sums over the other rows j of a row i stand for those over pairs (i, j).
    products = z * (z.sum(1, keepdim=True) - z)
    correlations = products.mean(0)
    pairs = z.shape[1] * (z.shape[1] - 1)
    value = (correlations.sum(0) / pairs).mean()
    influence = (products - z.square() * correlations).sum(1).mean(1) / pairs
    return Estimate(float(value), _mean(influence).error)


def log_log_slope(sizes: Sequence[float], variances: Sequence[float], errors: Sequence[float] | None = None) -> Estimate:
    """
    Fit the exponent of a power law by least squares on logarithms: -1 where averaging over N rows is ideal.

    :param sizes: Batch sizes, positive, at least 2 different ones
    :param variances: Variance at each size, positive
    :param errors: Standard error of each variance, positive: points are weighted by them, and the slope's error follows from
        them. ``None``: points weigh the same, and its error follows from their scatter about the line (3 points or more)
    :return: Slope of log variance over log size; the error does not tell whether the points lie on a line at all
    :raises ValueError: If lengths differ, a number is not positive, or there are too few points
    """
    columns = [th.tensor(column, dtype=th.float64) for column in (sizes, variances, variances if errors is None else errors)]
    _check_points(columns, least=3 if errors is None else 2)
    x, y = columns[0].log(), columns[1].log()
    weights = th.ones_like(x) if errors is None else (columns[1] / columns[2]).square()
    x = x - (weights * x).sum() / weights.sum()
    y = y - (weights * y).sum() / weights.sum()
    spread = (weights * x.square()).sum()
    slope = (weights * x * y).sum() / spread
    scatter = (y - slope * x).square().sum() / (len(x) - 2) if errors is None else th.ones_like(slope)
    return Estimate(float(slope), float((scatter / spread).sqrt()))


def _mean(samples: th.Tensor) -> Estimate:
    """Mean of independent samples, shape (n,)."""
    return Estimate(float(samples.mean()), float(samples.std()) / math.sqrt(len(samples)))


def _means(network: nn.Module) -> list[th.Tensor]:
    return [mean for layer in network_of(network).layers for mean in layer.means() if mean.requires_grad]


@contextmanager
def _fresh_noise(network: nn.Module, rows: int, device: th.device, key: int) -> Iterator[None]:
    """Draw base and keys; the base stays."""
    redraw(network, fold(key, 0))
    with perturbed(network, fold_in(fold(key, 1), th.arange(rows, device=device))):
        yield


@contextmanager
def base_kept(network: nn.Module) -> Iterator[None]:
    """
    Make a context in which bases may be redrawn; leaving it binds again what was there before.

    :param network: Network with perturbed layers
    :return: Context manager
    """
    noisy = network_of(network)
    bases = noisy.bases()
    try:
        yield
    finally:
        noisy.bind(bases)


def _check_count(name: str, count: int) -> None:
    if count < 2:
        raise ValueError(f"{name} must be 2 or more to give a variance, got {count}.")


def _check_points(columns: list[th.Tensor], least: int) -> None:
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"sizes, variances and errors must have one number per point, got {lengths} of them.")
    if len(columns[0]) < least or len(set(columns[0].tolist())) < 2:
        raise ValueError(f"a slope needs {least} points or more at 2 different sizes, got sizes {columns[0].tolist()}.")
    for name, column in zip(("sizes", "variances", "errors"), columns, strict=True):
        if not bool((column > 0).all() and th.isfinite(column).all()):
            raise ValueError(f"{name} must be positive and finite, got {column.tolist()}.")
