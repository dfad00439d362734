"""Updates of users' own: other optimizers, buffers that are copied meanwhile, batches sampled before, changed networks."""

from __future__ import annotations

import copy
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomEnv, vector_env
from sb3_contrib import CrossQ
from stable_baselines3 import DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.dqn.policies import QNetwork
from torch import nn

import sb3_flipout
from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.noise import RowNoise, fold, fold_in
from sb3_flipout.noise.transitions import reward_draws
from sb3_flipout.policies import FlipoutActorCriticPolicy, FlipoutDQNMultiInputPolicy
from sb3_flipout.replay_buffers import NumberedBufferMixin, number_transitions, numbers_of

K, B = 4, 24
CPU = th.device("cpu")


def build(algorithm: Any = DQN, policy: Any = "FlipoutMlpPolicy", noise: Any = None, env: Any = None, **kwargs: Any) -> Any:
    settings: dict[str, Any] = dict(learning_starts=20, batch_size=B, buffer_size=300, train_freq=4, seed=0, device="cpu")
    if issubclass(algorithm, DQN):
        settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
        env = env or vector_env("discrete", 1)
    noise = {**dict(net_arch=[8], members=K), **(noise or {})}
    return algorithm(policy, env or vector_env("box", 1), policy_kwargs=noise, **{**settings, **kwargs})


def members_of(model: Any, rows: int, samples: Any = None) -> list[int]:
    """Members that the rows of a batch are learned under."""
    learning = model.policy.learning
    batch = None if samples is None else learning.batches.of(samples.observations)
    return list(learning.rows(0, rows, CPU, batch).keys.tolist())


# ---- optimizers -------------------------------------------------------------------------------------------------------


class Held(DQN):
    """Steps an optimizer of its own, of which nobody is told."""

    own_data = False

    def _setup_model(self) -> None:
        super()._setup_model()
        self.seen: list[list[int]] = []

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        for _ in range(gradient_steps):
            samples = None if self.own_data else self.replay_buffer.sample(batch_size)
            self.seen.append(members_of(self, batch_size, samples))
            self.q_net.zero_grad()
            self.q_net(th.rand(batch_size, 5) if samples is None else samples.observations).sum().backward()
            th.optim.Adam(self.q_net.parameters(), lr=1e-3, fused=True).step()


