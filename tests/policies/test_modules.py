"""Which layers are perturbed, in built networks of every form."""

import pytest
import torch as th
from helpers import CASES, image_env, vector_env
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.policies import FlipoutActorCriticPolicy


def perturbed_names(model):
    return {name for name, module in model.policy.named_modules() if isinstance(module, FlipoutLayer)}


POLICY_LAYERS = {"mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2", "action_net"}
VALUE_LAYERS = {"mlp_extractor.value_net.0", "mlp_extractor.value_net.2", "value_net"}


@pytest.mark.parametrize(
    "noise, expected",
    [
        (dict(perturb="policy"), POLICY_LAYERS),
        (dict(layers="linear"), POLICY_LAYERS),
        (dict(perturb="heads"), {"action_net"}),
        (dict(perturb="all"), POLICY_LAYERS | VALUE_LAYERS),
        (dict(skip="mlp_extractor.*"), {"action_net"}),
        (
            dict(perturb="all", skip=["action_net", "mlp_extractor.value_net.0"]),
            (POLICY_LAYERS | VALUE_LAYERS) - {"action_net", "mlp_extractor.value_net.0"},
        ),
    ],
)
def test_mlp_layers(noise, expected):
    model = PPO("FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, policy_kwargs=noise)
    assert perturbed_names(model) == expected


@pytest.mark.parametrize(
    "noise, convolutions, linear, values",
    [
        (dict(perturb="policy"), 3, True, False),
        (dict(layers="linear"), 0, True, False),
        (dict(perturb="heads"), 0, False, False),
        (dict(perturb="all"), 3, True, True),
        (dict(perturb="all", layers="linear"), 0, True, True),
    ],
)
def test_cnn_layers(noise, convolutions, linear, values):
    model = PPO("FlipoutCnnPolicy", image_env(), n_steps=8, batch_size=8, policy_kwargs=noise)
    names = perturbed_names(model)
    assert len([name for name in names if name.startswith("features_extractor.cnn")]) == convolutions
    assert ("features_extractor.linear.0" in names) == linear
    assert "action_net" in names and ("value_net" in names) == values


def test_separate_extractors_leave_the_value_side_plain():
    model = PPO("FlipoutCnnPolicy", image_env(), n_steps=8, batch_size=8, policy_kwargs=dict(share_features_extractor=False))
    assert isinstance(model.policy.pi_features_extractor.cnn[0], FlipoutLayer)
    assert type(model.policy.vf_features_extractor.cnn[0]) is nn.Conv2d
    assert type(model.policy.value_net) is nn.Linear


def test_layers_of_one_policy_have_different_numbers():
    model = PPO(
        "FlipoutCnnPolicy",
        image_env(),
        n_steps=8,
        batch_size=8,
        policy_kwargs=dict(perturb="all", share_features_extractor=False),
    )
    numbers = [layer.noise_index for layer in model.policy.perturbed_network.layers]
    assert len(numbers) == 10 and len(set(numbers)) == 10


class OwnExtractor(BaseFeaturesExtractor):
    def __init__(self, observation_space):
        super().__init__(observation_space, features_dim=7)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ELU())

    def forward(self, observations):
        return self.net(observations)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_own_features_extractor(algorithm):
    kwargs = dict(features_extractor_class=OwnExtractor)
    sizes = dict(batch_size=8) if algorithm is PPO else {}
    model = algorithm("FlipoutMlpPolicy", vector_env(), n_steps=8, policy_kwargs=kwargs, **sizes).learn(48)
    assert "features_extractor.net.0" in perturbed_names(model)
    assert type(model.policy.features_extractor.net[1]) is nn.LayerNorm


class OwnHidden(nn.Module):
    """A network of a user's own in place of SB3's MlpExtractor, without its attribute names."""

    latent_dim_pi = latent_dim_vf = 6

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(5, 6)

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return th.tanh(self.trunk(features))

    def forward_critic(self, features):
        return th.tanh(self.trunk(features))


class OwnPolicy(FlipoutActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = OwnHidden()


def test_own_policy_class_with_own_network():
    model = PPO(OwnPolicy, vector_env(), n_steps=8, batch_size=8).learn(48)
    assert perturbed_names(model) == {"mlp_extractor.trunk", "action_net"}


@pytest.mark.parametrize("case", ["mlp-box", "dict", "image", "sde"])
def test_plain_policy_has_the_mean_weights_and_stock_class(case):
    name, make_env, arguments = CASES[case]
    model = PPO(name, make_env(), n_steps=8, batch_size=8, **arguments)
    obs, _ = model.policy.obs_to_tensor(model.env.observation_space.sample())
    before = th.get_rng_state()
    plain = model.policy.to_plain_policy()
    assert th.equal(th.get_rng_state(), before)
    assert isinstance(plain, ActorCriticPolicy) and type(plain).__module__.startswith("stable_baselines3")
    assert not any(isinstance(module, FlipoutLayer) for module in plain.modules())
    plain.set_training_mode(False)
    model.policy.set_training_mode(False)
    assert th.equal(plain._predict(obs, True), model.policy._predict(obs, True))


def test_init_noisynet_and_families_reach_the_layers():
    model = PPO(
        "FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, policy_kwargs=dict(family="factorised", init="noisynet")
    )
    layer = model.policy.mlp_extractor.policy_net[2]
    assert layer.noise_config.family == "factorised"
    assert layer.weight.abs().max() <= 1 / 8 and layer.weight.std() > 0.05
    assert th.allclose(layer.weight_sigma, th.tensor(0.5 / 8))


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_hidden_weights_need_an_lstm(algorithm):
    env = vector_env("box" if algorithm is SAC else "discrete")
    with pytest.raises(
        ValueError,
        match=r'layers="hidden" stands for .* of LSTMs and GRUs, and .* of Flipout\w+ has none. Use layers="all" or',
    ):
        algorithm("FlipoutMlpPolicy", env, policy_kwargs=dict(layers="hidden"))


@pytest.mark.parametrize("name", ["members", "target_noise", "prior_scale", "act_by_mode", "noise_scale", "noise_ladder"])
def test_settings_that_belong_elsewhere_are_named(name):
    with pytest.raises(TypeError, match=f"'{name}': 5.* is no setting of this policy: {name} is (for|set)"):
        PPO("FlipoutMlpPolicy", vector_env(), policy_kwargs={name: 5})
