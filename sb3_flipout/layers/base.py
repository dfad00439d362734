"""What all perturbed layers share: sigma, the base draw, and the noise that is active now.

A layer is in one of two states, and ``module.training`` is neither: without active noise it computes what its torch.nn
parent computes, with the very same code; with active noise each row sees its own weights.
"""

from __future__ import annotations

import math
from abc import ABC
from typing import Any, ClassVar

import torch as th
from torch import nn

from sb3_flipout.layers import functional
from sb3_flipout.layers.block import Block, MaybePair, Pair
from sb3_flipout.layers.config import LayerNoise
from sb3_flipout.noise.bases import base_draws
from sb3_flipout.noise.keys import fold
from sb3_flipout.noise.rows import RowNoise
from sb3_flipout.noise.signs import FactorKind, LayerVectors, factors, salts

Bases = tuple[int, list[th.Tensor | None]]  # base key, and draws of weight and bias, block by block


class FlipoutLayer(nn.Module, ABC):
    """
    Mixin of all perturbed layers; stands before the torch.nn class in their bases.

    Parameters beside the parent's: one named ``<name>_sigma`` for each perturbed weight and bias. Their sign does not matter,
    since the law of the noise is symmetric, so nothing keeps them positive and 0 is exactly the plain layer.
    """

    #: What ``noise_on=`` may name.
    NOISE_ON: ClassVar[tuple[str, ...]] = ("all",)

    noise_config: LayerNoise
    noise_on: str = "all"
    noise_index: int | None
    noise_scaled: bool = True  # whether the noise scale multiplies the layer's noise
    base_key: int
    blocks: tuple[Block, ...] = (Block(),)  # the perturbed ones
    quiet_blocks: tuple[Block, ...] = ()  # those that noise_on= leaves alone
    # What the rows see now, set for the time of a `perturbed` block and kept out of torch.nn's books.
    _active: tuple[RowNoise, tuple[th.Tensor, ...]] | None = None

    def init_noise(self, config: LayerNoise, base_key: int = 0, noise_index: int | None = None, noise_on: str = "all") -> None:
        """
        Add sigma and draw the base; constructors and in-place conversion both come here.

        :param config: How the layer is perturbed
        :param base_key: Key of the base perturbation
        :param noise_index: The layer's number in its network; ``None``: numbered when the network is first perturbed
        :param noise_on: Which of its weights are perturbed: one of the class's ``NOISE_ON``
        """
        self.noise_config = config
        self.noise_index = noise_index
        self._choose_blocks(noise_on)
        if config.init == "noisynet":
            self._init_noisynet_means()
        for block in self.blocks:
            self._init_sigma(block)
        self.redraw(base_key)

    @classmethod
    def check_plain(cls, plain: nn.Module) -> None:
        """
        Refuse a torch.nn layer with options that the perturbed one cannot serve.

        :param plain: Layer to be converted
        """

    def _choose_blocks(self, noise_on: str) -> None:
        """Set ``blocks`` and ``quiet_blocks``; layers of one block have nothing to choose."""

    def _init_noisynet_means(self) -> None:
        """Mu ~ U(-b, b): b = sqrt(3/p) for independent and 1/sqrt(p) for factorised noise (Fortunato et al. 2018, 3.2)."""
        numerator = 3.0 if self.noise_config.family == "gaussian" else 1.0
        for block in self.blocks:
            weight, bias = block.means(self)
            bound = math.sqrt(numerator / functional.fan_in(weight))
            for mean in (weight, bias):
                if mean is not None:
                    nn.init.uniform_(mean, -bound, bound)

    def _init_sigma(self, block: Block) -> None:
        config, spec = self.noise_config, self.noise_config.spec
        weight, bias = block.means(self)
        learned = config.learn_sigma and spec.sigma == "per_weight"
        sigma = config.sigma(functional.fan_in(weight))
        per_layer = spec.sigma == "per_layer"
        for name, mean in ((block.weight_sigma, weight), (block.bias_sigma, None if per_layer else bias)):
            if name is None:
                continue
            if mean is None or spec.sigma == "none":
                self.register_parameter(name, None)
            else:
                initial = mean.detach().new_full(() if per_layer else mean.shape, sigma)
                setattr(self, name, nn.Parameter(initial, requires_grad=learned))

    @property
    def like(self) -> th.Tensor:
        """A mean weight, to tell the layer's floating-point type and device."""
        weight: th.Tensor = getattr(self, self.blocks[0].weight)
        return weight

    def means(self) -> list[th.Tensor]:
        """
        Give the mean weights and biases that are perturbed.

        :return: The layer's own tensors, each weight before its bias
        """
        return [mean for block in self.blocks for mean in block.means(self) if mean is not None]

    def redraw(self, base_key: int) -> None:
        """
        Draw the base perturbation, a pure function of the base key and the layer's number.

        New tensors are bound, never filled in place: a backward pass that still waits sees the draw it was made with.

        :param base_key: Key of the base, any integer
        """
        self.base_key = base_key
        for block, (weight_base, bias_base) in zip(self.blocks, self._draw_bases(base_key), strict=True):
            self.register_buffer(block.weight_base, weight_base, persistent=False)
            if block.bias_base is not None:
                self.register_buffer(block.bias_base, bias_base, persistent=False)

    def _draw_bases(self, base_key: int) -> list[MaybePair]:
        sharing, law = self.noise_config.noise_sharing, self.noise_config.spec.base
        means = [block.means(self) for block in self.blocks]
        like = means[0][0]
        if law is not None and sharing != "independent":
            shapes = [mean.shape for pair in means for mean in pair if mean is not None]
            draws = iter(base_draws(law, fold(base_key, self.noise_index or 0), shapes, like))
            return [(next(draws), None if bias is None else next(draws)) for _, bias in means]
        if sharing == "shared":  # factors of one key for all rows: NoisyNet's factorised draw
            vectors = [self._factors(block, th.tensor([base_key], device=like.device)) for block in self.blocks]
            pairs = zip(vectors, means, strict=True)
            return [(self._outer(r, s)[0], None if bias is None else r[0]) for (s, r), (_, bias) in pairs]
        return [(None, None)] * len(means)

    def bases(self) -> Bases:
        """
        Give the base draws.

        :return: Base key, and draws of weight and bias, block by block
        """
        draws = [draw for block in self.blocks for draw in block.bases(self)[: 1 if block.bias is None else 2]]
        return self.base_key, draws

    def bind(self, bases: Bases) -> None:
        """
        Bind base draws that the layer had before.

        :param bases: Base key and draws, as :meth:`bases` gives them
        """
        self.base_key, draws = bases
        names = [name for block in self.blocks for name in (block.weight_base, block.bias_base) if name is not None]
        for name, draw in zip(names, draws, strict=True):
            setattr(self, name, draw)

    def __getstate__(self) -> dict[str, Any]:
        """
        Give what copies and pickles keep: base draws of their own, not the whole table that they are slices of.

        :return: Attributes
        """
        buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in self._buffers.items()}
        return {**self.__dict__, "_buffers": buffers}

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
        weight, bias = block.means(self)
        weight_sigma, bias_sigma = block.sigmas(self)
        weight_base, bias_base = block.bases(self)
        delta_weight = functional.delta(weight, weight_sigma, weight_base if weight_eps is None else weight_eps, spec.relative)
        if bias is None:
            return delta_weight, None
        bias_sigma = weight_sigma if spec.sigma == "per_layer" else bias_sigma
        return delta_weight, functional.delta(bias, bias_sigma, bias_base if bias_eps is None else bias_eps, spec.relative)

    def vectors(self) -> LayerVectors:
        """
        Say which row factors the layer needs: none when one draw is shared, or when each row has its own.

        :return: Number of the layer, law and lengths of its factor vectors
        """
        blocks = self.blocks if self._by_factors() else ()
        sizes = tuple(size for block in blocks for size in self._sizes(block))
        return LayerVectors(self.noise_index or 0, self.noise_config.spec.factor, sizes, self.noise_scaled)

    def _by_factors(self) -> bool:
        """Whether rows are told apart by factors; factorised rows are fully independent already, so that is their way."""
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

    def _factors(self, block: Block, keys: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Factors over inputs, shape (N, in), and over outputs, shape (N, out), without noise scale."""
        (size_in, size_out), kind = self._sizes(block), self.noise_config.spec.factor
        return self._hash(keys, 2 * block.number, size_in, kind), self._hash(keys, 2 * block.number + 1, size_out, kind)

    def _outer(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        """What each row multiplies the base perturbation by: (N, out) and (N, in) -> (N, *weight.shape)."""
        per_input = self._per_weight_input(s)
        return r.view(*r.shape, *[1] * (per_input.dim() - 2)) * per_input

    def _hash(self, keys: th.Tensor, vector: int, n: int, kind: FactorKind) -> th.Tensor:
        word_salts = salts(self.noise_index or 0, vector, n, kind).to(keys.device)
        return factors(keys, word_salts, kind, self.like.dtype)[:, :n]

    def _row_draw(self, keys: th.Tensor, vector: int, shape: th.Size) -> th.Tensor:
        kind = self.noise_config.spec.row_draw
        assert kind is not None, "families without a draw per row are told apart by factors"
        return self._hash(keys, vector, shape.numel(), kind).view(len(keys), *shape)

    # What a layer says that is no matrix product: where inputs and outputs lie.

    def _sizes(self, block: Block) -> tuple[int, int]:
        """Count input and output units or channels."""
        weight = block.means(self)[0]
        return weight.shape[1], weight.shape[0]

    def _per_weight_input(self, s: th.Tensor) -> th.Tensor:
        """View factors over inputs (N, in) such that they broadcast against the weight of each row."""
        return s[:, None, :]

    def extra_repr(self) -> str:
        """
        Describe the layer as torch.nn does, with its noise.

        :return: The parent's description and the noise settings
        """
        config, on = self.noise_config, "" if self.noise_on == "all" else f", noise_on={self.noise_on!r}"
        return f"{super().extra_repr()}, family={config.family!r}, noise_sharing={config.noise_sharing!r}{on}"
