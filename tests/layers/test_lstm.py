"""FlipoutLSTM under noise against weights materialised for each row and step in `oracle_lstm.py`."""

from typing import Any

import oracle_lstm
import pytest
import torch as th
from lstm_cases import (
    HELD,
    HELD_SCALE,
    STEPWISE,
    STEPWISE_SCALE,
    TIGHT,
    H,
    I,
    N,
    T,
    every_lstm_noise,
    every_option,
    make_lstm,
    randn,
    sequences,
    states,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from sb3_flipout.layers import effective_weight, perturbed

# Keys and scales as the layer gets them and as (T, N), for sequences that lie as (T, N, ...).
LYING: dict[str, tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]] = {
    "held": (HELD, HELD_SCALE, HELD.expand(T, N), HELD_SCALE.expand(T, N)),
    "stepwise": (STEPWISE.flatten(), STEPWISE_SCALE.flatten(), STEPWISE, STEPWISE_SCALE),
}
every_lying = pytest.mark.parametrize("lying", LYING)
STARTS = th.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=th.float32)


def assert_same(found: Any, expected: Any) -> None:
    """Outputs and both states."""
    y, (h, c) = found
    for a, b in zip((y, h, c), expected, strict=True):
        assert a.shape == b.shape
        th.testing.assert_close(a, b, **TIGHT)


@every_lying
@every_lstm_noise
def test_each_row_sees_its_own_weights_at_each_step(lying: str, noise: dict[str, str]) -> None:
    lstm, x, hx = make_lstm(**noise), sequences(), states()
    keys, scale, all_keys, all_scales = LYING[lying]
    with perturbed(lstm, keys, scale):
        assert_same(lstm(x, hx), oracle_lstm.forward(lstm, x, all_keys, all_scales, hx))
        assert_same(lstm(x), oracle_lstm.forward(lstm, x, all_keys, all_scales))


@every_lying
@every_option
@pytest.mark.parametrize("sharing", ["flipout", "shared", "independent"])
def test_options(options: dict[str, Any], lying: str, sharing: str) -> None:
    lstm, x = make_lstm(noise_sharing=sharing, **options), sequences()
    hx, (keys, scale, all_keys, all_scales) = states(lstm.num_layers), LYING[lying]
    with perturbed(lstm, keys, scale):
        assert_same(lstm(x, hx), oracle_lstm.forward(lstm, x, all_keys, all_scales, hx))


@every_lstm_noise
def test_a_key_that_changes_changes_the_weights_from_that_step_on(noise: dict[str, str]) -> None:
    """And nothing else: the hidden state is carried over."""
    lstm, x = make_lstm(**noise), sequences()
    with perturbed(lstm, STEPWISE.flatten()):
        mixed, _ = lstm(x)
    with perturbed(lstm, STEPWISE[0]):
        before, state = lstm(x[:2])
    with perturbed(lstm, STEPWISE[2]):
        after, _ = lstm(x[2:], state)
    expected = th.cat([before, after])
    th.testing.assert_close(mixed[:, [0, 2]], expected[:, [0, 2]], **TIGHT)  # sequence 1 changes its key elsewhere too
    if noise["noise_sharing"] != "shared":
        with perturbed(lstm, STEPWISE[0]):
            unchanged, _ = lstm(x)
        assert th.allclose(mixed[:2, 0], unchanged[:2, 0]) and not th.allclose(mixed[2:, 0], unchanged[2:, 0])


@every_lstm_noise
def test_batch_first(noise: dict[str, str]) -> None:
    """Rows per step lie as the input does."""
    lstm, other, x, hx = make_lstm(**noise), make_lstm(batch_first=True, **noise), sequences(), states()
    other.load_state_dict(lstm.state_dict())
    for keys, scale, all_keys, all_scales in LYING.values():
        with perturbed(lstm, keys, scale):
            y, after = lstm(x, hx)
        if len(keys) == T * N:
            keys, scale = all_keys.T.flatten(), all_scales.T.flatten()
        with perturbed(other, keys, scale):
            assert_same(other(x.transpose(0, 1), hx), (y.transpose(0, 1), *after))
        for layer in (lstm, other):  # whatever the layer's own setting is
            with perturbed(layer, keys, scale):
                assert_same(layer.forward_episodes(x.transpose(0, 1), hx, batch_first=True), (y.transpose(0, 1), *after))


