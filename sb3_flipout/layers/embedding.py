"""Perturbed layers whose inputs are indices, and whose matrix products are look-ups: the row of a batch sees its own table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch as th
from torch import nn
from torch.nn.functional import embedding
from typing_extensions import Unpack

from sb3_flipout.layers import functional
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.block import Block, Pair
from sb3_flipout.layers.config import NoiseKwargs, layer_noise
from sb3_flipout.layers.functional import each_its_own
from sb3_flipout.layers.row_layout import FIRST
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
        if view.is_once(input) and self.row_layout == FIRST:
            if view.of_keys and view.noise.rows_per_key > 1:
                return self._by_key(super().forward(input), input, view)
            return view.noise.for_rows(super().forward(input)) + self._noise(input, view, view.noise.for_rows)
        if not input.dim() or not self.row_layout.fits(input.shape[0], len(view.noise)):
            raise ValueError(
                f"FlipoutEmbedding got indices of shape {tuple(input.shape)} and keys for {len(view.noise)} rows; the first "
                "dimension must be the rows of the batch. If the network folds others into it, leave the module out with "
                "skip=."
            )
        return super().forward(input) + self._noise(input, view)

    def _noise(self, given: th.Tensor, view: RowView, for_rows: Callable[[th.Tensor], th.Tensor] = each_its_own) -> th.Tensor:
        """What each row's noise adds to the entries, shape (N, ..., D). What is looked up is looked up once for each input."""
        index = for_rows(given)
        keys = self._of_entries(view.noise.keys, index)
        scale = self._of_entries(view.noise.scale.to(self.weight.dtype), index)[..., None]
        if view.of_keys:
            _, over_outputs = view.vectors()
            r = self.row_layout.spread(over_outputs.to(self.weight.dtype), len(index))
            s = factors_at(keys, index, self.noise_index or 0, 0, self.noise_config.spec.factor, self.weight.dtype)
            r = r.view(len(index), *[1] * (index.dim() - 1), self.embedding_dim)
            found, delta_bias = self._looked_up(given)
            noise = for_rows(found) * s[..., None] * r
            noise = noise if delta_bias is None else noise + delta_bias * r
        elif self.noise_config.noise_sharing == "shared":
            found, delta_bias = self._looked_up(given)
            found = for_rows(found)
            noise = scale * (found if delta_bias is None else found + delta_bias)
        else:  # the slow reference: every row draws its own table
            tables, biases = self.row_weights(view.noise.keys, view.noise.scale)
            rows = self._of_entries(th.arange(len(view.noise), device=index.device), index)
            noise = (tables - self.weight)[rows, index]
            noise = noise if biases is None else noise + (biases - self._mean_bias())[rows]
        return noise

    def _by_key(self, found: th.Tensor, index: th.Tensor, view: RowView) -> th.Tensor:
        """Entries of each key's rows, which all have the same indices: what does not depend on the key is done once."""
        delta, delta_bias = self._looked_up(index)
        r = view.of_keys[1].to(self.weight.dtype)
        r = r.view(len(r), *[1] * index.dim(), self.embedding_dim)
        keys = view.noise.keys[:: view.noise.rows_per_key]
        index_of_keys = index.expand(len(keys), *index.shape)
        keys = keys.view(-1, *[1] * index.dim()).expand(index_of_keys.shape)
        s = factors_at(keys, index_of_keys, self.noise_index or 0, 0, self.noise_config.spec.factor, self.weight.dtype)
        found = found if delta_bias is None else found + delta_bias * r
        return th.addcmul(found, delta * r, s[..., None]).flatten(0, 1)

    def _looked_up(self, index: th.Tensor) -> Pair:
        """
        The base perturbation of the entries that are looked up, shape (N, ..., D), and of the bias. Of a table of more entries
        than that, the others are not computed: of ten thousand, they would be a tenth of a gradient step.
        """
        block, spec = self.blocks[0], self.noise_config.spec
        pruned = any(name in self._buffers for name in (f"{block.weight}_mask", f"{block.bias}_mask"))
        if index.numel() >= self.num_embeddings or self.padding_idx is not None or pruned:
            delta, delta_bias = self.deltas()
            return delta[index], delta_bias
        base, bias_base = self.base_of(block)
        parts = (getattr(self, block.weight), getattr(self, block.weight_sigma), base)
        mean, sigma, base = (part if part is None or part.dim() < 2 else embedding(index, part) for part in parts)
        assert mean is not None, "a table has entries"
        return functional.delta(mean, sigma, base, spec.relative), self._bias_delta(block, bias_base)

    def _mean_bias(self) -> th.Tensor:
        bias: th.Tensor = self.blocks[0].means(self)[1]  # type: ignore[assignment]
        return bias

    def deltas(
        self, weight_eps: th.Tensor | None = None, bias_eps: th.Tensor | None = None, block: Block | None = None
    ) -> Pair:
        """
        Compute the base perturbation; that of the entry of ``padding_idx`` is 0.

        :param weight_eps: Draw to use instead of the base
        :param bias_eps: The same for the bias, where there is one
        :param block: Which weight; there is one
        :return: Perturbation of the table, and of the bias where there is one
        """
        delta, delta_bias = super().deltas(weight_eps, bias_eps, block)
        if self.padding_idx is None:
            return delta, delta_bias
        kept = th.ones_like(self.weight[:, :1])
        kept[self.padding_idx] = 0
        return delta * kept, delta_bias

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

    def _outer(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        return s[:, :, None] * r[:, None, :]

    def _outer_sum(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        return s.T @ r

    def fan_in(self, block: Block) -> int:
        """
        Count the inputs that one output adds up: a single one.

        :param block: Which weight
        :return: 1
        """
        return 1


class OneHotLinear(nn.Embedding):
    """
    ``nn.Linear`` on one-hot inputs, given as indices: the same function, initialised alike, by look-up.

    With ten thousand inputs a matrix product of a batch costs tens of milliseconds, and a look-up nothing.

    :param in_features: Number of values that an input can have
    :param out_features: Size of each output
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bias = nn.Parameter(th.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases anew, as ``nn.Linear`` does."""
        bound = 1 / math.sqrt(self.num_embeddings)
        nn.init.uniform_(self.weight, -bound, bound)
        if hasattr(self, "bias"):  # not yet, when the constructor of nn.Embedding asks
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """
        Refuse: there is a bias to be given, too.

        :param args: Not used
        :param kwargs: Not used
        :raises TypeError: Always
        """
        raise TypeError("OneHotLinear cannot be made from a table alone; make one, and copy weight and bias into it.")

    def forward(self, input: th.Tensor) -> th.Tensor:
        """
        Apply the layer.

        :param input: Indices, shape (N, ...)
        :return: Outputs, shape (N, ..., out_features)
        """
        return super().forward(input) + self.bias


class FlipoutOneHotLinear(FlipoutEmbedding, OneHotLinear):
    """
    :class:`OneHotLinear` whose every row can see its own weights: what :class:`FlipoutLinear` does on one-hot inputs.

    :param in_features: Number of values that an input can have
    :param out_features: Size of each output
    :param noise: ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :raises TypeError: If a keyword is no noise setting, or a value has a wrong type
    :raises ValueError: If a noise setting is out of range or unfit
    """

    PLAIN = OneHotLinear  # type: ignore[assignment]
    blocks = (Block(),)

    def __init__(self, in_features: int, out_features: int, **noise: Unpack[NoiseKwargs]) -> None:
        config = layer_noise(noise)
        OneHotLinear.__init__(self, in_features, out_features)
        self.init_noise(config)

    def fan_in(self, block: Block) -> int:
        """
        Count the inputs of the linear layer that it is.

        :param block: Which weight
        :return: Number of inputs
        """
        return self.num_embeddings
