"""The perturbed LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers import functional
from sb3_flipout.layers.recurrent._sequences import Projection, Steps
from sb3_flipout.layers.recurrent.base import RecurrentLayer, States
from sb3_flipout.noise.compiling import eager

State = tuple[th.Tensor, th.Tensor]


class FlipoutLSTM(RecurrentLayer, nn.LSTM):
    """
    ``nn.LSTM`` whose every row can see its own perturbed weights, input-to-hidden and hidden-to-hidden.

    Noise comes with one key per sequence, which is held over its steps, or with one key per sequence and step, in the order
    of the input's first two dimensions flattened (of its packed elements, where it is packed). Where a key changes within a
    sequence, the weights change from that step on and the hidden state is carried over. With one step both are the same; if
    all packed sequences have one step, keys are in the order of the sequences.

    Without active noise, and with sigma frozen at 0, it runs ``nn.LSTM``'s own code. Dropout between layers draws from
    torch's generator in training mode as in ``nn.LSTM``. Arguments as in
    :class:`~sb3_flipout.layers.recurrent.base.RecurrentLayer`.
    """

    PLAIN = nn.LSTM
    STATES = 2

    @eager
    def forward_episodes(
        self,
        input: th.Tensor,
        hx: State | None = None,
        episode_starts: th.Tensor | None = None,
        batch_first: bool | None = None,
    ) -> tuple[th.Tensor, State]:
        """
        Apply the layer to sequences within which episodes start: there the state is set to 0 before the step.

        Without active noise it calls ``nn.LSTM`` as RecurrentPPO does: once if no episode starts, else step by step.

        :param input: Inputs, shape (T, N, input_size), or (N, T, input_size) with ``batch_first``
        :param hx: Hidden and cell state before the first step, each (num_layers, N, hidden_size); ``None`` for zeros
        :param episode_starts: Flags, 1 where an episode starts with the step, shape of the input's first two dimensions;
            ``None`` for nowhere
        :param batch_first: How inputs, flags, noise rows and outputs lie; ``None``: as the layer's own setting says
        :return: Outputs, lying as the inputs, and the states after the last step
        :raises TypeError: If ``input`` is no tensor
        :raises ValueError: If shapes do not fit, or noise is active for another number of rows
        """
        _check_episodes(input, episode_starts)
        batch_first = self.batch_first if batch_first is None else batch_first
        if episode_starts is not None and batch_first:
            episode_starts = episode_starts.transpose(0, 1)
        view = self.row_view()
        if view is not None and not self._is_silent():
            output, after = self._forward_padded(input, hx, episode_starts, batch_first, view)
            return output, self._as_given(after)
        x = input.transpose(0, 1) if batch_first else input
        output, hx = self._forward_plain(x, hx, episode_starts)
        return output.transpose(0, 1) if batch_first else output, hx

    def _forward_plain(self, x: th.Tensor, hx: State | None, starts: th.Tensor | None) -> tuple[th.Tensor, State]:
        """Run nn.LSTM on (T, N, ...), however the layer wants its input."""

        def run(x: th.Tensor, hx: State | None) -> tuple[th.Tensor, State]:
            output, after = nn.LSTM.forward(self, x.transpose(0, 1) if self.batch_first else x, hx)
            return output.transpose(0, 1) if self.batch_first else output, after

        if starts is None or not bool(starts.any()):
            return run(x, hx)
        hx, outputs = hx or self._as_given(self._zero_state(x, x.shape[1])), []
        for x_t, kept in zip(x, (1.0 - starts.to(x.dtype)).unsqueeze(2), strict=True):
            output, hx = run(x_t.unsqueeze(0), (kept * hx[0], kept * hx[1]))
            outputs.append(output)
        return th.cat(outputs), hx

    def _run(
        self,
        x: th.Tensor,
        before: States,
        from_input: Projection,
        from_hidden: Projection,
        steps: Steps,
        kept: Sequence[th.Tensor] | None,
    ) -> tuple[list[th.Tensor], States]:
        # The bias of the hidden states goes in with the inputs, for all steps at once.
        gates = steps.split(from_input.whole(x, from_hidden.bias))
        h, c = before
        return functional.lstm(gates, (h, c), from_hidden.step, kept)

    def _as_tuple(self, hx: Any) -> States:
        return tuple(hx)

    def _as_given(self, states: States) -> State:
        h, c = states
        return h, c


def _check_episodes(input: th.Tensor, starts: th.Tensor | None) -> None:
    if not isinstance(input, th.Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}; pad packed sequences first, or call forward.")
    if input.dim() != 3 or (starts is not None and starts.shape != input.shape[:2]):
        came = "" if starts is None else f" and episode_starts of shape {tuple(starts.shape)}"
        raise ValueError(
            "input must have 3 dimensions, the first two of which are those of episode_starts; got an input of shape "
            f"{tuple(input.shape)}{came}."
        )
