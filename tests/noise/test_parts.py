"""Parts that others are made of, looked at by themselves: what is kept for the process is built anew here."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import oracle
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_flipout.buffers import keyed, store_noise
from sb3_flipout.noise import NoiseOwner, RowNoise, Scales, bases, noise_of, tables
from sb3_flipout.noise.ladder import environment_scales, geometric_ladder
from sb3_flipout.noise.schedule import SHAPES, scheduled_factor
from sb3_flipout.noise.stream import KeyStream, check_resample
from sb3_flipout.samples import repeat_rows, with_parts

CPU = th.device("cpu")

# ---- tables -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_TABLES", {})
    monkeypatch.setattr(bases, "_TABLES", {})


@pytest.mark.parametrize("dtype", [th.float32, th.float64, th.bfloat16], ids=str)
@pytest.mark.usefixtures("no_tables")
def test_tables_of_factors_are_built_from_quantiles(dtype: th.dtype) -> None:
    normal = th.tensor(oracle.normal_table(), dtype=th.float64)
    expected = {
        "sign": th.tensor([[-1.0 if (byte >> bit) & 1 else 1.0 for bit in range(8)] for byte in range(256)]),
        "normal": normal[:, None],
        "sqrt_normal": (normal.sign() * normal.abs().sqrt())[:, None],
    }
    for kind, table in expected.items():
        found, for_numpy = tables.factor_table(kind, dtype, CPU)  # type: ignore[arg-type]
        assert found.dtype == dtype and found.shape == table.shape
        th.testing.assert_close(found.double(), table.double(), rtol=th.finfo(dtype).eps, atol=1e-12)
        assert (for_numpy is None) == (dtype == th.bfloat16)
        if for_numpy is not None:
            assert np.array_equal(for_numpy, found.numpy())
        assert tables.factor_table(kind, dtype, CPU)[0] is found  # type: ignore[arg-type]


@pytest.mark.parametrize("law", ["sign", "normal"])
@pytest.mark.usefixtures("no_tables")
def test_tables_of_bases_are_built_from_the_seed(law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_WORDS_AT_ONCE", 7)  # several parts, the last of them shorter
    with th.inference_mode():  # of a caller, in which a table must not be born
        found = bases._build(law, 130 if law == "sign" else 33)
    assert th.equal(found, oracle.base_elements(law, 0, len(found))) and found.dtype == th.float32
    assert len(found) == (130 if law == "sign" else 33)


@pytest.mark.usefixtures("no_tables")
def test_draws_have_the_type_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "_LEAST", 64)
    shapes = [th.Size([3, 4]), th.Size([3])]
    for dtype in (th.float32, th.float64, th.float16):
        weight, bias = bases.base_draws("normal", 5, shapes, th.zeros(1, dtype=dtype))
        assert weight.dtype == bias.dtype == dtype and weight.shape == (3, 4) and bias.shape == (3,)
        flat = th.cat([weight.flatten(), bias])
        start = 5 % (bases.table_size(15) - 15 + 1)
        assert th.equal(flat, oracle.base_elements("normal", start, 15).to(dtype))
    assert [bases.table_size(n) for n in (1, 16, 17, 32, 33)] == [64, 64, 128, 128, 256]


# ---- schedules, ladders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", sorted(SHAPES))
def test_schedules_begin_and_end_where_they_say(schedule: str) -> None:
    at = [scheduled_factor(schedule, 2.0, 0.5, 0.4, progress) for progress in (0.0, 0.1, 0.2, 0.3, 0.4, 0.7, 1.2)]
    assert at[0] == pytest.approx(2.0) and at[4:] == pytest.approx([0.5] * 3)
    assert all(one > other for one, other in pairwise(at[:5]))
    middle = dict(linear=1.25, cosine=1.25, exponential=1.0)[schedule]
    assert at[2] == pytest.approx(middle)
    assert scheduled_factor("constant", 2.0, 0.5, 0.4, 0.9) == 2.0


def test_scales_of_environments() -> None:
    same, each = environment_scales(0.3, None, 3, CPU), environment_scales(0.5, (1.0, 3.0), 2, CPU)
    assert same.dtype == each.dtype == th.float32
    assert same.tolist() == [np.float32(0.3)] * 3 and each.tolist() == [0.5, 1.5]
    assert geometric_ladder(0.25, 4.0, 3) == pytest.approx((0.25, 1.0, 4.0))
    assert geometric_ladder(0.25, 4.0, 5) == pytest.approx([0.25 * 2**place for place in range(5)])


# ---- streams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", ["step", "episode", "rollout", 3])
def test_streams_say_whose_noise_it_is(resample: Any) -> None:
    owner = NoiseOwner()
    stream = KeyStream(7, resample, None, owner)
    for scales in (Scales(1.0), Scales(0.5), Scales(0.5, (1.0, 2.0)), Scales(1.0)):
        for _ in range(2):
            noise = stream.next(2, scales, CPU)
            assert noise.owner is owner and len(noise) == 2
            assert noise.scale.tolist() == [scales.scale * one for one in scales.ladder or (1.0, 1.0)]


def test_steps_ahead_are_the_steps_themselves() -> None:
    """Keys are hashed for many steps at once; a stream that is set to a step has that step's."""
    stream, keys = KeyStream(7, "step"), []
    for _ in range(150):
        keys.append(stream.next(3, Scales(1.0), CPU).keys.tolist())
    assert keys == [[oracle.fold(7, step, env) for env in range(3)] for step in range(150)]
    for step in (0, 63, 64, 65, 128):
        again = KeyStream(7, "step")
        again.next(3, Scales(1.0), CPU)
        again.restart(step, 7)
        assert again.next(3, Scales(1.0), CPU).keys.tolist() == keys[step]


