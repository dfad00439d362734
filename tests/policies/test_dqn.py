"""DQN and QRDQN: two streams of noise, one per environment for acting, one per gradient step for learning."""

import ast
import copy
import re

import numpy as np
import pytest
import torch as th
from helpers import image_env, vector_env
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_flipout import perturbed
from sb3_flipout.envs import DeepSea
from sb3_flipout.layers import Ask, FlipoutLayer, effective_weight
from sb3_flipout.noise import FAMILIES, fold, fold_in
from sb3_flipout.policies.learning_noise import LearningNoise

NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
ALGORITHMS = [DQN, QRDQN]


def build(algorithm=DQN, n_envs=2, observation="vector", policy="FlipoutMlpPolicy", noise=None, **kwargs):
    arguments = dict(learning_starts=8, batch_size=8, buffer_size=200, train_freq=2, target_update_interval=10, seed=1)
    env = vector_env("discrete", n_envs, observation=observation)
    return algorithm(policy, env, **{**arguments, **NO_EPSILON, **kwargs}, policy_kwargs=dict(noise or {}))


def net_of(model, target=False):
    return model.policy.target if target else model.policy.online


class Recorder(BaseCallback):
    """Keys of every acting step and of every gradient step, with the bases in force."""

    def __init__(self):
        super().__init__()
        self.acting, self.acting_bases, self.learning, self.dones = [], [], [], []

    def _init_callback(self):
        policy = self.model.policy
        predict, nets = policy._predict, (policy.online, policy.target)

        def record_predict(observation, deterministic=True):
            if policy._acting_noise is not None:
                self.acting.append(policy._acting_noise.keys.clone())
                base = policy.online.perturbed_network.layers[0].bases()[1].get("weight_base")
                self.acting_bases.append(None if base is None else base.clone())
            return predict(observation, deterministic)

        def recording(role, activate):
            def record_activate(noise):
                if policy.learning.active and noise is not Ask.EXPLICIT:
                    base = nets[role].perturbed_network.layers[0].bases()[1].get("weight_base")
                    keys = None if noise is None else noise.keys.clone()
                    self.learning.append((policy.learning.step, role, keys, None if base is None else base.clone()))
                return activate(noise)

            return record_activate

        policy._predict = record_predict
        for role, net in enumerate(nets):
            net.perturbed_network.activate = recording(role, net.perturbed_network.activate)

    def _on_step(self):
        self.dones.append(self.locals["dones"].copy())
        return True


def learn(model, steps=120, **kwargs):
    recorder = Recorder()
    model.learn(steps, callback=[recorder, *kwargs.pop("callback", [])], **kwargs)
    return recorder


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "noise",
    [dict(family=family) for family in FAMILIES]
    + [dict(target_noise="same"), dict(target_noise="mean"), dict(members=5), dict(members=5, prior_scale=2.0)]
    + [dict(noise_sharing="shared"), dict(noise_sharing="independent"), dict(base_every_steps=3), dict(init="noisynet")],
)
def test_runs_and_learns_sigma(algorithm, noise):
    model = build(algorithm, noise=noise)
    layers = [layer for layer in net_of(model).modules() if isinstance(layer, FlipoutLayer)]
    before = [None if layer.weight_sigma is None else layer.weight_sigma.clone() for layer in layers]
    model.learn(120)
    for layer, old in zip(layers, before, strict=True):
        if old is not None and layer.weight_sigma.requires_grad:
            assert not th.equal(layer.weight_sigma, old)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "policy, stock, observation, noise",
    [
        ("FlipoutMlpPolicy", "MlpPolicy", "vector", {}),
        ("FlipoutMlpPolicy", "MlpPolicy", "vector", dict(family="factorised", target_noise="same", resample="episode")),
        ("FlipoutCnnPolicy", "CnnPolicy", "image", {}),
        ("FlipoutMultiInputPolicy", "MultiInputPolicy", "dict", {}),
    ],
)
def test_sigma_frozen_at_zero_is_stock_bit_for_bit(algorithm, policy, stock, observation, noise):
    theirs = build(algorithm, observation=observation, policy=stock).learn(100)
    ours = build(algorithm, observation=observation, policy=policy, noise=dict(sigma_init=0.0, learn_sigma=False, **noise))
    ours.learn(100)
    own = ours.policy.state_dict()
    for name, value in theirs.policy.state_dict().items():
        assert th.equal(value, own[name]), name


