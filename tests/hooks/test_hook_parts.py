"""The parts of the hooks one by one: what is wrapped, numbers of transitions, and parameters that are given."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flipout import hooks
from sb3_flipout.hooks import _models
from sb3_flipout.noise import fold_in
from sb3_flipout.replay_buffers import NumberedBufferMixin, number_transitions, numbered, numbers_of

KEY, ENVS = 5, 2


class Own(PPO):
    """Overrides an instance's method and the class's; the rest is inherited."""

    def train(self) -> None:
        super().train()

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> Any:
        return super().load(*args, **kwargs)


def test_what_a_subclass_overrides_is_wrapped_once_and_given_back() -> None:
    before = dict(vars(Own))
    hooks.install(Own)
    once = dict(vars(Own))
    hooks.install(Own)
    try:
        assert dict(vars(Own)) == once
        assert {name for name in before if once[name] is not before[name]} == {"train", "load"}
        assert set(once) == set(before), "what is inherited is wrapped already"
        assert Own in hooks.installed()
    finally:
        hooks.uninstall(Own)
    assert dict(vars(Own)) == before and Own not in hooks.installed()
    hooks.uninstall(Own)
    assert dict(vars(Own)) == before


def test_what_is_inherited_is_taken_away_again() -> None:
    class Bare(PPO):
        pass

    before = dict(vars(Bare))
    hooks.uninstall(PPO)
    try:
        hooks.install(Bare)
        assert "collect_rollouts" in vars(Bare) and "load" in vars(Bare)
        hooks.uninstall(Bare)
        assert dict(vars(Bare)) == before
    finally:
        hooks.install(PPO)


def test_a_wrapped_load_is_the_class_s_and_reseeds(tmp_path: Path) -> None:
    hooks.install(Own)
    try:
        Own("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=1).save(tmp_path / "model.zip")
        same, other = (Own.load(tmp_path / "model.zip", **given) for given in ({}, dict(seed=2)))
    finally:
        hooks.uninstall(Own)
    assert type(same) is type(other) is Own
    assert same.policy._noise_seed != other.policy._noise_seed


# ---- parameters -------------------------------------------------------------------------------------------------------


WITHOUT_NOISE = (
    "these are the parameters of a policy without noise: it has no sigma, and its optimizer none for it. To take its weights "
    'as mean weights and keep the sigma that is here: model.set_parameters({"policy": params["policy"]}, exact_match=False).'
)


@pytest.fixture
def plain_zip(tmp_path: Path) -> Path:
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).save(tmp_path / "plain.zip")
    return tmp_path / "plain.zip"


@pytest.fixture
def model() -> PPO:
    return PPO("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=1, policy_kwargs=dict(learn_sigma=True))


@pytest.mark.parametrize(
    ("args", "kwargs", "device"),
    [
        ((), {}, "auto"),
        ((False,), {}, "auto"),
        ((False, "cpu"), {}, "cpu"),
        ((), dict(device="cpu"), "cpu"),
        ((), dict(exact_match=False), "auto"),
    ],
)
def test_a_file_of_a_policy_without_noise_is_refused(
    model: PPO, plain_zip: Path, monkeypatch: pytest.MonkeyPatch, args: Any, kwargs: Any, device: str
) -> None:
    read, devices = _models.load_from_zip_file, []

    def reading(path: Any, **given: Any) -> Any:
        devices.append(given)
        return read(path, **given)

    monkeypatch.setattr(_models, "load_from_zip_file", reading)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    with pytest.raises(ValueError) as told:
        model.set_parameters(plain_zip, *args, **kwargs)
    assert str(told.value) == WITHOUT_NOISE
    assert devices == [dict(device=device, load_data=False)]
    assert all(th.equal(value, before[name]) for name, value in model.policy.state_dict().items())


@pytest.mark.parametrize(("args", "kwargs"), [((False,), {}), ((), dict(exact_match=False))])
def test_mean_weights_alone_are_taken(model: PPO, plain_zip: Path, args: Any, kwargs: Any) -> None:
    parameters = PPO.load(plain_zip).get_parameters()
    model.set_parameters({"policy": parameters["policy"]}, *args, **kwargs)
    own = model.policy.state_dict()
    assert all(th.equal(value, own[name]) for name, value in parameters["policy"].items())
    with pytest.raises(ValueError) as told:
        model.set_parameters({"policy": parameters["policy"]})
    assert str(told.value) == WITHOUT_NOISE


def test_a_file_of_one_s_own_is_taken(model: PPO, tmp_path: Path) -> None:
    other = PPO("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, seed=2, policy_kwargs=dict(learn_sigma=True))
    other.save(tmp_path / "other.zip")
    model.set_parameters(tmp_path / "other.zip")
    own = model.policy.state_dict()
    assert all(th.equal(value, own[name]) for name, value in other.policy.state_dict().items())


# ---- numbers of transitions -------------------------------------------------------------------------------------------


def filled(kind: type[ReplayBuffer], size: int, action_type: Any = np.int64) -> Any:
    space, actions = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)
    actions.dtype = np.dtype(action_type)  # which newer versions of gymnasium take as an argument
    # SB3 divides the size by the number of environments
    return kind(size * ENVS, space, actions, device="cpu", n_envs=ENVS)


def step(buffer: ReplayBuffer, at: int, **by_name: Any) -> None:
    obs, last = np.full((ENVS, 3), at, np.float32), [dict(), dict()]
    stored = dict(obs=obs, next_obs=obs, action=np.zeros(ENVS, int), reward=np.zeros(ENVS), done=np.zeros(ENVS), infos=last)
    if by_name:
        buffer.add(**stored)
    else:
        buffer.add(*stored.values())


class Thrice(ReplayBuffer):
    """Stores each step three times at once."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        for _ in range(3):
            super().add(*args, **kwargs)


