"""DeepSea: hand-checked transitions, action mapping, optimal return, noise of the stochastic variant."""

import itertools
import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gym_check_env
from stable_baselines3 import DQN
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from sb3_flipout.envs import DeepSea

LEFT, RIGHT = 0, 1
NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)


def rollout(env: DeepSea, directions: list[int]) -> tuple[float, bool]:
    """Return and reached_goal of an episode whose moves are given as directions, whatever the action mapping."""
    mapping = env.action_mapping
    env.reset()
    total, reached, column = 0.0, False, 0
    for row, direction in enumerate(directions):
        action = int(mapping[row, column]) if direction == RIGHT else 1 - int(mapping[row, column])
        obs, reward, terminated, _, info = env.step(action)
        total, reached = total + reward, info["reached_goal"]
        assert terminated == (row == env.size - 1)
        column = int(obs.reshape(env.size, env.size).sum(axis=0).argmax())
    return total, reached


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("mapping_seed", [None, 3])
def test_env_checkers_pass(flatten: bool, deterministic: bool, mapping_seed: int | None) -> None:
    kwargs = {"flatten": flatten, "deterministic": deterministic, "mapping_seed": mapping_seed}
    env = gym.make("sb3_flipout/DeepSea-v0", size=5, **kwargs).unwrapped
    assert isinstance(env, DeepSea) and env.spec is not None and env.spec.max_episode_steps is None
    gym_check_env(env, skip_render_check=True)
    # SB3 warns that a two-dimensional observation is unusual; it supports it all the same.
    sb3_check_env(env, warn=flatten)


@pytest.mark.parametrize("deterministic", [True, False])
def test_integer_observations_are_the_one_hot_ones(deterministic: bool) -> None:
    envs = [DeepSea(6, mapping_seed=3, deterministic=deterministic, integer_observations=chosen) for chosen in (False, True)]
    one_hot, integer = ([env.reset(seed=5)[0]] for env in envs)
    for action in np.random.default_rng(0).integers(2, size=6):
        first, second = (env.step(action) for env in envs)
        assert first[1:] == second[1:]
        one_hot.append(first[0])
        integer.append(second[0])
    assert [int(number) for number in integer[:-1]] == [int(np.argmax(row)) for row in one_hot[:-1]]
    assert integer[-1] == 0 and not one_hot[-1].any()
    assert all(envs[1].observation_space.contains(number) for number in integer)


def test_sb3_s_networks_and_buffer_take_them() -> None:
    model = DQN("FlipoutMlpPolicy", DeepSea(6, integer_observations=True), buffer_size=100, learning_starts=4, **NO_EPSILON)
    model.learn(30)
    assert model.policy.q_net.q_net[0].in_features == 36
    assert model.replay_buffer is not None and model.replay_buffer.observations.nbytes == 100 * 8
    sb3_check_env(DeepSea(6, integer_observations=True))
    gym_check_env(DeepSea(6, integer_observations=True), skip_render_check=True)


def test_hand_checked_transitions_with_treasure() -> None:
    env = DeepSea(size=3)
    obs, info = env.reset()
    np.testing.assert_array_equal(obs, [1, 0, 0, 0, 0, 0, 0, 0, 0])
    assert obs.dtype == np.float32 and info == {"reached_goal": False}
    # (flat index of the one-hot, reward, terminated, reached_goal); cost of a right move: 0.01 / 3.
    for index, reward, terminated, reached in [
        (4, -0.01 / 3, False, False),
        (8, -0.01 / 3, False, False),
        (None, 1 - 0.01 / 3, True, True),
    ]:
        obs, got, ended, truncated, info = env.step(RIGHT)
        expected = np.zeros(9) if index is None else np.eye(9)[index]
        np.testing.assert_array_equal(obs, expected)
        assert got == pytest.approx(reward, abs=1e-12)
        assert (ended, truncated, info["reached_goal"]) == (terminated, False, reached)


