"""Saving, loading and going on: the noise stream is as if training had never been interrupted."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from helpers import CASES, NoiseRecorder, ReplayProbe, vector_env
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_flipout.policies import FlipoutActorCriticPolicy, NoiseStateError


def build(algorithm=PPO, n_envs=3, **noise):
    arguments = dict(batch_size=8, n_epochs=1) if algorithm is PPO else {}
    noise.setdefault("schedule", "constant")  # noise to the last step, whatever calls of learn() there are
    return algorithm("FlipoutMlpPolicy", vector_env(n_envs=n_envs), n_steps=16, seed=1, policy_kwargs=noise, **arguments)


def learn(model, rollouts=2, **kwargs):
    recorder = NoiseRecorder()
    model.learn(rollouts * 16 * model.n_envs, callback=recorder, **kwargs)
    return recorder


@pytest.mark.parametrize(
    "noise", [{}, dict(resample="rollout", base_every_rollouts=3), dict(resample=5), dict(base_every_rollouts=None)]
)
@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_noise_stream_goes_on_as_if_uninterrupted(algorithm, noise, tmp_path):
    whole = learn(build(algorithm, **noise), 6)
    model = build(algorithm, **noise)
    first = learn(model, 3)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=vector_env())
    second = learn(loaded, 3, reset_num_timesteps=False)
    np.testing.assert_array_equal(whole.all_keys(), np.concatenate([first.all_keys(), second.all_keys()]))
    assert whole.base_keys == first.base_keys + second.base_keys
    for one, other in zip(
        loaded.policy.perturbed_network.layers, build(algorithm, **noise).policy.perturbed_network.layers, strict=True
    ):
        assert one.noise_index == other.noise_index


def test_base_perturbation_is_restored_at_once(tmp_path):
    model = build()
    learn(model)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model")
    for one, other in zip(loaded.policy.perturbed_network.layers, model.policy.perturbed_network.layers, strict=True):
        assert th.equal(one.bases()[1]["weight_base"], other.bases()[1]["weight_base"])


def test_scale_is_saved_and_used(tmp_path):
    model = build()
    model.policy.noise_scale = 0.25
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=vector_env())
    assert loaded.policy.noise_scale == 0.25
    assert (learn(loaded).scales[0] == 0.25).all()


@pytest.mark.parametrize("resample", ["step", "episode", "rollout", 4])
def test_another_number_of_environments_at_load(resample, tmp_path):
    model = build(resample=resample)
    learn(model)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=vector_env(n_envs=5))
    recorder = learn(loaded)
    assert recorder.keys[0].shape == (16, 5)
    assert loaded.policy._keys.step == 32 + 32
    # Environment i's keys do not depend on how many environments there are.
    same = PPO.load(tmp_path / "model", env=vector_env(n_envs=3))
    np.testing.assert_array_equal(learn(same, 1).keys[0][0], recorder.keys[0][0, :3])


@pytest.mark.parametrize("case", ["mlp-box", "dict", "image"])
def test_loads_in_a_fresh_process_that_never_imported_the_plugin(case, tmp_path):
    name, make_env, arguments = CASES[case]
    model = PPO(name, make_env(), n_steps=8, batch_size=8, seed=1, **arguments).learn(32)
    obs = model.env.reset()
    expected, _ = model.predict(obs, deterministic=True)
    model.save(tmp_path / "model")
    np.save(tmp_path / "expected.npy", expected)
    np.savez(tmp_path / "obs.npz", **(obs if isinstance(obs, dict) else {"only": obs}))
    code = f"""
import numpy as np, torch as th
from stable_baselines3 import PPO
model = PPO.load({str(tmp_path / "model")!r})
obs = dict(np.load({str(tmp_path / "obs.npz")!r}))
actions, _ = model.predict(obs.get("only", obs), deterministic=True)
assert type(model.policy).__module__ == "sb3_flipout.policies.on_policy"
np.testing.assert_array_equal(actions, np.load({str(tmp_path / "expected.npy")!r}))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_policy_alone_saves_and_loads(tmp_path):
    policy = build(sigma_init=0.3, resample="episode").policy
    policy.save(tmp_path / "policy.pth")
    loaded = FlipoutActorCriticPolicy.load(tmp_path / "policy.pth")
    assert loaded.noise_settings == policy.noise_settings
    obs = th.rand(4, 5)
    assert th.equal(loaded._predict(obs, True), policy._predict(obs, True))


