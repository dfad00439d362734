"""Layers of other kinds than :mod:`cases` has, with inputs: transposed and other convolutions, cells, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers import FlipoutLayer, perturb
from sb3_flipout.layers.embedding import OneHotLinear

N = 3
KEYS, SCALES = th.tensor([7, -3, 2**40]), th.tensor([1.0, 0.5, -2.0], dtype=th.float64)
Made = Callable[[], nn.Module]


def floats(*shape: int) -> Callable[[], tuple[th.Tensor, ...]]:
    return lambda: (th.randn(N, *shape, dtype=th.float64),)


def indices(*shape: int) -> Callable[[], tuple[th.Tensor, ...]]:
    return lambda: (th.randint(0, 5, (N, *shape)),)


#: Plain layer, and its inputs.
KINDS: dict[str, tuple[Made, Callable[[], tuple[th.Tensor, ...]]]] = {
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), floats(4, 5)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, (2, 3)), floats(2, 4, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(1, 2, 2), floats(1, 3, 3, 3)),
    "transposed, no bias": (lambda: nn.ConvTranspose2d(2, 3, 2, bias=False), floats(2, 4, 4)),
    "transposed, stride and padding": (
        lambda: nn.ConvTranspose2d(4, 2, 3, stride=(2, 3), padding=1, output_padding=(1, 0)),
        floats(4, 3, 3),
    ),
    "transposed, groups and dilation": (lambda: nn.ConvTranspose1d(4, 6, 2, groups=2, dilation=2), floats(4, 5)),
    "transposed, depthwise": (lambda: nn.ConvTranspose1d(3, 3, 2, groups=3), floats(3, 5)),
    "convolution 1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), floats(4, 5)),
    "convolution 3d": (lambda: nn.Conv3d(1, 2, 2, stride=2), floats(1, 4, 4, 4)),
    "cell": (lambda: nn.GRUCell(4, 5), lambda: (*floats(4)(), *floats(5)())),
    "cell, no bias": (lambda: nn.GRUCell(4, 5, bias=False), lambda: (*floats(4)(), *floats(5)())),
    "cell from zeros": (lambda: nn.GRUCell(4, 5), floats(4)),
    "embedding": (lambda: nn.Embedding(5, 3), indices()),
    "embedding of several": (lambda: nn.Embedding(5, 3), indices(2, 4)),
    "embedding with padding": (lambda: nn.Embedding(5, 3, padding_idx=2), indices(6)),
    "one-hot": (lambda: OneHotLinear(5, 3), indices()),
    "one-hot of several": (lambda: OneHotLinear(5, 3), indices(4)),
}


def build(made: Made, noise: dict[str, Any]) -> FlipoutLayer:
    th.manual_seed(0)
    net = nn.Sequential(made()).double()
    perturb(net, **noise, **({} if noise.get("family") == "dropconnect" else dict(sigma_init=0.3)))
    (layer,) = net
    assert isinstance(layer, FlipoutLayer)
    with th.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("sigma"):  # each another
                parameter.mul_(1 + th.rand(parameter.shape, dtype=th.float64))
    return layer
