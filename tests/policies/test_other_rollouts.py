"""Exact replay where rollouts are kept, shared or stored in a user's own way: each under the base that it acted under."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from sb3_contrib import TRPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import polyak_update

from sb3_flipout.buffers import keyed
from sb3_flipout.noise import RowNoise, with_noise
from sb3_flipout.noise.carried import without_noise
from sb3_flipout.noise.row_operations import same_noise

STEPS, N_ENVS = 16, 2
KINDS = {
    "gaussian": {},
    "lowrank": dict(family="lowrank"),
    "all": dict(perturb="all"),
    "shared": dict(noise_sharing="shared", resample="rollout"),
}


def build(algorithm: Any = PPO, policy: str = "FlipoutMlpPolicy", **kwargs: Any) -> Any:
    noise = dict(sigma_init=1.5) | kwargs.pop("noise", {})
    batches = {} if issubclass(algorithm, A2C) else dict(batch_size=STEPS * N_ENVS)
    settings: dict[str, Any] = dict(n_steps=STEPS, seed=0, device="cpu", **batches)
    model = algorithm(policy, make_vec_env("CartPole-v1", N_ENVS, seed=0), policy_kwargs=noise, **{**settings, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def collect(model: Any, buffer: Any) -> Any:
    _, callback = model._setup_learn(10_000)
    model.collect_rollouts(model.env, callback, buffer, STEPS)
    return buffer


def second(model: Any, made: Any = None) -> Any:
    old = model.rollout_buffer
    return (made or keyed(RolloutBuffer))(STEPS, old.observation_space, old.action_space, device="cpu", n_envs=N_ENVS)


def gap(model: Any, buffer: Any) -> float:
    """Largest difference of log-probabilities, before any optimiser step."""
    largest = 0.0
    with model.policy.updating():
        for batch in buffer.get(STEPS):
            _, found, _ = model.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
            largest = max(largest, float((found.detach() - batch.old_log_prob).abs().max()))
    return largest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", [None, RolloutBuffer])
def test_an_earlier_rollout_is_replayed_under_its_own_base(kind: str, made: Any) -> None:
    """Also into a plain buffer that is handed to collect_rollouts."""
    model = build(noise=KINDS[kind])
    first, later = collect(model, model.rollout_buffer), collect(model, second(model, made))
    present = [(key, dict(draws)) for key, draws in model.policy.perturbed_network.bases()]
    for buffer in (first, later):
        assert gap(model, buffer) < 1e-4
    for (key, draws), (key_now, now) in zip(present, model.policy.perturbed_network.bases(), strict=True):
        assert key == key_now and all(now[name] is draw for name, draw in draws.items())


def test_gradients_of_an_earlier_rollout_are_those_of_its_time() -> None:
    model = build()
    first = collect(model, model.rollout_buffer)

    def gradients() -> list[th.Tensor]:
        batch = next(first.get(STEPS))
        np.random.seed(0)
        _, found, _ = model.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
        model.policy.zero_grad()
        found.mean().backward()
        return [p.grad.clone() for p in model.policy.parameters() if p.grad is not None]

    np.random.seed(0)
    with model.policy.updating():
        before = gradients()
    collect(model, second(model))
    np.random.seed(0)
    with model.policy.updating():
        after = gradients()
    assert before and all(th.allclose(a, b, atol=1e-6) for a, b in zip(before, after, strict=True))


def test_algorithms_that_share_a_policy_replay_their_own_rollouts() -> None:
    one, other = build(), build()
    other.policy = one.policy
    mine, its = collect(one, one.rollout_buffer), collect(other, other.rollout_buffer)
    assert gap(one, mine) < 1e-4 and gap(other, its) < 1e-4


def test_rows_of_several_bases_are_refused() -> None:
    model = build()

    class Appended(RolloutBuffer):
        def reset(self) -> None:
            if not hasattr(self, "observations") or self.full:
                super().reset()

    model = build(n_steps=2 * STEPS, rollout_buffer_class=Appended)
    collect(model, model.rollout_buffer)
    collect(model, model.rollout_buffer)
    with pytest.raises(ValueError, match=r"rows of several rollouts, which acted under different base perturbations"):
        gap(model, model.rollout_buffer)
    whole = build(n_steps=2 * STEPS, rollout_buffer_class=Appended, noise=dict(base_every_rollouts=None))
    collect(whole, whole.rollout_buffer)
    collect(whole, whole.rollout_buffer)
    assert gap(whole, whole.rollout_buffer) < 1e-4


def test_joined_noise_knows_whether_it_is_of_one_base() -> None:
    a, b, c = (RowNoise(th.arange(2)) for _ in range(3))
    a.base, b.base, c.base = 5, 5, 6
    assert RowNoise.cat([a, b]).base == 5 and RowNoise.cat([a, c]).base == "several"
    assert a[:1].base == 5 and a.at_scale(th.ones(2)).base == 5 and RowNoise(th.arange(2)).base is None
    scaled = RowNoise(th.arange(2), 0.5)
    scaled.base = 7
    assert scaled.at_scale(th.ones(2)).base == 7
    assert same_noise(a, b) and not same_noise(a, c)


# ---- buffers of users -----------------------------------------------------------------------------------------------


class Mirrored(RolloutBuffer):
    """Stores each step twice."""

    def add(self, *args: Any, **kwargs: Any) -> None:
        super().add(*args, **kwargs)
        if not self.full:
            super().add(*args, **kwargs)


class Shortened(RolloutBuffer):
    """Leaves the last steps out of its arrays."""

    def get(self, batch_size: int | None = None) -> Any:
        names = ["observations", "actions", "values", "log_probs", "advantages", "returns"]
        for name in names:
            setattr(self, name, self.swap_and_flatten(getattr(self, name)[: self.pos - 4]))
        yield self._get_samples(np.arange(len(self.log_probs)))


def test_a_step_that_is_stored_twice_has_its_noise_twice() -> None:
    model = build(n_steps=2 * STEPS, rollout_buffer_class=Mirrored)
    assert gap(model, collect(model, model.rollout_buffer)) < 1e-4
    assert (model.rollout_buffer.noise_keys != 0).all()


def samples_of(buffer: Any, places: np.ndarray) -> RolloutBufferSamples:
    names = ("observations", "actions", "values", "log_probs", "advantages", "returns")
    found = [buffer.to_torch(getattr(buffer, name)[places]) for name in names]
    return RolloutBufferSamples(found[0], found[1], *(part.flatten() for part in found[2:]))


class AsAsked(RolloutBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        return samples_of(self, batch_inds)


class Sorted(RolloutBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        return samples_of(self, np.sort(batch_inds))


class SortedWithNoise(RolloutBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        places = np.sort(batch_inds)
        samples = samples_of(self, places)
        return samples._replace(observations=with_noise(samples.observations, self.row_noise(places)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("made", [AsAsked, SortedWithNoise])
def test_samples_that_a_user_makes_have_their_noise(made: Any) -> None:
    model = build(rollout_buffer_class=made)
    assert gap(model, collect(model, model.rollout_buffer)) < 1e-4


def test_samples_of_other_rows_without_their_noise_are_refused() -> None:
    model = build(rollout_buffer_class=Sorted)
    collect(model, model.rollout_buffer)
    with pytest.raises(ValueError, match=r"gives other rows than the places that it was asked for"):
        gap(model, model.rollout_buffer)


def test_arrays_that_do_not_fit_the_noise_are_refused() -> None:
    model = build(rollout_buffer_class=Shortened)
    collect(model, model.rollout_buffer)
    with pytest.raises(ValueError, match=r"gives samples out of 24 rows, and holds the noise of 32"):
        gap(model, model.rollout_buffer)


# ---- what an update finds of the parameters -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO, RecurrentPPO])
def test_an_update_finds_all_parameters(algorithm: Any) -> None:
    """For a mean teacher, say; TRPO alone differentiates by all that it finds."""

    class Teacher(algorithm):  # type: ignore[valid-type, misc]
        def train(self) -> None:
            super().train()
            found.append(len(list(self.policy.parameters())))
            if algorithm is not TRPO:
                polyak_update(self.policy.parameters(), teacher.parameters(), 1.0)

    found: list[int] = []
    model = build(Teacher, "FlipoutMlpLstmPolicy" if algorithm is RecurrentPPO else "FlipoutMlpPolicy")
    teacher = copy.deepcopy(model.policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.learn(STEPS * N_ENVS)
    everything = len(list(model.policy.parameters()))
    assert found == [everything] if algorithm is not TRPO else found[0] < everything
    if algorithm is not TRPO:
        assert all(th.equal(a, b) for a, b in zip(model.policy.parameters(), teacher.parameters(), strict=True))


class Costs(RolloutBuffer):
    """Takes costs beside rewards, and holds a lock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.lock, self.costs = threading.Lock(), []
        super().__init__(*args, **kwargs)

    def add(self, obs: Any, action: Any, reward: Any, cost: Any, episode_start: Any, value: Any, log_prob: Any) -> None:  # type: ignore[override]
        self.costs.append(cost)
        super().add(obs, action, reward, episode_start, value, log_prob)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.Lock())


