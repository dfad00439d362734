"""Ring 1, torch and noise: perturbed layers that serve alone or inside any network."""

from sb3_flipout.layers.attention import FlipoutMultiheadAttention
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.config import NOISYNET_SIGMA, LayerNoise, NoiseKwargs
from sb3_flipout.layers.conv import (
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutConv3d,
    FlipoutConvTranspose1d,
    FlipoutConvTranspose2d,
    FlipoutConvTranspose3d,
)
from sb3_flipout.layers.convert import perturb, restore
from sb3_flipout.layers.derived import PERTURBED_CLASSES
from sb3_flipout.layers.divergence import kl_divergence
from sb3_flipout.layers.embedding import FlipoutEmbedding, FlipoutOneHotLinear, OneHotLinear
from sb3_flipout.layers.interface import attach, effective_weight, flipout_layers, network_of, perturbed, redraw
from sb3_flipout.layers.linear import FlipoutLinear
from sb3_flipout.layers.network import PerturbedNetwork
from sb3_flipout.layers.recurrent import FlipoutGRU, FlipoutGRUCell, FlipoutLSTM
from sb3_flipout.layers.row_view import Ask, RowView

__all__ = [
    "NOISYNET_SIGMA",
    "PERTURBED_CLASSES",
    "Ask",
    "FlipoutConv1d",
    "FlipoutConv2d",
    "FlipoutConv3d",
    "FlipoutConvTranspose1d",
    "FlipoutConvTranspose2d",
    "FlipoutConvTranspose3d",
    "FlipoutEmbedding",
    "FlipoutGRU",
    "FlipoutGRUCell",
    "FlipoutLSTM",
    "FlipoutLayer",
    "FlipoutLinear",
    "FlipoutMultiheadAttention",
    "FlipoutOneHotLinear",
    "LayerNoise",
    "NoiseKwargs",
    "OneHotLinear",
    "PerturbedNetwork",
    "RowView",
    "attach",
    "effective_weight",
    "flipout_layers",
    "kl_divergence",
    "network_of",
    "perturb",
    "perturbed",
    "redraw",
    "restore",
]
