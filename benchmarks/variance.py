"""Does the gradient's variance fall as one over the batch size? Flipout, one draw for all rows, a draw for each row.

    python benchmarks/variance.py --out docs/benchmarks/variance.md

The protocol of Wen et al. 2018, section 4.1 and figure 1, on made data: a partially trained classifier of Gaussian clusters,
fully connected (three layers), convolutional (two convolutions and a linear layer) or recurrent (an LSTM that reads the image
row by row under one key, and a linear layer), is frozen; for each batch size N, many gradients of the mean cross-entropy are
taken, each with N examples, base and keys drawn anew. (Examples come from the
distribution, there is no end to them: a finite set drawn from without replacement would make the lines steeper.) What is
reported is the variance of a gradient entry, averaged over the mean weights and biases, with its standard error.

Reading: averaging over independent rows divides the variance by N, a slope of -1 on logarithms. Rows that share a draw
(`shared`, as in NoisyNet) share a part that averaging does not touch, and the line flattens. Theorem 2 of the paper: the
variance is alpha / N + gamma (N - 1) / N, and flipout's gamma is small, not 0, since the sizes of the base are shared. The
slopes' errors are statistical; the slope of a line that bends depends on the range. `independent` goes row by row through a
convolution, the slowest part by far; --by-row ends it earlier.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch as th
import torch.nn.functional as F
from runs import head_of
from torch import nn

from sb3_flipout import perturb, perturbed, redraw
from sb3_flipout.diagnostics import Batch, Estimate, gradient_variance, log_log_slope
from sb3_flipout.noise import fold_in
from sb3_flipout.noise.families import NOISE_SHARINGS

CLASSES = 10
SIZES = [2**power for power in range(11)]  # 1 to 1024
LARGE = 128  # from here on, the second slope

Curve = dict[int, Estimate]  # batch size -> variance


def fully_connected() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


class Recurrent(nn.Module):
    """Reads an image as a sequence of its 8 rows; its LSTM and its linear layer see the same keys."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, CLASSES)

    def forward(self, x: th.Tensor) -> th.Tensor:
        classes: th.Tensor = self.head(self.lstm(x.view(-1, 8, 8))[0][:, -1])
        return classes


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "fully connected": fully_connected,
    "convolutional": convolutional,
    "recurrent": Recurrent,
}
CENTRES = th.randn(CLASSES, 64, generator=th.Generator().manual_seed(0))


def examples(size: int, seed: int) -> Batch:
    """Examples of random classes: their centre plus noise of twice its size, as images of 8 x 8 pixels laid flat."""
    generator = th.Generator().manual_seed(seed)
    labels = th.randint(0, CLASSES, (size,), generator=generator)
    return CENTRES[labels] + 2.0 * th.randn(size, 64, generator=generator), labels


def cross_entropy(network: nn.Module, batch: Batch) -> th.Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


def partially_trained(name: str, sharing: str, sigma_init: float, steps: int) -> nn.Module:
    """The same weights for all sharings: trained under flipout, whatever is measured afterwards."""
    th.manual_seed(1)
    network = perturb(NETWORKS[name](), sigma_init=sigma_init)
    optimizer = th.optim.Adam(network.parameters(), lr=1e-3)
    for step in range(steps):
        redraw(network, step)
        with perturbed(network, fold_in(step, th.arange(128))):
            loss = cross_entropy(network, examples(128, 10**9 + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    measured = perturb(NETWORKS[name](), sigma_init=sigma_init, noise_sharing=sharing)
    measured.load_state_dict(network.state_dict())
    return measured


def curve(network: nn.Module, sizes: list[int], repeats: int) -> Curve:
    return {
        size: gradient_variance(
            network, cross_entropy, lambda repeat, n=size: examples(n, 2048 * repeat + n), repeats, seed=size
        )
        for size in sizes
    }


def slope(found: Curve, least: int = 1) -> str:
    sizes = [size for size in found if size >= least]
    if len(sizes) < 2:
        return "-"
    fitted = log_log_slope(sizes, [found[size].value for size in sizes], [found[size].error for size in sizes])
    return f"{fitted.value:.3f} ± {fitted.error:.3f}"


def tables(name: str, curves: dict[str, Curve]) -> list[str]:
    lines = [f"\n## {name.capitalize()}\n", f"| N | {' | '.join(curves)} |", f"|---:|{'---:|' * len(curves)}"]
    for size in SIZES:
        cells = [f"{c[size].value:.3e} ± {c[size].error:.0e}" if size in c else "-" for c in curves.values()]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    lines.append(f"| slope | {' | '.join(slope(c) for c in curves.values())} |")
    lines.append(f"| slope from {LARGE} | {' | '.join(slope(c, LARGE) for c in curves.values())} |")
    return lines


def draw(results: dict[str, dict[str, Curve]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5 * len(results), 4), squeeze=False)
    for ax, (name, curves) in zip(axes[0], results.items(), strict=True):
        for (sharing, found), marker in zip(curves.items(), "osx", strict=True):
            values, errors = zip(*found.values(), strict=True)
            ax.errorbar(list(found), values, errors, label=sharing, marker=marker, markersize=4, linewidth=1, capsize=2)
        first = curves["flipout"][SIZES[0]].value
        ax.plot(SIZES, [first / size for size in SIZES], "k:", linewidth=1, label="1 / N")
        ax.set(xscale="log", yscale="log", xlabel="batch size N", ylabel="variance of a gradient entry", title=name)
        ax.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--by-row", type=int, default=1024, help="largest batch of independent rows in a convolution")
    parser.add_argument("--train-steps", type=int, default=100)
    parser.add_argument("--sigma-init", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/variance.md"), help="the figure lies beside it")
    args = parser.parse_args()
    th.set_num_threads(1)
    start, lines = time.perf_counter(), []
    results: dict[str, dict[str, Curve]] = {name: {} for name in NETWORKS}
    for name, curves in results.items():
        for sharing in NOISE_SHARINGS:
            by_row = (name, sharing) == ("convolutional", "independent")
            sizes = [size for size in SIZES if size <= args.by_row] if by_row else SIZES
            network = partially_trained(name, sharing, args.sigma_init, args.train_steps)
            curves[sharing] = curve(network, sizes, args.repeats)
        lines += tables(name, curves)
        print("\n".join(lines[-len(SIZES) - 5 :]), flush=True)
    figure = args.out.with_suffix(".png")
    draw(results, figure)
    caption = f"\n![Variance against batch size, on logarithmic axes]({figure.name})"
    head = head_of("Variance of the gradient", __doc__, f"{time.perf_counter() - start:.0f} s")
    args.out.write_text("\n".join([head, *lines, caption]) + "\n")


if __name__ == "__main__":
    main()
