"""Exact replay: before the first optimiser step, PPO's ratio is one, for every space and wrapper."""

import numpy as np
import pytest
import torch as th
from helpers import CASES, NoiseRecorder, ReplayProbe, vector_env
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

from sb3_flipout import perturbed
from sb3_flipout.layers import effective_weight
from sb3_flipout.noise import FAMILIES, noise_of

RATIO_TOLERANCE = 1e-5
SIZES = {
    PPO: dict(batch_size=8, n_epochs=2),
    TRPO: dict(batch_size=8, n_critic_updates=2, cg_max_steps=4),
    A2C: dict(learning_rate=1e-4),  # with its default of 7e-4 one action is certain after two rollouts of images
}


def learn(algorithm, case, probe, steps=None, **more):
    policy, make_env, arguments = CASES[case]
    n_steps = 16
    kwargs = dict(schedule="constant")  # noise in all rollouts, to the last
    for given in (arguments, more):
        kwargs |= given.get("policy_kwargs", {})
    arguments = {**arguments, **more, "policy_kwargs": kwargs}
    model = algorithm(policy, make_env(), n_steps=n_steps, seed=1, **arguments, **SIZES[algorithm])
    return model.learn(steps or 3 * n_steps * model.n_envs, callback=probe)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("algorithm", SIZES)
def test_ratio_is_one_before_the_first_optimiser_step(algorithm, case):
    probe = ReplayProbe(8 if algorithm is PPO else None)
    learn(algorithm, case, probe)
    assert probe.rollouts == 3
    assert probe.worst_ratio <= RATIO_TOLERANCE
    assert probe.worst_value <= 1e-5
    assert probe.least_effect > 1e-3, "the noise did nothing, so this test shows nothing"


