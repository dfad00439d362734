"""DeepSea, transition by transition, against the one of bsuite."""

import importlib
import warnings
from typing import Any

import numpy as np
import pytest

from sb3_flipout.envs import DeepSea

with warnings.catch_warnings():
    # bsuite and what it imports are old; their import may warn, which is not ours to fail on.
    warnings.simplefilter("ignore")
    pytest.importorskip("bsuite")
    deep_sea = importlib.import_module("bsuite.environments.deep_sea")

EPISODES = 30


def bsuite_env(size: int, mapping_seed: int | None, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        # bsuite warns that an environment without randomised actions is for debugging.
        warnings.simplefilter("ignore")
        return deep_sea.DeepSea(size, mapping_seed=mapping_seed, randomize_actions=mapping_seed is not None, **kwargs)


def assert_same_episode(ours: DeepSea, theirs: Any, actions: list[int], **reset_kwargs: Any) -> None:
    obs, _ = ours.reset(**reset_kwargs)
    np.testing.assert_array_equal(obs, theirs.reset().observation)
    collected = theirs.bsuite_info()["denoised_return"]
    for action in actions:
        obs, reward, terminated, truncated, info = ours.step(action)
        expected = theirs.step(action)
        np.testing.assert_array_equal(obs, expected.observation)
        assert obs.dtype == expected.observation.dtype
        assert reward == expected.reward
        assert (terminated, truncated) == (expected.last(), False)
        assert info["reached_goal"] == (theirs.bsuite_info()["denoised_return"] > collected)


def always_right(ours: DeepSea) -> list[int]:
    return np.diagonal(ours.action_mapping).tolist()


@pytest.mark.parametrize("mapping_seed", [None, 0, 1, 42, 2**32 - 1])
@pytest.mark.parametrize("size", [2, 3, 8, 20])
@pytest.mark.parametrize("cost", [0.01, 0.0, 0.3])
def test_deterministic_transitions_are_those_of_bsuite(size: int, mapping_seed: int | None, cost: float) -> None:
    ours = DeepSea(size, mapping_seed, unscaled_move_cost=cost, flatten=False)
    theirs = bsuite_env(size, mapping_seed, unscaled_move_cost=cost)
    np.testing.assert_array_equal(ours.action_mapping, theirs._action_mapping)
    assert ours.goal_return == theirs._optimal_return
    rng = np.random.default_rng(size)
    for actions in rng.integers(0, 2, size=(EPISODES, size)).tolist():
        assert_same_episode(ours, theirs, actions)
    assert_same_episode(ours, theirs, always_right(ours))


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("mapping_seed", [None, 3])
@pytest.mark.parametrize("size", [2, 5, 12])
def test_stochastic_transitions_are_those_of_bsuite(size: int, mapping_seed: int | None, seed: int) -> None:
    ours = DeepSea(size, mapping_seed, deterministic=False, flatten=False)
    theirs = bsuite_env(size, mapping_seed, deterministic=False, seed=seed)
    assert ours.goal_return == theirs._optimal_return
    rng = np.random.default_rng(size)
    ours.reset(seed=seed)
    for actions in rng.integers(0, 2, size=(EPISODES, size)).tolist():
        assert_same_episode(ours, theirs, actions)
        assert_same_episode(ours, theirs, always_right(ours))
