"""Members in threads, in files, without `learn`, and with batches and networks of other shapes: right, or said."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from helpers import RandomEnv, vector_env
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.dqn.policies import QNetwork
from torch import nn

from sb3_flipout.layers import FlipoutLinear
from sb3_flipout.policies.dqn import FlipoutDQNPolicy
from sb3_flipout.replay_buffers import numbers_of

K, B = 5, 20
EVERY: dict[str, Any] = dict(keys_per_transition=K, bootstrap=0.5, reward_noise=0.3)


class OwnLoss(DQN):
    """A loss of the user's own, to which batches and networks of other shapes are nothing."""

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.policy.set_training_mode(True)
        for _ in range(gradient_steps):
            batch: Any = self.replay_buffer.sample(batch_size)
            rewards = th.as_tensor(getattr(batch, "rewards", getattr(batch, "returns", None)))
            with th.no_grad():
                following = self.first(self.q_net_target(batch.next_observations))
            target = rewards.sum(dim=1, keepdim=True) + 0.9 * following.max(dim=1, keepdim=True)[0]
            values = self.first(self.q_net(batch.observations)).gather(1, batch.actions.long())
            self.policy.optimizer.zero_grad()
            (values - target).square().mean().backward()
            self.policy.optimizer.step()

    @staticmethod
    def first(values: Any) -> th.Tensor:
        found: th.Tensor = values[0] if isinstance(values, tuple) else values
        return found


def build(
    noise: Any = EVERY, algorithm: Any = OwnLoss, policy: Any = "FlipoutMlpPolicy", env: Any = None, **kwargs: Any
) -> Any:
    settings: dict[str, Any] = dict(learning_starts=20, batch_size=B, buffer_size=200, train_freq=4, seed=0, device="cpu")
    settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    env = vector_env("discrete", 1) if env is None else env
    return algorithm(policy, env, policy_kwargs=dict(net_arch=[8], members=K, **noise), **{**settings, **kwargs})


def filled(noise: Any = EVERY, **kwargs: Any) -> Any:
    """A model whose buffer somebody else has filled."""
    model = build(noise, **kwargs)
    rng, space = np.random.default_rng(0), model.observation_space
    for i in range(60):
        obs, after = rng.uniform(1, 3, (2, 1, *space.shape)).astype(np.float32)
        model.replay_buffer.add(obs, after, np.array([i % 4]), np.array([1.0]), np.array([False]), [{}])
    model.set_logger(configure(None, []))
    return model


