"""NoiseEvalCallback: what each way of acting sees, what is logged and saved, and when it warns."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import vector_env
from probes import make, parameters
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_flipout.callbacks import AnnealNoise, NoiseEvalCallback
from sb3_flipout.callbacks.evaluate import ARMS, _Sampled
from sb3_flipout.diagnostics.lag import LagTest, best_lags, excelling, mean_lags, student_tail
from sb3_flipout.layers import Ask

MEMBERS = dict(policy_kwargs=dict(net_arch=[16], members=5, prior_scale=1.0))


class Sized(gym.Env):
    """Pays the size of the action, for five steps: a policy of mean weights 0 gets nothing, a perturbed one something."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t = 0
        return np.array([0.5, 1.0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        info = {"is_success": bool(abs(action[0]) > 0)}
        return np.array([0.5, 1.0], np.float32), float(abs(action[0])), self.t >= 5, False, info


def sized(n_envs: int = 1) -> VecEnv:
    return DummyVecEnv([lambda: Monitor(Sized())] * n_envs)


def silent() -> BaseAlgorithm:
    """PPO whose mean weights choose the action 0, and stay there."""
    model = make(PPO, env=sized(2), learning_rate=0.0)
    for mean in (model.policy.action_net.weight, model.policy.action_net.bias):
        th.nn.init.zeros_(mean)
    return model


class Remember(KVWriter):
    """Keeps all that is written."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.rows.append((step, dict(key_values)))

    def close(self) -> None:
        pass


def evaluate(model: BaseAlgorithm, steps: int, *others: BaseCallback, **kwargs: Any) -> tuple[NoiseEvalCallback, Remember]:
    memory = Remember()
    model.set_logger(Logger(None, [memory]))
    settings = dict(eval_env=sized(2), eval_freq=8, n_eval_episodes=4, verbose=0) | kwargs
    callback = NoiseEvalCallback(**settings)
    model.learn(steps, callback=CallbackList([*others, callback]))
    return callback, memory


def evaluations(memory: Remember) -> list[dict[str, Any]]:
    return [row for _, row in memory.rows if "noise_eval/lag" in row]


# ---- how each acts --------------------------------------------------------------------------------------------------


def test_mean_and_sampled_weights_are_told_apart() -> None:
    callback, memory = evaluate(silent(), 32, eval_freq=5)  # not where rollouts end and SB3 writes its own
    rows = evaluations(memory)
    assert [step for step, row in memory.rows if "noise_eval/lag" in row] == [10, 20, 30]
    assert callback.returns["mean"] == [0.0] * 3
    for row, sampled in zip(rows, callback.returns["sampled"], strict=True):
        assert row["noise_eval/mean/return"] == row["eval/mean_reward"] == 0.0 < row["noise_eval/sampled/return"]
        assert row["noise_eval/sampled/return"] == row["noise_eval/lag"] == sampled
        assert row["noise_eval/mean/ep_length"] == row["noise_eval/sampled/ep_length"] == 5
        assert row["noise_eval/mean/success_rate"] == 0.0 and row["noise_eval/sampled/success_rate"] == 1.0


class Watched(NoiseEvalCallback):
    """Notes the noise of each prediction."""

    def _init_callback(self) -> None:
        super()._init_callback()
        self.noises: list[Any] = []
        policy, original = self._policy, type(self.model).predict

        def predict(*args: Any, **kwargs: Any) -> Any:
            self.noises.append(policy.perturbed_network.active)
            return original(self.model if not hasattr(self.model, "_model") else self.model._model, *args, **kwargs)

        self.model.predict = predict


@pytest.mark.parametrize(("algorithm", "kwargs"), [(PPO, {}), (DQN, {}), (DQN, MEMBERS)], ids=["ppo", "dqn", "members"])
def test_sampled_weights_are_held_for_an_episode(algorithm: type[BaseAlgorithm], kwargs: dict[str, Any]) -> None:
    class Fixed(Sized):
        action_space = spaces.Discrete(3)

        def step(self, action: Any) -> Any:
            return super().step(np.array([action], np.float32))

    env = DummyVecEnv([lambda: Monitor(Fixed())] * 2)
    callback = Watched(env, n_eval_episodes=4, eval_freq=8, verbose=0)
    model = make(algorithm, env=DummyVecEnv([lambda: Monitor(Fixed())] * 2), **kwargs)
    model.learn(16, callback=callback)
    arms = 3 if kwargs else 2
    assert len(callback.noises) >= 10 * arms
    sampled, last = callback.noises[:10], callback.noises[10 * (arms - 1) : 10 * arms]
    assert all(noise is Ask.MEAN_WEIGHTS for noise in last)  # the mean weights, by which the best is told, come last
    assert all(noise is None for noise in callback.noises[10 : 10 * (arms - 1)])  # the vote: the policy's own way
    keys = [noise.keys.tolist() for noise in sampled]
    assert keys[:5] == [keys[0]] * 5 and keys[5:] == [keys[5]] * 5
    assert all(noise.scale.tolist() == [1.0, 1.0] for noise in sampled)
    if kwargs:
        assert {key for pair in keys for key in pair} <= set(range(5))
    else:
        assert len({*keys[0], *keys[5]}) == 4


def test_a_shared_draw_is_fresh_for_each_episode_and_training_keeps_its_own() -> None:
    model = make(DQN, policy_kwargs=dict(net_arch=[16], noise_sharing="shared", family="factorised", schedule="constant"))
    model.learn(40)
    layers = model.policy.online.perturbed_network.layers
    acting = [layer.bases()[1]["weight_base"] for layer in layers]
    arm = _Sampled(model, None, model.get_env())
    obs, seen = model.env.reset(), []
    for ended in (None, None, 0, 1):  # the second environment's end changes nothing
        if ended is not None:
            arm.end_episode(ended)
        with arm.weights(2):
            seen.append(model.policy.q_net(th.as_tensor(obs)).detach())
    assert th.equal(seen[0], seen[1]) and th.equal(seen[2], seen[3]) and not th.equal(seen[1], seen[2])
    assert all(layer.bases()[1]["weight_base"] is base for layer, base in zip(layers, acting, strict=True))


def test_the_vote_is_what_the_policy_does() -> None:
    env = vector_env("discrete", 2, seed=5)
    callback, _ = evaluate(make(DQN, **MEMBERS), 16, eval_env=env, best_by="vote", warn=False)
    assert set(callback.returns) == {"mean", "sampled", "vote"}
    again = vector_env("discrete", 2, seed=5)
    for _ in range(2):  # what the two before it played
        evaluate_policy(callback.model, again, 4, warn=False)
    # Episodes of this environment do not depend on the actions, so the same ones come third.
    assert callback.returns["vote"][0] == pytest.approx(evaluate_policy(callback.model, again, 4, warn=False)[0])


def test_a_vote_has_no_chance_in_it_whatever_deterministic_says() -> None:
    """With epsilon at 1, `predict(deterministic=False)` would act at random."""
    model = make(DQN, **MEMBERS)
    model.exploration_rate = 1.0
    obs = np.random.default_rng(0).uniform(-1, 1, (64, 5)).astype(np.float32)
    arm, start = ARMS["vote"](model, None, model.get_env()), np.ones(64, dtype=bool)
    voted, asked = (arm.predict(obs, None, start, deterministic)[0] for deterministic in (True, False))
    np.testing.assert_array_equal(voted, asked)
    np.testing.assert_array_equal(voted, model.predict(obs, deterministic=True)[0])


class SplitInLives(gym.Wrapper):
    """Ends an episode at each third step, as wrappers do that make one of each life; the game inside goes on."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.over = terminated or truncated
        return obs, reward, terminated or self.unwrapped.t % 3 == 0, truncated, info

    def reset(self, **kwargs: Any) -> Any:
        over, self.over = getattr(self, "over", True), False
        return self.env.reset(**kwargs) if over else (np.array([0.5, 1.0], np.float32), {})


def test_lives_that_a_wrapper_makes_episodes_of_are_none() -> None:
    """evaluate_policy counts what the Monitor inside reports, and one draw of the weights lasts as long."""
    env = DummyVecEnv([lambda: SplitInLives(Monitor(Sized()))] * 2)
    callback = Watched(env, n_eval_episodes=4, eval_freq=8, verbose=0)
    silent().learn(16, callback=callback)
    assert [len(played) for played in callback._episodes["sampled"]] == [4]
    assert np.mean(callback._episodes["sampled"][0]) == pytest.approx(callback.returns["sampled"][0])
    keys = [noise.keys.tolist() for noise in callback.noises[:10]]
    assert keys[:5] == [keys[0]] * 5 and keys[5:] == [keys[5]] * 5 and keys[0] != keys[5]


# ---- what is saved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best_by", ["mean", "sampled"])
def test_the_best_is_told_by_the_named_one(best_by: str, tmp_path: Path) -> None:
    callback, memory = evaluate(silent(), 64, best_by=best_by, log_path=str(tmp_path), best_model_save_path=str(tmp_path))
    assert callback.best_mean_reward == max(callback.returns[best_by])
    assert [row["eval/mean_reward"] for row in evaluations(memory)] == callback.returns[best_by]
    assert (tmp_path / "best_model.zip").exists()
    other = "sampled" if best_by == "mean" else "mean"
    for name, path in ((best_by, tmp_path), (other, tmp_path / other)):
        with np.load(path / "evaluations.npz") as stored:
            assert stored["timesteps"].tolist() == [16, 32, 48, 64] and stored["ep_lengths"].shape == (4, 4)
            assert stored["results"].mean(1) == pytest.approx(callback.returns[name])
            assert stored["successes"].all() == (name == "sampled")
    assert not (tmp_path / best_by / "evaluations.npz").exists()


def test_children_and_the_model_are_those_of_evalcallback(tmp_path: Path) -> None:
    class Child(BaseCallback):
        calls = 0

        def _on_step(self) -> bool:
            assert self.model is model and isinstance(self.parent, NoiseEvalCallback)
            self.calls += 1
            return self.calls < 2

    best, after, model = Child(), Child(), silent()
    evaluate(model, 64, callback_on_new_best=best, callback_after_eval=after)
    assert (best.calls, after.calls) == (1, 2)  # the return stays 0; the second call ended training
    assert model.num_timesteps == 32


def test_statistics_of_normalisation_are_shared() -> None:
    model = make(PPO, env=VecNormalize(vector_env("box", 2)))
    env = VecNormalize(vector_env("box", 1), training=False)
    evaluate(model, 32, eval_env=env, warn=False)
    assert env.obs_rms.count > 10 and np.array_equal(env.obs_rms.mean, model.get_env().obs_rms.mean)


class Nothing(BaseCallback):
    def _on_step(self) -> bool:
        return True


# Untrained mean weights may well prefer a worse action than most members do: whether they lag is not the question here.
@pytest.mark.filterwarnings("ignore:the mean weights lag behind the sampled ones:UserWarning")
@pytest.mark.parametrize(("algorithm", "kwargs"), [(PPO, {}), (A2C, {}), (DQN, {}), (DQN, MEMBERS)])
def test_training_is_bit_for_bit_the_same(algorithm: type[BaseAlgorithm], kwargs: dict[str, Any]) -> None:
    env = vector_env("discrete", 3)
    with_it = make(algorithm, **kwargs).learn(96, callback=NoiseEvalCallback(env, eval_freq=5, verbose=0, warn=False))
    without = make(algorithm, **kwargs).learn(96, callback=Nothing())
    assert all(th.equal(a, b) for a, b in zip(parameters(with_it), parameters(without), strict=True))
    assert with_it.policy.noise_state() == without.policy.noise_state()


# ---- when the mean weights lag --------------------------------------------------------------------------------------


def test_it_warns_once_that_the_mean_weights_lag() -> None:
    with pytest.warns(UserWarning) as caught:
        callback, _ = evaluate(silent(), 320)
    (warning,) = caught
    text = str(warning.message)
    assert len(callback.returns["mean"]) == 20
    n = int(re.search(r"last (\d+) evaluations", text)[1])
    assert n in (5, 10) and f"up to step {16 * n}, their mean return is 0, that of perturbed weights " in text
    assert f"{np.mean(callback.returns['sampled'][:n]):.4g}, and " in text and "AnnealNoise(start=1, end=0.0)" in text


@pytest.mark.slow
def test_it_warns_where_perturbed_policies_alone_reach_the_goal() -> None:
    """MountainCarContinuous under constant noise: the mean weights stand still, at 0, where perturbed ones reach the goal."""
    name, kwargs = "MountainCarContinuous-v0", dict(sigma_init=1.0, resample="episode", schedule="constant")
    settings = dict(n_steps=256, batch_size=256, gamma=0.9999, gae_lambda=0.9, clip_range=0.1, ent_coef=0.004, vf_coef=0.19)
    env = VecNormalize(make_vec_env(name, n_envs=4, seed=0))
    model = PPO("FlipoutMlpPolicy", env, max_grad_norm=5, seed=0, device="cpu", policy_kwargs=kwargs, **settings)
    eval_env = VecNormalize(make_vec_env(name, n_envs=8, seed=100), training=False, norm_reward=False)
    callback = NoiseEvalCallback(eval_env, eval_freq=1_000, n_eval_episodes=8, verbose=0)
    with pytest.warns(UserWarning, match="the mean weights lag behind the sampled ones"):
        model.learn(40_000, callback=callback)
    assert max(callback.returns["mean"]) < 1
    assert sum(one > 10 for played in callback._episodes["sampled"] for one in played) >= 8


def test_it_does_not_warn_while_the_noise_is_annealed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback, _ = evaluate(silent(), 160, AnnealNoise(1.0, 0.5))
    assert min(callback.returns["sampled"]) > 0 == max(callback.returns["mean"])


class Chosen(Sized):
    """Pays the number of the action: mean weights of 0 choose the first of four."""

    action_space: Any = spaces.Discrete(4)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return super().step(np.array([action], np.float32))


@pytest.mark.parametrize(("members", "warns"), [(None, True), (5, False)])
def test_members_whose_vote_acts_are_not_told_to_lose_their_noise(members: int | None, warns: bool) -> None:
    env = DummyVecEnv([lambda: Monitor(Chosen())] * 2)
    noise = dict(net_arch=[8], members=members, schedule="constant", resample="episode")
    model = make(DQN, env=env, learning_rate=0.0, policy_kwargs=noise)
    for parameter in (model.q_net.q_net[-1].weight, model.q_net.q_net[-1].bias):
        th.nn.init.zeros_(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback, _ = evaluate(model, 320, eval_env=DummyVecEnv([lambda: Monitor(Chosen())]))
    assert min(callback.returns["sampled"]) > 0 == max(callback.returns["mean"])
    assert any("the mean weights lag" in str(one.message) for one in caught) is warns


def lags(mean: Any, sampled: Any) -> bool:
    """The rule of averages on one episode in each evaluation, at 99.9 %."""
    return mean_lags([[one] for one in mean], [[one] for one in sampled], 0.001)


def best(mean: Any, sampled: Any) -> bool:
    """The rule of the best, at 99.9 %."""
    return best_lags(mean, sampled, 0.001)


def test_the_rule() -> None:
    assert lags([0.0] * 5, [90.0] * 5)
    assert not lags([90.0] * 5, [0.0] * 5)
    assert not lags([5.0] * 5, [5.0] * 5)
    assert not lags([0.0] * 5, [0.0, 0.0, 0.0, 0.0, 90.0])  # one lucky evaluation: t = 1
    assert not lags([500.0] * 5, [505.0] * 5)  # significant, but a hundredth
    assert lags([-200.0] * 5, [-100.0, -110.0, -90.0, -100.0, -105.0])
    # Differences 1, 2, 3, 4, 5, ...: t = 3 / (sqrt(2.5) / sqrt(5)) = 4.24 at 5, where 7.17 is needed; 5.74 at 10 (4.30).
    rising = [float(i) for i in range(1, 11)]
    assert not lags([0.0] * 5, rising[:5]) and lags([0.0] * 10, rising)


def test_tail_of_student_s_t() -> None:
    for t, freedom in ((318.31, 1), (7.173, 4), (5.893, 5), (5.208, 6), (4.785, 7), (4.501, 8), (4.297, 9)):  # tables: 99.9 %
        assert student_tail(t, freedom) == pytest.approx(0.001, rel=2e-3)
    assert student_tail(0.0, 7) == student_tail(0.0, 8) == 0.5


def test_looks_are_every_fifth_and_become_stricter() -> None:
    still, moved = [[0.0]] * 40, [[89.0], [91.0], [90.0], [90.0]] * 10
    test = LagTest()
    assert [n for n in range(1, 41) if test.look(still[:n], moved[:n])] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [LagTest.window(n) for n in (5, 10, 15, 20, 25, 40)] == [5, 10, 10, 10, 12, 20]
    # Averages 0, and 1 to 10: t = 5.74, a chance of 0.00014. No perturbed episode is the best.
    even, rising = [[100.0, -100.0]] * 10, [[number + 50.0, number - 50.0] for number in range(1, 11)]
    once, later = LagTest(), LagTest()
    assert once.look(even, rising)  # 0.00025 at the first look
    for _ in range(2):
        later.look(even, even)
    assert not later.look(even, rising)  # 0.00004 at the third


def test_chance_alone_warns_in_one_training_of_a_thousand_however_long() -> None:
    """300 trainings of 100 evaluations under equal laws: at most 0.3 expected; more than 5 has a probability of 8e-7."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(300):
        test, (mean, sampled) = LagTest(), rng.exponential(1.0, (2, 100, 4)).tolist()
        found += any(test.look(mean[:n], sampled[:n]) for n in range(1, 101))
    assert found <= 5


@pytest.mark.parametrize("monitored", [True, False])
def test_episodes_are_those_that_the_returns_are_of(monitored: bool) -> None:
    env = make_vec_env("CartPole-v1", n_envs=2) if monitored else DummyVecEnv([lambda: gym.make("CartPole-v1")] * 2)
    callback = NoiseEvalCallback(env, n_eval_episodes=4, eval_freq=8, verbose=0, warn=False)
    make(PPO, env=make_vec_env("CartPole-v1", n_envs=2)).learn(32, callback)
    assert len(callback.returns["mean"]) == 2
    for name, played in callback._episodes.items():
        assert [len(episodes) for episodes in played] == [4, 4]
        assert [np.mean(episodes) for episodes in played] == pytest.approx(callback.returns[name])


def test_what_excels() -> None:
    assert excelling([0.0, 90.0], [95.0, 99.0, 101.0, -5.0]) == [101.0]  # by a tenth of the larger
    assert excelling([-200.0], [-150.0, -190.0]) == [-150.0]


def test_the_rule_of_the_best() -> None:
    still, mixed = [[0.0] * 8] * 10, [[-40.0] * 6 + [90.0] * 2] * 10  # a quarter succeed, and the others cost as much
    assert np.mean(mixed) < 0 and best(still, mixed) and not lags([0.0] * 10, [float(np.mean(x)) for x in mixed])
    assert not best(still[:9], mixed[:9])  # too few evaluations
    assert not best(still, [[-40.0] * 8] * 10)  # none succeeds
    assert not best(mixed, mixed)
    assert not best([*still[:9], [0.0] * 7 + [90.0]], mixed)  # the mean weights can do it too
    assert not best(still, [*[[-40.0] * 8] * 9, [-40.0, 90.0] * 4])  # less than a tenth of the episodes
    rare = [[-40.0] * 19 + [90.0]] * 10  # 10 of 200: not by chance, but few
    assert not best([[0.0] * 20] * 10, rare) and best([[0.0] * 20] * 10, [[*one[:18], 90.0, 90.0] for one in rare])
    improving = [[10.0 * number] * 8 for number in range(10)]
    assert not best(improving, [[-40.0] * 6 + [150.0] * 2] * 10)
    assert not best([[0.0]] * 10, [[-40.0]] * 5 + [[90.0]] * 5)  # five of ten: chance makes so many once in 61 times


def test_chance_alone_does_not_make_the_best_rule_warn() -> None:
    """Equal laws: each warns with a probability of 0.001 at most, so more than 7 of 600 do once in 4 million times."""
    rng = np.random.default_rng(0)
    found = [best(*rng.exponential(1.0, (2, 10, 8)).tolist()) for _ in range(600)]
    assert sum(found) <= 7


@pytest.mark.parametrize("n", [5, 10])
def test_chance_alone_warns_once_in_a_thousand_times(n: int) -> None:
    """20,000 pairs of equal laws: at most 20 expected; more than 50 has a probability below 1e-6 (Poisson: 2e-8)."""
    draws = np.random.default_rng(0).normal(size=(20_000, 2, n))
    found = sum(lags(mean, sampled) for mean, sampled in draws)
    assert 3 <= found <= 50  # and less than 3 has one below 1e-6 too


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(best_by="median"), 'best_by must be one of "mean", "sampled", "vote", got \'median\''),
        (dict(best_by=None), "best_by"),
    ],
)
def test_unknown_names_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NoiseEvalCallback(sized(), **kwargs)


def test_votes_without_members_are_refused() -> None:
    with pytest.raises(ValueError, match="needs members that vote, this policy has none"):
        make(DQN).learn(8, callback=NoiseEvalCallback(vector_env("discrete", 1), best_by="vote"))


def test_stock_policies_are_refused() -> None:
    model = PPO("MlpPolicy", sized(), n_steps=8, batch_size=8, device="cpu")
    with pytest.raises(ValueError, match="NoiseEvalCallback needs a flipout policy"):
        model.learn(8, callback=NoiseEvalCallback(sized()))


def test_it_is_an_evalcallback() -> None:
    assert isinstance(NoiseEvalCallback(sized(), eval_freq=7, n_eval_episodes=3), EvalCallback)
