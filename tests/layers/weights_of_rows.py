"""The weights that one row sees, by the names that the plain module has for them."""

from __future__ import annotations

import torch as th

from sb3_flipout.layers import FlipoutLayer, effective_weight


def weights_of_row(layer: FlipoutLayer, key: int | th.Tensor, scale: float) -> dict[str, th.Tensor]:
    found: dict[str, th.Tensor] = {}
    for block in layer.blocks:
        weight, bias = effective_weight(layer, key, scale, block.weight)
        found[block.weight] = weight
        if block.bias is not None and bias is not None:
            found[block.bias] = bias
    return found
