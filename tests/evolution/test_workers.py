"""A population on Ray: the same results from any number of workers, and none is lost with a worker but its members."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from generations import Fitness
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flipout.evolution import FlipES, Generation, RayWorkers, Worker
from sb3_flipout.evolution.ray_workers import _knock

ray = pytest.importorskip("ray")

# A cluster of several processes takes seconds to start: all tests of this file are for one process of pytest.
pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def cartpoles() -> Any:
    return make_vec_env("CartPole-v1", 3)


def normalised() -> Any:
    return VecNormalize(make_vec_env("CartPole-v1", 3), norm_reward=False)


class Mortal(gym.Wrapper[Any, Any, Any, Any]):
    """Ends its process, or hangs, in one step of a lifetime of the folder that says so."""

    def __init__(self, folder: Path, how: str) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.folder, self.how, self.steps = folder, how, 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == 10 and self._is_first():
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return self.env.step(action)

    def _is_first(self) -> bool:
        try:  # made and not looked for: two workers at once must not both find that it is not there
            with (self.folder / "once").open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return False
        return True


def build(workers: RayWorkers | None, env: Any = None, **kwargs: Any) -> FlipES:
    settings: dict[str, Any] = dict(population_size=16, base_perturbations=2, seed=0, device="cpu")
    return FlipES(
        "FlipoutMlpPolicy",
        env or cartpoles(),
        workers=workers,
        policy_kwargs=dict(net_arch=[8], sigma_init=1.0),
        **{**settings, **kwargs},
    )


def learned(workers: RayWorkers | None, make_env: Any = cartpoles, **kwargs: Any) -> tuple[FlipES, Fitness]:
    """Two generations."""
    fitness, model = Fitness(), build(workers, make_env(), **kwargs)
    for _ in range(2):
        model.learn(1, callback=fitness, reset_num_timesteps=False)
    if workers is not None:
        workers.close()
    return model, fitness


@pytest.mark.parametrize("make_env", [pytest.param(cartpoles, marks=pytest.mark.slow), normalised])
def test_results_do_not_depend_on_the_number_of_workers(make_env: Any) -> None:
    """Nor on whether there are any: the chunks are the same ones in this process."""
    found = [learned(RayWorkers(make_env, n, members_per_chunk=4), make_env) for n in (1, 3)]
    here = RayWorkers(make_env, 1, members_per_chunk=4, address="ray://nowhere.invalid:1", fallback=True)
    found.append(_without_ray(here, make_env))
    first, fitness = found[0]
    assert first._n_updates == 2 and len(set(fitness.found[0].tolist())) > 3
    for model, told in found[1:]:
        assert model.num_timesteps == first.num_timesteps
        assert all(th.equal(a, b) for a, b in zip(told.found, fitness.found, strict=True))
        assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), first.policy.parameters(), strict=True))
        # Logs too: episodes stand in the order of the members, and not in that in which workers were done.
        assert list(model.ep_info_buffer) == list(first.ep_info_buffer) != []  # type: ignore[arg-type]


def _without_ray(workers: RayWorkers, make_env: Any) -> tuple[FlipES, Fitness]:
    import sb3_flipout.evolution.ray_workers as module

    def unreachable(address: str | None) -> Any:
        raise ConnectionError("no Ray cluster could be reached")

    connected, module._connected = module._connected, unreachable
    try:
        with pytest.warns(UserWarning, match="the population plays in this process: no Ray cluster could be reached"):
            return learned(workers, make_env)
    finally:
        module._connected = connected


def test_a_chunk_of_the_whole_population_is_what_the_models_own_environments_give() -> None:
    kwargs: dict[str, Any] = dict(base_perturbations=1)
    model, _ = learned(RayWorkers(cartpoles, 1, members_per_chunk=16), **kwargs)
    here, _ = learned(None, **kwargs)
    assert here.num_timesteps == model.num_timesteps
    assert all(th.equal(a, b) for a, b in zip(here.policy.parameters(), model.policy.parameters(), strict=True))


@pytest.mark.slow
def test_statistics_of_observations_are_merged_over_workers() -> None:
    model, _ = learned(RayWorkers(normalised, 2, members_per_chunk=4), normalised)
    statistics: Any = model.get_vec_normalize_env().obs_rms  # type: ignore[union-attr]
    # All was seen by workers: one observation per step, and resets.
    chunks = 4 * model._n_updates
    assert statistics.count == pytest.approx(model.num_timesteps + 3 * chunks, abs=0.01)
    assert 0 < statistics.var.max() < 5 and model.get_vec_normalize_env().training  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["dies", pytest.param("hangs", marks=pytest.mark.slow)])
def test_a_worker_that_is_lost_costs_its_members_and_is_replaced(how: str, tmp_path: Path) -> None:
    def make_env() -> Any:
        return make_vec_env(lambda: Mortal(tmp_path, how), 2)  # type: ignore[arg-type, return-value]

    workers, fitness = RayWorkers(make_env, 2, members_per_chunk=4, timeout=3.0 if how == "hangs" else 60.0), Fitness()
    with workers, pytest.warns(UserWarning, match=r"4 of 16 members were left out .* or their worker was lost"):
        model = build(workers).learn(900, callback=fitness)
        assert ray.get([actor.ready.remote() for actor in workers._actors]) == [True, True]
    assert workers.replaced == 1 and model._n_updates >= 2
    assert int(th.isnan(fitness.found[0]).sum()) == 4
    assert len(fitness.found) >= 2 and not any(bool(th.isnan(told).any()) for told in fitness.found[1:])
    with pytest.raises(ProcessLookupError):  # it is gone, and does not hang on
        os.kill(int((tmp_path / "once").read_text()), 0)


@pytest.mark.slow
def test_where_all_workers_are_lost_it_is_said(tmp_path: Path) -> None:
    class Deadly(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    workers = RayWorkers(lambda: make_vec_env(lambda: Deadly(gym.make("CartPole-v1")), 2), 1, members_per_chunk=8)  # type: ignore[arg-type, return-value]
    with workers, pytest.raises(RuntimeError, match="all workers were lost in one generation"):
        build(workers).learn(100)


@pytest.mark.slow
def test_an_error_of_an_environment_is_raised_here() -> None:
    class Wrong(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            raise ArithmeticError("what went wrong")

    workers = RayWorkers(lambda: Wrong(gym.make("CartPole-v1")), 1, members_per_chunk=8)
    with workers, pytest.raises(ArithmeticError, match="what went wrong"):
        build(workers).learn(100)


@pytest.mark.slow
def test_a_callback_stops_it_between_chunks_and_it_goes_on() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 2

    with RayWorkers(cartpoles, 2, members_per_chunk=4) as workers:
        model = build(workers)
        model.learn(1000, callback=Stop())
        assert model._n_updates == 0 and model.num_timesteps > 0
        for _ in range(2):
            model.learn(10, reset_num_timesteps=False)
        assert model._n_updates == 2
    unbroken, _ = learned(RayWorkers(cartpoles, 2, members_per_chunk=4))
    assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), unbroken.policy.parameters(), strict=True))


KILLED = """
import os, signal, sys
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from sb3_flipout.evolution import FlipES

