"""Members and users' own ways to store, to sample and to learn: they work, or what is lost is said."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from torch import nn

from sb3_flipout.noise import Stream, fold
from sb3_flipout.replay_buffers import number_transitions, numbers_of

K, B = 4, 16
BOTH: dict[str, Any] = dict(bootstrap=0.5, reward_noise=0.1)


def build(algorithm: Any = DQN, noise: Any = BOTH, **kwargs: Any) -> Any:
    settings: dict[str, Any] = dict(learning_starts=8, batch_size=B, buffer_size=50, train_freq=4, seed=0, device="cpu")
    settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    policy_kwargs = dict(net_arch=[8], members=K, **noise)
    return algorithm("FlipoutMlpPolicy", vector_env("discrete", 1), policy_kwargs=policy_kwargs, **{**settings, **kwargs})


# ---- storing ----------------------------------------------------------------------------------------------------------


class AnywhereOld(ReplayBuffer):
    """Once full, a new transition replaces any of the old ones."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        if self.full:
            self.pos = int(np.random.randint(self.buffer_size))
        super().add(*args, **kwargs)


class Aside(AnywhereOld):
    """The same, and the position stays."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        pos, full = self.pos, self.full
        super().add(*args, **kwargs)
        if full:
            self.pos = pos


class Beside(AnywhereOld):
    """The same, and the position moves by one, over what stays."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        pos, full = self.pos, self.full
        super().add(*args, **kwargs)
        if full:
            self.pos = (pos + 1) % self.buffer_size


class FirstColumn(ReplayBuffer):
    """Writes actions by hand."""

    def add(self, obs: Any, next_obs: Any, action: Any, *args: Any) -> None:
        pos, numbers = self.pos, self.actions[self.pos, :, 1:].copy()
        super().add(obs, next_obs, action, *args)
        self.actions[pos, :, 1:] = numbers


@pytest.mark.parametrize("kind", [AnywhereOld, Aside, Beside, FirstColumn])
def test_a_transition_keeps_its_number_wherever_the_others_are_stored(kind: type[ReplayBuffer]) -> None:
    model = build(replay_buffer_class=kind, learning_starts=1000, train_freq=1).learn(50)
    buffer: Any = model.replay_buffer
    known: dict[bytes, int] = {}
    for _ in range(40 if kind is FirstColumn else 100):
        samples = buffer.sample(64)
        numbers: Any = numbers_of(samples)
        for obs, number in zip(samples.observations.numpy(), numbers.tolist(), strict=True):
            assert known.setdefault(obs.tobytes(), number) == number
        if kind is not FirstColumn:
            model.learn(1, reset_num_timesteps=False)
    assert len(set(known.values())) == len(known) >= 50


def test_transitions_that_are_written_into_the_arrays_are_numbered_when_they_are_sampled() -> None:
    model = build(learning_starts=1000).learn(20)
    buffer: Any = model.replay_buffer
    old = buffer.actions[:20, 0, 1].copy()
    buffer.actions[20:40] = np.ones((20, 1, 1), np.int64)
    buffer.pos = 40
    numbers = numbers_of(buffer.sample(500))
    assert numbers is not None and len(numbers.unique()) == 40
    assert (buffer.actions[:20, 0, 1] == old).all(), "those that had one keep it"