@every_lstm_noise
def test_a_single_sequence(noise: dict[str, str]) -> None:
    x, (h, c) = sequences()[:, 0], (state[:, 0] for state in states())
    for batch_first in (False, True):
        lstm = make_lstm(batch_first=batch_first, **noise)
        for keys in (STEPWISE[:, 0], STEPWISE[:1, 0]):
            y, h_n, c_n = oracle_lstm.forward(
                lstm, x[:, None], keys[:, None].expand(T, 1), th.ones(T, 1), (h[:, None], c[:, None])
            )
            with perturbed(lstm, keys):
                assert_same(lstm(x, (h, c)), (y[:, 0], h_n[:, 0], c_n[:, 0]))


@every_lying
@every_lstm_noise
def test_episodes_that_start_within_sequences(lying: str, noise: dict[str, str]) -> None:
    lstm, x, hx = make_lstm(**noise), sequences(), states()
    keys, scale, all_keys, all_scales = LYING[lying]
    expected = oracle_lstm.forward(lstm, x, all_keys, all_scales, hx, STARTS)
    with perturbed(lstm, keys, scale):
        for starts in (STARTS, STARTS.bool()):
            assert_same(lstm.forward_episodes(x, hx, starts), expected)
        for starts in (None, th.zeros(T, N)):
            y, after = lstm(x, hx)
            assert_same(lstm.forward_episodes(x, hx, starts), (y, *after))


LENGTHS = th.tensor([2, 4, 1])  # not sorted


def packed() -> PackedSequence:
    return pack_padded_sequence(sequences(), LENGTHS, enforce_sorted=False)


@every_lying
@every_lstm_noise
def test_packed_sequences(lying: str, noise: dict[str, str]) -> None:
    """Held keys come in the caller's order, as states do; keys per step lie as the packed elements do."""
    lstm, hx, given = make_lstm(**noise), states(), packed()
    _, _, all_keys, all_scales = LYING[lying]
    keys, scale = HELD, HELD_SCALE
    if lying == "stepwise":
        keys, scale = (pack_padded_sequence(of, LENGTHS, enforce_sorted=False).data for of in (all_keys, all_scales))
    with perturbed(lstm, keys, scale):
        found, (h, c) = lstm(given, hx)
    assert isinstance(found, PackedSequence) and th.equal(found.batch_sizes, given.batch_sizes)
    y, lengths = pad_packed_sequence(found)
    assert th.equal(lengths, LENGTHS)
    for n, length in enumerate(LENGTHS.tolist()):
        rows = slice(n, n + 1)
        arguments = (sequences()[:length, rows], all_keys[:length, rows], all_scales[:length, rows])
        expected = oracle_lstm.forward(lstm, *arguments, (hx[0][:, rows], hx[1][:, rows]))
        assert_same((y[:length, rows], (h[:, rows], c[:, rows])), expected)
        assert not y[length:, n].any()


def test_packed_sequences_without_states_and_already_sorted() -> None:
    lstm = make_lstm()
    given = pack_padded_sequence(sequences(), th.tensor([4, 4, 2]))
    assert given.sorted_indices is None
    with perturbed(lstm, HELD):
        y, _ = pad_packed_sequence(lstm(given)[0])
        th.testing.assert_close(y[:, :2], lstm(sequences())[0][:, :2], **TIGHT)
        th.testing.assert_close(y[:2, 2], lstm(sequences())[0][:2, 2], **TIGHT)


