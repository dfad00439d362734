"""On-policy set-ups in which noise, masks or the base were lost without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import vector_env
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_flipout.callbacks import NoiseEvalCallback, StopOnNonFinite
from sb3_flipout.finite import NonFiniteError
from sb3_flipout.noise import RowNoise, noise_of, with_noise


def build(policy: Any = "FlipoutMlpPolicy", algorithm: Any = PPO, action: str = "discrete", **kwargs: Any) -> Any:
    settings: dict[str, Any] = dict(n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    return algorithm(policy, vector_env(action, 2), **{**settings, **kwargs})


# ---- modules of two models --------------------------------------------------------------------------------------------


ENCODER = nn.Linear(5, 4)


class Encoded(BaseFeaturesExtractor):
    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 4)
        self.encoder = ENCODER

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return th.tanh(self.encoder(obs))


@pytest.mark.parametrize("trained", [False, True])
def test_a_module_of_two_models_is_refused_before_training(trained: bool) -> None:
    first = build(policy_kwargs=dict(features_extractor_class=Encoded))
    if trained:
        first.learn(16)
    second = build(policy_kwargs=dict(features_extractor_class=Encoded))
    before = {name: value.clone() for name, value in first.policy.state_dict().items()}
    with pytest.raises(ValueError, match=r"have become those of another policy.*copy\.deepcopy\(encoder\)"):
        first.learn(16)
    assert all(th.equal(value, before[name]) for name, value in first.policy.state_dict().items())
    second.learn(16)


# ---- masks -------------------------------------------------------------------------------------------------------------


class Forbids(gym.Env[np.ndarray, np.int64]):
    """Raises where a forbidden action is taken."""

    observation_space, action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.step_number = 0
        return self.observation_space.sample(), {}

    def action_masks(self) -> np.ndarray:
        return np.arange(4) == (self.step_number * 3) % 4  # a single one is allowed

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if not self.action_masks()[int(action)]:
            raise ValueError("a forbidden action")
        self.step_number += 1
        return self.observation_space.sample(), 1.0, self.step_number == 6, False, {}


class Allows(Forbids):
    action_masks = None  # type: ignore[assignment]


def test_evaluations_mask_what_training_masks() -> None:
    settings: dict[str, Any] = dict(n_steps=8, batch_size=8, device="cpu", seed=0)
    model = MaskablePPO("FlipoutMlpPolicy", DummyVecEnv([Forbids] * 2), **settings)
    callback = NoiseEvalCallback(DummyVecEnv([Forbids] * 2), eval_freq=8, n_eval_episodes=4, verbose=0, warn=False)
    model.learn(32, callback=callback)
    assert callback.returns["mean"] == callback.returns["sampled"] == [6.0, 6.0]
    with pytest.raises(ValueError, match=r"eval_env has no method action_masks.*ActionMasker"):
        model.learn(32, callback=NoiseEvalCallback(vector_env("discrete", 1), verbose=0, warn=False))


# ---- base, scale, rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [None, 3])
def test_the_base_that_acts_is_saved_after_the_noise_was_reseeded(every: int | None, tmp_path: Path) -> None:
    model = build(policy_kwargs=dict(base_every_rollouts=every)).learn(16)
    model.set_random_seed(9)
    model.save(tmp_path / "model")
    again = PPO.load(tmp_path / "model", env=model.get_env(), device="cpu")
    networks = [one.policy.perturbed_network for one in (model, again)]
    assert networks[0].layers[0].base_key == networks[1].layers[0].base_key
    draws = [[draw for layer in network.layers for draw in layer.bases()[1].values()] for network in networks]
    assert all(th.equal(a, b) for a, b in zip(*draws, strict=True))


def test_rows_are_counted_from_the_end_too() -> None:
    obs = with_noise(th.arange(12.0).view(4, 3), RowNoise(th.tensor([3, 5, 7, 9]), th.tensor([1.0, 2.0, 3.0, 4.0])))
    for index in (th.tensor([-1, 0, -4]), np.array([-1, 0, -4]), [-1, 0, -4]):
        noise: Any = noise_of(obs[index])
        assert noise.keys.tolist() == [9, 3, 3] and noise.scale.tolist() == [4.0, 1.0, 1.0]
    for outside in (4, -5):
        with pytest.raises(IndexError):
            RowNoise(th.tensor([3, 5, 7, 9]))[th.tensor([outside])].keys  # noqa: B018


@pytest.mark.parametrize("scale", [1e35, float("inf"), -1.0])
def test_a_scale_that_could_not_be_loaded_is_not_taken(scale: float) -> None:
    policy = build().policy
    with pytest.raises(ValueError, match="noise_scale must be"):
        policy.noise_scale = scale
    assert policy.noise_scale == 1.0


# ---- numbers that are not finite ---------------------------------------------------------------------------------------


class BreaksOne(BaseCallback):
    """Lets the fifth gradient step of a training break a weight."""

    def _on_training_start(self) -> None:
        steps = iter(range(10_000))

        def spoil(*_: Any) -> None:
            if next(steps) == 4:
                self.model.policy.action_net.weight.grad.fill_(float("nan"))

        self.handle = self.model.policy.optimizer.register_step_pre_hook(spoil)

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("every", [1, 5, 1000])
def test_on_policy_a_broken_step_is_undone_however_seldom_is_looked(every: int, tmp_path: Path) -> None:
    model, stop = build(action="box"), StopOnNonFinite(tmp_path / "good", every=every, verbose=0)
    with pytest.warns(UserWarning, match=r"is not finite at step \d+: training stops"):
        model.learn(160, callback=[stop, BreaksOne()])
    assert stop.non_finite is not None and model.num_timesteps < 160
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


def test_the_callback_is_advised_where_there_is_none(tmp_path: Path) -> None:
    for callbacks, advised in (([], True), ([StopOnNonFinite(tmp_path / "good", verbose=0)], False)):
        model = build()

        class Breaks(BaseCallback):
            def _on_step(self) -> bool:
                with th.no_grad():
                    self.model.policy.action_net.weight.fill_(float("nan"))
                return True

        with pytest.raises(NonFiniteError) as error:
            model.learn(64, callback=[*callbacks, Breaks()])
        assert ("StopOnNonFinite" in str(error.value)) == advised
