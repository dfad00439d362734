"""Variance of outputs under noise, split by where it comes from."""

from __future__ import annotations

import torch as th


def noise_share(outputs: th.Tensor) -> float:
    r"""
    Estimate the share of the variance of outputs that is due to noise.

    By the law of total variance :math:`\mathrm{Var}[y] = \mathbb E_x \mathrm{Var}_k[y \mid x] + \mathrm{Var}_x
    \mathbb E_k[y \mid x]` over inputs x and noise k, summed over output entries; the share is the first term over both. The
    second term is estimated without bias: what the noise leaves in means over finitely many draws is taken off.

    :param outputs: Outputs under draw after draw of the noise, the same inputs in each, shape (draws, N, ...); at least 2 of
        each
    :return: Share, from 0 to 1; NaN where outputs do not vary at all
    :raises ValueError: If there are fewer than 2 draws or inputs
    """
    if outputs.dim() < 2 or min(outputs.shape[:2]) < 2:
        raise ValueError(
            f"outputs must have the shape (draws, inputs, ...) with 2 of each or more, got {tuple(outputs.shape)}."
        )
    samples = outputs.detach().double()
    by_noise = samples.var(0).mean(0).sum()
    by_input = samples.mean(0).var(0).sum() - by_noise / len(samples)
    return float(by_noise / (by_noise + by_input.clamp(min=0)))
