"""SAC, TD3, DDPG, TQC and CrossQ: equal to stock without noise, saved and loaded, with what SB3 offers, and bad input."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sac_td3_cases import ALGORITHMS, DETERMINISTIC, STOCHASTIC, build, interrupted, layers_of, learn
from sb3_contrib import ARS, TQC, CrossQ
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from stable_baselines3.sac.policies import Actor
from torch import nn

from sb3_flipout import perturbed, policies
from sb3_flipout.layers import FlipoutConv2d, FlipoutLayer, FlipoutLinear, effective_weight
from sb3_flipout.noise import RowNoise, fold
from sb3_flipout.policies import NoiseStateError
from sb3_flipout.policies.learning import LearnsUnderNoise
from sb3_flipout.policies.sac_td3 import FlipoutSACPolicy
from sb3_flipout.registration import ALIASES

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)

# ---- sigma frozen at 0 is stock -------------------------------------------------------------------------------------

PLAIN = dict(sigma_init=0.0, learn_sigma=False)
IMAGE, DICT = dict(observation="image"), dict(observation="dict")


def normal():
    return NormalActionNoise(np.zeros(3), 0.3 * np.ones(3))


def ornstein_uhlenbeck():
    return OrnsteinUhlenbeckActionNoise(np.zeros(3), 0.3 * np.ones(3))


#: (algorithm, kind of policy, arguments, policy_kwargs of both, noise settings of ours)
STOCK = [
    *((algorithm, "Mlp", {}, {}, dict(perturb=perturb)) for algorithm in ALGORITHMS for perturb in ("policy", "all")),
    *((algorithm, "Mlp", {}, {}, dict(target_noise="same", family="factorised")) for algorithm in ALGORITHMS),
    *((algorithm, "Mlp", {}, {}, dict(target_noise="same", noise_sharing="independent", perturb="all"))
      for algorithm in (SAC, TD3)),
    *((algorithm, "Cnn", IMAGE, dict(share_features_extractor=share), dict(perturb=perturb))
      for algorithm in (SAC, TD3, TQC) for share in (False, True) for perturb in ("policy", "all")),
    *((algorithm, "MultiInput", DICT, {}, dict(perturb="all")) for algorithm in (SAC, TD3)),
    *((algorithm, "Mlp", dict(use_sde=True, sde_sample_freq=4), {}, dict(perturb="all")) for algorithm in STOCHASTIC),
    *((algorithm, "Mlp", dict(action_noise=noise), {}, dict(resample="episode", base_every_steps=3))
      for algorithm in DETERMINISTIC for noise in (normal, ornstein_uhlenbeck)),
]  # fmt: skip


@pytest.mark.parametrize(("algorithm", "kind", "arguments", "policy_kwargs", "noise"), STOCK)
def test_sigma_frozen_at_zero_is_stock_bit_for_bit(algorithm, kind, arguments, policy_kwargs, noise):
    models = []
    for prefix, settings in (("", {}), ("Flipout", PLAIN | noise)):
        made = {name: value() if callable(value) else value for name, value in arguments.items()}
        model = build(algorithm, policy=f"{prefix}{kind}Policy", noise=policy_kwargs | settings, **made)
        models.append(model.learn(24))
    stock, ours = models
    assert stock._n_updates == ours._n_updates >= 4
    own = ours.policy.state_dict()
    for name, value in stock.policy.state_dict().items():
        assert th.equal(value, own[name]), name
    obs = stock.env.reset()
    for deterministic in (True, False):
        actions = []
        for model in models:
            th.manual_seed(0)
            actions.append(model.predict(obs, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*actions)


@pytest.mark.parametrize(("members", "expected"), [(None, "mean"), (4, "same")])
@every_algorithm
def test_noise_is_that_of_the_behaviour_by_default(algorithm, members, expected):
    settings = build(algorithm, noise=dict(members=members)).policy.noise_settings
    assert (settings.target_noise, settings.resample) == (expected, "episode")


# ---- save, load, export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "noise"),
    # Keys that are held for an episode are drawn anew, as the environments are reset.
    [(algorithm, dict(resample="step")) for algorithm in ALGORITHMS]
    + [(algorithm, dict(resample="step", perturb="all", base_every_steps=5)) for algorithm in (SAC, TD3)],
)
def test_noise_goes_on_after_save_and_load_as_if_uninterrupted(algorithm, noise, tmp_path):
    whole = learn(build(algorithm, noise=noise), 64)
    first, second, _ = interrupted(build(algorithm, noise=noise), tmp_path)
    assert first.acting and second.acting
    assert [keys.tolist() for keys in whole.acting] == [keys.tolist() for keys in first.acting + second.acting]
    assert whole.acting_bases == first.acting_bases + second.acting_bases
    assert all(one.same(other) for one, other in zip(whole.learning, first.learning + second.learning, strict=True))


@every_algorithm
def test_at_the_defaults_learning_goes_on_and_episodes_begin_anew(algorithm, tmp_path):
    whole = learn(build(algorithm), 64)
    first, second, loaded = interrupted(build(algorithm), tmp_path)
    assert second.acting[0].tolist() == [fold(loaded.policy._keys.seed, 16, env) for env in range(2)]
    assert all(one.same(other) for one, other in zip(whole.learning, first.learning + second.learning, strict=True))


@pytest.mark.parametrize(
    "noise", [dict(base_every_steps=5), dict(noise_sharing="shared", family="factorised", resample="step")]
)
def test_a_loaded_model_samples_under_the_base_that_acted(noise, tmp_path):
    model = build(TD3, noise=noise)
    model.learn(36)
    model.save(tmp_path / "model")
    loaded = TD3.load(tmp_path / "model")
    base = [layer.bases()[1]["weight_base"] for layer in model.actor.perturbed_network.layers]
    assert all(
        th.equal(ours, layer.bases()[1]["weight_base"])
        for ours, layer in zip(base, loaded.actor.perturbed_network.layers, strict=True)
    )
    obs = np.ones((3, 5), np.float32)
    np.testing.assert_array_equal(*(one.predict(obs, deterministic=False)[0] for one in (model, loaded)))


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_other_settings_are_refused_by_load_and_custom_objects_are_the_remedy(algorithm, tmp_path):
    model = build(algorithm, noise=dict(family="factorised"))
    model.save(tmp_path / "model")
    arguments = {**model.policy_kwargs, "family": "isotropic"}
    with pytest.raises(NoiseStateError, match=r"family: saved 'factorised', here 'isotropic'.*custom_objects="):
        algorithm.load(tmp_path / "model", custom_objects={"policy_kwargs": arguments})
    algorithm.load(tmp_path / "model", custom_objects={"policy_kwargs": {**arguments, "family": "factorised"}})


@pytest.mark.parametrize(("algorithm", "name"), [(SAC, "prior_scale"), (TD3, "noise_scale"), (SAC, "noise_ladder")])
def test_settings_that_belong_elsewhere(algorithm, name):
    with pytest.raises(TypeError, match=f"'{name}': 0.5.* is no setting of this policy: {name} is "):
        build(algorithm, noise={name: 0.5})


@every_algorithm
def test_parameters_carry_the_noise_to_another_model(algorithm):
    one, other = build(algorithm), build(algorithm, seed=2)
    one.learn(24)
    obs = one.env.reset()
    one.predict(obs, deterministic=False)
    other.set_parameters(one.get_parameters())
    assert other.policy._keys.step == other.policy.learning.step == 0  # weights bring no noise
    other.policy.set_noise_state(one.policy.noise_state())
    assert other.policy._keys.step == 12 and other.policy.learning.step == one.policy.learning.step > 0
    for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        assert th.equal(a, b)
    assert th.equal(
        one.actor.perturbed_network.layers[0].bases()[1]["weight_base"],
        other.actor.perturbed_network.layers[0].bases()[1]["weight_base"],
    )
    for deterministic in (True, False):
        actions = []
        for model in (one, other):
            th.manual_seed(0)
            actions.append(model.predict(obs, deterministic=deterministic)[0])
        np.testing.assert_array_equal(*actions)


CASES = [(algorithm, "Mlp", {}) for algorithm in ALGORITHMS] + [(SAC, "Cnn", IMAGE), (TD3, "MultiInput", DICT)]


@pytest.mark.parametrize(("algorithm", "kind", "arguments"), CASES)
def test_plain_policy_predicts_as_the_mean_weights(algorithm, kind, arguments):
    model = build(algorithm, policy=f"Flipout{kind}Policy", **arguments).learn(20)
    plain = model.policy.to_plain_policy()
    assert type(plain) is algorithm.policy_aliases[f"{kind}Policy"]
    assert not any(isinstance(module, FlipoutLayer) for module in plain.modules())
    obs = model.env.reset()
    np.testing.assert_array_equal(plain.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize(("algorithm", "kind", "arguments"), CASES)
def test_policy_alone_is_saved_and_loaded(algorithm, kind, arguments, tmp_path):
    noise = dict(sigma_init=0.3, resample="episode", target_noise="mean", perturb="all")
    model = build(algorithm, policy=f"Flipout{kind}Policy", noise=noise, **arguments).learn(20)
    model.policy.save(tmp_path / "policy.pth")
    loaded = type(model.policy).load(tmp_path / "policy.pth")
    assert loaded.noise_settings == model.policy.noise_settings
    obs = model.env.reset()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])


# ---- which layers ---------------------------------------------------------------------------------------------------


def plain_or_perturbed(net):
    return [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


@pytest.mark.parametrize("perturb", ["heads", "linear", "policy", "all"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_layers_by_perturb_and_kind(algorithm, perturb):
    case = {} if algorithm is CrossQ else dict(observation="image", policy="FlipoutCnnPolicy")
    noise = dict(layers="linear") if perturb == "linear" else dict(perturb=perturb)
    policy = build(algorithm, noise=noise, **case).policy
    wanted = {
        "heads": lambda layer: layer.weight.shape[0] == 3,  # the number of actions
        "linear": lambda layer: isinstance(layer, FlipoutLinear | nn.Linear),
    }.get(perturb, lambda layer: isinstance(layer, FlipoutLinear | FlipoutConv2d))
    for name in ("actor", "actor_target"):
        if hasattr(policy, name):
            layers = plain_or_perturbed(getattr(policy, name))
            assert layers_of(getattr(policy, name)) == [layer for layer in layers if wanted(layer)]
    heads = 2 if algorithm in STOCHASTIC else 1
    if perturb == "heads":
        assert len(layers_of(policy.actor)) == heads  # mean and standard deviation
    for name in ("critic", "critic_target"):
        if hasattr(policy, name):
            layers = plain_or_perturbed(getattr(policy, name))
            assert layers_of(getattr(policy, name)) == (layers if perturb == "all" else [])


@pytest.mark.parametrize("algorithm", STOCHASTIC)
@pytest.mark.parametrize("perturb", ["heads", "policy"])
def test_gsde(algorithm, perturb):
    model = build(algorithm, use_sde=True, noise=dict(perturb=perturb))
    recorder = learn(model)
    assert isinstance(model.actor.log_std, nn.Parameter)
    assert len(layers_of(model.actor)) == {"heads": 1, "policy": 3}[perturb]
    assert recorder.acting and recorder.learning
    in_optimizer = [id(parameter) for group in model.actor.optimizer.param_groups for parameter in group["params"]]
    assert in_optimizer.count(id(model.actor.log_std)) == 1


# ---- what SB3 offers ------------------------------------------------------------------------------------------------


def test_hindsight_experience_replay():
    env = BitFlippingEnv(n_bits=4, continuous=True)
    kwargs = dict(replay_buffer_class=HerReplayBuffer, learning_starts=10, buffer_size=100)
    model = build(SAC, env=env, policy="FlipoutMultiInputPolicy", noise=dict(resample="episode"), **kwargs)
    recorder = learn(model, 40)
    changes = [not th.equal(a, b) for a, b in zip(recorder.acting[:-1], recorder.acting[1:], strict=True)]
    assert changes == [bool(done[0]) for done in recorder.dones[10:-1]] and any(changes)
    assert model.policy.learning.step == model._n_updates > 0


@pytest.mark.parametrize(
    ("n_envs", "kwargs"),
    [
        (2, dict(n_steps=3)),
        (2, dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False))),
        (1, dict(train_freq=(1, "episode"))),
        (4, dict(train_freq=1, gradient_steps=-1)),
        (1, dict(policy="normalize")),
    ],
    ids=["n-step", "memory", "episodes", "many-environments", "vec-normalize"],
)
@pytest.mark.parametrize("algorithm", [SAC, TD3, CrossQ])
def test_options_of_sb3(algorithm, n_envs, kwargs):
    kwargs = dict(kwargs)
    env = VecNormalize(vector_env()) if kwargs.pop("policy", None) else vector_env("box", n_envs)
    model = build(algorithm, env=env, **kwargs)
    recorder = learn(model, 80)
    assert model.policy.learning.step == model._n_updates > 4
    if kwargs.get("gradient_steps") == -1:
        assert model._n_updates == 80 - 8  # one for each transition after the warm-up
    keys = th.cat([seen.keys for seen in recorder.learning if seen.net == "actor" and seen.grad])
    assert keys.unique().numel() == keys.numel() > 0
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


# ---- adaptive parameter noise (Plappert et al. 2018) ----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [DDPG, DQN])
def test_setting_of_plappert(algorithm):
    noise = dict(family="isotropic", resample="episode", sigma_init=0.2)
    if algorithm is DQN:
        arguments = dict(learning_starts=0, batch_size=8, buffer_size=200, train_freq=2, seed=1)
        epsilon = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
        model = DQN("FlipoutMlpPolicy", vector_env("discrete", 2), policy_kwargs=noise, **arguments, **epsilon)
    else:
        model = build(DDPG, noise=noise, learning_starts=0)
    layers = layers_of(model.policy._acting_network())
    before = [layer.weight_sigma.clone() for layer in layers]
    held = []
    original = model.policy._predict

    def record(observation, deterministic=False):
        held.append(model.policy._acting_noise.keys.clone())
        return original(observation, deterministic)

    model.policy._predict = record
    dones = learn_dones(model, 100)
    changed = (th.stack(held)[1:] != th.stack(held)[:-1]).numpy()
    np.testing.assert_array_equal(changed, dones[:-1])
    assert dones.any(axis=0).all()
    for layer, sigma in zip(layers, before, strict=True):
        assert layer.weight_sigma.shape == () and layer.bias_sigma is None  # one number for the layer
        assert not layer.weight_sigma.requires_grad and th.equal(layer.weight_sigma, sigma)
        one, half = (effective_weight(layer, 7, scale) for scale in (1.0, 0.5))
        for full, part, mean in zip(one, half, (layer.weight, layer.bias), strict=True):
            assert th.allclose(part - mean, 0.5 * (full - mean), atol=1e-6) and not th.allclose(full, mean)


def learn_dones(model, steps):
    dones = []
    model.learn(steps, callback=lambda local, _: dones.append(local["dones"].copy()) or True)
    return np.stack(dones)


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_ars_says_why_it_has_none():
    with pytest.raises(ValueError, match=r'ARS has no flipout policy: it is parameter noise itself.*ARS\("MlpPolicy", env\)'):
        ARS("FlipoutMlpPolicy", vector_env())


@pytest.mark.parametrize("observation", ["image", "dict"])
def test_crossq_takes_vectors_only(observation):
    with pytest.raises(ValueError, match=r"CrossQ has no policy for the observation space .*Use SAC or TQC"):
        build(CrossQ, observation=observation)


@pytest.mark.parametrize("algorithm", [SAC, TD3, TQC])
def test_dict_observations_need_the_policy_for_them(algorithm):
    with pytest.raises(ValueError, match='a Dict, which needs "FlipoutMultiInputPolicy"'):
        build(algorithm, observation="dict")


@pytest.mark.parametrize(
    ("noise", "error", "message"),
    [
        (dict(sigma=0.1), TypeError, r"{'sigma': 0.1} is no argument of this policy. Did you mean 'sigma_init'?"),
        (dict(nonsense=0.1), TypeError, "unexpected keyword argument 'nonsense'"),
        (dict(prior_scale=1.0), TypeError, "is no setting of this policy: prior_scale is for DQN"),
        (
            dict(perturb="critic"),
            ValueError,
            'perturb must be one of "policy", "heads", "all", got \'critic\'.',
        ),
        (dict(target_noise="none"), ValueError, 'target_noise must be one of "independent", "same", "mean", got \'none\'.'),
        (dict(members=1), ValueError, "members must be an integer >= 2, got 1. Use None for no ensemble."),
        (dict(members=5, base_every_steps=3), ValueError, "members=5 does not fit base_every_steps=3"),
        (dict(members=5, noise_sharing="shared"), ValueError, 'members=5 does not fit noise_sharing="shared"'),
        (
            dict(resample="never"),
            ValueError,
            'resample must be one of "step", "episode", "rollout", got \'never\'. A whole number >= 1',
        ),
    ],
)
@every_algorithm
def test_bad_settings(algorithm, noise, error, message):
    with pytest.raises(error, match=re.escape(message)):
        build(algorithm, noise=noise)


def test_networks_of_ones_own_learn_under_noise_and_keep_their_methods():
    passes = []

    class OwnActor(Actor):
        def get_action_dist_params(self, obs):
            mean, log_std, kwargs = super().get_action_dist_params(obs)
            passes.append(self.perturbed_network.active)
            return mean / 2, log_std, kwargs

    class OwnPolicy(FlipoutSACPolicy):
        def make_actor(self, features_extractor=None):
            actor = super().make_actor(features_extractor)
            actor.__class__ = OwnActor
            return actor

    model = build(SAC, policy=OwnPolicy, learning_starts=0, noise=dict(target_noise="independent"))
    assert isinstance(model.actor, OwnActor) and isinstance(model.actor, LearnsUnderNoise)
    passes.clear()
    recorder = learn(model)
    learned = [seen.keys for seen in recorder.of("actor")]
    assert len(learned) >= 20 and len(passes) == len(learned) + len(recorder.acting)
    assert all(isinstance(noise, RowNoise) for noise in passes)
    expected = {tuple(keys.tolist()) for keys in [*learned, *recorder.acting]}
    assert {tuple(noise.keys.tolist()) for noise in passes} == expected
    obs = th.rand(4, 5)
    with th.no_grad(), perturbed(model.policy, None):
        mean = model.actor.mu(model.actor.latent_pi(obs))
        assert th.equal(model.policy._predict(obs, deterministic=True), th.tanh(mean / 2))


WITHOUT_CONTRIB = """
import sys