# ---- batches and buffers ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    observations: Any
    actions: Any = 0


class Tuple(NamedTuple):
    observations: Any
    actions: Any = 0


class Plain:
    def __init__(self, observations: Any, actions: Any = 0) -> None:
        self.observations, self.actions = observations, actions


@pytest.mark.parametrize("kind", [Record, Tuple, Plain])
def test_parts_of_batches_are_replaced(kind: Any) -> None:
    before = kind(1, 2)
    after = with_parts(before, observations=5)
    assert (after.observations, after.actions) == (5, 2) and type(after) is kind
    assert (before.observations, before.actions) == (1, 2)
    both = with_parts(kind(1, 2), observations=3, actions=4)
    assert (both.observations, both.actions) == (3, 4)


@pytest.mark.parametrize("kind", [Record, Tuple])
def test_rows_of_batches_are_repeated(kind: Any) -> None:
    rows = th.arange(6).view(3, 2)
    found = repeat_rows(kind({"a": rows, "b": None}, rows[:, 0]), 2, len(rows))
    assert type(found) is kind and found.actions.tolist() == [0, 0, 2, 2, 4, 4]
    assert th.equal(found.observations["a"], rows[[0, 0, 1, 1, 2, 2]]) and found.observations["b"] is None


def test_buffers_take_the_log_probability_by_place_and_by_name() -> None:
    space, owner = spaces.Box(-math.inf, math.inf, (1,)), NoiseOwner()
    buffer: Any = RolloutBuffer(2, space, spaces.Discrete(2), "cpu", n_envs=1)
    store_noise(buffer)
    zero = np.zeros(1)
    for step, by_name in enumerate((True, False)):
        log_prob = th.zeros(1)
        log_prob.row_noise = RowNoise(th.tensor([step + 5]), 0.25, owner)  # type: ignore[attr-defined]
        if by_name:
            buffer.add(zero[None], zero[None], zero, zero, value=th.zeros(1), log_prob=log_prob)
        else:
            buffer.add(zero[None], zero[None], zero, zero, th.zeros(1), log_prob)
    assert buffer.noise_keys.ravel().tolist() == [5, 6] and buffer.noise_scales.dtype == np.float32
    assert buffer.noise_keys.nbytes + buffer.noise_scales.nbytes == 12 * 2
    noise = buffer.row_noise(np.array([1, 0]))
    assert noise.owner is owner and noise.keys.tolist() == [6, 5] and noise.scale.tolist() == [0.25, 0.25]


def test_places_that_a_users_class_chooses_bring_their_noise() -> None:
    class Sorted(RolloutBuffer):
        def _get_samples(self, batch_inds: np.ndarray, env: Any = None, **more: Any) -> Any:
            asked.append(more)
            return super()._get_samples(np.sort(batch_inds), env=env)

    asked: list[Any] = []
    space = spaces.Box(-math.inf, math.inf, (1,))
    buffer: Any = keyed(Sorted)(4, space, spaces.Discrete(2), "cpu", n_envs=1)
    buffer.reset()
    for step in range(4):
        log_prob = th.zeros(1)
        log_prob.row_noise = RowNoise(th.tensor([step * 10]), 1.0)  # type: ignore[attr-defined]
        row = np.full((1, 1), step, np.float32)
        buffer.add(row, np.zeros((1, 1)), np.zeros(1), np.zeros(1), th.zeros(1), log_prob)
    for samples in buffer.get(4):
        noise = noise_of(samples.observations)
        assert noise is not None and noise.keys.tolist() == [0, 10, 20, 30] == (samples.observations[:, 0] * 10).tolist()
    buffer._get_samples(np.array([1]), None, mine=3)
    assert asked[-1] == {"mine": 3}


def test_a_transition_without_keys_is_refused_in_full_words() -> None:
    space = spaces.Box(-math.inf, math.inf, (1,))
    buffer: Any = RolloutBuffer(2, space, spaces.Discrete(2), "cpu", n_envs=1)
    store_noise(buffer)
    with pytest.raises(ValueError) as told:
        buffer.add(np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1), np.zeros(1), th.zeros(1), th.zeros(1))
    assert str(told.value) == (
        "the rollout buffer got a transition whose log_prob carries no noise keys, so the update could not replay it. Hand it "
        "the very log-probabilities that policy(obs) gave: operations on them lose the keys. Collect neither inside "
        "perturbed(policy, None) nor with a policy replaced since. A policy of yours that overrides forward stands behind the "
        "flipout class: class Mine(FlipoutActorCriticPolicy, MyPolicy)."
    )


def test_a_wrong_resample_is_refused_in_full_words() -> None:
    with pytest.raises(ValueError, match=r"^resample must be one of .*'never'.* A whole number >= 1 is a number of steps\.$"):
        check_resample("never")
