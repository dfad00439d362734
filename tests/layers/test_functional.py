"""The mathematics behind the layers: what is summed in parts, in which types, and that no row's weights are written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from cases import NOISES, noise_id
from kinds import KEYS, KINDS, SCALES, build
from torch import nn

from sb3_flipout.layers import functional, perturbed
from sb3_flipout.layers.weights import PerturbedWeights


@pytest.mark.parametrize(
    ("shape", "block", "parts"),
    [
        ((10, 4), 12, [3, 3, 3, 1]),
        ((10, 4), 40, [10]),
        ((10, 4), 39, [9, 1]),
        ((3, 100), 12, [1, 1, 1]),
        ((0, 4), 12, [0]),
        ((2, 0), 12, [2]),
    ],
)
def test_products_are_summed_in_parts_that_stay_in_cache(
    shape: tuple[int, ...], block: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "_BLOCK", block)
    x, s, found = th.randn(shape), th.randn(shape), []

    def summed(product: th.Tensor) -> th.Tensor:
        found.append(len(product))
        return product.sum(1, keepdim=True)

    th.testing.assert_close(functional._summed_products(x, s, summed), (x * s).sum(1, keepdim=True))
    assert found == parts


def test_factors_of_all_rows_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_BLOCK", 12)
    x, s = th.randn(10, 4), th.randn(1, 4)
    found = functional._summed_products(x, s, lambda product: product.sum(1, keepdim=True))
    th.testing.assert_close(found, (x * s).sum(1, keepdim=True))


@pytest.mark.parametrize("block", [12, 1 << 18])
def test_sums_have_the_type_of_the_inputs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast inputs are of half precision, and factors are not."""
    monkeypatch.setattr(functional, "_BLOCK", block)
    x, weight, sigma = th.randn(10, 4).bfloat16(), th.randn(3, 4).bfloat16(), th.tensor(0.5)
    types = []

    def summed(product: th.Tensor) -> th.Tensor:
        types.append(product.dtype)
        return product.sum(1, keepdim=True)

    s, r = th.randn(10, 4), th.randn(10, 3)
    found = functional.rank_one(nn.functional.linear, summed, x, (weight, None), sigma, s, r)
    assert found.dtype == th.bfloat16 and set(types) == {th.bfloat16}
    expected = x.float() @ weight.float().T + r * sigma * (x.float() * s).sum(1, keepdim=True)
    th.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float32])
def test_factors_in_full_precision_do_not_change_the_type(dtype: th.dtype) -> None:
    x, weight, bias = th.randn(10, 4, dtype=dtype), th.randn(3, 4, dtype=dtype), th.randn(3, dtype=dtype)
    deltas = th.randn(3, 4, dtype=dtype), th.randn(3, dtype=dtype)
    s, r = th.randn(10, 4).sign(), th.randn(10, 3).sign()
    found = functional.flipout(nn.functional.linear, x, (weight, bias), deltas, s, r)
    assert found.dtype == dtype
    of_noise = nn.functional.linear(x.float() * s, deltas[0].float(), deltas[1].float()) * r
    expected = nn.functional.linear(x.float(), weight.float(), bias.float()) + of_noise
    th.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.1)


def _no_row_weights(*_: Any) -> Any:
    pytest.fail("the weights of each row are written down, where factors are enough")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [one for one in NOISES if one["noise_sharing"] != "independent"], ids=noise_id)
def test_no_row_s_weights_are_written_down(kind: str, noise: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, inputs = KINDS[kind]
    layer = build(made, noise)
    monkeypatch.setattr(PerturbedWeights, "row_weights", _no_row_weights)
    with perturbed(layer, KEYS, SCALES), th.no_grad():
        assert len(layer(*inputs())) == len(KEYS)
