"""The perturbed linear layer."""

import torch as th
from torch import nn
from typing_extensions import Unpack

from sb3_flipout.layers import functional
from sb3_flipout.layers.config import NoiseKwargs, layer_noise
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
    :raises TypeError: If a keyword is no noise setting, or a value has a wrong type
    :raises ValueError: If a noise setting is out of range or unfit
    """

    PLAIN = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: th.device | str | None = None,
        dtype: th.dtype | None = None,
        **noise: Unpack[NoiseKwargs],
    ) -> None:
        config = layer_noise(noise)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.init_noise(config)

    _op = staticmethod(nn.functional.linear)  # type: ignore[assignment]

    def _op_per_row(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        dim = self.row_layout.dim
        return functional.linear_per_row(x.transpose(0, dim), weight, bias).transpose(0, dim)

    def _op_per_key(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return functional.linear_per_row(x, weight, bias).flatten(0, 1)

    def _summed(self, x: th.Tensor) -> th.Tensor:
        return x.sum(dim=-1, keepdim=True)

    def _unit_dims(self, factor: th.Tensor, x: th.Tensor) -> th.Tensor:
        behind = x.dim() - 2 - self.row_layout.dim  # dimensions between the rows and the units
        return factor if behind == 0 else factor.view(len(factor), *[1] * behind, factor.shape[1])
