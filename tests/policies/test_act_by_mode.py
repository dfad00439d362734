"""`act_by_mode`: collection takes the most likely action of each row's perturbed actor, and learning is as ever."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from sac_td3_cases import DETERMINISTIC, STOCHASTIC, build

from sb3_flipout import perturbed


def actions(model: Any, obs: np.ndarray, times: int, **kwargs: Any) -> list[np.ndarray]:
    return [model.policy.predict(obs, **kwargs)[0] for _ in range(times)]


@pytest.mark.parametrize("algorithm", STOCHASTIC)
def test_an_action_in_collection_is_the_mode_under_the_key_of_its_row(algorithm: Any) -> None:
    model, obs = build(algorithm, noise=dict(act_by_mode=True)), np.ones((2, 5), np.float32)
    with model.policy.collecting(2):
        noise = model.policy._acting_noise
        first, second = actions(model, obs, 2)
    with perturbed(model.policy, noise):
        expected = model.policy.predict(obs, deterministic=True)[0]
    np.testing.assert_array_equal(first, second)  # nothing is sampled
    np.testing.assert_allclose(first, expected, atol=1e-6)
    assert not np.array_equal(first[0], first[1])  # equal observations, other weights


@pytest.mark.parametrize("algorithm", STOCHASTIC)
def test_without_it_and_outside_collection_actions_are_sampled(algorithm: Any) -> None:
    obs = np.ones((2, 5), np.float32)
    default, by_mode = build(algorithm), build(algorithm, noise=dict(act_by_mode=True))
    with default.policy.collecting(2):
        first, second = actions(default, obs, 2)
    assert not np.array_equal(first, second)
    with perturbed(by_mode.policy, th.tensor([1, 2])):
        first, second = actions(by_mode, obs, 2, deterministic=False)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("algorithm", STOCHASTIC)
def test_it_trains_and_is_saved(algorithm: Any, tmp_path: Path) -> None:
    model = build(algorithm, noise=dict(act_by_mode=True)).learn(24)
    model.save(tmp_path / "model")
    assert algorithm.load(tmp_path / "model").policy.noise_settings.act_by_mode is True


@pytest.mark.parametrize("algorithm", DETERMINISTIC)
def test_actors_that_sample_nothing_refuse_it(algorithm: Any) -> None:
    with pytest.raises(ValueError, match=r"act_by_mode=True has no effect .* Leave it out"):
        build(algorithm, noise=dict(act_by_mode=True))


@pytest.mark.parametrize("value", ["True", 1, None])
def test_it_is_a_flag(value: Any) -> None:
    with pytest.raises(TypeError, match=r"act_by_mode must be True or False, got"):
        build(noise=dict(act_by_mode=value))
