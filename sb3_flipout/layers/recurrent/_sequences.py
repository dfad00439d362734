"""Sequences that a recurrent layer runs over, and products with the weights of one of its projections, rows told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch as th
from torch import nn
from typing_extensions import override

from sb3_flipout.layers import functional
from sb3_flipout.layers.block import Pair

linear = nn.functional.linear


def check_rows(layer: str, rows: int, sequences: int, elements: int, given: str) -> None:
    """
    Refuse noise that is neither held over the sequences nor given for each of their steps.

    :param layer: Name of the layer
    :param rows: Rows that have noise
    :param sequences: Number of sequences
    :param elements: Their steps, all together
    :param given: What was given, in words
    :raises ValueError: If neither fits
    """
    if rows not in (sequences, elements):
        raise ValueError(
            f"{layer} got {given} and keys for {rows} rows; give one key per sequence ({sequences}), held over its "
            f"steps, or one per sequence and step ({elements})."
        )


class Steps(Protocol):
    """Where the steps of sequences lie. What rows have comes per sequence, held over its steps, or per step."""

    def split(self, x: th.Tensor) -> Sequence[th.Tensor]:
        """Take what lies like the input apart: (N, ...) for each step, N the sequences that have it."""

    def join(self, steps: Sequence[th.Tensor]) -> th.Tensor:
        """Undo `split`."""

    def whole(self, rows: th.Tensor) -> th.Tensor:
        """Spread what rows have over all steps at once, to broadcast against what lies like the input."""

    def each(self, rows: th.Tensor) -> Sequence[th.Tensor]:
        """Spread what rows have over single steps, without a copy."""


class Padded(Steps):
    """Sequences of one length T, as (T, N, ...)."""

    def __init__(self, layer: str, steps: int, sequences: int, rows: int, batch_first: bool) -> None:
        check_rows(layer, rows, sequences, steps * sequences, f"{sequences} sequences of {steps} steps")
        self.steps, self.sequences, self.held, self.batch_first = steps, sequences, rows == sequences, batch_first

    @override
    def split(self, x: th.Tensor) -> Sequence[th.Tensor]:
        return x.unbind(0)

    @override
    def join(self, steps: Sequence[th.Tensor]) -> th.Tensor:
        return th.stack(list(steps))

    @override
    def whole(self, rows: th.Tensor) -> th.Tensor:
        if self.held:
            return rows
        if self.batch_first:
            return rows.view(self.sequences, self.steps, *rows.shape[1:]).transpose(0, 1)
        return rows.view(self.steps, self.sequences, *rows.shape[1:])

    @override
    def each(self, rows: th.Tensor) -> Sequence[th.Tensor]:
        return [rows] * self.steps if self.held else self.whole(rows).unbind(0)


class Packed(Steps):
    """Sequences of several lengths, one after the other step by step, as (elements, ...); the longest come first."""

    def __init__(self, layer: str, sizes: Sequence[int], order: th.Tensor | None, rows: int) -> None:
        check_rows(layer, rows, sizes[0], sum(sizes), f"{sizes[0]} packed sequences of {sum(sizes)} steps in all")
        self.sizes, self.held, self.order = list(sizes), rows == sizes[0], order

    @override
    def split(self, x: th.Tensor) -> Sequence[th.Tensor]:
        return x.split(self.sizes)  # type: ignore[no-untyped-call]

    @override
    def join(self, steps: Sequence[th.Tensor]) -> th.Tensor:
        return th.cat(list(steps))

    @override
    def whole(self, rows: th.Tensor) -> th.Tensor:
        return self.join(self.each(rows)) if self.held else rows

    @override
    def each(self, rows: th.Tensor) -> Sequence[th.Tensor]:
        if not self.held:
            return self.split(rows)
        # Keys come in the order in which the caller packed the sequences, as initial states do.
        rows = rows if self.order is None else rows.index_select(0, self.order)
        return [rows[:size] for size in self.sizes]


class Projection:
    """One weight of a recurrent layer without noise: from inputs, or from hidden states, to the gates."""

    def __init__(self, mean: Pair) -> None:
        self.weight, self.bias = mean

    def whole(self, x: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        """Apply to the inputs of all steps at once, and add the bias of the other weight."""
        return linear(x, self.weight, self._with(bias))

    def step(self, gates: th.Tensor, h: th.Tensor, t: int) -> th.Tensor:
        """Apply to the hidden states of one step, without the mean bias, and add to the gates."""
        return th.addmm(gates, h, self.weight.t())

    def alone(self, h: th.Tensor, t: int) -> th.Tensor:
        """Apply to the hidden states of one step, with the mean bias."""
        bias = h.new_zeros(()) if self.bias is None else self.bias
        return self.step(bias.expand(len(h), len(self.weight)), h, t)

    def _with(self, bias: th.Tensor | None) -> th.Tensor | None:
        return bias if self.bias is None else self.bias if bias is None else self.bias + bias


class PerturbedProjection(Projection):
    """With factors s and r per row; without s all rows share one draw, and r is their noise scale."""

    def __init__(self, mean: Pair, deltas: Pair, s: th.Tensor | None, r: th.Tensor, steps: Steps) -> None:
        super().__init__(mean)
        self.deltas, self.steps = deltas, steps
        self.s, self.r = s, r
        self._s = None if s is None else steps.each(s)
        self._r = steps.each(r)

    @override
    def whole(self, x: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        mean, r = (self.weight, self._with(bias)), self.steps.whole(self.r)
        if self.s is None:
            return functional.shared(linear, x, mean, self.deltas, r)
        return functional.flipout(linear, x, mean, self.deltas, self.steps.whole(self.s), r)

    @override
    def step(self, gates: th.Tensor, h: th.Tensor, t: int) -> th.Tensor:
        signed = h if self._s is None else h * self._s[t]
        return th.addcmul(super().step(gates, h, t), linear(signed, *self.deltas), self._r[t])


class RowProjection(Projection):
    """With weights of each row's own: one matrix product per row and step, the slow reference."""

    def __init__(self, weights: Pair, steps: Steps) -> None:
        super().__init__((weights[0], None))  # its bias is not one for all rows, so none is added beforehand
        self.steps = steps
        self._weights = steps.each(weights[0])
        self._biases = None if weights[1] is None else steps.each(weights[1])

    @override
    def whole(self, x: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        assert bias is None, "the other weight of the layer is drawn per row too"
        return self.steps.join([self._apply(x_t, t) for t, x_t in enumerate(self.steps.split(x))])

    @override
    def step(self, gates: th.Tensor, h: th.Tensor, t: int) -> th.Tensor:
        return gates + self._apply(h, t)

    @override
    def alone(self, h: th.Tensor, t: int) -> th.Tensor:
        return self._apply(h, t)

    def _apply(self, x: th.Tensor, t: int) -> th.Tensor:
        return functional.linear_per_row(x, self._weights[t], None if self._biases is None else self._biases[t])
