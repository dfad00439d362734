"""AdaptNoise reaches its target from both sides, measures what it says, and leaves no other trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import ReplayProbe, vector_env
from probes import ScaleProbe, make, parameters
from sb3_contrib import QRDQN, TRPO, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import kl_divergence
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecNormalize
from torch.distributions import Categorical

from sb3_flipout import perturbed
from sb3_flipout.callbacks import AdaptNoise
from sb3_flipout.diagnostics.distances import (
    MEASURES,
    count_actions,
    disagreement,
    epsilon_to_disagreement,
    epsilon_to_kl,
    kl_distance,
    policy_distance,
    rms_distance,
)
from sb3_flipout.diagnostics.recent import recent_replayed, recent_rollout
from sb3_flipout.diagnostics.views import ActionView
from sb3_flipout.noise import RowNoise

# ---- distances: views in, a number out ------------------------------------------------------------------------------


def view(choice: Any = (), compared: Sequence[Categorical] = ()) -> ActionView:
    """What a policy does, as far as a distance looks at it."""
    return ActionView(th.empty(0), [], list(compared), th.tensor(choice))


def test_kl_sums_over_the_parts_of_an_action() -> None:
    logits = [th.randn(7, 3), th.randn(7, 4), th.randn(7, 3), th.randn(7, 4)]
    p1, p2, q1, q2 = (Categorical(logits=part) for part in logits)
    expected = (th.distributions.kl_divergence(p1, q1) + th.distributions.kl_divergence(p2, q2)).mean()
    assert kl_distance(view(compared=[p1, p2]), view(compared=[q1, q2])) == pytest.approx(float(expected), rel=1e-5)


def test_rms_and_disagreement_by_hand() -> None:
    assert rms_distance(view([[0.0, 1.0], [2.0, 3.0]]), view([[0.0, 1.0], [2.0, 7.0]])) == 2.0
    assert disagreement(view([0, 1, 2, 3]), view([0, 1, 2, 0])) == 0.25
    assert disagreement(view([[0, 1], [2, 3]]), view([[5, 5], [2, 3]])) == 0.5


@pytest.mark.parametrize(("epsilon", "n_actions"), [(0.1, 2), (0.5, 18), (1.0, 4), (0.0, 3)])
def test_epsilon_gives_the_distance_of_epsilon_greedy(epsilon: float, n_actions: int) -> None:
    greedy = th.eye(n_actions, dtype=th.float64)[0]
    exploring = (1 - epsilon) * greedy + epsilon / n_actions
    kl = th.distributions.kl_divergence(Categorical(probs=greedy), Categorical(probs=exploring))
    assert epsilon_to_kl(epsilon, n_actions) == pytest.approx(float(kl), abs=1e-12)
    assert epsilon_to_disagreement(epsilon, n_actions) == pytest.approx(1 - float(exploring[0]))


def test_actions_are_counted() -> None:
    given = [spaces.Discrete(5), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3), spaces.MultiBinary([2, 2])]
    assert [count_actions(space) for space in given] == [5, 6, 8, 16]


# ---- distances of policies ------------------------------------------------------------------------------------------


def rows(model: BaseAlgorithm, n: int = 32) -> tuple[Any, RowNoise]:
    model.observation_space.seed(0)
    observations = [model.observation_space.sample() for _ in range(n)]
    keys = th.arange(n) * 7919 + 5
    return th.as_tensor(np.stack(observations)), RowNoise(keys, th.linspace(2.0, 8.0, n))


@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "multibinary"])
def test_kl_of_actor_critics(action: str) -> None:
    model = make(PPO, action=action)
    obs, noise = rows(model)
    with th.no_grad(), perturbed(model.policy, None):
        mean = deepcopy(model.policy.get_distribution(obs))  # SB3 has one object for all
    with th.no_grad(), perturbed(model.policy, noise):
        noisy = model.policy.get_distribution(obs)
    expected = kl_divergence(mean, noisy)
    expected = expected.sum(-1) if action == "multibinary" else expected
    distance = policy_distance(model.policy, obs, noise, MEASURES["kl"])
    assert distance == pytest.approx(float(expected.mean()), rel=1e-4)
    assert distance > 1e-6


@pytest.mark.parametrize("action", ["discrete", "multidiscrete", "multibinary"])
def test_kl_of_maskable_ppo_is_that_without_masks(action: str) -> None:
    model = make(MaskablePPO, action=action)
    obs, noise = rows(model)
    parts = []
    for active in (None, noise):
        with th.no_grad(), perturbed(model.policy, active):
            found: Any = model.policy.get_distribution(obs)
            inner = found.distributions if action != "discrete" else [found.distribution]
            parts.append([Categorical(logits=one.logits.clone()) for one in inner])
    expected = sum(th.distributions.kl_divergence(own, other).mean() for own, other in zip(*parts, strict=True))
    distance = policy_distance(model.policy, obs, noise, MEASURES["kl"])
    assert distance == pytest.approx(float(expected), rel=1e-4)
    assert distance > 1e-6


@pytest.mark.parametrize("algorithm", [MaskablePPO, TRPO, QRDQN])
def test_algorithms_of_sb3_contrib(algorithm: type[BaseAlgorithm]) -> None:
    model = make(algorithm)
    callback = AdaptNoise(0.05)
    model.learn(64, callback, **({"use_masking": False} if algorithm is MaskablePPO else {}))
    assert callback.distance > 0 and model.policy.noise_scale != 1.0


def test_kl_of_values_is_that_of_their_softmax() -> None:
    model = make(DQN)
    obs, noise = rows(model)
    with th.no_grad():
        mean = model.policy.q_net(obs)
        with perturbed(model.policy, noise):
            noisy = model.policy.q_net(obs)
    expected = th.distributions.kl_divergence(Categorical(logits=mean), Categorical(logits=noisy)).mean()
    distance = policy_distance(model.policy, obs, noise, MEASURES["kl"])
    assert distance == pytest.approx(float(expected), rel=1e-4)
    assert distance > 1e-6


def test_kl_of_quantiles_is_that_of_their_means() -> None:
    qrdqn = pytest.importorskip("sb3_contrib").QRDQN
    model = qrdqn("FlipoutMlpPolicy", vector_env("discrete", 1), seed=0, buffer_size=10, device="cpu")
    obs, noise = rows(model)
    with th.no_grad():
        mean = model.policy.quantile_net(obs).mean(1)
        with perturbed(model.policy, noise):
            noisy = model.policy.quantile_net(obs).mean(1)
    expected = th.distributions.kl_divergence(Categorical(logits=mean), Categorical(logits=noisy)).mean()
    assert policy_distance(model.policy, obs, noise, MEASURES["kl"]) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("algorithm", "action", "measure"),
    [
        (PPO, "box", "action_distance"),
        (SAC, "box", "action_distance"),
        (TD3, "box", "action_distance"),
        (PPO, "multidiscrete", "disagreement"),
        (DQN, "discrete", "disagreement"),
    ],
)
def test_distances_of_deterministic_actions(algorithm: type[BaseAlgorithm], action: str, measure: str) -> None:
    model = make(algorithm, action=action)
    obs, noise = rows(model)
    with th.no_grad():
        with perturbed(model.policy, None):
            mean = model.policy._predict(obs, deterministic=True).double()
        with perturbed(model.policy, noise):
            noisy = model.policy._predict(obs, deterministic=True).double()
    differs = (mean != noisy).reshape(len(mean), -1).any(1).double().mean()
    expected = differs if measure == "disagreement" else (mean - noisy).square().mean().sqrt()
    distance = policy_distance(model.policy, obs, noise, MEASURES[measure])
    assert distance == pytest.approx(float(expected), rel=1e-6)
    assert distance > 0
    still = RowNoise(noise.keys, 0.0)
    assert policy_distance(model.policy, obs, still, MEASURES[measure]) == 0


def test_the_reference_of_members_is_the_mean_and_not_their_vote() -> None:
    model = make(DQN, policy_kwargs=dict(net_arch=[16], members=7, sigma_init=3.0))
    obs, noise = rows(model)
    vote = model.policy._predict(obs, deterministic=True)
    with perturbed(model.policy, None):
        assert not th.equal(vote, model.policy._predict(obs, deterministic=True))
    assert policy_distance(model.policy, obs, RowNoise(noise.keys, 0.0), MEASURES["disagreement"]) == 0


# ---- observations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalised", [False, True])
def test_replayed_observations_are_the_newest_as_training_sees_them(normalised: bool, untouched_rng: None) -> None:
    torch_state, numpy_state = th.get_rng_state(), np.random.get_state()
    env = VecNormalize(vector_env("discrete", 2)) if normalised else vector_env("discrete", 2)
    model = make(DQN, env, buffer_size=3000, learning_starts=10_000)
    assert recent_replayed(model, 4, np.random.default_rng(0)) is None
    model.learn(2600)
    buffer = model.replay_buffer
    raw = np.concatenate([buffer.observations[buffer.pos - 1000 : buffer.pos].reshape(2000, -1)])
    recent = (env.normalize_obs(raw) if normalised else raw).astype(np.float32)
    th.set_rng_state(torch_state), np.random.set_state(numpy_state)  # training itself may draw
    drawn = recent_replayed(model, 64, np.random.default_rng(0)).numpy()
    assert (drawn[:, None] == recent[None]).all(2).any(1).all()
    assert len(np.unique(drawn, axis=0)) > 50


@pytest.mark.parametrize("timesteps", [16, 160])
def test_the_replay_buffer_may_be_nearly_empty_or_full(timesteps: int) -> None:
    model = make(DQN, buffer_size=100)  # 50 steps of 2 environments
    model.learn(timesteps)
    everything = model.replay_buffer.observations[: timesteps // 2].reshape(min(timesteps, 100), -1)
    drawn = recent_replayed(model, 2000, np.random.default_rng(0)).numpy()
    assert np.array_equal(np.unique(drawn, axis=0), np.unique(everything, axis=0))


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_dictionaries_of_observations(algorithm: type[BaseAlgorithm]) -> None:
    env = vector_env("discrete", 2, observation="dict")
    model = make(algorithm, env, policy="FlipoutMultiInputPolicy")
    adapt = AdaptNoise(0.01, every=1)
    model.learn(40, adapt)
    assert math.isfinite(adapt.distance)


# ---- the rule -------------------------------------------------------------------------------------------------------


class Distances(BaseCallback):
    def __init__(self, adapt: AdaptNoise) -> None:
        super().__init__()
        self.adapt = adapt
        self.found: list[float] = []

    def _on_step(self) -> bool:
        self.found.append(self.adapt.distance)
        return True

    def settled(self) -> float:
        """Mean of the distances over the last third of training."""
        return float(np.mean(self.found[-len(self.found) // 3 :]))


FIXED: dict[type[BaseAlgorithm], dict[str, Any]] = {A2C: dict(learning_rate=0.0, n_steps=2), DQN: dict(learning_starts=10_000)}


@pytest.mark.parametrize("initial", [0.02, 50.0])
@pytest.mark.parametrize(
    ("algorithm", "action", "measure", "target"),
    [
        (A2C, "discrete", "kl", 0.02),
        (A2C, "box", "action_distance", 0.1),
        (DQN, "discrete", "kl", 0.01),
        (DQN, "discrete", "disagreement", 0.3),
    ],
)
def test_reaches_the_target_on_a_fixed_network(
    algorithm: type[BaseAlgorithm], action: str, measure: str, target: float, initial: float
) -> None:
    model = make(algorithm, action=action, n_envs=1, **FIXED[algorithm])
    before = parameters(model)
    model.policy.noise_scale = initial
    adapt = AdaptNoise(target, measure, alpha=1.03, every=1, repeats=2 if algorithm is DQN else 4)
    distances = Distances(adapt)
    model.learn(300, [adapt, distances])
    assert distances.settled() == pytest.approx(target, rel=0.1)
    assert abs(math.log(model.policy.noise_scale / initial)) > 1
    assert all(th.equal(a, b) for a, b in zip(before, parameters(model), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("initial", [0.05, 20.0])
@pytest.mark.parametrize(
    ("algorithm", "kwargs", "adapt"),
    [
        (PPO, dict(n_steps=32, batch_size=32), dict(target=0.05, repeats=10)),
        (DQN, dict(learning_starts=100, buffer_size=10_000, batch_size=32), dict(target=0.1, measure="disagreement", every=2)),
    ],
)
def test_reaches_the_target_on_cartpole(
    algorithm: type[BaseAlgorithm], kwargs: dict[str, Any], adapt: dict[str, Any], initial: float
) -> None:
    model = make(algorithm, make_vec_env("CartPole-v1", seed=0), **kwargs)
    model.policy.noise_scale = initial
    callback = AdaptNoise(**adapt)
    distances = Distances(callback)
    model.learn(4000, [callback, distances])
    assert distances.settled() == pytest.approx(adapt["target"], rel=0.1)


def test_the_rule_is_that_of_the_paper() -> None:
    model, adapt = make(DQN, n_envs=1), AdaptNoise(0.01, alpha=1.5, every=3)
    logged: list[tuple[float, float]] = []

    class Log(BaseCallback):
        def _on_step(self) -> bool:
            logged.append((adapt.distance, self.model.policy.noise_scale))
            return True

    model.learn(60, [adapt, Log()])
    scale = 1.0
    for step, (distance, seen) in enumerate(logged, start=1):
        if step % 3 == 0:
            scale = scale * 1.5 if distance < 0.01 else scale / 1.5
        assert seen == pytest.approx(scale)
    values = model.logger.name_to_value
    assert (values["noise/scale"], values["noise/distance"], values["noise/target"]) == (scale, adapt.distance, 0.01)


def test_repeats_apply_the_rule_with_fresh_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RowNoise] = []

    def distance(policy: Any, obs: Any, noise: RowNoise, measure: Any) -> float:
        seen.append(noise)
        return 0.0

    monkeypatch.setattr("sb3_flipout.callbacks.adapt.policy_distance", distance)
    model = make(PPO, n_envs=1)
    model.learn(16, AdaptNoise(1.0, alpha=2.0, repeats=3, batch_size=4))
    assert model.policy.noise_scale == 8.0
    assert [float(noise.scale[0]) for noise in seen] == [1.0, 2.0, 4.0]
    assert len({int(key) for noise in seen for key in noise.keys}) == 12


def test_members_and_rungs_have_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RowNoise] = []
    monkeypatch.setattr("sb3_flipout.callbacks.adapt.policy_distance", lambda p, o, noise, m: seen.append(noise) or 0.0)
    model = make(DQN, n_envs=2, policy_kwargs=dict(net_arch=[8], members=5))
    model.policy.noise_ladder = (0.5, 2.0)
    model.learn(20, AdaptNoise(1.0, alpha=1.0, every=8, batch_size=100))
    assert set(seen[0].keys.tolist()) == set(range(5))
    assert seen[0].scale.tolist() == [0.5, 2.0] * 50


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_on_policy_adapts_at_rollout_starts_and_replay_stays_exact(algorithm: type[BaseAlgorithm]) -> None:
    model, probe, replay = make(algorithm, n_envs=2), ScaleProbe(), ReplayProbe(8 if algorithm is PPO else None)
    model.learn(112, [AdaptNoise(10.0, alpha=2.0, every=2), probe, replay])
    expected = {0: 1, 16: 1, 32: 2, 48: 2, 64: 4, 80: 4, 96: 8}  # the first rollout has nothing to look at before it
    for timesteps, scales in probe.acted:
        assert scales == [expected[timesteps - timesteps % 16]] * 2
    for timesteps, scale in probe.learned:
        assert scale == expected[timesteps - 16]
    assert replay.worst_ratio < 1e-5 < replay.least_effect


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_measuring_changes_nothing(algorithm: type[BaseAlgorithm]) -> None:
    results = []
    for callbacks in (None, AdaptNoise(0.1, alpha=1.0, every=1, repeats=2)):
        model = make(algorithm, VecNormalize(vector_env("discrete", 2)))
        model.learn(96, callbacks)
        state = model.policy.noise_state()
        results.append((parameters(model), state, th.get_rng_state(), np.random.get_state()[1], np.random.get_state()[2]))
    assert callbacks is not None and callbacks._measurements > 4
    (first, *rest), (second, *others) = results
    assert all(th.equal(a, b) for a, b in zip(first, second, strict=True))
    assert rest[0] == others[0]
    assert all(np.array_equal(a, b) for a, b in zip(rest[1:], others[1:], strict=True))


def test_epsilon_may_fall_as_dqn_s_does() -> None:
    adapt, model = AdaptNoise(epsilon=(1.0, 0.1, 0.5)), make(DQN)
    adapt.init_callback(model)
    for remaining, epsilon in ((1.0, 1.0), (0.75, 0.55), (0.5, 0.1), (0.0, 0.1), (-0.1, 0.1)):
        assert adapt.target_at(remaining) == pytest.approx(-math.log(1 - epsilon + epsilon / 4))
    shares = AdaptNoise(epsilon=lambda r: r / 2, measure="disagreement")
    shares.init_callback(model)
    assert shares.target_at(0.5) == pytest.approx(0.25 * 0.75)
    assert AdaptNoise(lambda r: 2 * r).target_at(0.25) == 0.5


def test_stops_at_a_limit_and_says_so() -> None:
    model = make(DQN, n_envs=1)
    adapt = AdaptNoise(100.0, "disagreement", alpha=10.0, every=1)  # more than all observations cannot disagree
    with pytest.warns(UserWarning, match=r"noise scale to its limit 10000 at step .* out of reach") as caught:
        model.learn(30, adapt)
    assert model.policy.noise_scale == 1e4
    assert len(caught) == 1


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        (dict(), ValueError, "give either target or epsilon, got target=None and epsilon=None"),
        (dict(target=0.1, epsilon=0.1), ValueError, "give either target or epsilon"),
        (dict(target=0.0), ValueError, "target must be a finite number > 0"),
        (dict(target=math.nan), ValueError, "target must be a finite number > 0"),
        (dict(target="0.1"), TypeError, "target must be a number"),
        (dict(target=0.1, measure="l2"), ValueError, 'measure must be one of "kl", "action_distance", "disagreement", got'),
        (dict(target=0.1, alpha=0.99), ValueError, "alpha must be a finite number >= 1"),
        (dict(target=0.1, every=0), ValueError, "every must be an integer >= 1"),
        (dict(target=0.1, every=1.5), TypeError, "every must be an integer >= 1, got 1.5 of type float"),
        (dict(target=0.1, repeats=0), ValueError, "repeats must be"),
        (dict(target=0.1, batch_size=True), TypeError, "batch_size must be an integer >= 1, got True of type bool"),
        (dict(epsilon=1.1), ValueError, "epsilon must be a finite number > 0 and <= 1"),
        (dict(epsilon=0.0), ValueError, "epsilon must be"),
        (dict(epsilon=(1.0, 0.1)), ValueError, r"epsilon must be a number, a function, or \(initial, final, fraction\)"),
        (dict(epsilon=(1.0, -0.1, 0.5)), ValueError, r"epsilon\[1\]"),
        (dict(epsilon=(1.0, 0.1, 0.0)), ValueError, r"epsilon\[2\]"),
        (dict(epsilon=0.1, measure="action_distance"), ValueError, "epsilon does not fit .* give target instead"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        AdaptNoise(**kwargs)


@pytest.mark.parametrize(
    ("action", "measure", "fitting"),
    [
        ("box", "kl", '"action_distance"'),
        ("box", "disagreement", '"action_distance"'),
        ("discrete", "action_distance", '"kl", "disagreement"'),
        ("multibinary", "action_distance", '"kl", "disagreement"'),
    ],
)
def test_a_measure_that_does_not_fit_the_actions(action: str, measure: str, fitting: str) -> None:
    model = make(PPO, action=action)
    with pytest.raises(ValueError, match=rf'measure="{measure}" does not fit the action space .*; use {fitting}\.'):
        model.learn(16, AdaptNoise(0.1, measure))
    assert model.num_timesteps == 0


def test_a_scale_of_zero_cannot_be_multiplied() -> None:
    model = make(PPO)
    model.policy.noise_scale = 0.0
    with pytest.raises(ValueError, match=r"AdaptNoise multiplies the noise scale, which is 0.*Set model.policy.noise_scale"):
        model.learn(16, AdaptNoise(0.1))


@pytest.mark.parametrize("bad", [-0.1, math.nan])
@pytest.mark.parametrize("name", ["target", "epsilon"])
def test_a_schedule_that_returns_no_distance(name: str, bad: float) -> None:
    model = make(PPO)
    with pytest.raises(ValueError, match=rf"schedule in {name} must give a finite number >= 0.*, got {bad} at progress_rem"):
        model.learn(16, AdaptNoise(**{name: lambda _: bad}))
    assert model.num_timesteps == 0


def test_broken_weights_leave_the_scale_alone() -> None:
    model, adapt = make(PPO), AdaptNoise(0.1)
    adapt.init_callback(model)
    adapt._observations = obs_as_tensor(np.zeros((256, 5), np.float32), model.device)
    with th.no_grad():
        model.policy.value_net.weight.fill_(0.0)
    adapt._measure = lambda scale: math.nan  # type: ignore[method-assign]
    model._logger = make(PPO).learn(16).logger
    model._total_timesteps = 16
    adapt._adapt()
    assert model.policy.noise_scale == 1.0


def test_rollout_observations_are_those_of_the_last_rollout() -> None:
    model = make(PPO, n_envs=2)
    model.learn(32)
    stored = model.rollout_buffer.observations.reshape(16, -1)
    drawn = recent_rollout(model, 200, np.random.default_rng(0)).numpy()
    assert len(np.unique(drawn, axis=0)) == len(np.unique(stored, axis=0))
