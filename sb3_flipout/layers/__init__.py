"""Ring 1, torch and noise: perturbed layers that serve alone or inside any network."""

from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.config import NOISYNET_SIGMA, LayerNoise
from sb3_flipout.layers.conv import FlipoutConv2d
from sb3_flipout.layers.convert import PERTURBED_CLASSES, perturb, restore
from sb3_flipout.layers.linear import FlipoutLinear
from sb3_flipout.layers.lstm import FlipoutLSTM
from sb3_flipout.layers.network import NoisyNetwork, effective_weight, perturbed, redraw

__all__ = [
    "NOISYNET_SIGMA",
    "PERTURBED_CLASSES",
    "FlipoutConv2d",
    "FlipoutLSTM",
    "FlipoutLayer",
    "FlipoutLinear",
    "LayerNoise",
    "NoisyNetwork",
    "effective_weight",
    "perturb",
    "perturbed",
    "redraw",
    "restore",
]