def test_hand_checked_transitions_without_treasure() -> None:
    env = DeepSea(size=4, unscaled_move_cost=0.4, flatten=False)
    env.reset()
    cells, rewards = [], []
    for action in (LEFT, RIGHT, RIGHT, LEFT):
        obs, reward, terminated, _, info = env.step(action)
        cells.append(np.argwhere(obs).tolist())
        rewards.append(reward)
    assert cells == [[[1, 0]], [[2, 1]], [[3, 2]], []]  # the wall holds the first left move in column 0
    assert rewards == pytest.approx([0.0, -0.1, -0.1, 0.0])
    assert terminated and info["reached_goal"] is False


def test_left_moves_one_column_back() -> None:
    env = DeepSea(size=4, flatten=False)
    env.reset()
    cells = [np.argwhere(env.step(action)[0]).tolist() for action in (RIGHT, RIGHT, LEFT)]
    assert cells == [[[1, 1]], [[2, 2]], [[3, 1]]]


def test_left_in_the_bottom_right_cell_misses_the_treasure() -> None:
    assert rollout(DeepSea(size=3), [RIGHT, RIGHT, LEFT]) == (pytest.approx(-0.02 / 3), False)


@pytest.mark.parametrize("mapping_seed", [None, 0, 17])
@pytest.mark.parametrize("size", [2, 10, 33])
def test_always_right_collects_the_treasure(size: int, mapping_seed: int | None) -> None:
    env = DeepSea(size=size, mapping_seed=mapping_seed)
    total, reached = rollout(env, [RIGHT] * size)
    assert reached is True
    assert total == pytest.approx(0.99)
    assert env.goal_return == pytest.approx(0.99)


@pytest.mark.parametrize("mapping_seed", [None, 5])
def test_exactly_one_of_all_action_sequences_reaches_the_goal(mapping_seed: int | None) -> None:
    env = DeepSea(size=6, mapping_seed=mapping_seed)
    results = []
    for actions in itertools.product((0, 1), repeat=6):
        env.reset()
        steps = [env.step(action) for action in actions]
        results.append((sum(step[1] for step in steps), steps[-1][4]["reached_goal"]))
    assert sum(reached for _, reached in results) == 1
    best_return, best_reached = max(results)
    assert best_reached and best_return == pytest.approx(env.goal_return)


def test_mapping_is_the_documented_draw() -> None:
    env = DeepSea(size=8, mapping_seed=42)
    np.testing.assert_array_equal(env.action_mapping, np.random.RandomState(42).binomial(1, 0.5, [8, 8]))
    assert not np.array_equal(env.action_mapping, DeepSea(size=8, mapping_seed=43).action_mapping)
    np.testing.assert_array_equal(DeepSea(size=8).action_mapping, np.ones((8, 8)))


def test_mapping_survives_resets_and_changes_of_its_copy() -> None:
    env = DeepSea(size=4, mapping_seed=1)
    before = env.action_mapping
    env.action_mapping[:] = 7
    env.reset(seed=99)
    np.testing.assert_array_equal(env.action_mapping, before)


def test_mapping_does_not_touch_the_global_random_state() -> None:
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    DeepSea(size=4, mapping_seed=1, deterministic=False).reset(seed=2)
    assert np.random.rand() == expected


def test_stochastic_arrival_matches_its_probability() -> None:
    # Always right arrives with p = (1 - 1/4)^3. Hoeffding: P(|frequency - p| >= t) <= 2 exp(-2 n t^2), so this t has
    # a false-fail rate of at most 1e-6.
    episodes, false_fail = 4000, 1e-6
    tolerance = math.sqrt(math.log(2 / false_fail) / (2 * episodes))
    env = DeepSea(size=4, deterministic=False)
    env.reset(seed=0)
    frequency = np.mean([rollout(env, [RIGHT] * 4)[1] for _ in range(episodes)])
    assert abs(frequency - 0.75**3) < tolerance
    assert env.goal_return == pytest.approx(0.75**3 - 0.01)


