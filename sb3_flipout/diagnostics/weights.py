"""Sigma of a layer, and its weights against their noise."""

from __future__ import annotations

import torch as th

from sb3_flipout.layers import FlipoutLayer


def sigmas(layer: FlipoutLayer) -> th.Tensor | None:
    """
    Collect abs(sigma) of a layer, from which the size of its noise follows.

    :param layer: Perturbed layer
    :return: One number per weight and bias, shape (n,), or per layer where there is only one; ``None`` for a family without
    """
    pairs = (sigma for block in layer.blocks for sigma in block.sigmas(layer))
    found = [sigma.detach().flatten().abs() for sigma in pairs if sigma is not None]
    return th.cat(found) if found else None


def noise_deviation(layer: FlipoutLayer, scale: float) -> th.Tensor:
    r"""
    Compute the standard deviation of each weight's perturbation, over draws of base and row factors.

    It is :math:`c\,|\sigma|`, times :math:`|\bar W|` in the families that are relative to the mean weights, and times the
    deviation of Gaussian row factors in the factorised one (0.80 for a weight, 0.89 for a bias).

    :param layer: Perturbed layer
    :param scale: Noise scale c
    :return: Deviations of weights and biases, in this order, shape (n,)
    """
    pairs = [pair for block in layer.blocks for pair in layer.variances(block)]
    return th.cat([scale * variance.detach().sqrt().flatten() for variance in pairs if variance is not None])


def signal_to_noise(layer: FlipoutLayer, scale: float) -> th.Tensor:
    """
    Compute abs(mean weight) over the standard deviation of its perturbation.

    :param layer: Perturbed layer
    :param scale: Noise scale c
    :return: Ratios of the weights and biases that have noise, shape (n,); empty where none has
    """
    deviation = noise_deviation(layer, scale)
    means = th.cat([mean.detach().flatten().abs() for mean in layer.means()])
    noisy = deviation > 0
    return means[noisy] / deviation[noisy]