class OfTensors(ReplayBuffer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.actions: Any = th.as_tensor(self.actions)


def test_actions_that_are_no_array_are_refused_and_the_buffer_stays_as_it_was() -> None:
    with pytest.raises(TypeError, match=r"replay_buffer_class=OfTensors cannot be given numbers.*in a numpy array"):
        build(replay_buffer_class=OfTensors)
    buffer = OfTensors(10, *(getattr(vector_env("discrete", 1), f"{of}_space") for of in ("observation", "action")))
    with pytest.raises(TypeError):
        number_transitions(buffer, 1)
    assert type(buffer) is OfTensors


def test_numbers_are_hashed_from_the_seed_of_the_noise(tmp_path: Any) -> None:
    model = build(seed=None).learn(12)
    model.save(tmp_path / "model")
    again: Any = [DQN.load(tmp_path / "model", env=vector_env("discrete", 1)) for _ in range(2)]
    keys = [fold(one.policy._noise_seed, Stream.TRANSITIONS) for one in again]
    assert keys[0] == keys[1] and [one.replay_buffer.numbers_key for one in again] == keys
    for one in again:
        one.set_random_seed(5)
    again.append(DQN.load(tmp_path / "model", env=vector_env("discrete", 1), seed=5))
    found = {one.learn(4, reset_num_timesteps=False).replay_buffer.numbers_key for one in again}
    assert found == {fold(again[0].policy._noise_seed, Stream.TRANSITIONS)} and found != {keys[0]}


# ---- sampling ---------------------------------------------------------------------------------------------------------


class Weighted(ReplayBuffer):
    """Has a way of sampling besides."""

    def weighted(self, batch_size: int) -> Any:
        return self._get_samples(np.random.randint(0, self.size(), batch_size))


class InPairs(ReplayBuffer):
    """Its other way of sampling gives what it has made of a sample."""

    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples = super()._get_samples(*args, **kwargs)
        return samples if self.plain else (samples.observations, samples.actions[:, :1])

    plain = True

    def pairs(self, batch_size: int) -> Any:
        self.plain = False
        try:
            return self._get_samples(np.random.randint(0, self.size(), batch_size))
        finally:
            self.plain = True


class Imitated(ReplayBuffer):
    """Puts other actions in."""

    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples = super()._get_samples(*args, **kwargs)
        return samples._replace(actions=th.where(th.rand(len(samples.actions), 1) < 0.5, 1, samples.actions))


class WithSupport(ReplayBuffer):
    """Its batches hold what is not of rows."""

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(**super().sample(*args, **kwargs)._asdict(), support=th.arange(5.0), beta=th.tensor(0.4))


def test_other_ways_of_sampling_give_actions_as_they_are() -> None:
    buffer: Any = build(replay_buffer_class=Weighted).learn(20).replay_buffer
    actions = buffer.weighted(6).actions
    assert actions.shape == (6, 1) and set(actions.flatten().tolist()) <= {0, 1, 2}


def test_other_ways_of_sampling_can_give_anything() -> None:
    buffer: Any = build(replay_buffer_class=InPairs).learn(20).replay_buffer
    assert [part.shape for part in buffer.pairs(6)] == [(6, 5), (6, 1)]


def test_actions_that_are_put_in_have_lost_their_numbers() -> None:
    with pytest.raises(TypeError, match=r"a sample of Imitated .* has lost the numbers of its transitions"):
        build(replay_buffer_class=Imitated).learn(30)


def test_what_is_not_of_rows_is_not_repeated() -> None:
    seen: list[Any] = []

    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            seen.append(self.replay_buffer.sample(batch_size))  # type: ignore[union-attr]
            super().train(gradient_steps, batch_size)

    build(Own, dict(keys_per_transition=4), replay_buffer_class=WithSupport).learn(20)
    assert seen
    for samples in seen:
        assert samples.support.shape == (5,) and samples.beta.shape == ()
        assert len(samples.observations) == len(samples.actions) == B


# ---- learning ---------------------------------------------------------------------------------------------------------


class OwnLoss(DQN):
    """Learns by a loop of its own, from what `batches` gives: samples, and what the network is asked about, if not these."""

    def batches(self, size: int) -> Any:
        return [(self.replay_buffer.sample(size),)]  # type: ignore[union-attr]

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.policy.set_training_mode(True)
        for _ in range(gradient_steps):
            loss = th.stack([self.loss(*batch) for batch in self.batches(batch_size)]).sum()
            self.policy.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.policy.optimizer.step()

    def loss(self, samples: Any, obs: Any = None) -> th.Tensor:
        with th.no_grad():
            goal = samples.rewards + self.gamma * self.q_net_target(samples.next_observations).max(1, keepdim=True)[0]
        values = self.q_net(samples.observations if obs is None else obs)[: len(goal)]
        return nn.functional.mse_loss(values.gather(1, samples.actions), goal)


class FromDemonstrations(OwnLoss):
    demonstrations: Any = None

    def batches(self, size: int) -> Any:
        if self.demonstrations is None:
            self.demonstrations = ReplayBuffer(20, self.observation_space, self.action_space)
            obs = self.observation_space.sample()
            for _ in range(20):
                self.demonstrations.add(obs, obs, np.array([0]), np.array([1.0]), np.array([False]), [{}])
        return [(self.demonstrations.sample(size),), (self.replay_buffer.sample(size),)]  # type: ignore[union-attr]


class ByWeights(OwnLoss):
    def batches(self, size: int) -> Any:
        return [(self.replay_buffer.weighted(size),)]  # type: ignore[union-attr]


class Joined(OwnLoss):
    def batches(self, size: int) -> Any:
        samples: Any = self.replay_buffer.sample(size)  # type: ignore[union-attr]
        return [(samples, th.cat([samples.observations, samples.next_observations]))]


class Shifted(OwnLoss):
    def batches(self, size: int) -> Any:
        samples: Any = self.replay_buffer.sample(size)  # type: ignore[union-attr]
        return [(samples, samples.observations + 0.01)]


NOISES: list[dict[str, Any]] = [dict(keys_per_transition=4), dict(reward_noise=0.5), dict(reward_noise=1.0)]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("algorithm", [FromDemonstrations, ByWeights, Joined])
def test_what_is_not_repeated_or_perturbed_is_said_once(algorithm: Any, noise: dict[str, Any]) -> None:
    model = build(algorithm, noise, replay_buffer_class=Weighted)
    with pytest.warns(UserWarning, match=r"=\S+: the network is asked, with gradients, about \d+ observations that") as told:
        model.learn(30)
    assert len(told) == 1


SILENT = [(algorithm, noise) for algorithm in (Shifted, OwnLoss, DQN) for noise in (*NOISES, {})]


# Of shifted observations, bootstrap cannot know the transitions, and refuses.
@pytest.mark.parametrize(("algorithm", "noise"), [*SILENT, (OwnLoss, dict(bootstrap=0.5)), (DQN, dict(bootstrap=0.5))])
def test_nothing_is_said_where_nothing_is_lost(algorithm: Any, noise: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(algorithm, noise).learn(30)


# ---- networks ---------------------------------------------------------------------------------------------------------


def test_modules_of_other_kinds_can_be_put_into_one_network() -> None:
    plain, more = (build() for _ in range(2))
    more.policy.q_net.probe = nn.Identity()
    weights = [model.learn(40).policy.q_net_target.state_dict() for model in (plain, more)]
    assert all(th.equal(a, b) for a, b in zip(*(one.values() for one in weights), strict=True))


def test_layers_that_only_one_network_has_are_refused() -> None:
    model = build()
    model.policy.q_net_target.q_net[2] = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="q_net_target has 1 perturbed layers and q_net, which it follows, 2"):
        model.learn(40)


@pytest.mark.parametrize("keys", [1, 3])
def test_members_that_cannot_differ_are_refused(keys: int) -> None:
    fixed: dict[str, Any] = dict(sigma_init=0.0, learn_sigma=False, keys_per_transition=keys)
    with pytest.raises(ValueError, match=r"members=4 does not fit sigma_init=0\.0 with learn_sigma=False"):
        build(DQN, fixed)
    values = build(DQN, {**fixed, "prior_scale": 0.5}).policy.member_values(np.ones((1, 5), np.float32))
    assert values.std(0).min() > 0
