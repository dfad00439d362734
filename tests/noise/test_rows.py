"""Row noise: slices lazily, remembers its factors, and rides on tensors and dictionaries."""

from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_flipout.noise import FactorPlan, RowNoise, noise_of, with_noise
from sb3_flipout.noise import rows as rows_module
from sb3_flipout.noise.carried import without_noise
from sb3_flipout.noise.signs import LayerVectors

KEYS = th.arange(20) * 31 - 100
SCALE = th.linspace(-1, 2, 20)
PLAN = FactorPlan([LayerVectors(0, "sign", (70, 3)), LayerVectors(1, "sqrt_normal", (5, 6))])
INDICES: list[Any] = [
    slice(3, 9),
    slice(None, None, 4),
    slice(0, 0),
    th.tensor([4, 4, 0]),
    np.array([7, 1]),
    th.arange(20) % 3 == 0,
    np.arange(20) % 2 == 0,
    [5, 2],
]


@pytest.mark.parametrize("scale", [None, 0.5, SCALE, SCALE.double()], ids=["none", "number", "tensor", "float64"])
def test_keys_and_scales_are_those_given(scale: Any) -> None:
    noise = RowNoise(KEYS, scale)
    assert len(noise) == 20 and th.equal(noise.keys, KEYS)
    expected = th.ones(20) * (1.0 if scale is None else scale)
    assert noise.scale.dtype == th.float32 and th.equal(noise.scale, expected.float())


def in_one_line(index: object) -> str:
    """Name of a case that can be given to pytest again: without line breaks and brackets."""
    return "".join(letter for letter in str(index) if letter.isalnum())


@pytest.mark.parametrize("index", INDICES, ids=in_one_line)
@pytest.mark.parametrize("scale", [None, SCALE], ids=["one", "per_row"])
def test_slices_take_keys_scales_and_factors(index: Any, scale: th.Tensor | None) -> None:
    noise = RowNoise(KEYS, scale)
    part = noise[index]
    where = th.as_tensor(index) if isinstance(index, np.ndarray) else index
    assert th.equal(part.keys, KEYS[where]) and len(part) == len(KEYS[where])
    assert th.equal(part.scale, noise.scale[where])
    assert th.equal(part.factors(PLAN, th.float32), RowNoise(KEYS, scale).factors(PLAN, th.float32)[where])


@pytest.mark.parametrize("limit", [0, 1 << 24], ids=["expands_itself", "expands_in_the_parent"])
@pytest.mark.parametrize("scale", [None, SCALE], ids=["one", "per_row"])
def test_nested_slices(monkeypatch: pytest.MonkeyPatch, limit: int, scale: th.Tensor | None) -> None:
    monkeypatch.setattr(rows_module, "_SHARED_EXPANSION", limit)
    part = RowNoise(KEYS, scale)[2:18][th.tensor([5, 0, 9])][np.array([2, 0])]
    assert part.keys.tolist() == KEYS[[11, 7]].tolist()
    fresh = RowNoise(KEYS[[11, 7]], None if scale is None else scale[[11, 7]])
    for dtype in (th.float32, th.float64):
        assert th.equal(part.factors(PLAN, dtype), fresh.factors(PLAN, dtype))


def test_factors_are_remembered_for_one_plan_and_type() -> None:
    noise, other = RowNoise(KEYS, SCALE), FactorPlan([LayerVectors(3, "sign", (4, 4))])
    first = noise.factors(PLAN, th.float32)
    assert noise.factors(PLAN, th.float32) is first
    for plan, dtype in [(other, th.float32), (PLAN, th.float64), (PLAN, th.float32), (other, th.float64)]:
        found = noise.factors(plan, dtype)
        assert found.dtype == dtype and th.equal(found, plan.expand(KEYS, SCALE, dtype))


def test_a_slice_of_an_expanded_parent_hashes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = RowNoise(KEYS)
    expected = noise.factors(PLAN, th.float32)[4:7]
    monkeypatch.setattr(FactorPlan, "expand", lambda *_: pytest.fail("hashed again"))
    assert th.equal(noise[4:7].factors(PLAN, th.float32), expected)


@pytest.mark.parametrize("own", [None, SCALE], ids=["unit", "scaled"])
@pytest.mark.parametrize("index", [slice(None), *INDICES], ids=in_one_line)
def test_another_scale_for_the_same_rows(own: th.Tensor | None, index: Any) -> None:
    rows = RowNoise(KEYS, own)[index]
    scale = th.linspace(-2, 3, len(rows))
    noise, before = rows.at_scale(scale), rows.factors(PLAN, th.float32).clone()
    assert th.equal(noise.keys, rows.keys) and th.equal(noise.scale, scale)
    assert th.equal(noise.factors(PLAN, th.float32), PLAN.expand(rows.keys, scale, th.float32))
    assert th.equal(noise[:2].factors(PLAN, th.float32), PLAN.expand(rows.keys[:2], scale[:2], th.float32))
    assert th.equal(noise.at_scale(-scale).factors(PLAN, th.float32), PLAN.expand(rows.keys, -scale, th.float32))
    assert th.equal(rows.factors(PLAN, th.float32), before)


