"""``to_plain_policy`` gives what the mean weights compute, or says why it cannot."""

import re

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from stable_baselines3.dqn.policies import QNetwork
from torch import nn

from sb3_flipout import perturbed
from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.policies import FlipoutActorCriticPolicy, FlipoutDQNPolicy, FlipoutSACPolicy

ON = dict(n_steps=8, batch_size=8, n_epochs=1)
OFF = dict(learning_starts=8, batch_size=8, buffer_size=100, train_freq=2)
NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
LSTM = dict(lstm_hidden_size=8)
#: algorithm -> (action space, arguments, arguments of the policy)
ALGORITHMS = {
    PPO: ("box", ON, {}),
    A2C: ("box", dict(n_steps=8), {}),
    TRPO: ("box", dict(n_steps=8, batch_size=8), {}),
    MaskablePPO: ("discrete", ON, {}),
    RecurrentPPO: ("box", ON, LSTM),
    DQN: ("discrete", {**OFF, **NO_EPSILON}, {}),
    QRDQN: ("discrete", {**OFF, **NO_EPSILON}, dict(n_quantiles=5)),
    SAC: ("box", OFF, {}),
    TD3: ("box", OFF, {}),
    DDPG: ("box", OFF, {}),
    TQC: ("box", OFF, {}),
    CrossQ: ("box", OFF, {}),
}


def build(algorithm, policy=None, **policy_kwargs):
    action, arguments, of_policy = ALGORITHMS[algorithm]
    name = policy or ("FlipoutMlpLstmPolicy" if algorithm is RecurrentPPO else "FlipoutMlpPolicy")
    kwargs = dict(net_arch=[8], schedule="constant", **of_policy, **policy_kwargs)  # noise after training too
    return algorithm(name, vector_env(action, 2), seed=1, policy_kwargs=kwargs, **arguments)


def learn(model):
    return model.learn(24, **(dict(use_masking=False) if isinstance(model, MaskablePPO) else {}))


def snapshot(policy):
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    return weights, policy.noise_state(), [module.training for module in policy.modules()], policy.perturbed_network.active


def assert_same(before, after):
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(th.equal(value, after[0][name]) for name, value in before[0].items())


