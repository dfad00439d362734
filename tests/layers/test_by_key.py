"""Every input under each of a few keys: the weights of each key are made once, and outputs are those of the keys' rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from cases import FLIPOUT, NOISES, noise_id
from kinds import build
from torch import nn

from sb3_flipout.layers import perturbed
from sb3_flipout.layers.embedding import OneHotLinear
from sb3_flipout.layers.row_layout import RowLayout
from sb3_flipout.layers.row_view import RowView
from sb3_flipout.noise import FAMILIES, RowNoise, RowsByKey

KEYS = th.tensor([7, -3, 2**40])
K = len(KEYS)


def floats(*shape: int) -> Any:
    return lambda inputs: th.randn(inputs, *shape, dtype=th.float64)


def indices(*shape: int) -> Any:
    return lambda inputs: th.randint(0, 5, (inputs, *shape))


KINDS: dict[str, tuple[Any, Any]] = {
    "linear": (lambda: nn.Linear(4, 3), floats(4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), floats(4)),
    "linear on tokens": (lambda: nn.Linear(4, 3), floats(2, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), floats(2, 4, 5)),
    "convolution, no bias": (lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), floats(4, 4, 5)),
    "embedding": (lambda: nn.Embedding(5, 3), indices()),
    "embedding with padding": (
        lambda: nn.Embedding(5, 3, padding_idx=1),
        lambda inputs: th.tensor([1, 0, 1, 4]).repeat(10)[:inputs],
    ),
    "embedding of several": (lambda: nn.Embedding(5, 3, padding_idx=1), indices(2, 3)),
    "one-hot": (lambda: OneHotLinear(5, 3), indices()),
    "one-hot of several": (lambda: OneHotLinear(5, 3), indices(2)),
}


def rows_by_key(inputs: int, scale: float) -> tuple[RowsByKey, RowNoise]:
    """The rows sorted by key, and the same as plain rows."""
    return RowsByKey(KEYS, scale, th.arange(K * inputs)), RowNoise(KEYS.repeat_interleave(inputs), scale)


def means_can_be_zero(kind: str, noise: dict[str, Any]) -> bool:
    """As priors are: relative noise would be 0, and tables are looked up in any case."""
    return (
        noise["noise_sharing"] == "flipout" and not FAMILIES[noise["family"]].relative and not kind.startswith(("emb", "one"))
    )


CASES = [
    pytest.param(kind, noise, zero, id=f"{kind}-{noise_id(noise)}{'-means are 0' if zero else ''}")
    for kind in KINDS
    for noise in NOISES
    if noise["noise_sharing"] != "independent"
    for zero in ((False, True) if means_can_be_zero(kind, noise) else (False,))
]


@pytest.mark.parametrize("inputs", [1, 2, 40])
@pytest.mark.parametrize(("kind", "noise", "mean_is_zero"), CASES)
def test_outputs_are_those_of_the_rows(kind: str, noise: dict[str, Any], mean_is_zero: bool, inputs: int) -> None:
    made, given = KINDS[kind]
    layer = build(made, noise)
    if mean_is_zero:
        with th.no_grad():
            for mean in layer.means():
                mean.zero_()
        layer.mean_is_zero = True
    x, (by_key, rows) = given(inputs), rows_by_key(inputs, 0.7)
    with perturbed(layer, rows):
        expected = layer(x.repeat(K, *[1] * (x.dim() - 1)))
    learned = [p for p in layer.parameters() if p.requires_grad]
    for presented in (x, x.repeat(K, *[1] * (x.dim() - 1))):
        with perturbed(layer, by_key):
            found = layer(presented)
        th.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        if not found.requires_grad:
            continue
        gradients = [th.autograd.grad(y.cos().sum(), learned, retain_graph=True, allow_unused=True) for y in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                th.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("inputs", "pays"), [(9, False), (10, True)])
@pytest.mark.parametrize("once", [True, False])
def test_weights_are_made_where_they_are_fewer_than_the_inputs(inputs: int, pays: bool, once: bool) -> None:
    layer: Any = build(lambda: nn.Linear(4, 10), {})
    by_key, _ = rows_by_key(inputs, 1.0)
    view = RowView(by_key, (th.zeros(K, 4), th.zeros(K, 10)), K * inputs)
    assert layer._weights_pay(th.zeros(inputs if once else K * inputs, 4), view) is pays


@pytest.mark.parametrize("why", ["factors of rank one", "rows lie elsewhere", "inputs have no rows", "too few rows"])
def test_weights_are_not_made_where_they_cannot_be_used(why: str) -> None:
    layer: Any = build(lambda: nn.Linear(4, 3), dict(family="lowrank") if why == "factors of rank one" else {})
    by_key, _ = rows_by_key(40, 1.0)
    view = RowView(by_key, (th.zeros(K, 4), th.zeros(K, 3)), K * 40)
    x = {"inputs have no rows": th.zeros(40 * K), "too few rows": th.zeros(60, 4)}.get(why, th.zeros(40, 4))
    if why == "rows lie elsewhere":
        assert layer._weights_pay(x, view)
        layer.row_layout = RowLayout(0, "tiled")
    assert layer._weights_pay(x, view) is False


@pytest.mark.parametrize("noise", FLIPOUT, ids=noise_id)
def test_another_number_of_rows_is_refused(noise: dict[str, Any]) -> None:
    layer = build(lambda: nn.Linear(4, 3), noise)
    by_key, _ = rows_by_key(40, 1.0)
    with perturbed(layer, by_key), pytest.raises(ValueError, match=r"got an input of shape \(60, 4\) and keys for 120 rows"):
        layer(th.randn(60, 4, dtype=th.float64))
