"""Networks that a user brings: they keep what they compute, and get the noise."""

import copy

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN
from sb3_contrib.qrdqn.policies import QRDQNPolicy, QuantileNetwork
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import Actor as TD3Actor
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from sb3_flipout import perturbed
from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.noise import noise_of
from sb3_flipout.policies import (
    FlipoutActorCriticPolicy,
    FlipoutDQNPolicy,
    FlipoutQRDQNPolicy,
    FlipoutSACPolicy,
    FlipoutTD3Policy,
)
from sb3_flipout.policies.learning import LearnsUnderNoise

OFF = dict(learning_starts=8, batch_size=8, buffer_size=100, train_freq=2, seed=1)
NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
OBS = th.full((6, 5), 0.3)
FORBIDDEN = 2


class DuelingNetwork(QNetwork):
    """Value and advantages by layers of its own names, as the reports have it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.q_net = nn.Sequential(nn.Linear(self.features_dim, 8), nn.ReLU())
        self.value, self.advantage = nn.Linear(8, 1), nn.Linear(8, int(self.action_space.n))

    def forward(self, obs):
        hidden = self.q_net(self.extract_features(obs, self.features_extractor))
        advantage = self.advantage(hidden)
        return self.value(hidden) + advantage - advantage.mean(1, keepdim=True)


class MaskedNetwork(QNetwork):
    """One action may never be taken."""

    def forward(self, obs):
        mask = th.zeros(int(self.action_space.n))
        mask[FORBIDDEN] = -1e8
        return super().forward(obs) + mask


class OwnQuantiles(QuantileNetwork):
    """Quantiles in order: each adds something positive to the one below it."""

    def forward(self, obs):
        quantiles = super().forward(obs)
        return quantiles[:, :1] + nn.functional.softplus(quantiles).cumsum(1)


class Gives:
    """Mixin that makes the network of a class, as SB3's own `make_q_net` does."""

    network = DuelingNetwork

    def make_q_net(self):
        arguments = self._update_features_extractor(self.net_args, features_extractor=None)
        return self.network(**arguments).to(self.device)

    make_quantile_net = make_q_net


class PlainDueling(Gives, DQNPolicy):
    pass


class DuelingByMixin(Gives, FlipoutDQNPolicy):
    pass


class DuelingBySubclass(FlipoutDQNPolicy):
    network = DuelingNetwork
    make_q_net = Gives.make_q_net


class DuelingBehind(FlipoutDQNPolicy, PlainDueling):
    pass


class Masked(Gives, FlipoutDQNPolicy):
    network = MaskedNetwork


class PlainQuantiles(Gives, QRDQNPolicy):
    network = OwnQuantiles


class Quantiles(FlipoutQRDQNPolicy, PlainQuantiles):
    pass


class OwnSACActor(SACActor):
    """Its mean never leaves a small range."""

    def get_action_dist_params(self, obs):
        mean, log_std, kwargs = super().get_action_dist_params(obs)
        return th.tanh(mean) / 10, log_std, kwargs


class OwnTD3Actor(TD3Actor):
    def forward(self, obs):
        return super().forward(obs) / 10


class OwnCritic(ContinuousCritic):
    """Values are never positive."""

    def forward(self, obs, actions):
        return tuple(-nn.functional.softplus(value) for value in super().forward(obs, actions))

    def q1_forward(self, obs, actions):
        return self.forward(obs, actions)[0]


