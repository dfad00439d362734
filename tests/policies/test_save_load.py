"""Saving, loading and going on: the noise stream is as if training had never been interrupted."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from helpers import CASES, NoiseRecorder, vector_env
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from sb3_flipout.policies import FlipoutActorCriticPolicy, NoiseStateError


def build(algorithm=PPO, n_envs=3, **noise):
    arguments = dict(batch_size=8, n_epochs=1) if algorithm is PPO else {}
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
