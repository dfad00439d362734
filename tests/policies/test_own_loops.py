"""Learning loops, buffers and batches of users' own: what is lost in them is said, and what need not be lost is kept."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from multiprocessing import shared_memory
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.dqn.dqn
import stable_baselines3.sac.sac
import torch as th
from helpers import vector_env
from stable_baselines3 import DQN, SAC, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import BitFlippingEnv
from torch.nn import functional as F

import sb3_flipout
import sb3_flipout.hooks._finite
from sb3_flipout.finite import NonFiniteError
from sb3_flipout.noise import RowNoise
from sb3_flipout.noise.transitions import reward_draws
from sb3_flipout.policies import FlipoutDQNPolicy, FlipoutSACPolicy
from sb3_flipout.policies.sampled import MemberData
from sb3_flipout.replay_buffers import number_transitions, numbers_of

K, B = 10, 16
UNANNOUNCED = r"gets gradients outside of an update that its policy knows of, so it learns by the mean weights.*register"
ELSEWHERE = r"members=10: the network is asked, with gradients, about .* may learn from another member's target"


def build(algorithm: Any = DQN, policy: Any = "FlipoutMlpPolicy", noise: Any = None, **kwargs: Any) -> Any:
    settings: dict[str, Any] = dict(learning_starts=20, batch_size=B, buffer_size=50, train_freq=4, seed=0, device="cpu")
    settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    noise = {**dict(net_arch=[8], members=K), **(noise or {})}
    return algorithm(policy, vector_env("discrete", 1), policy_kwargs=noise, **{**settings, **kwargs})


# ---- algorithms and gradient steps that nobody has announced ----------------------------------------------------------


def copied(module: ModuleType, name: str) -> Any:
    """What a user has who copies a file of SB3's: a class that derives from no algorithm of this package."""
    with open(str(module.__file__)) as file:
        source = file.read().replace(f"class {name}(", f"class My{name}(")
    mine = ModuleType("mine")
    exec(compile(source, "mine.py", "exec"), vars(mine))
    return getattr(mine, f"My{name}")


def test_a_copied_dqn_is_told_that_it_loses_the_noise() -> None:
    mine = copied(stable_baselines3.dqn.dqn, "DQN")
    with pytest.warns(UserWarning, match="FlipoutQNetwork " + UNANNOUNCED) as told:
        build(mine, FlipoutDQNPolicy).learn(60)
    assert len(told) == 1, "once"


def test_a_copied_sac_is_told_that_it_loses_the_noise() -> None:
    mine = copied(stable_baselines3.sac.sac, "SAC")
    with pytest.warns(UserWarning, match="FlipoutActor " + UNANNOUNCED):
        mine(FlipoutSACPolicy, vector_env("box", 1), learning_starts=8, batch_size=8, device="cpu").learn(20)


def test_a_copied_sac_that_learns_by_the_mean_weights_loses_nothing() -> None:
    mine, settings = copied(stable_baselines3.sac.sac, "SAC"), dict(learning_starts=8, batch_size=8, device="cpu")
    mine(FlipoutSACPolicy, vector_env("box", 1), policy_kwargs=dict(update_noise="mean", learn_sigma=False), **settings).learn(
        20
    )


@pytest.fixture
def registered() -> Iterator[Any]:
    mine = copied(stable_baselines3.dqn.dqn, "DQN")
    sb3_flipout.register(mine, aliases={"FlipoutMlpPolicy": FlipoutDQNPolicy})
    yield mine
    sb3_flipout.unregister(mine)


def test_registered_it_learns_under_noise(registered: Any) -> None:
    model = build(registered, noise=dict(prior_scale=0.5, keys_per_transition=2)).learn(60)
    assert model.policy.learning.step == 10 and bool(model.policy.prior.unit.isfinite())


def values_of(model: Any) -> th.Tensor:
    values: th.Tensor = model.q_net(th.ones(2, 5)).sum()
    return values