class GivesActorAndCritic:
    actor_class = OwnSACActor

    def make_actor(self, features_extractor=None):
        return self.actor_class(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_critic(self, features_extractor=None):
        return OwnCritic(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)


class PlainSAC(GivesActorAndCritic, SACPolicy):
    pass


class PlainTD3(GivesActorAndCritic, TD3Policy):
    actor_class = OwnTD3Actor


class SACByMixin(GivesActorAndCritic, FlipoutSACPolicy):
    pass


class SACBehind(FlipoutSACPolicy, PlainSAC):
    pass


class TD3ByMixin(GivesActorAndCritic, FlipoutTD3Policy):
    actor_class = OwnTD3Actor


class TD3Behind(FlipoutTD3Policy, PlainTD3):
    pass


VALUE_POLICIES = [
    (DQN, DuelingByMixin, DuelingNetwork),
    (DQN, DuelingBySubclass, DuelingNetwork),
    (DQN, DuelingBehind, DuelingNetwork),
    (DQN, Masked, MaskedNetwork),
    (QRDQN, Quantiles, OwnQuantiles),
]
ACTOR_POLICIES = [(SAC, SACByMixin), (SAC, SACBehind), (TD3, TD3ByMixin), (TD3, TD3Behind)]
KEYS = th.arange(6)


def build_value(algorithm, policy, **noise):
    kwargs = dict(net_arch=[8], **noise)
    return algorithm(policy, vector_env("discrete", 2), policy_kwargs=kwargs, **OFF, **NO_EPSILON)


def build_actor(algorithm, policy, **noise):
    return algorithm(policy, vector_env("box", 2), policy_kwargs=dict(net_arch=[8], **noise), **OFF)


def under(policy, keys, module, *inputs):
    with th.no_grad(), perturbed(policy, keys):
        return module(*inputs)


def rows_differ(values):
    """Equal observations, other weights in each row."""
    return bool(((values[1:] - values[:1]).flatten(1).abs().max(1).values > 1e-5).all())


@pytest.mark.parametrize("noise", [{}, dict(perturb="heads"), dict(members=6)], ids=str)
@pytest.mark.parametrize(("algorithm", "policy", "network"), VALUE_POLICIES)
def test_own_value_network_keeps_its_forward_and_gets_the_noise(algorithm, policy, network, noise, tmp_path):
    model = build_value(algorithm, policy, **noise).learn(24)
    for net in (model.policy.online, model.policy.target):
        assert isinstance(net, network) and isinstance(net, LearnsUnderNoise) and net.perturbed_network.layers
    net = model.policy.online
    # The user's function, of a plain network with these weights.
    plain = network(**model.policy._update_features_extractor(model.policy.net_args, features_extractor=None))
    plain.load_state_dict({name: value for name, value in net.state_dict().items() if name in plain.state_dict()})
    with th.no_grad():
        assert th.equal(under(model.policy, None, net, OBS), plain(OBS))
    values = under(model.policy, KEYS, net, OBS)
    assert rows_differ(values)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    loaded = algorithm.load(tmp_path / "model", env=vector_env("discrete", 2))
    alone = type(model.policy).load(tmp_path / "policy")  # weights without noise
    for other in (loaded.policy, copy.deepcopy(model.policy), alone):
        assert type(other.online) is type(net)
        assert th.equal(under(other, None, other.online, OBS), under(model.policy, None, net, OBS))
        there = under(other, KEYS, other.online, OBS)
        assert rows_differ(there) and (other is alone or th.equal(there, values))
    loaded.learn(16)


def test_heads_of_a_dueling_network_are_perturbed():
    net = build_value(DQN, DuelingByMixin).policy.online
    noisy = {name for name, layer in net.named_modules() if isinstance(layer, FlipoutLayer)}
    assert noisy == {"q_net.0", "value", "advantage"}


def test_a_plain_policy_of_ones_own_is_what_to_plain_policy_gives():
    for model, plain_class in ((build_value(DQN, DuelingBehind), PlainDueling), (build_actor(SAC, SACBehind), PlainSAC)):
        plain = model.policy.to_plain_policy()
        assert type(plain) is plain_class
        obs = model.env.reset()
        np.testing.assert_array_equal(plain.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("noise", [{}, dict(members=5, prior_scale=1.0)], ids=str)
def test_masked_actions_are_never_taken_under_noise(noise):
    model = build_value(DQN, Masked, sigma_init=3.0, **noise)
    model.learning_starts = 0  # else SB3 draws the first actions at random
    model.learn(400)
    taken = model.replay_buffer.actions[: model.replay_buffer.size()]
    assert FORBIDDEN not in taken and len(np.unique(taken)) > 1
    obs = np.random.default_rng(0).uniform(-1, 1, (400, 5)).astype(np.float32)
    for deterministic in (True, False):
        actions = model.predict(obs, deterministic=deterministic)[0]
        assert FORBIDDEN not in actions
    assert len(np.unique(actions)) > 1


@pytest.mark.parametrize("noise", [{}, dict(perturb="all", target_noise="independent")], ids=str)
@pytest.mark.parametrize(("algorithm", "policy"), ACTOR_POLICIES)
def test_own_actor_and_critic_keep_their_functions_and_get_the_noise(algorithm, policy, noise, tmp_path):
    model = build_actor(algorithm, policy, sigma_init=3.0, **noise).learn(24)
    actor, critic = model.policy.actor, model.policy.critic
    assert isinstance(actor, policy.actor_class) and isinstance(critic, OwnCritic)
    mean_of = actor if algorithm is TD3 else lambda obs: actor.get_action_dist_params(obs)[0]
    actions = under(model.policy, KEYS, mean_of, OBS)
    assert rows_differ(actions) and actions.abs().max() <= 0.1
    assert isinstance(critic, LearnsUnderNoise) == bool(noise)
    values = under(model.policy, KEYS, critic, OBS, th.zeros(6, 3))
    assert all((value <= 0).all() and rows_differ(value) == bool(noise) for value in values)
    assert (model.policy.critic_target(OBS, th.zeros(6, 3))[0] <= 0).all()
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=vector_env("box", 2))
    for other in (loaded.policy, copy.deepcopy(model.policy)):
        assert type(other.actor) is type(actor) and type(other.critic) is type(critic)
        own = other.actor if algorithm is TD3 else lambda obs: other.actor.get_action_dist_params(obs)[0]  # noqa: B023
        assert th.equal(under(other, KEYS, own, OBS), actions)
    loaded.learn(16)


def test_what_a_network_learns_from_is_its_own_function():
    """In an update the target is the user's network too, so no target is positive."""
    model = build_actor(TD3, TD3ByMixin)
    seen = []
    model.policy.critic_target.register_forward_hook(lambda *call: seen.extend(call[2]))
    model.learn(24)
    assert seen and all((values <= 0).all() for values in seen)


class OwnEvaluation(FlipoutActorCriticPolicy):
    """Evaluates actions by lines of its own, as where a loss is added."""

    def evaluate_actions(self, obs, actions):
        latent_policy, latent_value = self.mlp_extractor(self.extract_features(obs))
        distribution = self._get_action_dist_from_latent(latent_policy)
        return self.value_net(latent_value), distribution.log_prob(actions), distribution.entropy()


class OwnEvaluationUnderNoise(OwnEvaluation):
    def evaluate_actions(self, obs, actions):
        with perturbed(self, noise_of(obs)):
            return super().evaluate_actions(obs, actions)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_an_own_evaluation_of_actions_is_told_how_to_replay_and_then_does(algorithm):
    env = vector_env("discrete", 2)
    with pytest.raises(RuntimeError, match="in an evaluate_actions of your own, write its lines into"):
        algorithm(OwnEvaluation, env, n_steps=32, seed=3, device="cpu").learn(64)
    plain, own = (
        algorithm(policy, env, n_steps=32, seed=3, device="cpu").learn(64).policy.state_dict()
        for policy in ("FlipoutMlpPolicy", OwnEvaluationUnderNoise)
    )
    assert all(th.equal(plain[name], own[name]) for name in plain)
