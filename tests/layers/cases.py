"""Layers to test: every geometry under every family and sharing of the package's tables."""

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_flipout.layers import FlipoutConv2d, FlipoutLayer, FlipoutLinear, redraw
from sb3_flipout.noise import FAMILIES
from sb3_flipout.noise.families import NOISE_SHARINGS

NOISES = [{"family": family, "noise_sharing": sharing} for family in FAMILIES for sharing in NOISE_SHARINGS]
FLIPOUT = [noise for noise in NOISES if noise["noise_sharing"] == "flipout"]


def noise_id(noise: dict[str, Any]) -> str:
    return f"{noise['family']}-{noise['noise_sharing']}"


every_noise = pytest.mark.parametrize("noise", NOISES, ids=noise_id)
every_family = pytest.mark.parametrize("family", FAMILIES)

N = 6
KEYS = th.tensor([5, -3, 2**62, 77, 5, -(2**63)])  # two rows share a key
SCALES: dict[str, Any] = {
    "one": None,
    "number": 0.7,
    "negative": -1.5,
    "per_row": th.tensor([1.0, 0.0, -1.0, 0.25, 2.0, -0.5]),
}

# Arguments of the torch.nn class, and the shape of an input without its rows.
LINEAR: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "plain": ({"in_features": 5, "out_features": 7}, (5,)),
    "no_bias": ({"in_features": 5, "out_features": 3, "bias": False}, (5,)),
    "wide": ({"in_features": 67, "out_features": 2}, (67,)),
    "one_to_one": ({"in_features": 1, "out_features": 1}, (1,)),
    "tokens": ({"in_features": 4, "out_features": 3}, (2, 4)),
    "tokens_2": ({"in_features": 4, "out_features": 3}, (3, 2, 4)),
    "tokens_no_bias": ({"in_features": 4, "out_features": 3, "bias": False}, (3, 4)),
}


def _conv(inputs: int, outputs: int, kernel: Any, **options: Any) -> tuple[dict[str, Any], tuple[int, ...]]:
    return {"in_channels": inputs, "out_channels": outputs, "kernel_size": kernel, **options}, (inputs, 6, 7)


CONV = {
    "plain": _conv(3, 4, 3),
    "no_bias": _conv(3, 2, 2, bias=False),
    "stride": _conv(3, 2, 3, stride=2, padding=1),
    "same": _conv(2, 3, 3, padding="same"),
    "valid": _conv(2, 3, 3, padding="valid"),
    "reflect": _conv(2, 3, 3, padding=1, padding_mode="reflect"),
    "replicate": _conv(2, 3, 3, padding=(2, 1), padding_mode="replicate"),
    "circular": _conv(2, 3, 3, padding=(1, 2), padding_mode="circular"),
    "circular_same": _conv(2, 3, 3, padding="same", padding_mode="circular"),
    "dilation": _conv(2, 3, 2, dilation=(2, 3)),
    "groups": _conv(4, 6, 2, groups=2),
    "more_inputs_than_outputs_per_group": _conv(6, 3, 1, groups=3),
    "depthwise": _conv(3, 6, 2, groups=3, bias=False),
    "non_square": _conv(2, 3, (2, 3), stride=(1, 2)),
    "all_at_once": _conv(4, 2, (3, 1), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2, padding_mode="reflect"),
}

GEOMETRIES = [("linear", name) for name in LINEAR] + [("conv", name) for name in CONV]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids="-".join)
TABLES: dict[str, Any] = {"linear": (LINEAR, FlipoutLinear, nn.Linear), "conv": (CONV, FlipoutConv2d, nn.Conv2d)}


def shake(layer: nn.Module, seed: int = 3) -> None:
    """Give means and sigmas (which may be negative) values of their own, so that no mistake cancels."""
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(th.randn(parameter.shape, generator=generator, dtype=th.float64))


def make(geometry: tuple[str, str], number: int = 3, dtype: th.dtype = th.float64, **noise: Any) -> FlipoutLayer:
    """Perturbed layer as the one with this number in a network."""
    table, perturbed_class, _ = TABLES[geometry[0]]
    layer: FlipoutLayer = perturbed_class(**table[geometry[1]][0], dtype=dtype, **noise)
    shake(layer)
    layer.noise_index = number
    redraw(layer, 11)
    return layer


def plain_twin(geometry: tuple[str, str], layer: FlipoutLayer) -> nn.Module:
    """The torch.nn layer with the same means."""
    table, _, plain_class = TABLES[geometry[0]]
    twin: nn.Module = plain_class(**table[geometry[1]][0], dtype=layer.weight.dtype)
    twin.load_state_dict({name: value for name, value in layer.state_dict().items() if "sigma" not in name})
    return twin


def inputs(geometry: tuple[str, str], rows: int = N, dtype: th.dtype = th.float64, seed: int = 5) -> th.Tensor:
    shape = TABLES[geometry[0]][0][geometry[1]][1]
    return th.randn(rows, *shape, dtype=dtype, generator=th.Generator().manual_seed(seed))


def small_net(bias: bool = True) -> nn.Sequential:
    """Convolution and linear layers; takes (N, 2, 5, 5)."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 8, bias), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 2)
    )


def image(rows: int = N) -> th.Tensor:
    return th.randn(rows, 2, 5, 5, generator=th.Generator().manual_seed(9))
