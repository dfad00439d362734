"""What all perturbed layers share: sigma, the base draw, and the noise that is active now.

A layer is in one of two states, and ``module.training`` is neither: without active noise it computes what its torch.nn
parent computes, with the very same code; with active noise each row sees its own weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers import functional
from sb3_flipout.layers.config import LayerNoise
from sb3_flipout.noise.bases import base_draws
from sb3_flipout.noise.keys import fold
from sb3_flipout.noise.rows import RowNoise
from sb3_flipout.noise.signs import FactorKind, LayerVectors, factors, salts


class FlipoutLayer(nn.Module, ABC):
    """
    Mixin of all perturbed layers; stands before the torch.nn class in their bases.

    Parameters beside the parent's: ``weight_sigma`` and ``bias_sigma``. Their sign does not matter, since the law of the
    noise is symmetric, so nothing keeps them positive and 0 is exactly the plain layer.
    """

    weight: th.Tensor
    bias: th.Tensor | None
    weight_sigma: nn.Parameter | None
    bias_sigma: nn.Parameter | None
    weight_base: th.Tensor | None
    bias_base: th.Tensor | None
    noise_config: LayerNoise
    noise_index: int | None
    base_key: int
    # What the rows see now, set for the time of a `perturbed` block and kept out of torch.nn's books.
    _active: tuple[RowNoise, tuple[th.Tensor, ...]] | None = None

    def init_noise(self, config: LayerNoise, base_key: int = 0, noise_index: int | None = None) -> None:
        """
        Add sigma and draw the base; constructors and in-place conversion both come here.

        :param config: How the layer is perturbed
        :param base_key: Key of the base perturbation
        :param noise_index: The layer's number in its network; ``None``: numbered when the network is first perturbed
        """
        self.noise_config = config
        self.noise_index = noise_index
        if config.init == "noisynet":
            self._init_noisynet_means()
        self._init_sigma()
        self.redraw(base_key)

    def _init_noisynet_means(self) -> None:
        """Mu ~ U(-b, b): b = sqrt(3/p) for independent and 1/sqrt(p) for factorised noise (Fortunato et al. 2018, 3.2)."""
        numerator = 3.0 if self.noise_config.family == "gaussian" else 1.0
        bound = math.sqrt(numerator / functional.fan_in(self.weight))
        for mean in (self.weight, self.bias):
            if mean is not None:
                nn.init.uniform_(mean, -bound, bound)

    def _init_sigma(self) -> None:
        config, spec = self.noise_config, self.noise_config.spec
        learned = config.learn_sigma and spec.sigma == "per_weight"
        sigma = config.sigma(functional.fan_in(self.weight))
        per_layer = spec.sigma == "per_layer"
        for name, mean in (("weight_sigma", self.weight), ("bias_sigma", None if per_layer else self.bias)):
            if mean is None or spec.sigma == "none":
                self.register_parameter(name, None)
            else:
                initial = mean.detach().new_full(() if per_layer else mean.shape, sigma)
                setattr(self, name, nn.Parameter(initial, requires_grad=learned))

    def redraw(self, base_key: int) -> None:
        """
        Draw the base perturbation, a pure function of the base key and the layer's number.

        New tensors are bound, never filled in place: a backward pass that still waits sees the draw it was made with.

        :param base_key: Key of the base, any integer
        """
        self.base_key = base_key
        weight_base, bias_base = self._draw_base(base_key)
        self.register_buffer("weight_base", weight_base, persistent=False)
        self.register_buffer("bias_base", bias_base, persistent=False)

    def _draw_base(self, base_key: int) -> tuple[th.Tensor | None, th.Tensor | None]:
        sharing, law = self.noise_config.noise_sharing, self.noise_config.spec.base
        if law is not None and sharing != "independent":
            shapes = [self.weight.shape] if self.bias is None else [self.weight.shape, self.bias.shape]
            draws = base_draws(law, fold(base_key, self.noise_index or 0), shapes, self.weight)
            return draws[0], None if self.bias is None else draws[1]
        if sharing == "shared":  # factors of one key for all rows: NoisyNet's factorised draw
            s, r = self._factors(th.tensor([base_key], device=self.weight.device))
            return self._outer(r, s)[0], None if self.bias is None else r[0]
        return None, None

    def __getstate__(self) -> dict[str, Any]:
        """
        Give what copies and pickles keep: base draws of their own, not the whole table that they are slices of.

        :return: Attributes
        """
        buffers = {name: buffer if buffer is None else buffer.clone() for name, buffer in self._buffers.items()}
        return {**self.__dict__, "_buffers": buffers}

    def deltas(
        self, weight_eps: th.Tensor | None = None, bias_eps: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Compute the base perturbation, which moves with sigma (and the means), so it is never stored.

        :param weight_eps: Draw to use instead of the base
        :param bias_eps: The same for the bias
        :return: Perturbation of weight and bias, before row factors and noise scale
        """
        spec, bias = self.noise_config.spec, self.bias
        weight_sigma = self.weight_sigma
        weight_eps = self.weight_base if weight_eps is None else weight_eps
        delta_weight = functional.delta(self.weight, weight_sigma, weight_eps, spec.relative)
        if bias is None:
            return delta_weight, None
        bias_sigma = weight_sigma if spec.sigma == "per_layer" else self.bias_sigma
        bias_eps = self.bias_base if bias_eps is None else bias_eps
        return delta_weight, functional.delta(bias, bias_sigma, bias_eps, spec.relative)

    def vectors(self) -> LayerVectors:
        """
        Say which row factors the layer needs: none when one draw is shared, or when each row has its own.

        :return: Number of the layer, law and lengths of its factor vectors
        """
        sizes = (self._size_in(), self._size_out()) if self._by_factors() else ()
        return LayerVectors(self.noise_index or 0, self.noise_config.spec.factor, sizes)

    def _by_factors(self) -> bool:
        """Whether rows are told apart by factors; factorised rows are fully independent already, so that is their way."""
        sharing = self.noise_config.noise_sharing
        return sharing == "flipout" or (sharing == "independent" and self.noise_config.spec.row_draw is None)

    def forward_perturbed(self, x: th.Tensor) -> th.Tensor:
        """
        Compute the layer under the active noise.

        :param x: Inputs of N rows
        :return: Outputs of N rows
        :raises ValueError: If ``x`` has another number of rows than there are keys
        """
        assert self._active is not None, "forward asks whether noise is active"
        noise, row_factors = self._active
        self._check_rows(x, noise)
        mean = (self.weight, self.bias)
        if row_factors:
            s, r = self._unit_dims(row_factors[0], x), self._unit_dims(row_factors[1], x)
            return functional.flipout(self._op, x, mean, self.deltas(), s, r)
        scale = noise.scale.to(self.weight.dtype)
        if self.noise_config.noise_sharing == "shared":
            return functional.shared(self._op, x, mean, self.deltas(), self._unit_dims(scale[:, None], x))
        return self._op_per_row(x, *self.row_weights(noise.keys, scale))

    def row_weights(self, keys: th.Tensor, scale: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Materialise the weights that each row sees, in memory N times that of the layer.

        :param keys: Noise keys, shape (N,)
        :param scale: Noise scales, shape (N,)
        :return: Weights, shape (N, O, ...), and biases, shape (N, O)
        """
        delta_weight, delta_bias = self._row_deltas(keys)
        c = scale.to(self.weight.dtype)
        weight = self.weight + c.view(-1, *[1] * self.weight.dim()) * delta_weight
        return weight, None if self.bias is None or delta_bias is None else self.bias + c[:, None] * delta_bias

    def _row_deltas(self, keys: th.Tensor) -> tuple[th.Tensor, th.Tensor | None]:
        if self.noise_config.noise_sharing == "shared":
            delta_weight, delta_bias = self.deltas()
            return delta_weight[None], None if delta_bias is None else delta_bias[None]
        if not self._by_factors():
            bias_eps = None if self.bias is None else self._row_draw(keys, 3, self.bias.shape)
            return self.deltas(self._row_draw(keys, 2, self.weight.shape), bias_eps)
        delta_weight, delta_bias = self.deltas()
        s, r = self._factors(keys)
        return delta_weight * self._outer(r, s), None if delta_bias is None else delta_bias * r

    def _factors(self, keys: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Factors over inputs, shape (N, in), and over outputs, shape (N, out), without noise scale."""
        kind = self.noise_config.spec.factor
        return self._hash(keys, 0, self._size_in(), kind), self._hash(keys, 1, self._size_out(), kind)

    def _outer(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        """What each row multiplies the base perturbation by: (N, out) and (N, in) -> (N, *weight.shape)."""
        return r.view(*r.shape, *[1] * (self.weight.dim() - 1)) * self._per_weight_input(s)

    def _hash(self, keys: th.Tensor, vector: int, n: int, kind: FactorKind) -> th.Tensor:
        word_salts = salts(self.noise_index or 0, vector, n, kind).to(keys.device)
        return factors(keys, word_salts, kind, self.weight.dtype)[:, :n]

    def _row_draw(self, keys: th.Tensor, vector: int, shape: th.Size) -> th.Tensor:
        kind = self.noise_config.spec.row_draw
        assert kind is not None, "families without a draw per row are told apart by factors"
        return self._hash(keys, vector, shape.numel(), kind).view(len(keys), *shape)

    def _check_rows(self, x: th.Tensor, noise: RowNoise) -> None:
        if x.dim() < self._least_dims or x.shape[0] != len(noise):
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)} and keys for {len(noise)} rows; the first "
                f"dimension of the input must be the rows, one key each, of at least {self._least_dims} dimensions in all."
            )

    # What a kind of layer has to say: its op, and where rows, inputs and outputs lie.
    _least_dims: int = 2

    @abstractmethod
    def _op(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        """Apply weights, the same for all rows."""

    @abstractmethod
    def _op_per_row(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        """Apply weights that have a leading dimension of rows."""

    @abstractmethod
    def _size_in(self) -> int:
        """Count the input units or channels."""

    def _size_out(self) -> int:
        """Count the output units or channels."""
        return self.weight.shape[0]

    @abstractmethod
    def _unit_dims(self, factor: th.Tensor, x: th.Tensor) -> th.Tensor:
        """View factors (N, units) such that they broadcast against inputs or outputs."""

    @abstractmethod
    def _per_weight_input(self, s: th.Tensor) -> th.Tensor:
        """View factors over inputs (N, in) such that they broadcast against the weight of each row."""

    def extra_repr(self) -> str:
        """
        Describe the layer as torch.nn does, with its noise.

        :return: The parent's description and the noise settings
        """
        config = self.noise_config
        return f"{super().extra_repr()}, family={config.family!r}, noise_sharing={config.noise_sharing!r}"
