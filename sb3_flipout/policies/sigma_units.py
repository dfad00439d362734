"""Sigma in units of what a layer gets, so that one number means the same noise whatever the scale of observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th

from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.single import OneWeightLayer

UNITS = ("weights", "inputs")


@th.no_grad()
def divide_by_inputs(layers: Sequence[FlipoutLayer], run: Callable[[], Any]) -> list[FlipoutLayer]:
    """
    Divide sigma of the weights of each layer by the root mean square of the layer's inputs.

    What the noise of its weights adds to an output then has a standard deviation of the former sigma (LSUV's idea: Mishkin and
    Matas 2016). Sigma of biases, whose noise does not depend on inputs, stays.

    :param layers: Perturbed layers
    :param run: Makes one pass through the network under its mean weights
    :return: Layers whose sigma stays as it is: those of which not a single input is told, and those whose inputs are all 0
    """
    seen: dict[Any, list[th.Tensor]] = {}

    def note(layer: Any, inputs: tuple[th.Tensor, ...]) -> None:
        seen.setdefault(layer, []).append(inputs[0].double().square().mean())

    handles = [layer.register_forward_pre_hook(note) for layer in layers if isinstance(layer, OneWeightLayer)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    left = []
    for layer in layers:
        size = float(th.stack(seen[layer]).mean().sqrt()) if layer in seen else 0.0
        if not size > 0:
            left.append(layer)
            continue
        for block in layer.blocks:
            sigma = block.sigmas(layer)[0]
            assert sigma is not None, "families without sigma are refused"
            sigma.div_(size)
    return left
