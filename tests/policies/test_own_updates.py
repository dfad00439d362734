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
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.dqn.policies import QNetwork
from torch import nn

import sb3_flipout
from sb3_flipout.noise import RowNoise, fold, fold_in
from sb3_flipout.noise.transitions import reward_draws
from sb3_flipout.policies import FlipoutDQNMultiInputPolicy
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
    """Steps an optimizer of its own."""

    where = "attribute"

    def _setup_model(self) -> None:
        super()._setup_model()
        optimizer = th.optim.SGD(self.q_net.parameters(), lr=1e-3)
        self.seen: list[list[int]] = []
        if self.where == "attribute":
            self.mine: Any = optimizer
        elif self.where == "list":
            self.mine = [optimizer]
        elif self.where == "dictionary":
            self.mine = {"head": optimizer}
        elif self.where == "policy":
            self.policy.mine = optimizer
        self.step = None if self.where == "nowhere" else optimizer.step  # which holds it for itself alone

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        samples = self.replay_buffer.sample(batch_size)
        self.seen.append(members_of(self, batch_size, samples))
        self.q_net.zero_grad()
        self.q_net(samples.observations).sum().backward()
        (self.step or th.optim.SGD(self.q_net.parameters(), lr=1e-3).step)()


@pytest.mark.parametrize("where", ["attribute", "list", "dictionary", "policy"])
@pytest.mark.parametrize("members", [None, K])
def test_steps_of_an_optimizer_of_one_s_own_count(where: str, members: int | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(type("Own", (Held,), dict(where=where)), noise=dict(members=members)).learn(100)
    assert model.policy.learning.step == len(model.seen) == len(set(map(tuple, model.seen))) == 20


def test_an_optimizer_that_nobody_knows_of_is_told() -> None:
    model = build(type("Own", (Held,), dict(where="nowhere")))
    with pytest.warns(UserWarning, match="`train` of Own has changed the parameters of its policy without a step") as told:
        model.learn(100)
    assert len([one for one in told if "without a step" in str(one.message)]) == 1
    assert model.policy.learning.step == len(set(map(tuple, model.seen))) == 20


@pytest.mark.parametrize("algorithm", [DQN, SAC])
def test_stock_steps_count_once(algorithm: Any) -> None:
    model = build(algorithm, gradient_steps=3)
    model.alike = model.policy.optimizer if algorithm is DQN else model.actor.optimizer
    model.other = th.optim.SGD([nn.Parameter(th.zeros(1))], lr=1.0)
    model.learn(60)
    assert model.policy.learning.step == 30
    hooks = model.alike._optimizer_step_post_hooks
    assert not hooks


def test_an_update_that_learns_nothing_counts_nothing() -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            self.replay_buffer.sample(batch_size)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build(Own).learn(60).policy.learning.step == 0


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
        (dict(reward_noise=0.1), r"replay_buffer(=None|_class=\w+) cannot be given numbers of transitions"),
    ],
)
def test_what_is_no_buffer_is_refused(buffer: Any, noise: Any, message: str) -> None:
    model = build(noise=noise).learn(24)
    model.replay_buffer = buffer
    with pytest.raises(TypeError, match=message):
        model.train(1, B)


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
    @property
    def actions(self) -> Any:
        return self.stored

    @actions.setter
    def actions(self, given: Any) -> None:
        self.__dict__.setdefault("stored", given)


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