def test_gradient_steps_outside_an_update_are_told_once() -> None:
    model = build()
    with pytest.warns(UserWarning, match=UNANNOUNCED) as told:
        values_of(model).backward()
        values_of(model).backward()
    assert len(told) == 1


def test_gradients_by_functions_of_torch_are_told_too() -> None:
    net = build().q_net
    with pytest.warns(UserWarning, match=UNANNOUNCED):
        th.func.grad(lambda given: th.func.functional_call(net, given, (th.ones(2, 5),)).sum())(dict(net.named_parameters()))


def test_who_only_looks_or_says_what_is_meant_is_not_warned() -> None:
    model = build().learn(40)
    values_of(model)
    with th.no_grad():
        values_of(model)
    for noise in (None, RowNoise(th.arange(2))):
        with sb3_flipout.perturbed(model.policy, noise):
            values_of(model).backward()
    with model.policy.updating():
        values_of(model).backward()
    model.policy.set_training_mode(False)
    values_of(model).backward()


# ---- members, each with its own target ----------------------------------------------------------------------------------


class Looks(DQN):
    """Notes which member each row is under, in the pass of the target and in those that learn."""

    seen: list[tuple[th.Tensor, th.Tensor]]

    def keys_of(self, net: Any, obs: th.Tensor, gradients: bool = True) -> th.Tensor:
        network, found = net.perturbed_network, []
        activate = network.activate

        def spy(what: Any, *args: Any) -> Any:
            found.append(what.keys)
            return activate(what, *args)

        network.activate = spy
        try:
            with th.set_grad_enabled(gradients):
                net(obs)
        finally:
            del network.activate
        return found[0]

    def train(self, gradient_steps: int, batch_size: int = B) -> None:
        self.policy.set_training_mode(True)
        self.seen = []
        self.learn_from(batch_size)

    def step(self) -> None:
        self.policy.optimizer.step()

    def sampled(self, size: int) -> tuple[Any, th.Tensor]:
        samples: Any = self.replay_buffer.sample(size)  # type: ignore[union-attr]
        return samples, self.keys_of(self.q_net_target, samples.next_observations, gradients=False)


class SeveralSteps(Looks):
    def learn_from(self, size: int) -> None:
        samples, target = self.sampled(size)
        for _ in range(3):
            self.seen.append((self.keys_of(self.q_net, samples.observations), target))
            self.step()


class SampledFirst(Looks):
    def learn_from(self, size: int) -> None:
        for samples, target in [self.sampled(size) for _ in range(3)]:
            self.seen.append((self.keys_of(self.q_net, samples.observations), target))
            self.step()


class Joined(Looks):
    """Two batches at once, in the pass of the target, too."""

    def learn_from(self, size: int) -> None:
        both = [self.replay_buffer.sample(size) for _ in range(2)]  # type: ignore[union-attr]
        obs, following = (th.cat([getattr(one, name) for one in both]) for name in ("observations", "next_observations"))
        target = self.keys_of(self.q_net_target, following, gradients=False)
        self.seen.append((self.keys_of(self.q_net, obs), target))
        self.step()


class Changed(Looks):
    """Shifts what it learns from, as is done with images."""

    def learn_from(self, size: int) -> None:
        samples: Any = self.replay_buffer.sample(size)  # type: ignore[union-attr]
        target = self.keys_of(self.q_net_target, samples.next_observations + 0.1, gradients=False)
        self.seen.append((self.keys_of(self.q_net, samples.observations + 0.1), target))
        self.step()


@pytest.mark.parametrize("loop", [SeveralSteps, SampledFirst, Joined, Changed])
def test_each_row_learns_from_its_own_members_target(loop: Any) -> None:
    model = build(loop).learn(40)
    assert len(model.seen) in (1, 3)
    for learned, target in model.seen:
        assert len(learned.unique()) > 3 and learned.tolist() == target.tolist()


