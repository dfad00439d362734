"""Keyed rollout buffers with sequences: each transition gets its own key back, wherever padding has put it."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.buffers import RecurrentDictRolloutBuffer, RecurrentRolloutBuffer
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.buffers import RolloutBuffer

from sb3_flipout.buffers import KeyedBufferMixin, keyed, store_noise
from sb3_flipout.hooks._models import set_up
from sb3_flipout.noise import RowNoise, fold_in, noise_of, with_noise

N_STEPS, N_ENVS, HIDDEN = 13, 3, 4
BOX = spaces.Box(-np.inf, np.inf, (2,))
SPACES = {"box": BOX, "dict": spaces.Dict({"number": BOX, "other": spaces.Box(-1, 1, (3,))})}
CLASSES = {"box": RecurrentRolloutBuffer, "dict": RecurrentDictRolloutBuffer}


def key_of(numbers):
    """The noise key of a transition, from the number in its observation."""
    return fold_in(7, th.as_tensor(numbers, dtype=th.int64))


def scale_of(numbers):
    return 1.0 + th.as_tensor(numbers, dtype=th.float32) / 100


def observe(kind, numbers):
    array = np.stack([numbers, numbers], axis=1).astype(np.float32)
    return array if kind == "box" else {"number": array, "other": np.zeros((N_ENVS, 3), np.float32)}


def filled(kind, buffer_class=None):
    shape = (N_STEPS, 1, N_ENVS, HIDDEN)
    buffer = (buffer_class or CLASSES[kind])(N_STEPS, SPACES[kind], spaces.Discrete(3), shape, "cpu", n_envs=N_ENVS)
    store_noise(buffer)
    buffer.reset()
    fill(buffer, kind)
    return buffer


def fill(buffer, kind):
    """Transitions numbered from 1, as padding is 0; episodes of different lengths."""
    ends, state = np.random.default_rng(0), th.zeros(1, N_ENVS, HIDDEN)
    for step in range(N_STEPS):
        numbers = 1 + step * N_ENVS + np.arange(N_ENVS)
        log_prob = th.zeros(N_ENVS)
        log_prob.row_noise = RowNoise(key_of(numbers), scale_of(numbers))
        starts = ends.random(N_ENVS) < 0.2 if step else np.ones(N_ENVS)
        states = RNNStates((state, state), (state, state))
        buffer.add(
            observe(kind, numbers), np.zeros((N_ENVS, 1)), np.zeros(N_ENVS), starts, th.zeros(N_ENVS), log_prob,
            lstm_states=states,
        )  # fmt: skip


@pytest.mark.parametrize("batch_size", [None, 1, 5, 20, N_STEPS * N_ENVS])
@pytest.mark.parametrize("kind", SPACES)
def test_sequences_carry_the_noise_of_their_transitions(kind, batch_size):
    buffer, padded = filled(kind), 0
    for _ in range(3):  # epochs, each split anew
        seen = []
        for batch in buffer.get(batch_size):
            obs, noise = batch.observations, noise_of(batch.observations)
            numbers = (obs if kind == "box" else obs["number"])[:, 0].long()
            assert len(noise) == len(numbers) == len(batch.mask)
            assert noise.keys.dtype == th.int64
            real = batch.mask.bool()
            assert th.equal(real, numbers > 0)
            assert th.equal(noise.keys[real], key_of(numbers[real]))
            assert th.equal(noise.scale[real], scale_of(numbers[real]))
            assert (noise.keys[~real] == 0).all() and (noise.scale[~real] == 0).all()
            padded += int((~real).sum())
            seen += numbers[real].tolist()
        assert sorted(seen) == list(range(1, N_STEPS * N_ENVS + 1))
    assert padded or batch_size == 1


@pytest.mark.parametrize("kind", SPACES)
def test_next_rollout_has_its_own_noise(kind):
    buffer = filled(kind)
    next(buffer.get())
    buffer.reset()
    fill(buffer, kind)
    buffer.noise_keys += 1
    batch = next(buffer.get())
    numbers = (batch.observations if kind == "box" else batch.observations["number"])[:, 0].long()
    real = batch.mask.bool()
    assert th.equal(noise_of(batch.observations).keys[real], key_of(numbers[real]) + 1)


def test_recurrent_buffer_pickles():
    buffer = filled("box")
    twin = pickle.loads(pickle.dumps(buffer))
    assert type(twin) is type(buffer)
    np.testing.assert_array_equal(twin.noise_keys, buffer.noise_keys)


@pytest.mark.parametrize("kind", SPACES)
def test_buffer_that_recurrent_ppo_made_stores_noise(kind):
    """RecurrentPPO lets nobody choose the class of its buffer."""

    class Env(gym.Env):
        observation_space = SPACES[kind]
        action_space = spaces.Discrete(3)

    name = "MlpLstmPolicy" if kind == "box" else "MultiInputLstmPolicy"
    model = RecurrentPPO(name, Env(), n_steps=8, batch_size=8, _init_setup_model=False)
    set_up(RecurrentPPO._setup_model, model)
    buffer = model.rollout_buffer
    assert isinstance(buffer, CLASSES[kind]) and type(buffer) is keyed(CLASSES[kind])
    assert buffer.noise_keys.shape == (8, 1)


class OwnBuffer(RolloutBuffer):
    resets = 0

    def __init__(self, *args, factor, **kwargs):
        self.factor = factor
        super().__init__(*args, **kwargs)

    def reset(self):
        self.resets += 1
        super().reset()


def test_buffer_becomes_keyed_in_place_and_keeps_its_state():
    buffer = OwnBuffer(4, BOX, spaces.Discrete(2), "cpu", n_envs=2, factor=3)
    observations = buffer.observations
    store_noise(buffer)
    assert isinstance(buffer, KeyedBufferMixin) and isinstance(buffer, OwnBuffer)
    assert (buffer.factor, buffer.resets) == (3, 1)
    assert buffer.observations is observations  # nothing is allocated twice
    before = type(buffer)
    store_noise(buffer)
    assert type(buffer) is before


def test_what_is_no_rollout_buffer_is_refused_and_left_alone():
    class Other:
        pass

    other = Other()
    with pytest.raises(TypeError, match="must be a subclass of RolloutBuffer"):
        store_noise(other)
    assert type(other) is Other


class DerivedFromKeyed(keyed(RolloutBuffer)):
    """A user's buffer that stands on ours."""


