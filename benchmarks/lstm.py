"""What does a perturbed LSTM cost? Forward and backward against a plain Python-loop LSTM and torch's own nn.LSTM.

    python benchmarks/lstm.py --rounds 30 --out docs/benchmarks/lstm.md

One process and one torch thread. A round runs every arm on the same inputs, in shuffled order: one pass to warm the caches,
then one that is timed. A pass is zero_grad(set_to_none=True), forward over T steps, and backward from the sum of the outputs'
squares, with gradients for the inputs too. A flipout pass includes hashing the keys and entering `perturbed`.

The arm "loop without noise" has the form of FlipoutLSTM: all inputs are projected at once, then a Python loop adds the hidden
part to the gates, step by step, with the same elementary operations. Against it the ratio is the price of the noise; nn.LSTM
is one fused operation forward and one backward, so the ratio against it is the price of the loop as well. The loop's T
matrix products per weight are what noise doubles; 2 is the price of two matrix products each.

Reading: times are medians in milliseconds; "× loop" and "× nn.LSTM" are ratios of medians, and in brackets are the quartiles
of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch as th
from layers import warm_allocator
from runs import head_of
from torch import nn

from sb3_flipout.layers import FlipoutLSTM, functional, perturbed
from sb3_flipout.noise import fold_in

Pass = Callable[[th.Tensor, int], th.Tensor]  # from inputs (T, N, F) and the number of the pass to the outputs (T, N, H)


@dataclass(frozen=True)
class Shape:
    """Steps, sequences, and sizes of inputs and hidden state."""

    steps: int
    sequences: int
    inputs: int
    hidden: int

    @property
    def label(self) -> str:
        return f"T = {self.steps}, N = {self.sequences}, inputs {self.inputs}, H = {self.hidden}"


SHAPES = [
    Shape(32, 64, 256, 256),
    Shape(128, 8, 64, 256),  # RecurrentPPO's batch of 128 per environment, 8 of them, features of MlpLstmPolicy
    Shape(1, 8, 64, 256),  # one step of collection
]


class LoopLSTM(nn.LSTM):
    """One layer of `nn.LSTM` in the form of FlipoutLSTM, without noise."""

    def forward(self, x: th.Tensor) -> th.Tensor:  # type: ignore[override]
        def step(gates: th.Tensor, h: th.Tensor, t: int) -> th.Tensor:
            return th.addmm(gates, h, self.weight_hh_l0.t())

        gates = nn.functional.linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
        zeros = x.new_zeros(x.shape[1], self.hidden_size)
        outputs, _ = functional.lstm(gates.unbind(0), (zeros, zeros), step)
        return th.stack(outputs)


@dataclass
class Arm:
    """Parameters to reset, and a forward pass."""

    module: nn.Module
    forward: Pass


def flipout_arm(shape: Shape, stepwise: bool = False, noise_on: str = "all") -> Arm:
    lstm = FlipoutLSTM(shape.inputs, shape.hidden, noise_on=noise_on)
    rows = th.arange(shape.sequences * (shape.steps if stepwise else 1))

    def forward(x: th.Tensor, number: int) -> th.Tensor:
        with perturbed(lstm, fold_in(number, rows)):
            return lstm(x)[0]

    return Arm(lstm, forward)


def arms_of(shape: Shape) -> dict[str, Arm]:
    loop, fused = LoopLSTM(shape.inputs, shape.hidden), nn.LSTM(shape.inputs, shape.hidden)
    arms = {
        "nn.LSTM": Arm(fused, lambda x, number: fused(x)[0]),
        "loop without noise": Arm(loop, lambda x, number: loop(x)),
        "FlipoutLSTM, key held": flipout_arm(shape),
        "FlipoutLSTM, key per step": flipout_arm(shape, stepwise=True),
        "FlipoutLSTM, noise on hidden weights": flipout_arm(shape, noise_on="hidden"),
    }
    if shape.steps == 1:
        del arms["FlipoutLSTM, key per step"]
    return arms


def check_form(shape: Shape) -> None:
    """The loop computes what nn.LSTM does."""
    loop, fused = LoopLSTM(shape.inputs, shape.hidden), nn.LSTM(shape.inputs, shape.hidden)
    loop.load_state_dict(fused.state_dict())
    x = th.randn(shape.steps, shape.sequences, shape.inputs)
    th.testing.assert_close(loop(x), fused(x)[0], rtol=1e-4, atol=1e-5)


def timed(arm: Arm, x: th.Tensor, number: int, passes: int) -> float:
    """Seconds of one pass, on average over some in a row."""
    start = time.perf_counter()
    for each in range(passes):
        arm.module.zero_grad(set_to_none=True)
        x.grad = None
        arm.forward(x, number * passes + each).square().sum().backward()
    return (time.perf_counter() - start) / passes


def measure(shape: Shape, rounds: int) -> dict[str, list[float]]:
    arms, shuffle = arms_of(shape), random.Random(0).shuffle
    x = th.randn(shape.steps, shape.sequences, shape.inputs, requires_grad=True)
    order, times = list(arms), {name: [0.0] * rounds for name in arms}
    passes = 10 if shape.steps == 1 else 1  # a short pass takes less time than the caches take to change hands
    for number in range(rounds):
        shuffle(order)
        for name in order:
            timed(arms[name], x, 2 * number, 1)
            times[name][number] = timed(arms[name], x, 2 * number + 1, passes)
    return times


def ratio(own: list[float], other: list[float]) -> str:
    low, _, high = quantiles([a / b for a, b in zip(own, other, strict=True)])
    return f"{median(own) / median(other):.2f} [{low:.2f}, {high:.2f}]"


HEAD = "| arm | ms | × loop | × nn.LSTM |\n|---|---:|---:|---:|"


def table(shape: Shape, rounds: int) -> list[str]:
    times = measure(shape, rounds)
    lines = [f"\n## {shape.label}\n", HEAD]
    for name, own in times.items():
        cells = [name, f"{median(own) * 1e3:.3f}", ratio(own, times["loop without noise"]), ratio(own, times["nn.LSTM"])]
        lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines), flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="where to write the tables, such as docs/benchmarks/lstm.md")
    args = parser.parse_args()
    th.set_num_threads(1)
    th.manual_seed(0)
    warm_allocator()
    check_form(SHAPES[0])
    lines = [head_of("Cost of the LSTM", __doc__)]
    for shape in SHAPES:
        lines += table(shape, args.rounds)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
