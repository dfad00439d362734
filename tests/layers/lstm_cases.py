"""LSTMs to test, their inputs, and noise held over sequences or given for each step."""

from typing import Any

import pytest
import torch as th
from cases import NOISES, noise_id, shake

from sb3_flipout.layers import FlipoutLSTM, redraw

T, N, I, H = 4, 3, 5, 3  # noqa: E741
HELD = th.tensor([5, -3, 2**62])
# Sequence 0 changes its key in the middle, sequence 1 at every step, sequence 2 keeps its key; (T, N).
STEPWISE = th.tensor([[5, -3, 77], [5, 8, 77], [9, 2**40, 77], [9, 5, 77]])
HELD_SCALE = th.tensor([1.0, -0.5, 2.0])
STEPWISE_SCALE = th.tensor([[1.0, 0.0, 2.0], [1.0, -1.0, 2.0], [-0.5, 1.5, 2.0], [-0.5, 0.25, 2.0]])
TIGHT = {"rtol": 0, "atol": 1e-10}

every_lstm_noise = pytest.mark.parametrize("noise", NOISES, ids=noise_id)
every_option = pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"num_layers": 1}, {"noise_on": "hidden"}, {"noise_on": "hidden", "bias": False, "num_layers": 3}],
    ids=lambda options: "-".join(f"{name}_{value}" for name, value in options.items()) or "plain",
)


def make_lstm(dtype: th.dtype = th.float64, seed: int = 3, **options: Any) -> FlipoutLSTM:
    """Perturbed LSTM of two layers as the one with number 3 in a network, with means and sigmas of its own."""
    lstm = FlipoutLSTM(I, H, **{"num_layers": 2, "dtype": dtype, **options})
    shake(lstm, seed)
    lstm.noise_index = 3
    redraw(lstm, 11)
    return lstm


def randn(*shape: int, seed: int, dtype: th.dtype = th.float64) -> th.Tensor:
    return th.randn(shape, dtype=th.float64, generator=th.Generator().manual_seed(seed)).to(dtype)


def sequences(dtype: th.dtype = th.float64) -> th.Tensor:
    return randn(T, N, I, seed=5, dtype=dtype)


def states(layers: int = 2, dtype: th.dtype = th.float64) -> tuple[th.Tensor, th.Tensor]:
    return randn(layers, N, H, seed=6, dtype=dtype), randn(layers, N, H, seed=7, dtype=dtype)