@pytest.mark.parametrize(("kind", "size"), [(ReplayBuffer, 1), (ReplayBuffer, 2), (ReplayBuffer, 5), (Thrice, 4), (Thrice, 5)])
@pytest.mark.parametrize("action_type", [np.int64, np.int32])
def test_each_transition_has_the_next_number(kind: type[ReplayBuffer], size: int, action_type: Any) -> None:
    buffer, stored = filled(kind, size, action_type), 1 if kind is ReplayBuffer else 3
    step(buffer, 0)
    assert number_transitions(buffer, KEY) == ENVS * stored == buffer.numbered
    expected = {place: place * ENVS for place in range(stored)}  # place -> count of its first transition
    for at in range(1, 9):
        step(buffer, at, **(dict(by="name") if at % 2 else {}))
        for each in range(stored):
            expected[(at * stored + each) % size] = (at * stored + each) * ENVS
        assert buffer.numbered == (at + 1) * stored * ENVS
        for place, first in expected.items():
            assert buffer.actions[place, :, 1].tolist() == fold_in(KEY, th.arange(first, first + ENVS)).tolist()
    before = buffer.actions.copy()
    assert number_transitions(buffer, KEY + 1) == 0, "it does so already"
    assert buffer.numbers_key == KEY + 1 and (buffer.actions == before).all(), "the key is for what comes"


def test_a_sample_takes_its_arguments_by_place_and_name() -> None:
    buffer = filled(ReplayBuffer, 5)
    number_transitions(buffer, KEY)
    for at in range(5):
        step(buffer, at)
    env = VecNormalize(make_vec_env("CartPole-v1"), norm_obs=False, clip_reward=0.5)
    buffer.rewards[:] = 7.0
    stored = set(buffer.actions[..., 1].flatten().tolist())
    for samples in (buffer.sample(4, env), buffer.sample(4, env=env), buffer.sample(batch_size=4, env=env)):
        assert samples.actions.shape == (4, 1) and samples.rewards.tolist() == [[0.5]] * 4
        numbers = numbers_of(samples)
        assert numbers is not None and set(numbers.tolist()) <= stored
    assert numbers_of(filled(ReplayBuffer, 5).sample(0)) is None


class Floats(ReplayBuffer):
    """Gives actions of another type."""

    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        given = super()._get_samples(*args, **kwargs)
        return given._replace(actions=given.actions.float())


class Narrow(ReplayBuffer):
    """Gives the first column."""

    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        given = super()._get_samples(*args, **kwargs)
        return given._replace(actions=given.actions[:, :1])


