"""Noise is for the policy and the pass that it was drawn for: not for copies, not for onlookers, not for other types."""

import copy
import functools

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomEnv, ReplayProbe, vector_env
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor
from torch import nn
from torch.distributions import kl_divergence

from sb3_flipout import perturbed
from sb3_flipout.callbacks import MonitorNoise
from sb3_flipout.layers import effective_weight
from sb3_flipout.noise import noise_of
from sb3_flipout.noise.carried import without_noise

# ---- other policies ----------------------------------------------------------------------------------------------


class WithReference(PPO):
    """A penalty towards a copy of the policy, as it was at the start."""

    def train(self):
        with th.no_grad():
            obs = next(self.rollout_buffer.get(self.batch_size)).observations
            assert noise_of(obs) is not None
            said = {
                "own": self.policy.get_distribution(obs).distribution,
                "reference": self.reference.get_distribution(obs).distribution,
                "reference_without": self.reference.get_distribution(without_noise(obs)).distribution,
            }
            with perturbed(self.policy, None):
                said["mean"] = self.policy.get_distribution(without_noise(obs)).distribution
            said = {name: type(one)(logits=one.logits.clone()) for name, one in said.items()}
            self.kl = {name: float(kl_divergence(said["mean"], one).mean()) for name, one in said.items()}
            values = self.reference.evaluate_actions(obs, th.zeros(len(obs)))[0]
            assert th.equal(values, self.reference.predict_values(without_noise(obs)))
        super().train()


@pytest.mark.parametrize("perturb", ["policy", "all"])
def test_a_reference_policy_looks_at_the_batch_with_its_mean_weights(perturb):
    kwargs = dict(perturb=perturb, schedule="constant")
    arguments = dict(n_steps=16, batch_size=48, n_epochs=1, learning_rate=0.0, seed=0)
    model = WithReference("FlipoutMlpPolicy", vector_env("discrete"), policy_kwargs=kwargs, **arguments)
    model.reference = copy.deepcopy(model.policy)
    for _ in range(2):
        model.learn(48, reset_num_timesteps=False)
        assert model.kl["reference"] == model.kl["reference_without"] == 0
        assert model.kl["own"] > 1e-3, "the noise did nothing, so this test shows nothing"


def test_in_an_update_a_copy_is_no_stand_in_for_the_policy():
    """Whoever learns from the batch has to have drawn its noise."""
    model = PPO("FlipoutMlpPolicy", vector_env("discrete"), n_steps=8, batch_size=24, seed=0).learn(24)
    obs = next(model.rollout_buffer.get(24)).observations
    model.predict(model.observation_space.sample())  # or SB3's distribution holds a graph, which has no copies
    other = copy.deepcopy(model.policy)
    with pytest.raises(ValueError, match="its keys were drawn by another policy"), other.updating():
        other.evaluate_actions(obs, th.zeros(24))


# ---- onlookers ---------------------------------------------------------------------------------------------------


class Onlooker(BaseCallback):
    """Asks the policy whenever it can, without moving torch's generator."""

    asked = 0

    def _ask(self):
        obs = th.as_tensor(self.training_env.observation_space.sample()[None]).repeat(2, 1)
        with th.no_grad(), th.random.fork_rng(devices=[]):
            self.model.policy(obs)
            self.model.policy(obs, deterministic=True)
            self.model.policy.predict(obs.numpy(), deterministic=False)
        self.asked += 1

    def _on_rollout_start(self):
        self._ask()

    def _on_step(self):
        self._ask()
        return True

    def _on_rollout_end(self):
        self._ask()


REPLAYED = dict(learning_starts=10, buffer_size=200, batch_size=8)
GREEDY = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
WATCHED = {
    "ppo": (PPO, "box", dict(n_steps=8, batch_size=8, n_epochs=2), {}),
    "ppo-episode": (PPO, "box", dict(n_steps=8, batch_size=8, n_epochs=2), dict(resample="episode")),
    "a2c": (A2C, "discrete", dict(n_steps=5), {}),
    "dqn": (DQN, "discrete", REPLAYED | GREEDY, {}),
    "dqn-members": (DQN, "discrete", REPLAYED | GREEDY, dict(members=4, resample="episode")),
    "sac": (SAC, "box", REPLAYED, {}),
    "td3": (TD3, "box", REPLAYED, dict(resample="step")),
}


def trained(case, callback):
    algorithm, action, arguments, noise = WATCHED[case]
    env = vector_env(action, n_envs=2)
    kwargs = dict(net_arch=[8], schedule="constant", **noise)
    model = algorithm("FlipoutMlpPolicy", env, seed=1, policy_kwargs=kwargs, **arguments)
    return model.learn(60, callback=callback)


@pytest.mark.parametrize("case", WATCHED)
def test_who_looks_on_changes_nothing(case):
    onlooker = Onlooker()
    alone, watched = trained(case, None), trained(case, onlooker)
    assert onlooker.asked > 10
    expected, found = alone.policy.state_dict(), watched.policy.state_dict()
    assert all(th.equal(value, found[name]) for name, value in expected.items())
    np.testing.assert_array_equal(alone._last_obs, watched._last_obs)


# ---- other types -------------------------------------------------------------------------------------------------