class WithMixin(KeyedBufferMixin, RolloutBuffer):
    """The same, by the mixin itself."""


@pytest.mark.parametrize("kind", [keyed(RolloutBuffer), DerivedFromKeyed, WithMixin])
def test_copies_and_pickles_keep_the_class_of_the_buffer(kind):
    buffer = kind(4, spaces.Box(-1, 1, (2,)), spaces.Discrete(2), n_envs=1)
    for twin in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert type(twin) is kind and twin.buffer_size == 4


def test_the_log_probability_may_come_by_name():
    buffer = keyed(RolloutBuffer)(1, spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "cpu", n_envs=2)
    step = [np.zeros((2, 2)), np.zeros((2, 1)), np.zeros(2), np.zeros(2), th.zeros(2)]
    log_prob = with_noise(th.zeros(2), RowNoise(th.tensor([3, 4])))
    for given, named in ((step, dict(log_prob=log_prob)), ([*step, log_prob], {})):
        buffer.reset()
        buffer.add(*given, **named)
        assert buffer.noise_keys.tolist() == [[3, 4]]


class Sub(RolloutBuffer):
    """A user's with places of its own, behind which one more class of ours stands."""

    def _get_samples(self, batch_inds, *args, **kwargs):
        return super()._get_samples(batch_inds, *args, **kwargs)


@pytest.mark.parametrize("kind", [RolloutBuffer, Sub])
@pytest.mark.parametrize(("args", "named"), [(("env",), {}), ((), {"env": "env"})])
def test_what_comes_with_the_places_is_handed_on(kind, args, named, monkeypatch):
    found = []
    stock = RolloutBuffer._get_samples

    def noted(self, batch_inds, *args, **kwargs):
        found.append((args, kwargs))
        return stock(self, batch_inds)

    monkeypatch.setattr(RolloutBuffer, "_get_samples", noted)
    buffer = keyed(kind)(1, spaces.Box(-1, 1, (2,)), spaces.Discrete(2), "cpu", n_envs=2)
    buffer.add(
        np.zeros((2, 2)),
        np.zeros((2, 1)),
        np.zeros(2),
        np.zeros(2),
        th.zeros(2),
        with_noise(th.zeros(2), RowNoise(th.arange(2))),
    )
    next(buffer.get(2))
    found.clear()
    samples = buffer._get_samples(np.array([1, 0]), *args, **named)
    assert found == [(args, named)] and noise_of(samples.observations).keys.tolist() == [1, 0]