class SaveEach(BaseCallback):
    def _on_rollout_start(self):
        if self.model._n_updates:
            self.model.save(f"{sys.argv[1]}/{self.model._n_updates}")

    def _on_step(self):
        if self.model._n_updates == 3 and self.n_calls % 7 == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

env = make_vec_env("CartPole-v1", 3)
kw = dict(net_arch=[8], schedule="linear", schedule_fraction=1.0)
FlipES("FlipoutMlpPolicy", env, population_size=16, seed=0, device="cpu", policy_kwargs=kw).learn(3000, callback=SaveEach())
"""


def test_a_run_that_was_killed_goes_on_with_the_same_generation(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    done = subprocess.run([sys.executable, str(tmp_path / "killed.py"), str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    resumed, fitness, unbroken = FlipES.load(tmp_path / "3", env=cartpoles(), device="cpu"), Fitness(), Fitness()
    resumed.learn(3000 - resumed.num_timesteps, callback=fitness, reset_num_timesteps=False)
    noise = dict(net_arch=[8], schedule="linear", schedule_fraction=1.0)
    whole = FlipES("FlipoutMlpPolicy", cartpoles(), population_size=16, seed=0, device="cpu", policy_kwargs=noise)
    whole.learn(3000, callback=unbroken)
    assert len(fitness.found) == len(unbroken.found) - 3 > 1
    assert all(th.equal(a, b) for a, b in zip(fitness.found, unbroken.found[3:], strict=True))
    assert all(th.equal(a, b) for a, b in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True))


@pytest.mark.slow
def test_workers_are_given_to_a_loaded_model(tmp_path: Path) -> None:
    with RayWorkers(cartpoles, 2, members_per_chunk=4) as workers:
        model = build(workers).learn(10)
        model.save(tmp_path / "model")
        loaded = FlipES.load(tmp_path / "model", env=cartpoles(), workers=workers, device="cpu")
        assert loaded.workers is workers
        for one in (model, loaded):
            one.learn(10, reset_num_timesteps=False)
        assert all(th.equal(a, b) for a, b in zip(loaded.policy.parameters(), model.policy.parameters(), strict=True))
    assert FlipES.load(tmp_path / "model", env=cartpoles(), device="cpu").workers is None


def test_what_goes_to_a_worker_and_comes_back_is_a_few_bytes_per_member() -> None:
    """docs/distributed.md counts them."""
    from ray import cloudpickle

    from sb3_flipout.evolution.playing import Played

    sizes = [len(cloudpickle.dumps(Played(np.zeros(n), 10, np.zeros((n, 3), dtype=np.float32), None))) for n in (1000, 2000)]
    assert sizes[1] - sizes[0] <= 1000 * (8 + 12) + 16


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(workers=0), ValueError, "workers must be an integer >= 1, got 0"),
        (dict(members_per_chunk=0), ValueError, "members_per_chunk must be an integer >= 1, got 0"),
        (dict(timeout=0), ValueError, "timeout must be"),
        (dict(make_env=gym.make("CartPole-v1")), TypeError, "make_env must be a function that makes environments, got"),
        (dict(fallback=1), TypeError, "fallback"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RayWorkers(**{"make_env": cartpoles, "workers": 1, **kwargs})


@pytest.mark.slow
def test_what_does_not_fit_is_refused_when_the_model_starts() -> None:
    with (
        RayWorkers(cartpoles, 2, members_per_chunk=8) as workers,
        pytest.warns(UserWarning, match="makes 1 chunks of members_per_chunk=8, so only 1 of 2 workers play"),
    ):
        build(workers, population_size=8, base_perturbations=1).learn(1)
    for make_env, env in ((cartpoles, normalised), (normalised, cartpoles)):
        with RayWorkers(make_env, 1) as workers, pytest.raises(RuntimeError, match="must both normalise observations"):
            build(workers, env()).learn(1)
    with RayWorkers(lambda: gym.make("Acrobot-v1"), 1) as workers, pytest.raises(RuntimeError, match="spaces do not match"):
        build(workers).learn(1)


def test_normalisation_of_another_kind_is_refused() -> None:
    def clipped() -> Any:
        return VecNormalize(make_vec_env("CartPole-v1", 3), norm_reward=False, clip_obs=0.1)

    job = build(None, normalised())._told_workers()
    Worker(job, normalised)
    for make_env in (clipped, cartpoles):
        with pytest.raises(
            ValueError, match="both normalise observations by VecNormalize, or both not, and with the same clip"
        ):
            Worker(job, make_env)


def test_a_worker_makes_the_keys_of_a_generation_once() -> None:
    model = build(None)
    worker, weights = Worker(model._told_workers(), cartpoles), model.policy.state_dict()
    given = {name: tensor.numpy() for name, tensor in weights.items()}
    asked: list[int] = []
    ask = worker._population.ask
    worker._population.ask = lambda: (asked.append(1), ask())[1]  # type: ignore[method-assign]
    for number, members in ((0, slice(0, 4)), (0, slice(4, 8)), (1, slice(0, 4))):
        worker.play(Generation(number, 5, 1.0, given, None, False), members)
    assert len(asked) == 2


def test_a_dead_address_of_the_environment_variable_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConnectionRefusedError):
        _knock(None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    _knock(None)


def test_a_population_smaller_than_the_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="population_size=16 must be at least workers=17"):
        build(RayWorkers(cartpoles, 17)).learn(1)


def test_a_cluster_without_room_is_said() -> None:
    workers = RayWorkers(cartpoles, 2, start_timeout=2.0, actor_options=dict(num_cpus=100))
    with pytest.raises(ConnectionError, match=r"2 workers were not ready within start_timeout=2\.0 seconds"):
        build(workers).learn(1)


def test_without_ray_or_a_cluster_the_message_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own, where this one is connected."""
    script = """
import sys, warnings
from stable_baselines3.common.env_util import make_vec_env
from sb3_flipout.evolution import FlipES, Generation, RayWorkers, Worker
from sb3_flipout.evolution.ray_workers import _knock
for address, hide in (("127.0.0.1:1", False), (None, True)):
    if hide:
        sys.modules["ray"] = None
    for fallback in (False, True):
        make_env = lambda: make_vec_env("CartPole-v1", 2)
        workers = RayWorkers(make_env, 2, members_per_chunk=4, address=address, fallback=fallback)
        model = FlipES("FlipoutMlpPolicy", "CartPole-v1", population_size=8, workers=workers, device="cpu", seed=0)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model.learn(1)
            print("played", [str(w.message)[:60] for w in said if "this process" in str(w.message)])
        except Exception as error:
            print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    unreachable, here, missing, here_too = [
        line for line in done.stdout.splitlines() if line.startswith(("Conn", "Imp", "play"))
    ]
    assert unreachable.startswith("ConnectionError no Ray cluster could be reached at address='127.0.0.1:1'")
    assert missing.startswith("ImportError RayWorkers needs Ray, which is not installed; pip install")
    assert here.startswith("played ['the population plays in this process") and here_too.startswith("played ['")


@pytest.mark.slow
def test_no_warning_where_nothing_is_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learned(RayWorkers(cartpoles, 2, members_per_chunk=4))
