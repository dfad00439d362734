"""sigma_unit="inputs": the noise of a layer does not depend on the scale of what it gets."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import QRDQN, TQC, TRPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout import FlipES
from sb3_flipout.layers import FlipoutLinear, flipout_layers

SMALL = dict(net_arch=[8, 8])
SCALES = (0.01, 1.0, 1000.0)


def scaled(env: str, scale: float) -> Any:
    def make() -> gym.Env[Any, Any]:
        plain = gym.make(env)
        space: Any = plain.observation_space
        wide = gym.spaces.Box(-np.inf, np.inf, space.shape)
        return gym.wrappers.TransformObservation(plain, lambda obs: (obs * scale).astype(np.float32), wide)

    return make_vec_env(make, 4, seed=3)


def build(algorithm: Any, scale: float = 1.0, **noise: Any) -> Any:
    env = "Pendulum-v1" if algorithm in (SAC, TD3, TQC) else "CartPole-v1"
    settings: dict[str, Any] = dict(seed=0, device="cpu", policy_kwargs={**SMALL, "sigma_unit": "inputs", **noise})
    if algorithm in (DQN, QRDQN):
        settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    if algorithm is FlipES:
        settings |= dict(population_size=4)
    if algorithm in (PPO, A2C, TRPO, RecurrentPPO):
        settings |= dict(n_steps=8) | ({} if algorithm is A2C else dict(batch_size=32))
    name = "FlipoutMlpLstmPolicy" if algorithm is RecurrentPPO else "FlipoutMlpPolicy"
    return algorithm(name, scaled(env, scale), **settings)


def sigmas(model: Any) -> list[th.Tensor]:
    return [layer.weight_sigma.detach().clone() for layer in linear(model)]


def linear(model: Any) -> list[Any]:
    net = model.policy.actor if hasattr(model.policy, "actor") else model.policy
    return [layer for layer in flipout_layers([net]) if isinstance(layer, FlipoutLinear)]


def test_sigma_is_the_deviation_that_the_noise_adds_to_an_output() -> None:
    """By hand, layer after layer: the mean network's inputs, and the variance of each output over whole weight matrices."""
    model = build(PPO, scale=50.0, sigma_init=0.7, learn_sigma=False)
    obs = th.as_tensor(model.env.reset())
    model._last_obs = obs.numpy()
    model.policy.meet_observations(model._last_obs)
    h = obs
    for number, layer in enumerate(linear(model)):
        # The base's variance is 1: an output's noise has the variance sum_i sigma_oi^2 x_i^2, here on average over rows.
        variance = (layer.weight_sigma.square() @ h.square().T).mean()
        assert float(variance.detach().sqrt()) == pytest.approx(0.7, rel=1e-5), number
        assert float(layer.bias_sigma[0]) == pytest.approx(0.7 / layer.in_features**0.5)
        h = th.nn.functional.linear(h, layer.weight, layer.bias).tanh().detach()


@pytest.mark.parametrize("algorithm", [PPO, SAC, DQN])
def test_the_scale_of_observations_does_not_count(algorithm: Any) -> None:
    noises = []
    for scale in SCALES:
        model = build(algorithm, scale)
        first = linear(model)[0]
        before = first.weight_sigma.detach().clone()
        obs = model.env.reset()
        model.policy.meet_observations(obs)
        noises.append(float((first.weight_sigma.detach() / before)[0, 0]) * float(np.sqrt(np.mean(obs**2))))
    assert noises == pytest.approx([1.0] * len(SCALES), rel=1e-5)


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO, DQN, QRDQN, SAC, TD3, TQC, FlipES])
def test_it_is_done_once_before_the_first_step_and_saved(algorithm: Any, tmp_path: Path) -> None:
    model = build(algorithm, 1000.0, learn_sigma=False)
    initial = sigmas(model)
    model.learn(40)
    after = sigmas(model)
    assert all(bool((a < b / 5).all()) for a, b in zip(after[:1], initial[:1], strict=True))
    assert not any(th.equal(a, b) for a, b in zip(after, initial, strict=True))
    model.save(tmp_path / "model")
    loaded = algorithm.load(
        tmp_path / "model", env=scaled("Pendulum-v1" if hasattr(model.policy, "actor") else "CartPole-v1", 1.0)
    )
    for one in (model, loaded):
        one.learn(40)
        assert all(th.equal(a, b) for a, b in zip(sigmas(one), after, strict=True))


@pytest.mark.parametrize("noise", [dict(), dict(perturb="all"), dict(perturb="all", members=3)], ids=str)
@pytest.mark.parametrize("algorithm", [DQN, QRDQN, SAC, TD3, TQC])
def test_targets_have_the_sigma_of_what_they_follow(algorithm: Any, noise: dict[str, Any]) -> None:
    policy = build(algorithm, 1000.0, **(noise if algorithm in (SAC, TD3, TQC) else {})).policy
    policy.meet_observations(scaled("Pendulum-v1" if hasattr(policy, "actor") else "CartPole-v1", 1000.0).reset())
    compared = 0
    for target, followed in policy.targets:
        mine, its = (flipout_layers([getattr(policy, name)]) for name in (target, followed))
        for layer, model in zip(mine, its, strict=True):
            assert th.equal(layer.weight_sigma, model.weight_sigma)
            compared += 1
    assert compared or (not noise and algorithm in (SAC, TQC))  # whose targets are critics


def test_the_default_changes_nothing() -> None:
    model = build(PPO, 100.0, sigma_unit="weights")
    initial = sigmas(model)
    model.learn(40)
    assert all(th.equal(a, b) for a, b in zip(sigmas(model), initial, strict=True))


def test_what_it_cannot_be_done_for_is_named() -> None:
    with pytest.warns(
        UserWarning, match=r'sigma_unit="inputs" has no effect on lstm_actor: .* neither linear layers nor conv'
    ):
        build(RecurrentPPO, lstm_hidden_size=8).learn(40)
    model = build(PPO, 0.0)
    initial = sigmas(model)
    with pytest.warns(UserWarning, match=r"has no effect on mlp_extractor\.policy_net\.0"):
        model.learn(40)
    assert th.equal(sigmas(model)[0], initial[0])


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (dict(sigma_unit="obs"), "sigma_unit must be one of"),
        (dict(family="multiplicative"), "sigma_unit=\"inputs\" does not fit family='multiplicative'"),
        (dict(family="dropconnect"), "sigma_unit=\"inputs\" does not fit family='dropconnect'"),
    ],
)
def test_bad_settings_are_refused(noise: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(PPO, **noise)
