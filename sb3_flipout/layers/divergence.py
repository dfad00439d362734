"""How far the law of noisy weights is from a prior: what Bayes by backprop adds to the loss."""

from __future__ import annotations

import torch as th
from torch import nn

from sb3_flipout.checks import check_number
from sb3_flipout.layers.interface import flipout_layers

#: Families whose weights are normal, each by itself.
_NORMAL = ("gaussian", "multiplicative", "isotropic")


def kl_divergence(module: nn.Module, prior: float) -> th.Tensor:
    """
    Compute the KL divergence of the law of a network's weights from a normal prior (Blundell et al. 2015, section 3.2; in
    closed form, Kingma & Welling 2014, appendix B), summed over all perturbed weights and biases.

    Bayes by backprop minimises the loss of the data, summed over them, plus this. Each weight counts by itself, as
    N(mean, sigma^2) at noise scale 1; what rows and layers share of a draw does not enter.

    :param module: Network that was perturbed; or a part of it, or one layer
    :param prior: Standard deviation of the prior, above 0: of weights in units of 1/sqrt(fan_in), as ``sigma_init`` is; of
        biases as it stands
    :return: Divergence in nats, differentiable in mean weights and sigma, shape ()
    :raises TypeError: If ``prior`` is no number
    :raises ValueError: If it is not above 0, if ``module`` has no perturbed layer, a family of noise that is not normal, or
        a sigma that is 0, from which every prior is infinitely far
    """
    prior, layers = check_number("prior", prior, above=True), flipout_layers([module])
    if not layers:
        raise ValueError("module has no perturbed layers; call sb3_flipout.perturb(module) first.")
    total: th.Tensor | None = None
    for layer in layers:
        family = layer.noise_config.family
        if family not in _NORMAL:
            raise ValueError(f"the weights of {layer} are not normal; their family must be one of {', '.join(_NORMAL)}.")
        for block in layer.blocks:
            scales = (prior / layer.fan_in(block) ** 0.5, prior)
            for mean, variance, scale in zip(block.means(layer), layer.variances(block), scales, strict=True):
                if mean is not None and variance is not None:
                    part = _of_normals(mean, variance, scale)
                    total = part if total is None else total + part
    assert total is not None, "a layer has a weight"
    if not bool(th.isfinite(total)):
        raise ValueError("a sigma is 0 or not finite, so the divergence is not; give sigma_init above 0.")
    return total


def _of_normals(mean: th.Tensor, variance: th.Tensor, scale: float) -> th.Tensor:
    """Divergence of N(mean, variance) from N(0, scale²), summed over elements."""
    ratio = variance / scale**2
    return ((ratio + (mean / scale).square() - 1 - ratio.log()) / 2).sum()