@every_lstm_noise
def test_effective_weight_is_the_oracles(noise: dict[str, str]) -> None:
    for options in ({}, {"noise_on": "hidden"}, {"bias": False}):
        lstm = make_lstm(**options, **noise)
        expected = oracle_lstm.row_weights(lstm, -3, 0.7)
        for block in ("ih_l0", "hh_l0", "ih_l1", "hh_l1"):
            weight, bias = effective_weight(lstm, -3, 0.7, name=f"weight_{block}")
            th.testing.assert_close(weight, expected[f"weight_{block}"], **TIGHT)
            assert (bias is None) == (not lstm.bias)
            if bias is not None:
                th.testing.assert_close(bias, expected[f"bias_{block}"], **TIGHT)
            quiet = "noise_on" in options and block.startswith("ih")
            assert th.equal(weight, getattr(lstm, f"weight_{block}")) == quiet


@pytest.mark.parametrize("name", [None, "weight", "bias_hh_l0", "weight_ih_l2"])
def test_effective_weight_must_be_told_which(name: str | None) -> None:
    known = "weight_hh_l0, weight_hh_l1, weight_ih_l0, weight_ih_l1"
    with pytest.raises(ValueError, match=f"name must be a weight of the FlipoutLSTM: {known}; got {name!r}"):
        effective_weight(make_lstm(), 0, name=name)


@every_lstm_noise
def test_rows_do_not_care_for_their_batch(noise: dict[str, str]) -> None:
    lstm, x, hx = make_lstm(**noise), sequences(), states()
    with perturbed(lstm, HELD, HELD_SCALE):
        whole, _ = lstm(x, hx)
    order = th.tensor([2, 0])
    with perturbed(lstm, HELD[order], HELD_SCALE[order]):
        part, _ = lstm(x[:, order], (hx[0][:, order], hx[1][:, order]))
    th.testing.assert_close(part, whole[:, order], **TIGHT)


@pytest.mark.parametrize("rows", [1, 2, T, N + 1, T * N - 1])
def test_another_number_of_keys_is_refused(rows: int) -> None:
    lstm = make_lstm()
    with perturbed(lstm, th.arange(rows)):
        with pytest.raises(ValueError, match=rf"keys for {rows} rows; .* per sequence \({N}\).* and step \({T * N}\)"):
            lstm(sequences())
        if rows != LENGTHS.sum():
            with pytest.raises(ValueError, match=rf"3 packed sequences of 7 steps .* keys for {rows} rows"):
                lstm(packed())


def test_bad_inputs_are_refused_under_noise_as_without() -> None:
    lstm, x = make_lstm(), sequences()
    for keys in (None, HELD):
        with perturbed(lstm, keys):
            for bad, error in ((x[..., :4], RuntimeError), (x.float(), ValueError), (x[None], ValueError)):
                with pytest.raises(error):
                    lstm(bad)
            with pytest.raises(RuntimeError, match="size"):
                lstm(x, states(3))
            for starts in (STARTS[:2], STARTS.T, STARTS[..., None]):
                with pytest.raises(ValueError, match=r"got an input of shape \(4, 3, 5\) and episode_starts of shape"):
                    lstm.forward_episodes(x, None, starts)
            with pytest.raises(ValueError, match=r"got an input of shape \(4, 5\)\."):
                lstm.forward_episodes(x[:, 0])
            with pytest.raises(TypeError, match="got PackedSequence; pad"):
                lstm.forward_episodes(packed())


@every_lstm_noise
def test_one_step_needs_no_choice(noise: dict[str, str]) -> None:
    """As in collection: one key per sequence is one per step."""
    for batch_first in (False, True):
        lstm, hx = make_lstm(batch_first=batch_first, **noise), states()
        x = randn(1, N, I, seed=1)
        expected = oracle_lstm.forward(lstm, x, HELD[None], HELD_SCALE[None], hx)
        with perturbed(lstm, HELD, HELD_SCALE):
            y, after = lstm(x.transpose(0, 1) if batch_first else x, hx)
        assert_same((y.transpose(0, 1) if batch_first else y, after), expected)
    assert y.shape == (N, 1, H)
