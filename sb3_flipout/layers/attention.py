"""The perturbed attention, and transformer layers whose fused path goes round their children."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_flipout.layers import functional
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.block import Block
from sb3_flipout.layers.config import NoiseKwargs, layer_noise
from sb3_flipout.layers.linear import FlipoutLinear
from sb3_flipout.layers.row_layout import RowLayout
from sb3_flipout.layers.row_view import RowView

_PACKED = (Block("in_proj_weight", "in_proj_bias"),)
# The three weights share one bias vector; it keeps its mean, since no single weight's noise goes with it.
_SEPARATE = (Block("q_proj_weight", None, 0), Block("k_proj_weight", None, 1), Block("v_proj_weight", None, 2))


class FlipoutMultiheadAttention(FlipoutLayer, nn.MultiheadAttention):
    """
    ``nn.MultiheadAttention`` whose every row can see its own perturbed projections: of queries, keys and values, and of
    outputs.

    A row is a sequence of the batch. The output projection is a :class:`~sb3_flipout.layers.FlipoutLinear` of its own, so its
    noise has sigma of its own. Without active noise it runs ``nn.MultiheadAttention``'s own code.

    :param embed_dim: Size of queries and outputs
    :param num_heads: Number of heads
    :param args: As of ``nn.MultiheadAttention``
    :param kwargs: The same by name, and ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :raises TypeError: If a keyword is no noise setting, or a value has a wrong type
    :raises ValueError: If a noise setting is out of range or unfit, or ``add_bias_kv`` or ``add_zero_attn`` is set
    """

    PLAIN = nn.MultiheadAttention

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, **kwargs: Any) -> None:
        noise: Any = {name: kwargs.pop(name) for name in NoiseKwargs.__annotations__ if name in kwargs}
        config = layer_noise(noise)
        nn.MultiheadAttention.__init__(self, embed_dim, num_heads, *args, **kwargs)
        reason = self.why_not(self)
        if reason is not None:
            raise ValueError(f"FlipoutMultiheadAttention {reason}")
        self.init_noise(config)
        self.out_proj.__class__ = FlipoutLinear  # type: ignore[assignment]
        self.out_proj.init_noise(config)  # type: ignore[operator]

    @classmethod
    def why_not(cls, plain: nn.Module) -> str | None:
        """
        Say why an attention cannot be served.

        :param plain: Layer to be converted
        :return: The reason; ``None`` if it can be served
        """
        assert isinstance(plain, nn.MultiheadAttention), "the table pairs them"
        if plain.bias_k is not None:
            return "cannot serve add_bias_kv=True"
        return "cannot serve add_zero_attn=True" if plain.add_zero_attn else None

    def _choose_blocks(self, noise_on: str) -> None:
        self.blocks = _PACKED if self._qkv_same_embed_dim else _SEPARATE

    def forward(
        self,
        query: th.Tensor,
        key: th.Tensor,
        value: th.Tensor,
        key_padding_mask: th.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: th.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Attend: with the mean projections, or with each row's own while noise is active.

        :param query: Queries, shape (N, L, E) with ``batch_first``, else (L, N, E)
        :param key: Keys, shape (N, S, E_k) or (S, N, E_k)
        :param value: Values, shape (N, S, E_v) or (S, N, E_v)
        :param key_padding_mask: Keys to ignore, shape (N, S); booleans, or numbers to be added
        :param need_weights: Whether the weights are asked for
        :param attn_mask: Pairs to ignore, shape (L, S) or (N * heads, L, S); booleans, or numbers to be added
        :param average_attn_weights: Whether weights are averaged over heads
        :param is_causal: A hint that ``attn_mask`` is causal
        :return: Outputs, lying as the queries, and weights, shape (N, L, S) or (N, heads, L, S)
        :raises ValueError: If noise is active for another number of rows, or inputs have no batch dimension
        """
        view = self.row_view()
        rows = self._rows(view)
        if rows is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        inputs = [x if self.batch_first else x.transpose(0, 1) for x in (query, key, value)]
        self._check_rows(inputs[0], rows)
        heads = [_heads_apart(projected, self.num_heads) for projected in self._projections(inputs, view)]
        mask = self._mask(key_padding_mask, attn_mask, heads[0])
        attended, weights = self._attend(heads, mask, need_weights, average_attn_weights)
        if isinstance(self.out_proj, FlipoutLayer):
            self.out_proj.row_layout = RowLayout(0, self.row_layout.order)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        return output if self.batch_first else output.transpose(0, 1), weights

    def _rows(self, view: RowView | None) -> int | None:
        """Rows that see noise in any projection: torch reads the weights of the last one, and never calls it."""
        if view is None and isinstance(self.out_proj, FlipoutLayer):
            view = self.out_proj.row_view()
        return None if view is None else len(view.noise)

    def _check_rows(self, x: th.Tensor, rows: int) -> None:
        if x.dim() != 3 or x.is_nested or not self.row_layout.fits(x.shape[0], rows):
            queries = "nested queries" if x.is_nested else f"queries of shape {tuple(x.shape)} (batch first)"
            raise ValueError(
                f"FlipoutMultiheadAttention got {queries} and keys for {rows} rows; it needs one sequence per row. If the "
                "network folds something else into the batch, leave the module out with skip=."
            )

    def _projections(self, inputs: list[th.Tensor], view: RowView | None) -> list[th.Tensor]:
        """Queries, keys and values of each row, each (N, L, E)."""
        e = self.embed_dim
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(e)  # type: ignore[no-untyped-call]
        if self._qkv_same_embed_dim:
            parts = [(self.blocks[0], slice(i * e, (i + 1) * e)) for i in range(3)]
        else:
            parts = [(block, slice(None)) for block in self.blocks]
        return [self._project(x, block, out, bias, view) for x, (block, out), bias in zip(inputs, parts, biases, strict=True)]

    def _project(self, x: th.Tensor, block: Block, out: slice, bias: th.Tensor | None, view: RowView | None) -> th.Tensor:
        """One projection of (N, L, in), by the output rows ``out`` of a block."""
        weight = block.means(self)[0][out]
        if view is None:
            return F.linear(x, weight, bias)
        size, spread = len(x), self.row_layout.spread
        scale = view.noise.scale.to(weight.dtype)
        if not view.of_keys and self.noise_config.noise_sharing != "shared":
            weights, row_bias = self.row_weights(spread(view.noise.keys, size), spread(scale, size), block)
            own_bias = bias.expand(size, -1) if row_bias is None and bias is not None else _part(row_bias, out)
            return functional.linear_per_row(x, weights[:, out], own_bias)
        deltas: Any = tuple(_part(delta, out, 0) for delta in self.deltas(block=block))
        if not view.of_keys:
            return functional.shared(F.linear, x, (weight, bias), deltas, spread(scale, size)[:, None, None])
        s, r = (spread(vector.to(weight.dtype), size)[:, None] for vector in view.vectors(block.number))
        return functional.flipout(F.linear, x, (weight, bias), deltas, s, r[..., out])

    def _mask(self, padding: th.Tensor | None, pairs: th.Tensor | None, queries: th.Tensor) -> th.Tensor | None:
        """Both masks as numbers to be added, broadcast against (N, heads, L, S)."""
        found = None
        if pairs is not None:
            found = _as_numbers(pairs, queries.dtype)
            found = found if found.dim() == 2 else found.view(len(queries), self.num_heads, *found.shape[1:])
        if padding is not None:
            ignored = _as_numbers(padding, queries.dtype)[:, None, None]
            found = ignored if found is None else found + ignored
        return found

    def _attend(
        self, heads: list[th.Tensor], mask: th.Tensor | None, need_weights: bool, averaged: bool
    ) -> tuple[th.Tensor, th.Tensor | None]:
        q, k, v = heads
        p = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, p), None
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        weights = F.dropout((scores if mask is None else scores + mask).softmax(3), p)
        return weights @ v, weights.mean(1) if averaged else weights