# ---- threads and files ------------------------------------------------------------------------------------------------


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads that take turns a hundred times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_threads_may_sample_at_the_same_time() -> None:
    model, shapes, stop = filled(), set(), threading.Event()
    sample = model.replay_buffer.sample  # as a learner of its own holds it

    def ask() -> None:
        while not stop.is_set():
            shapes.add(tuple(sample(64).actions.shape))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(30):
            model.train(1, B)
            assert tuple(model.replay_buffer.sample(32).actions.shape) == (32, 1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert shapes == {(64, 1)}


class Saved(ReplayBuffer):
    """Somebody saves and copies it in the middle of `sample`."""

    kept: Any = ()

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        if self.kept == ():
            self.kept = None
            self.kept = (pickle.loads(pickle.dumps(self)), copy.deepcopy(self))
        return super()._get_samples(batch_inds, env)


def test_what_is_saved_in_the_middle_of_sampling_samples_as_ever() -> None:
    model = filled(replay_buffer_class=Saved)
    model.replay_buffer.sample(4)
    for one in model.replay_buffer.kept:
        samples = one.sample(8)
        assert tuple(samples.actions.shape) == (8, 1) and numbers_of(samples) is not None


def test_actions_that_are_put_in_anew_are_numbered_when_they_are_sampled() -> None:
    model = filled()
    model.replay_buffer.actions = np.ones_like(model.replay_buffer.actions[:, :, :1])
    samples = model.replay_buffer.sample(500)
    assert tuple(samples.actions.shape) == (500, 1) and len(numbers_of(samples).unique()) == 60  # type: ignore[union-attr]


# ---- batches ----------------------------------------------------------------------------------------------------------


class Named(NamedTuple):
    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    returns: Any


class Rewarded(NamedTuple):
    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: Any


class OtherName(ReplayBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        return Named(*super()._get_samples(batch_inds, env)[:5])


class Arrays(ReplayBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        given = super()._get_samples(batch_inds, env)
        return Rewarded(*given[:4], given.rewards.numpy())


class Objectives(ReplayBuffer):
    """Rewards of two objectives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rewards = np.zeros((*self.rewards.shape, 2), np.float32)

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, *args: Any) -> None:
        super().add(obs, next_obs, action, np.stack([reward, -reward], axis=-1), *args)

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        of_envs, self.rewards = self.rewards, self.rewards[:, :, 0]
        given = super()._get_samples(batch_inds, env)
        self.rewards = of_envs
        return Rewarded(*given[:4], th.as_tensor(of_envs[batch_inds, 0]))


@pytest.mark.parametrize("kind", [OtherName, Arrays, Objectives])
def test_rewards_in_other_shapes_are_what_bootstrap_does_not_need(kind: type[ReplayBuffer]) -> None:
    assert build(dict(keys_per_transition=K, bootstrap=0.5), replay_buffer_class=kind).learn(40).policy.learning.step > 0


@pytest.mark.parametrize(
    ("kind", "what"),
    [(OtherName, r"\(Named\) has none"), (Arrays, r"\(Rewarded\) has rewards of type ndarray")],
)
def test_rewards_that_cannot_be_perturbed_are_refused(kind: type[ReplayBuffer], what: str) -> None:
    with pytest.raises(TypeError, match=rf"reward_noise perturbs the rewards .*{what}\. Give a tensor `rewards`"):
        build(dict(reward_noise=0.1), replay_buffer_class=kind).learn(40)


@dataclasses.dataclass
class WithSize:
    observations: th.Tensor
    actions: th.Tensor
    next_observations: th.Tensor
    dones: th.Tensor
    rewards: th.Tensor
    size: int = dataclasses.field(init=False)
    weights: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.actions)


class Sized(ReplayBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        given = WithSize(*super()._get_samples(batch_inds, env)[:5])
        given.weights = th.arange(given.size)
        return given


def test_what_a_dataclass_makes_itself_it_makes_of_the_repeated_rows() -> None:
    seen: list[Any] = []

    class Looks(OwnLoss):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            seen.append(self.replay_buffer.sample(batch_size))

    build(algorithm=Looks, replay_buffer_class=Sized).learn(30)
    assert seen[0].size == B == len(seen[0].actions)
    assert seen[0].weights.tolist() == [i for i in range(B // K) for _ in range(K)]


# ---- without `learn` --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_sigma_has_the_units_of_stored_observations_where_nothing_is_collected(normalised: bool) -> None:
    env: Any = vector_env("discrete", 1)
    if normalised:
        env = VecNormalize(env)
        env.obs_rms.mean, env.obs_rms.var = np.full(5, 2.0), np.full(5, 0.25)
    model = filled(dict(sigma_unit="inputs", learn_sigma=False), env=env)
    layer = next(one for one in model.policy.q_net.modules() if isinstance(one, FlipoutLinear))
    before = layer.weight_sigma.clone()
    model.train(1, B)
    first = model.replay_buffer.observations[0]
    met = th.as_tensor((first - 2) / 0.5 if normalised else first)
    th.testing.assert_close(layer.weight_sigma, before / met.square().mean().sqrt(), rtol=1e-4, atol=0)
    after = layer.weight_sigma.clone()
    model.learn(4)
    assert th.equal(layer.weight_sigma, after), "once"


def test_sigma_is_not_divided_after_gradient_steps() -> None:
    policy = build(dict(sigma_unit="inputs", learn_sigma=False)).policy
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.warns(UserWarning, match=r'sigma_unit="inputs" has no effect: gradient steps .*policy\.meet_observations'):
        with policy.updating():
            pass
    policy.meet_observations(np.full((3, 5), 7.0, np.float32))
    assert all(th.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


class Around(nn.Module):
    """A residual connection: what is round the network has an input of all rows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: th.Tensor) -> th.Tensor:
        found: th.Tensor = self.net(x)
        return found + x[:, :1]


@pytest.mark.parametrize("noise", [EVERY, dict(keys_per_transition=2)], ids=str)
def test_modules_put_in_before_a_training_without_learn(noise: Any) -> None:
    model = filled(noise)
    for net in (model.q_net, model.q_net_target):
        net.q_net = Around(net.q_net)
    model.train(2, B)
    assert model.policy.learning.step == 2


# ---- networks ---------------------------------------------------------------------------------------------------------


class PairNet(QNetwork):
    def forward(self, obs: Any) -> Any:
        return super().forward(obs), None


class PairPolicy(FlipoutDQNPolicy):
    def make_q_net(self) -> QNetwork:
        return PairNet(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)

    def _predict(self, obs: Any, deterministic: bool = True) -> th.Tensor:
        return th.zeros(len(obs), dtype=th.int64)


def test_networks_that_give_more_than_values() -> None:
    assert build({}, policy=PairPolicy).learn(30).policy.learning.step > 0
    for noise, name in ((dict(prior_scale=0.3), "prior_scale"), (dict(bootstrap=0.5), "bootstrap")):
        with pytest.raises(TypeError, match=rf"{name}.* of a network, which gives a tuple.*leave {name} out"):
            build(noise, policy=PairPolicy).learn(30)


class Clipped(DQN):
    """Two networks; the second is made as SB3 makes one, or is a copy of the first."""

    copied = False

    def _setup_model(self) -> None:
        super()._setup_model()
        self.second: Any = copy.deepcopy(self.q_net) if self.copied else self.policy.make_q_net()
        self.policy.optimizer.add_param_group(dict(params=list(self.second.parameters())))
        self.spread: Any = None

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        batch: Any = self.replay_buffer.sample(batch_size)
        self.spread = self.second(batch.observations[:1].expand(batch_size, -1)).std(dim=0).max().item()


class ClippedCopy(Clipped):
    copied = True


def test_a_plain_network_that_learns_beside_the_policys_is_said() -> None:
    with pytest.warns(UserWarning, match=r"learns a QNetwork beside .*no weight noise.*copy\.deepcopy") as said:
        model = build({}, algorithm=Clipped).learn(40)
    assert len([one for one in said if "beside those" in str(one.message)]) == 1
    assert model.spread == pytest.approx(0.0, abs=1e-6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*beside those.*")
        assert build({}, algorithm=ClippedCopy).learn(40).spread > 1e-3
        teacher = build({}, algorithm=DQN)
        teacher.teacher = DQN("MlpPolicy", vector_env("discrete", 1), policy_kwargs=dict(net_arch=[8])).q_net
        teacher.learn(40)


@pytest.mark.parametrize(("algorithm", "action"), [(DQN, "discrete"), (SAC, "box")])
def test_a_plain_policy_of_compiled_networks(algorithm: Any, action: str) -> None:
    model = algorithm("FlipoutMlpPolicy", vector_env(action, 1), policy_kwargs=dict(net_arch=[8]), device="cpu")
    name = "q_net" if algorithm is DQN else "actor"
    before = model.policy.to_plain_policy()
    setattr(model.policy, name, th.compile(getattr(model.policy, name), backend="eager"))
    after = model.policy.to_plain_policy()
    assert all(th.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_observations_of_bytes_are_not_all_dark() -> None:
    """The environment of these tests draws all values of a byte."""
    env = RandomEnv(vector_env("discrete").action_space, vector_env("discrete", observation="image").observation_space)
    seen = np.unique(env.reset(seed=0)[0])
    assert seen.min() < 10 and seen.max() > 245 and len(seen) > 200