@pytest.mark.parametrize("resample", ["step", "episode", "rollout", 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_of_every_family_and_cadence(family, resample):
    probe = ReplayProbe(8)
    learn(PPO, "mlp-discrete", probe, policy_kwargs=dict(family=family, resample=resample))
    assert probe.worst_ratio <= RATIO_TOLERANCE
    assert probe.least_effect > 1e-4


@pytest.mark.parametrize("sharing", ["shared", "independent"])
def test_replay_of_the_other_sharings(sharing):
    probe = ReplayProbe(8)
    learn(PPO, "mlp-box", probe, policy_kwargs=dict(noise_sharing=sharing, resample="rollout"))
    assert probe.worst_ratio <= RATIO_TOLERANCE
    assert probe.least_effect > 1e-3


@pytest.mark.parametrize(
    "noise", [*(dict(perturb=part) for part in ("policy", "heads", "all")), dict(layers="linear")], ids=str
)
def test_replay_of_every_choice_of_modules(noise):
    probe = ReplayProbe(8)
    learn(PPO, "image", probe, policy_kwargs=noise)
    assert probe.worst_ratio <= RATIO_TOLERANCE
    assert probe.least_effect > 1e-3


def test_base_kept_over_several_rollouts():
    recorder, probe = NoiseRecorder(), ReplayProbe(8)
    learn(PPO, "mlp-box", [recorder, probe], steps=6 * 48, policy_kwargs=dict(base_every_rollouts=3))
    assert len(set(recorder.base_keys[:3])) == 1 and len(set(recorder.base_keys[3:])) == 1
    assert recorder.base_keys[0] != recorder.base_keys[3]
    assert probe.worst_ratio <= RATIO_TOLERANCE


def test_noise_that_a_user_keeps_stays_that_of_its_rollout():
    """Keys that are held from one rollout to the next act under another base there; what was kept before is not touched."""
    kept = []

    class Keep(BaseCallback):
        def _on_step(self):
            kept.append((self.locals["log_probs"].row_noise, self.model.policy.perturbed_network.layers[0].base_key))
            return True

    learn(PPO, "mlp-box", Keep(), steps=4 * 48, policy_kwargs=dict(resample=10_000))
    assert len({base for _, base in kept}) == 4 and len({tuple(noise.keys.tolist()) for noise, _ in kept}) == 1
    assert all(noise.base == base for noise, base in kept)


def test_base_never_redrawn():
    recorder = NoiseRecorder()
    learn(PPO, "mlp-box", recorder, steps=6 * 48, policy_kwargs=dict(base_every_rollouts=None))
    assert len(recorder.base_keys) == 6 and len(set(recorder.base_keys)) == 1


def test_scale_changed_in_mid_rollout_is_replayed_with_the_rows():
    class ChangeScale(BaseCallback):
        def _on_step(self):
            self.model.policy.noise_scale = 0.1 * (1 + self.n_calls % 7)
            return True

    probe, recorder = ReplayProbe(8), NoiseRecorder()
    learn(PPO, "mlp-box", [ChangeScale(), probe, recorder])
    assert len(np.unique(recorder.scales[1])) == 7
    assert probe.worst_ratio <= RATIO_TOLERANCE


def test_the_action_of_each_environment_comes_from_its_own_weights():
    """The slow truth for one collection step: materialise each environment's weights and run the net by hand."""
    model = PPO("FlipoutMlpPolicy", vector_env(), n_steps=4, batch_size=4, seed=1)
    policy = model.policy
    policy.set_training_mode(False)
    policy.begin_rollout()
    obs = th.rand(3, 5)
    with th.no_grad(), policy.collecting(3):
        _, values, log_prob = policy(obs, deterministic=False)
    noise = noise_of(log_prob)
    assert noise.keys.unique().numel() == 3
    first, _, second, _ = policy.mlp_extractor.policy_net
    for row in range(3):
        x = obs[row : row + 1]
        for layer, activate in ((first, th.tanh), (second, th.tanh), (policy.action_net, lambda y: y)):
            weight, bias = effective_weight(layer, noise.keys[row])
            x = activate(x @ weight.T + bias)
        with perturbed(policy, noise):
            fast = policy.get_distribution(obs).distribution.mean[row]
        assert th.allclose(fast, x[0], atol=1e-6, rtol=0)
    # The value network is not part of what the action depends on, so its values are those of the mean weights.
    assert th.equal(values, policy.predict_values(obs))


def eval_callback(n_envs, deterministic):
    return EvalCallback(
        vector_env(n_envs=n_envs, seed=9), eval_freq=5, n_eval_episodes=3, deterministic=deterministic, verbose=0
    )


@pytest.mark.parametrize("n_envs, deterministic", [(1, True), (1, False), (5, False), (3, False)])
@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
def test_evaluation_in_mid_rollout_changes_nothing_in_the_training_noise(n_envs, deterministic):
    without, with_evaluation, probe = NoiseRecorder(), NoiseRecorder(), ReplayProbe(8)
    learn(PPO, "mlp-box", [without, ReplayProbe(8)])  # the probe in both, since it permutes batches by numpy's generator
    learn(PPO, "mlp-box", [eval_callback(n_envs, deterministic), with_evaluation, probe])
    np.testing.assert_array_equal(without.all_keys(), with_evaluation.all_keys())
    assert without.base_keys == with_evaluation.base_keys
    assert probe.worst_ratio <= RATIO_TOLERANCE
    if deterministic:  # then not even the actions change, since mean weights draw nothing
        np.testing.assert_array_equal(np.concatenate(without.actions), np.concatenate(with_evaluation.actions))


def test_noise_of_two_environments_is_uncorrelated():
    """Output perturbations of environments 0 and 1 over independent steps.

    With n products of two independent, unit-variance, zero-mean numbers, the correlation's standard error is 1/sqrt(n);
    5 standard errors are a false-fail rate below 6e-7.
    """
    model = PPO("FlipoutMlpPolicy", vector_env(), n_steps=4, batch_size=4, seed=1)
    policy, n = model.policy, 4000
    obs = th.full((3, 5), 0.3)
    rows = []
    for step in range(n):
        if step % 4 == 0:
            policy.begin_rollout()
        with th.no_grad(), policy.collecting(3):
            _, _, log_prob = policy(obs)
            with policy.perturbed_network.activate(noise_of(log_prob)):
                rows.append(policy.get_distribution(obs).distribution.mean[:, 0])
    outputs = th.stack(rows)
    correlation = th.corrcoef(outputs.T)
    assert correlation[0, 1].abs() <= 5 / n**0.5
    assert correlation[0, 2].abs() <= 5 / n**0.5
    assert outputs.std() > 0.05


def test_keys_of_environments_and_steps_are_all_different():
    recorder = NoiseRecorder()
    learn(PPO, "mlp-box", recorder)
    assert np.unique(recorder.all_keys()).size == recorder.all_keys().size
