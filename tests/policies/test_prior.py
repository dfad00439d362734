"""The members' prior: which function it is, and in which unit."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import vector_env
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from torch import nn

from sb3_flipout.envs import DeepSea
from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.noise import RowNoise

K = 20


class Scaled(gym.ObservationWrapper[Any, Any, Any]):
    """Observations times a number."""

    def __init__(self, env, factor):
        super().__init__(env)
        self.factor = np.float32(factor)
        self.observation_space = spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)

    def observation(self, observation):
        return self.factor * observation


class Picture(gym.ObservationWrapper[Any, Any, Any]):
    """DeepSea of size 12 as an image of 36x36 pixels: the cell is a white square."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def observation(self, observation):
        return np.kron(255 * observation.reshape(12, 12), np.ones((3, 3))).astype(np.uint8)[:, :, None]


def deep_sea(size=12, factor=1.0):
    return Scaled(DeepSea(size, mapping_seed=0), factor)


def build(env, algorithm=DQN, policy="FlipoutMlpPolicy", **noise):
    noise = {**dict(members=K, prior_scale=1.0), **noise}
    kwargs = dict(learning_starts=60, batch_size=64, buffer_size=200, train_freq=1, seed=1, device="cpu")
    return algorithm(policy, env, exploration_initial_eps=0.0, exploration_final_eps=0.0, policy_kwargs=noise, **kwargs)


def values_of(model, obs, scale=None):
    """Prior of each member in each observation: (K, N, actions), for QRDQN (K, N, quantiles, actions)."""
    tensors = model.policy.obs_to_tensor(obs)[0]
    n = len(tensors)
    noise = RowNoise(th.arange(K).repeat_interleave(n), scale)
    with th.no_grad():
        values = model.policy.prior(noise, tensors.repeat(K, *[1] * (tensors.dim() - 1)))
    return values.view(K, n, *values.shape[1:])


def seen(model):
    """Observations in the replay buffer."""
    buffer = model.replay_buffer
    return buffer.observations[: buffer.size()].reshape(-1, *buffer.obs_shape)


ENVS = {
    "one-hot, 144 numbers": lambda: deep_sea(),
    "one-hot, 900 numbers": lambda: deep_sea(30),
    "large numbers": lambda: deep_sea(factor=1000.0),
    "dense": lambda: vector_env("discrete"),
}


@pytest.mark.parametrize("algorithm", [DQN, QRDQN])
@pytest.mark.parametrize("make", ENVS.values(), ids=ENVS)
def test_unit_is_the_standard_deviation_of_values_whatever_the_observation(make, algorithm):
    model = build(make(), algorithm).learn(62)
    size = values_of(model, seen(model)).square().mean().sqrt()
    # The unit is that of one batch, 64 of these rows under one member each: a fixed seed, so no chance is involved.
    assert 0.75 < size < 1.3


def test_unit_with_images():
    model = build(Picture(DeepSea(12, mapping_seed=0)), policy="FlipoutCnnPolicy").learn(62)
    assert 0.75 < values_of(model, seen(model)).square().mean().sqrt() < 1.3


def test_unit_is_that_of_the_first_gradient_step_for_good():
    model = build(deep_sea())
    assert model.policy.prior.unit.isnan()
    model.learn(60)
    assert model.policy.prior.unit.isnan(), "no gradient step yet"
    model.learn(1, reset_num_timesteps=False)
    unit = model.policy.prior.unit.clone()
    model.learn(20, reset_num_timesteps=False)
    assert model.policy.prior.unit == unit > 0


@pytest.mark.parametrize("target_noise", ["same", "independent", "mean"])
def test_unit_is_measured_under_members_never_under_mean_weights(target_noise):
    model = build(deep_sea(), target_noise=target_noise).learn(62)
    assert 0.75 < values_of(model, seen(model)).square().mean().sqrt() < 1.3