def test_stochastic_reward_noise_is_standard_normal_in_the_bottom_corners_only() -> None:
    # Always left ends in the bottom left corner; its only reward is one N(0, 1) draw. The mean of n draws exceeds
    # z / sqrt(n) with probability 2 * (1 - Phi(z)) <= 2 exp(-z^2 / 2); the sum of squares is chi-square with n degrees
    # of freedom, outside n +- (2 sqrt(n x) + 2 x) with probability <= 2 exp(-x) (Laurent and Massart 2000, lemma 1).
    # Half of the false-fail rate of 1e-6 each.
    draws, half_rate = 4000, 0.5e-6
    env = DeepSea(size=3, deterministic=False)
    env.reset(seed=1)
    noise = np.array([rollout(env, [LEFT] * 3)[0] for _ in range(draws)])
    assert abs(noise.mean()) < math.sqrt(2 * math.log(2 / half_rate) / draws)
    x = math.log(2 / half_rate)
    assert abs(np.sum(noise**2) - draws) < 2 * math.sqrt(draws * x) + 2 * x


def test_stochastic_variant_is_quiet_away_from_the_bottom_corners() -> None:
    env = DeepSea(size=4, deterministic=False, unscaled_move_cost=0.0)
    env.action_space.seed(0)
    for seed in range(50):
        env.reset(seed=seed)
        for _ in range(4):
            column_and_row = env._column, env._row
            reward = env.step(env.action_space.sample())[1]
            assert (reward == 0.0) == (column_and_row not in [(0, 3), (3, 3)])


def test_stochastic_variant_is_reproducible_from_its_seed() -> None:
    def episode(seed: int | None, env: DeepSea) -> list[float]:
        env.reset(seed=seed)
        return [env.step(LEFT)[1] for _ in range(3)]

    env = DeepSea(size=3, deterministic=False)
    first = episode(5, env)
    assert episode(None, env) != first  # the stream goes on
    assert episode(5, env) == first
    assert episode(6, env) != first
    assert episode(5 + 2**32, env) == first  # seeds beyond 32 bits are folded, not refused


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"size": 1}, ValueError, "size must be an integer >= 2, got 1. Pass for example size=10"),
        ({"size": 3.0}, TypeError, "size must be an integer >= 2, got 3.0 of type float"),
        ({"mapping_seed": -1}, ValueError, "mapping_seed must be an integer in .0, 4294967295., got -1"),
        ({"mapping_seed": 2**32}, ValueError, "mapping_seed must be an integer in"),
        ({"mapping_seed": "a"}, TypeError, "mapping_seed must be an integer in"),
        ({"unscaled_move_cost": -0.1}, ValueError, "unscaled_move_cost must be a finite number >= 0, got -0.1"),
        ({"unscaled_move_cost": float("nan")}, ValueError, "unscaled_move_cost must be a finite number >= 0, got nan"),
        ({"unscaled_move_cost": float("inf")}, ValueError, "unscaled_move_cost must be a finite number >= 0, got inf"),
        ({"unscaled_move_cost": None}, TypeError, "unscaled_move_cost must be a number >= 0, got None of type NoneType"),
        ({"deterministic": 1}, TypeError, "deterministic must be True or False, got 1 of type int"),
        ({"integer_observations": True, "flatten": False}, ValueError, "integer_observations=True does not fit flatten=False"),
        ({"flatten": "yes"}, TypeError, "flatten must be True or False, got 'yes' of type str"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepSea(**kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("action", [2, -1, 0.5, np.array([1])])
def test_action_outside_the_space_is_refused(action: object) -> None:
    env = DeepSea()
    env.reset()
    with pytest.raises(ValueError, match="action must be 0 or 1 as a scalar integer"):
        env.step(action)  # type: ignore[arg-type]


def test_step_without_a_running_episode_is_refused() -> None:
    env = DeepSea(size=2)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(0)
    rollout(env, [RIGHT] * 2)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(0)
