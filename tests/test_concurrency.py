"""Processes, threads and populations: no noise is shared that should not be, and nothing of the process is overwritten."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import threading
from typing import Any

import cloudpickle
import numpy as np
import optuna
import pytest
import torch as th
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from torch.utils.data import DataLoader, Dataset

from sb3_flipout import flipout_policy, perturbed
from sb3_flipout.noise import Scales

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # other processes cannot import tests

SETTINGS: dict[type[BaseAlgorithm], dict[str, Any]] = {
    PPO: dict(n_steps=16, batch_size=16, n_epochs=2),
    A2C: dict(n_steps=8),
    DQN: dict(learning_starts=16, batch_size=8, buffer_size=500, exploration_initial_eps=0.0, exploration_final_eps=0.0),
    SAC: dict(learning_starts=16, batch_size=8, buffer_size=500),
    TD3: dict(learning_starts=16, batch_size=8, buffer_size=500),
}
SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in ("forkserver", "spawn")]  # each imports torch anew


def built(algorithm: Any, env: Any = None, seed: int = 0, **noise: Any) -> Any:
    env = env or make_vec_env("Pendulum-v1" if algorithm in (SAC, TD3) else "CartPole-v1", 2, seed=seed)
    kwargs = dict(net_arch=[8], schedule="constant", learn_sigma=True, **noise)
    return algorithm("FlipoutMlpPolicy", env, seed=seed, device="cpu", policy_kwargs=kwargs, **SETTINGS[algorithm])


def same(one: Any, other: Any) -> bool:
    return all(th.equal(a, b) for a, b in zip(one.policy.parameters(), other.policy.parameters(), strict=True))


def seen(model: Any) -> list[Any]:
    """What is known of the noise that a model has had, and of that which comes next."""
    policy = flipout_policy(model)
    keys: Any = policy._keys
    bases = [layer.bases()[1] for layer in policy.perturbed_network.layers]
    coming = keys.next(model.n_envs, Scales(1.0), th.device("cpu")).keys.tolist()
    return [policy.noise_state(), [{name: base.tolist() for name, base in one.items()} for one in bases], coming]


# ---- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", *SLOW])
@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_environments_in_processes_change_nothing(algorithm: Any, method: str) -> None:
    """The noise is that of the rows, wherever the environments are: weights are the same bit for bit."""

    def trained(kind: Any, **kwargs: Any) -> Any:
        env = make_vec_env("CartPole-v1", 2, seed=0, vec_env_cls=kind, vec_env_kwargs=kwargs)
        try:
            return built(algorithm, env).learn(96)
        finally:
            env.close()

    here, there = trained(DummyVecEnv), trained(SubprocVecEnv, start_method=method)
    assert same(here, there) and seen(here) == seen(there)


def _acted(data: bytes, obs: np.ndarray, keys: list[int], coming: Any) -> None:
    policy = pickle.loads(data)
    with th.no_grad(), perturbed(policy, th.tensor(keys)):
        coming.send(policy.get_distribution(th.as_tensor(obs)).distribution.logits.numpy())


@pytest.mark.parametrize("method", ["fork", *SLOW])
def test_a_policy_that_is_unpickled_in_another_process_sees_the_same_noise(method: str) -> None:
    policy, obs, keys = built(PPO).learn(32).policy, np.ones((3, 4), np.float32), [1, 2, 3]
    with th.no_grad(), perturbed(policy, th.tensor(keys)):
        expected = policy.get_distribution(th.as_tensor(obs)).distribution.logits.numpy()
    context = multiprocessing.get_context(method)
    received, coming = context.Pipe(duplex=False)
    target = cloudpickle.dumps(_acted)
    process = context.Process(target=_called, args=(target, pickle.dumps(policy), obs, keys, coming))
    process.start()
    coming.close()
    assert received.poll(120), "no answer"
    assert np.array_equal(received.recv(), expected)
    process.join(60)
    assert process.exitcode == 0


def _called(function: bytes, *args: Any) -> None:
    pickle.loads(function)(*args)


class Actions(Dataset[Any]):
    """A data set whose items are computed by a policy, in the processes of a DataLoader."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def __len__(self) -> int:
        return 8

    def __getitem__(self, place: int) -> th.Tensor:
        with th.no_grad(), perturbed(self.policy, th.tensor([place])):
            found: th.Tensor = self.policy.get_distribution(th.ones(1, 4)).distribution.logits[0]
        return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 and later, of threads that there are
