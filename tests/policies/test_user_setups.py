"""Set-ups that users have and nobody had listed: in each the noise, or the user's own network, was lost or refused wrongly."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomEnv, ReplayProbe, vector_env
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import RolloutReturn
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from sb3_flipout.layers import FlipoutLinear, perturb, restore
from sb3_flipout.policies import FlipoutDQNPolicy

NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0, learning_starts=4, batch_size=4)


def ppo(features=None, policy="FlipoutMlpPolicy", env=None, n_steps=16, **kwargs):
    noise = {name: kwargs.pop(name) for name in ("perturb", "skip", "resample") if name in kwargs}
    own = {} if features is None else dict(features_extractor_class=features)
    env = env or make_vec_env(lambda: RandomEnv(spaces.Discrete(4), spaces.Box(-1, 1, (4, 3), np.float32)), n_envs=4, seed=0)
    kwargs = dict(batch_size=n_steps * env.num_envs, n_epochs=1, seed=1) | kwargs
    return PPO(policy, env, n_steps=n_steps, policy_kwargs=dict(net_arch=[8], schedule="constant", **noise, **own), **kwargs)


class Features(BaseFeaturesExtractor):
    def __init__(self, space):
        super().__init__(space, 8)
        self.make()


# ---- where rows lie ---------------------------------------------------------------------------------------------------


class TimeFirstByName(Features):
    def make(self):
        self.layer = nn.Linear(3, 8)

    def forward(self, x):
        return self.layer(input=x.transpose(0, 1)).mean(0)


class AttentionByName(Features):
    def make(self):
        self.layer, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, kdim=3, vdim=3)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.attention(query=self.layer(x), key=x, value=x)[0].mean(0)


class PackedSequences(Features):
    def make(self):
        self.lstm = nn.LSTM(3, 8, batch_first=True)

    def forward(self, x):
        lengths = 1 + 3 * (x[:, 0, 0] > 0).long()
        return self.lstm(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))[1][0][-1]


@pytest.mark.parametrize("features", [TimeFirstByName, AttentionByName, PackedSequences])
def test_inputs_by_name_and_packed_ones_are_replayed_exactly(features):
    model, probe = ppo(features), ReplayProbe(8)  # four environments, as many as steps
    model.learn(128, callback=probe)
    assert probe.rollouts and probe.worst_ratio < 1e-5 < 1e-3 < probe.least_effect


class AttentionOverTheBatch(AttentionByName):
    def forward(self, x):
        return self.attention(query=self.layer(x), key=x, value=x)[0].mean(1)


def test_attention_that_mixes_rows_is_named_itself():
    with pytest.raises(ValueError, match=r"features_extractor\.attention .*mixes rows.*batch_first=True"):
        ppo(AttentionOverTheBatch)


class Folded(Features):
    def make(self):
        self.layer = nn.Linear(3, 8)

    def forward(self, x):
        return self.layer(x.reshape(-1, 3)).view(len(x), 4, 8).mean(1)


@pytest.mark.parametrize("shares", [False, True])
def test_targets_know_where_rows_lie(shares):
    space = spaces.Box(-1, 1, (4, 3), np.float32)
    env = make_vec_env(lambda: RandomEnv(spaces.Box(-1, 1, (2,), np.float32), space), n_envs=1, seed=0)
    noise = dict(perturb="all", target_noise="independent", share_features_extractor=shares)
    kwargs = dict(net_arch=[8], features_extractor_class=Folded, **noise)
    model = SAC("FlipoutMlpPolicy", env, learning_starts=4, batch_size=4, policy_kwargs=kwargs)
    assert model.policy.critic_target.features_extractor.layer.row_layout.order == "interleaved"
    model.learn(12)


class OwnEncoderLayer(nn.TransformerEncoderLayer):
    """Changes nothing, and is another class."""


class OwnEncoder(Features):
    def make(self):
        layer = OwnEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.layer, self.encoder = nn.Linear(3, 8), nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        return self.encoder(self.layer(x)).mean(1)


def test_subclasses_of_encoder_layers_keep_their_noise_too():
    model, probe = ppo(OwnEncoder), ReplayProbe(8)
    model.learn(128, callback=probe)
    assert probe.rollouts and probe.worst_ratio < 1e-5 < 1e-3 < probe.least_effect
    copied = pickle.loads(pickle.dumps(model.policy.features_extractor))
    assert type(copied.encoder.layers[0]) is type(model.policy.features_extractor.encoder.layers[0]) is not OwnEncoderLayer
    assert type(restore(copied).encoder.layers[0]) is OwnEncoderLayer


# ---- what stands where -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [nn.Linear, lambda *sizes: perturb(nn.Linear(*sizes))])
def test_layers_replaced_after_construction_are_an_error(new):
    model = ppo(perturb="heads")
    model.policy.action_net = new(8, 4)
    with pytest.raises(ValueError, match=r"1 of 1 perturbed layers are no longer in the policy: FlipoutLinear.*skip="):
        model.learn(64)
    assert model.num_timesteps == 0
    plain = ppo(skip=["action_net"])
    plain.policy.action_net = nn.Linear(8, 4)  # the remedy
    plain.learn(64)


class WithSpareLayer(QNetwork):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spare = nn.Linear(2, 2)


class Convolutional(QNetwork):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.q_net = nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 4, 1), nn.Flatten())


class WithMatrix(QNetwork):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.matrix = nn.Parameter(th.randn(5, 4))

    def forward(self, obs):
        return super().forward(obs) + obs @ self.matrix


def dqn(network, algorithm=DQN, **noise):
    class Plain(DQNPolicy):
        def make_q_net(self):
            return network(**self._update_features_extractor(self.net_args, None)).to(self.device)

    class Own(FlipoutDQNPolicy, Plain):
        pass

    return algorithm(Own, vector_env("discrete", 1), policy_kwargs=dict(net_arch=[8], **noise), **NO_EPSILON)


def test_a_head_that_nobody_calls_is_an_error():
    with pytest.raises(ValueError, match=r"none of its perturbed layers was called.*q_net\.spare"):
        dqn(WithSpareLayer, perturb="heads").learn(12)


def test_a_network_without_a_linear_layer_has_no_head():
    with pytest.raises(ValueError, match=r'perturb="heads".*Convolutional has none\. Use perturb="policy"'):
        dqn(Convolutional, perturb="heads")


def test_a_matrix_of_a_network_of_ones_own_is_named_and_can_be_left_out():
    with pytest.warns(UserWarning, match=r"q_net\.matrix: a matrix that WithMatrix uses itself.*skip=\['q_net\.matrix'\]"):
        dqn(WithMatrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dqn(WithMatrix, skip=["q_net.matrix"])  # the remedy leaves the layers beside it perturbed
    assert isinstance(model.policy.q_net.q_net[0], FlipoutLinear)


class Counting(Features):
    def make(self):
        self.layer = nn.Linear(12, 8)
        self.register_buffer("rows", th.zeros(()))

    def forward(self, x):
        self.rows += len(x)
        return self.layer(x.flatten(1))


def test_looking_at_a_network_leaves_its_statistics_alone():
    model = ppo(Counting)
    plain = model.policy.to_plain_policy()
    assert model.policy.features_extractor.rows == plain.features_extractor.rows == 0


# ---- buffers and algorithms of one's own --------------------------------------------------------------------------------


class SortedBuffer(RolloutBuffer):
    def _get_samples(self, batch_inds, env=None):
        return super()._get_samples(np.sort(batch_inds)[::-1].copy(), env)


class SortedDictBuffer(DictRolloutBuffer):
    def _get_samples(self, batch_inds, env=None):
        return super()._get_samples(np.sort(batch_inds)[::-1].copy(), env)


@pytest.mark.parametrize(("kind", "buffer_class"), [("vector", SortedBuffer), ("dict", SortedDictBuffer)])
def test_a_buffer_that_takes_other_places_brings_their_noise(kind, buffer_class):
    policy = "FlipoutMultiInputPolicy" if kind == "dict" else "FlipoutMlpPolicy"
    env = vector_env("discrete", 2, observation=kind)
    model = ppo(policy=policy, env=env, rollout_buffer_class=buffer_class, skip=["features_extractor"])
    model.learn(32)
    assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-6
    assert model.logger.name_to_value["train/clip_fraction"] == 0


class ActsByPredict(DQN):
    def collect_rollouts(self, env, callback, train_freq, replay_buffer, *args, **kwargs):
        callback.on_rollout_start()
        actions, _ = self.predict(self._last_obs, deterministic=False)
        obs, rewards, dones, infos = env.step(actions)
        self.num_timesteps += env.num_envs
        replay_buffer.add(self._last_obs, obs, actions.reshape(-1, 1), rewards, dones, infos)
        self._last_obs = obs
        callback.on_rollout_end()
        return RolloutReturn(1, 0, True)


def test_a_collection_that_does_not_tell_its_steps_is_named_once():
    model = ActsByPredict("FlipoutMlpPolicy", vector_env("discrete", 1), policy_kwargs=dict(resample="episode"), **NO_EPSILON)
    with pytest.warns(UserWarning, match="ActsByPredict has made 1 collection steps.*told of 0.*_sample_action") as caught:
        model.learn(12)
    assert len([warning for warning in caught if "collection steps" in str(warning.message)]) == 1


# ---- targets put there by hand, sizes that agree by luck, rows written in place ----------------------------------------


@pytest.mark.parametrize("owner", ["model", "policy"])
def test_a_copy_in_place_of_the_target_is_refused_before_it_learns_without_noise(owner):
    model = DQN("FlipoutMlpPolicy", "CartPole-v1", seed=0, device="cpu", exploration_initial_eps=0, exploration_final_eps=0)
    (model if owner == "model" else model.policy).q_net_target = copy.deepcopy(model.policy.q_net)
    with pytest.raises(ValueError, match=r"model\S*q_net_target is a copy of a perturbed network .*load_state_dict"):
        model.learn(10)


class _Positions(BaseFeaturesExtractor):
    """Adds an embedding of each of T positions: the same for all rows."""

    def __init__(self, space, steps):
        super().__init__(space, steps)
        self.steps, self.embedding = steps, nn.Embedding(steps, 1)

    def forward(self, obs):
        return obs[:, :1] + self.embedding(th.arange(self.steps)).view(1, -1)


@pytest.mark.parametrize("steps", [5, 6, 7])
def test_positions_are_no_rows_whatever_their_number(steps):
    extractor = dict(features_extractor_class=_Positions, features_extractor_kwargs=dict(steps=steps))
    with pytest.raises(ValueError, match=r"features_extractor\.embedding .*skip=\['features_extractor\.embedding'\]"):
        PPO("FlipoutMlpPolicy", "CartPole-v1", device="cpu", policy_kwargs=extractor)