@pytest.mark.parametrize("perturb", ["policy", "all"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_plain_policy_computes_what_the_mean_weights_compute(algorithm, perturb, untouched_rng):
    with th.random.fork_rng():
        numpy_state = np.random.get_state()
        model = learn(build(algorithm, perturb=perturb))
        np.random.set_state(numpy_state)
    obs = model.env.reset()
    policy, before, spaces_rng = (
        model.policy,
        snapshot(model.policy),
        str(model.observation_space.np_random.bit_generator.state),
    )
    plain = policy.to_plain_policy()
    assert_same(before, snapshot(policy))
    assert str(model.observation_space.np_random.bit_generator.state) == spaces_rng
    assert type(plain).__module__.startswith(("stable_baselines3", "sb3_contrib"))
    assert not any(isinstance(module, FlipoutLayer) for module in plain.modules())
    np.testing.assert_array_equal(plain.predict(obs, deterministic=True)[0], policy.predict(obs, deterministic=True)[0])
    tensors = policy.obs_to_tensor(obs)[0]
    with th.no_grad():
        ours, theirs = policy.mean_outputs(tensors), policy.outputs_of(plain, tensors)
    assert len(ours) >= (1 if algorithm in (DQN, QRDQN) else 2)
    for one, other in zip(ours, theirs, strict=True):
        assert th.equal(one, other)
    for name, value in plain.state_dict().items():
        assert th.equal(value, policy.state_dict()[name]), name


def test_values_of_an_actor_critic_are_those_of_the_mean_weights():
    model = learn(build(PPO, perturb="all"))
    obs = th.rand(5, 5)
    with th.no_grad():
        assert th.equal(model.policy.to_plain_policy().predict_values(obs), model.policy.predict_values(obs))
        with perturbed(model.policy, th.arange(5)):
            assert not th.equal(model.policy.to_plain_policy().predict_values(obs), model.policy.predict_values(obs))


class LinearExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=4)
        self.linear = nn.Linear(5, 4)

    def forward(self, obs):
        return th.tanh(self.linear(obs))


OWN_EXTRACTOR = dict(features_extractor_class=LinearExtractor)
LEFT_OUT = [
    *(
        (algorithm, dict(share_features_extractor=share, **OWN_EXTRACTOR))
        for algorithm in (PPO, SAC, TD3, TQC, CrossQ, RecurrentPPO)
        for share in (True, False)
    ),
    (RecurrentPPO, dict(n_lstm_layers=2)),
    (RecurrentPPO, dict(enable_critic_lstm=False)),
    (RecurrentPPO, dict(enable_critic_lstm=False, shared_lstm=True)),
    (RecurrentPPO, dict(lstm_kwargs=dict(bias=False))),
]


@pytest.mark.parametrize(("algorithm", "policy_kwargs"), LEFT_OUT)
def test_arguments_that_sb3_leaves_out_of_a_saved_policy_are_kept(algorithm, policy_kwargs, tmp_path):
    policy = learn(build(algorithm, **policy_kwargs)).policy
    policy.save(tmp_path / "policy")
    obs = th.rand(6, 5)
    policy.set_training_mode(False)
    for other in (policy.to_plain_policy(), type(policy).load(tmp_path / "policy")):
        other.set_training_mode(False)
        assert set(dict(other.named_modules())) >= {name for name, _ in policy.named_modules()}
        for name, value in policy_kwargs.items():
            if hasattr(policy, name):
                assert getattr(other, name) == value
        with th.no_grad():
            assert all(
                th.equal(one, its) for one, its in zip(policy.mean_outputs(obs), policy.outputs_of(other, obs), strict=True)
            )


# ---- subclasses that compute something else ---------------------------------------------------------------------------


class Scaled(FlipoutActorCriticPolicy):
    def extract_features(self, obs, *args, **kwargs):
        return super().extract_features(obs * th.tensor([-1.0, 1.0, 10.0, -0.5, 2.0]), *args, **kwargs)


class ScaledLogits(FlipoutActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent):
        return self.action_dist.proba_distribution(action_logits=3 * self.action_net(latent))


class Masked(FlipoutActorCriticPolicy):
    def _get_action_dist_from_latent(self, latent):
        mask = th.tensor([-1e8, 0.0, 0.0, 0.0])
        return self.action_dist.proba_distribution(action_logits=self.action_net(latent) + mask)


class OtherActivation(FlipoutActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = MlpExtractor(self.features_dim, self.net_arch, nn.SiLU, self.device)


class ExtraLayer(FlipoutActorCriticPolicy):
    def _build_mlp_extractor(self):
        super()._build_mlp_extractor()
        self.mlp_extractor.policy_net.append(nn.LayerNorm(8))


class WiderNetwork(FlipoutActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = MlpExtractor(self.features_dim, [12], nn.Tanh, self.device)


class OtherValues(FlipoutActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        actions, values, log_prob = super().forward(obs, deterministic)
        return actions, values * 2, log_prob


class OtherQ(FlipoutDQNPolicy):
    def make_q_net(self):
        net = super().make_q_net()
        net.__class__ = Negated
        return net


class Negated(QNetwork):
    def forward(self, obs):
        return -super().forward(obs)


class OtherSACActions(FlipoutSACPolicy):
    def make_actor(self, features_extractor=None):
        actor = super().make_actor(features_extractor)
        actor.latent_pi.append(nn.Softplus())
        return actor


REFUSED = [
    *((PPO, policy) for policy in (Scaled, ScaledLogits, Masked, OtherActivation, ExtraLayer, WiderNetwork, OtherValues)),
    (DQN, OtherQ),
    (SAC, OtherSACActions),
]


@pytest.mark.parametrize(("algorithm", "policy_class"), REFUSED)
def test_a_subclass_that_computes_something_else_is_refused_by_name(algorithm, policy_class, monkeypatch, untouched_rng):
    monkeypatch.setitem(ALGORITHMS, PPO, ("discrete", ON, {}))
    with th.random.fork_rng():
        numpy_state = np.random.get_state()
        model = learn(build(algorithm, policy_class))
        np.random.set_state(numpy_state)
    before, flipout = snapshot(model.policy), policy_class.__mro__[1]
    plain = next(base for base in flipout.__mro__ if base.__module__.startswith("stable_baselines3")).__name__
    message = f"{policy_class.__name__} computes something else than {plain}"
    remedy = f"class {policy_class.__name__}(sb3_flipout.policies.{flipout.__name__}, YourPlainPolicy)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*{re.escape(remedy)}"):
        model.policy.to_plain_policy()
    assert_same(before, snapshot(model.policy))


class PlainScaled(ActorCriticPolicy):
    def extract_features(self, obs, *args, **kwargs):
        return super().extract_features(obs * th.tensor([-1.0, 1.0, 10.0, -0.5, 2.0]), *args, **kwargs)


class Remedied(FlipoutActorCriticPolicy, PlainScaled):
    pass


class OwnArguments(FlipoutActorCriticPolicy):
    """Its constructor has an argument of its own; what it computes is SB3's."""

    def __init__(self, observation_space, action_space, lr_schedule, width=12, **kwargs):
        super().__init__(observation_space, action_space, lr_schedule, net_arch=[width], **kwargs)
        self.width = width


def test_the_remedy_named_in_the_refusal_works():
    model = learn(build(PPO, Remedied))
    plain = model.policy.to_plain_policy()
    assert type(plain) is PlainScaled
    obs = model.env.reset()
    np.testing.assert_array_equal(plain.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_a_constructor_of_ones_own_is_no_obstacle():
    model = PPO(OwnArguments, vector_env("discrete", 2), policy_kwargs=dict(width=6), **ON).learn(16)
    plain = model.policy.to_plain_policy()
    assert type(plain) is ActorCriticPolicy and plain.mlp_extractor.policy_net[0].out_features == 6
    obs = model.env.reset()
    np.testing.assert_array_equal(plain.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_plain_policies_have_the_noise_of_none_in_a_block_around():
    """What a ``perturbed`` block around it says is not what is compared."""
    model = learn(build(PPO))
    with perturbed(model.policy, th.arange(16)):
        plain = model.policy.to_plain_policy()
    obs = th.rand(4, 5)
    assert th.equal(plain._predict(obs, True), model.policy._predict(obs, True))
