"""What a perturbed layer's rows see, written down: perturbations, factors, and whole weights row by row.

Nothing here knows of networks, switches or draws that come and go: all is a function of the means, sigma, the base draws and
keys. It is what the fast passes of the layers are held to.
"""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers import functional
from sb3_flipout.layers.block import Block, MaybePair, Pair
from sb3_flipout.layers.config import LayerNoise
from sb3_flipout.noise.signs import LayerVectors, factors, salts
from sb3_flipout.noise.tables import FactorKind

_LARGEST_DRAW = 1 << 24  # numbers that are drawn at once where every row has its own matrix: 64 MiB


class PerturbedWeights(nn.Module, ABC):
    """Mixin of layers whose weights are means and perturbations."""

    noise_config: LayerNoise
    noise_index: int | None
    noise_scaled: bool = True  # whether the noise scale multiplies the layer's noise
    mean_is_zero: bool = False  # whether the noise is all there is, and stays so: then the product with the mean is not made
    blocks: tuple[Block, ...] = (Block(),)  # the perturbed ones
    quiet_blocks: tuple[Block, ...] = ()  # those that noise_on= leaves alone

    keeps_base: bool = False  # whether base draws are part of the state_dict: those of an ensemble are as much as weights
    _base_draws: dict[str, th.Tensor]

    def base_of(self, block: Block) -> MaybePair:
        """
        Look up the base draws of a weight and its bias.

        :param block: Which weight
        :return: Draws; ``None`` where the family has none
        """
        kept: Any = self._buffers if self.keeps_base else self._base_draws
        return kept.get(block.weight_base), kept.get(block.bias_base)

    @property
    def like(self) -> th.Tensor:
        """A mean weight, to tell the layer's floating-point type and device."""
        weight: th.Tensor = getattr(self, self.blocks[0].weight)
        return weight

    def means(self) -> list[th.Tensor]:
        """
        List the mean weights and biases that are perturbed.

        :return: The layer's own tensors, each weight before its bias
        """
        return [mean for block in self.blocks for mean in block.means(self) if mean is not None]

    def deltas(
        self, weight_eps: th.Tensor | None = None, bias_eps: th.Tensor | None = None, block: Block | None = None
    ) -> Pair:
        """
        Compute the base perturbation, which moves with sigma (and the means), so it is never stored.

        :param weight_eps: Draw to use instead of the base
        :param bias_eps: The same for the bias
        :param block: Which weight; ``None`` for the first
        :return: Perturbation of weight and bias, before row factors and noise scale
        """
        spec, block = self.noise_config.spec, block or self.blocks[0]
        weight, weight_sigma = getattr(self, block.weight), getattr(self, block.weight_sigma)
        weight_base, bias_base = self.base_of(block)
        delta_weight = functional.delta(weight, weight_sigma, weight_base if weight_eps is None else weight_eps, spec.relative)
        deltas = delta_weight, self._bias_delta(block, bias_base if bias_eps is None else bias_eps)
        return deltas if not self._buffers else self._unpruned(deltas, block)

    def _bias_delta(self, block: Block, eps: th.Tensor | None) -> th.Tensor | None:
        spec, bias = self.noise_config.spec, None if block.bias is None else getattr(self, block.bias)
        if bias is None or block.bias_sigma is None:
            return None
        sigma = getattr(self, block.weight_sigma if spec.sigma == "per_layer" else block.bias_sigma)
        return functional.delta(bias, sigma, eps, spec.relative)

    def _unpruned(self, deltas: Pair, block: Block) -> Pair:
        """Without noise where ``torch.nn.utils.prune`` has taken weights away: it keeps masks of them."""
        (weight, bias), masks = deltas, (self._buffers.get(f"{name}_mask") for name in (block.weight, block.bias))
        of_weight, of_bias = masks
        weight = weight if of_weight is None else weight * of_weight
        return weight, bias if bias is None or of_bias is None else bias * of_bias

    def vectors(self) -> LayerVectors:
        """
        Say which row factors the layer needs: none when one draw is shared, or when each row has its own.

        :return: Number of the layer, law and lengths of its factor vectors
        """
        blocks = self.blocks if self._by_factors() else ()
        sizes = tuple(size for block in blocks for size in self._sizes(block))
        return LayerVectors(self.noise_index or 0, self.noise_config.spec.factor, sizes, self.noise_scaled)

    def _by_factors(self) -> bool:
        """Whether factors tell rows apart: with a factorised family also where each row's noise is independent of others'."""
        sharing = self.noise_config.noise_sharing
        return sharing == "flipout" or (sharing == "independent" and self.noise_config.spec.row_draw is None)

    def row_weights(self, keys: th.Tensor, scale: th.Tensor, block: Block | None = None) -> Pair:
        """
        Materialise the weights that each row sees, in memory N times that of the layer.

        :param keys: Noise keys, shape (N,)
        :param scale: Noise scales, shape (N,)
        :param block: Which weight; ``None`` for the first
        :return: Weights, shape (N, O, ...), and biases, shape (N, O)
        """
        block = block or self.blocks[0]
        weight, bias = block.means(self)
        delta_weight, delta_bias = self._row_deltas(block, keys)
        c = scale.to(weight.dtype)
        weight = weight + c.view(-1, *[1] * weight.dim()) * delta_weight
        return weight, None if bias is None or delta_bias is None else bias + c[:, None] * delta_bias

    def _row_deltas(self, block: Block, keys: th.Tensor) -> Pair:
        if self.noise_config.noise_sharing == "shared":
            delta_weight, delta_bias = self.deltas(block=block)
            return delta_weight[None], None if delta_bias is None else delta_bias[None]
        if not self._by_factors():
            weight, bias = block.means(self)
            first = 2 * block.number + 2
            bias_eps = None if bias is None else self._row_draw(keys, first + 1, bias.shape)
            return self.deltas(self._row_draw(keys, first, weight.shape), bias_eps, block)
        delta_weight, delta_bias = self.deltas(block=block)
        s, r = self._factors(block, keys)
        return delta_weight * self._outer(r, s), None if delta_bias is None else delta_bias * r

    def summed_deltas(self, keys: th.Tensor, shares: th.Tensor, block: Block | None = None) -> Pair:
        """
        Add up what rows add to the mean weights at scale 1, each with a share: ``dW o (R^T diag(shares) S)``, one matrix
        product where factors tell the rows apart. What an evolution strategy estimates its gradient from.

        :param keys: Noise keys, shape (N,)
        :param shares: What each row is multiplied by, shape (N,)
        :param block: Which weight; ``None`` for the first
        :return: Sums for weight and bias, of their shapes
        """
        block = block or self.blocks[0]
        mean, mean_bias = block.means(self)
        shares = shares.to(mean.dtype)
        if self.noise_config.noise_sharing == "shared":
            weight, bias = self.deltas(block=block)
            return weight * shares.sum(), None if bias is None else bias * shares.sum()
        if self._by_factors():
            weight, bias = self.deltas(block=block)
            s, r = self._factors(block, keys)
            r = r * shares[:, None]
            return weight * self._outer_sum(r, s), None if bias is None else bias * r.sum(0)
        weight, bias = th.zeros_like(mean), None if mean_bias is None else th.zeros_like(mean_bias)
        rows = max(1, _LARGEST_DRAW // mean.numel())  # every row draws a whole matrix: not all of them at once
        for first in range(0, len(keys), rows):
            some, share = keys[first : first + rows], shares[first : first + rows]
            part, bias_part = self._row_deltas(block, some)
            weight = weight + th.tensordot(share, part, dims=1)
            bias = None if bias is None or bias_part is None else bias + share @ bias_part
        return weight, bias

    def _outer_sum(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        """The sum of :meth:`_outer` over rows."""
        return r.T @ s

    def variances(self, block: Block | None = None) -> Pair:
        """
        Compute the variance of each weight's perturbation at scale 1, over draws of base and factors.

        :param block: Which weight; ``None`` for the first
        :return: Variances of weight and bias, of their shapes
        """
        block, spec = block or self.blocks[0], self.noise_config.spec
        sigma, bias_sigma = (getattr(self, name) if name else None for name in (block.weight_sigma, block.bias_sigma))
        found: list[th.Tensor | None] = []
        pair = (sigma, sigma if spec.sigma == "per_layer" else bias_sigma)
        for mean, own, factors_in in zip(block.means(self), pair, (2, 1), strict=True):
            if mean is None:
                found.append(None)
                continue
            variance = th.ones_like(mean) if own is None else own.square().expand_as(mean)
            variance = variance * mean.square() if spec.relative else variance
            found.append(variance * spec.factor_power**factors_in)
        weight, bias = found
        assert weight is not None, "a block has a weight"
        return weight, bias

    def _factors(self, block: Block, keys: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Factors over inputs, shape (N, in), and over outputs, shape (N, out), without noise scale."""
        (size_in, size_out), kind = self._sizes(block), self.noise_config.spec.factor
        return self._hash(keys, 2 * block.number, size_in, kind), self._hash(keys, 2 * block.number + 1, size_out, kind)

    def _hash(self, keys: th.Tensor, vector: int, n: int, kind: FactorKind) -> th.Tensor:
        word_salts = salts(self.noise_index or 0, vector, n, kind).to(keys.device)
        return factors(keys, word_salts, kind, self.like.dtype)[:, :n]

    def _row_draw(self, keys: th.Tensor, vector: int, shape: th.Size) -> th.Tensor:
        kind = self.noise_config.spec.row_draw
        assert kind is not None, "families without a draw per row are told apart by factors"
        return self._hash(keys, vector, shape.numel(), kind).view(len(keys), *shape)

    # What a layer says that is no matrix product: where inputs and outputs lie in its weights.

    def fan_in(self, block: Block) -> int:
        """
        Count the inputs that one output adds up.

        :param block: Which weight
        :return: Number of inputs
        """
        return functional.fan_in(block.means(self)[0])

    def _sizes(self, block: Block) -> tuple[int, int]:
        """Count input and output units or channels."""
        weight = block.means(self)[0]
        return weight.shape[1], weight.shape[0]

    def _outer(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        """What each row multiplies the base perturbation by: (N, out) and (N, in) -> (N, *weight.shape)."""
        return r[:, :, None] * s[:, None, :]
