"""Gymnasium's vector environments behind SB3's interface: the same numbers as `DummyVecEnv`, in each way of resetting."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from sb3_flipout.envs.vector import GymnasiumVecEnv

N = 3


class Marked(gym.Wrapper[Any, Any, Any, Any]):
    """Says in its infos what happened, now and then, and ends early at times by a limit."""

    def reset(self, **kwargs: Any) -> Any:
        obs, _ = self.env.reset(**kwargs)
        self.steps = 0
        return obs, {"fresh": 1}

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.steps += 1
        info: dict[str, Any] = {"steps": self.steps} if self.steps % 2 else {}
        return obs, reward, terminated, truncated or self.steps == 15, info


def one(space: str = "box") -> gym.Env[Any, Any]:
    env: Any = Marked(gym.make("CartPole-v1"))
    return gym.wrappers.TransformObservation(
        env, lambda obs: {"a": obs, "b": obs[:2]}, gym.spaces.Dict(a=env.observation_space, b=gym.spaces.Box(-9, 9, (2,)))
    ) if space == "dict" else env  # fmt: skip


def pair(mode: AutoresetMode, space: str = "box") -> tuple[GymnasiumVecEnv, DummyVecEnv]:
    ours = GymnasiumVecEnv(SyncVectorEnv([lambda: one(space)] * N, autoreset_mode=mode))
    theirs = DummyVecEnv([lambda: one(space)] * N)
    for env in (ours, theirs):
        env.seed(7)
    return ours, theirs


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return bool(np.array_equal(a, b))


@pytest.mark.parametrize("space", ["box", "dict"])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_it_is_a_dummy_vec_env(mode: AutoresetMode, space: str) -> None:
    ours, theirs = pair(mode, space)
    assert same(ours.reset(), theirs.reset()) and ours.reset_infos == theirs.reset_infos
    generator, ends = np.random.default_rng(0), 0
    for _ in range(200):
        actions = generator.integers(0, 2, N)
        (obs, rewards, dones, infos), (obs_2, rewards_2, dones_2, infos_2) = ours.step(actions), theirs.step(actions)
        assert same(obs, obs_2) and np.array_equal(rewards, rewards_2) and np.array_equal(dones, dones_2)
        for info, info_2 in zip(infos, infos_2, strict=True):
            info_2 = dict(info_2)
            if "terminal_observation" not in info_2:
                assert info_2.pop("TimeLimit.truncated") is False  # DummyVecEnv says it in every step
            assert same(info, info_2)
        assert ours.reset_infos == theirs.reset_infos
        ends += int(dones.sum())
    assert ends > 20


@pytest.mark.parametrize("space", ["box", "dict"])
def test_where_it_resets_with_the_next_step_there_is_one_step_more(space: str) -> None:
    """Episode by episode the same as alone, and then a step of reward 0 that stays where it was."""
    ours, _ = pair(AutoresetMode.NEXT_STEP, space)
    alone = [one(space) for _ in range(N)]
    expected = [env.reset(seed=7 + i)[0] for i, env in enumerate(alone)]
    obs, over, generator, ends = ours.reset(), [False] * N, np.random.default_rng(0), 0
    limits = [False] * N
    for _ in range(200):
        actions = generator.integers(0, 2, N)
        before = obs
        obs, rewards, dones, infos = ours.step(actions)
        for i, env in enumerate(alone):
            of_env = {name: part[i] for name, part in obs.items()} if space == "dict" else obs[i]
            last = {name: part[i] for name, part in before.items()} if space == "dict" else before[i]
            assert dones[i] == over[i]
            if over[i]:
                expected[i] = env.reset()[0]
                assert rewards[i] == 0 and same(infos[i]["terminal_observation"], last)
                assert infos[i]["TimeLimit.truncated"] is limits[i] and ours.reset_infos[i] == {"fresh": 1}
                over[i], ends = False, ends + 1
            else:
                expected[i], reward, terminated, truncated, _ = env.step(actions[i])
                over[i], limits[i] = terminated or truncated, truncated and not terminated
                assert rewards[i] == reward and "terminal_observation" not in infos[i]
            assert same(of_env, expected[i])
    assert ends > 20


def test_a_thousand_environments_for_one_call() -> None:
    env = VecMonitor(GymnasiumVecEnv(gym.make_vec("CartPole-v1", 1024, vectorization_mode="vector_entry_point")))
    model = PPO("FlipoutMlpPolicy", env, n_steps=8, batch_size=1024, n_epochs=1, seed=0, device="cpu").learn(3 * 8192)
    lengths = [info["l"] for info in model.ep_info_buffer]
    assert len(lengths) == 100 and all(info["r"] == info["l"] - 1 for info in model.ep_info_buffer)
    mean, _ = evaluate_policy(model, env, 20)
    assert mean > 8


def test_seeds_normalisation_and_continuous_actions() -> None:
    made = []
    for _ in range(2):
        env = GymnasiumVecEnv(gym.make_vec("Pendulum-v1", 2, vectorization_mode="sync"))
        model = SAC("FlipoutMlpPolicy", VecNormalize(env), learning_starts=20, seed=3, device="cpu").learn(60)
        made.append(model.predict(np.zeros(3, dtype=np.float32), deterministic=True)[0])
    assert np.array_equal(made[0], made[1])


def test_attributes_and_methods() -> None:
    ours, _ = pair(AutoresetMode.SAME_STEP)
    ours.reset()
    assert ours.get_attr("steps") == [0] * N and ours.get_attr("steps", [1]) == [0]
    ours.set_attr("steps", 4, [0, 2])
    assert ours.get_attr("steps") == [4, 0, 4]
    assert ours.env_method("get_wrapper_attr", "steps", indices=2) == [4]
    ours.env_method("set_wrapper_attr", "steps", 9, indices=[1])
    assert ours.get_attr("steps") == [4, 9, 4] and ours.env_method("get_wrapper_attr", "steps") == [4, 9, 4]
    assert ours.env_is_wrapped(Marked) == [False] * N
    whole = GymnasiumVecEnv(gym.make_vec("CartPole-v1", N, vectorization_mode="vector_entry_point"))
    assert whole.get_attr("gravity") == [9.8] * N
    whole.set_attr("gravity", 5.0)
    assert whole.get_attr("gravity", 1) == [5.0]
    with pytest.raises(ValueError, match=r"indices=1 names 1 of 3 environments, and .* has one gravity for all of them"):
        whole.set_attr("gravity", 4.0, 1)
    whole.close()


def test_methods_that_are_called_for_all_say_so_once() -> None:
    ours = GymnasiumVecEnv(gym.vector.AsyncVectorEnv([one] * 2))
    whole = GymnasiumVecEnv(gym.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point"))
    for env, name, args in ((ours, "set_wrapper_attr", ("steps", 9)), (whole, "close", ())):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert env.env_method(name, *args) == [True if env is ours else None] * 2
        with pytest.warns(UserWarning, match=rf"calls {name} for all 2 environments; indices=\[0\] chooses") as told:
            assert len(env.env_method(name, *args, indices=[0])) == 1
            env.env_method(name, *args, indices=[1])
        assert len(told) == 1 and told[0].filename == __file__
        env.close()


def test_wrappers_of_vector_environments_are_looked_through() -> None:
    many = gym.wrappers.vector.RecordEpisodeStatistics(SyncVectorEnv([one] * N, autoreset_mode=AutoresetMode.SAME_STEP))
    ours = GymnasiumVecEnv(many)
    ours.reset()
    ours.set_attr("steps", 4, [0, 2])
    assert ours.get_attr("steps") == [4, 0, 4] and ours.env_method("get_wrapper_attr", "steps", indices=[1]) == [0]
    whole = GymnasiumVecEnv(
        gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("CartPole-v1", N, vectorization_mode="vector_entry_point"))
    )
    whole.set_attr("gravity", 5.0)
    assert whole.get_attr("gravity") == [5.0] * N and whole.env.unwrapped.gravity == 5.0
    assert whole.get_attr("episode_count") == [0] * N
    with pytest.raises(AttributeError, match="RecordEpisodeStatistics"):
        whole.get_attr("weight_of_the_pole")
    whole.set_attr("weight_of_the_pole", 2)
    assert whole.get_attr("weight_of_the_pole") == [2] * N and whole.env.weight_of_the_pole == 2


def test_what_is_no_vector_environment_is_refused() -> None:
    with pytest.raises(TypeError, match="env must be a gymnasium VectorEnv, got DummyVecEnv"):
        GymnasiumVecEnv(make_vec_env("CartPole-v1"))  # type: ignore[arg-type]
    env = gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")
    env.metadata = {**env.metadata, "autoreset_mode": "sometimes"}
    with pytest.raises(ValueError, match=r"must be one of gymnasium's AutoresetMode .*got 'sometimes'"):
        GymnasiumVecEnv(env)
