"""The perturbed convolution."""

from typing import Any, Literal

import torch as th
from torch import nn

from sb3_flipout.layers import functional
from sb3_flipout.layers.block import Block
from sb3_flipout.layers.config import layer_noise
from sb3_flipout.layers.single import OneWeightLayer


class FlipoutConv2d(OneWeightLayer, nn.Conv2d):
    """
    ``nn.Conv2d`` whose every row can see its own perturbed kernel.

    There is one factor per **channel**, broadcast over space, so each row sees one kernel,
    ``W + c dW[o, i, :, :] r_o s_i`` (what Wen et al. 2018, eq. (3) asks for). A sign per pixel, as other libraries draw,
    is no perturbation of the weights: no single kernel gives that output.

    :param in_channels: Channels of the input
    :param out_channels: Channels of the output
    :param kernel_size: Size of the kernel
    :param stride: Stride
    :param padding: Padding, or ``"same"`` or ``"valid"``
    :param dilation: Spacing of kernel elements
    :param groups: Blocked connections from input to output channels
    :param bias: Whether there is a bias; it is perturbed too
    :param padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``
    :param device: Device of the parameters
    :param dtype: Floating-point type of the parameters
    :param noise: ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :raises TypeError: If a keyword is no noise setting
    :raises ValueError: If a noise setting is out of range or unfit
    """

    _least_dims = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: th.device | str | None = None,
        dtype: th.dtype | None = None,
        **noise: Any,
    ) -> None:
        config = layer_noise(noise)
        nn.Conv2d.__init__(
            self,
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.init_noise(config)

    def forward(self, input: th.Tensor) -> th.Tensor:
        """
        Apply the layer: the mean kernel, or each row's own while noise is active.

        :param input: Inputs, shape (N, in_channels, H, W)
        :return: Outputs, shape (N, out_channels, H', W')
        :raises ValueError: If noise is active for another number of rows
        """
        return super().forward(input) if self._active is None else self.forward_perturbed(input)

    def _op(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return self._conv_forward(x, weight, bias)

    def _op_per_row(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return functional.conv2d_per_row(self._conv_forward, x, weight, bias)

    def _sizes(self, block: Block) -> tuple[int, int]:
        return self.in_channels, self.out_channels

    def _unit_dims(self, factor: th.Tensor, x: th.Tensor) -> th.Tensor:
        return factor[:, :, None, None]

    def _per_weight_input(self, s: th.Tensor) -> th.Tensor:
        # Output channel o belongs to group o // (O / groups) and sees only that group's input channels.
        per_group = s.view(len(s), self.groups, self.in_channels // self.groups)
        return per_group.repeat_interleave(self.out_channels // self.groups, dim=1)[..., None, None]
