"""What ``predict`` and explicit keys do outside collection."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch as th
from helpers import NoiseRecorder, vector_env
from stable_baselines3 import PPO
from torch import nn
from torch.distributions import Distribution

from sb3_flipout import perturbed
from sb3_flipout.noise import NoiseOwner, RowNoise, noise_of, with_noise


@pytest.fixture
def model():
    noise = dict(schedule="constant", learn_sigma=True)
    return PPO("FlipoutMlpPolicy", vector_env(), n_steps=16, batch_size=8, n_epochs=1, seed=1, policy_kwargs=noise).learn(48)


OBS = np.full((6, 5), 0.3, dtype=np.float32)


def means(policy, noise):
    with th.no_grad(), perturbed(policy, noise):
        return policy.get_distribution(th.as_tensor(OBS)).distribution.mean


def test_deterministic_prediction_is_the_mean_weights_and_advances_nothing(model):
    before = model.policy.noise_state()
    first, second = (model.predict(OBS, deterministic=True)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, means(model.policy, None).clamp(-1, 1).numpy(), rtol=0, atol=1e-7)
    assert model.policy.noise_state() == before


def test_stochastic_prediction_draws_a_fresh_key_per_row_from_its_own_stream(model):
    policy = model.policy
    seen = []
    original = policy.get_distribution

    def record(obs):
        seen.append(policy.perturbed_network.active.keys)
        return original(obs)

    policy.get_distribution = record
    steps = policy._keys.step
    model.predict(OBS, deterministic=False)
    model.predict(OBS, deterministic=False)
    assert th.cat(seen).unique().numel() == 12
    assert policy._keys.step == steps
    assert policy.noise_state()["evaluations"] == 2


def test_stochastic_prediction_follows_the_noise_scale(model):
    model.policy.noise_scale = 0.0
    th.manual_seed(0)
    off, _ = model.predict(OBS, deterministic=False)
    th.manual_seed(0)
    with perturbed(model.policy, None):
        mean, _ = model.predict(OBS, deterministic=False)
    np.testing.assert_array_equal(off, mean)
    model.policy.noise_scale = 1.0
    th.manual_seed(0)
    on, _ = model.predict(OBS, deterministic=False)
    assert np.abs(on - off).max() > 1e-3


def test_explicit_keys_are_used_and_attached(model):
    keys = th.arange(6)
    steps = model.policy._keys.step
    with th.no_grad(), perturbed(model.policy, keys, 0.5):
        _, _, log_prob = model.policy(th.as_tensor(OBS))
    assert th.equal(noise_of(log_prob).keys, keys)
    assert th.equal(noise_of(log_prob).scale, th.full((6,), 0.5))
    assert model.policy._keys.step == steps
    rows = means(model.policy, keys)
    assert (rows[0] - rows[1]).abs().max() > 1e-3
    assert th.allclose(rows[3:4], means_of_row(model.policy, keys[3:4]), rtol=0, atol=1e-6)


def means_of_row(policy, keys):
    with th.no_grad(), perturbed(policy, keys):
        return policy.get_distribution(th.as_tensor(OBS[: len(keys)])).distribution.mean


def test_forward_deterministic_as_the_export_recipes_call_it(model):
    before = model.policy.noise_state()
    with th.no_grad():
        actions, _, _ = model.policy(th.as_tensor(OBS), deterministic=True)
    assert th.equal(actions, means(model.policy, None))
    assert model.policy.noise_state() == before


def test_missing_keys_in_training_mode_raise_and_behaviour_cloning_by_name_works(model):
    policy = model.policy
    policy.set_training_mode(True)
    obs, actions = th.as_tensor(OBS), th.zeros(6, 3)
    evaluate = partial(policy.evaluate_actions, actions=actions)
    for look in (evaluate, policy.predict_values, policy.get_distribution):
        with (
            policy.updating(),
            pytest.raises(ValueError, match=r"noise keys, .*: it never had any.*`with sb3_flipout\.perturbed\(policy, None\)"),
        ):
            look(obs)
        lost = "it had keys and lost them in the operation 'flip'"
        flipped = with_noise(obs, RowNoise(th.arange(6), owner=policy.noise_owner)).flip(0)
        with policy.updating(), pytest.raises(ValueError, match=f"noise keys, .*: {lost}.* with_noise"):
            look(flipped)
        foreign = with_noise(obs, RowNoise(th.arange(6), owner=NoiseOwner()))
        with policy.updating(), pytest.raises(ValueError, match=r"noise keys, .*: its keys were drawn by another policy"):
            look(foreign)
    # Outside an update, looking at a fresh or loaded policy gives what the mean weights give.
    with th.no_grad(), perturbed(policy, None):
        expected = [evaluate(obs)[1], policy.predict_values(obs), policy.get_distribution(obs).distribution.mean]
    with th.no_grad():
        found = [evaluate(obs)[1], policy.predict_values(obs), policy.get_distribution(obs).distribution.mean]
    assert all(th.equal(one, other) for one, other in zip(found, expected, strict=True))
    policy.optimizer.zero_grad()
    with perturbed(policy, None):
        _, log_prob, _ = policy.evaluate_actions(obs, actions)
    (-log_prob.mean()).backward()
    assert policy.action_net.weight.grad.abs().sum() > 0
    assert policy.action_net.weight_sigma.grad is None or policy.action_net.weight_sigma.grad.abs().sum() == 0


def test_wrong_keys_leave_the_policy_as_it_was(model):
    policy = model.policy
    for keys in (th.rand(6), th.zeros(6, dtype=th.int32), [1, 2, 3]):
        with pytest.raises(TypeError, match="keys must be an int64 tensor"):
            perturbed(policy, keys)
    with pytest.raises(ValueError, match=r"shape \(N,\)"):
        perturbed(policy, th.zeros(2, 3, dtype=th.int64))
    with pytest.raises(ValueError, match="device"):
        perturbed(policy, th.zeros(3, dtype=th.int64, device="meta"))
    with pytest.raises(ValueError, match="keys for 4 rows"), perturbed(policy, th.arange(4)):
        policy.get_distribution(th.as_tensor(OBS))
    assert policy.perturbed_network.active is None
    assert all(layer.row_view() is None for layer in policy.perturbed_network.layers)


@pytest.mark.parametrize("scale, error", [(-0.1, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
                                          ("1", TypeError), (True, TypeError)])  # fmt: skip
def test_bad_noise_scale_changes_nothing(model, scale, error):
    with pytest.raises(error, match="noise_scale"):
        model.policy.noise_scale = scale
    assert model.policy.noise_scale == 1.0


def test_policy_copies_and_pickles():
    policy = PPO("FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, seed=1).policy
    keys = th.arange(6)
    expected = means(policy, keys)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert th.equal(means(other, keys), expected)
        other.action_net.weight.data.zero_()
        assert th.equal(means(policy, keys), expected), "the copy must not share layers with the original"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_policy_trains_with_the_same_noise(backend):
    def run(compiled):
        noise = dict(schedule="constant")
        model = PPO("FlipoutMlpPolicy", vector_env(), n_steps=16, batch_size=8, n_epochs=1, seed=1, policy_kwargs=noise)
        if compiled:
            model.policy = th.compile(model.policy, backend=backend)
        recorder = NoiseRecorder()
        model.learn(96, callback=recorder)
        return recorder

    plain, compiled = run(False), run(True)
    np.testing.assert_array_equal(plain.all_keys(), compiled.all_keys())
    np.testing.assert_allclose(np.concatenate(plain.actions), np.concatenate(compiled.actions), rtol=0, atol=1e-4)


def test_exported_module_is_the_mean_policy(model, monkeypatch):
    monkeypatch.setattr(Distribution, "_validate_args", False)  # torch.export can't look at values, as SB3's Normal does

    class Exported(nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, observation):
            return self.policy._predict(observation, deterministic=True)

    plain = model.policy.to_plain_policy()
    plain.set_training_mode(False)
    exported = th.export.export(Exported(plain).eval(), (th.as_tensor(OBS),)).module()
    assert th.allclose(exported(th.as_tensor(OBS)), means(model.policy, None))


def test_forward_outside_collection_leaves_the_training_noise_alone(model):
    before = model.policy._keys.step
    with th.no_grad():
        model.policy(th.as_tensor(OBS))
    assert model.policy._keys.step == before


def test_a_context_can_be_entered_again(model):
    context = perturbed(model.policy, th.arange(6))
    with context, context:
        pass
    assert model.policy.perturbed_network.active is None
    assert all(layer.row_view() is None for layer in model.policy.perturbed_network.layers)