class Sliced(Looks):
    def learn_from(self, size: int) -> None:
        samples, _ = self.sampled(size)
        for first in range(0, size, 4):
            self.q_net(samples.observations[first : first + 4]).sum().backward()
        self.step()


class OnePass(Looks):
    """Double Q-learning that asks the online network about both observations at once."""

    def learn_from(self, size: int) -> None:
        samples, _ = self.sampled(size)
        self.q_net(th.cat([samples.observations, samples.next_observations])).sum().backward()
        self.step()


@pytest.mark.parametrize("loop", [Sliced, OnePass])
def test_rows_that_may_learn_from_another_members_target_are_told(loop: Any) -> None:
    with pytest.warns(UserWarning, match=ELSEWHERE) as told:
        build(loop).learn(40)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(loop, noise=dict(members=None)).learn(40)
        build(loop, noise=dict(target_noise="independent")).learn(40)


class Elsewhere(DQN):
    """Keeps its transitions in a place of its own, of a form of its own."""

    def _store_transition(self, *args: Any, **kwargs: Any) -> None:
        self.replay_buffer = None

    def train(self, gradient_steps: int, batch_size: int = B) -> None:
        self.policy.set_training_mode(True)
        with th.no_grad():
            self.q_net_target(th.ones(B, 5))
        self.q_net(th.ones(B, 5)).sum().backward()
        self.policy.optimizer.step()


class OfTuples(ReplayBuffer):
    def sample(self, batch_size: int, env: Any = None) -> Any:
        samples = super().sample(batch_size, env)
        return samples.observations, samples.actions


class LearnsTuples(DQN):
    def train(self, gradient_steps: int, batch_size: int = B) -> None:
        obs, _ = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
        self.q_net(obs).sum().backward()
        self.policy.optimizer.step()


class OfArrays(ReplayBuffer):
    def sample(self, batch_size: int, env: Any = None) -> Any:
        samples = super().sample(batch_size, env)
        return samples._replace(observations=samples.observations.numpy())


class LearnsArrays(DQN):
    def train(self, gradient_steps: int, batch_size: int = B) -> None:
        samples: Any = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
        self.q_net(th.as_tensor(samples.observations)).sum().backward()
        self.policy.optimizer.step()


def test_members_alone_need_no_buffer_nor_batches_of_sb3s() -> None:
    assert build(Elsewhere).learn(40).policy.learning.step > 0
    assert build(LearnsTuples, replay_buffer_class=OfTuples).learn(40).policy.learning.step > 0
    assert build(LearnsArrays, replay_buffer_class=OfArrays).learn(40).policy.learning.step > 0


class Slotted:
    """Cannot be listened to: nothing can be put before its method."""

    __slots__ = ()

    def sample(self) -> None: ...


@pytest.mark.parametrize("buffer", [[], SimpleNamespace(), Slotted()])
def test_members_alone_train_beside_any_buffer(buffer: Any) -> None:
    model = build(Elsewhere).learn(40)
    model.replay_buffer, steps = buffer, model.policy.learning.step
    model.train(1, B)
    assert model.policy.learning.step == steps + 1


# ---- rewards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [th.float32, th.float64, th.int8, th.int64])
@pytest.mark.parametrize("flat", [False, True])
def test_rewards_keep_their_form_whatever_their_numbers(flat: bool, dtype: th.dtype) -> None:
    numbers, members = th.arange(1, 41), th.arange(40) % K
    rewards = (th.arange(40) % 3 - 1).to(dtype)
    rewards = rewards if flat else rewards[:, None]
    found = MemberData(reward_noise=0.5).perturbed_rewards(rewards, numbers, members)
    assert found.shape == rewards.shape
    slow = [float(rewards.flatten()[i]) + 0.5 * float(reward_draws(numbers[i], members[i])) for i in range(40)]
    th.testing.assert_close(found.flatten().double(), th.tensor(slow, dtype=th.float64), rtol=1e-6, atol=1e-6)


