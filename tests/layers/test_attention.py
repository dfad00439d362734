"""Attention under noise is attention with each row's own projections, whatever its masks, shapes and options."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch as th
from cases import every_noise
from torch import nn

from sb3_flipout.layers import effective_weight, perturb, perturbed
from sb3_flipout.layers.attention import FlipoutMultiheadAttention
from sb3_flipout.layers.row_layout import RowLayout

N, L, S, E, HEADS = 3, 4, 5, 6, 2
KEYS, SCALES = th.tensor([7, -3, 2**40]), th.tensor([1.0, 0.5, 2.0], dtype=th.float64)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": dict(batch_first=True),
    "no bias": dict(bias=False),
    "own sizes": dict(kdim=3, vdim=2, batch_first=True),
    "own sizes, no bias": dict(kdim=3, vdim=2, bias=False),
}


def build(form: dict[str, Any], noise: dict[str, Any]) -> FlipoutMultiheadAttention:
    th.manual_seed(0)
    net = nn.Sequential(nn.MultiheadAttention(E, HEADS, **form)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)  # biases are 0 in torch's own
    perturb(net, **noise, **({} if noise.get("family") == "dropconnect" else dict(sigma_init=0.3)))
    (layer,) = net
    assert isinstance(layer, FlipoutMultiheadAttention)
    return layer.eval()


def inputs(form: dict[str, Any]) -> list[th.Tensor]:
    sizes = ((L, E), (S, form.get("kdim", E)), (S, form.get("vdim", E)))
    drawn = [th.randn(N, *size, dtype=th.float64) for size in sizes]
    return drawn if form.get("batch_first") else [x.transpose(0, 1) for x in drawn]


def row_by_row(layer: FlipoutMultiheadAttention, form: dict[str, Any], given: Any, masks: Any, **options: Any) -> Any:
    """The slow way: one torch module per row, with that row's weights."""
    found = []
    for row, (key, scale) in enumerate(zip(KEYS, SCALES, strict=True)):
        own = nn.MultiheadAttention(E, HEADS, **{**form, "batch_first": True}).double().eval()
        own.load_state_dict({name: value for name, value in layer.state_dict().items() if name in own.state_dict()})
        with th.no_grad():
            for block in layer.blocks:
                weight, bias = effective_weight(layer, key, float(scale), block.weight)
                getattr(own, block.weight).copy_(weight)
                if block is layer.blocks[0] and bias is not None:
                    own.in_proj_bias.copy_(bias)
            weight, bias = effective_weight(layer.out_proj, key, float(scale))
            own.out_proj.weight.copy_(weight)
            if bias is not None:
                own.out_proj.bias.copy_(bias)
        rows = [(x if form.get("batch_first") else x.transpose(0, 1))[row : row + 1] for x in given]
        padding, pairs = masks
        pairs = pairs if pairs is None or pairs.dim() == 2 else pairs.view(N, HEADS, L, S)[row]
        found.append(own(*rows, None if padding is None else padding[row : row + 1], attn_mask=pairs, **options))
    outputs = th.cat([output for output, _ in found])
    weights = None if found[0][1] is None else th.cat([weights for _, weights in found])
    return outputs if form.get("batch_first") else outputs.transpose(0, 1), weights


def same(found: Any, expected: Any) -> None:
    th.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        th.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@every_noise
def test_each_row_attends_with_its_own_projections(form: dict[str, Any], noise: dict[str, Any]) -> None:
    layer, given = build(form, noise), inputs(form)
    with perturbed(layer, KEYS, SCALES), th.no_grad():
        found = layer(*given)
    same(found, row_by_row(layer, form, given, (None, None)))


