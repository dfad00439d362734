"""`bootstrap` and `reward_noise`: each member learns from its own sample and its own rewards, against loops over members."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, PPO, SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv

from sb3_flipout.layers import effective_weight
from sb3_flipout.noise import RowNoise, Stream, fold
from sb3_flipout.noise.transitions import in_bootstrap, reward_draws
from sb3_flipout.replay_buffers import NumberedBufferMixin

K, M, B = 4, 2, 24
NOISE: dict[str, Any] = dict(members=K, keys_per_transition=M, net_arch=[8])
BOTH: dict[str, Any] = dict(bootstrap=0.5, reward_noise=0.3)


def build(algorithm: Any = DQN, env: Any = None, policy: str = "FlipoutMlpPolicy", n_envs: int = 1, **kwargs: Any) -> Any:
    noise = NOISE | kwargs.pop("noise", BOTH)
    settings: dict[str, Any] = dict(learning_starts=8, batch_size=B, buffer_size=300, train_freq=4, seed=0, device="cpu")
    settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    env = vector_env("discrete", n_envs) if env is None else env
    return algorithm(policy, env, policy_kwargs=noise, **{**settings, **kwargs})


def buffer_of(model: Any) -> NumberedBufferMixin:
    assert isinstance(model.replay_buffer, NumberedBufferMixin)
    return model.replay_buffer


# ---- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 3])
def test_each_stored_transition_has_a_number_of_its_own(n_envs: int) -> None:
    model = build(n_envs=n_envs, buffer_size=60).learn(120)
    buffer = buffer_of(model)
    key = fold(model.policy._noise_seed, Stream.TRANSITIONS)
    rows = 60 // n_envs
    expected = np.array([fold(key, count) for count in range(buffer.numbered)]).reshape(-1, n_envs)
    assert buffer.numbered > 60  # it has gone round
    found = np.roll(buffer.actions[:, :, 1], -buffer.pos, axis=0)
    assert np.array_equal(found, expected[-rows:])
    assert buffer.actions.nbytes == 2 * 8 * 60


@pytest.mark.parametrize("kind", ["plain", "memory", "n-step", "her", "qrdqn", "own"])
def test_samples_carry_the_numbers_of_their_transitions(kind: str) -> None:
    class Own(ReplayBuffer):
        """Of a user: takes the newest transitions, and keeps no others."""

        def sample(self, batch_size: int, env: Any = None) -> Any:
            return self._get_samples((self.pos - 1 - np.arange(batch_size) % 3) % self.buffer_size, env)

    kwargs: dict[str, Any] = {
        "memory": dict(replay_buffer_kwargs=dict(handle_timeout_termination=False), optimize_memory_usage=True),
        "n-step": dict(n_steps=3),
        "own": dict(replay_buffer_class=Own),
        "her": dict(env=BitFlippingEnv(4), policy="FlipoutMultiInputPolicy", replay_buffer_class=HerReplayBuffer),
    }.get(kind, {})
    model = build(QRDQN if kind == "qrdqn" else DQN, **kwargs).learn(60)
    buffer = buffer_of(model)
    assert isinstance(buffer, {"n-step": NStepReplayBuffer, "her": HerReplayBuffer, "own": Own}.get(kind, ReplayBuffer))
    samples = buffer.sample(32)
    assert samples.actions.shape == (32, 1)
    places = {int(number): place for place, number in enumerate(buffer.actions[: buffer.size(), 0, 1])}
    for row, number in enumerate(samples.actions.transition_numbers.tolist()):
        place = places[number]
        assert int(samples.actions[row, 0]) == buffer.actions[place, 0, 0]
        if kind in ("plain", "qrdqn", "own", "memory"):
            assert np.array_equal(samples.observations[row].numpy(), buffer.observations[place, 0])
            assert float(samples.rewards[row, 0]) == buffer.rewards[place, 0]


def test_n_steps_are_set_up_as_sb3_does() -> None:
    """SB3 warns that it ignores n_steps beside a buffer class; none is given here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(n_steps=3).learn(40)
    assert buffer_of(model).n_steps == 3


# ---- what is learned --------------------------------------------------------------------------------------------------


