"""GRUs: outputs, last states and gradients are those of one torch module per sequence; packed, folded and stacked ones too."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from cases import every_noise
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from weights_of_rows import weights_of_row

from sb3_flipout.layers import FlipoutLayer, effective_weight, perturb, perturbed
from sb3_flipout.layers.row_layout import RowLayout

N, T, IN, HIDDEN = 3, 4, 2, 5
KEYS, SCALES = th.tensor([7, -3, 2**40]), th.tensor([1.0, 0.5, -2.0], dtype=th.float64)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": dict(batch_first=True),
    "no bias": dict(bias=False),
    "two layers": dict(num_layers=2),
    "two layers, no bias": dict(num_layers=2, bias=False, batch_first=True),
}


def build(form: dict[str, Any], noise: dict[str, Any], kind: Any = nn.GRU) -> Any:
    th.manual_seed(0)
    net = nn.Sequential(kind(IN, HIDDEN, **form)).double()
    perturb(net, **noise, **({} if noise.get("family") == "dropconnect" else dict(sigma_init=0.3)))
    assert isinstance(net[0], FlipoutLayer)
    return net[0]


def row_by_row(layer: Any, form: dict[str, Any], sequences: list[th.Tensor], before: th.Tensor | None, owners: Any) -> Any:
    """The slow way: sequence by sequence, (T, IN) each, with the weights of the row that it belongs to."""
    plain, outputs, states = layer.PLAIN(IN, HIDDEN, **{**form, "batch_first": False}).double(), [], []
    for place, (x, row) in enumerate(zip(sequences, owners, strict=True)):
        weights = weights_of_row(layer, KEYS[row], float(SCALES[row]))
        given = (x[:, None],) if before is None else (x[:, None], before[:, place : place + 1].contiguous())
        output, state = functional_call(plain, weights, given)
        outputs.append(output[:, 0])
        states.append(state[0] if isinstance(state, tuple) else state)
    return outputs, th.cat(states, dim=1)


def close(found: th.Tensor, expected: th.Tensor, atol: float = 1e-12) -> None:
    th.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("state", [False, True])
@every_noise
def test_each_sequence_sees_its_own_weights(form: dict[str, Any], state: bool, noise: dict[str, Any]) -> None:
    layer = build(form, noise)
    x = th.randn(T, N, IN, dtype=th.float64)
    before = th.randn(form.get("num_layers", 1), N, HIDDEN, dtype=th.float64) if state else None
    outputs, states = row_by_row(layer, form, list(x.unbind(1)), before, range(N))
    expected = th.stack(outputs, dim=1)
    with perturbed(layer, KEYS, SCALES):
        found, after = layer(x.transpose(0, 1) if form.get("batch_first") else x, before)
    close(found.transpose(0, 1) if form.get("batch_first") else found, expected)
    close(after, states)
    learned = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    fast = th.autograd.grad(found.square().sum() + after.sum(), learned, allow_unused=True)
    slow = th.autograd.grad(expected.square().sum() + states.sum(), learned, allow_unused=True)
    for one, other in zip(fast, slow, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other, 1e-10)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("lengths", "sort"), [((4, 2, 1), True), ((1, 4, 2), False), ((3, 3, 3), True)])
def test_packed_sequences(form: dict[str, Any], lengths: tuple[int, ...], sort: bool) -> None:
    layer, first = build(form, {}), bool(form.get("batch_first"))
    sequences = [th.randn(length, IN, dtype=th.float64) for length in lengths]
    before = th.randn(form.get("num_layers", 1), N, HIDDEN, dtype=th.float64)
    outputs, states = row_by_row(layer, form, sequences, before, range(N))
    with perturbed(layer, KEYS, SCALES), th.no_grad():
        packed, after = layer(pack_sequence(sequences, enforce_sorted=sort), before)
    given = pack_sequence(sequences, enforce_sorted=sort)
    for order, kept in ((packed.sorted_indices, given.sorted_indices), (packed.unsorted_indices, given.unsorted_indices)):
        assert (order is None) == (kept is None) and (kept is None or th.equal(order, kept))
    padded, found = pad_packed_sequence(packed, batch_first=first)
    assert found.tolist() == list(lengths)
    for row, output in enumerate(outputs):
        close((padded[row] if first else padded[:, row])[: lengths[row]], output)
    close(after, states)


def test_packed_sequences_of_another_number_are_refused() -> None:
    layer = build({}, {})
    packed = pack_padded_sequence(th.zeros(3, 2, IN, dtype=th.float64), th.tensor([3, 1]))
    with perturbed(layer, KEYS), pytest.raises(ValueError) as told:
        layer(packed)
    assert str(told.value) == (
        "FlipoutGRU got 2 packed sequences of 4 steps in all and keys for 3 rows; give one key per sequence (2), held over "
        "its steps, or one per sequence and step (4)."
    )


@pytest.mark.parametrize("order", ["interleaved", "tiled"])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("first", [False, True])
@every_noise
def test_sequences_that_are_folded(order: Any, kind: Any, first: bool, noise: dict[str, Any]) -> None:
    layer = build(dict(batch_first=first), noise, kind)
    layer.row_layout = RowLayout(0 if first else 1, order)
    owners = [row for row in range(N) for _ in range(2)] if order == "interleaved" else list(range(N)) * 2
    x = th.randn(T, 2 * N, IN, dtype=th.float64)
    outputs, states = row_by_row(layer, {}, list(x.unbind(1)), None, owners)
    with perturbed(layer, KEYS, SCALES), th.no_grad():
        found, after = layer(x.transpose(0, 1) if first else x)
    close(found.transpose(0, 1) if first else found, th.stack(outputs, dim=1))
    close(after[0] if kind is nn.LSTM else after, states)


@pytest.mark.parametrize("bias", [False, True])
def test_a_key_for_each_step(bias: bool) -> None:
    layer = build(dict(bias=bias), {})
    keys = th.arange(T * N) * 3 + 1
    x = th.randn(T, N, IN, dtype=th.float64)
    with perturbed(layer, keys), th.no_grad():
        found, _ = layer(x)
    for row in range(N):
        h = th.zeros(1, HIDDEN, dtype=th.float64)
        for t in range(T):
            cell = nn.GRUCell(IN, HIDDEN, bias=bias).double()
            with th.no_grad():
                for kind in ("ih", "hh"):
                    weight, own = effective_weight(layer, keys[t * N + row], 1.0, f"weight_{kind}_l0")
                    getattr(cell, f"weight_{kind}").copy_(weight)
                    if own is not None:
                        getattr(cell, f"bias_{kind}").copy_(own)
                h = cell(x[t, row : row + 1], h)
            close(found[t, row], h[0])