def test_size_of_the_prior_follows_the_observation_alone():
    """A bias would be the same in all states: on a one-hot observation of many numbers, it would be nearly all there is."""
    model, rows = build(deep_sea()), np.eye(144, dtype=np.float32)[::10]
    values = values_of(model, rows)
    assert th.allclose(values_of(model, 3 * rows), 3 * values, atol=1e-6)
    assert values.abs().max() > 0 and not values_of(model, 0 * rows).any()


def test_values_are_those_of_the_network_plus_scale_times_prior_in_its_unit():
    model = build(deep_sea(), prior_scale=3.0).learn(62)
    obs = seen(model)[:9]
    together, prior = model.policy.member_values(obs), values_of(model, obs)
    model.policy.online.__dict__["prior"] = None
    assert th.allclose(together, model.policy.member_values(obs) + 3.0 * prior, atol=1e-5)
    assert prior.abs().max() > 0.5


def test_saved_model_has_the_same_prior_and_keeps_its_unit(tmp_path):
    model = build(deep_sea()).learn(62)
    model.save(tmp_path / "model")
    loaded = DQN.load(tmp_path / "model", env=deep_sea())
    obs = seen(model)
    assert loaded.policy.prior.unit == model.policy.prior.unit
    assert th.equal(values_of(loaded, obs), values_of(model, obs))
    assert th.equal(loaded.policy.member_values(obs), model.policy.member_values(obs))
    loaded.learn(62)
    assert loaded.policy.prior.unit == model.policy.prior.unit
    other = build(deep_sea())
    other.set_parameters(model.get_parameters())
    assert th.equal(other.policy.member_values(obs), model.policy.member_values(obs))


def test_copied_policy_has_one_prior_for_both_networks_and_the_same_values():
    model = build(deep_sea()).learn(62)
    policy, obs = copy.deepcopy(model.policy), seen(model)
    assert policy.online.prior[0] is policy.target.prior[0] is policy.prior
    assert th.equal(policy.member_values(obs), model.policy.member_values(obs))


def test_prior_shares_no_perturbation_with_the_learned_network_and_is_never_trained():
    model = build(deep_sea())
    before = {name: value.clone() for name, value in model.policy.prior.named_parameters()}
    model.learn(80)
    for name, value in model.policy.prior.named_parameters():
        assert th.equal(value, before[name]) and not value.requires_grad
    own = [layer for layer in model.policy.prior.modules() if isinstance(layer, FlipoutLayer)]
    learned = [layer for layer in model.policy.online.modules() if isinstance(layer, FlipoutLayer)]
    for one, other in zip(own, learned, strict=True):
        assert one.noise_index != other.noise_index and not th.equal(
            one.bases()[1]["weight_base"], other.bases()[1]["weight_base"]
        )


@pytest.mark.parametrize("algorithm", [DQN, QRDQN])
def test_the_noise_scale_multiplies_the_prior_once(algorithm):
    model = build(deep_sea(), algorithm)
    model.policy.noise_scale = 0.1
    model.learn(62)
    twin = build(deep_sea(), algorithm).learn(62)
    obs = seen(model)[:9]
    whole = values_of(model, obs)
    assert whole.abs().max() > 0.1
    for scale in (0.5, 0.1, 0.0):
        th.testing.assert_close(values_of(model, obs, scale), scale * whole, rtol=1e-5, atol=1e-6)
    own = model.policy.prior.network
    obs = model.policy.obs_to_tensor(obs)[0]
    for unit_scale in (0.1, 1.0):  # the unit is that of the functions themselves
        with model.policy.prior.perturbed_network.activate(RowNoise(th.arange(9), unit_scale)):
            found = own(obs)
        with twin.policy.prior.perturbed_network.activate(RowNoise(th.arange(9))):
            th.testing.assert_close(found, twin.policy.prior.network(obs))


