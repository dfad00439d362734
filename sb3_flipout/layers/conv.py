"""The perturbed convolutions: in one, two and three dimensions, plain and transposed."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch as th
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import Unpack

from sb3_flipout.layers import functional
from sb3_flipout.layers.block import Block
from sb3_flipout.layers.config import NoiseKwargs, layer_noise
from sb3_flipout.layers.single import OneWeightLayer


class _Channels(OneWeightLayer, _ConvNd):
    """
    What convolutions share: one factor per **channel**, broadcast over space, so that each row sees one kernel.

    That is what Wen et al. 2018, eq. (3) asks for. A sign per pixel, as other libraries draw, is no perturbation of the
    weights: no single kernel gives that output.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        noise = {name: kwargs.pop(name) for name in NoiseKwargs.__annotations__ if name in kwargs}
        config = layer_noise(noise)
        self.PLAIN.__init__(self, *args, **kwargs)
        self.init_noise(config)

    @property
    def _least_dims(self) -> int:  # type: ignore[override]
        return 2 + len(self.kernel_size)

    @abstractmethod
    def _ones(self) -> th.Tensor:
        """Make a kernel of ones with one output channel per group."""

    def _sizes(self, block: Block) -> tuple[int, int]:
        return self.in_channels, self.out_channels

    def _unit_dims(self, factor: th.Tensor, x: th.Tensor) -> th.Tensor:
        return factor.view(*factor.shape, *[1] * len(self.kernel_size))

    def _summed(self, x: th.Tensor) -> th.Tensor:
        found = self._op(x, self._ones(), None)  # one channel per group
        return found.repeat_interleave(self.out_channels // self.groups, dim=1) if self.groups > 1 else found

    def _op_per_row(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        return functional.conv_per_row(self._op, x, weight, bias)


class _Conv(_Channels):
    """Convolutions: kernels are (out, in / groups, ...)."""

    def _ones(self) -> th.Tensor:
        return self.weight.new_ones(self.groups, *self.weight.shape[1:])

    def _op(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        found: th.Tensor = self._conv_forward(x, weight, bias)
        return found

    def _outer(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        # Output channel o belongs to group o // (O / groups) and sees only that group's input channels.
        per_group = s.view(len(s), self.groups, self.in_channels // self.groups)
        per_output = per_group.repeat_interleave(self.out_channels // self.groups, dim=1)
        return (r[:, :, None] * per_output).view(*r.shape, per_output.shape[2], *[1] * len(self.kernel_size))

    def _outer_sum(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        of_group = (part.view(len(part), self.groups, part.shape[1] // self.groups) for part in (r, s))
        found = th.einsum("ngo,ngi->goi", *of_group)
        return found.reshape(self.out_channels, -1, *[1] * len(self.kernel_size))


class _ConvTransposed(_Channels, _ConvTransposeNd):
    """Transposed convolutions: kernels are (in, out / groups, ...), and their bias is over outputs as everywhere."""

    def forward(self, input: th.Tensor, output_size: list[int] | None = None) -> th.Tensor:
        """
        Apply the layer: the mean kernel, or each row's own while noise is active.

        :param input: Inputs, shape (N, in_channels, ...)
        :param output_size: Size of the output in space, where stride leaves a choice
        :return: Outputs, shape (N, out_channels, ...)
        :raises ValueError: If noise is active for another number of rows
        """
        view = self.row_view()
        if view is None:
            return super(OneWeightLayer, self).forward(input, output_size)
        if output_size is not None:
            raise ValueError(
                f"{type(self).__name__} cannot serve output_size={output_size!r} under noise; set output_padding instead."
            )
        return self.forward_rows(input, view)

    def _ones(self) -> th.Tensor:
        return self.weight.new_ones(len(self.weight), 1, *self.kernel_size)

    def _op(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        apply: Any = (nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d)
        found: th.Tensor = apply[len(self.kernel_size) - 1](
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
        return found

    def _outer(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        # Input channel i belongs to group i // (I / groups) and reaches only that group's output channels.
        per_group = r.view(len(r), self.groups, self.out_channels // self.groups)
        per_input = per_group.repeat_interleave(self.in_channels // self.groups, dim=1)
        return (s[:, :, None] * per_input).view(*s.shape, per_input.shape[2], *[1] * len(self.kernel_size))

    def _outer_sum(self, r: th.Tensor, s: th.Tensor) -> th.Tensor:
        of_group = (part.view(len(part), self.groups, part.shape[1] // self.groups) for part in (r, s))
        found = th.einsum("ngo,ngi->gio", *of_group)
        return found.reshape(self.in_channels, -1, *[1] * len(self.kernel_size))

    def fan_in(self, block: Block) -> int:
        """
        Count the inputs that one output adds up: with a stride, each output meets a part of the kernel only.

        :param block: Which weight
        :return: Number of inputs, on average
        """
        met = math.prod(self.kernel_size) / math.prod(self.stride)
        return max(1, round(self.in_channels // self.groups * met))


class FlipoutConv1d(_Conv, nn.Conv1d):
    """
    ``nn.Conv1d`` whose every row can see its own perturbed kernel; factors are per channel (Wen et al. 2018, eq. (3)).

    :param args: As of ``nn.Conv1d``
    :param kwargs: The same by name, and ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    """

    PLAIN = nn.Conv1d


class FlipoutConv2d(_Conv, nn.Conv2d):
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
    :raises TypeError: If a keyword is no noise setting, or a value has a wrong type
    :raises ValueError: If a noise setting is out of range or unfit
    """

    PLAIN = nn.Conv2d

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
        padding_mode: str = "zeros",
        device: th.device | str | None = None,
        dtype: th.dtype | None = None,
        **noise: Unpack[NoiseKwargs],
    ) -> None:
        super().__init__(
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
            **noise,
        )


class FlipoutConv3d(_Conv, nn.Conv3d):
    """
    ``nn.Conv3d`` whose every row can see its own perturbed kernel; factors are per channel (Wen et al. 2018, eq. (3)).

    :param args: As of ``nn.Conv3d``
    :param kwargs: The same by name, and noise settings as in :class:`FlipoutConv1d`
    """

    PLAIN = nn.Conv3d


class FlipoutConvTranspose1d(_ConvTransposed, nn.ConvTranspose1d):
    """
    ``nn.ConvTranspose1d`` whose every row can see its own perturbed kernel; factors are per channel.

    :param args: As of ``nn.ConvTranspose1d``
    :param kwargs: The same by name, and noise settings as in :class:`FlipoutConv1d`
    """

    PLAIN = nn.ConvTranspose1d


class FlipoutConvTranspose2d(_ConvTransposed, nn.ConvTranspose2d):
    """
    ``nn.ConvTranspose2d`` whose every row can see its own perturbed kernel; factors are per channel.

    :param args: As of ``nn.ConvTranspose2d``
    :param kwargs: The same by name, and noise settings as in :class:`FlipoutConv1d`
    """

    PLAIN = nn.ConvTranspose2d


class FlipoutConvTranspose3d(_ConvTransposed, nn.ConvTranspose3d):
    """
    ``nn.ConvTranspose3d`` whose every row can see its own perturbed kernel; factors are per channel.

    :param args: As of ``nn.ConvTranspose3d``
    :param kwargs: The same by name, and noise settings as in :class:`FlipoutConv1d`
    """

    PLAIN = nn.ConvTranspose3d
