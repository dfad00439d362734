"""`keys_per_transition`: a transition is learned under several members; against an oracle that takes them one by one."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN
from scipy.stats import chi2
from stable_baselines3 import DQN, PPO, SAC, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv

from sb3_flipout.noise import Stream, fold
from sb3_flipout.samples import repeat_rows

K, B = 5, 24
NO_EPSILON: dict[str, Any] = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)


def build(algorithm: Any = DQN, env: Any = None, policy: str = "FlipoutMlpPolicy", **kwargs: Any) -> Any:
    noise = {name: kwargs.pop(name) for name in ("keys_per_transition", "prior_scale", "target_noise") if name in kwargs}
    settings: dict[str, Any] = dict(learning_starts=8, batch_size=B, buffer_size=300, train_freq=4, seed=0, device="cpu")
    env = vector_env("discrete", 1) if env is None else env
    kwargs = {**settings, **NO_EPSILON, **kwargs}
    return algorithm(policy, env, policy_kwargs=dict(net_arch=[8], members=K, **noise), **kwargs)


def keys_of(model: Any, step: int, role: int, transitions: int, times: int) -> list[list[int]]:
    """Members of each transition, in Python's integers."""
    first = fold(model.policy._noise_seed, Stream.FIRST_MEMBERS, step, role)
    return [[(fold(first, i) % K + m) % K for m in range(times)] for i in range(transitions)]


class Watch:
    """Notes the keys under which the online and the target network run while the model trains."""

    def __init__(self, model: Any) -> None:
        self.seen: list[tuple[str, int, th.Tensor, th.Tensor]] = []
        for name in ("q_net", "q_net_target"):
            net = getattr(model.policy, name)
            layer = net.perturbed_network.layers[0]
            layer.register_forward_pre_hook(lambda _, args, name=name, net=net: self.note(model, name, net, args[0]))

    def note(self, model: Any, name: str, net: Any, x: th.Tensor) -> None:
        noise = net.perturbed_network.active
        if model.policy.learning.active:
            self.seen.append((name, model.policy.learning.step, noise.in_order(noise.keys), x.clone()))


@pytest.mark.parametrize("times", [2, 3, K])
@pytest.mark.parametrize("target_noise", ["same", "independent"])
def test_each_transition_is_learned_under_members_that_follow_a_hashed_one(times: int, target_noise: str) -> None:
    batch = 4 * times
    model = build(keys_per_transition=times, batch_size=batch, target_noise=target_noise)
    watch = Watch(model)
    model.learn(40)
    assert {name for name, *_ in watch.seen} == {"q_net", "q_net_target"}
    for name, step, keys, x in watch.seen:
        role = 1 if name == "q_net_target" and target_noise == "independent" else 0
        assert keys.reshape(4, times).tolist() == keys_of(model, step, role, 4, times)
        assert all(len(set(of_one)) == times for of_one in keys.reshape(4, times).tolist())
        assert len(x) == 4  # each observation once


