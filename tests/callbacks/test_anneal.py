"""The annealed scale at each step is the closed form, on-policy constant from a rollout to the end of its update."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import ReplayProbe, vector_env
from probes import ScaleProbe, make
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import CallbackList, ConvertCallback, EvalCallback, EveryNTimesteps
from stable_baselines3.common.utils import LinearSchedule

from sb3_flipout.callbacks import AdaptNoise, AnnealNoise, flipout_policy
from sb3_flipout.noise.ladder import geometric_ladder

NOT_A_SCALE = [-0.1, math.nan, math.inf]


# ---- the closed form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.4])
@pytest.mark.parametrize("remaining", [1.0, 0.9, 0.61, 0.6, 0.3, 0.0, -0.02])
def test_shapes_are_their_formulas(fraction: float, remaining: float) -> None:
    done = min(1.0, (1.0 - remaining) / fraction)
    expected = {
        "linear": LinearSchedule(2.0, 0.5, fraction)(remaining),
        "cosine": 0.5 + 1.5 * (1 + math.cos(math.pi * done)) / 2,
        "exponential": 2.0 * (0.5 / 2.0) ** done,
    }
    for shape, value in expected.items():
        assert AnnealNoise(2.0, 0.5, fraction, shape).scale_at(remaining) == pytest.approx(value, rel=1e-12)


def test_a_function_shapes_the_way_from_start_to_end() -> None:
    square = AnnealNoise(2.0, 0.5, shape=lambda r: r * r)
    assert [square.scale_at(r) for r in (1.0, 0.5, 0.0)] == pytest.approx([2.0, 0.875, 0.5])
    schedule = LinearSchedule(0.3, 0.1, 1.0)
    assert AnnealNoise(1.0, 0.0, shape=schedule).scale_at(0.25) == pytest.approx(schedule(0.25))


def closed_form(timesteps: int, total: int, fraction: float) -> float:
    return 0.5 + 1.5 * max(0.0, 1 - timesteps / total / fraction)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_on_policy_changes_at_rollout_starts_only(algorithm: type[BaseAlgorithm]) -> None:
    model, probe, replay = make(algorithm, n_envs=2), ScaleProbe(), ReplayProbe(8 if algorithm is PPO else None)
    model.learn(100, [AnnealNoise(2.0, 0.5, 0.7), probe, replay])
    for timesteps, scales in probe.acted:
        assert scales == pytest.approx([closed_form(timesteps - timesteps % 16, 100, 0.7)] * 2)
    for timesteps, scale in probe.learned:  # the update still sees what its rollout saw
        assert scale == pytest.approx(closed_form(timesteps - 16, 100, 0.7))
    assert len({scale for _, scale in probe.learned}) > 3
    assert replay.worst_ratio < 1e-5 < 1e-3 < replay.least_effect


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_leaves_the_model_at_the_end_of_the_schedule(algorithm: type[BaseAlgorithm]) -> None:
    model = make(algorithm, n_envs=2)
    model.learn(96, AnnealNoise(1.0, 0.25))  # the last rollout of PPO begins at step 80
    assert model.policy.noise_scale == 0.25


def test_off_policy_changes_at_every_step() -> None:
    model, probe = make(DQN, n_envs=2), ScaleProbe()
    model.learn(96, [AnnealNoise(2.0, 0.5, 0.7), probe])
    assert [timesteps for timesteps, _ in probe.acted] == list(range(0, 96, 2))
    for timesteps, scales in probe.acted:
        assert scales == pytest.approx([closed_form(timesteps, 96, 0.7)] * 2)
    assert probe.learned
    for timesteps, scale in probe.learned:
        assert scale == pytest.approx(closed_form(timesteps, 96, 0.7))


@pytest.mark.parametrize("resample", ["step", "episode", "rollout", 3])
@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_the_keys_stay_what_they_are(algorithm: type[BaseAlgorithm], resample: str | int) -> None:
    found = []
    for callbacks in ([], [AnnealNoise(2.0, 0.5)]):
        model, probe = make(algorithm, policy_kwargs=dict(net_arch=[8], resample=resample, schedule="constant")), ScaleProbe()
        model.learn(96, [*callbacks, probe])
        found.append(probe.keys)
        assert len({scales[0] for _, scales in probe.acted}) == (1 if not callbacks else 6 if algorithm is PPO else 48)
    assert found[0] == found[1]  # the environments end episodes by themselves


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_survives_save_load_and_continued_training(algorithm: type[BaseAlgorithm], tmp_path: Path) -> None:
    model = make(algorithm)
    model.learn(64, AnnealNoise(2.0, 0.5, ladder=(0.5, 2.0)))
    model.save(tmp_path / "model")
    loaded, probe = algorithm.load(tmp_path / "model", env=vector_env("discrete", 2)), ScaleProbe()
    assert loaded.policy.noise_scale == model.policy.noise_scale
    assert loaded.policy.noise_ladder == (0.5, 2.0)
    loaded.learn(64, [AnnealNoise(2.0, 0.5, ladder=(0.5, 2.0)), probe], reset_num_timesteps=False)
    assert probe.acted[0][0] == 64
    for timesteps, scales in probe.acted:
        seen = timesteps - timesteps % 16 if algorithm is PPO else timesteps
        assert scales == pytest.approx([closed_form(seen, 128, 1.0) * rung for rung in (0.5, 2.0)])


def test_logs_the_scale() -> None:
    model, logged = make(PPO), []

    def log(_: Any, __: Any) -> bool:
        logged.append(model.logger.name_to_value["noise/scale"])
        return True

    model.learn(32, CallbackList([AnnealNoise(2.0, 0.5), ConvertCallback(log)]))
    assert logged == [2.0] * 8 + [1.25] * 8


# ---- the ladder -----------------------------------------------------------------------------------------------------


def test_the_ladder_is_that_of_ape_x() -> None:
    epsilon, alpha, n = 0.4, 7.0, 8
    ape_x = sorted(epsilon ** (1 + alpha * i / (n - 1)) for i in range(n))
    assert geometric_ladder(epsilon ** (1 + alpha), epsilon, n) == pytest.approx(ape_x)
    assert geometric_ladder(0.5, 8.0, 1) == pytest.approx((2.0,))


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_each_environment_stands_on_its_rung(algorithm: type[BaseAlgorithm]) -> None:
    model, probe = make(algorithm, n_envs=3), ScaleProbe()
    callbacks: list[Any] = [AnnealNoise(1.0, 0.5, ladder=[0.5, 2.0]), probe]  # a list, as YAML gives it
    replay = ReplayProbe(8)
    model.learn(72, [*callbacks, *([replay] if algorithm is PPO else [])])
    for timesteps, scales in probe.acted:
        seen = timesteps - timesteps % 24 if algorithm is PPO else timesteps
        assert scales == pytest.approx([(1.0 - 0.5 * seen / 72) * rung for rung in (0.5, 1.0, 2.0)])
    if algorithm is PPO:
        stored = model.rollout_buffer.noise_scales
        assert np.allclose(stored / stored[:, :1], [[1.0, 2.0, 4.0]])
        assert replay.worst_ratio < 1e-5


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_a_ladder_for_another_number_of_environments_is_refused(algorithm: type[BaseAlgorithm]) -> None:
    model = make(algorithm, n_envs=2)
    model.policy.noise_ladder = (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match=r"noise_ladder is for 3 environments, here are 2.*noise_ladder = None"):
        model.learn(8)
    model.policy.noise_ladder = None
    model.learn(8)


def test_loads_a_state_from_before_there_were_ladders() -> None:
    model = make(PPO)
    model.policy.noise_ladder = (1.0, 2.0)
    state = model.policy.noise_state()
    del state["noise_ladder"]
    model.policy.set_noise_state(state)
    assert model.policy.noise_ladder is None


@pytest.mark.parametrize("ladder", [(), (1.0, -1.0), (1.0, math.nan), (True, 1.0), "12", 1.0, {1.0, 2.0}])
def test_the_policy_refuses_what_is_no_ladder(ladder: Any) -> None:
    policy = make(PPO).policy
    policy.noise_ladder = (1.0, 2.0)
    with pytest.raises(ValueError, match="noise_ladder must be a tuple of finite numbers >= 0"):
        policy.noise_ladder = ladder
    assert policy.noise_ladder == (1.0, 2.0)


# ---- members --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [DQN, SAC])
@pytest.mark.parametrize("by", ["AnnealNoise", "schedule"])
def test_noise_of_members_that_falls_is_said_once(algorithm: type[BaseAlgorithm], by: str) -> None:
    noise = dict(net_arch=[8], members=3, **({} if by == "AnnealNoise" else dict(schedule="cosine")))
    model = make(algorithm, action="discrete" if algorithm is DQN else "box", policy_kwargs=noise)
    callback = AnnealNoise(1.0, 0.5) if by == "AnnealNoise" else None
    with pytest.warns(UserWarning, match=f"^{by}.* lets the noise of members=3 fall.*Leave it out"):
        model.learn(16, callback)
    model.learn(16, callback)  # warnings are errors


@pytest.mark.parametrize("callback", [AnnealNoise(1.0, 1.0, ladder=(0.5, 1.0)), AnnealNoise(0.5, 1.0), None])
def test_noise_of_members_that_does_not_fall_is_nothing_to_say(callback: AnnealNoise | None) -> None:
    make(DQN, policy_kwargs=dict(net_arch=[8], members=3)).learn(16, callback)


def test_a_schedule_that_a_callback_has_replaced_does_not_fall() -> None:
    model = make(DQN, policy_kwargs=dict(net_arch=[8], members=3, schedule="linear"))
    with pytest.warns(UserWarning) as told:
        model.learn(16, AnnealNoise(1.0, 1.0))
    assert len(told) == 1 and "a callback steers the noise scale" in str(told[0].message)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "says"),
    [
        *((dict(start=bad, end=1.0), ValueError, "start must be a finite number >= 0") for bad in NOT_A_SCALE),
        *((dict(start=1.0, end=bad), ValueError, "end must be a finite number >= 0") for bad in NOT_A_SCALE),
        (dict(start="1", end=1.0), TypeError, "start must be a number >= 0, got '1'"),
        (dict(start=True, end=1.0), TypeError, "start must be a number"),
        (dict(start=1.0, end=0.0, shape="exponential"), ValueError, "end must be a finite number > 0.*end at a small scale"),
        (dict(start=1.0, end=0.0, fraction=0.0), ValueError, "fraction must be a finite number > 0 and <= 1"),
        (dict(start=1.0, end=0.0, fraction=1.5), ValueError, "fraction"),
        (
            dict(start=1.0, end=0.0, shape="square"),
            ValueError,
            'shape must be one of "linear", "cosine", "exponential", got .square.*can be a function of the progress that',
        ),
        (dict(start=1.0, end=0.0, shape=None), ValueError, "shape must be one of"),
        *((dict(start=1.0, end=0.0, shape=lambda _, bad=bad: bad), ValueError, "schedule in shape") for bad in NOT_A_SCALE),
        (dict(start=1.0, end=0.0, ladder=(2.0, 1.0)), ValueError, r"ladder\[1\] must be a finite number >= 2, got 1.0"),
        (dict(start=1.0, end=0.0, ladder=(0.0, 1.0)), ValueError, r"ladder\[0\] must be a finite number > 0"),
        (dict(start=1.0, end=0.0, ladder=(1.0,)), ValueError, "ladder must be two multipliers"),
        (dict(start=1.0, end=0.0, ladder=2.0), ValueError, "ladder must be two multipliers"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        AnnealNoise(**kwargs)


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_a_schedule_that_goes_bad_on_the_way_changes_nothing(algorithm: type[BaseAlgorithm]) -> None:
    model = make(algorithm)
    anneal = AnnealNoise(1.0, 0.0, shape=lambda r: -1.0 if 0.6 < r < 0.9 else r)
    with pytest.raises(ValueError, match=r"schedule in shape must give a finite number >= 0, got -1.0 at progress_rem"):
        model.learn(64, anneal)
    assert 0.9 <= model.policy.noise_scale <= 1.0


@pytest.mark.parametrize("callback", [lambda: AnnealNoise(1.0, 0.5), lambda: AdaptNoise(0.1)])
def test_needs_a_flipout_policy(callback: Any) -> None:
    model = make(PPO, policy="MlpPolicy")
    names = '"FlipoutMlpPolicy", "FlipoutCnnPolicy", "FlipoutMultiInputPolicy"'
    name = type(callback()).__name__
    with pytest.raises(ValueError, match=f"{name} needs a flipout policy, got PPO with ActorCriticPolicy. .* one of {names}"):
        model.learn(16, callback())
    assert model.num_timesteps == 0


def test_says_where_no_flipout_policy_is_known() -> None:
    model: Any = SimpleNamespace(policy=th.nn.Linear(1, 1), policy_aliases={})
    with pytest.raises(ValueError, match="There is none for SimpleNamespace yet"):
        flipout_policy(model, "AnnealNoise")


def test_finds_the_policy_in_a_compiled_one() -> None:
    policy = make(PPO).policy
    compiled: Any = SimpleNamespace(policy=SimpleNamespace(_orig_mod=policy))
    assert flipout_policy(compiled, "AnnealNoise") is policy


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_two_that_steer_are_refused(algorithm: type[BaseAlgorithm], nested: bool) -> None:
    model = make(algorithm)
    both = [AnnealNoise(2.0, 0.5, ladder=(0.5, 2.0)), AdaptNoise(0.1)]
    with pytest.raises(ValueError, match=r"AnnealNoise and AdaptNoise would both steer the noise scale"):
        model.learn(32, [both[0], CallbackList([both[1]])] if nested else both)
    assert (model.policy.noise_scale, model.policy.noise_ladder, model.num_timesteps) == (1.0, None, 0)
    model.learn(32, both[0])
    model.learn(32, both[1])


def test_a_child_of_an_event_callback_is_refused() -> None:
    model, anneal = make(PPO), AnnealNoise(1.0, 0.5)
    with pytest.raises(ValueError, match=r"AnnealNoise was given to EveryNTimesteps, .* Pass it to learn"):
        model.learn(16, EveryNTimesteps(1, anneal))
    with pytest.raises(ValueError, match="AnnealNoise was given to EveryNTimesteps"):
        model.learn(16, EveryNTimesteps(1, CallbackList([AnnealNoise(1.0, 0.5)])))
    with pytest.raises(ValueError, match="AnnealNoise was given to EvalCallback"):
        model.learn(16, EvalCallback(vector_env("discrete", 1), callback_on_new_best=AnnealNoise(1.0, 0.5)))
