"""What does a perturbed layer cost? Forward and backward of one layer: stock torch, flipout, full draws, Bayesian-Torch.

    python benchmarks/layers.py --rounds 200 --out docs/benchmarks/layers.md
    python benchmarks/layers.py --rounds 200 --device cuda --out docs/benchmarks/layers_cuda.md

One process and one torch thread. A round runs every arm on the same inputs, in shuffled order: one pass to warm the caches,
then one that is timed. A pass is zero_grad(set_to_none=True), forward and backward, with gradients for the input too. A
flipout pass includes hashing fresh keys, one per row, and entering `perturbed`; "base redrawn" includes a new base as well;
Bayesian-Torch draws base and signs in each forward pass (return_kl=False, so no time goes into its KL term).

The backward pass starts in two ways, and both are reported, so that nobody can say the harness hides the cost: `bare` is
layer(x).sum().backward(), the layer and hardly anything else; `mse` is F.mse_loss(layer(x), target).backward(), whose own
cost is the same in all arms and draws the ratios towards 1.

Reading: times are medians in milliseconds; "× stock" is the ratio of medians, and in brackets are the quartiles of the
ratios within rounds. 2 is the price of two matrix products. `independent` materialises weights for each row; it runs in five
of the rounds only, and is left out where one copy of the weights takes more than --memory GiB. In the table over families,
isotropic has no sigma per weight to learn, dropconnect none at all, and factorised has no base that could be redrawn.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch as th
import torch.nn.functional as F
from runs import head_of
from torch import nn

from sb3_flipout.layers import FlipoutConv2d, FlipoutLinear, perturbed, redraw
from sb3_flipout.noise import FAMILIES, fold_in

Pass = Callable[[int], th.Tensor]  # from the number of the pass to the layer's output
RARE = 5  # rounds in which a slow arm runs


@dataclass(frozen=True)
class Shape:
    """A layer's arguments and what it is fed."""

    label: str
    layer: tuple[int, ...]  # (in, out), or (in, out, kernel, stride)
    x: tuple[int, ...]
    y: tuple[int, ...]

    @property
    def is_linear(self) -> bool:
        return len(self.layer) == 2

    def weights(self) -> int:
        """Numbers in one weight per row."""
        kernel = 1 if self.is_linear else self.layer[2] ** 2
        return self.x[0] * self.layer[0] * self.layer[1] * kernel


def linear(n: int, inputs: int, outputs: int) -> Shape:
    return Shape(f"Linear ({n}, {inputs}, {outputs})", (inputs, outputs), (n, inputs), (n, outputs))


LARGE = linear(256, 512, 512)
SHAPES = [
    LARGE,
    linear(32, 3136, 512),  # NatureCNN's linear layer
    linear(64, 64, 64),  # MlpPolicy
    linear(256, 64, 64),
    Shape("Conv2d 4→32, 8×8, stride 4, (32, 4, 84, 84)", (4, 32, 8, 4), (32, 4, 84, 84), (32, 32, 20, 20)),
    Shape("Conv2d 32→64, 4×4, stride 2, (32, 32, 20, 20)", (32, 64, 4, 2), (32, 32, 20, 20), (32, 64, 9, 9)),
]


KEY_DRAWS = 64


@dataclass
class Arm:
    """One way of computing the layer: parameters to reset, and a forward pass."""

    module: nn.Module
    forward: Pass
    rare: bool = False


def stock_arm(shape: Shape, x: th.Tensor) -> Arm:
    plain: nn.Module = (nn.Linear if shape.is_linear else nn.Conv2d)(*shape.layer, device=x.device)
    return Arm(plain, lambda number: plain(x))


def flipout_arm(shape: Shape, x: th.Tensor, base_redrawn: bool = False, **noise: Any) -> Arm:
    layer = (FlipoutLinear if shape.is_linear else FlipoutConv2d)(*shape.layer, device=x.device, **noise)
    # Keys are the input of a pass, so they are drawn beforehand, as training draws them for many steps at once; hashing
    # them into signs is part of the pass.
    keys = fold_in(fold_in(0, th.arange(KEY_DRAWS, device=x.device))[:, None], th.arange(len(x), device=x.device))

    def forward(number: int) -> th.Tensor:
        if base_redrawn:
            redraw(layer, number)
        with perturbed(layer, keys[number % KEY_DRAWS]):
            return layer(x)

    return Arm(layer, forward, rare=noise.get("noise_sharing") == "independent")


def bayesian_torch_arm(shape: Shape, x: th.Tensor) -> Arm:
    from bayesian_torch.layers import Conv2dFlipout, LinearFlipout

    layer = (LinearFlipout if shape.is_linear else Conv2dFlipout)(*shape.layer).to(x.device)
    return Arm(layer, lambda number: layer(x, return_kl=False))


