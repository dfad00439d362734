"""How long an environment keeps its key, inside real training."""

import numpy as np
import pytest
from helpers import NoiseRecorder, vector_env
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback


class _Starts(BaseCallback):
    def __init__(self, into):
        super().__init__()
        self.into = into

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.into.append(self.model.rollout_buffer.episode_starts.copy())


def record(resample, steps=4 * 16 * 3):
    recorder = NoiseRecorder()
    model = PPO("FlipoutMlpPolicy", vector_env(), n_steps=16, batch_size=16, n_epochs=1, seed=1,
                policy_kwargs=dict(resample=resample))  # fmt: skip
    starts = []
    model.learn(steps, callback=[recorder, _Starts(starts)])
    return recorder.all_keys(), np.concatenate(starts)


def test_episode_keys_change_exactly_where_an_episode_starts():
    keys, starts = record("episode")
    changed = keys[1:] != keys[:-1]
    np.testing.assert_array_equal(changed, starts[1:].astype(bool))
    assert changed.any(axis=0).all()


def test_rollout_keys_change_exactly_at_rollout_starts():
    keys, _ = record("rollout")
    changed = keys[1:] != keys[:-1]
    expected = np.zeros(len(keys) - 1, dtype=bool)
    expected[15::16] = True
    np.testing.assert_array_equal(changed, np.repeat(expected[:, None], 3, axis=1))


@pytest.mark.parametrize("steps", [1, 5])
def test_keys_held_for_a_number_of_steps(steps):
    keys, _ = record(steps)
    blocks = np.arange(len(keys)) // steps
    for env in range(3):
        for block in np.unique(blocks):
            assert np.unique(keys[blocks == block, env]).size == 1
    assert np.unique(keys).size == 3 * np.unique(blocks).size


def test_step_keys_are_new_at_each_step():
    keys, _ = record("step")
    assert np.unique(keys).size == keys.size


def test_reset_by_a_new_call_of_learn_starts_new_episode_keys():
    recorder = NoiseRecorder()
    model = PPO("FlipoutMlpPolicy", vector_env(), n_steps=16, batch_size=16, n_epochs=1, seed=1,
                policy_kwargs=dict(resample="episode", schedule="constant"))  # fmt: skip
    model.learn(48, callback=recorder)
    model.learn(48, callback=recorder)  # resets the environments
    assert (recorder.keys[0][-1] != recorder.keys[1][0]).all()
    model.learn(48, callback=recorder, reset_num_timesteps=False)  # goes on in the same episodes, but where one ended
    ended = model.rollout_buffer.episode_starts[0].astype(bool)
    np.testing.assert_array_equal(recorder.keys[1][-1] != recorder.keys[2][0], ended)