def losses_by_hand(model: Any, samples: Any, step: int) -> tuple[th.Tensor, th.Tensor]:
    """SB3's loss with members' rewards, and that of the rows that are in their members' samples; as functions of weights."""
    first = fold(model.policy._noise_seed, Stream.FIRST_MEMBERS, step, 0)
    losses, kept = [], []
    layers = [module for module in model.q_net.modules() if hasattr(module, "noise_config")]
    with th.no_grad():
        then = model.policy.member_values(samples.next_observations.numpy())
    for i, number in enumerate(samples.actions.transition_numbers.tolist()):
        for m in range(M):
            k = (fold(first, i) % K + m) % K
            h = samples.observations[i]
            for number_of_layer, layer in enumerate(layers):
                weight, bias = effective_weight(layer, k)
                h = weight @ h + bias
                h = h.relu() if number_of_layer + 1 < len(layers) else h
            pair = th.tensor(number), th.tensor(k)
            reward = float(samples.rewards[i, 0]) + BOTH["reward_noise"] * float(reward_draws(*(x[None] for x in pair)))
            goal = reward + (1 - float(samples.dones[i, 0])) * model.gamma * float(then[k, i].max())
            losses.append(th.nn.functional.smooth_l1_loss(h[int(samples.actions[i, 0])], th.tensor(goal)))
            kept.append(bool(in_bootstrap(*pair, BOTH["bootstrap"])))
    mask = th.tensor(kept)
    assert 0 < int(mask.sum()) < len(mask)
    return th.stack(losses).mean(), (th.stack(losses) * mask).mean()