def test_parameters_round_trip_between_models():
    one, other = build(), build()
    learn(one)
    for name, value in one.get_parameters()["policy"].items():
        assert isinstance(value, th.Tensor), name  # weights, and nothing of the noise
    before = other.policy.noise_state()
    other.set_parameters(one.get_parameters())
    assert other.policy.noise_state() == before
    for (name, own), (_, theirs) in zip(other.policy.state_dict().items(), one.policy.state_dict().items(), strict=True):
        assert th.equal(own, theirs), name
    other.policy.set_noise_state(one.policy.noise_state())
    assert other.policy._keys.step == 32 and other.policy.noise_state() == one.policy.noise_state()
    for own, theirs in zip(other.policy.perturbed_network.layers, one.policy.perturbed_network.layers, strict=True):
        assert th.equal(own.bases()[1]["weight_base"], theirs.bases()[1]["weight_base"])


def test_other_noise_settings_are_refused_and_nothing_is_half_changed(tmp_path):
    model = build(family="gaussian")
    learn(model)
    target = build(family="isotropic", sigma_init=0.1)
    before, state = {name: value.clone() for name, value in target.policy.named_parameters()}, target.policy.noise_state()
    with pytest.raises(NoiseStateError, match=r"family: saved 'gaussian', here 'isotropic'.* custom_objects="):
        target.policy.set_noise_state(model.policy.noise_state())
    for name, value in target.policy.named_parameters():
        assert th.equal(value, before[name])
    assert target.policy.noise_state() == state
    model.save(tmp_path / "model")
    for setting, saved, here in [
        ("family", "gaussian", "isotropic"),
        ("family", "gaussian", "dropconnect"),
        ("perturb", "policy", "heads"),
        ("perturb", "policy", "all"),
        ("skip", [], ("action_net",)),
    ]:
        with pytest.raises(NoiseStateError, match=re.escape(f"({setting}: saved {saved!r}, here {here!r})")):
            PPO.load(tmp_path / "model", custom_objects={"policy_kwargs": {setting: here}})


def test_settings_that_change_no_weight_may_change_at_load(tmp_path):
    model = build(resample="step")
    learn(model)
    model.save(tmp_path / "model")
    kwargs = dict(resample="rollout", base_every_rollouts=3, schedule="linear", family="multiplicative")
    loaded = PPO.load(tmp_path / "model", env=vector_env(), custom_objects={"policy_kwargs": kwargs})
    assert loaded.policy._keys.step == 32
    for name, value in model.policy.state_dict().items():
        assert th.equal(value, loaded.policy.state_dict()[name]), name
    keys = learn(loaded).keys
    assert all((of_rollout == of_rollout[0]).all() for of_rollout in keys) and (keys[0] != keys[1]).all()


def test_zip_of_a_stock_policy_is_refused(tmp_path):
    PPO("MlpPolicy", vector_env(), n_steps=8, batch_size=8).save(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"parameters of a policy without noise: it has no sigma.*exact_match=False"):
        PPO.load(tmp_path / "stock", custom_objects={"policy_class": FlipoutActorCriticPolicy})


def test_saved_zip_holds_the_buffer_class_that_stock_chooses():
    model = build()
    assert model.rollout_buffer_class is RolloutBuffer
    assert type(model.rollout_buffer).__name__ == "KeyedRolloutBuffer"


def test_two_models_in_one_process_have_their_own_noise():
    one, other = build(), PPO("FlipoutMlpPolicy", vector_env(), n_steps=16, batch_size=8, n_epochs=1, seed=2)
    assert np.intersect1d(learn(one).all_keys(), learn(other).all_keys()).size == 0