def test_a_buffer_with_arguments_and_a_state_of_its_own() -> None:
    model = build(rollout_buffer_class=Costs)
    obs = model.policy.obs_to_tensor(model.env.reset())[0]
    model.policy.begin_rollout()
    with th.no_grad(), model.policy.collecting(N_ENVS):
        for step in range(STEPS):
            actions, values, log_prob = model.policy(obs)
            zeros = np.zeros(N_ENVS)
            model.rollout_buffer.add(obs.numpy(), actions.numpy()[:, None], zeros, step, zeros, values, log_prob)
            model.policy.marks.step_due = True
    model.rollout_buffer.compute_returns_and_advantage(values, zeros)
    for buffer in (copy.deepcopy(model.rollout_buffer), pickle.loads(pickle.dumps(model.rollout_buffer))):
        assert buffer.costs == list(range(STEPS)) and buffer.lock is not model.rollout_buffer.lock
    assert gap(model, model.rollout_buffer) < 1e-4


# ---- gradients by observations --------------------------------------------------------------------------------------


def by_attribute(model: Any, obs: Any, value: Any) -> th.Tensor:
    obs.requires_grad = True
    value(obs).sum().backward()
    return obs.grad


def in_place(model: Any, obs: Any, value: Any) -> th.Tensor:
    assert obs.requires_grad_(True) is obs and obs.is_leaf
    value(obs).sum().backward()
    return obs.grad