class FlatIntegers(ReplayBuffer):
    """Keeps clipped rewards as whole numbers, and gives them flat."""

    def sample(self, batch_size: int, env: Any = None) -> Any:
        samples = super().sample(batch_size, env)
        return samples._replace(rewards=samples.rewards.sign().to(th.int8).flatten(), dones=samples.dones.flatten())


class Flat(DQN):
    def train(self, gradient_steps: int, batch_size: int = B) -> None:
        self.policy.set_training_mode(True)
        samples: Any = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
        with th.no_grad():
            target = samples.rewards + (1 - samples.dones) * self.q_net_target(samples.next_observations).amax(1)
        self.errors = self.q_net(samples.observations).gather(1, samples.actions)[:, 0] - target
        self.policy.optimizer.zero_grad()
        self.errors.square().mean().backward()
        self.policy.optimizer.step()


def test_a_buffer_of_flat_rewards_is_learned_from_row_by_row() -> None:
    assert build(Flat, noise=dict(reward_noise=0.5), replay_buffer_class=FlatIntegers).learn(40).errors.shape == (B,)


# ---- buffers ------------------------------------------------------------------------------------------------------------


def spaces() -> list[Any]:
    return [getattr(vector_env("discrete", 1), f"{of}_space") for of in ("observation", "action")]


def in_file(array: np.ndarray, folder: Any) -> np.ndarray:
    return np.memmap(folder / "actions", dtype=array.dtype, mode="w+", shape=array.shape)


@pytest.mark.parametrize("view", [False, True])
def test_actions_in_a_file_are_refused(tmp_path: Any, view: bool) -> None:
    buffer = ReplayBuffer(10, *spaces())
    actions = in_file(buffer.actions, tmp_path)
    buffer.actions = np.asarray(actions) if view else actions
    with pytest.raises(TypeError, match=r"ReplayBuffer cannot be given numbers.* not in a file or in memory that is shared"):
        number_transitions(buffer, 1)
    assert type(buffer) is ReplayBuffer and buffer.actions.shape == (10, 1, 1)


def test_actions_in_shared_memory_are_refused() -> None:
    buffer = ReplayBuffer(10, *spaces())
    memory = shared_memory.SharedMemory(create=True, size=buffer.actions.nbytes)
    try:
        buffer.actions = np.ndarray(buffer.actions.shape, buffer.actions.dtype, memory.buf)
        with pytest.raises(TypeError, match="in memory that is shared"):
            number_transitions(buffer, 1)
    finally:
        buffer.actions = np.zeros(1)
        memory.close()
        memory.unlink()


def test_actions_of_its_own_are_widened_however_they_were_made(tmp_path: Any) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        buffer = pickle.loads(pickle.dumps(ReplayBuffer(10, *spaces()), protocol))
        assert number_transitions(buffer, 1) == 0
    buffer = ReplayBuffer(10, *spaces())
    buffer.actions = np.zeros(10, np.int64).reshape(10, 1, 1)
    assert number_transitions(buffer, 1) == 0
    buffer = ReplayBuffer(10, *spaces())
    buffer.actions = in_file(buffer.actions, tmp_path).copy()
    assert number_transitions(buffer, 1) == 0


@pytest.mark.parametrize("filled", ["not", "by add", "by hand"])
def test_a_buffer_made_from_the_class_of_the_present_one_numbers_too(filled: str) -> None:
    model = build(noise=dict(bootstrap=0.5, reward_noise=0.1)).learn(40)
    buffer = model.replay_buffer = type(model.replay_buffer)(60, *spaces())
    if filled == "by add":
        for _ in range(30):
            obs = model.observation_space.sample()[None]
            buffer.add(obs, obs, np.array([[1]]), np.zeros(1), np.zeros(1), [{}])
    elif filled == "by hand":
        buffer.actions[:30], buffer.pos = 1, 30
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.learn(40, reset_num_timesteps=False)
    assert ["held 30 transitions without the numbers" in str(one.message) for one in told] == [True] * (filled == "by hand")
    numbers: Any = numbers_of(buffer.sample(500))
    assert len(numbers.unique()) == buffer.size()


