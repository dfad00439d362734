"""The chain: hand-checked transitions, episode length, optimal return, and the odds of random exploration."""

import importlib
import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gym_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import sb3_flipout.envs
from sb3_flipout.envs import Chain

LEFT, RIGHT = 0, 1


def rollout(env: Chain, actions: list[int]) -> tuple[float, bool, int]:
    """Return, reached_goal and number of steps of one episode; actions past its end are left out."""
    env.reset()
    total, reached, steps = 0.0, False, 0
    for action in actions:
        _, reward, terminated, truncated, info = env.step(action)
        total, reached, steps = total + reward, info["reached_goal"], steps + 1
        if terminated or truncated:
            break
    return total, reached, steps


def random_goal_probability(length: int) -> float:
    """Exact chance that uniformly random actions enter the last state within an episode, by dynamic programming."""
    occupancy = np.zeros(length)
    occupancy[1] = 1.0
    absorbed = 0.0
    for _ in range(length + 9):
        following = np.zeros(length)
        following[0] += 0.5 * occupancy[0]
        following[:-1] += 0.5 * occupancy[1:]
        following[1:] += 0.5 * occupancy[:-1]
        absorbed += following[-1]
        following[-1] = 0.0
        occupancy = following
    return float(absorbed)


@pytest.mark.parametrize("length", [3, 10, 50])
def test_env_checkers_pass(length: int) -> None:
    env = gym.make("sb3_flipout/Chain-v0", length=length).unwrapped
    assert isinstance(env, Chain) and env.length == length
    gym_check_env(env, skip_render_check=True)
    sb3_check_env(env)


def test_registration_is_idempotent_and_adds_no_time_limit() -> None:
    before = gym.registry["sb3_flipout/Chain-v0"]
    importlib.reload(sb3_flipout.envs)
    assert gym.registry["sb3_flipout/Chain-v0"] is before
    assert before.max_episode_steps is None


def test_reset_starts_in_second_state() -> None:
    obs, info = Chain(length=5).reset()
    np.testing.assert_array_equal(obs, np.array([1, 1, 0, 0, 0], dtype=np.float32))
    assert obs.dtype == np.float32
    assert info == {"reached_goal": False}


def test_hand_checked_transitions() -> None:
    # (action, position after it, reward, reached_goal) in a chain of four states, from s_2.
    script = [
        (LEFT, 1, 0.0, False),  # arriving at s_1 pays nothing
        (LEFT, 1, 0.001, False),  # staying there does
        (RIGHT, 2, 0.0, False),  # leaving does not
        (RIGHT, 3, 0.0, False),
        (RIGHT, 4, 0.0, True),  # arriving at s_N pays nothing but counts as reached
        (RIGHT, 4, 1.0, True),
        (LEFT, 3, 0.0, True),  # reached_goal stays
        (LEFT, 2, 0.0, True),
        (LEFT, 1, 0.0, True),
        (LEFT, 1, 0.001, True),
    ]
    env = Chain(length=4)
    env.reset()
    for action, position, reward, reached in script:
        obs, got, terminated, truncated, info = env.step(action)
        np.testing.assert_array_equal(obs, [1.0] * position + [0.0] * (4 - position))
        assert (got, terminated, truncated, info["reached_goal"]) == (reward, False, False, reached)


@pytest.mark.parametrize("length", [3, 7, 40])
def test_episode_is_truncated_after_length_plus_nine_steps(length: int) -> None:
    env = Chain(length=length)
    env.reset()
    ends = [env.step(LEFT)[2:4] for _ in range(length + 9)]
    assert ends == [(False, False)] * (length + 8) + [(False, True)]


@pytest.mark.parametrize("length", [3, 10, 100])
def test_always_right_reaches_the_goal_and_returns_eleven(length: int) -> None:
    env = Chain(length=length)
    assert rollout(env, [RIGHT] * 1000) == (11.0, True, length + 9)
    assert env.goal_return == 11.0


def test_goal_return_is_the_best_of_all_action_sequences() -> None:
    env = Chain(length=3)
    best = max(rollout(env, list(actions))[0] for actions in itertools.product((LEFT, RIGHT), repeat=12))
    assert best == env.goal_return


@pytest.mark.parametrize("length", [10, 30])
def test_always_left_gets_only_the_small_reward(length: int) -> None:
    total, reached, _ = rollout(Chain(length=length), [LEFT] * 1000)
    assert total == pytest.approx(0.001 * (length + 8))
    assert reached is False


def test_goal_flag_is_cleared_by_reset() -> None:
    env = Chain(length=3)
    assert rollout(env, [RIGHT])[1] is True
    assert env.reset()[1]["reached_goal"] is False
    assert env.step(LEFT)[4]["reached_goal"] is False


def test_random_goal_probability_exactly_on_all_sequences() -> None:
    env = Chain(length=4)
    reached = sum(rollout(env, list(actions))[1] for actions in itertools.product((LEFT, RIGHT), repeat=13))
    assert reached / 2**13 == pytest.approx(random_goal_probability(4), abs=1e-12)


def test_random_policy_matches_dynamic_programming() -> None:
    # Hoeffding: P(|frequency - p| >= t) <= 2 exp(-2 n t^2), so this t has a false-fail rate of at most 1e-6.
    episodes, false_fail = 4000, 1e-6
    tolerance = math.sqrt(math.log(2 / false_fail) / (2 * episodes))
    env, rng = Chain(length=7), np.random.default_rng(0)
    actions = rng.integers(0, 2, size=(episodes, env.episode_steps))
    frequency = np.mean([rollout(env, row.tolist())[1] for row in actions])
    assert abs(frequency - random_goal_probability(7)) < tolerance


@pytest.mark.parametrize("length", [2, 0, -4])
def test_short_chains_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"length must be an integer >= 3, got {length}\. Pass for example length=20"):
        Chain(length=length)


@pytest.mark.parametrize("length", [10.0, "10", None, True])
def test_length_of_the_wrong_type_is_refused(length: object) -> None:
    with pytest.raises(TypeError, match="length must be an integer >= 3"):
        Chain(length=length)  # type: ignore[arg-type]


@pytest.mark.parametrize("action", [2, -1, 0.5, "right", np.array([1])])
def test_action_outside_the_space_is_refused(action: object) -> None:
    env = Chain()
    env.reset()
    with pytest.raises(ValueError, match="action must be 0 or 1 as a scalar integer"):
        env.step(action)  # type: ignore[arg-type]


def test_step_without_a_running_episode_is_refused() -> None:
    env = Chain(length=3)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(RIGHT)
    rollout(env, [RIGHT] * 12)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(RIGHT)