def arms_of(shape: Shape, x: th.Tensor, memory: float) -> dict[str, Arm]:
    """The arms of the table over shapes."""
    arms = {
        "stock": stock_arm(shape, x),
        "flipout, base kept": flipout_arm(shape, x),
        "flipout, base redrawn": flipout_arm(shape, x, base_redrawn=True),
    }
    if shape.weights() * 4 / 2**30 <= memory:
        arms["independent"] = flipout_arm(shape, x, noise_sharing="independent")
    if find_spec("bayesian_torch") is not None:
        arms["Bayesian-Torch"] = bayesian_torch_arm(shape, x)
    return arms


def family_arms(shape: Shape, x: th.Tensor) -> dict[str, Arm]:
    """The arms of the table over families."""
    arms = {"stock": stock_arm(shape, x)}
    for family, spec in FAMILIES.items():
        arms[f"{family}, base kept" if spec.base else family] = flipout_arm(shape, x, family=family)
        if spec.base:
            arms[f"{family}, base redrawn"] = flipout_arm(shape, x, base_redrawn=True, family=family)
    return arms


def warm_allocator() -> None:
    """
    Let glibc keep large temporaries. It maps blocks above a threshold afresh from the system and returns them when they are
    freed, so that a pass pays a page fault for each 4 KiB; at (32, 3136, 512) that costs more than the arithmetic. Freeing a
    mapped block raises the threshold to its size, up to 32 MiB: one of just under 32 MiB does it for all arms alike, as the
    temporaries of any long-running training would do sooner or later.
    """
    th.empty(2**25 - 2**16, dtype=th.uint8).fill_(0)


def timed(arm: Arm, x: th.Tensor, loss: Callable[[th.Tensor], th.Tensor], number: int, passes: int) -> float:
    """Seconds of one pass, on average over some in a row."""
    synchronise(x.device)
    start = time.perf_counter()
    for each in range(passes):
        arm.module.zero_grad(set_to_none=True)
        x.grad = None
        loss(arm.forward(number * passes + each)).backward()
    synchronise(x.device)
    return (time.perf_counter() - start) / passes


def synchronise(device: th.device) -> None:
    if device.type == "cuda":
        th.cuda.synchronize(device)


Times = dict[tuple[str, str], dict[int, float]]  # (arm, loss) -> round -> seconds


def measure(arms: dict[str, Arm], shape: Shape, x: th.Tensor, rounds: int) -> Times:
    target = th.randn(shape.y, device=x.device)
    losses: dict[str, Callable[[th.Tensor], th.Tensor]] = {
        "bare": th.Tensor.sum,
        "mse": lambda y: F.mse_loss(y, target),
    }
    times: Times = {(arm, loss): {} for arm in arms for loss in losses}
    order, shuffle = list(times), random.Random(0).shuffle
    # A small layer takes less time than the caches take to change hands, so it gets some passes in a row.
    passes = 10 if shape.x[0] * shape.layer[0] * shape.layer[1] < 2**21 and shape.is_linear else 1
    for number in range(rounds):
        shuffle(order)
        for name, loss in order:
            if arms[name].rare and number % max(rounds // RARE, 1):
                continue
            timed(arms[name], x, losses[loss], 2 * number, 1)
            times[name, loss][number] = timed(arms[name], x, losses[loss], 2 * number + 1, passes)
    return times


def row(label: str, name: str, times: Times) -> str:
    cells = [label, name]
    for loss in ("bare", "mse"):
        own, stock = times[name, loss], times["stock", loss]
        low, _, high = quantiles([own[number] / stock[number] for number in own]) if len(own) > 1 else (0.0, 0.0, 0.0)
        ratio = median(own.values()) / median(stock.values())
        cells += [f"{median(own.values()) * 1e3:.3f}", f"{ratio:.2f} [{low:.2f}, {high:.2f}]"]
    return f"| {' | '.join(cells)} | {len(own)} |"


HEAD = "| layer (N, in, out) | arm | bare, ms | × stock | mse, ms | × stock | rounds |\n|---|---|---:|---:|---:|---:|---:|"


def table(shape: Shape, build: Callable[[Shape, th.Tensor], dict[str, Arm]], rounds: int, device: str) -> list[str]:
    x = th.randn(shape.x, device=device, requires_grad=True)
    arms = build(shape, x)
    times = measure(arms, shape, x, rounds)
    lines = [row(shape.label, name, times) for name in arms]
    print("\n".join(lines), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=float, default=1.0, help="GiB that one copy of independent weights may take")
    parser.add_argument("--out", type=Path, help="where to write the tables, such as docs/benchmarks/layers.md")
    args = parser.parse_args()
    th.set_num_threads(1)
    th.manual_seed(0)
    warm_allocator()

    gpu = [th.cuda.get_device_name()] if args.device.startswith("cuda") else []
    lines = [head_of("Cost of a layer", __doc__, *gpu), "## Shapes\n", HEAD]
    print(HEAD)
    for shape in SHAPES:
        lines += table(shape, lambda shape, x: arms_of(shape, x, args.memory), args.rounds, args.device)
    if find_spec("bayesian_torch") is None:
        lines.append("\nBayesian-Torch is not installed, so it has no arm: `pip install bayesian-torch`.")
        print(lines[-1])
    lines += ["\n## Families\n", HEAD, *table(LARGE, family_arms, args.rounds, args.device)]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