@pytest.mark.parametrize("members", [None, K])
def test_steps_of_an_optimizer_of_one_s_own_count(members: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(Held, noise=dict(members=members), gradient_steps=3).learn(100)
    assert model.policy.learning.step == len(model.seen) == len(set(map(tuple, model.seen))) == 60


def test_steps_that_nobody_sees_are_told() -> None:
    model = build(type("Own", (Held,), dict(own_data=True)), gradient_steps=3)
    with pytest.warns(UserWarning, match="an update has learned without a step of the policy's own optimizer") as told:
        model.learn(100)
    assert len([one for one in told if "without a step" in str(one.message)]) == 1
    assert model.policy.learning.step == len(set(map(tuple, model.seen))) == 20
    assert model.policy.learning.unseen is None


def test_where_mean_weights_learn_nobody_is_told_of_steps() -> None:
    model = build(type("Own", (Held,), dict(own_data=True)))
    with warnings.catch_warnings(), sb3_flipout.perturbed(model.policy, None):
        warnings.simplefilter("error")
        model.learn(60)
    env = vector_env("box", 1)
    model = SAC("FlipoutMlpPolicy", env, policy_kwargs=dict(update_noise="mean", learn_sigma=False, net_arch=[8]), seed=0)
    with warnings.catch_warnings(), model.policy.updating():
        warnings.simplefilter("error")
        for _ in range(3):
            model.actor(th.rand(3, 5)).sum().backward()
            th.optim.SGD(model.actor.parameters(), lr=0.1).step()
    assert model.policy.learning.step == 0


def test_updates_of_one_s_own_are_told_of_steps() -> None:
    model = build().learn(24)
    step = model.policy.learning.step
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.policy.updating():
            for _ in range(2):
                model.q_net(th.rand(3, 5)).sum().backward()
        model.policy.optimizer.step()
    with pytest.warns(UserWarning, match=r"call model.policy.learning.count\(\) after each"), model.policy.updating():
        for _ in range(3):
            model.q_net(th.rand(3, 5)).sum().backward()
            th.optim.SGD(model.q_net.parameters(), lr=0.1).step()
    with warnings.catch_warnings(), model.policy.updating():
        warnings.simplefilter("error")
        for _ in range(3):
            model.q_net(th.rand(3, 5)).sum().backward()
            model.policy.learning.count()
    assert model.policy.learning.step == step + 5


def test_an_update_inside_an_update_is_part_of_it() -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            with self.policy.updating():
                super().train(1, batch_size)
            super().train(1, batch_size)
            seen.append(self.policy.learning.active)

    seen: list[bool] = []
    model = build(Own).learn(60)
    assert seen == [True] * 10 and model.policy.learning.step == 20 and not model.policy.learning.active


@pytest.mark.parametrize("members", [None, 8])
def test_steps_of_the_critic_alone_count(members: int | None) -> None:
    """A warm-up: the actor's optimizer, whose steps count, makes none."""

    class WarmUp(SAC):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            for _ in range(gradient_steps):
                samples = self.replay_buffer.sample(batch_size)
                seen.append(members_of(self, batch_size, samples))
                loss = sum(values.square().mean() for values in self.critic(samples.observations, samples.actions))
                self.critic.optimizer.zero_grad()
                loss.backward()
                self.critic.optimizer.step()

    seen: list[list[int]] = []
    model = build(WarmUp, noise=dict(members=members, perturb="all"), gradient_steps=2).learn(60)
    assert model.policy.learning.step == len(seen) == len(set(map(tuple, seen))) == 20


@pytest.mark.parametrize("algorithm", [DQN, SAC, TD3, CrossQ])
@pytest.mark.parametrize("members", [None, K])
def test_stock_steps_count_once(algorithm: Any, members: int | None) -> None:
    model = build(algorithm, gradient_steps=3, noise=dict(members=members)).learn(60)
    assert model.policy.learning.step == 30 and model.policy.learning.unseen is None


def test_accumulated_batches_count_one_by_one() -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            for _ in range(3):
                samples = self.replay_buffer.sample(batch_size)
                seen.append(members_of(self, batch_size, samples))
                self.q_net(samples.observations).sum().backward()
            self.policy.optimizer.step()

    seen: list[list[int]] = []
    model = build(Own).learn(60)
    assert model.policy.learning.step == len(seen) == len(set(map(tuple, seen))) == 30


def test_an_update_that_learns_nothing_counts_nothing() -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            for _ in range(3):
                samples = self.replay_buffer.sample(batch_size)
                self.q_net_target(samples.next_observations)
                with th.no_grad():
                    self.q_net(samples.observations)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(Own).learn(60).policy.learning.step == 0


def test_a_step_counts_once_however_much_is_sampled_after_it() -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            self.q_net(self.replay_buffer.sample(batch_size).observations).sum().backward()
            for _ in range(3):
                self.replay_buffer.sample(batch_size)
            copies.append(copy.deepcopy(self.policy.learning))

    copies: list[Any] = []
    model = build(Own).learn(60)
    assert model.policy.learning.step == 10 and all(one.unseen is None and not one.active for one in copies)


class Twice(DQN):
    """An auxiliary loss is stepped between the target and the values that are to meet it."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.auxiliary = th.optim.SGD(self.q_net.parameters(), lr=1e-3)
        self.seen: list[list[int]] = []

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        samples, keys = self.replay_buffer.sample(batch_size), []
        for net, obs in ((self.q_net_target, samples.next_observations), (self.q_net, samples.observations)):
            with net.step_noise(obs):
                keys.append(net.perturbed_network.active.keys.tolist())
            self.q_net(th.rand_like(samples.observations)).sum().backward()
            self.auxiliary.step()
        self.seen.append(keys[0] if keys[0] == keys[1] else [])


@pytest.mark.parametrize("members", [None, K])
def test_an_auxiliary_step_does_not_part_target_and_values(members: int | None) -> None:
    model = build(Twice, noise=dict(members=members, target_noise="same")).learn(60)
    assert len(set(map(tuple, model.seen))) == len(model.seen) == 10 and all(model.seen)


# ---- members of actors and critics -------------------------------------------------------------------------------------


def keys_seen(net: Any, *given: Any) -> list[int]:
    seen: list[Any] = []
    layer = next(module for module in net.modules() if isinstance(module, FlipoutLayer))
    hook = layer.register_forward_pre_hook(lambda *_: seen.append(net.perturbed_network.active))  # type: ignore[arg-type]
    net(*given)
    hook.remove()
    assert seen[0].scale.eq(net.learning.scale).all() and net.learning.scale == 0.5
    return list(seen[0].keys.tolist())


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_critics_that_are_stepped_in_turn_learn_under_the_members_of_their_target(algorithm: Any) -> None:
    class InTurn(algorithm):  # type: ignore[misc]
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            samples = self.replay_buffer.sample(batch_size)
            next_actor = self.actor if algorithm is SAC else self.actor_target
            with th.no_grad():
                seen = [
                    keys_seen(next_actor, samples.next_observations),
                    keys_seen(self.critic_target, samples.next_observations, samples.actions),
                ]
            for _ in range(2):
                seen.append(keys_seen(self.critic, samples.observations, samples.actions))
                self.critic(samples.observations, samples.actions)[0].sum().backward()
                self.critic.optimizer.step()
            seen.append(keys_seen(self.actor, samples.observations))
            self.actor.optimizer.step()
            compared.append(all(keys == seen[0] for keys in seen))

    compared: list[bool] = []
    model = build(InTurn, noise=dict(perturb="all"))
    model.policy.noise_scale = 0.5
    model.learn(60)
    assert len(compared) == 10 and all(compared)


@pytest.mark.parametrize("members", [3, None])
@pytest.mark.parametrize("prefetched", [False, True])
def test_crossq_s_targets_come_from_a_row_s_own_member(members: int | None, prefetched: bool) -> None:
    class Own(CrossQ):
        last: Any = None

        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            samples = self.replay_buffer.sample(batch_size)
            self.last, used = samples, self.last if prefetched and self.last is not None else samples
            own = members_of(self, batch_size, used)
            both = th.cat([used.observations, used.next_observations])
            keys = keys_seen(self.critic, both, th.cat([used.actions, used.actions]))
            self.critic.optimizer.step()
            found.append((keys[:batch_size] == own, keys[batch_size:] == own))
            assert len(keys_seen(self.critic, both[1:-1], th.cat([used.actions, used.actions])[1:-1])) == 2 * batch_size - 2

    found: list[tuple[bool, bool]] = []
    model = build(Own, noise=dict(perturb="all", members=members))
    model.policy.noise_scale = 0.5
    model.learn(60)
    assert set(found[1:]) == {(True, members is not None)} and len(found) == 10


# ---- buffers in the middle of an update --------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "numbers"), [(DQN, False), (DQN, True), (SAC, False)])
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "save"])
def test_copies_of_a_buffer_sample_from_themselves(algorithm: Any, way: str, numbers: bool, tmp_path: Any) -> None:
    copies: list[Any] = []

    class Own(algorithm):  # type: ignore[misc]
        def train(self, *args: Any, **kwargs: Any) -> None:
            buffer = self.replay_buffer
            if way == "save":
                self.save_replay_buffer(tmp_path / "buffer")
                with open(tmp_path / "buffer.pkl", "rb") as file:
                    copies.append(pickle.load(file))
            else:
                written = pickle.dumps(buffer)
                assert (b"sb3_flipout" in written) == numbers  # members alone leave a buffer that stock SB3 can load
                copies.append(copy.deepcopy(buffer) if way == "deepcopy" else pickle.loads(written))
            super().train(*args, **kwargs)

    noise = dict(reward_noise=1e6, keys_per_transition=2) if numbers else {}
    build(Own, noise=noise).learn(40)
    assert len(copies) == 5
    for found in copies:
        samples = found.sample(10)
        assert samples.observations.shape == (10, 5) and float(samples.rewards.abs().max()) < 10
        assert isinstance(found, NumberedBufferMixin) == numbers == (numbers_of(samples) is not None)
        found.observations[:] = 7
        assert float(found.sample(10).observations.min()) == 7


@pytest.mark.parametrize("kind", [ReplayBuffer, HerReplayBuffer])
def test_a_copy_can_be_numbered_afterwards(kind: Any) -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            copies.append(pickle.loads(pickle.dumps(self.replay_buffer)))

    copies: list[Any] = []
    her: dict[str, Any] = dict(policy="FlipoutMultiInputPolicy", env=BitFlippingEnv(4), replay_buffer_class=HerReplayBuffer)
    kwargs = her if kind is HerReplayBuffer else {}
    build(Own, **kwargs).learn(40)
    model = build(noise=dict(bootstrap=0.5), **kwargs)
    model.replay_buffer = copies[-1]
    if kind is HerReplayBuffer:
        model.replay_buffer.set_env(model.env)
    with pytest.warns(UserWarning, match="without the numbers"):
        model.learn(40)
    assert numbers_of(model.replay_buffer.sample(8)) is not None


def test_a_sample_of_the_user_s_on_the_buffer_is_copied_as_it_is() -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            copies.append(copy.copy(self.replay_buffer.sample))

    copies: list[Any] = []
    model = build(Own)
    own = model.replay_buffer.sample = model.replay_buffer.sample
    model.learn(30)
    assert copies and all(one == own for one in copies) and vars(model.replay_buffer)["sample"] == own


def test_who_learns_inside_another_s_update_gets_its_own_batches() -> None:
    given: list[Any] = []

    class Inner(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            given.append(self.replay_buffer.sample(batch_size))

    class Outer(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            inner.train(1, batch_size)
            given.append(self.replay_buffer.sample(batch_size))

    inner = build(Inner, noise=dict(keys_per_transition=4))
    outer = build(Outer, noise=dict(keys_per_transition=2, reward_noise=1e6))
    inner.replay_buffer = outer.replay_buffer
    outer.learn(100)
    assert len(given) == 40 and "sample" not in vars(outer.replay_buffer)
    for samples, times, noise in zip(given, [4, 2] * 20, [False, True] * 20, strict=True):
        rows = samples.observations
        assert len(rows) == B and all(th.equal(rows[::times], rows[n::times]) for n in range(times))
        assert not th.equal(rows[::4], rows[2::4]) or times == 4
        assert (float(samples.rewards.abs().max()) > 1000) == noise


@pytest.mark.parametrize("noise", [dict(members=None), {}, dict(keys_per_transition=2, reward_noise=1e6)])
def test_a_sample_that_is_kept_is_the_buffer_s_own_outside_of_updates(noise: dict[str, Any]) -> None:
    held: list[Any] = []

    class Own(DQN):
        def train(self, *args: Any, **kwargs: Any) -> None:
            held.append(self.replay_buffer.sample)
            super().train(*args, **kwargs)
            if len(held) == 5:
                raise KeyboardInterrupt

    model = build(Own, noise=noise)
    with pytest.raises(KeyboardInterrupt):
        model.learn(60)
    assert len(held) == 5 and model.policy.learning.unseen is None
    for sample in held:
        np.random.seed(3)
        given = sample(200)
        np.random.seed(3)
        assert th.equal(given.observations, model.replay_buffer.sample(200).observations)
        assert float(given.rewards.abs().max()) < 10


class ByProperty(ReplayBuffer):
    @property
    def sample(self) -> Any:
        return super().sample


@pytest.mark.parametrize("members", [None, K])
def test_a_buffer_on_which_no_sample_can_stand_is_sampled_as_it_is(members: int | None) -> None:
    model = build(noise=dict(members=members), replay_buffer_class=ByProperty).learn(60)
    assert model.policy.learning.step == 10 and "sample" not in vars(model.replay_buffer)
    with pytest.raises(
        TypeError, match="keys_per_transition=2 needs batches of the model's replay_buffer, and ByProperty has"
    ):
        build(noise=dict(keys_per_transition=2), replay_buffer_class=ByProperty).learn(60)


# ---- batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_batch_of_the_last_update_keeps_its_members(times: int, share: float) -> None:
    class Prefetch(DQN):
        todo: Any = None

        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            self.replay_buffer.rewards[:] = 1
            samples = self.replay_buffer.sample(batch_size)
            sampled = samples, members_of(self, batch_size)
            if self.todo is not None:
                (samples, members), net = self.todo, self.q_net
                numbers = self.policy.learning.batches.of(samples.observations).numbers
                assert members_of(self, batch_size, samples) == members != members_of(self, batch_size)
                noise = reward_draws(numbers, th.tensor(members), th.float32)
                assert th.allclose(samples.rewards[:, 0], 1 + 0.3 * noise)
                values = net(samples.observations)
                with th.no_grad(), net.perturbed_network.activate(RowNoise(th.tensor(members))):
                    assert th.allclose(values, net(samples.observations.clone()), atol=1e-6)
                values.sum().backward()
                learned.append(len(values))
            self.todo = sampled
            self.policy.optimizer.step()

    learned: list[int] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(Prefetch, noise=dict(reward_noise=0.3, bootstrap=share, keys_per_transition=times)).learn(60)
    assert learned == [B] * 9


def test_where_mean_weights_learn_batches_are_stock() -> None:
    given: list[Any] = []

    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            given.append(self.replay_buffer.sample(batch_size))
            self.q_net(given[-1].observations).sum().backward()
            self.policy.optimizer.step()

    model = build(Own, noise=dict(reward_noise=1e6, keys_per_transition=K, bootstrap=0.5)).learn(40)
    assert len(given[-1].observations.unique(dim=0)) <= B // K and float(given[-1].rewards.abs().max()) > 1000
    with sb3_flipout.perturbed(model.policy, None):
        model.learn(40, reset_num_timesteps=False)
    assert len(given[-1].observations.unique(dim=0)) > B // K and float(given[-1].rewards.abs().max()) < 10


SIGNATURES: dict[str, Any] = {
    "whatever comes": lambda self, *args, **kwargs: ReplayBuffer.sample(self, *args, **kwargs),
    "by name alone": lambda self, *, batch_size, env=None: ReplayBuffer.sample(self, batch_size, env),
    "second": lambda self, env=None, batch_size=B: ReplayBuffer.sample(self, batch_size, env),
    "another name": lambda self, n, env=None: ReplayBuffer.sample(self, n, env),
}


@pytest.mark.parametrize("kind", SIGNATURES)
@pytest.mark.parametrize("numbers", [False, True])
def test_the_size_is_found_wherever_it_is_given(kind: str, numbers: bool) -> None:
    given: list[Any] = []

    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            sample = self.replay_buffer.sample
            calls: dict[str, list[Any]] = {
                "whatever comes": [lambda: sample(B), lambda: sample(batch_size=B, env=None), lambda: sample(B, env=None)],
                "by name alone": [lambda: sample(batch_size=B), lambda: sample(env=None, batch_size=B)],
                "second": [sample, lambda: sample(None, B), lambda: sample(batch_size=B), lambda: sample(env=None)],
                "another name": [lambda: sample(B), lambda: sample(n=B), lambda: sample(env=None, n=B)],
            }
            given.extend(call() for call in calls[kind])

    buffer = type("Mine", (ReplayBuffer,), dict(sample=SIGNATURES[kind]))
    noise = dict(keys_per_transition=2, reward_noise=0.1 if numbers else 0.0)
    build(Own, noise=noise, replay_buffer_class=buffer).learn(24)
    assert len(given) > 1
    for samples in given:
        assert len(samples.observations) == B and th.equal(samples.observations[::2], samples.observations[1::2])


@pytest.mark.parametrize("buffer", [None, [], SimpleNamespace()])
@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (dict(keys_per_transition=2), r"keys_per_transition=2 needs batches of the model's replay_buffer, and (None|\w+) has"),
        (dict(reward_noise=0.1), r"(no replay_buffer that could|replay_buffer_class=\w+ cannot) be given numbers of transit"),
    ],
)
def test_what_is_no_buffer_is_refused(buffer: Any, noise: Any, message: str) -> None:
    model = build(noise=noise).learn(24)
    model.replay_buffer = buffer
    with pytest.raises(TypeError, match=message):
        model.train(1, B)


def test_of_tensors_that_a_buffer_fills_anew_the_last_batch_is_known() -> None:
    class Same(ReplayBuffer):
        kept: Any = None

        def sample(self, batch_size: int, env: Any = None) -> Any:
            new = super().sample(batch_size, env)
            self.kept = new if self.kept is None else self.kept
            self.kept.observations.copy_(new.observations)
            return self.kept

    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            for _ in range(3):
                samples = self.replay_buffer.sample(batch_size)
                (batch,) = self.policy.learning.batches.noted
                assert batch is self.policy.learning.batches.of(samples.observations)
                assert batch.step == self.policy.learning.step
                self.policy.optimizer.step()

    model = build(Own, replay_buffer_class=Same).learn(60)
    assert model.policy.learning.step == 30


def test_a_batch_that_a_buffer_keeps_is_left_as_it_is() -> None:
    class Keeps(ReplayBuffer):
        kept: Any = None

        def sample(self, batch_size: int, env: Any = None) -> Any:
            if self.kept is None:
                self.kept = SimpleNamespace(**super().sample(batch_size, env)._asdict())
            return self.kept

    for times in (1, 2):
        noise = dict(keys_per_transition=times, reward_noise=1e6)
        buffer = build(noise=noise, replay_buffer_class=Keeps).learn(60).replay_buffer
        assert buffer.kept.actions.shape == (B // times, 2) and float(buffer.kept.rewards.abs().max()) < 10


# ---- numbers of transitions ---------------------------------------------------------------------------------------------


def filled(kind: Any = ReplayBuffer, rows: int = 8) -> Any:
    buffer = kind(100, spaces.Box(-1, 1, (5,)), spaces.Discrete(3), "cpu")
    generator = np.random.default_rng(0)
    for _ in range(rows):
        buffer.add(generator.normal(size=(1, 5)), generator.normal(size=(1, 5)), np.zeros(1), np.zeros(1), np.zeros(1), [{}])
    return buffer


@pytest.mark.parametrize("way", ["_get_samples", "sample"])
def test_what_is_written_by_hand_gets_numbers_in_every_way_of_sampling(way: str) -> None:
    buffer = filled()
    number_transitions(buffer, 5)
    buffer.actions[4:12] = 2
    buffer.pos = 12
    samples = buffer._get_samples(np.arange(12)) if way == "_get_samples" else buffer.sample(200)
    numbers: Any = numbers_of(samples)
    assert len(set(numbers.tolist())) == 12 and set(samples.actions[:, 0].tolist()) == {0, 2}
    assert len(set(buffer.actions[:12, 0, 1].tolist())) == 12


def test_actions_that_are_made_anew_get_numbers_that_nobody_has() -> None:
    buffer = filled()
    number_transitions(buffer, 5)
    before = buffer.actions[:8, 0, 1].tolist()
    buffer.actions = buffer.actions[..., :1].copy()
    buffer.add(np.zeros((1, 5)), np.zeros((1, 5)), np.zeros(1), np.zeros(1), np.zeros(1), [{}])
    assert len({*before, *buffer.actions[:9, 0, 1].tolist()}) == 17


class ReadOnly(ReplayBuffer):
    """Keeps its actions under another name."""

    @property
    def actions(self) -> Any:
        return self.stored

    @actions.setter
    def actions(self, given: Any) -> None:
        if hasattr(self, "stored"):
            raise AttributeError("property 'actions' has no setter")
        self.stored = given


class Deaf(ReadOnly):
    actions = ReadOnly.actions.setter(lambda self, given: self.__dict__.setdefault("stored", given))


@pytest.mark.parametrize("kind", [ReadOnly, Deaf])
def test_actions_that_cannot_be_replaced_are_refused_and_nothing_changes(kind: Any) -> None:
    buffer = filled(kind)
    with pytest.raises(TypeError, match=rf"replay_buffer_class={kind.__name__} cannot be given .* that can be replaced"):
        number_transitions(buffer, 5)
    assert type(buffer) is kind and buffer.actions.shape == (100, 1, 1) and len(buffer.sample(4).actions) == 4


@pytest.mark.parametrize("rows", [1, 40])
def test_numbers_do_not_depend_on_the_default_device(rows: int) -> None:
    """Few are hashed by Python, many by torch: the same ones."""
    buffer = filled(rows=rows)
    with th.device("meta"):
        number_transitions(buffer, -5)
    assert buffer.actions[:rows, 0, 1].tolist() == fold_in(-5, th.arange(rows)).tolist()
    assert buffer.actions[:rows, 0, 1].tolist() == [fold(-5, count) for count in range(rows)]


@pytest.mark.parametrize("share", [1e-20, 1e-300])
def test_a_share_of_nothing_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"bootstrap={share} is so small that nothing would be in a sample"):
        build(noise=dict(bootstrap=share))
    assert build(noise=dict(bootstrap=2.0**-53)).policy.noise_settings.bootstrap == 2.0**-53


# ---- networks -----------------------------------------------------------------------------------------------------------


class Pops(QNetwork):
    """Takes the mask out of the observation, as users do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.q_net = nn.Identity()

    def forward(self, obs: Any) -> th.Tensor:
        mask = obs.pop("mask")
        values: th.Tensor = self.body(obs["vector"])
        return values.masked_fill(mask > 0.9, -10.0)


class PopsPolicy(FlipoutDQNMultiInputPolicy):
    def make_q_net(self) -> Any:
        return Pops(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)


@pytest.mark.parametrize("times", [1, 2, K])
@pytest.mark.parametrize("noise", [dict(bootstrap=0.5), dict(prior_scale=0.3), dict(bootstrap=0.5, prior_scale=0.3)])
def test_a_network_may_take_parts_out_of_the_observation(times: int, noise: Any) -> None:
    space = spaces.Dict({"vector": spaces.Box(-1, 1, (3,)), "mask": spaces.Box(0, 1, (4,))})
    model = build(policy=PopsPolicy, env=RandomEnv(spaces.Discrete(4), space), noise=dict(noise, keys_per_transition=times))
    before = model.q_net.body[0].weight.detach().clone()
    model.learn(60)
    assert not th.equal(model.q_net.body[0].weight, before)


class Residual(nn.Module):
    """Adds the mean of what a layer gets: a branch that no perturbed layer tells rows apart in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: th.Tensor) -> th.Tensor:
        found: th.Tensor = self.layer(x) + x.mean(1, keepdim=True)
        return found


@pytest.mark.parametrize("times", [2, K])
def test_modules_put_in_between_trainings_are_looked_at(times: int) -> None:
    class Looks(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            samples = self.replay_buffer.sample(batch_size)
            keys = th.tensor(members_of(self, batch_size, samples))
            values = self.q_net(samples.observations)
            with th.no_grad(), self.q_net.perturbed_network.activate(RowNoise(keys)):
                compared.append(th.allclose(values, self.q_net(samples.observations.clone()), atol=1e-6))
            self.policy.optimizer.step()

    compared: list[bool] = []
    model = build(Looks, noise=dict(keys_per_transition=times)).learn(40)
    assert model.policy.learning.inputs_once
    for net in (model.q_net, model.q_net_target):
        net.q_net[0] = Residual(net.q_net[0])
    model.learn(20, reset_num_timesteps=False)
    assert not model.policy.learning.inputs_once and len(compared) == 10 and all(compared)


def test_networks_that_are_as_they_were_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(noise=dict(keys_per_transition=2)).learn(24)
    monkeypatch.setattr(sb3_flipout.policies.dqn, "takes_inputs_once", lambda *_: pytest.fail("looked at again"))
    model.learn(24, reset_num_timesteps=False)


def test_a_module_in_the_place_of_one_that_is_gone_is_looked_at() -> None:
    """The third one can have the address of the second, which is gone."""
    model = build(noise=dict(keys_per_transition=K)).learn(24)
    for module in (nn.Identity(), nn.Dropout(0.5)):
        for net in (model.q_net, model.q_net_target):
            net.features_extractor.flatten = nn.Sequential(nn.Flatten(), module)
        del module
        model.learn(8, reset_num_timesteps=False)
    assert not model.policy.learning.inputs_once


def test_compiled_networks_are_not_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look would be a graph more, up to torch's limit."""
    model = build(noise=dict(keys_per_transition=2))
    for net in (model.q_net, model.q_net_target):
        net.q_net = th.compile(net.q_net, backend="eager")
    monkeypatch.setattr(sb3_flipout.policies.dqn, "takes_inputs_once", lambda *_: pytest.fail("looked at again"))
    model.learn(24)


def test_a_name_that_is_a_user_s_stays_the_user_s() -> None:
    class Mine(FlipoutActorCriticPolicy):
        learning = True

    PPO(Mine, vector_env("discrete", 1), n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(16)
