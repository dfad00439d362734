"""Where the rows of a batch lie in a layer's input.

Most layers get one row of input per row of the batch, in the first dimension. Some networks fold others into it (entities,
frames) or put time first. Sizes alone do not tell: five frames of five rows look like five rows of five frames. So a policy
finds out, by changing one observation at a time and looking which rows of each layer's input change (:func:`find_layouts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch as th
from torch import nn

Order = Literal["plain", "interleaved", "tiled"]


class RowLayout(NamedTuple):
    """
    Where rows lie.

    :param dim: The dimension of the input that holds them
    :param order: ``"plain"``: one entry per row; ``"interleaved"``: all entries of the first row, then those of the second;
        ``"tiled"``: the first entry of every row, then the second of every row
    """

    dim: int = 0
    order: Order = "plain"

    def fits(self, size: int, rows: int) -> bool:
        """
        Tell whether a dimension of a size can hold that many rows.

        :param size: Size of the dimension
        :param rows: Number of rows
        :return: Whether it can
        """
        return size == rows if self.order == "plain" else rows > 0 and size % rows == 0

    def spread(self, values: th.Tensor, size: int) -> th.Tensor:
        """
        Repeat what rows have, so that each entry of the input's dimension has its row's.

        :param values: Values of N rows, shape (N, ...)
        :param size: Size of the dimension that holds them
        :return: Shape (size, ...)
        """
        if self.order == "plain":
            return values
        times = size // len(values)
        if self.order == "interleaved":
            return values.repeat_interleave(times, dim=0)
        return values.repeat(times, *[1] * (values.dim() - 1))


#: The usual one.
FIRST = RowLayout()

# How many observations the search looks at: a size that no fold of a real network is likely to have by chance.
PROBED_ROWS = 7
_FEWER_ROWS = 5  # in one more look: what has a size by chance keeps it


class _Unclear(Exception):
    """What a layer sees belongs to no row in a way that has a name here."""


def find_layouts(
    layers: Mapping[str, nn.Module],
    run: Callable[[Any], Any],
    observations: Any,
    changed: Callable[[Any, int], Any],
    dim_of_rows: Callable[[nn.Module, th.Tensor], int],
) -> dict[str, RowLayout | None]:
    """
    Find where the rows of a batch lie in the inputs of layers, by experiment.

    :param layers: Layers by name
    :param run: Runs the network on a batch of observations
    :param observations: Batch of ``PROBED_ROWS`` observations
    :param changed: Makes of a batch the same one with another observation in the row of a number
    :param dim_of_rows: The dimension of a layer's input that is its batch dimension by torch's convention
    :return: Layout of each layer that was called; ``None`` where it is unclear
    """
    seen = _inputs(layers, run, observations)
    changes: dict[str, list[list[th.Tensor]]] = {name: [[] for _ in calls] for name, calls in seen.items()}
    for row in range(PROBED_ROWS):
        for name, calls in _inputs(layers, run, changed(observations, row)).items():
            if len(calls) != len(seen.get(name, ())):
                return {}  # calls depend on the data: nothing can be said
            for number, (before, after) in enumerate(zip(seen[name], calls, strict=True)):
                if before.shape != after.shape:
                    return {}
                changes[name][number].append(_changed(before, after))
    found = {name: _common(layers[name], seen[name], changes[name], dim_of_rows) for name in seen}
    fewer = _inputs(layers, run, observations[:_FEWER_ROWS])
    return {name: layout if _grows(layout, seen[name], fewer.get(name, [])) else None for name, layout in found.items()}


def _grows(layout: RowLayout | None, inputs: list[th.Tensor], of_fewer: list[th.Tensor]) -> bool:
    """Whether the dimension in which the rows are said to lie grows with their number."""
    if layout is None or len(inputs) != len(of_fewer):
        return layout is not None  # calls that depend on the number of rows tell nothing
    sizes = [(x.shape[layout.dim], y.shape[layout.dim]) for x, y in zip(inputs, of_fewer, strict=True)]
    return all(size * _FEWER_ROWS == smaller * PROBED_ROWS for size, smaller in sizes)


def _changed(before: th.Tensor, after: th.Tensor) -> th.Tensor:
    """Where two inputs differ by more than rounding, which may depend on the rest of the batch."""
    if not before.is_floating_point():
        return before != after
    largest = float(before.abs().nan_to_num().max()) if before.numel() else 0.0
    return ~th.isclose(before, after, rtol=0.0, atol=1e-5 * largest, equal_nan=True)


def _inputs(layers: Mapping[str, nn.Module], run: Callable[[Any], Any], observations: Any) -> dict[str, list[th.Tensor]]:
    found: dict[str, list[th.Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else named.get("input", named.get("query"))
            if isinstance(x, th.Tensor) and not x.is_nested:
                found.setdefault(name, []).append(x.detach().clone())

        return hook

    handles = [layer.register_forward_pre_hook(record(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run(observations)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _common(
    layer: nn.Module,
    inputs: list[th.Tensor],
    changes: list[list[th.Tensor]],
    dim_of_rows: Callable[[nn.Module, th.Tensor], int],
) -> RowLayout | None:
    """The layout of all calls of a layer, if they have one in common."""
    try:
        found = {_layout(x, of_rows, dim_of_rows(layer, x)) for x, of_rows in zip(inputs, changes, strict=True)}
    except _Unclear:
        return None
    return found.pop() if len(found) == 1 else None


def _layout(x: th.Tensor, changes: list[th.Tensor], dim: int) -> RowLayout:
    # Torch's batch dimension first; linear layers take rows in any other dimension but the last, too.
    candidates = [RowLayout(dim, order) for order in ("plain", "interleaved", "tiled")]
    if dim == 0:
        candidates += [RowLayout(other) for other in range(1, x.dim() - 1)]
    if not any(bool(change.any()) for change in changes):
        # Nothing here depends on the observations: either units that have died, or inputs that are the same for all rows.
        if x.shape[dim] == len(changes):
            return candidates[0]
        raise _Unclear
    for layout in candidates:
        if layout.fits(x.shape[layout.dim], len(changes)) and _explains(layout, x.shape[layout.dim], changes):
            return layout
    raise _Unclear


def _explains(layout: RowLayout, size: int, changes: list[th.Tensor]) -> bool:
    """Whether only those entries changed that belong to the row whose observation changed."""
    owners = layout.spread(th.arange(len(changes)), size)
    for row, change in enumerate(changes):
        others = change.transpose(0, layout.dim)[owners.to(change.device) != row]
        if bool(others.any()):
            return False
    return True