class Without:
    '''A finder of modules that finds no sb3_contrib.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *args):
        return None if name.split(".")[0] == "sb3_contrib" else self.finder.find_spec(name, *args)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
torch.set_num_threads(1)
import sb3_flipout
from stable_baselines3 import DDPG, DQN, PPO, SAC, TD3
for algorithm in (PPO, SAC, TD3, DDPG):
    kwargs = dict(n_steps=8, batch_size=8) if algorithm is PPO else dict(learning_starts=4, batch_size=4)
    algorithm("FlipoutMlpPolicy", "Pendulum-v1", policy_kwargs=dict(net_arch=[8]), **kwargs).learn(16)
DQN("FlipoutMlpPolicy", "CartPole-v1", buffer_size=100)
assert "sb3_contrib" not in sys.modules
import sb3_flipout.policies
try:
    sb3_flipout.policies.FlipoutTQCPolicy
except ImportError as error:
    assert "FlipoutTQCPolicy needs sb3-contrib" in str(error) and "sb3_flipout[contrib]" in str(error), error
else:
    raise AssertionError("sb3_contrib was found")
assert not hasattr(sb3_flipout.policies, "FlipoutNothing")
"""


def test_all_but_contrib_works_without_it():
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", WITHOUT_CONTRIB], check=True, timeout=120)


def test_policies_for_contrib_are_found_by_name():
    of_contrib = [names for algorithm, names in ALIASES.items() if algorithm.__module__.startswith("sb3_contrib")]
    classes = {policy for names in of_contrib for policy in names.values()} - set(ALIASES[PPO].values())
    assert FlipoutSACPolicy not in classes and TQC.policy_aliases["FlipoutMlpPolicy"] in classes
    for policy in classes:
        assert getattr(policies, policy.__name__) is policy
