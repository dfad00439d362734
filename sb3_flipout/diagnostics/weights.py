"""Sigma of a layer, and its weights against their noise."""

from __future__ import annotations

import math

import torch as th

from sb3_flipout.layers import FlipoutLayer

# E[f(z)^2] of a row factor; the weight's noise has one factor over inputs and one over outputs, the bias's only the latter.
_FACTOR_POWER = {"sign": 1.0, "sqrt_normal": math.sqrt(2 / math.pi), "normal": 1.0}


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
    spec, power = layer.noise_config.spec, _FACTOR_POWER[layer.noise_config.spec.factor]
    found = []
    for block in layer.blocks:
        weight_sigma, bias_sigma = block.sigmas(layer)
        pair = (weight_sigma, weight_sigma if spec.sigma == "per_layer" else bias_sigma)
        for mean, sigma, factors in zip(block.means(layer), pair, (2, 1), strict=True):
            if mean is not None:
                unit = mean.detach().abs() if spec.relative else th.ones_like(mean.detach())
                deviation = unit if sigma is None else unit * sigma.detach().abs()
                found.append(deviation.flatten() * (scale * power ** (factors / 2)))
    return th.cat(found)


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
