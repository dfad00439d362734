"""The perturbed GRU, and its cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn
from torch.nn.functional import linear

from sb3_flipout.layers import functional
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.block import Block
from sb3_flipout.layers.config import NoiseKwargs, layer_noise
from sb3_flipout.layers.recurrent._sequences import Projection, Steps
from sb3_flipout.layers.recurrent.base import RecurrentLayer, States
from sb3_flipout.layers.row_view import RowView


class FlipoutGRU(RecurrentLayer, nn.GRU):
    """
    ``nn.GRU`` whose every row can see its own perturbed weights, input-to-hidden and hidden-to-hidden.

    Noise comes with one key per sequence, or one per sequence and step, as in :class:`~sb3_flipout.layers.FlipoutLSTM`.
    Arguments as in :class:`~sb3_flipout.layers.recurrent.base.RecurrentLayer`.
    """

    PLAIN = nn.GRU
    STATES = 1

    def _run(
        self,
        x: th.Tensor,
        before: States,
        from_input: Projection,
        from_hidden: Projection,
        steps: Steps,
        kept: Sequence[th.Tensor] | None,
    ) -> tuple[list[th.Tensor], States]:
        # The reset gate multiplies what the hidden state gives, its bias included, so the two are kept apart.
        outputs, last = functional.gru(steps.split(from_input.whole(x, None)), before[0], from_hidden.alone)
        return outputs, (last,)

    def _as_tuple(self, hx: Any) -> States:
        return (hx,)

    def _as_given(self, states: States) -> th.Tensor:
        return states[0]


class FlipoutGRUCell(FlipoutLayer, nn.GRUCell):
    """
    ``nn.GRUCell`` whose every row can see its own perturbed weights.

    :param input_size: Size of the input
    :param hidden_size: Size of the hidden state
    :param args: As of ``nn.GRUCell``
    :param kwargs: The same by name, and ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :raises TypeError: If a keyword is no noise setting, or a value has a wrong type
    :raises ValueError: If a noise setting is out of range or unfit
    """

    PLAIN = nn.GRUCell

    def __init__(self, input_size: int, hidden_size: int, *args: Any, **kwargs: Any) -> None:
        noise: Any = {name: kwargs.pop(name) for name in NoiseKwargs.__annotations__ if name in kwargs}
        config = layer_noise(noise)
        nn.GRUCell.__init__(self, input_size, hidden_size, *args, **kwargs)
        self.init_noise(config)

    def _choose_blocks(self, noise_on: str) -> None:
        kinds = ("ih", "hh")
        self.blocks = tuple(
            Block(f"weight_{kind}", f"bias_{kind}" if self.bias else None, number) for number, kind in enumerate(kinds)
        )

    def forward(self, input: th.Tensor, hx: th.Tensor | None = None) -> th.Tensor:
        """
        Make one step: with the mean weights, or with each row's own while noise is active.

        :param input: Inputs, shape (N, input_size)
        :param hx: Hidden state, shape (N, hidden_size); ``None`` for zeros
        :return: Hidden state after the step
        :raises ValueError: If noise is active for another number of rows
        """
        view = self.row_view()
        if view is None:
            return super().forward(input, hx)
        if input.dim() != 2 or not self.row_layout.fits(len(input), len(view.noise)):
            raise ValueError(
                f"FlipoutGRUCell got an input of shape {tuple(input.shape)} and keys for {len(view.noise)} rows; it needs one "
                "row each. If the network folds others into the batch, leave the module out with skip=."
            )
        h = input.new_zeros(len(input), self.hidden_size) if hx is None else hx
        parts = [self._project(x, block, view) for x, block in zip((input, h), self.blocks, strict=True)]
        return functional.gru_step(parts[0], parts[1], h)

    def _project(self, x: th.Tensor, block: Block, view: RowView) -> th.Tensor:
        mean, spread = block.means(self), self.row_layout.spread
        scale = view.noise.scale.to(x.dtype)
        if view.of_keys:
            s, r = (spread(vector.to(x.dtype), len(x)) for vector in view.vectors(block.number))
            return functional.flipout(linear, x, mean, self.deltas(block=block), s, r)
        if self.noise_config.noise_sharing == "shared":
            return functional.shared(linear, x, mean, self.deltas(block=block), spread(scale, len(x))[:, None])
        weights = self.row_weights(spread(view.noise.keys, len(x)), spread(scale, len(x)), block)
        return functional.linear_per_row(x, *weights)
