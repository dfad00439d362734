"""Methods of subclasses that have more arguments than SB3's are handed all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

import sb3_flipout
from sb3_flipout.noise import RowNoise
from sb3_flipout.noise.carried import noise_of, with_noise


class Greedy(SAC):
    """Chooses and stores with arguments of its own."""

    asked: list[Any]

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1, greedy: bool = False, note: str = ""
    ) -> Any:
        self.asked.append((n_envs, greedy, note))
        return super()._sample_action(learning_starts, action_noise, n_envs)

    def _store_transition(self, *args: Any, weight: float = 1.0) -> None:
        self.asked.append(weight)
        super()._store_transition(*args)

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> Any:
        self._sample_action(0, None, n_envs=self.n_envs, greedy=True, note="by name")
        self._sample_action(0, None, self.n_envs, True)
        found = self._sample_action(0)
        zeros = np.zeros(self.n_envs)
        self._store_transition(self.replay_buffer, found[1], self._last_obs, zeros, zeros > 0, [{} for _ in zeros], weight=0.5)
        return super().collect_rollouts(*args, **kwargs)


def test_arguments_of_ones_own_are_handed_on() -> None:
    Greedy.asked = []
    model = Greedy("FlipoutMlpPolicy", make_vec_env("Pendulum-v1", 1), learning_starts=5, batch_size=8, device="cpu")
    model.learn(10)
    assert Greedy.asked[:4] == [(1, True, "by name"), (1, True, ""), (1, False, ""), 0.5]
    assert model.policy._keys.step == 10 + 3 * len([one for one in Greedy.asked if one == 0.5])


@pytest.mark.parametrize("index", [np.int64(1), np.int8(1), 1, th.tensor(1)])
def test_one_row_is_no_batch(index: Any) -> None:
    x = th.randn(3, 4)
    rows = with_noise(x, RowNoise(th.arange(3)))
    assert th.equal(rows[index], x[index]) and noise_of(rows[index]) is None


class Normalised(BaseFeaturesExtractor):
    def __init__(self, space: Any) -> None:
        super().__init__(space, 8)
        self.net = nn.Sequential(nn.Linear(space.shape[0], 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: th.Tensor) -> th.Tensor:
        found: th.Tensor = self.net(x)
        return found


@pytest.mark.parametrize("algorithm", [PPO, DQN])
@pytest.mark.parametrize("n_envs", [1, 4])
def test_units_by_inputs_are_measured_in_evaluation_mode(algorithm: Any, n_envs: int) -> None:
    noise = dict(sigma_unit="inputs", features_extractor_class=Normalised)
    steps: dict[str, Any] = dict(n_steps=4, batch_size=n_envs * 4) if algorithm is PPO else dict(learning_starts=100)
    model = algorithm("FlipoutMlpPolicy", make_vec_env("CartPole-v1", n_envs), policy_kwargs=noise, device="cpu", **steps)
    before = th.get_rng_state()
    obs = model.env.reset()
    policy = sb3_flipout.flipout_policy(model)
    policy.meet_observations(obs)
    assert th.equal(th.get_rng_state(), before)
    seen = [module.num_batches_tracked.item() for module in policy.modules() if isinstance(module, nn.BatchNorm1d)]
    assert seen and not any(seen)