def test_two_models_without_seeds_explore_by_different_noise():
    one, other = (PPO("FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8) for _ in range(2))
    assert one.policy._noise_seed != other.policy._noise_seed
    assert not th.equal(one.policy.action_net.bases()[1]["weight_base"], other.policy.action_net.bases()[1]["weight_base"])


@pytest.mark.parametrize("sigma_init, resample", [(np.float64(0.1), np.int64(3)), (np.float32(0.5), "step")])
def test_settings_of_numpys_types_are_saved_and_loaded(sigma_init, resample, tmp_path):
    model = build(sigma_init=sigma_init, resample=resample)
    model.save(tmp_path / "model")
    settings = PPO.load(tmp_path / "model").policy.noise_settings
    assert settings.sigma_init == pytest.approx(float(sigma_init)) and settings.resample == resample


def test_rollout_broken_off_by_a_callback_ends_all_episodes():
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 5

    model = build(resample="episode")
    model.learn(48, callback=Stop())
    held = model.policy._keys._drawn.copy()
    assert (held == 5).all()


# ---- settings at load -------------------------------------------------------------------------------------------------

OFF = dict(learning_starts=4, batch_size=4, buffer_size=100, train_freq=2, seed=1)
NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)


def build_any(algorithm, **noise):
    if algorithm is PPO:
        return build(net_arch=[8], **{"learn_sigma": True, **noise})  # as it is for the others by default
    kwargs = dict(net_arch=[8], **noise)
    action, arguments = ("discrete", {**OFF, **NO_EPSILON}) if algorithm is DQN else ("box", OFF)
    return algorithm("FlipoutMlpPolicy", vector_env(action), policy_kwargs=kwargs, **arguments)


def load_with(model, path, **noise):
    model.save(path)
    env = vector_env("discrete" if isinstance(model, DQN) else "box")
    return type(model).load(path, env=env, custom_objects={"policy_kwargs": dict(net_arch=[8], **noise)})


MAY_CHANGE = [
    *((algorithm, {}, dict(learn_sigma=False)) for algorithm in (PPO, DQN, SAC)),
    *((algorithm, dict(learn_sigma=False), {}) for algorithm in (PPO, DQN, SAC)),
    *((algorithm, {}, dict(resample="episode", sigma_init=0.1)) for algorithm in (PPO, DQN, SAC)),
    *((algorithm, {}, dict(base_every_steps=3, target_noise="same", resample=4)) for algorithm in (DQN, SAC)),
    (PPO, {}, dict(base_every_rollouts=None)),
    (PPO, {}, dict(noise_sharing="independent")),
    (PPO, {}, dict(schedule="cosine", schedule_fraction=1.0)),
    (PPO, {}, dict(init="noisynet")),
    (DQN, dict(members=3, prior_scale=1.0), dict(members=3, prior_scale=0.5)),
    (DQN, dict(members=3), dict(members=3, target_noise="mean", resample="step")),
]


@pytest.mark.parametrize(("algorithm", "saved", "here"), MAY_CHANGE)
def test_settings_that_change_no_shape_may_change_at_load(algorithm, saved, here, tmp_path):
    model = build_any(algorithm, **saved).learn(48)
    loaded = load_with(model, tmp_path / "model", **{"schedule": "constant", "learn_sigma": True, **here})
    for name, value in here.items():
        assert getattr(loaded.policy.noise_settings, name) == value
    own = loaded.policy.state_dict()
    assert own.keys() == model.policy.state_dict().keys()
    assert all(th.equal(own[name], value) for name, value in model.policy.state_dict().items())
    assert loaded.policy._keys.step == model.policy._keys.step == 16
    before = {name: value.clone() for name, value in own.items()}
    loaded.learn(48, reset_num_timesteps=False)
    moved = [name for name, value in loaded.policy.state_dict().items() if not th.equal(value, before[name])]
    assert any(name.endswith("weight") for name in moved)
    assert any(name.endswith("_sigma") for name in moved) == loaded.policy.noise_settings.learn_sigma


REFUSED = [
    (PPO, {}, dict(perturb="heads"), "perturb: saved 'policy', here 'heads'"),
    (PPO, {}, dict(layers="linear"), "layers: saved 'all', here 'linear'"),
    (PPO, {}, dict(skip="action_net"), "skip: saved [], here ('action_net',)"),
    (PPO, {}, dict(perturb_frozen=True), "perturb_frozen: saved False, here True"),
    (PPO, {}, dict(family="isotropic"), "family: saved 'gaussian', here 'isotropic'"),
    (PPO, dict(family="dropconnect"), {}, "family: saved 'dropconnect', here 'gaussian'"),
    (SAC, {}, dict(perturb="all"), "perturb: saved 'policy', here 'all'"),
    (SAC, dict(members=3), {}, "members: saved 3, here None"),
    (DQN, {}, dict(members=3), "members: saved None, here 3"),
    (DQN, dict(members=3), dict(members=4), "members: saved 3, here 4"),
    (DQN, dict(members=3), dict(members=3, prior_scale=1.0), "prior_scale: saved 0.0, here 1.0"),
    (DQN, dict(members=3), dict(members=3, family="factorised"), "family: saved 'gaussian', here 'factorised'"),
    (DQN, dict(members=3), dict(members=3, noise_sharing="independent"), "noise_sharing: saved 'flipout', here 'independent'"),
]


@pytest.mark.parametrize(("algorithm", "saved", "here", "message"), REFUSED)
def test_settings_that_weights_depend_on_are_refused_by_name(algorithm, saved, here, message, tmp_path):
    model = build_any(algorithm, **saved)
    with pytest.raises(NoiseStateError, match=re.escape(f"({message})") + r".*custom_objects={\"policy_kwargs\": dict"):
        load_with(model, tmp_path / "model", **here)
    other = build_any(algorithm, **here)
    weights = {name: value.clone() for name, value in other.policy.state_dict().items()}
    bases, state = [layer.base_key for layer in other.policy.perturbed_network.layers], other.policy.noise_state()
    with pytest.raises(NoiseStateError, match=re.escape(message.replace("[]", "()"))):
        other.policy.set_noise_state(model.policy.noise_state())
    assert state == other.policy.noise_state() and bases == [layer.base_key for layer in other.policy.perturbed_network.layers]
    for name, value in other.policy.state_dict().items():
        assert th.allclose(weights[name], value, rtol=0, atol=0, equal_nan=True), name  # the prior's unit is not known yet
    load_with(model, tmp_path / "model", **saved)  # the remedy


NUMPY = [
    (PPO, dict(family=np.str_("factorised")), dict(family="factorised")),
    (PPO, dict(resample=np.str_("episode"), perturb=np.str_("heads")), dict(resample="episode", perturb="heads")),
    (PPO, dict(learn_sigma=np.bool_(False), init=np.str_("keep")), dict(learn_sigma=False, init="keep")),
    (PPO, dict(base_every_rollouts=np.int32(2), sigma_init=np.float64(0.25)), dict(base_every_rollouts=2, sigma_init=0.25)),
    (PPO, dict(skip=np.array(["action_net"]), layers=np.str_("linear")), dict(skip=("action_net",), layers="linear")),
    (PPO, dict(schedule=np.str_("linear"), schedule_fraction=np.float32(0.5)), dict(schedule="linear", schedule_fraction=0.5)),
    (DQN, dict(members=np.int64(3), prior_scale=np.float64(0.5)), dict(members=3, prior_scale=0.5)),
    (SAC, dict(target_noise=np.str_("same"), base_every_steps=np.int16(3)), dict(target_noise="same", base_every_steps=3)),
]


@pytest.mark.parametrize(("algorithm", "given", "plain"), NUMPY, ids=lambda value: str(value)[:50])
def test_settings_of_numpy_are_saved_as_plain_values(algorithm, given, plain, tmp_path):
    model = build_any(algorithm, **given)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    for policy in (model.policy, algorithm.load(tmp_path / "model").policy, type(model.policy).load(tmp_path / "policy")):
        saved = policy.noise_state()["settings"]
        for name, value in plain.items():
            assert saved[name] == value and type(saved[name]) is type(value), name
            assert name != "skip" or [type(item) for item in saved[name]] == [str]


# ---- rollout buffers made by hand --------------------------------------------------------------------------------------


def by_hand(model, n_steps, buffer_class=RolloutBuffer, **kwargs):
    spaces = (model.observation_space, model.action_space)
    return buffer_class(n_steps, *spaces, device=model.device, gae_lambda=0.95, gamma=0.99, n_envs=model.n_envs, **kwargs)


@pytest.mark.parametrize("loads", [False, True])
def test_a_rollout_buffer_made_by_hand_stores_the_noise(loads, tmp_path):
    model = build()
    if loads:
        model.save(tmp_path / "model")
        model = PPO.load(tmp_path / "model", env=vector_env())
    model.n_steps, model.rollout_buffer = 24, by_hand(model, 24)
    probe, recorder = ReplayProbe(8), NoiseRecorder()
    model.learn(144, callback=[probe, recorder])
    assert probe.rollouts == 2 and probe.worst_ratio < 1e-5 < 1e-3 < probe.least_effect
    assert recorder.keys[0].shape == (24, 3) and len(np.unique(recorder.all_keys())) == 144


def test_a_rollout_buffer_of_another_length_stores_the_noise():
    model = build()
    model.n_steps = model.rollout_buffer.buffer_size = 8
    probe = ReplayProbe(8)
    model.learn(48, callback=probe)
    assert probe.rollouts == 2 and probe.worst_ratio < 1e-5 < 1e-3 < probe.least_effect


def test_a_buffer_without_keys_says_what_it_needs():
    model = build()
    model.rollout_buffer = by_hand(model, 16, ReplayLike)
    model.n_steps = 16
    with pytest.raises(TypeError, match=r"cannot store noise keys: it must be a subclass of RolloutBuffer"):
        model.learn(48)
    fitting = build()
    obs = fitting.env.reset()
    with th.no_grad():
        actions, values, log_prob = fitting.policy(th.as_tensor(obs))
    step = (obs, actions.numpy(), np.zeros(3), np.ones(3), values)
    with pytest.raises(ValueError, match=r"carries no noise keys.*very log-probabilities that policy\(obs\) gave"):
        fitting.rollout_buffer.add(*step, log_prob.numpy().sum() + th.zeros(3))
    assert fitting.rollout_buffer.pos == 0 and not fitting.rollout_buffer.noise_keys.any()
    fitting.rollout_buffer.add(*step, log_prob)  # the remedy


class ReplayLike:
    """No rollout buffer, but it looks like one."""

    def __init__(self, buffer_size, *args, **kwargs):
        self.buffer_size = buffer_size
