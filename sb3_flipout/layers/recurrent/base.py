"""What the perturbed recurrent layers share: which weights, where rows lie, and the pass under noise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Unpack

from sb3_flipout.checks import check_choice
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.block import Block
from sb3_flipout.layers.config import NoiseKwargs, layer_noise
from sb3_flipout.layers.recurrent._sequences import (
    Packed,
    Padded,
    PerturbedProjection,
    Projection,
    RowProjection,
    Steps,
)
from sb3_flipout.layers.row_view import RowView
from sb3_flipout.noise.compiling import eager

States = tuple[th.Tensor, ...]  # hidden state, and what else there is: each (num_layers, N, hidden_size)


class RecurrentLayer(FlipoutLayer, nn.RNNBase):
    """
    Mixin of ``nn.LSTM`` and ``nn.GRU`` under noise, which perturbs input-to-hidden and hidden-to-hidden weights.

    :param input_size: Size of each input
    :param hidden_size: Size of the hidden state
    :param num_layers: Number of recurrent layers, each fed by the one before
    :param bias: Whether there are biases; they are perturbed too, beside their weights
    :param batch_first: Whether inputs and outputs lie as (N, T, ...) and not as (T, N, ...)
    :param dropout: Probability of dropout between layers, in training mode
    :param bidirectional: Must be False
    :param proj_size: Must be 0
    :param device: Device of the parameters
    :param dtype: Floating-point type of the parameters
    :param noise_on: ``"all"`` weights, or ``"hidden"`` for the hidden-to-hidden ones alone (Wen et al. 2018, section 5.1)
    :param noise: ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :raises TypeError: If a keyword is no noise setting, or a value has a wrong type
    :raises ValueError: If a noise setting is out of range or unfit, or ``bidirectional`` or ``proj_size`` is set
    """

    NOISE_ON = ("all", "hidden")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: th.device | str | None = None,
        dtype: th.dtype | None = None,
        noise_on: str = "all",
        **noise: Unpack[NoiseKwargs],
    ) -> None:
        config = layer_noise(noise)
        check_choice("noise_on", noise_on, self.NOISE_ON)
        reason = _why_not(bidirectional, proj_size)
        if reason is not None:
            raise ValueError(f"{type(self).__name__} {reason}; use bidirectional=False and proj_size=0.")
        plain: Any = self.PLAIN
        plain.__init__(self, input_size, hidden_size, num_layers, bias, batch_first, dropout, device=device, dtype=dtype)
        self.init_noise(config, noise_on=noise_on)

    @classmethod
    def why_not(cls, plain: nn.Module) -> str | None:
        """
        Say why a recurrent layer cannot be served.

        :param plain: Layer to be converted
        :return: The reason; ``None`` if it can be served
        """
        assert isinstance(plain, nn.RNNBase), "the table pairs them"
        return _why_not(plain.bidirectional, plain.proj_size)

    def reset_parameters(self) -> None:
        """Draw the mean weights and biases anew, as the torch.nn class does; sigma stays."""
        bound = self.hidden_size**-0.5
        for name in self._flat_weights_names:
            nn.init.uniform_(getattr(self, name), -bound, bound)

    def _choose_blocks(self, noise_on: str) -> None:
        self.noise_on = noise_on
        kinds = ("ih", "hh") if noise_on == "all" else ("hh",)
        names = [(f"{kind}_l{layer}", kind in kinds) for layer in range(self.num_layers) for kind in ("ih", "hh")]
        noisy = [name for name, perturbed in names if perturbed]
        self.blocks = tuple(self._block(name, number) for number, name in enumerate(noisy))
        self.quiet_blocks = tuple(self._block(name) for name, perturbed in names if not perturbed)

    def _block(self, name: str, number: int = 0) -> Block:
        return Block(f"weight_{name}", f"bias_{name}" if self.bias else None, number)

    # ---- forward ------------------------------------------------------------------------------------------------

    # torch.compile does not look into recurrent layers; told so, it leaves this one out whole, and compiles what is around it.
    @eager
    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """
        Apply the layer: mean weights, or each row's own while noise is active.

        :param input: Inputs, shape (T, N, input_size), (N, T, input_size) with ``batch_first``, (T, input_size) for a single
            sequence, or packed
        :param hx: State before the first step, as of the torch.nn class; ``None`` for zeros
        :return: Outputs, lying as the inputs, and the state after the last step
        :raises ValueError: If noise is active for another number of rows
        """
        view = self.row_view()
        if view is None or self._is_silent():
            found: tuple[Any, Any] = super().forward(input, hx)
            return found
        states = None if hx is None else self._as_tuple(hx)
        if isinstance(input, PackedSequence):
            packed, after = self._forward_packed(input, states, view)
            return packed, self._as_given(after)
        if input.dim() != 2:
            output, after = self._forward_padded(input, states, None, self.batch_first, view)
            return output, self._as_given(after)
        single = None if states is None else tuple(state.unsqueeze(1) for state in states)
        output, after = self._forward_padded(input.unsqueeze(1), single, None, False, view)
        return output.squeeze(1), self._as_given(tuple(state.squeeze(1) for state in after))

    def _zero_state(self, x: th.Tensor, sequences: int) -> States:
        return tuple(x.new_zeros(self.num_layers, sequences, self.hidden_size) for _ in range(self.STATES))

    def _forward_padded(
        self, input: th.Tensor, states: States | None, starts: th.Tensor | None, batch_first: bool, view: RowView
    ) -> tuple[th.Tensor, States]:
        if input.dim() != 3:
            raise ValueError(f"input must have 2 or 3 dimensions, got shape {tuple(input.shape)}.")
        x = input.transpose(0, 1) if batch_first else input
        states = self._zero_state(x, x.shape[1]) if states is None else states
        self.check_forward_args(x.transpose(0, 1) if self.batch_first else x, self._as_given(states), None)
        view = self._folded(view, x.shape[1])
        steps = Padded(type(self).__name__, x.shape[0], x.shape[1], len(view.noise), batch_first)
        kept = None if starts is None else (1.0 - starts.to(x.dtype)).unsqueeze(2).unbind(0)
        output, after = self._layers(x, states, steps, kept, view)
        return output.transpose(0, 1) if batch_first else output, after

    def _forward_packed(self, input: PackedSequence, states: States | None, view: RowView) -> tuple[PackedSequence, States]:
        x, sizes, order, back = input
        if states is None:
            states = self._zero_state(x, int(sizes[0]))
        elif order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        self.check_forward_args(x, self._as_given(states), sizes)
        steps = Packed(type(self).__name__, sizes.tolist(), order, len(view.noise))
        output, after = self._layers(x, states, steps, None, view)
        if back is not None:
            after = tuple(state.index_select(1, back) for state in after)
        return PackedSequence(output, sizes, order, back), after

    def _folded(self, view: RowView, sequences: int) -> RowView:
        """Repeat the noise of rows that have several sequences each."""
        layout = self.row_layout
        if layout.order == "plain" or not layout.fits(sequences, len(view.noise)):
            return view
        rows = layout.spread(th.arange(len(view.noise), device=view.noise.keys.device), sequences)
        of_rows = (view.noise.repeat_keys(vector).index_select(0, rows) for vector in view.of_keys)
        return RowView(view.noise[rows], tuple(of_rows), len(rows))

    def _layers(
        self, x: th.Tensor, states: States, steps: Steps, kept: Sequence[th.Tensor] | None, view: RowView
    ) -> tuple[th.Tensor, States]:
        """Run one layer after the other; `kept` is 0 where a row's state is dropped before the step."""
        after = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = nn.functional.dropout(x, self.dropout)
            from_input, from_hidden = (self._projection(f"weight_{kind}_l{layer}", steps, view) for kind in ("ih", "hh"))
            before = tuple(state[layer] for state in states)
            outputs, last = self._run(x, before, from_input, from_hidden, steps, kept)
            x = steps.join(outputs)
            after.append(last)
        return x, tuple(th.stack(of_layers) for of_layers in zip(*after, strict=True))

    def _projection(self, weight: str, steps: Steps, view: RowView) -> Projection:
        """One weight as the rows see it."""
        block = next(block for block in (*self.blocks, *self.quiet_blocks) if block.weight == weight)
        mean = block.means(self)
        if block in self.quiet_blocks:
            return Projection(mean)
        if view.of_keys:
            s, r = (vector.to(mean[0].dtype) for vector in view.vectors(block.number))
            return PerturbedProjection(mean, self.deltas(block=block), s, r, steps)
        scale = view.noise.scale.to(mean[0].dtype)
        if self.noise_config.noise_sharing == "shared":
            return PerturbedProjection(mean, self.deltas(block=block), None, scale[:, None], steps)
        return RowProjection(self.row_weights(view.noise.keys, scale, block), steps)

    # What a kind of layer has to say.
    STATES: int

    @abstractmethod
    def _run(
        self,
        x: th.Tensor,
        before: States,
        from_input: Projection,
        from_hidden: Projection,
        steps: Steps,
        kept: Sequence[th.Tensor] | None,
    ) -> tuple[list[th.Tensor], States]:
        """Run one layer: hidden states after each step, and the last state of all rows."""

    @abstractmethod
    def _as_tuple(self, hx: Any) -> States:
        """Take the state as the torch.nn class takes it."""

    @abstractmethod
    def _as_given(self, states: States) -> Any:
        """Hand the state out as the torch.nn class does."""


def _why_not(bidirectional: bool, proj_size: int) -> str | None:
    if bidirectional:
        return "cannot serve bidirectional=True"
    return f"cannot serve proj_size={proj_size}" if proj_size else None