def test_members_learn_from_their_own_samples_and_rewards() -> None:
    model = build(learning_rate=0.0, max_grad_norm=1e9).learn(40)
    step = model.policy.learning.step
    np.random.seed(7)
    samples = buffer_of(model).sample(B // M)
    total, of_kept = losses_by_hand(model, samples, step)
    weights = dict(model.q_net.named_parameters())
    expected = th.autograd.grad(of_kept, list(weights.values()))
    np.random.seed(7)
    model.train(1, B)
    assert model.logger.name_to_value["train/loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    for (name, weight), gradient in zip(weights.items(), expected, strict=True):
        th.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert model.policy.learning.batches.noted == []


def test_without_them_nothing_is_stored_and_nothing_changes() -> None:
    plain, said = build(noise={}).learn(60), build(noise=dict(bootstrap=1.0, reward_noise=0.0)).learn(60)
    assert type(plain.replay_buffer) is type(said.replay_buffer) is ReplayBuffer
    almost = build(noise=dict(reward_noise=1e-30)).learn(60)  # numbers are stored, and what is added is nothing
    for name, weight in plain.policy.state_dict().items():
        assert th.equal(weight, said.policy.state_dict()[name]) and th.equal(weight, almost.policy.state_dict()[name]), name


@pytest.mark.parametrize("setting", [dict(bootstrap=0.5), dict(reward_noise=1.0)])
def test_each_of_them_changes_what_is_learned(setting: dict[str, float]) -> None:
    found, plain = build(noise=setting).learn(60), build(noise={}).learn(60)
    assert any(not th.equal(a, b) for a, b in zip(found.policy.parameters(), plain.policy.parameters(), strict=True))


def test_draws_stay_with_their_transitions() -> None:
    """A new seed of the noise changes no draw of a transition that is stored."""
    model = build().learn(40)
    before = buffer_of(model).actions.copy()
    model.set_random_seed(99)
    assert np.array_equal(buffer_of(model).actions, before)


@pytest.mark.parametrize("given", ["some", "others of the same number", "augmented"])
def test_a_network_that_is_asked_about_other_observations_is_refused(given: str) -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            obs = self.replay_buffer.sample(batch_size).observations
            others = {"some": obs[:6], "augmented": obs + 0.1}.get(given, th.randn_like(obs))
            with th.no_grad():
                self.q_net(others)
            self.q_net(others)

    model = build(Own).learn(8)
    with pytest.raises(ValueError, match=r"bootstrap=0.5: the network was asked, with gradients, about observations"):
        model.learn(12)


def test_of_two_batches_each_has_its_own_numbers() -> None:
    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            learning, inputs = self.policy.learning, [self.replay_buffer.sample(batch_size).observations for _ in range(2)]
            assert [batch.is_of(obs) for batch in learning.batches.noted for obs in inputs] == [True, False, False, True]
            for batch, obs in zip(learning.batches.noted, inputs, strict=True):
                values = self.q_net(obs)
                (gradient,) = th.autograd.grad(values.sum(), [self.q_net.q_net[-1].weight], retain_graph=True)
                kept = in_bootstrap(batch.numbers, learning.rows(0, batch_size, values.device).keys, 0.5)
                assert 0 < int(kept.sum()) < batch_size
                (expected,) = th.autograd.grad((values * kept[:, None]).sum(), [self.q_net.q_net[-1].weight])
                compared.append(th.allclose(gradient, expected, rtol=1e-4, atol=1e-5))

    compared: list[bool] = []
    build(Own).learn(20)
    assert len(compared) > 4 and all(compared)


@pytest.mark.parametrize("members_learn", [1, 4])
@pytest.mark.parametrize("way", ["sampled before", "twice"])
def test_a_batch_keeps_its_members_whenever_it_is_learned_from(way: str, members_learn: int) -> None:
    """Two optimizer steps on batches of one: all rows see the noise, the rewards and the masks of the step they are of."""

    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            learning, buffer = self.policy.learning, self.replay_buffer
            buffer.rewards[:] = 1
            batches = (
                [buffer.sample(batch_size) for _ in range(2)] if way == "sampled before" else [buffer.sample(batch_size)] * 2
            )
            keys = learning.rows(0, batch_size, th.device("cpu")).keys
            for given in batches:
                noted = learning.batches.of(given.observations)
                assert noted is learning.batches.of(given.next_observations)
                assert th.allclose(given.rewards, 1 + 0.3 * reward_draws(noted.numbers, keys, th.float32)[:, None])
                for net, obs in ((self.q_net, given.observations), (self.q_net_target, given.next_observations)):
                    values = net(obs)
                    with th.no_grad(), net.perturbed_network.activate(RowNoise(keys)):
                        assert th.allclose(values, net(obs.clone()), atol=1e-6)
                    self.policy.optimizer.zero_grad()
                    values.sum().backward()
                self.policy.optimizer.step()
            steps.append(learning.step)

    steps: list[int] = []
    build(Own, noise=dict(BOTH, keys_per_transition=members_learn)).learn(28)
    assert len(steps) > 4 and steps[1] == steps[0] + 2


def test_batches_are_those_of_one_gradient_step() -> None:
    """What has been learned from is let go of: else a long update would keep all its batches."""
    held: list[int] = []

    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            sample = self.replay_buffer.sample
            self.replay_buffer.sample = lambda *args, **kwargs: (
                sample(*args, **kwargs),
                held.append(len(self.policy.learning.batches.noted)),
            )[0]
            try:
                super().train(5, batch_size)
            finally:
                self.replay_buffer.sample = sample

    build(Own).learn(20)
    # SB3 still holds the last batch while it samples the next.
    assert len(held) >= 10 and set(held) <= {1, 2}


class Mirror(ReplayBuffer):
    """Of a user: stores each step twice, and makes its arrays anew."""

    def add(self, obs: Any, then: Any, action: Any, *args: Any) -> None:
        super().add(obs, then, action, *args)
        super().add(-obs, -then, action, *args)

    def reset(self) -> None:
        super().reset()
        self.actions = np.zeros((self.buffer_size, self.n_envs, 1), dtype=np.int64)


def test_a_buffer_that_stores_several_steps_at_once_numbers_all_of_them() -> None:
    model = build(replay_buffer_class=Mirror, buffer_size=70).learn(60)
    actions = buffer_of(model).actions
    assert len(np.unique(actions[:, :, 1])) == 70 and set(np.unique(actions[:, :, 0])) <= set(range(model.action_space.n))
    model.replay_buffer.reset()
    model.learn(30)
    assert len(np.unique(buffer_of(model).actions[:60, 0, 1])) == 60


# ---- saved, loaded, resumed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "her"])
def test_a_saved_buffer_keeps_its_numbers(kind: str, tmp_path: Path) -> None:
    her = dict(policy="FlipoutMultiInputPolicy", replay_buffer_class=HerReplayBuffer)
    kwargs: dict[str, Any] = her if kind == "her" else {}
    env = BitFlippingEnv(4) if kind == "her" else vector_env("discrete", 1)
    model = build(env=env, **kwargs).learn(40)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = DQN.load(tmp_path / "model", env=model.get_env())
    assert (loaded.policy.noise_settings.bootstrap, loaded.policy.noise_settings.reward_noise) == (0.5, 0.3)
    loaded.load_replay_buffer(tmp_path / "buffer", truncate_last_traj=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.learn(20, reset_num_timesteps=False)
    before, after = buffer_of(model), buffer_of(loaded)
    rows = before.size()
    assert np.array_equal(after.actions[:rows], before.actions[:rows])
    assert after.numbered == before.numbered + (after.size() - rows)
    assert len(np.unique(after.actions[: after.size(), 0, 1])) == after.size()


def test_a_buffer_without_numbers_is_given_some_and_it_is_said(tmp_path: Path) -> None:
    old = build(noise={}).learn(40)
    old.save_replay_buffer(tmp_path / "buffer")
    model = build()
    model.load_replay_buffer(tmp_path / "buffer")
    stored = model.replay_buffer.actions.copy()
    with pytest.warns(UserWarning, match=r"held 40 transitions without the numbers that bootstrap and reward_noise need"):
        model.learn(20)
    assert np.array_equal(buffer_of(model).actions[:40, :, :1], stored[:40])
    assert len(np.unique(buffer_of(model).actions[:60, 0, 1])) == 60


def test_a_numbered_buffer_serves_a_model_that_needs_no_numbers(tmp_path: Path) -> None:
    build().learn(40).save_replay_buffer(tmp_path / "buffer")
    model = DQN("MlpPolicy", vector_env("discrete", 1), learning_starts=8, buffer_size=300, seed=0, device="cpu")
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(20)
    assert model.replay_buffer.sample(5).actions.shape == (5, 1)


def test_a_model_of_before_has_neither(tmp_path: Path) -> None:
    model = build(noise={})
    state = model.policy.noise_state()
    for name in BOTH:
        del state["settings"][name]
    model.policy.set_noise_state(state)
    assert model.policy.noise_settings.bootstrap == 1 and model.policy.noise_settings.reward_noise == 0


# ---- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (dict(bootstrap=0.0), r"bootstrap must be a finite number > 0 and <= 1, got 0\.0"),
        (dict(bootstrap=1.5), r"bootstrap must be a finite number > 0 and <= 1, got 1\.5"),
        (dict(bootstrap=float("nan")), r"bootstrap must be a finite number"),
        (dict(reward_noise=-0.1), r"reward_noise must be a finite number >= 0, got -0\.1"),
    ],
)
def test_bad_numbers_are_refused(noise: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(noise=noise)


def test_they_belong_to_members() -> None:
    for noise in (dict(bootstrap=0.5), dict(reward_noise=0.1)):
        name = next(iter(noise))
        with pytest.raises(ValueError, match=rf"{name}=0\.\d needs members"):
            DQN("FlipoutMlpPolicy", "CartPole-v1", policy_kwargs=noise)
        for algorithm, env in ((PPO, "CartPole-v1"), (SAC, "Pendulum-v1")):
            with pytest.raises(TypeError, match=rf"{name} is for DQN and QRDQN with members"):
                algorithm("FlipoutMlpPolicy", env, policy_kwargs=noise)


def test_buffers_that_cannot_be_given_numbers_are_refused() -> None:
    class Flat(ReplayBuffer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.actions = self.actions[:, :, 0]

    with pytest.raises(TypeError, match=r"replay_buffer_class=Flat cannot be given numbers .* Derive it from ReplayBuffer"):
        build(replay_buffer_class=Flat)

    class Shapes(ReplayBuffer):
        def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
            samples = super()._get_samples(*args, **kwargs)
            return samples._replace(actions=samples.actions.reshape(-1, 1))

    with pytest.raises(TypeError, match=r"a sample of Shapes has actions of shape \(24, 1\) and type torch.int64"):
        build(replay_buffer_class=Shapes).learn(20)
    model = build()
    own = model.replay_buffer.sample
    model.replay_buffer.sample = lambda *args, **kwargs: own(*args, **kwargs)._replace(actions=th.zeros(B // M, 1).long())
    with pytest.raises(TypeError, match="carries no numbers of its transitions"):
        model.learn(20)