def test_workers_of_a_data_loader() -> None:
    items = Actions(built(PPO).learn(32).policy)
    expected = th.stack([items[place] for place in range(len(items))])
    found = th.cat(list(DataLoader(items, batch_size=2, num_workers=2, multiprocessing_context="fork")))
    assert th.equal(found, expected) and len({tuple(row.tolist()) for row in found}) == len(items)


# ---- threads ----------------------------------------------------------------------------------------------------------


def in_threads(*work: Any) -> None:
    failed: list[BaseException] = []

    def carefully(one: Any) -> None:
        try:
            one()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=carefully, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("algorithms", [(PPO, PPO), (PPO, DQN), (A2C, SAC), (DQN, TD3)], ids=str)
def test_two_models_in_two_threads_have_each_its_own_noise(algorithms: Any) -> None:
    """Actions are sampled by torch's one generator, so paths differ; the noise of each model is as if it were alone."""
    alone = [built(algorithm, seed=seed, resample=4) for seed, algorithm in enumerate(algorithms)]
    threaded = [built(algorithm, seed=seed, resample=4) for seed, algorithm in enumerate(algorithms)]
    for model in alone:
        model.learn(160)
    in_threads(*(lambda model=model: model.learn(160) for model in threaded))
    for one, other in zip(alone, threaded, strict=True):
        assert seen(one)[0] == seen(other)[0] and seen(one)[1] == seen(other)[1]
        assert other.num_timesteps == 160


def test_one_network_with_noise_and_one_without_in_two_threads() -> None:
    policy, plain = built(PPO, seed=1).policy, built(PPO, seed=2).policy
    obs, keys = th.ones(5, 4), th.arange(5)

    def mean() -> th.Tensor:
        with th.no_grad():
            return plain.get_distribution(obs).distribution.logits

    def noisy() -> th.Tensor:
        with th.no_grad(), perturbed(policy, keys):
            return policy.get_distribution(obs).distribution.logits

    expected = (mean(), noisy())

    def repeat(function: Any, wanted: th.Tensor) -> None:
        for _ in range(200):
            assert th.equal(function(), wanted)

    in_threads(lambda: repeat(mean, expected[0]), lambda: repeat(noisy, expected[1]))


def test_models_that_are_built_in_threads_are_seeded_each_by_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits, after it has seeded torch, for another one that could do so before its weights are drawn."""
    seed_all, met = PPO.set_random_seed, threading.Event()

    def slowly(self: Any, seed: int | None = None) -> None:
        seed_all(self, seed)
        met.wait(0.2)

    monkeypatch.setattr(PPO, "set_random_seed", slowly)
    expected = [flipout_policy(built(PPO, seed=seed)).noise_state()["seed"] for seed in range(3)]
    found: dict[int, int] = {}
    in_threads(*(lambda s=s: found.__setitem__(s, flipout_policy(built(PPO, seed=s)).noise_state()["seed"]) for s in range(3)))
    assert [found[seed] for seed in range(3)] == expected and len(set(expected)) == 3


def test_trials_of_optuna_in_threads() -> None:
    def objective(trial: optuna.Trial) -> float:
        model = built(PPO, seed=trial.number, sigma_init=trial.suggest_float("sigma_init", 0.1, 1.0), resample=3)
        model.learn(64)
        keys[trial.number] = seen(model)[0]["seed"], flipout_policy(model).noise_settings.sigma_init
        return float(trial.params["sigma_init"])

    keys: dict[int, Any] = {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    study.optimize(objective, n_trials=6, n_jobs=3)
    assert len(keys) == 6 and len({seed for seed, _ in keys.values()}) == 6
    for trial in study.trials:
        assert trial.state is optuna.trial.TrialState.COMPLETE
        assert keys[trial.number][1] == trial.params["sigma_init"]


# ---- populations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_population_based_training(algorithm: Any) -> None:
    """The worse half takes the weights of the better one and another noise scale; the noise stays each one's own."""
    population = [built(algorithm, seed=seed) for seed in range(4)]
    for generation in range(3):
        for model in population:
            model.learn(64, reset_num_timesteps=False)
        for good, bad in zip(population[:2], population[2:], strict=True):
            before = flipout_policy(bad).noise_state()
            bad.set_parameters(good.get_parameters())
            assert same(good, bad) and flipout_policy(bad).noise_state() == before
            flipout_policy(bad).noise_scale = 0.8 ** (generation + 1)
        assert len({flipout_policy(model).noise_state()["seed"] for model in population}) == 4
    assert {flipout_policy(model).noise_scale for model in population} == {1.0, 0.8**3}
    population[3].learn(64, reset_num_timesteps=False)
    assert not same(population[1], population[3])