PADDING = th.tensor([[0, 0, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], dtype=th.bool)
PAIRS = th.tensor([[0, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=th.bool)
BY_HEAD = th.stack([PAIRS if n % 2 else PAIRS.flip(0) for n in range(N * HEADS)])
MASKS = {
    "padding": (PADDING, None),
    "pairs": (None, PAIRS),
    "pairs by head": (None, BY_HEAD),
    "both": (PADDING, PAIRS),
    "both, by head": (PADDING, BY_HEAD),
    "numbers": (PADDING * -1.5, PAIRS * 0.7),
    "numbers by head": (None, BY_HEAD * -0.3),
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("form", ["plain", "batch_first"])
@pytest.mark.parametrize(("need", "average"), list(product([True, False], repeat=2)))
def test_masks_and_weights(masks: Any, form: str, need: bool, average: bool) -> None:
    layer, given = build(FORMS[form], {}), inputs(FORMS[form])
    masks = tuple(mask if mask is None or mask.dtype == th.bool else mask.double() for mask in masks)
    options = dict(need_weights=need, average_attn_weights=average)
    with perturbed(layer, KEYS, SCALES), th.no_grad():
        found = layer(*given, masks[0], attn_mask=masks[1], **options)
        by_place = layer(*given, masks[0], need, masks[1], average)
    same(found, row_by_row(layer, FORMS[form], given, masks, **options))
    same(by_place, found)


@pytest.mark.parametrize("masks", [(PADDING, None), (None, PAIRS), (PADDING, BY_HEAD)])
def test_without_noise_masks_and_options_are_torch_s(masks: Any) -> None:
    layer, given = build({}, {}), inputs({})
    plain = nn.MultiheadAttention(E, HEADS).double().eval()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in plain.state_dict()})
    for options in ({}, dict(need_weights=False), dict(average_attn_weights=False)):
        same(layer(*given, masks[0], attn_mask=masks[1], **options), plain(*given, masks[0], attn_mask=masks[1], **options))
    assert layer(*given)[1].shape == (N, L, S), "weights are given, averaged over heads, unless it is said otherwise"
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=th.float64)
    same(
        layer(given[0], given[0], given[0], None, False, causal, True, True),
        plain(given[0], given[0], given[0], None, False, causal, True, True),
    )
    with perturbed(layer, KEYS), th.no_grad():
        shown = layer(*given)[1]
        assert shown is not None and shown.shape == (N, L, S)


def test_dropout_is_drawn_while_training_only() -> None:
    layer, given = build(dict(dropout=0.5), {}), inputs({})
    with perturbed(layer, KEYS), th.no_grad():
        for need in (True, False):
            assert th.equal(layer(*given, need_weights=need)[0], layer(*given, need_weights=need)[0])
            layer.train()
            assert not th.equal(layer(*given, need_weights=need)[0], layer(*given, need_weights=need)[0])
            layer.eval()
        layer.train()
        zeros = (layer(*given, average_attn_weights=False)[1] == 0).double().mean()
    # 120 weights; a share outside [0.2, 0.8] has a probability below 1e-10 (Hoeffding: 2 exp(-2 * 120 * 0.3 ** 2) = 9e-10)
    assert 0.2 < float(zeros) < 0.8


@pytest.mark.parametrize("order", ["interleaved", "tiled"])
@pytest.mark.parametrize("form", ["batch_first", "own sizes"])
@every_noise
def test_sequences_that_are_folded_into_the_batch(form: str, noise: dict[str, Any], order: Any) -> None:
    """Two sequences of each row: those that lie behind one another are as those of two passes."""
    layer, options = build(FORMS[form], noise), dict(FORMS[form], batch_first=True)
    layer.batch_first = True
    first, second = inputs(options), inputs(options)
    joined = [
        th.stack(pair, 1).flatten(0, 1) if order == "interleaved" else th.cat(pair) for pair in zip(first, second, strict=True)
    ]
    layer.row_layout = RowLayout(0, order)
    with perturbed(layer, KEYS, SCALES), th.no_grad():
        found = layer(*joined)[0]
    parts = found.view(N, 2, L, E).unbind(1) if order == "interleaved" else found.view(2, N, L, E).unbind(0)
    for part, given in zip(parts, (first, second), strict=True):
        th.testing.assert_close(part, row_by_row(layer, options, given, (None, None))[0], rtol=0, atol=1e-12)


def test_the_queries_are_what_rows_are_counted_by() -> None:
    layer = build(dict(batch_first=True), {})
    queries, keys = th.zeros(2, L, E, dtype=th.float64), th.zeros(N, S, E, dtype=th.float64)
    with perturbed(layer, KEYS), pytest.raises(ValueError, match=r"got queries of shape \(2, 4, 6\)"):
        layer(queries, keys, keys)


def test_a_hint_without_a_mask_is_torch_s_error_without_noise() -> None:
    layer, (query, _, _) = build({}, {}), inputs({})
    with pytest.raises(RuntimeError, match="is_causal"):
        layer(query, query, query, need_weights=False, is_causal=True)


@pytest.mark.parametrize("shape", [(2, L, E), (L, E), (1, 2, 3, E)])
def test_another_number_of_sequences_than_rows_is_refused(shape: tuple[int, ...]) -> None:
    layer = build(dict(batch_first=True), {})
    x = th.zeros(shape, dtype=th.float64)
    with perturbed(layer, KEYS), pytest.raises(ValueError) as told:
        layer(x, x, x)
    assert str(told.value) == (
        f"FlipoutMultiheadAttention got queries of shape {shape} (batch first) and keys for 3 rows; it needs one sequence per "
        "row. If the network folds something else into the batch, leave the module out with skip=."
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_queries_are_refused() -> None:
    layer = build(dict(batch_first=True), {})
    nested = th.nested.nested_tensor([th.zeros(L, E, dtype=th.float64)] * N)
    with perturbed(layer, KEYS), pytest.raises(ValueError, match=r"^FlipoutMultiheadAttention got nested queries and keys"):
        layer(nested, nested, nested)


@pytest.mark.parametrize(
    ("option", "why"),
    [("add_bias_kv", "cannot serve add_bias_kv=True"), ("add_zero_attn", "cannot serve add_zero_attn=True"), (None, None)],
)
def test_what_cannot_be_served(option: str | None, why: str | None) -> None:
    plain = nn.MultiheadAttention(E, HEADS, **({} if option is None else {option: True}))
    assert FlipoutMultiheadAttention.why_not(plain) == why


def test_without_noise_an_encoder_hears_its_keywords() -> None:
    th.manual_seed(0)
    net = perturb(nn.Sequential(nn.TransformerEncoderLayer(E, HEADS, 8, batch_first=True))).eval()
    x = th.randn(N, S, E)
    padded, other = net[0](x, src_key_padding_mask=PADDING), x.clone()
    other[PADDING] = 9.0
    th.testing.assert_close(net[0](other, src_key_padding_mask=PADDING)[~PADDING], padded[~PADDING])


class Encoder(nn.Module):
    """An encoder whose fused path reads its children's weights."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, HEADS, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: th.Tensor, mask: Any = None, padding: Any = None) -> Any:
        return self.encoder(x, mask, src_key_padding_mask=padding)


def test_an_encoder_takes_no_fused_path_while_noise_is_active() -> None:
    th.manual_seed(0)
    net = Encoder().eval()
    perturb(net, sigma_init=0.3)
    x, padding = th.randn(N, S, E), PADDING
    own = [
        (module.__dict__.get("activation_relu_or_gelu"), module.__dict__.get("use_nested_tensor")) for module in net.modules()
    ]
    with th.no_grad():
        with perturbed(net, KEYS):
            fast, padded = net(x), net(x, padding=padding)
            masked = net(x, th.ones(S, S, dtype=th.bool).triu(1))
        plain = net(x)
    left = [
        (module.__dict__.get("activation_relu_or_gelu"), module.__dict__.get("use_nested_tensor")) for module in net.modules()
    ]
    assert left == own, "nothing of the modules is left changed"
    with perturbed(net, KEYS):
        slow, slow_padded = net(x), net(x, padding=padding)
        slow_masked = net(x, th.ones(S, S, dtype=th.bool).triu(1))
    th.testing.assert_close(fast, slow)
    th.testing.assert_close(padded[~padding], slow_padded[~padding])
    th.testing.assert_close(masked, slow_masked)
    assert not th.allclose(fast, plain) and not th.allclose(fast, masked)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@every_noise
def test_the_output_projection_alone(form: dict[str, Any], noise: dict[str, Any]) -> None:
    """Torch reads its weights and never calls it, so the attention has to look whether it sees noise."""
    layer, given = build(form, noise), inputs(form)
    plain = nn.MultiheadAttention(E, HEADS, **{**form, "batch_first": True}).double().eval()
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name in plain.state_dict()})
    expected = []
    for row, (key, scale) in enumerate(zip(KEYS, SCALES, strict=True)):
        weight, bias = effective_weight(layer.out_proj, key, float(scale))
        with th.no_grad():
            plain.out_proj.weight.copy_(weight)
            if bias is not None:
                plain.out_proj.bias.copy_(bias)
            rows = [(x if form.get("batch_first") else x.transpose(0, 1))[row : row + 1] for x in given]
            expected.append(plain(*rows))
    outputs, weights = (th.cat(parts) for parts in zip(*expected, strict=True))
    with perturbed(layer.out_proj, KEYS, SCALES), th.no_grad():
        found = layer(*given)
    same(found, (outputs if form.get("batch_first") else outputs.transpose(0, 1), weights))
