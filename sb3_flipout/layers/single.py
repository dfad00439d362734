"""Perturbed layers of one weight, applied once per forward pass: linear layers and convolutions."""

from __future__ import annotations

from abc import abstractmethod

import torch as th

from sb3_flipout.layers import functional
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.noise.rows import RowNoise


class OneWeightLayer(FlipoutLayer):
    """Mixin of perturbed layers whose parameters are ``weight``, ``bias``, ``weight_sigma`` and ``bias_sigma``."""

    weight: th.Tensor
    bias: th.Tensor | None
    weight_sigma: th.nn.Parameter | None
    bias_sigma: th.nn.Parameter | None
    weight_base: th.Tensor | None
    bias_base: th.Tensor | None

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

    def _check_rows(self, x: th.Tensor, noise: RowNoise) -> None:
        if x.dim() < self._least_dims or x.shape[0] != len(noise):
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)} and keys for {len(noise)} rows; the first "
                f"dimension of the input must be the rows, one key each, of at least {self._least_dims} dimensions in all."
            )

    # What a kind of layer has to say: its op, and where the units lie in its inputs and outputs.
    _least_dims: int = 2

    @abstractmethod
    def _op(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        """Apply weights, the same for all rows."""

    @abstractmethod
    def _op_per_row(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        """Apply weights that have a leading dimension of rows."""

    @abstractmethod
    def _unit_dims(self, factor: th.Tensor, x: th.Tensor) -> th.Tensor:
        """View factors (N, units) such that they broadcast against inputs or outputs."""