def test_another_scale_hashes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RowNoise(KEYS)
    rows.factors(PLAN, th.float32)
    monkeypatch.setattr(FactorPlan, "expand", lambda *_: pytest.fail("hashed again"))
    rows[3:9].at_scale(th.full((6,), 0.5)).factors(PLAN, th.float32)


def test_nothing_is_written_into_what_was_given(untouched_rng: None) -> None:
    keys, scale = KEYS.clone(), SCALE.clone()
    noise = RowNoise(keys, scale)
    noise.factors(PLAN, th.float32)
    noise[3:5].factors(PLAN, th.float64)
    assert th.equal(keys, KEYS) and th.equal(scale, SCALE)


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        (KEYS.float(), TypeError, r"torch\.float32"),
        (KEYS.int(), TypeError, r"torch\.int32"),
        (KEYS.numpy(), TypeError, "ndarray"),
        (KEYS.view(4, 5), ValueError, r"\(4, 5\)"),
    ],
)
def test_bad_keys_are_refused(keys: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        RowNoise(keys)


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (float("nan"), "scale must be finite, got nan"),
        (float("inf"), "scale must be finite, got inf"),
        (th.ones(19), r"shape \(20,\).*got shape \(19,\)"),
        (th.ones(20, 1), r"got shape \(20, 1\)"),
        (th.ones(20, device="meta"), "on meta"),
        (th.where(th.arange(20) == 7, th.nan, 1.0), "got NaN or infinity"),
        (th.where(th.arange(20) == 7, -th.inf, 1.0), "got NaN or infinity"),
    ],
)
def test_bad_scales_are_refused(scale: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RowNoise(KEYS, scale)


def test_a_tensor_carries_noise_and_keeps_its_values() -> None:
    data, noise = th.randn(20, 3), RowNoise(KEYS)
    keyed = with_noise(data, noise)
    assert noise_of(keyed) is noise and noise_of(data) is None
    assert keyed.shape == data.shape and keyed.data_ptr() == data.data_ptr()
    assert th.equal(keyed, data) and isinstance(keyed, th.Tensor)
    plain = without_noise(keyed)
    assert type(plain) is th.Tensor and plain.data_ptr() == data.data_ptr() and noise_of(plain) is None


@pytest.mark.parametrize("index", INDICES, ids=in_one_line)
def test_slicing_a_tensor_slices_its_noise(index: Any) -> None:
    data = th.randn(20, 3)
    part = with_noise(data, RowNoise(KEYS, SCALE))[index]
    assert th.equal(part, data[index])
    assert th.equal(noise_of(part).keys, KEYS[index]) and th.equal(noise_of(part).scale, SCALE[index])
    again = part[1:]
    assert th.equal(noise_of(again).keys, KEYS[index][1:]) and th.equal(again, data[index][1:])


def test_a_tuple_index_selects_rows_by_its_first_item() -> None:
    part = with_noise(th.randn(20, 3), RowNoise(KEYS))[2:5, 1:]
    assert part.shape == (3, 2) and th.equal(noise_of(part).keys, KEYS[2:5])


def test_gradients_flow_through_a_tensor_with_noise() -> None:
    data = th.randn(20, 3, requires_grad=True)
    with_noise(data, RowNoise(KEYS))[3:5].sum().backward()
    assert data.grad is not None and data.grad.sum() == 6 and data.grad[3:5].sum() == 6


def test_a_dictionary_carries_noise_and_keeps_its_tensors() -> None:
    data, noise = {"a": th.randn(20, 3), "b": th.randn(20)}, RowNoise(KEYS)
    keyed = with_noise(data, noise)
    assert noise_of(keyed) is noise and noise_of(data) is None
    assert (
        isinstance(keyed, dict)
        and list(keyed) == ["a", "b"]
        and all(keyed[key].data_ptr() == data[key].data_ptr() for key in data)
    )
    plain = without_noise(keyed)
    assert type(plain) is dict and all(type(part) is th.Tensor for part in plain.values()) and noise_of(plain) is None


@pytest.mark.parametrize("data", [None, 3, "x", th.ones(2), {"a": th.ones(2)}])
def test_what_carries_no_noise_says_so(data: Any) -> None:
    assert noise_of(data) is None
