"""Without any callback: what is not finite, or has another shape than it should, is told where it comes in."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize
from torch.distributions import Distribution

import sb3_flipout
from sb3_flipout.finite import NonFiniteError, first_non_finite
from sb3_flipout.hooks._finite import LOOK_EVERY, _check_shapes

BOX = spaces.Box(-1, 1, (3,), np.float32)
ON_POLICY: dict[type[BaseAlgorithm], dict[str, Any]] = {
    PPO: dict(n_steps=16, batch_size=8, n_epochs=1),
    A2C: dict(n_steps=16),
    TRPO: dict(n_steps=16, batch_size=8),
    MaskablePPO: dict(n_steps=16, batch_size=8, n_epochs=1),
    RecurrentPPO: dict(n_steps=16, batch_size=8, n_epochs=1),
}
OFF_POLICY: dict[type[BaseAlgorithm], dict[str, Any]] = {
    algorithm: dict(learning_starts=8, batch_size=8, buffer_size=200)
    for algorithm in (DQN, QRDQN, SAC, TD3, DDPG, TQC, CrossQ)
}
CONTINUOUS = (SAC, TD3, DDPG, TQC, CrossQ)
ALL = [*ON_POLICY, *OFF_POLICY]


class Faulty(gym.Env[Any, Any]):
    """Something goes wrong in one step, and in all after it."""

    def __init__(self, at: int, fault: Any, action: str = "discrete", space: Any = BOX, length: int = 1000) -> None:
        self.observation_space: Any = space
        self.action_space: Any = spaces.Discrete(2) if action == "discrete" else BOX
        self.at, self.fault, self.length, self.steps, self.began = at, fault, length, 0, 0

    def action_masks(self) -> np.ndarray:
        return np.ones(2, dtype=bool)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.began = self.steps
        return self.seen(), {}

    def seen(self) -> Any:
        return np.full(3, 0.5, np.float32)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.steps += 1
        out = [self.seen(), 1.0, False, self.steps - self.began >= self.length, {}]
        return tuple(self.fault(out) if self.steps >= self.at else out)  # type: ignore[return-value]


def reward_of(value: float) -> Any:
    return lambda out: [out[0], value, *out[2:]]


def observation_of(value: float) -> Any:
    def fault(out: list[Any]) -> list[Any]:
        return [np.array([0.5, value, 0.5], np.float32), *out[1:]]

    return fault


def built(algorithm: type[BaseAlgorithm], env: Any, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {**{**ON_POLICY, **OFF_POLICY}[algorithm], "seed": 0, "device": "cpu", **kwargs}
    if algorithm in (DQN, QRDQN):
        settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    settings.setdefault("policy_kwargs", dict(net_arch=[8]))
    policy = settings.pop("policy", "FlipoutMlpLstmPolicy" if algorithm is RecurrentPPO else "FlipoutMlpPolicy")
    return algorithm(policy, env, **settings)


def two(fault: Any, action: str, at: int = 13, **kwargs: Any) -> DummyVecEnv:
    """Two environments, of which the second goes wrong."""
    return DummyVecEnv([lambda: Faulty(10**9, None, action), lambda: Faulty(at, fault, action, **kwargs)])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("algorithm", ALL)
def test_rewards(algorithm: type[BaseAlgorithm], value: float) -> None:
    model = built(algorithm, two(reward_of(value), "box" if algorithm in CONTINUOUS else "discrete"))
    step = 32 if algorithm in ON_POLICY else 26
    with pytest.raises(
        NonFiniteError, match=f"^the reward of environment 1 was {value} at step {step} or shortly before"
    ) as told:
        model.learn(200)
    assert told.value.where == "reward of environment 1"
    assert first_non_finite(dict(model.policy.named_parameters())) is None
    if algorithm in OFF_POLICY:
        assert model.replay_buffer.pos == 12


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("algorithm", ALL)
def test_observations(algorithm: type[BaseAlgorithm], value: float) -> None:
    model = built(algorithm, two(observation_of(value), "box" if algorithm in CONTINUOUS else "discrete"))
    with pytest.raises(NonFiniteError, match=f"^the observation of environment 1 was {value} at step (26|32) or shortly"):
        model.learn(200)
    assert first_non_finite(dict(model.policy.named_parameters())) is None


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_observations_of_the_first_reset(algorithm: type[BaseAlgorithm]) -> None:
    class Broken(Faulty):
        def seen(self) -> Any:
            return np.full(3, math.nan, np.float32)

    with pytest.raises(NonFiniteError, match=r"^the observation of environments \[0, 1\] was nan at step 0 or shortly"):
        built(algorithm, DummyVecEnv([lambda: Broken(10**9, None)] * 2)).learn(200)


def test_the_last_observation_of_an_episode() -> None:
    """It is not what the environments give next, but what is stored."""
    model = built(DQN, two(observation_of(math.nan), "discrete", at=20, length=20))
    with pytest.raises(NonFiniteError, match=r"^the observation of environment 1 was nan at step 40"):
        model.learn(200)
    assert model.replay_buffer.pos == 19


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_observations_of_dictionaries_are_named(algorithm: type[BaseAlgorithm]) -> None:
    class Pair(Faulty):
        def seen(self) -> Any:
            return {"left": np.full(3, 0.5, np.float32), "right": np.zeros(2, np.float32)}

    space = spaces.Dict({"left": BOX, "right": spaces.Box(-1, 1, (2,), np.float32)})

    def fault(out: list[Any]) -> list[Any]:
        return [{**out[0], "right": np.full(2, math.nan, np.float32)}, *out[1:]]

    model = built(algorithm, DummyVecEnv([lambda: Pair(13, fault, space=space)]), policy="FlipoutMultiInputPolicy")
    with pytest.raises(NonFiniteError, match=r"^the observation 'right' of environment 0 was nan"):
        model.learn(200)


class Mends(BaseFeaturesExtractor):
    """An extractor that is made for such numbers."""

    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return th.nan_to_num(observations)


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_an_extractor_of_ones_own_may_get_them(algorithm: type[BaseAlgorithm]) -> None:
    env = two(observation_of(math.nan), "box" if algorithm is SAC else "discrete")
    kwargs = dict(net_arch=[8], features_extractor_class=Mends)
    model = built(algorithm, env, policy_kwargs=kwargs).learn(96)
    assert first_non_finite(dict(model.policy.named_parameters())) is None


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # SB3's, from infinite values
def test_outputs_that_overflow_are_told_without_torchs_own_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", False)  # as some do, for speed
    space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def fault(out: list[Any]) -> list[Any]:
        return [np.full(3, 3e38, np.float32), *out[1:]]

    env = DummyVecEnv([lambda: Faulty(13, fault, "box", space)])
    model = built(PPO, env, policy_kwargs=dict(net_arch=[8], activation_fn=th.nn.ReLU))
    with pytest.raises(NonFiniteError, match="of the rollout of PPO that ended at step 16 are not finite, though"):
        model.learn(64)


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, SAC])
def test_weights_are_told_soon(algorithm: type[BaseAlgorithm]) -> None:
    action = "box" if algorithm is SAC else "discrete"
    model = built(algorithm, two(None, action, 10**9), learning_rate=0.0)
    model.learn(64)
    name, parameter = next(iter(model.policy.named_parameters()))
    with th.no_grad():
        parameter.view(-1)[-1] = math.nan
    with pytest.raises(NonFiniteError, match=f"^{name} of the policy of {algorithm.__name__} is not finite at step"):
        model.learn(10 * LOOK_EVERY, reset_num_timesteps=False)
    assert model.num_timesteps <= 64 + LOOK_EVERY + 32


def test_the_last_update_is_looked_at() -> None:
    class Last(PPO):
        def train(self) -> None:
            super().train()
            if self.num_timesteps >= self._total_timesteps:
                with th.no_grad():
                    self.policy.value_net.bias.fill_(math.inf)

    model = Last("FlipoutMlpPolicy", two(None, "discrete", 10**9), device="cpu", **ON_POLICY[PPO])
    with pytest.raises(NonFiniteError, match=r"^value_net\.bias of the policy of Last is not finite at step 64"):
        model.learn(64)


def test_what_is_not_broken_by_numbers_stays_its_own_error() -> None:
    class Wrong(Exception):
        pass

    def fault(out: list[Any]) -> list[Any]:
        raise Wrong

    for algorithm in (PPO, DQN):
        with pytest.raises(Wrong):
            built(algorithm, two(fault, "discrete")).learn(200)

    def fails(out: list[Any]) -> list[Any]:
        raise ValueError("mine")

    for algorithm in (PPO, DQN):
        with pytest.raises(ValueError, match=r"^mine$"):
            built(algorithm, two(fails, "discrete")).learn(200)


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_observations_of_another_shape(algorithm: type[BaseAlgorithm]) -> None:
    def fault(out: list[Any]) -> list[Any]:
        return [np.zeros(5, np.float32), *out[1:]]

    with pytest.raises(ValueError, match="could not broadcast input array"):  # numpy's, in SB3's DummyVecEnv
        built(algorithm, two(fault, "discrete")).learn(200)
    env = SubprocVecEnv([lambda: Faulty(13, fault)], start_method="fork")
    try:
        with pytest.raises(ValueError, match=r"gave the observation in shape \(5,\), and their space says \(3,\)|broadcast"):
            built(algorithm, env).learn(200)
    finally:
        env.close()


@pytest.mark.parametrize("name", ["right", "it's"])
def test_parts_of_another_shape_are_named(name: str) -> None:
    space = spaces.Dict({"left": BOX, name: spaces.Box(-1, 1, (2,), np.float32)})
    given = {"left": np.zeros((4, 3), np.float32), name: np.zeros((4, 5), np.float32)}
    algorithm = SimpleNamespace(observation_space=space, _last_obs=given)
    with pytest.raises(ValueError) as told:
        _check_shapes(algorithm, RuntimeError())
    assert f"gave the observation {name!r} in shape (5,), and their space says (2,)" in str(told.value)
    _check_shapes(SimpleNamespace(observation_space=space, _last_obs={**given, name: np.zeros((4, 2))}), RuntimeError())


def test_statistics_that_were_poisoned_show() -> None:
    env = VecNormalize(two(observation_of(math.nan), "discrete"))
    with pytest.raises(NonFiniteError, match=r"^the observation of environments \[0, 1\] was nan"):
        built(PPO, env).learn(200)


def test_goals_are_looked_at() -> None:
    class Broken(BitFlippingEnv):
        def compute_reward(self, *args: Any) -> Any:
            return super().compute_reward(*args) * (1 if self.current_step < 2 else math.nan)

    model = DQN(
        "FlipoutMultiInputPolicy",
        make_vec_env(lambda: Broken(n_bits=4, continuous=False)),
        replay_buffer_class=HerReplayBuffer,
        learning_starts=8,
        exploration_initial_eps=0.0,
        exploration_final_eps=0.0,
        device="cpu",
    )
    with pytest.raises(NonFiniteError, match=r"^the reward of environment 0 was nan"):
        model.learn(64)


def test_the_error_goes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteError("what", "where")))
    assert (str(error), error.where) == ("what", "where")


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def raises(out: list[Any]) -> list[Any]:
    raise ArithmeticError("what went wrong")


def of_another_shape(out: list[Any]) -> list[Any]:
    return [np.zeros(5, np.float32), *out[1:]]


@pytest.mark.parametrize("normalised", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (raises, ArithmeticError),
        (observation_of(math.nan), NonFiniteError),
        (reward_of(math.inf), NonFiniteError),
        (of_another_shape, ValueError),
    ],
    ids=["raises", "observation", "reward", "shape"],
)
@pytest.mark.parametrize("algorithm", [PPO, DQN])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:no checkpoint is written:UserWarning")
def test_what_goes_wrong_leaves_the_checkpoint_before_it(
    algorithm: type[BaseAlgorithm], fault: Any, error: type[Exception], normalised: bool, tmp_path: Path
) -> None:
    def environments(fault: Any, at: int) -> Any:
        env = two(fault, "discrete", at)
        return VecNormalize(env) if normalised else env

    model = built(algorithm, environments(fault, 45), policy_kwargs=dict(net_arch=[8], schedule="constant"))
    with pytest.raises(error):
        model.learn(400, callback=sb3_flipout.Checkpoints(tmp_path, every=2))
    again = sb3_flipout.resume(tmp_path, environments(None, 10**9))
    # What was saved at the step of the fault itself had not met it, or was not saved.
    assert 84 <= again.num_timesteps <= 96
    assert first_non_finite(dict(again.policy.named_parameters())) is None
    again.learn(64, reset_num_timesteps=False)


@pytest.mark.parametrize("name", ["weights", "observations", "returns"])
def test_what_is_broken_is_not_saved(name: str, tmp_path: Path) -> None:
    env = VecNormalize(two(None, "discrete", 10**9))
    model, checkpoints = built(PPO, env), sb3_flipout.Checkpoints(tmp_path, every=10_000)
    model.learn(32, callback=checkpoints)
    checkpoints.holding = True
    assert checkpoints.save()
    checkpoints.num_timesteps += 1
    if name == "weights":
        with th.no_grad():
            model.policy.value_net.bias.fill_(math.nan)
    elif name == "observations":
        env.obs_rms.var[1] = math.nan
    else:
        env.ret_rms.mean = math.inf
    told = {"weights": "value_net.bias"}.get(name, f"VecNormalize's statistic of {name}")
    with pytest.warns(UserWarning, match=f"^no checkpoint is written at step 33: {told} is not finite"):
        assert not checkpoints.save()
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000000032"]
