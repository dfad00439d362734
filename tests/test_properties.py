"""What holds for all keys, shapes and orders, and not only for those that a test has thought of."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import oracle
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn

from sb3_flipout.buffers import store_noise
from sb3_flipout.layers import FlipoutConv2d, FlipoutLinear, perturb, perturbed, redraw, restore
from sb3_flipout.noise import FAMILIES, RowNoise, fold, fold_in, noise_of, signs, with_noise
from sb3_flipout.noise.families import NOISE_SHARINGS
from sb3_flipout.noise.keys import mix, restrict, signed
from sb3_flipout.noise.rows import RowsByKey
from sb3_flipout.noise.signs import factors, factors_at, salts
from sb3_flipout.noise.transitions import in_bootstrap

settings.register_profile("here", max_examples=40, deadline=None, derandomize=True)
settings.load_profile("here")

INT64 = st.integers(-(2**63), 2**63 - 1)
KEYS = st.lists(INT64, min_size=1, max_size=9)
LAYERS = st.integers(0, 2**20)
KINDS = st.sampled_from(["sign", "normal", "sqrt_normal"])
SCALES = st.floats(-4, 4, width=32)


# ---- keys -------------------------------------------------------------------------------------------------------------


@given(st.integers(-(2**200), 2**200))
def test_integers_wrap_as_twos_complement(value: int) -> None:
    assert -(2**63) <= signed(value) < 2**63 and (signed(value) - value) % 2**64 == 0


@given(INT64, st.lists(INT64, max_size=4))
def test_folding_is_the_published_generator(key: int, path: list[int]) -> None:
    assert fold(key, *path) == oracle.fold(key, *path)
    folded = th.tensor(key)
    for item in path:
        folded = fold_in(folded, item)
    assert int(folded) == fold(key, *path)


@given(KEYS, KEYS)
def test_folding_tensors_is_folding_each(keys: list[int], data: list[int]) -> None:
    found = fold_in(th.tensor(keys)[:, None], th.tensor(data))
    assert found.tolist() == [[fold(key, item) for item in data] for key in keys]
    assert fold_in(keys[0], th.tensor(data)).tolist() == [fold(keys[0], item) for item in data]
    assert int(fold_in(keys[0], data[0])) == fold(keys[0], data[0])


@given(st.lists(INT64, unique=True, min_size=2, max_size=50))
def test_mixing_loses_nothing(values: list[int]) -> None:
    assert len(set(mix(th.tensor(values)).tolist())) == len(values)


@given(KEYS, st.integers(1, 1000))
def test_members_are_numbered_from_zero(keys: list[int], members: int) -> None:
    assert restrict(th.tensor(keys), members).tolist() == [key % members for key in keys]
    assert restrict(th.tensor(keys), None).tolist() == keys


# ---- sign vectors -----------------------------------------------------------------------------------------------------


@given(KEYS, LAYERS, st.integers(0, 5), st.integers(1, 200), KINDS)
def test_factors_are_those_of_the_oracle(keys: list[int], layer: int, vector: int, n: int, kind: Any) -> None:
    found = factors(th.tensor(keys), salts(layer, vector, n, kind), kind, th.float64)[:, :n]
    expected = th.tensor([oracle.factors(key, layer, vector, n, kind) for key in keys], dtype=th.float64)
    th.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@given(KEYS, LAYERS, st.integers(1, 130), st.data())
def test_a_row_sees_the_same_in_every_batch(keys: list[int], layer: int, n: int, data: st.DataObject) -> None:
    order = data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1, max_size=9))
    whole = signs(th.tensor(keys), layer, n)
    assert th.equal(signs(th.tensor(keys)[order], layer, n), whole[order])
    assert th.equal(signs(th.tensor(keys), layer, n + 70)[:, :n], whole)  # nor on how many come after it
    assert set(whole.unique().tolist()) <= {-1.0, 1.0}


@given(KEYS, LAYERS, st.integers(0, 5), KINDS, st.data())
def test_single_factors_are_elements_of_the_vectors(keys: list[int], layer: int, vector: int, kind: Any, data: Any) -> None:
    places = th.tensor(data.draw(st.lists(st.integers(0, 199), min_size=len(keys), max_size=len(keys))))
    whole = factors(th.tensor(keys), salts(layer, vector, 200, kind), kind)
    assert th.equal(factors_at(th.tensor(keys), places, layer, vector, kind), whole[th.arange(len(keys)), places])


# ---- rows -------------------------------------------------------------------------------------------------------------


@given(st.lists(INT64, min_size=1, max_size=6, unique=True), st.integers(1, 5), st.data())
def test_rows_sorted_by_key_are_each_input_under_each_key(keys: list[int], inputs: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(keys) * inputs)))
    noise = RowsByKey(th.tensor(keys), 0.5, th.tensor(order))
    of_inputs, of_keys = th.arange(inputs)[:, None], th.arange(len(keys))
    rows = list(zip(noise.for_rows(of_inputs)[:, 0].tolist(), noise.repeat_keys(of_keys).tolist(), strict=True))
    assert sorted(rows) == [(place, key) for place in range(inputs) for key in range(len(keys))]
    assert noise.keys.tolist() == [keys[key] for _, key in rows] and noise.scale.tolist() == [0.5] * len(rows)
    assert noise.in_order(th.tensor(rows)).tolist() == [list(rows[place]) for place in order]


@given(KEYS, st.data())
def test_noise_follows_its_rows(keys: list[int], data: st.DataObject) -> None:
    scales = th.tensor(data.draw(st.lists(SCALES, min_size=len(keys), max_size=len(keys))))
    batch = with_noise(th.arange(len(keys), dtype=th.float32)[:, None].expand(-1, 3), RowNoise(th.tensor(keys), scales))
    order = data.draw(st.permutations(range(len(keys))))
    for moved, expected in (
        (batch[order], order),
        (batch.flip(0)[: len(keys)], None),
        (th.cat([batch, batch[order]]), [*range(len(keys)), *order]),
        (batch * 2 + 1, range(len(keys))),
        (batch.reshape(len(keys), 3, 1), range(len(keys))),
    ):
        noise = noise_of(moved)
        if expected is None:
            assert noise is None or noise.keys.tolist() == keys[::-1]
        else:
            assert noise is not None
            assert noise.keys.tolist() == [keys[place] for place in expected]
            assert th.equal(noise.scale, scales[list(expected)])


@given(KEYS, st.integers(1, 20), st.floats(0.05, 1.0))
def test_masks_of_transitions_are_nested_in_their_share(numbers: list[int], members: int, share: float) -> None:
    """What learns from a transition at a smaller share learns from it at a larger one."""
    repeated = th.tensor(numbers).repeat_interleave(members)
    of = th.arange(members).repeat(len(numbers))
    few, all_of_them = in_bootstrap(repeated, of, share / 2), in_bootstrap(repeated, of, 1.0)
    assert bool(all_of_them.all()) and bool((in_bootstrap(repeated, of, share) >= few).all())


# ---- layers -----------------------------------------------------------------------------------------------------------


def filled(layer: Any, seed: int) -> Any:
    generator = th.Generator().manual_seed(seed)
    with th.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(th.randn(parameter.shape, generator=generator, dtype=th.float64))
    layer.noise_index = seed
    redraw(layer, seed * 7)
    return layer


NOISE = st.fixed_dictionaries({"family": st.sampled_from(list(FAMILIES)), "noise_sharing": st.sampled_from(NOISE_SHARINGS)})


def compare(layer: Any, x: th.Tensor, keys: list[int], scales: list[float]) -> None:
    with perturbed(layer, th.tensor(keys), th.tensor(scales, dtype=th.float64)):
        found = layer(x)
    expected = oracle.forward(layer, x, th.tensor(keys), [float(np.float32(scale)) for scale in scales])
    # Scales are kept in float32, and so are quantiles that are looked up: that is the tolerance.
    th.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.detach().abs().max() + 1))


@settings(max_examples=25)
@given(NOISE, st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 50), KEYS, st.data())
def test_linear_layers_are_the_oracle(
    noise: Any, inputs: int, outputs: int, bias: bool, seed: int, keys: list[int], data: Any
) -> None:
    layer = filled(FlipoutLinear(inputs, outputs, bias, dtype=th.float64, **noise), seed)
    if layer.noise_config.noise_sharing == "shared" or noise["noise_sharing"] == "shared":
        keys = keys[:1] * len(keys)
    scales = data.draw(st.lists(SCALES, min_size=len(keys), max_size=len(keys)))
    x = th.randn(len(keys), inputs, dtype=th.float64, generator=th.Generator().manual_seed(seed))
    compare(layer, x, keys, scales)


@settings(max_examples=15)
@given(
    NOISE,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(1, 2),
    st.integers(0, 1),
    st.integers(0, 50),
    st.lists(INT64, min_size=1, max_size=4),
)
def test_convolutions_are_the_oracle(
    noise: Any, inputs: int, outputs: int, groups: int, kernel: Any, stride: int, padding: int, seed: int, keys: list[int]
) -> None:
    geometry = dict(stride=stride, padding=padding, groups=groups, dtype=th.float64)
    layer = filled(FlipoutConv2d(inputs * groups, outputs * groups, kernel, **geometry, **noise), seed)
    x = th.randn(len(keys), inputs * groups, 4, 5, dtype=th.float64, generator=th.Generator().manual_seed(seed))
    compare(layer, x, keys[:1] * len(keys) if noise["noise_sharing"] == "shared" else keys, [1.0] * len(keys))


# ---- conversion -------------------------------------------------------------------------------------------------------


@st.composite
def networks(draw: Any) -> nn.Sequential:
    sizes = draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers.append(nn.Linear(inputs, outputs, bias=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.LayerNorm(outputs)])))
    return nn.Sequential(*layers)


@settings(max_examples=25)
@given(networks(), st.sampled_from(list(FAMILIES)), st.integers(0, 9), KEYS)
@pytest.mark.filterwarnings("ignore:.*no noise:UserWarning")
def test_perturbing_and_restoring_changes_nothing(net: Any, family: Any, base_key: int, keys: list[int]) -> None:
    plain = copy.deepcopy(net)
    x = th.randn(len(keys), net[0].in_features, generator=th.Generator().manual_seed(1))
    perturb(net, family=family, base_key=base_key)
    assert th.equal(net(x), plain(x))
    with perturbed(net, th.tensor(keys)):
        noisy = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with perturbed(twin, th.tensor(keys)):
            assert th.equal(twin(x), noisy)
    with perturbed(net, th.tensor(keys), 0.0):
        assert th.allclose(net(x), plain(x), rtol=1e-5, atol=1e-6)
    back = restore(net)
    assert th.equal(back(x), plain(x)) and back.state_dict().keys() == plain.state_dict().keys()


# ---- buffers ----------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 50), st.data())
def test_each_transition_gets_its_own_noise_back(n_steps: int, n_envs: int, batch_size: int, data: st.DataObject) -> None:
    numbers = st.lists(INT64, min_size=n_envs, max_size=n_envs)
    space = spaces.Box(-np.inf, np.inf, (2,))
    buffer = RolloutBuffer(n_steps, space, spaces.Discrete(2), "cpu", n_envs=n_envs)
    store_noise(buffer)
    buffer.reset()
    stored: dict[float, tuple[int, float]] = {}
    for step in range(n_steps):
        keys = data.draw(numbers)
        scales = data.draw(st.lists(SCALES, min_size=n_envs, max_size=n_envs))
        log_prob = th.zeros(n_envs)
        log_prob.row_noise = RowNoise(th.tensor(keys), th.tensor(scales))  # type: ignore[attr-defined]
        places = step * n_envs + np.arange(n_envs)
        observed = np.stack([places, places], axis=1).astype(np.float32)
        stored |= {float(place): item for place, *item in zip(places, keys, scales, strict=True)}  # type: ignore[misc]
        zeros = np.zeros(n_envs)
        buffer.add(observed, np.zeros((n_envs, 1)), zeros, zeros, th.zeros(n_envs), log_prob)
    met: list[float] = []
    for samples in buffer.get(batch_size):
        noise = noise_of(samples.observations)
        assert noise is not None
        for place, key, scale in zip(
            samples.observations[:, 0].tolist(), noise.keys.tolist(), noise.scale.tolist(), strict=True
        ):
            assert [key, scale] == list(stored[place])
            met.append(place)
    assert sorted(met) == sorted(stored)
