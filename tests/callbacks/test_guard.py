"""StopOnNonFinite stops where it should, says why, and leaves a good model; elsewhere it changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th
from helpers import ACTION_SPACES, RandomEnv, vector_env
from probes import make, parameters
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout.callbacks import StopOnNonFinite
from sb3_flipout.finite import NonFiniteError, first_non_finite


class BrokenReward(gym.RewardWrapper):
    """A reward that is no number any more, the common cause."""

    def __init__(self, env: gym.Env, after: int, value: float) -> None:
        super().__init__(env)
        self.left, self.value = after, value

    def reward(self, reward: Any) -> float:
        self.left -= 1
        return float(reward) if self.left > 0 else self.value


class Breaker(BaseCallback):
    """Break one element of a parameter in the first gradient step from a step on, as a large learning rate could."""

    def __init__(self, name: str, at: int, value: float) -> None:
        super().__init__()
        self.name, self.at, self.value = name, at, value

    def _on_training_start(self) -> None:
        # Before what the guard has hung on, and after the update itself.
        policy: Any = self.model.policy
        optimizer = policy.optimizer if hasattr(policy, "optimizer") else policy.critic.optimizer
        self.hook = optimizer.register_step_post_hook(self._break)

    def _break(self, *_: Any) -> None:
        if self.model.num_timesteps >= self.at:
            with th.no_grad():
                dict(self.model.policy.named_parameters())[self.name].view(-1)[-1] = self.value
            self.at = 10**9

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("algorithm", "name"), [(PPO, "value_net.bias"), (A2C, "action_net.weight"), (DQN, "q_net.q_net.2.bias")]
)
def test_training_stops_and_the_model_goes_back(algorithm: type[BaseAlgorithm], name: str, tmp_path: Path) -> None:
    model = make(algorithm, n_envs=1)
    guard = StopOnNonFinite(tmp_path / "deep" / "good", save_every=8)
    with pytest.warns(UserWarning, match=r"is not finite at step \d+: training stops") as caught:
        model.learn(400, [Breaker(name, 44, math.nan), guard])
    assert 40 < model.num_timesteps < 80
    assert guard.non_finite == name and f"{name} is not finite" in str(caught[0].message)
    assert "good.zip" in str(caught[0].message)
    assert first_non_finite(dict(model.policy.named_parameters())) is None  # also what RL Zoo saves at the end
    loaded = algorithm.load(tmp_path / "deep" / "good.zip")
    assert all(th.equal(a, b) for a, b in zip(parameters(loaded), parameters(model), strict=True))
    assert 16 <= loaded.num_timesteps <= 48
    assert f"state of step {loaded.num_timesteps}, which is in" in str(caught[0].message)
    model.learn(32)  # goes on from there


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # SB3's, from infinity times 0
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("algorithm", "action"), [(PPO, "discrete"), (A2C, "box"), (DQN, "discrete"), (SAC, "box")])
def test_a_reward_of_nan_ends_training_before_anything_learns_from_it(
    algorithm: type[BaseAlgorithm], action: str, value: float, tmp_path: Path
) -> None:
    env = make_vec_env(lambda: BrokenReward(RandomEnv(ACTION_SPACES[action]), 45, value))
    model, guard = make(algorithm, env), StopOnNonFinite(tmp_path / "good", save_every=8)
    seen: list[list[th.Tensor]] = []
    note = ConvertCallback(lambda *_: seen.append([one.clone() for one in parameters(model)]) or True)
    with pytest.warns(UserWarning, match=rf"the reward of environment 0 was {value} at step 4\d or shortly before") as caught:
        model.learn(400, [guard, note])
    assert len([one for one in caught if one.category is UserWarning]) == 1
    assert guard.non_finite == "reward of environment 0"
    assert 45 <= model.num_timesteps <= 49
    assert model.logger.name_to_value["noise/non_finite_at"] == model.num_timesteps
    # Nothing was put back: the last steps before it have been learned from.
    assert first_non_finite(dict(model.policy.named_parameters())) is None
    if not hasattr(model, "replay_buffer"):
        assert all(th.equal(a, b) for a, b in zip(seen[-1], parameters(model), strict=True))
    else:
        assert model.replay_buffer.pos == 44 and math.isfinite(model.replay_buffer.rewards.sum())
    model.set_env(vector_env(action, 1), force_reset=True)
    model.learn(32)


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_actors_critics_and_temperature_go_back(algorithm: type[BaseAlgorithm], tmp_path: Path) -> None:
    model = make(algorithm, action="box", n_envs=1)
    with pytest.warns(UserWarning, match=r"^critic\.qf0\.0\.weight is not finite at step 40: "):
        model.learn(100, [Breaker("critic.qf0.0.weight", 40, math.nan), StopOnNonFinite(tmp_path / "good", save_every=16)])
    loaded = algorithm.load(tmp_path / "good.zip")
    assert loaded.num_timesteps == 32
    assert all(th.equal(a, b) for a, b in zip(parameters(loaded), parameters(model), strict=True))
    if algorithm is SAC:
        assert th.equal(model.log_ent_coef, loaded.log_ent_coef)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("algorithm", "name"), [(PPO, "action_net.weight_sigma"), (PPO, "value_net.bias"), (DQN, "q_net.q_net.0.bias_sigma")]
)
def test_names_what_broke_and_where(algorithm: type[BaseAlgorithm], name: str, value: float, tmp_path: Path) -> None:
    model, guard = make(algorithm, learning_rate=0.0), StopOnNonFinite(tmp_path / "good.zip")
    with pytest.warns(UserWarning, match=rf"^{name} is not finite at step 32: .* back to its state of step 0") as caught:
        model.learn(320, [Breaker(name, 32, value), guard])
    assert len(caught) == 1
    assert guard.non_finite == name
    assert 32 < model.num_timesteps < 40
    assert model.logger.name_to_value["noise/non_finite_at"] == 32


def test_the_last_update_is_looked_at_too(tmp_path: Path) -> None:
    model, guard = make(PPO), StopOnNonFinite(tmp_path / "good.zip", every=100)
    model.n_epochs = 1
    model.batch_size = 16
    with pytest.warns(UserWarning, match="not finite at step 32"):
        model.learn(32, [guard, Breaker("value_net.bias", 32, math.nan)])
    assert first_non_finite(dict(model.policy.named_parameters())) is None


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_changes_nothing_while_all_is_finite(algorithm: type[BaseAlgorithm], tmp_path: Path) -> None:
    results = []
    for callback in (None, StopOnNonFinite(tmp_path / "good.zip", save_every=20)):
        model = make(algorithm)
        model.learn(96, callback)
        results.append((parameters(model), model.policy.noise_state(), th.get_rng_state()))
    (first, state, rng), (second, other_state, other_rng) = results
    assert all(th.equal(a, b) for a, b in zip(first, second, strict=True))
    assert state == other_state and th.equal(rng, other_rng)


def test_leaves_no_hooks_and_those_of_a_broken_run_are_dead(tmp_path: Path) -> None:
    model, guard = make(DQN, n_envs=1), StopOnNonFinite(tmp_path / "good.zip")
    optimizer = model.policy.optimizer

    def broken(_: Any, __: Any) -> bool:
        if model.num_timesteps == 30:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        model.learn(64, CallbackList([guard, ConvertCallback(broken)]))
    assert len(optimizer._optimizer_step_post_hooks) == 1
    breaker = Breaker("q_net.q_net.0.bias_sigma", 20, math.nan)
    with pytest.raises(NonFiniteError, match=r"^q_net\.q_net\.\S+ of the policy of DQN is not finite at step 32"):
        model.learn(32, breaker)  # without the guard: nobody stops it at once
    breaker.hook.remove()
    assert model.num_timesteps == 32 and guard.non_finite is None
    model.set_parameters(str(tmp_path / "good.zip"))
    model.learn(32, guard)
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


def test_huge_but_finite_is_finite() -> None:
    layer = th.nn.Linear(3, 3)
    with th.no_grad():
        layer.weight.fill_(1e30)  # the norm overflows
    assert first_non_finite(dict(layer.named_parameters())) is None
    with th.no_grad():
        layer.bias[1] = -math.inf
    assert first_non_finite(dict(layer.named_parameters())) == "bias"


def test_saves_as_often_as_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, saved = make(PPO), []
    save = model.save
    monkeypatch.setattr(model, "save", lambda path: (saved.append(model.num_timesteps), save(path)))
    model.learn(112, StopOnNonFinite(tmp_path / "good.zip", save_every=30))
    assert saved == [0, 32, 64, 96]
    assert [path.name for path in tmp_path.iterdir()] == ["good.zip"]


def test_a_checkpoint_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guard = make(PPO), StopOnNonFinite(tmp_path / "good.zip", save_every=1)
    model.learn(32, guard)
    before = (tmp_path / "good.zip").read_bytes()

    def interrupted(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        guard._save()
    assert (tmp_path / "good.zip").read_bytes() == before


def test_does_not_start_without_a_good_model(tmp_path: Path) -> None:
    model = make(PPO)
    with th.no_grad():
        model.policy.action_net.weight_sigma[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"StopOnNonFinite: action_net.weight_sigma is not finite before training"):
        model.learn(16, StopOnNonFinite(tmp_path / "good.zip"))
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_path must be a file"):
        StopOnNonFinite(tmp_path)
    for name in ("every", "save_every"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            StopOnNonFinite(tmp_path / "good.zip", **{name: 0})
    with pytest.raises(ValueError, match="StopOnNonFinite needs a flipout policy"):
        make(PPO, policy="MlpPolicy").learn(16, StopOnNonFinite(tmp_path / "good.zip"))