@pytest.mark.parametrize("times", [3, K])
@pytest.mark.parametrize("prior_scale", [0.0, 0.5])
def test_the_loss_is_the_mean_over_transitions_and_members(prior_scale: float, times: int) -> None:
    size = 8 * times
    model = build(keys_per_transition=times, prior_scale=prior_scale, learning_rate=0.0, batch_size=size).learn(40)
    step = model.policy.learning.step
    np.random.seed(7)
    samples = ReplayBuffer.sample(model.replay_buffer, 8)
    with th.no_grad():
        now, then = (model.policy.member_values(obs.numpy()) for obs in (samples.observations, samples.next_observations))
    losses = []
    for i, members in enumerate(keys_of(model, step, 0, 8, times)):
        for k in members:
            goal = samples.rewards[i, 0] + (1 - samples.dones[i, 0]) * model.gamma * float(np.max(np.asarray(then)[k, i]))
            value = float(np.asarray(now)[k, i, int(samples.actions[i, 0])])
            gap = abs(value - float(goal))
            losses.append(0.5 * gap**2 if gap < 1 else gap - 0.5)
    np.random.seed(7)
    model.train(1, size)
    assert model.logger.name_to_value["train/loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_first_members_are_uniform() -> None:
    """Chi-square over 20,000 transitions, false-fail rate 1e-6."""
    model = build(keys_per_transition=2)
    first = model.policy.learning._stratified(0, 2 * 20_000, th.device("cpu"), None)[::2]
    counts = np.bincount(first.numpy(), minlength=K)
    assert ((counts - 4000.0) ** 2 / 4000).sum() < chi2.isf(1e-6, K - 1)


@pytest.mark.parametrize("case", ["n-step", "her", "qrdqn", "own-sample"])
def test_buffers_of_all_kinds_give_repeated_transitions(case: str) -> None:
    kwargs: dict[str, Any] = {"n-step": dict(n_steps=3)}.get(case, {})
    if case == "her":
        kwargs = dict(env=BitFlippingEnv(4), policy="FlipoutMultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    model = build(QRDQN if case == "qrdqn" else DQN, keys_per_transition=3, **kwargs)
    asked: list[int] = []
    if case == "own-sample":
        own = model.replay_buffer.sample
        model.replay_buffer.sample = lambda size, **more: (asked.append(size), own(size, **more))[1]
        before = model.replay_buffer.sample
    model.learn(40)
    if case == "own-sample":
        assert set(asked) == {B // 3} and model.replay_buffer.sample is before
    else:
        assert "sample" not in vars(model.replay_buffer)
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


def test_rows_are_repeated_in_whatever_holds_them() -> None:
    found = repeat_rows({"x": th.tensor([1, 2]), "none": None}, 2, rows=2)
    assert found["x"].tolist() == [1, 1, 2, 2] and found["none"] is None

    @dataclass
    class Samples:
        observations: th.Tensor
        weights: th.Tensor | None = None

    samples = repeat_rows(Samples(th.tensor([[1], [2]])), 3, rows=2)
    assert samples.observations.flatten().tolist() == [1, 1, 1, 2, 2, 2] and samples.weights is None


@dataclass
class OfData:
    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    discounts: Any = None


class WithProperty:
    """A batch that keeps its observations under another name."""

    def __init__(self, observations: th.Tensor, **parts: Any) -> None:
        self.kept = observations
        vars(self).update(parts)

    @property
    def observations(self) -> th.Tensor:
        return self.kept


class InSlots:
    __slots__ = ("actions", "discounts", "dones", "next_observations", "observations", "rewards")

    def __init__(self, **parts: Any) -> None:
        for name, part in parts.items():
            setattr(self, name, part)


def giving(kind: Any) -> type[ReplayBuffer]:
    class Own(ReplayBuffer):
        def sample(self, *args: Any, **kwargs: Any) -> Any:
            return kind(**super().sample(*args, **kwargs)._asdict())

    return Own


@pytest.mark.parametrize("kind", [OfData, SimpleNamespace, WithProperty])
def test_batches_of_any_kind_are_learned_from_as_stocks(kind: Any) -> None:
    stock, own = (
        build(keys_per_transition=K, batch_size=5 * K, replay_buffer_class=buffer).learn(30)
        for buffer in (ReplayBuffer, giving(kind))
    )
    pairs = zip(stock.policy.parameters(), own.policy.parameters(), strict=True)
    assert all(th.equal(mine, its) for mine, its in pairs)


@pytest.mark.parametrize("kind", [InSlots, dict])
def test_batches_that_cannot_be_repeated_are_refused(kind: Any) -> None:
    model = build(keys_per_transition=K, batch_size=5 * K, replay_buffer_class=giving(kind))
    message = rf"keys_per_transition=5 repeats .* observations of what the replay buffer gives \({kind.__name__}\)"
    with pytest.raises(TypeError, match=message):
        model.learn(30)


def test_a_batch_that_somebody_keeps_is_not_changed() -> None:
    kept = SimpleNamespace(observations=th.tensor([[1], [2]]))
    assert len(repeat_rows(kept, 2, rows=2).observations) == 4 and len(kept.observations) == 2


def test_a_subclass_that_overrides_train_repeats_once() -> None:
    class Own(DQN):
        def train(self, *args: Any, **kwargs: Any) -> None:
            super().train(*args, **kwargs)

    model = build(Own, keys_per_transition=3)
    watch = Watch(model)
    model.learn(20)
    assert {len(keys) for _, _, keys, _ in watch.seen} == {B}
    assert {len(x) for *_, x in watch.seen} == {B // 3}


def test_one_key_is_what_it_always_was(tmp_path: Path) -> None:
    one, default = build(keys_per_transition=1).learn(40), build().learn(40)
    for name, weight in one.policy.state_dict().items():
        assert th.equal(weight, default.policy.state_dict()[name]), name
    several = build(keys_per_transition=3).learn(40)
    several.save(tmp_path / "model")
    assert DQN.load(tmp_path / "model").policy.noise_settings.keys_per_transition == 3


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (0, r"keys_per_transition must be .*got 0"),
        (K + 1, rf"keys_per_transition={K + 1} is more than members={K}"),
    ],
)
def test_bad_numbers_are_refused(times: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(keys_per_transition=times)


def test_without_members_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keys_per_transition=2 needs members"):
        DQN("FlipoutMlpPolicy", "CartPole-v1", policy_kwargs=dict(keys_per_transition=2))
    with pytest.raises(TypeError, match=r"keys_per_transition must be an integer >= 1, got 2\.5"):
        build(keys_per_transition=2.5)
    for algorithm, env in ((PPO, "CartPole-v1"), (SAC, "Pendulum-v1")):
        with pytest.raises(TypeError, match=r"keys_per_transition is for DQN and QRDQN with members"):
            algorithm("FlipoutMlpPolicy", env, policy_kwargs=dict(keys_per_transition=2))


def test_a_batch_that_it_does_not_divide_is_refused_before_training() -> None:
    model = build(keys_per_transition=5)
    with pytest.raises(ValueError, match=rf"batch_size={B} must be a multiple of keys_per_transition=5.*Use batch_size=25"):
        model.learn(40)
    assert model.num_timesteps == 0 and model.replay_buffer.size() == 0
    model = build(keys_per_transition=3).learn(20)
    with pytest.raises(ValueError, match=r"batch_size=16 must be a multiple of keys_per_transition=3.*Use batch_size=15"):
        model.train(1, 16)
    assert "sample" not in vars(model.replay_buffer)