def test_acting_keys_are_a_function_of_seed_step_and_environment():
    model = build()
    recorder = learn(model)
    seed = model.policy._keys.seed
    first = 8 // 2  # steps of warm-up, in which nothing is predicted, but which are counted
    for step, keys in enumerate(recorder.acting, start=first):
        assert keys.tolist() == [fold(seed, step, env) for env in range(2)]


def test_episode_keys_follow_each_environments_own_ends():
    recorder = learn(build(n_envs=3, noise=dict(resample="episode")), 300)
    keys = th.stack(recorder.acting).numpy()
    dones = np.stack(recorder.dones)[-len(keys) :]
    np.testing.assert_array_equal(keys[1:] != keys[:-1], dones[:-1])
    assert dones.any(axis=0).all()


@pytest.mark.parametrize("n_envs", [1, 8, 16])
def test_any_number_of_environments(n_envs):
    recorder = learn(build(n_envs=n_envs, train_freq=1, gradient_steps=-1, target_update_interval=20), 200)
    assert all(len(keys) == n_envs for keys in recorder.acting)


def test_train_freq_in_episodes():
    recorder = learn(build(n_envs=1, train_freq=(1, "episode")), 200)
    assert len(recorder.learning) > 4


@pytest.mark.parametrize("target_noise", ["independent", "same", "mean"])
@pytest.mark.parametrize("family", ["gaussian", "factorised"])
def test_learning_noise_is_fresh_in_each_gradient_step(target_noise, family):
    model = build(noise=dict(target_noise=target_noise, family=family), gradient_steps=3)
    recorder = learn(model)
    online = {step: (keys, base) for step, role, keys, base in recorder.learning if role == 0}
    target = {step: (keys, base) for step, role, keys, base in recorder.learning if role == 1}
    assert list(online) == list(range(model.policy.learning.step)) and len(online) > 20
    every = th.cat([keys for keys, _ in online.values()])
    assert every.unique().numel() == every.numel()
    for step, (keys, base) in online.items():
        other_keys, other_base = target[step]
        if target_noise == "mean":
            assert other_keys is None
        else:
            assert th.equal(keys, other_keys) == (target_noise == "same")
        if family == "gaussian" and target_noise != "mean":
            assert th.equal(base, other_base) == (target_noise == "same")
            assert step == 0 or not th.equal(base, online[step - 1][1])


def test_gradient_steps_leave_the_acting_base_alone():
    recorder = learn(build(noise=dict(base_every_steps=None)))
    assert all(th.equal(base, recorder.acting_bases[0]) for base in recorder.acting_bases)


def test_acting_base_is_redrawn_every_so_many_steps():
    bases = learn(build(n_envs=1, learning_starts=0, noise=dict(base_every_steps=4)), 40).acting_bases
    for step in range(1, 40):
        assert th.equal(bases[step], bases[step - 1]) == (step % 4 != 0)


def test_shared_noise_is_one_draw_that_follows_the_first_environment():
    recorder = learn(build(n_envs=2, noise=dict(noise_sharing="shared", resample="episode")), 200)
    for before, after, one, other in zip(
        recorder.acting, recorder.acting[1:], recorder.acting_bases, recorder.acting_bases[1:], strict=False
    ):
        assert th.equal(one, other) == bool(before[0] == after[0])


