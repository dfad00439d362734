"""What layers tell of their perturbations as a whole: sums over rows, variances, and none where weights are pruned."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from cases import NOISES, every_noise, noise_id
from kinds import KINDS, build
from torch import nn
from torch.nn.utils import prune

from sb3_flipout.layers import OneHotLinear, perturb, perturbed, weights
from sb3_flipout.layers.recurrent import FlipoutLSTM

SUMMED: dict[str, Any] = {
    **{kind: made for kind, (made, _) in KINDS.items()},
    "linear": lambda: nn.Linear(4, 3),
    "linear, no bias": lambda: nn.Linear(4, 3, bias=False),
    "convolution 2d": lambda: nn.Conv2d(2, 3, (2, 3)),
    "convolution, depthwise": lambda: nn.Conv1d(3, 6, 2, groups=3, bias=False),
    "one-hot": lambda: OneHotLinear(9, 3),
    "lstm": lambda: nn.LSTM(3, 2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "attention, no bias": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=2, bias=False),
}
KEYS = th.tensor([7, -3, 2**40, 7, 11])
SHARES = th.tensor([0.5, -1.0, 2.0, 0.25, 0.0])


@pytest.mark.parametrize("draws", [None, 1, 40])
@pytest.mark.parametrize("kind", SUMMED)
@every_noise
def test_sums_over_rows(kind: str, noise: dict[str, Any], draws: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(SUMMED[kind], noise)
    if draws is not None:
        monkeypatch.setattr(weights, "_LARGEST_DRAW", draws)
    shares, ones = SHARES.double(), th.ones(len(KEYS), dtype=th.float64)
    for block in [None, *layer.blocks]:
        means = (block or layer.blocks[0]).means(layer)
        sums = layer.summed_deltas(KEYS, SHARES, block)
        for mean, rows, total in zip(means, layer.row_weights(KEYS, ones, block), sums, strict=True):
            assert (mean is None) == (rows is None) == (total is None)
            if mean is not None and rows is not None and total is not None:
                expected = th.tensordot(shares, (rows - mean).expand(len(KEYS), *mean.shape), dims=1)
                assert total.dtype == mean.dtype
                th.testing.assert_close(total, expected, rtol=0, atol=1e-12)


#: Variance of a weight and of a bias from sigma and mean; a factor of sqrt|x| has the mean square sqrt(2 / pi).
VARIANCES: dict[str, Any] = {
    "gaussian": lambda sigma, mean: (sigma**2, sigma**2),
    "factorised": lambda sigma, mean: (sigma**2 * 2 / th.pi, sigma**2 * (2 / th.pi) ** 0.5),
    "multiplicative": lambda sigma, mean: ((sigma * mean) ** 2,) * 2,
    "dropconnect": lambda sigma, mean: (mean**2,) * 2,
    "isotropic": lambda sigma, mean: (sigma.expand_as(mean) ** 2,) * 2,
    "lowrank": lambda sigma, mean: (sigma.expand_as(mean) ** 2,) * 2,
}


@pytest.mark.parametrize("kind", ["linear", "linear, no bias", "convolution 2d", "lstm", "attention, no bias"])
@pytest.mark.parametrize("noise", NOISES, ids=noise_id)
def test_variances(kind: str, noise: dict[str, Any]) -> None:
    layer = build(SUMMED[kind], noise)
    for block in [None, *layer.blocks]:
        own = block or layer.blocks[0]
        weight_sigma, bias_sigma = own.sigmas(layer)
        weight, bias = own.means(layer)
        of_weight, of_bias = layer.variances(block)
        th.testing.assert_close(of_weight, VARIANCES[noise["family"]](weight_sigma, weight)[0])
        assert (of_bias is None) == (bias is None)
        if bias is not None:
            sigma = weight_sigma if bias_sigma is None else bias_sigma
            th.testing.assert_close(of_bias, VARIANCES[noise["family"]](sigma, bias)[1])


#: What a layer does with its weights, and what it is given: fewer indices than a table has entries, too.
PRUNED: dict[str, tuple[Any, Any]] = {
    "linear": (nn.functional.linear, lambda: th.randn(len(KEYS), 4, dtype=th.float64)),
    "convolution 2d": (nn.functional.conv2d, lambda: th.randn(len(KEYS), 2, 4, 5, dtype=th.float64)),
    "one-hot": (lambda x, weight, bias: weight[x] + bias, lambda: th.tensor([8, 0, 3, 3, 1])),
}


@pytest.mark.parametrize("pruned", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
@pytest.mark.parametrize("kind", PRUNED)
@every_noise
def test_what_is_pruned_has_no_noise(kind: str, noise: dict[str, Any], pruned: tuple[str, ...]) -> None:
    layer = build(SUMMED[kind], noise)
    masks = {}
    for name in ("weight", "bias"):
        full = th.ones(getattr(layer, name).shape)
        if name in pruned:
            masks[name] = full.clone()
            masks[name].view(-1)[::2] = 0
            prune.custom_from_mask(layer, name, masks[name])
    rows = dict(zip(("weight", "bias"), layer.row_weights(KEYS, th.ones(len(KEYS)), None), strict=True))
    for name, of_rows in rows.items():
        moved = (of_rows != getattr(layer, name)).any(0)
        assert th.equal(moved, masks.get(name, th.ones(moved.shape)) == 1)
    op, x = PRUNED[kind][0], PRUNED[kind][1]()
    of_row = [dict(weight=rows["weight"][i % len(rows["weight"])], bias=rows["bias"][i % len(rows["bias"])]) for i in range(5)]
    expected = th.cat([op(x[i : i + 1], **of_row[i]) for i in range(5)])
    with perturbed(layer, KEYS):
        th.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_a_bias_that_the_layer_has_not_is_not_pruned() -> None:
    layer: Any = perturb(nn.Linear(4, 3, bias=False))
    prune.custom_from_mask(layer, "weight", th.zeros(3, 4))
    delta, delta_bias = layer.deltas()
    assert not delta.any() and delta_bias is None


def test_the_first_weight_is_meant_where_none_is_named() -> None:
    layer = FlipoutLSTM(3, 2)
    first, last = layer.blocks
    assert first.weight == "weight_ih_l0" and layer.variances()[0].shape == layer.variances(first)[0].shape == (8, 3)
    assert layer.variances(last)[0].shape == (8, 2) and layer.summed_deltas(KEYS, SHARES)[0].shape == (8, 3)
