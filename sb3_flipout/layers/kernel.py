"""The perturbed matrix product for training: the formula of ``functional.flipout`` with a backward pass written out.

Small layers are bound by the number of operations, large ones by the memory they touch. The written backward pass needs
fewer operations than autograd records for the formula, keeps no base perturbation alive from forward to backward, and
writes the gradient of sigma in place. Tests hold both ways equal, in value and in first and second derivatives.
"""

from typing import Any

import torch as th
from torch.nn import functional as F

from sb3_flipout.layers import functional


class FlipoutLinearFunction(th.autograd.Function):
    """``functional.flipout`` for a matrix product on (N, I) inputs, any family, twice differentiable."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        relative: bool,
        s: th.Tensor,  # shape: (N, I)
        r: th.Tensor,  # shape: (N, O)
        base: th.Tensor | None,  # shape: (O, I)
        bias_base: th.Tensor | None,  # shape: (O,)
        x: th.Tensor,  # shape: (N, I)
        weight: th.Tensor,  # shape: (O, I)
        bias: th.Tensor | None,  # shape: (O,)
        sigma: th.Tensor | None,  # shape: (O, I) or ()
        bias_sigma: th.Tensor | None,  # shape: (O,) or ()
    ) -> th.Tensor:
        """
        Compute the outputs of all rows.

        :param ctx: What autograd keeps for the backward pass
        :param relative: Whether the perturbation is relative to the mean weights
        :param s: Row factors over inputs
        :param r: Row factors over outputs, multiplied by the noise scale
        :param base: Base draw of the weight
        :param bias_base: Base draw of the bias
        :param x: Inputs
        :param weight: Mean weight
        :param bias: Mean bias
        :param sigma: Sigma of the weight
        :param bias_sigma: Sigma of the bias
        :return: Outputs, shape (N, O)
        """
        ctx.relative = relative
        ctx.save_for_backward(s, r, base, bias_base, x, weight, bias, sigma, bias_sigma)
        return _formula(relative, s, r, base, bias_base, x, weight, bias, sigma, bias_sigma)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        """
        Compute the gradients.

        :param ctx: What the forward pass kept
        :param grads: Gradient of the outputs, shape (N, O)
        :return: Gradients of the arguments of :meth:`forward`
        """
        needed, tensors = ctx.needs_input_grad[5:], ctx.saved_tensors
        # Grad mode is on in a backward pass just when it has to be differentiable itself (create_graph=True).
        gradients = _differentiable_backward if th.is_grad_enabled() else _fast_backward
        return (None, None, None, None, None, *gradients(ctx.relative, grads[0], needed, *tensors))


def _formula(
    relative: bool,
    s: th.Tensor,
    r: th.Tensor,
    base: th.Tensor | None,
    bias_base: th.Tensor | None,
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor | None,
    sigma: th.Tensor | None,
    bias_sigma: th.Tensor | None,
) -> th.Tensor:
    delta_bias = None if bias is None else functional.delta(bias, bias_sigma, bias_base, relative)
    deltas = functional.delta(weight, sigma, base, relative), delta_bias
    return functional.flipout(F.linear, x, (weight, bias), deltas, s, r)


def _differentiable_backward(
    relative: bool, grad: th.Tensor, needed: tuple[bool, ...], *tensors: th.Tensor
) -> list[th.Tensor | None]:
    wanted = [tensor for tensor, need in zip(tensors[4:], needed, strict=True) if need]
    found = iter(th.autograd.grad(_formula(relative, *tensors), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


def _fast_backward(
    relative: bool,
    grad: th.Tensor,
    needed: tuple[bool, ...],
    s: th.Tensor,
    r: th.Tensor,
    base: th.Tensor | None,
    bias_base: th.Tensor | None,
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor | None,
    sigma: th.Tensor | None,
    bias_sigma: th.Tensor | None,
) -> list[th.Tensor | None]:
    grad_r = grad * r
    gradients: list[th.Tensor | None] = [None] * 5
    if needed[0]:
        perturbed = grad_r @ functional.delta(weight, sigma, base, relative)
        gradients[0] = (grad @ weight).addcmul_(perturbed, s)
    if needed[1] or needed[3]:
        grad_delta = grad_r.t() @ (x * s) if needed[3] or relative else None
        gradients[1] = grad.t() @ x if needed[1] else None
        gradients[3] = _through_delta(grad_delta, gradients[1], weight, sigma, base, relative, needed[3])
    if bias is not None and (needed[2] or needed[4]):
        grad_delta = grad_r.sum(0) if needed[4] or relative else None
        gradients[2] = grad.sum(0) if needed[2] else None
        gradients[4] = _through_delta(grad_delta, gradients[2], bias, bias_sigma, bias_base, relative, needed[4])
    return gradients


def _through_delta(
    grad_delta: th.Tensor | None,
    grad_mean: th.Tensor | None,
    mean: th.Tensor,
    sigma: th.Tensor | None,
    base: th.Tensor | None,
    relative: bool,
    sigma_needed: bool,
) -> th.Tensor | None:
    """Gradient of sigma; adds to ``grad_mean``, in place, what a relative perturbation sends there."""
    if grad_delta is None:
        return None
    if relative and grad_mean is not None:
        grad_mean.addcmul_(grad_delta, functional.delta(mean, sigma, base, relative=False))
    if not sigma_needed or sigma is None:
        return None
    for part in (base, mean if relative else None):
        if part is not None:
            grad_delta.mul_(part)
    return grad_delta if sigma.dim() else grad_delta.sum()


def flipout_linear(
    relative: bool,
    s: th.Tensor,
    r: th.Tensor,
    base: th.Tensor | None,
    bias_base: th.Tensor | None,
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor | None,
    sigma: th.Tensor | None,
    bias_sigma: th.Tensor | None,
) -> th.Tensor:
    """
    Apply a perturbed matrix product, by the written backward pass where it serves.

    Without gradients there is nothing to write out; the compiler fuses the formula better than it can an opaque function;
    and autocast has to see each operation.

    :param relative: Whether the perturbation is relative to the mean weights
    :param s: Row factors over inputs, shape (N, I)
    :param r: Row factors over outputs, multiplied by the noise scale, shape (N, O)
    :param base: Base draw of the weight, shape (O, I)
    :param bias_base: Base draw of the bias, shape (O,)
    :param x: Inputs, shape (N, I)
    :param weight: Mean weight, shape (O, I)
    :param bias: Mean bias, shape (O,)
    :param sigma: Sigma of the weight, shape (O, I) or ()
    :param bias_sigma: Sigma of the bias, shape (O,) or ()
    :return: Outputs, shape (N, O)
    """
    by_formula = not th.is_grad_enabled() or th.compiler.is_compiling() or th.is_autocast_enabled(x.device.type)
    apply = _formula if by_formula else FlipoutLinearFunction.apply
    return apply(relative, s, r, base, bias_base, x, weight, bias, sigma, bias_sigma)  # type: ignore[no-any-return]
