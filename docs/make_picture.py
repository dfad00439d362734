"""Draw the README's picture: the weights that three environments see in one forward pass.

python docs/make_picture.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch as th

from sb3_flipout import FlipoutLinear, perturbed
from sb3_flipout.layers import effective_weight
from sb3_flipout.noise import fold_in


def main() -> None:
    th.manual_seed(0)
    layer = FlipoutLinear(24, 12, sigma_init=0.8)
    layer.weight.data = th.outer(th.sin(th.linspace(0, 6, 12)), th.cos(th.linspace(0, 9, 24))) * 0.5
    keys = fold_in(7, th.arange(3))
    panels = [("mean weights $\\bar W$", layer.weight.detach())]
    for row, key in enumerate(keys):
        panels.append((f"what environment {row} sees\n$\\bar W + \\Delta W \\circ r_{row} s_{row}^\\top$",
                       effective_weight(layer, key)[0].detach()))  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 2.9), constrained_layout=True)
    for axis, (title, weight) in zip(axes, panels, strict=True):
        image = axis.imshow(weight, cmap="RdBu_r", vmin=-1.1, vmax=1.1, aspect="auto")
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("input")
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel("output")
    figure.colorbar(image, ax=axes, label="weight", shrink=0.9)
    with perturbed(layer, keys):
        layer(th.ones(3, 24))  # all three in one pass, for the price of two matrix products
    path = Path(__file__).parent / "images" / "row_weights.png"
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
