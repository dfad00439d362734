"""A batch of no rows gives what torch.nn's layer gives: nothing, in the right shape, with gradients of 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from cases import every_noise
from kinds import KINDS
from torch import nn

from sb3_flipout.layers import FlipoutLayer, perturb, perturbed

MORE: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(4, 3), lambda: (th.randn(2, 4),)),
    "linear of tokens": (lambda: nn.Linear(4, 3), lambda: (th.randn(2, 5, 4),)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3, groups=2), lambda: (th.randn(2, 2, 5, 5),)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), lambda: (th.randn(2, 5, 4),) * 3),
}
EVERY = KINDS | MORE


@pytest.mark.parametrize("kind", EVERY)
@every_noise
def test_no_rows(kind: str, noise: dict[str, Any]) -> None:
    made, inputs = EVERY[kind]
    plain = made().double()
    none = [(x.double() if x.is_floating_point() else x)[:0] for x in inputs()]
    expected = plain(*none)
    (layer,) = perturb(nn.Sequential(plain), **noise)
    assert isinstance(layer, FlipoutLayer)
    with perturbed(layer, th.zeros(0, dtype=th.long)):
        found = layer(*none)
    expected, found = (y[0] if isinstance(y, tuple) else y for y in (expected, found))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    found.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