def of_a_copy(model: Any, obs: Any, value: Any) -> th.Tensor:
    leaf = obs.clone().detach().requires_grad_(True)
    (found,) = th.autograd.grad(value(leaf).sum(), leaf)
    return found


def by_hook(model: Any, obs: Any, value: Any) -> th.Tensor:
    seen: list[th.Tensor] = []
    obs.requires_grad_(True)
    middle = obs * 1.0
    middle.register_hook(seen.append)
    middle.retain_grad()
    value(middle).sum().backward()
    assert th.equal(middle.grad, seen[0])
    return seen[0]


@pytest.mark.parametrize("way", [by_attribute, in_place, of_a_copy, by_hook])
def test_an_update_can_differentiate_by_observations(way: Any) -> None:
    """As adversarial training and gradient penalties do; against the same pass under the noise said by hand."""
    model = build()
    collect(model, model.rollout_buffer)

    def value(obs: th.Tensor) -> th.Tensor:
        return model.policy.evaluate_actions(obs, actions)[1]

    with model.policy.updating():
        batch = next(model.rollout_buffer.get(STEPS))
        actions, noise = batch.actions.long().flatten(), batch.observations.row_noise
        found = way(model, batch.observations, value)
    leaf = without_noise(batch.observations).detach().clone().requires_grad_(True)
    with model.policy.perturbed_network.activate(noise):
        (expected,) = th.autograd.grad(value(leaf).sum(), leaf)
    th.testing.assert_close(th.as_tensor(found).as_subclass(th.Tensor), expected, rtol=1e-5, atol=1e-6)
    assert float(expected.abs().max()) > 0


def test_what_is_set_on_observations_is_set() -> None:
    rows = with_noise(th.rand(3, 2), RowNoise(th.arange(3)))
    rows.data = th.zeros(3, 2)
    assert float(rows.sum()) == 0 and rows.T.shape == (2, 3) and not rows.requires_grad