class Deep(ReplayBuffer):
    """Gives actions with one more dimension."""

    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        given = super()._get_samples(*args, **kwargs)
        return given._replace(actions=given.actions.unsqueeze(2))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Floats, "shape (4, 2) and type torch.float32"),
        (Narrow, "shape (4, 1) and type torch.int64"),
        (Deep, "shape (4, 2, 1) and type torch.int64"),
    ],
)
def test_a_sample_that_has_lost_its_numbers_is_refused(kind: type[ReplayBuffer], what: str) -> None:
    buffer = filled(kind, 5)
    number_transitions(buffer, KEY)
    step(buffer, 0)
    with pytest.raises(TypeError) as told:
        buffer.sample(4)
    assert str(told.value) == (
        f"a sample of {kind.__name__} has actions of {what}, and has lost the numbers of its transitions, which stand beside "
        "them. Take actions from self.actions as ReplayBuffer does, and leave their last dimension and their type as they are"
        "; or leave out bootstrap and reward_noise."
    )


class Numbered(numbered(ReplayBuffer)):  # type: ignore[misc]
    """A user's subclass of a class that was made at run time; pickled by its own name."""


class NumberedFloats(numbered(ReplayBuffer)):  # type: ignore[misc]
    """Such a one that loses its numbers."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(actions=samples.actions.float())


class NumberedBroken(numbered(ReplayBuffer)):  # type: ignore[misc]
    """Such a one whose own code fails."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        raise IndexError("mine")


def test_a_subclass_of_a_numbered_class_is_called_by_its_own_name() -> None:
    buffer = filled(ReplayBuffer, 5)
    number_transitions(buffer, KEY)
    step(buffer, 0)
    buffer.__class__ = NumberedFloats
    with pytest.raises(TypeError, match=r"^a sample of NumberedFloats has actions of shape"):
        buffer.sample(4)
    buffer.__class__ = NumberedBroken
    with pytest.raises(IndexError, match=r"^mine \(If that is about actions: inside `sample`"):
        buffer.sample(4)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.parametrize("kind", [numbered(ReplayBuffer), Numbered])
def test_is_pickled_with_its_numbers(kind: Any, protocol: int) -> None:
    buffer = filled(ReplayBuffer, 5)
    number_transitions(buffer, KEY)
    step(buffer, 0)
    buffer.__class__ = kind
    again = pickle.loads(pickle.dumps(buffer, protocol))
    assert type(again) is kind
    np.testing.assert_array_equal(again.actions, buffer.actions)
    assert (again.numbers_key, again.numbered) == (KEY, ENVS)
    assert kind.__reduce_ex__(buffer, 2)[0].__name__ == ("__newobj__" if kind is Numbered else "_empty_numbered")


def test_a_numbered_class_says_what_it_is() -> None:
    made = numbered(ReplayBuffer)
    assert numbered(made) is made and issubclass(made, NumberedBufferMixin)
    assert made.__name__ == "NumberedReplayBuffer" and made.__module__ == "sb3_flipout.replay_buffers"
    assert made.__doc__ == "ReplayBuffer that stores a number with each transition."


@pytest.mark.parametrize("buffer", [object(), filled(ReplayBuffer, 5)])
def test_what_cannot_be_numbered_is_refused(buffer: Any) -> None:
    if isinstance(buffer, ReplayBuffer):
        buffer.actions = buffer.actions[:, :1]
    with pytest.raises(TypeError) as told:
        number_transitions(buffer, KEY)
    assert str(told.value) == (
        f"replay_buffer_class={type(buffer).__name__} cannot be given numbers of transitions, which bootstrap and "
        "reward_noise need: it must keep its actions in a numpy array of shape (buffer_size, n_envs, 1) that can be "
        "replaced, and not in a file or in memory that is shared. Derive it from ReplayBuffer, DictReplayBuffer or "
        "HerReplayBuffer, or leave out bootstrap and reward_noise."
    )


def test_a_buffer_that_is_made_anew_is_widened() -> None:
    buffer = filled(ReplayBuffer, 5)
    number_transitions(buffer, KEY)
    step(buffer, 0)
    buffer.actions, buffer.pos, buffer.full = np.zeros((5, ENVS, 1), np.int64), 0, False
    step(buffer, 1)
    assert buffer.actions.shape == (5, ENVS, 2)
    assert buffer.actions[0, :, 1].tolist() == fold_in(KEY, th.arange(ENVS, 2 * ENVS)).tolist()


def test_no_dqn_without_bootstrap_has_numbers() -> None:
    assert not isinstance(DQN("FlipoutMlpPolicy", "CartPole-v1", buffer_size=10).replay_buffer, NumberedBufferMixin)