def test_the_prior_says_nothing_of_layers_that_stay_plain(recwarn):
    class WithMatrix(FlattenExtractor):
        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.position = th.nn.Parameter(th.zeros(1, self.features_dim))

        def forward(self, observations):
            return super().forward(observations) + self.position

    extractor = dict(features_extractor_class=WithMatrix)
    build(deep_sea(), **extractor)
    told = [str(one.message) for one in recwarn if "stay plain" in str(one.message)]
    assert len(told) == 1 and "skip=['q_net.features_extractor.position']" in told[0]
    recwarn.clear()
    build(deep_sea(), **extractor, skip=["q_net.features_extractor.position"])
    assert not [one for one in recwarn if "stay plain" in str(one.message)]


class Own(BaseFeaturesExtractor):
    """Of a user: what the cases below need."""

    def __init__(self, observation_space, kind):
        super().__init__(observation_space, 8)
        self.kind, size = kind, observation_space.shape[0]
        self.inner = nn.Linear(2 if kind == "folds" else size, 8)
        self.norm = nn.BatchNorm1d(8) if kind == "norm" else nn.Identity()
        self.drop = nn.Dropout(0.5) if kind == "drops" else nn.Identity()
        self.table = nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)  # nobody calls it

    def forward(self, x):
        if self.kind == "folds":  # pairs of numbers, pair after pair
            return self.inner(x.reshape(-1, 2)).view(len(x), -1, 8).relu().mean(1)
        found = self.drop(self.norm(self.inner(x)).relu())
        if self.kind == "table":  # what it gets is of no row
            found = found * self.table(th.eye(8)).mean(0)
        return nn.functional.linear(found, self.read.weight) if self.kind == "reads" else found


class Four(gym.ObservationWrapper[Any, Any, Any]):
    """A corridor's observations, four numbers that differ."""

    observation_space = spaces.Box(-1, 1, (4,), np.float32)

    def observation(self, observation):
        cell = int(np.argmax(observation))
        return np.array([np.sin(cell), np.cos(cell), np.sin(2 * cell), np.cos(3 * cell)], dtype=np.float32)


def own(kind, **noise):
    return build(Four(DeepSea(6)), features_extractor_class=Own, features_extractor_kwargs=dict(kind=kind), **noise)


def prior_of(model, obs):
    """Of each member, in batches of every size."""
    return [values_of(model, obs), th.cat([values_of(model, obs[n : n + 1]) for n in range(len(obs))], dim=1)]


@pytest.mark.parametrize("kind", ["plain", "folds", "norm", "drops", "reads"])
def test_the_prior_of_a_users_network_is_one_function_per_member(kind):
    """The same in training and evaluation, alone and in a batch, and another for each member."""
    model = own(kind, skip=["*read", "*table"])
    assert not any(module.training for module in model.policy.prior.modules())
    obs = np.random.default_rng(0).uniform(-1, 1, (5, 4)).astype(np.float32)
    found = []
    for mode in (True, False):
        model.policy.set_training_mode(mode)
        model.policy.train(mode)
        found += prior_of(model, obs)
    for other in found[1:]:
        th.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)
    spread = found[0].std(dim=0)
    assert (spread > 0.01).all() and all(not th.allclose(found[0][:, n], found[0][:, n + 1]) for n in range(4))
    model.learn(80)
    assert not model.policy.prior.training


def test_what_gets_nothing_of_a_row_is_the_same_in_all_priors():
    """It is left out of the noise, as the error of the network that learns asks for; the prior leaves it out by itself."""
    with pytest.raises(ValueError, match=r"table .* Leave the module out"):
        own("table")
    model = own("table", skip=["*table", "*read"])
    extractor = model.policy.prior.network.features_extractor
    assert isinstance(extractor.inner, FlipoutLayer) and not isinstance(extractor.table, FlipoutLayer)
    model.learn(80)


def test_the_prior_of_stock_networks_has_all_layers():
    model = build(deep_sea())
    layers = [layer for layer in model.policy.prior.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 3 and all(isinstance(layer, FlipoutLayer) for layer in layers)