def test_action_is_greedy_under_each_environments_own_weights():
    model = build(n_envs=3)
    obs = model.env.reset()
    model._last_obs = obs
    with model.policy.collecting(3):
        keys = model.policy._acting_noise.keys
        actions, _ = model.policy.predict(obs)
    for env in range(3):
        x = th.as_tensor(obs[env])
        layers = model.policy.q_net.perturbed_network.layers
        for layer in layers:
            weight, bias = effective_weight(layer, keys[env])
            x = weight @ x + bias
            x = x if layer is layers[-1] else x.relu()
        assert x.argmax() == actions[env]


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_changes_nothing_in_the_training_noise(deterministic):
    evaluation = EvalCallback(vector_env("discrete", 5, seed=9), eval_freq=7, deterministic=deterministic, verbose=0)
    plain, evaluated = learn(build()), learn(build(), callback=[evaluation])
    assert all(th.equal(a, b) for a, b in zip(plain.acting, evaluated.acting, strict=True))
    for one, other in zip(plain.learning, evaluated.learning, strict=True):
        assert one[:2] == other[:2] and th.equal(one[2], other[2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("noise", [{}, dict(base_every_steps=5), dict(members=4, prior_scale=1.0, resample="step")])
def test_noise_goes_on_after_save_and_load_as_if_uninterrupted(algorithm, noise, tmp_path):
    noise = dict(noise, schedule="constant")  # one that falls has fallen with the first call of learn
    whole = learn(build(algorithm, noise=noise), 160)
    model = build(algorithm, noise=noise)
    first = learn(model, 80)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=vector_env("discrete", 2))
    loaded.load_replay_buffer(tmp_path / "buffer")
    second = learn(loaded, 80, reset_num_timesteps=False)
    for expected, got in zip(whole.acting, first.acting + second.acting, strict=True):
        assert th.equal(expected, got)
    for expected, got in zip(whole.acting_bases, first.acting_bases + second.acting_bases, strict=True):
        assert th.equal(expected, got)
    for expected, got in zip(whole.learning, first.learning + second.learning, strict=True):
        assert expected[:2] == got[:2] and th.equal(expected[2], got[2])
    obs = np.zeros((3, 5), dtype=np.float32)
    again = algorithm.load(tmp_path / "model")
    np.testing.assert_array_equal(again.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


def test_sigma_follows_into_the_target_network():
    model = build(target_update_interval=2, noise=dict(learn_sigma=True)).learn(60)
    for one, other in zip(model.policy.q_net.parameters(), model.policy.q_net_target.parameters(), strict=True):
        assert one.shape == other.shape
    initial = build().policy.q_net_target.q_net[0].weight_sigma
    assert not th.equal(model.policy.q_net_target.q_net[0].weight_sigma, initial)


# ---- members ----------------------------------------------------------------------------------------------------


def members(algorithm=DQN, **noise):
    return build(algorithm, noise=dict(members=5, resample="episode", **noise))


def test_members_are_the_only_keys():
    recorder = learn(members(prior_scale=1.0), 200)
    for keys in [*recorder.acting, *(keys for _, _, keys, _ in recorder.learning)]:
        assert keys.min() >= 0 and keys.max() < 5
    assert th.cat(recorder.acting).unique().numel() == 5


def test_base_of_members_is_frozen_for_acting_and_learning():
    recorder = learn(members())
    bases = recorder.acting_bases + [base for *_, base in recorder.learning]
    assert all(th.equal(base, bases[0]) for base in bases)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("prior_scale", [0.0, 2.0])
def test_member_values_are_those_of_each_members_own_network(algorithm, prior_scale):
    model = members(algorithm, prior_scale=prior_scale)
    obs = th.rand(7, 5)
    values = model.policy.member_values(obs)
    assert values.shape == (5, 7, 4)
    online = model.policy.online
    for member in range(5):
        with th.no_grad(), online.perturbed_network.activate(_one_key(member, 7)):
            single = online(obs)
        single = single.mean(dim=1) if single.dim() == 3 else single
        assert th.allclose(values[member], single, atol=1e-6)
    assert (values[0] - values[1]).abs().max() > 1e-3
    assert th.equal(model.policy.member_values(obs.numpy()), values)


def _one_key(key, n):
    from sb3_flipout.noise import RowNoise

    return RowNoise(th.full((n,), key))


def test_prior_is_frozen_random_zero_on_average_and_the_same_in_the_target():
    model = members(prior_scale=3.0)
    prior = model.policy.prior
    before = {name: value.clone() for name, value in prior.named_parameters()}
    obs = th.rand(6, 5)
    with th.no_grad():
        assert th.equal(prior.network(obs), th.zeros(6, 4)), "mean weights of the prior are zero"
        with_prior = model.policy.member_values(obs)
        model.policy.online.__dict__["prior"] = None
        without = model.policy.member_values(obs)
        model.policy.online.__dict__["prior"] = (prior, 3.0)
    assert (with_prior - without).abs().mean() > 0.1
    model.learn(100)
    for name, value in prior.named_parameters():
        assert th.equal(value, before[name]) and not value.requires_grad
    in_optimizer = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    assert not in_optimizer & {id(p) for p in prior.parameters()}
    assert model.policy.target.prior[0] is prior
    learned = {layer.noise_index for layer in model.policy.q_net.modules() if isinstance(layer, FlipoutLayer)}
    assert not learned & {layer.noise_index for layer in prior.modules() if isinstance(layer, FlipoutLayer)}


def test_deterministic_prediction_is_the_vote_of_the_members():
    model = members(prior_scale=3.0)
    obs = np.random.default_rng(0).uniform(-1, 1, (50, 5)).astype(np.float32)
    actions, _ = model.predict(obs, deterministic=True)
    values = model.policy.member_values(obs)
    for row, action in enumerate(actions):
        counts = np.bincount(values[:, row].argmax(dim=1).numpy(), minlength=4)
        best = np.flatnonzero(counts == counts.max())
        mean = values[:, row].mean(dim=0).numpy()
        assert action == best[np.argmax(mean[best])]
    assert len(set(actions.tolist())) > 1


def test_members_cost_a_fifth_of_separate_networks():
    def size(model):
        return sum(p.numel() for p in model.policy.q_net.parameters() if p.requires_grad)

    one = size(build(policy="MlpPolicy"))
    assert size(build(noise=dict(members=20))) <= 20 * one / 5


def test_learning_noise_is_a_pure_function():
    settings = build().policy.noise_settings
    one, other = LearningNoise(3, settings), LearningNoise(3, settings)
    one.step = other.step = 7
    device = th.device("cpu")
    assert th.equal(one.rows(0, 4, device).keys, other.rows(0, 8, device).keys[:4])
    assert th.equal(one.rows(0, 4, device).keys, fold_in(fold(3, 16, 7, 0), th.arange(4)))


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise, error, message",
    [
        (dict(target_noise="none"), ValueError, 'target_noise must be one of "independent", "same", "mean", got \'none\'.'),
        (dict(members=1), ValueError, "members must be an integer >= 2, got 1. Use None for no ensemble."),
        (dict(members=2.5), TypeError, "members must be an integer >= 2, got 2.5 of type float. Use None for no ensemble."),
        (dict(members=5, noise_sharing="shared"), ValueError, 'members=5 does not fit noise_sharing="shared"'),
        (dict(members=5, base_every_steps=3), ValueError, "members=5 does not fit base_every_steps=3"),
        (dict(prior_scale=1.0), ValueError, "prior_scale=1.0 needs members"),
        (dict(members=5, prior_scale=-1.0), ValueError, "prior_scale must be a finite number >= 0, got -1.0. Use 0.0"),
        (dict(members=5, prior_scale=float("nan")), ValueError, "prior_scale must be a finite number >= 0, got nan. Use 0.0"),
    ],
)
def test_bad_settings(noise, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build(noise=noise)


def test_member_values_without_members():
    with pytest.raises(ValueError, match="needs an ensemble"):
        build().policy.member_values(th.rand(2, 5))


def test_member_values_of_numbers_as_replay_buffers_give_them():
    model = DQN("FlipoutMlpPolicy", DeepSea(3, integer_observations=True), policy_kwargs=dict(members=3), **NO_EPSILON)
    obs = th.tensor([[4], [0], [8]])
    assert th.equal(model.policy.member_values(obs), model.policy.member_values(obs[:, 0].numpy()))


def test_epsilon_left_on_is_warned_of_once():
    model = build(exploration_initial_eps=1.0, exploration_final_eps=0.05)
    with pytest.warns(UserWarning, match=r"exploration_initial_eps=0\.0 and exploration_final_eps=0\.0") as caught:
        model.learn(20)
        model.learn(20)
    assert len(caught) == 1


@pytest.mark.parametrize("algorithm", [DQN, QRDQN])
def test_mean_weights_learn_where_they_are_asked_for_by_name(algorithm):
    model = build(algorithm=algorithm, noise=dict(members=5, prior_scale=1.0)).learn(20)
    with perturbed(model.policy, None):
        model.train(gradient_steps=1, batch_size=8)
    layers = [layer for layer in model.policy.online.modules() if isinstance(layer, FlipoutLayer)]
    assert layers and all(layer.weight.grad.any() and layer.weight_sigma.grad is None for layer in layers)


def test_continuous_actions_are_refused_by_sb3():
    with pytest.raises(AssertionError, match="Discrete"):
        DQN("FlipoutMlpPolicy", vector_env("box"))


def test_cnn_layers_by_perturb():
    def kinds(perturb="policy", layers="all"):
        noise = dict(perturb=perturb, layers=layers)
        model = DQN("FlipoutCnnPolicy", image_env(), buffer_size=10, policy_kwargs=noise, **NO_EPSILON)
        return [type(layer).__name__ for layer in model.policy.q_net.modules() if isinstance(layer, FlipoutLayer)]

    assert kinds(layers="linear") == ["FlipoutLinear"] * 2
    assert kinds("policy") == kinds("all") == ["FlipoutConv2d"] * 3 + ["FlipoutLinear"] * 2
    assert kinds("heads") == ["FlipoutLinear"]


def test_gradient_steps_are_counted_with_another_optimizer_and_in_a_copied_policy():
    model = build(learning_starts=0).learn(20)
    before = model.policy.learning.step
    model.policy = copy.deepcopy(model.policy)
    model._create_aliases()
    model.learn(20)
    model.policy.optimizer = th.optim.Adam(model.policy.q_net.parameters())
    model.learn(20)
    assert model.policy.learning.step == before + 10


def test_members_learn_from_their_own_targets_and_hold_their_keys_by_default():
    assert (members().policy.noise_settings.target_noise, members().policy.noise_settings.resample) == ("same", "episode")
    plain = build().policy.noise_settings
    assert (plain.target_noise, plain.resample) == ("independent", "step")


def test_bases_are_drawn_once_per_gradient_step_and_network(monkeypatch):
    draws = []
    redraw = FlipoutLayer.redraw
    monkeypatch.setattr(FlipoutLayer, "redraw", lambda layer, key: (draws.append(key), redraw(layer, key)))
    model = build(learning_starts=0, gradient_steps=3, noise=dict(base_every_steps=None))
    draws.clear()
    model.learn(40)
    steps, layers = model.policy.learning.step, 3
    assert len(draws) == 2 * layers * steps


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("side", ["", "_target"])
def test_what_is_left_out_of_one_network_is_left_out_of_its_target(algorithm, side):
    name = {DQN: "q_net", QRDQN: "quantile_net"}[algorithm]
    model = build(algorithm, noise=dict(skip=[f"{name}{side}.{name}.0"])).learn(40)
    for target in (False, True):
        first, *others = [layer for layer in getattr(net_of(model, target), name) if isinstance(layer, th.nn.Linear)]
        assert not isinstance(first, FlipoutLayer) and all(isinstance(layer, FlipoutLayer) for layer in others)


def test_the_names_that_an_error_gives_can_be_left_out():
    class Reads(FlattenExtractor):
        """Reads the weights of a layer that it never calls."""

        def __init__(self, observation_space):
            super().__init__(observation_space)
            self.layer = th.nn.Linear(self.features_dim, self.features_dim)

        def forward(self, observations):
            return th.nn.functional.linear(super().forward(observations), self.layer.weight)

    noise = dict(features_extractor_class=Reads)
    with pytest.raises(ValueError, match="learn, and were never called") as told:
        build(noise=noise).learn(40)
    skip = re.search(r"skip=(\[.*?\])", str(told.value)).group(1)
    build(noise=dict(noise, skip=ast.literal_eval(skip))).learn(40)


def test_one_observation_is_no_batch_of_member_values():
    model = build(noise=dict(members=3))
    with pytest.raises(ValueError, match=r"tensors of the shape \(N, 5\), got \(5,\); of one observation"):
        model.policy.member_values(th.zeros(5))
    assert model.policy.member_values(th.zeros(1, 5)).shape == (3, 1, 4)
    assert model.policy.member_values(np.zeros(5, np.float32)).shape == (3, 1, 4)
