"""Where rows lie in the inputs of layers: found by experiment, for every order that has a name, and said where it has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_flipout.layers.row_layout import FIRST, PROBED_ROWS, RowLayout, find_layouts

INTERLEAVED, TILED = RowLayout(0, "interleaved"), RowLayout(0, "tiled")


@pytest.mark.parametrize(
    ("layout", "size", "rows", "fits"),
    [
        (FIRST, 7, 7, True),
        (FIRST, 14, 7, False),
        (FIRST, 0, 0, True),
        *[(layout, *case) for layout in (INTERLEAVED, TILED) for case in ((14, 7, True), (7, 7, True), (13, 7, False))],
        *[(layout, *case) for layout in (INTERLEAVED, TILED) for case in ((5, 1, True), (4, 0, False), (0, 0, False))],
    ],
)
def test_sizes(layout: RowLayout, size: int, rows: int, fits: bool) -> None:
    assert layout.fits(size, rows) is fits


@pytest.mark.parametrize(
    ("layout", "size", "order"),
    [(FIRST, 3, [0, 1, 2]), (INTERLEAVED, 6, [0, 0, 1, 1, 2, 2]), (TILED, 6, [0, 1, 2, 0, 1, 2]), (TILED, 3, [0, 1, 2])],
)
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4)])
def test_what_rows_have_is_spread(layout: RowLayout, size: int, order: list[int], shape: tuple[int, ...]) -> None:
    values = th.randn(shape)
    assert th.equal(layout.spread(values, size), values[order])


class Net(nn.Module):
    """Calls one layer with what it is told."""

    def __init__(self, feed: Callable[[nn.Module, th.Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Identity()
        self.feed = feed

    def forward(self, x: th.Tensor) -> Any:
        return self.feed(self.layer, x)


def changed(observations: th.Tensor, row: int) -> th.Tensor:
    other = observations.clone()
    other[row] += 1.0
    return other


def layout_of(net: Net, dim: int = 0, observations: th.Tensor | None = None) -> RowLayout | str | None:
    if observations is None:
        observations = th.arange(PROBED_ROWS * 4.0).view(PROBED_ROWS, 4) / 10
    found = find_layouts({"layer": net.layer}, net, observations, changed, lambda layer, x: dim)
    assert not net.layer._forward_pre_hooks, "nothing is left behind"
    return found.get("layer", "nothing was said")


def both(layer: nn.Module, first: th.Tensor, second: th.Tensor) -> None:
    layer(first)
    layer(second)


FEEDS: dict[str, tuple[Callable[[nn.Module, th.Tensor], Any], int, RowLayout | str | None]] = {
    "as they are": (lambda layer, x: layer(x), 0, FIRST),
    "two entries of each row": (lambda layer, x: layer(x.view(-1, 2)), 0, INTERLEAVED),
    "all first entries, then all second": (lambda layer, x: layer(th.cat([x[:, :2], x[:, 2:]])), 0, TILED),
    "second dimension": (lambda layer, x: layer(x.view(-1, 2, 2).transpose(0, 1)), 0, RowLayout(1)),
    "third dimension": (lambda layer, x: layer(x.view(-1, 2, 1, 2).permute(1, 2, 0, 3)), 0, RowLayout(2)),
    "last dimension": (lambda layer, x: layer(x.t()), 0, None),
    "second dimension by convention": (lambda layer, x: layer(x.view(-1, 2, 2).transpose(0, 1)), 1, RowLayout(1)),
    "entries of the second dimension": (
        lambda layer, x: layer(x.view(-1, 2, 2).flatten(0, 1).unsqueeze(0)),
        1,
        RowLayout(1, "interleaved"),
    ),
    "first dimension, not by convention": (lambda layer, x: layer(x.unsqueeze(1).unsqueeze(1)), 1, None),
    "rows see each other": (lambda layer, x: layer(x - x.mean(0)), 0, None),
    "rows see each other by rounding": (lambda layer, x: layer(x + 1e-6 * x.mean(0)), 0, FIRST),
    "mean of the rows": (lambda layer, x: layer(x.mean(0, keepdim=True)), 0, None),
    "the same for all": (lambda layer, x: layer(th.ones_like(x)), 0, FIRST),
    "the same for all, of another size": (lambda layer, x: layer(th.ones(3, 2)), 0, None),
    "of that size by chance": (lambda layer, x: layer(th.ones(PROBED_ROWS, 2)), 0, None),
    "reversed": (lambda layer, x: layer(x.flip(0)), 0, None),
    "indices": (lambda layer, x: layer((x * 10).long()), 0, FIRST),
    "with gaps": (lambda layer, x: layer(th.where(th.arange(x.numel()).view_as(x) == 5, th.nan, x)), 0, FIRST),
    "nothing in it": (lambda layer, x: layer(x[:, :0]), 0, FIRST),
    "twice": (lambda layer, x: both(layer, x, 2 * x), 0, FIRST),
    "twice, in two ways": (lambda layer, x: both(layer, x, x.view(-1, 2)), 0, None),
    "twice, and once it is unclear": (lambda layer, x: both(layer, x, x - x.mean(0)), 0, None),
    "by name": (lambda layer, x: layer(input=x.view(-1, 2)), 0, INTERLEAVED),
    "by the name of queries": (lambda layer, x: layer(query=x.view(-1, 2)), 0, INTERLEAVED),
    "not called": (lambda layer, x: x, 0, "nothing was said"),
    "with no tensor": (lambda layer, x: layer("x"), 0, "nothing was said"),
    "with nothing": (lambda layer, x: layer(), 0, "nothing was said"),
    "calls depend on the data": (lambda layer, x: [layer(x) for _ in range(int(x.sum()))], 0, "nothing was said"),
    "shapes depend on the data": (lambda layer, x: layer(x.repeat(1, int(x.sum()))), 0, "nothing was said"),
    "calls depend on the rows": (lambda layer, x: [layer(x) for _ in range(len(x))], 0, FIRST),
}


class Anything(nn.Identity):
    def forward(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(("feed", "dim", "expected"), FEEDS.values(), ids=FEEDS)
def test_layouts(feed: Any, dim: int, expected: Any) -> None:
    assert layout_of(Net(feed, Anything()), dim) == expected


def test_a_failing_network_leaves_no_hook() -> None:
    def fail(layer: nn.Module, x: th.Tensor) -> None:
        layer(x)
        raise RuntimeError("its own")

    net = Net(fail)
    with pytest.raises(RuntimeError, match="its own"):
        layout_of(net)
    assert not net.layer._forward_pre_hooks


def test_small_numbers_count_by_the_largest() -> None:
    far = th.full((PROBED_ROWS, 4), 1e6)
    assert layout_of(Net(lambda layer, x: layer(x + x.mean(0) * 1e-9), Anything()), observations=far) == FIRST
    assert layout_of(Net(lambda layer, x: layer(x.clamp(max=0) + x.mean(0)), Anything())) is None


def test_several_layers_and_one_call_that_a_layer_missed() -> None:
    layers = {"plain": Anything(), "folded": Anything(), "other": Anything()}

    def run(x: th.Tensor) -> None:
        layers["plain"](x)
        layers["folded"](x.view(-1, 2))

    observations = th.arange(PROBED_ROWS * 4.0).view(PROBED_ROWS, 4)
    found = find_layouts(layers, run, observations, changed, lambda layer, x: 0)
    assert found == {"plain": FIRST, "folded": INTERLEAVED}

    def sometimes(x: th.Tensor) -> None:
        layers["plain"](x)
        if float(x[0, 0]) > 0.5:
            layers["other"](x)

    assert find_layouts(layers, sometimes, observations, changed, lambda layer, x: 0) == {}


def test_a_layer_that_few_rows_do_not_reach_tells_nothing_more() -> None:
    net = Net(lambda layer, x: layer(x) if len(x) == PROBED_ROWS else x)
    assert layout_of(net) == FIRST
