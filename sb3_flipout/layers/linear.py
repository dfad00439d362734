"""The perturbed linear layer."""

from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers import functional
from sb3_flipout.layers.config import layer_noise
from sb3_flipout.layers.single import OneWeightLayer


class FlipoutLinear(OneWeightLayer, nn.Linear):  # type: ignore[misc]
    """
    ``nn.Linear`` whose every row can see its own perturbed weights (Wen et al. 2018, eq. (4)).

    Inputs have the shape (N, ..., in_features): one weight sample per N, whatever stands between.

    :param in_features: Size of each input
    :param out_features: Size of each output
    :param bias: Whether there is a bias; it is perturbed too
    :param device: Device of the parameters
    :param dtype: Floating-point type of the parameters
    :param noise: ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :raises TypeError: If a keyword is no noise setting
    :raises ValueError: If a noise setting is out of range or unfit
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: th.device | str | None = None,
        dtype: th.dtype | None = None,
        **noise: Any,
    ) -> None:
        config = layer_noise(noise)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.init_noise(config)

    def forward(self, input: th.Tensor) -> th.Tensor:
        """
        Apply the layer: mean weights, or each row's own while noise is active.

        :param input: Inputs, shape (N, ..., in_features)
        :return: Outputs, shape (N, ..., out_features)
        :raises ValueError: If noise is active for another number of rows
        """
        return super().forward(input) if self._active is None else self.forward_perturbed(input)

    def _op(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return nn.functional.linear(x, weight, bias)

    def _op_per_row(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return functional.linear_per_row(x, weight, bias)

    def _unit_dims(self, factor: th.Tensor, x: th.Tensor) -> th.Tensor:
        return factor if x.dim() == 2 else factor.view(len(factor), *[1] * (x.dim() - 2), -1)
