"""The perturbed LSTM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from sb3_flipout.layers import functional
from sb3_flipout.layers._sequences import Packed, Padded, PerturbedProjection, Projection, RowProjection, Steps
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.block import Block
from sb3_flipout.layers.config import layer_noise, one_of

State = tuple[th.Tensor, th.Tensor]


class FlipoutLSTM(FlipoutLayer, nn.LSTM):
    """
    ``nn.LSTM`` whose every row can see its own perturbed weights, input-to-hidden and hidden-to-hidden.

    Noise comes with one key per sequence, which is held over its steps, or with one key per sequence and step, in the order
    of the input's first two dimensions flattened (of its packed elements, where it is packed). Where a key changes within a
    sequence, the weights change from that step on and the hidden state is carried over. With one step both are the same; if
    all packed sequences have one step, keys are in the order of the sequences.

    Without active noise, and with sigma frozen at 0, it runs ``nn.LSTM``'s own code. Dropout between layers draws from
    torch's generator in training mode as in ``nn.LSTM``.

    :param input_size: Size of each input
    :param hidden_size: Size of the hidden state
    :param num_layers: Number of LSTM layers, each fed by the one before
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
    :raises TypeError: If a keyword is no noise setting
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
        **noise: Any,
    ) -> None:
        config = layer_noise(noise)
        one_of("noise_on", noise_on, self.NOISE_ON)
        _refuse(bidirectional, proj_size)
        nn.LSTM.__init__(
            self, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        )
        self.init_noise(config, noise_on=noise_on)

    @classmethod
    def check_plain(cls, plain: nn.Module) -> None:
        """
        Refuse an ``nn.LSTM`` with options that cannot be served.

        :param plain: Layer to be converted
        :raises ValueError: If it is bidirectional or has projections
        """
        assert isinstance(plain, nn.LSTM), "the table pairs them"
        _refuse(plain.bidirectional, plain.proj_size)

    def reset_parameters(self) -> None:
        """Draw the mean weights and biases anew, as ``nn.LSTM`` does; sigma stays."""
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

    def __getstate__(self) -> dict[str, Any]:
        """
        Give what copies and pickles keep: base draws of their own, and none of ``nn.LSTM``'s weak references.

        :return: Attributes
        """
        state: dict[str, Any] = nn.LSTM.__getstate__(self)  # type: ignore[no-untyped-call]
        return {**state, "_buffers": super().__getstate__()["_buffers"]}

    # ---- forward ------------------------------------------------------------------------------------------------

    # torch.compile does not look into any nn.LSTM; told so, it leaves this one out whole, and compiles what is around it.
    @th.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: Any, hx: State | None = None) -> tuple[Any, State]:
        """
        Apply the layer: mean weights, or each row's own while noise is active.

        :param input: Inputs, shape (T, N, input_size), (N, T, input_size) with ``batch_first``, (T, input_size) for a single
            sequence, or packed
        :param hx: Hidden and cell state before the first step, each (num_layers, N, hidden_size); ``None`` for zeros
        :return: Outputs, lying as the inputs, and the states after the last step
        :raises ValueError: If noise is active for another number of rows
        """
        if not self._is_noisy():
            found: tuple[Any, State] = super().forward(input, hx)
            return found
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() != 2:
            return self._forward_padded(input, hx, None, self.batch_first)
        hx = None if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        output, (h, c) = self._forward_padded(input.unsqueeze(1), hx, None, False)
        return output.squeeze(1), (h.squeeze(1), c.squeeze(1))

    @th.compiler.disable  # type: ignore[untyped-decorator]
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
        if self._is_noisy():
            return self._forward_padded(input, hx, episode_starts, batch_first)
        x = input.transpose(0, 1) if batch_first else input
        output, hx = self._forward_plain(x, hx, episode_starts)
        return output.transpose(0, 1) if batch_first else output, hx

    def _is_noisy(self) -> bool:
        """
        Whether noise is active, and not silent because sigma is frozen at 0.

        Then ``nn.LSTM``'s fused operations are asked for: they round in another order than a loop, so nothing else is bitwise
        equal to stock. Sigma that is learned has a gradient at 0 too.
        """
        if self._active is None:
            return False
        sigmas = [sigma for block in self.blocks for sigma in block.sigmas(self) if sigma is not None]
        frozen = bool(sigmas) and not any(sigma.requires_grad for sigma in sigmas)
        return not frozen or any(bool(sigma.flatten()[0]) or bool(sigma.any()) for sigma in sigmas)

    def _forward_plain(self, x: th.Tensor, hx: State | None, starts: th.Tensor | None) -> tuple[th.Tensor, State]:
        """Run nn.LSTM on (T, N, ...), however the layer wants its input."""

        def run(x: th.Tensor, hx: State | None) -> tuple[th.Tensor, State]:
            output, after = nn.LSTM.forward(self, x.transpose(0, 1) if self.batch_first else x, hx)
            return output.transpose(0, 1) if self.batch_first else output, after

        if starts is None or not bool(starts.any()):
            return run(x, hx)
        hx, outputs = hx or self._zero_state(x, x.shape[1]), []
        for x_t, kept in zip(x, (1.0 - starts.to(x.dtype)).unsqueeze(2), strict=True):
            output, hx = run(x_t.unsqueeze(0), (kept * hx[0], kept * hx[1]))
            outputs.append(output)
        return th.cat(outputs), hx

    def _zero_state(self, x: th.Tensor, sequences: int) -> State:
        zeros = x.new_zeros(self.num_layers, sequences, self.hidden_size)
        return zeros, zeros

    # ---- under noise --------------------------------------------------------------------------------------------

    def _forward_padded(
        self, input: th.Tensor, hx: State | None, starts: th.Tensor | None, batch_first: bool
    ) -> tuple[th.Tensor, State]:
        assert self._active is not None, "forward asks whether noise is active"
        if input.dim() != 3:
            raise ValueError(f"input must have 2 or 3 dimensions, got shape {tuple(input.shape)}.")
        x = input.transpose(0, 1) if batch_first else input
        hx = self._zero_state(x, x.shape[1]) if hx is None else hx
        self.check_forward_args(x.transpose(0, 1) if self.batch_first else x, hx, None)
        steps = Padded(x.shape[0], x.shape[1], len(self._active[0]), batch_first)
        kept = None if starts is None else (1.0 - starts.to(x.dtype)).unsqueeze(2).unbind(0)
        output, after = self._layers(x, hx, steps, kept)
        return output.transpose(0, 1) if batch_first else output, after

    def _forward_packed(self, input: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
        assert self._active is not None, "forward asks whether noise is active"
        x, sizes, order, back = input
        hx = self._zero_state(x, int(sizes[0])) if hx is None else self.permute_hidden(hx, order)
        self.check_forward_args(x, hx, sizes)
        output, after = self._layers(x, hx, Packed(sizes.tolist(), order, len(self._active[0])), None)
        return PackedSequence(output, sizes, order, back), self.permute_hidden(after, back)

    def _layers(self, x: th.Tensor, hx: State, steps: Steps, kept: Sequence[th.Tensor] | None) -> tuple[th.Tensor, State]:
        """Run one layer after the other; `kept` is 0 where a row's state is dropped before the step."""
        hidden, cells = [], []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = nn.functional.dropout(x, self.dropout)
            from_input, from_hidden = (self._projection(f"weight_{kind}_l{layer}", steps) for kind in ("ih", "hh"))
            gates = steps.split(from_input.whole(x, from_hidden.bias))
            outputs, (h, c) = functional.lstm(gates, (hx[0][layer], hx[1][layer]), from_hidden.step, kept)
            x = steps.join(outputs)
            hidden.append(h)
            cells.append(c)
        return x, (th.stack(hidden), th.stack(cells))

    def _projection(self, weight: str, steps: Steps) -> Projection:
        """Give a weight as the rows see it under the active noise."""
        assert self._active is not None, "forward asks whether noise is active"
        noise, vectors = self._active
        block = next(block for block in (*self.blocks, *self.quiet_blocks) if block.weight == weight)
        mean = block.means(self)
        if block in self.quiet_blocks:
            return Projection(mean)
        if vectors:
            s, r = vectors[2 * block.number], vectors[2 * block.number + 1]
            return PerturbedProjection(mean, self.deltas(block=block), s, r, steps)
        scale = noise.scale.to(mean[0].dtype)
        if self.noise_config.noise_sharing == "shared":
            return PerturbedProjection(mean, self.deltas(block=block), None, scale[:, None], steps)
        return RowProjection(self.row_weights(noise.keys, scale, block), steps)


def _check_episodes(input: th.Tensor, starts: th.Tensor | None) -> None:
    if not isinstance(input, th.Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}; pad packed sequences first, or call forward.")
    if input.dim() != 3 or (starts is not None and starts.shape != input.shape[:2]):
        came = "" if starts is None else f" and episode_starts of shape {tuple(starts.shape)}"
        raise ValueError(
            "input must have 3 dimensions, the first two of which are those of episode_starts; got an input of shape "
            f"{tuple(input.shape)}{came}."
        )


def _refuse(bidirectional: bool, proj_size: int) -> None:
    for name, value, plain in (("bidirectional", bidirectional, False), ("proj_size", proj_size, 0)):
        if value:
            raise ValueError(
                f"{name}={value} cannot be served by FlipoutLSTM; use {name}={plain}, or keep this nn.LSTM plain with "
                'perturb(module, layers="linear").'
            )