class AsksInside(HerReplayBuffer):
    """Has a way of sampling besides."""

    def stored(self, size: int) -> Any:
        places = np.flatnonzero((self.ep_length > 0).flatten())[:size]
        return self._get_real_samples(np.unravel_index(places, self.ep_length.shape)[0], np.zeros(size, np.int64))

    def relabelled(self, size: int) -> Any:
        places = np.flatnonzero((self.ep_length > 0).flatten())[:size]
        return self._get_virtual_samples(np.unravel_index(places, self.ep_length.shape)[0], np.zeros(size, np.int64))


def test_other_ways_of_sampling_of_her_give_actions_as_they_know_them() -> None:
    env: gym.Env[Any, Any] = BitFlippingEnv(4, max_steps=4)
    noise: dict[str, Any] = dict(net_arch=[8], members=K, bootstrap=0.5)
    settings: dict[str, Any] = dict(learning_starts=20, batch_size=B, buffer_size=50, device="cpu", policy_kwargs=noise)
    settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0, replay_buffer_class=AsksInside)
    model: Any = DQN("FlipoutMultiInputPolicy", env, **settings).learn(40)
    for samples in (model.replay_buffer.stored(8), model.replay_buffer.relabelled(8)):
        assert samples.actions.shape == (8, 1) and numbers_of(samples) is not None
    assert numbers_of(model.replay_buffer.sample(8)) is not None


# ---- learning from what is given ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dqn", "sac"])
def test_learning_without_collection_looks_at_the_parameters(algorithm: str) -> None:
    if algorithm == "dqn":
        model = build(train_freq=1000).learn(40)
    else:
        model = SAC("FlipoutMlpPolicy", vector_env("box", 1), learning_starts=1000, device="cpu").learn(40)
    model.replay_buffer.rewards[:] = np.nan
    with pytest.raises(NonFiniteError, match="not finite"):
        for _ in range(11):
            model.train(100, B)


class Breaks(DQN):
    def train(self, gradient_steps: int, batch_size: int = B) -> None:
        super().train(gradient_steps, batch_size)
        with th.no_grad():
            self.q_net.q_net[0].bias.fill_(th.nan)


class Mends(BaseCallback):
    def _on_rollout_start(self) -> None:
        with th.no_grad():
            self.model.q_net.q_net[0].bias.fill_(0.0)  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def test_a_callback_may_mend_parameters_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sb3_flipout.hooks._finite, "LOOK_EVERY", 1)
    build(Breaks).learn(60, Mends())
    with pytest.raises(NonFiniteError):
        build(Breaks).learn(60)


# ---- what is asked ------------------------------------------------------------------------------------------------------


def test_parts_of_a_network_asked_by_themselves_are_refused_with_what_to_do() -> None:
    class Parts(DQN):
        def train(self, gradient_steps: int, batch_size: int = B) -> None:
            samples: Any = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
            net = self.q_net
            F.relu(net.q_net(net.extract_features(samples.observations, net.features_extractor)))

    with pytest.raises(RuntimeError, match=r"off-policy, ask the whole network, self\.q_net\(samples\.observations\)"):
        build(Parts).learn(40)


def test_values_of_single_observations_in_a_dictionary_are_refused() -> None:
    env = BitFlippingEnv(4)
    model: Any = DQN("FlipoutMultiInputPolicy", env, buffer_size=50, device="cpu", policy_kwargs=dict(members=K))
    one = {name: th.ones(4) for name in env.observation_space.spaces}
    with pytest.raises(ValueError, match=r"takes tensors of 'achieved_goal' of the shape \(N, 4\), got \(4,\)"):
        model.policy.member_values(one)
    batch = {name: part[None] for name, part in one.items()}
    assert model.policy.member_values(batch).shape == (K, 1, 4)