class Double(BaseFeaturesExtractor):
    """Features in double precision, handed on in single precision."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8)).double()

    def forward(self, observations):
        return self.net(observations.double()).float()


@pytest.mark.parametrize("noise", [{}, dict(family="factorised"), dict(noise_sharing="independent")], ids=str)
def test_an_extractor_in_double_precision(noise):
    kwargs, probe = dict(features_extractor_class=Double, schedule="constant", **noise), ReplayProbe(8)
    model = PPO("FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, seed=1, policy_kwargs=kwargs)
    model.learn(48, callback=probe)
    assert model.policy.features_extractor.net[0].weight_sigma.dtype == th.float64
    assert probe.rollouts == 2 and probe.worst_ratio <= 1e-5 and probe.least_effect > 1e-3


def test_each_layer_has_its_noise_in_its_own_precision():
    kwargs = dict(features_extractor_class=Double, family="factorised")
    policy = PPO("FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, seed=1, policy_kwargs=kwargs).policy
    layer, x, keys = policy.features_extractor.net[0], th.rand(6, 5).double(), th.arange(6)
    with th.no_grad(), perturbed(policy, keys):
        found = layer(x)
    for row, key in enumerate(keys):
        weight, bias = effective_weight(layer, key)
        th.testing.assert_close(found[row], weight @ x[row] + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("algorithm", [DQN, SAC])
def test_an_extractor_in_double_precision_off_policy(algorithm):
    arguments = REPLAYED | (GREEDY if algorithm is DQN else {})
    env = vector_env("discrete" if algorithm is DQN else "box")
    kwargs = dict(features_extractor_class=Double, net_arch=[8])
    model = algorithm("FlipoutMlpPolicy", env, seed=1, policy_kwargs=kwargs, **arguments).learn(60)
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


def test_a_policy_in_double_precision_has_the_same_noise():
    policy = PPO("FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, seed=1).policy
    obs, keys = th.rand(6, 5), th.arange(6)
    with th.no_grad(), perturbed(policy, keys):
        single = policy.get_distribution(obs).distribution.mean
    policy.double()
    with th.no_grad(), perturbed(policy, keys):
        double = policy.mlp_extractor.forward_actor(policy.extract_features(obs).double())
        double = policy.action_net(double)
    assert double.dtype == th.float64
    th.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)


# ---- other observations ------------------------------------------------------------------------------------------


class Padded(BaseFeaturesExtractor):
    """Sequences of different lengths: in evaluation torch's encoder would make nested tensors of them."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 6)
        layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        lengths = 1 + (2 * (x[:, 0, 0] + 1)).long()
        padding = th.arange(x.shape[1]) >= lengths[:, None]
        return self.encoder(x, src_key_padding_mask=padding)[:, 0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_sequences_with_padding_and_a_monitor_of_their_noise():
    space = spaces.Box(-1, 1, (5, 6), np.float32)
    env = make_vec_env(lambda: RandomEnv(spaces.Discrete(4), space), n_envs=5, seed=0)
    kwargs, probe = dict(features_extractor_class=Padded, schedule="constant"), ReplayProbe(8)
    model = PPO("FlipoutMlpPolicy", env, n_steps=8, batch_size=40, n_epochs=1, seed=1, policy_kwargs=kwargs)
    model.learn(80, callback=[probe, MonitorNoise()])
    assert probe.rollouts == 2 and probe.worst_ratio <= 1e-5 and probe.least_effect > 1e-3


class Flattened(CombinedExtractor):
    """Dictionary observations that it makes anew, entry by entry."""

    def forward(self, observations):
        return super().forward({name: 2 * part.clone() for name, part in observations.items()})


def test_dictionaries_that_an_extractor_makes_anew():
    kwargs, probe = dict(features_extractor_class=Flattened, schedule="constant"), ReplayProbe(8)
    env = vector_env("discrete", 2, observation="dict")
    model = PPO("FlipoutMultiInputPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=1, policy_kwargs=kwargs)
    model.learn(32, callback=probe)
    assert probe.rollouts == 2 and probe.worst_ratio <= 1e-5 and probe.least_effect > 1e-3


# ---- the user's optimizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
@pytest.mark.parametrize("choice", ["foreach", "differentiable", "fused"])
def test_what_a_partial_has_chosen_of_the_optimizer_is_kept(algorithm, choice, tmp_path):
    chosen = functools.partial(th.optim.Adam, **{choice: choice == "foreach"})
    kwargs = dict(optimizer_class=chosen, net_arch=[8], learn_sigma=True)  # else it would not be fused in any case
    arguments = dict(n_steps=8, batch_size=8) if algorithm is PPO else REPLAYED | (GREEDY if algorithm is DQN else {})
    env = vector_env("discrete" if algorithm is DQN else "box")
    model = algorithm("FlipoutMlpPolicy", env, seed=1, policy_kwargs=kwargs, **arguments).learn(30)
    optimizer = {PPO: "policy", DQN: "policy", SAC: "actor"}[algorithm]
    model.save(tmp_path / "model.zip")
    for one in (model, algorithm.load(tmp_path / "model.zip", env=env).learn(30)):
        policy = one.policy.actor if optimizer == "actor" else one.policy
        group = policy.optimizer.param_groups[0]
        assert group[choice] == (choice == "foreach") and not group["fused"]
