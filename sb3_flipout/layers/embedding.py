"""The perturbed embedding: the row of a batch sees its own table."""

from __future__ import annotations

from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.block import Block, Pair
from sb3_flipout.layers.config import NoiseKwargs, layer_noise
from sb3_flipout.layers.row_view import RowView
from sb3_flipout.noise.signs import LayerVectors, factors_at


class FlipoutEmbedding(FlipoutLayer, nn.Embedding):
    """
    ``nn.Embedding`` whose every row can see its own perturbed table: what a linear layer is on one-hot inputs.

    Row n looks up ``W[j] + c_n dW[j] s_n[j] r_n``. Of the factors over the many inputs only those that are looked up are
    hashed. The entry of ``padding_idx`` keeps its mean.

    :param num_embeddings: Size of the table
    :param embedding_dim: Size of each entry
    :param args: As of ``nn.Embedding``
    :param kwargs: The same by name, and ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :raises TypeError: If a keyword is no noise setting, or a value has a wrong type
    :raises ValueError: If a noise setting is out of range or unfit, or ``max_norm`` or ``sparse`` is set
    """

    PLAIN = nn.Embedding
    blocks = (Block("weight", None),)

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        noise: Any = {name: kwargs.pop(name) for name in NoiseKwargs.__annotations__ if name in kwargs}
        config = layer_noise(noise)
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, *args, **kwargs)
        reason = self.why_not(self)
        if reason is not None:
            raise ValueError(f"FlipoutEmbedding {reason}")
        self.init_noise(config)

    @classmethod
    def why_not(cls, plain: nn.Module) -> str | None:
        """
        Say why an embedding cannot be served.

        :param plain: Layer to be converted
        :return: The reason; ``None`` if it can be served
        """
        assert isinstance(plain, nn.Embedding), "the table pairs them"
        if plain.max_norm is not None:
            return "cannot serve max_norm, which rewrites the weights in each forward pass"
        return "cannot serve sparse=True, since sigma has dense gradients" if plain.sparse else None

    def forward(self, input: th.Tensor) -> th.Tensor:
        """
        Look entries up: in the mean table, or in each row's own while noise is active.

        :param input: Indices, shape (N, ...)
        :return: Entries, shape (N, ..., embedding_dim)
        :raises ValueError: If noise is active for another number of rows
        """
        view = self.row_view()
        if view is None:
            return super().forward(input)
        if not input.dim() or not self.row_layout.fits(input.shape[0], len(view.noise)):
            raise ValueError(
                f"FlipoutEmbedding got indices of shape {tuple(input.shape)} and keys for {len(view.noise)} rows; the first "
                "dimension must be the rows of the batch. If the network folds others into it, leave the module out with "
                "skip=."
            )
        return super().forward(input) + self._noise(input, view)

    def _noise(self, index: th.Tensor, view: RowView) -> th.Tensor:
        """What each row's noise adds to the entries, shape (N, ..., D)."""
        keys = self._of_entries(view.noise.keys, index)
        scale = self._of_entries(view.noise.scale.to(self.weight.dtype), index)[..., None]
        if view.vectors:
            r = self.row_layout.spread(view.vectors[1].to(self.weight.dtype), len(index))
            s = factors_at(keys, index, self.noise_index or 0, 0, self.noise_config.spec.factor, self.weight.dtype)
            noise = self.deltas()[0][index] * s[..., None] * r.view(len(index), *[1] * (index.dim() - 1), -1)
        elif self.noise_config.noise_sharing == "shared":
            noise = scale * self.deltas()[0][index]
        else:  # the slow reference: every row draws its own table
            tables = self.row_weights(view.noise.keys, view.noise.scale)[0] - self.weight
            rows = self._of_entries(th.arange(len(view.noise), device=index.device), index)
            noise = tables[rows, index]
        return noise

    def deltas(
        self, weight_eps: th.Tensor | None = None, bias_eps: th.Tensor | None = None, block: Block | None = None
    ) -> Pair:
        """
        Compute the base perturbation; that of the entry of ``padding_idx`` is 0.

        :param weight_eps: Draw to use instead of the base
        :param bias_eps: Not used: there is no bias
        :param block: Which weight; there is one
        :return: Perturbation of the table, and ``None``
        """
        delta, _ = super().deltas(weight_eps, bias_eps, block)
        if self.padding_idx is None:
            return delta, None
        kept = th.ones_like(self.weight[:, :1])
        kept[self.padding_idx] = 0
        return delta * kept, None

    def _of_entries(self, values: th.Tensor, index: th.Tensor) -> th.Tensor:
        """Repeat what rows have, shape (N,), for each of their indices."""
        spread = self.row_layout.spread(values, len(index))
        return spread.view(len(index), *[1] * (index.dim() - 1)).expand(index.shape)

    def vectors(self) -> LayerVectors:
        """
        Say which row factors are expanded beforehand: those over outputs; those over inputs are looked up one by one.

        :return: Number of the layer, law and lengths of its factor vectors
        """
        full = super().vectors()
        return LayerVectors(full.layer, full.kind, (0, self.embedding_dim) if full.sizes else (), full.scaled)

    def _sizes(self, block: Block) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _outer(self, r: th.Tensor, s: th.Tensor, block: Block) -> th.Tensor:
        return s[:, :, None] * r[:, None, :]

    def fan_in(self, block: Block) -> int:
        """
        Count the inputs that one output adds up: a single one.

        :param block: Which weight
        :return: 1
        """
        return 1