def _part(value: th.Tensor | None, out: slice, dim: int = 1) -> th.Tensor | None:
    if value is None or not value.dim():
        return value
    return value[out] if dim == 0 else value[:, out]


def _heads_apart(x: th.Tensor, heads: int) -> th.Tensor:
    """(N, L, E) -> (N, heads, L, E / heads)."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


def _as_numbers(mask: th.Tensor, dtype: th.dtype) -> th.Tensor:
    if mask.dtype != th.bool:
        return mask.to(dtype)
    return th.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


class ChildrenBypassed(nn.Module):
    """
    Mixin of transformer modules that have a fused path, in evaluation without gradients, which reads the weights of their
    children and never calls them: under noise they take the path that calls them.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """
        Apply the module.

        :param args: As of the torch.nn class
        :param kwargs: The same by name
        :return: What the torch.nn class gives
        """
        if not any(layer.row_view() is not None for layer in self.modules() if isinstance(layer, FlipoutLayer)):
            return super().forward(*args, **kwargs)
        with self._unfused():
            return super().forward(*args, **kwargs)

    @contextmanager
    def _unfused(self) -> Iterator[None]:
        """Say of this module, and not of the process, what keeps torch from its fused path."""
        name = "activation_relu_or_gelu" if isinstance(self, nn.TransformerEncoderLayer) else "use_nested_tensor"
        before = getattr(self, name)
        self.__dict__[name] = 0
        try:
            yield
        finally:
            self.__dict__[name] = before


class FlipoutTransformerEncoderLayer(ChildrenBypassed, nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` that calls its children while their noise is active."""


class FlipoutTransformerEncoder(ChildrenBypassed, nn.TransformerEncoder):
    """``nn.TransformerEncoder`` that makes no nested tensors while noise is active."""
