"""Seeds: the same seed gives the same noise, another one other noise, and none goes on where it was."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout.noise import Scales

ON = dict(n_steps=8, batch_size=16, n_epochs=1)
OFF = dict(learning_starts=4, batch_size=4, buffer_size=100, train_freq=2)
ALGORITHMS = {
    PPO: ("CartPole-v1", ON),
    DQN: ("CartPole-v1", dict(exploration_initial_eps=0.0, exploration_final_eps=0.0, **OFF)),
    SAC: ("Pendulum-v1", OFF),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def env_of(algorithm: Any, seed: int = 0, n_envs: int = 2) -> Any:
    return make_vec_env(ALGORITHMS[algorithm][0], n_envs=n_envs, seed=seed)


def build(algorithm: Any, seed: int | None = 0, n_envs: int = 2, **noise: Any) -> Any:
    kwargs = dict(schedule="constant", net_arch=[8], resample="step", **noise)
    env = env_of(algorithm, 0, n_envs)
    return algorithm("FlipoutMlpPolicy", env, seed=seed, policy_kwargs=kwargs, **ALGORITHMS[algorithm][1])


def learn(model: Any, steps: int = 32) -> Any:
    return model.learn(steps, reset_num_timesteps=False)


def noise_ahead(model: Any, n: int = 8) -> dict[str, Any]:
    """The noise that it will act, learn and evaluate under next."""
    policy = model.policy
    acting, evaluation = copy.deepcopy(policy._keys), copy.deepcopy(policy._evaluation)
    found = {
        "acting": [acting.next(model.n_envs, Scales(1.0), model.device).keys.tolist() for _ in range(n)],
        "evaluation": [evaluation.next(4, 1.0, model.device).keys.tolist() for _ in range(2)],
        "base": [policy._base_key(draw) for draw in range(2)],
    }
    if hasattr(policy, "learning"):
        found["learning"] = [policy.learning.rows(role, 4, model.device) for role in (0, 1)]
        found["learning"] = [None if noise is None else noise.keys.tolist() for noise in found["learning"]]
        found["learning bases"] = [policy.learning.base_key(role) for role in (0, 1)]
    return found


def all_differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """No stream, and no key of one, is in the other."""
    lists = [np.ravel([keys for keys in found if keys is not None]) for a in one for found in (one[a], other[a])]
    return all(np.intersect1d(a, b).size == 0 for a, b in zip(lists[::2], lists[1::2], strict=True))


@every_algorithm
@pytest.mark.parametrize("way", ["constructor", "load", "set_random_seed", "reseed_noise"])
def test_the_same_seed_gives_the_same_noise_and_another_one_other_noise(algorithm: Any, way: str, tmp_path: Any) -> None:
    learn(build(algorithm, 0)).save(tmp_path / "model")

    def seeded(seed: int) -> Any:
        if way == "constructor":
            return build(algorithm, seed)
        if way == "load":
            return algorithm.load(tmp_path / "model", env=env_of(algorithm, seed), seed=seed)
        model = algorithm.load(tmp_path / "model", env=env_of(algorithm, seed))
        model.set_random_seed(seed) if way == "set_random_seed" else model.policy.reseed_noise(seed)
        return model

    one, same, other = seeded(7), seeded(7), seeded(8)
    assert noise_ahead(one) == noise_ahead(same)
    assert all_differ(noise_ahead(one), noise_ahead(other))
    if way != "constructor":
        unseeded = algorithm.load(tmp_path / "model", env=env_of(algorithm))
        assert all_differ(noise_ahead(one), noise_ahead(unseeded))
        assert one.policy._keys.step == unseeded.policy._keys.step == 16  # counters go on
        for name, value in unseeded.policy.state_dict().items():
            assert th.equal(value, one.policy.state_dict()[name]), name
    for model in (one, other):
        learn(model)
    assert all_differ(noise_ahead(one), noise_ahead(other))


@every_algorithm
@pytest.mark.parametrize("noise", [{}, "redraws"], ids=["default", "redraws"])
def test_without_a_seed_training_goes_on_as_if_uninterrupted(algorithm: Any, noise: Any, tmp_path: Any) -> None:
    noise = {} if not noise else dict(base_every_rollouts=2) if algorithm is PPO else dict(base_every_steps=5)
    whole = learn(learn(build(algorithm, **noise)))
    model = learn(build(algorithm, **noise))
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=env_of(algorithm))
    assert noise_ahead(loaded) == noise_ahead(model)
    for one, other in zip(loaded.policy.perturbed_network.layers, model.policy.perturbed_network.layers, strict=True):
        assert one.base_key == other.base_key
    if algorithm is PPO:
        learn(loaded)
    else:
        model.save_replay_buffer(tmp_path / "buffer")
        loaded.load_replay_buffer(tmp_path / "buffer")
        learn(loaded)
    assert noise_ahead(loaded) == noise_ahead(whole)
    for one, other in zip(loaded.policy.perturbed_network.layers, whole.policy.perturbed_network.layers, strict=True):
        assert one.base_key == other.base_key


@every_algorithm
def test_two_models_without_a_seed_have_different_noise(algorithm: Any) -> None:
    assert all_differ(noise_ahead(build(algorithm, None)), noise_ahead(build(algorithm, None)))


@every_algorithm
def test_the_same_seed_twice_trains_the_same_model(algorithm: Any) -> None:
    one, same, other = (learn(build(algorithm, seed)).policy.state_dict() for seed in (3, 3, 4))
    assert all(th.equal(value, same[name]) for name, value in one.items())
    assert not all(th.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("algorithm", [DQN, SAC])
def test_members_stay_who_they_are_under_another_seed(algorithm: Any, tmp_path: Any) -> None:
    model = learn(build(algorithm, members=3))
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=env_of(algorithm), seed=5)
    for one, other in zip(model.policy.perturbed_network.layers, loaded.policy.perturbed_network.layers, strict=True):
        assert all(th.equal(draw, other.bases()[1][name]) for name, draw in one.bases()[1].items())
    assert loaded.policy._noise_seed != model.policy._noise_seed


@every_algorithm
def test_the_base_of_another_seed_is_drawn_when_it_is_next_time(algorithm: Any) -> None:
    noise = {} if algorithm is PPO else dict(base_every_steps=4)
    models = [learn(build(algorithm, **noise)) for _ in range(2)]
    models[1].policy.reseed_noise(9)
    before, after = (model.policy.perturbed_network.layers[0].base_key for model in models)
    assert before == after
    before, after = (learn(model).policy.perturbed_network.layers[0].base_key for model in models)
    assert before != after


@every_algorithm
def test_the_environments_of_a_loaded_model_are_seeded_too(algorithm: Any, tmp_path: Any) -> None:
    """SB3 seeds them at their next reset, which is what makes two runs of one checkpoint the same."""
    learn(build(algorithm, 0)).save(tmp_path / "model")
    runs = []
    for seed in (5, 5, 6):
        model = algorithm.load(tmp_path / "model", env=env_of(algorithm, 1), seed=seed)
        model.set_random_seed(seed)
        runs.append(learn(model)._last_obs)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_a_seed_that_is_no_integer_changes_nothing(seed: Any) -> None:
    model = build(PPO)
    before = noise_ahead(model)
    with pytest.raises(TypeError, match="seed must be an integer, got"):
        model.policy.reseed_noise(seed)
    assert noise_ahead(model) == before


def test_a_seed_of_numpy_is_the_same_seed(tmp_path: Any) -> None:
    one, other = build(PPO), build(PPO)
    one.policy.reseed_noise(3)
    other.policy.reseed_noise(np.int64(3))
    assert noise_ahead(one) == noise_ahead(other)


def test_a_stock_model_takes_a_seed_as_ever(tmp_path: Any) -> None:
    model = PPO("MlpPolicy", env_of(PPO), **ON)
    model.set_random_seed(3)
    model.save(tmp_path / "model")
    PPO.load(tmp_path / "model", seed=4)
