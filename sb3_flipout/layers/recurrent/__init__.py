"""Perturbed recurrent layers."""

from sb3_flipout.layers.recurrent.gru import FlipoutGRU, FlipoutGRUCell
from sb3_flipout.layers.recurrent.lstm import FlipoutLSTM

__all__ = ["FlipoutGRU", "FlipoutGRUCell", "FlipoutLSTM"]
