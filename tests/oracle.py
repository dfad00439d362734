"""The slow, obvious versions of the fast paths: Python integers and explicit loops. Nothing here calls the package.

What is documented and nothing else goes in: SplitMix64 as published, the constants' paths (layer, vector, word), bits from
the lowest up, 16-bit mid-point quantiles, and ``W + c dW[o, i] r_o s_i``, ``b + c db r``. Of the package it reads a layer's
settings, means and sigmas only.
"""

import math
from functools import cache
from statistics import NormalDist
from typing import Any

import torch as th
from torch import nn

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
FIRST_OUTPUT = 0xE220A8397B1DCDAF  # of the published generator, seeded with 0

IN, OUT, ROW_WEIGHT, ROW_BIAS = range(4)  # numbers of a layer's vectors


def splitmix64(state: int, number: int) -> int:
    """Output number ``number``, from 0, of the generator with this seed (unsigned)."""
    z = (state + (number + 1) * GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def signed(value: int) -> int:
    value &= MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def fold(key: int, *path: int) -> int:
    for item in path:
        key = splitmix64(key, item)
    return signed(key)


def _words(key: int, layer: int, vector: int, count: int) -> list[int]:
    return [splitmix64(fold(0, layer, vector, word), key) for word in range(count)]


def _signs_of(word: int) -> list[float]:
    return [-1.0 if (word >> bit) & 1 else 1.0 for bit in range(64)]


@cache
def normal_table() -> list[float]:
    """Mid-point quantiles of N(0, 1), rescaled to unit variance."""
    quantiles = [NormalDist().inv_cdf((piece + 0.5) / 65536) for piece in range(65536)]
    norm = math.sqrt(math.fsum(z * z for z in quantiles) / 65536)
    return [z / norm for z in quantiles]


def _normals_of(word: int) -> list[float]:
    return [normal_table()[(word >> shift) & 0xFFFF] for shift in (0, 16, 32, 48)]


def _sqrt_normals_of(word: int) -> list[float]:
    return [math.copysign(math.sqrt(abs(z)), z) for z in _normals_of(word)]


CUTS = {"sign": (64, _signs_of), "normal": (4, _normals_of), "sqrt_normal": (4, _sqrt_normals_of)}


def factors(key: int, layer: int, vector: int, n: int, kind: str) -> list[float]:
    """One factor vector of one row."""
    per_word, cut = CUTS[kind]
    return [factor for word in _words(key, layer, vector, math.ceil(n / per_word)) for factor in cut(word)][:n]


BASE_SEED = 0x5B3F11


def base_elements(law: str, start: int, n: int) -> th.Tensor:
    """Elements of the table that bases are slices of: number e is a piece of what the seed has in word e // pieces."""
    per_word, cut = CUTS["sign" if law == "sign" else "normal"]
    first, last = start // per_word, (start + n - 1) // per_word
    words = [splitmix64(splitmix64(BASE_SEED, word), BASE_SEED) for word in range(first, last + 1)]
    flat = [piece for word in words for piece in cut(word)]
    return th.tensor(flat[start - first * per_word :][:n])


def base(layer: Any) -> tuple[th.Tensor | None, th.Tensor | None]:
    """The base draw, a slice of the table that begins where key and number say: weight first, then bias."""
    law = layer.noise_config.spec.base
    if law is None:
        return None, None
    n_weight, n_bias = layer.weight.numel(), 0 if layer.bias is None else layer.bias.numel()
    size = 4 * 2**20
    while size < 4 * (n_weight + n_bias):
        size *= 2
    start = fold(layer.base_key, layer.noise_index) % (size - (n_weight + n_bias) + 1)
    flat = base_elements(law, start, n_weight + n_bias).to(layer.weight.dtype)
    bias = None if layer.bias is None else flat[n_weight : n_weight + n_bias]
    return flat[:n_weight].view(layer.weight.shape), bias


class _Row:
    """What multiplies the perturbation of each weight of one row, by the layer's sharing."""

    def __init__(self, layer: Any, key: int) -> None:
        spec, number = layer.noise_config.spec, layer.noise_index
        self.base, self.bias_base = base(layer)
        self.sharing, self.kernel = layer.noise_config.noise_sharing, layer.weight.shape[2:]
        self.drawn = self.sharing == "independent" and spec.row_draw is not None
        self.single = self.sharing == "shared" and self.base is None  # NoisyNet: factors of one key for the batch
        groups = getattr(layer, "groups", 1)
        self.in_group, self.out_group = layer.weight.shape[1], layer.weight.shape[0] // groups
        key = layer.base_key if self.single else key
        if self.drawn:
            flat = factors(key, number, ROW_WEIGHT, layer.weight.numel(), spec.row_draw)
            self.base = th.tensor(flat, dtype=th.float64).view(layer.weight.shape)
            flat = factors(key, number, ROW_BIAS, len(layer.weight), spec.row_draw)
            self.bias_base = th.tensor(flat, dtype=th.float64)
        self.s = factors(key, number, IN, self.in_group * groups, spec.factor)
        self.r = factors(key, number, OUT, len(layer.weight), spec.factor)

    @property
    def by_factors(self) -> bool:
        return self.single or not (self.drawn or self.sharing == "shared")

    def weight_noise(self, o: int, i: int) -> th.Tensor:
        noise = th.ones(self.kernel, dtype=th.float64) if self.base is None else self.base[o, i].double()
        channel = (o // self.out_group) * self.in_group + i
        return noise * self.r[o] * self.s[channel] if self.by_factors else noise

    def bias_noise(self, o: int) -> float:
        noise = 1.0 if self.bias_base is None else float(self.bias_base[o])
        return noise * self.r[o] if self.by_factors else noise


def _delta(spec: Any, mean: th.Tensor, sigma: th.Tensor | None, noise: th.Tensor | float) -> th.Tensor:
    delta = noise if sigma is None else sigma * noise
    return mean * delta if spec.relative else delta


def _sigma_at(sigma: th.Tensor | None, *at: int) -> th.Tensor | None:
    return sigma if sigma is None or sigma.dim() == 0 else sigma[at]


def row_weights(layer: Any, key: int, scale: float = 1.0) -> tuple[th.Tensor, th.Tensor | None]:
    """Weight and bias of the row with this key, element by element; differentiable in means and sigmas."""
    spec, row = layer.noise_config.spec, _Row(layer, key)
    weight = [
        layer.weight[o, i] + scale * _delta(spec, layer.weight[o, i], _sigma_at(layer.weight_sigma, o, i), noise)
        for o in range(layer.weight.shape[0])
        for i in range(layer.weight.shape[1])
        for noise in [row.weight_noise(o, i)]
    ]
    if layer.bias is None:
        return th.stack(weight).view(layer.weight.shape), None
    bias_sigma = layer.weight_sigma if spec.sigma == "per_layer" else layer.bias_sigma
    bias = [
        layer.bias[o] + scale * _delta(spec, layer.bias[o], _sigma_at(bias_sigma, o), row.bias_noise(o))
        for o in range(len(layer.bias))
    ]
    return th.stack(weight).view(layer.weight.shape), th.stack(bias)


def apply(layer: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """What the plain torch.nn layer with this geometry does with these weights."""
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x, weight, bias)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups, bias is not None, layer.padding_mode)
    plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, *geometry)
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return th.func.functional_call(plain, parameters, (x,))


def forward(layer: Any, x: th.Tensor, keys: th.Tensor, scale: list[float]) -> th.Tensor:
    """The layer row by row, each with its own materialised weights."""
    rows = zip(x, keys.tolist(), scale, strict=True)
    return th.cat([apply(layer, row[None], *row_weights(layer, key, c)) for row, key, c in rows])
