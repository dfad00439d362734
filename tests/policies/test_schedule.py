"""The noise falls over training as the setting `schedule` says, without a callback; replay stays exact under it."""

import math
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout.callbacks import AdaptNoise, AnnealNoise

ON_POLICY = dict(n_steps=16, batch_size=32, n_epochs=1)
REPLAYED = dict(learning_starts=4, batch_size=8)
ALGORITHMS: dict[Any, tuple[str, dict[str, Any]]] = {
    PPO: ("CartPole-v1", ON_POLICY),
    A2C: ("CartPole-v1", dict(n_steps=16)),
    DQN: ("CartPole-v1", dict(exploration_initial_eps=0.0, exploration_final_eps=0.0, **REPLAYED)),
    SAC: ("Pendulum-v1", REPLAYED),
}


def build(algorithm: Any, **policy_kwargs: Any) -> Any:
    env, kwargs = ALGORITHMS[algorithm]
    vec_env = make_vec_env(env, n_envs=2, seed=0)
    return algorithm("FlipoutMlpPolicy", vec_env, seed=0, device="cpu", policy_kwargs=policy_kwargs, **kwargs)


class Scales(BaseCallback):
    """Keeps the scale under which each collection step acted."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        self.seen.append((self.num_timesteps - self.model.n_envs, self.model.policy.effective_scale))
        return True


SHAPES = {
    "linear": lambda left, end: end + (1 - end) * left,
    "cosine": lambda left, end: end + (1 - end) * (1 - math.cos(math.pi * left)) / 2,
    "exponential": lambda left, end: end ** (1 - left),
}


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_falls_with_the_steps_of_training(algorithm: Any, schedule: str) -> None:
    model, scales, total = build(algorithm, schedule=schedule, schedule_end=0.1, schedule_fraction=0.5), Scales(), 256
    model.policy.noise_scale = 0.8
    model.learn(total, callback=scales)
    for step, scale in scales.seen:
        at = step - step % 32 if algorithm in (PPO, A2C) else step  # rollouts are of 32 steps, and one scale
        left = max(0.0, 1 - at / total / 0.5)
        assert scale == pytest.approx(0.8 * SHAPES[schedule](left, 0.1))
    assert model.policy.noise_scale == 0.8  # the user's own number stays
    assert model.policy.effective_scale == pytest.approx(0.08)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_any_setting_it_falls_to_0_and_stays_that_of_actors_off_policy(algorithm: Any) -> None:
    model, scales, total = build(algorithm), Scales(), 320
    falls, on_policy = algorithm is not SAC, algorithm in (PPO, A2C)
    assert model.policy.noise_settings.learn_sigma is not falls
    sigma = {name: value.detach().clone() for name, value in model.policy.named_parameters() if name.endswith("_sigma")}
    model.learn(total, callback=scales)
    assert len(scales.seen) == total // 2
    for step, scale in scales.seen:
        at = step - step % 32 if on_policy else step  # 30 % of training are 96 steps
        assert scale == pytest.approx(max(0.0, 1 - at / 96) if falls else 1.0)
    assert model.policy.effective_scale == (0.0 if falls else 1.0)
    moved = [name for name, value in model.policy.named_parameters() if name in sigma and not value.equal(sigma[name])]
    assert sigma and bool(moved) is not falls


def test_noise_that_members_are_made_of_stays() -> None:
    model = build(DQN, members=4).learn(320)
    assert model.policy.effective_scale == 1.0 and model.policy.noise_settings.learn_sigma is True


def test_the_first_ratio_is_exact_while_it_falls() -> None:
    model = build(PPO, schedule="linear", schedule_fraction=1.0)
    model.learn(256)
    assert abs(model.logger.name_to_value["train/approx_kl"]) <= 1e-5


def test_it_is_saved_and_goes_on_over_calls_of_learn(tmp_path: Path) -> None:
    whole, parts = Scales(), Scales()
    build(PPO, schedule="linear", schedule_fraction=1.0).learn(256, callback=whole)
    model = build(PPO, schedule="linear", schedule_fraction=1.0)
    model.learn(128)
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", env=make_vec_env("CartPole-v1", n_envs=2, seed=0), device="cpu")
    assert loaded.policy.noise_settings.schedule == "linear"
    assert loaded.policy.effective_scale == model.policy.effective_scale == 0.0  # its 128 steps are all done
    loaded.learn(128, callback=parts, reset_num_timesteps=False)
    assert parts.seen == [(step, scale) for step, scale in whole.seen if step >= 128]
    assert parts.seen[0][1] == 0.5


@pytest.mark.parametrize("algorithm", [PPO, DQN])
@pytest.mark.parametrize("make", [lambda: AnnealNoise(0.5, 0.5), lambda: AdaptNoise(target=0.1, alpha=1.0, measure="kl")])
def test_a_callback_that_steers_wins_and_that_is_said_once(algorithm: Any, make: Any) -> None:
    model, scales = build(algorithm, schedule="linear"), Scales()
    callback = make()
    expected = 0.5 if isinstance(callback, AnnealNoise) else 1.0
    with pytest.warns(UserWarning, match="schedule='linear' of the policy has no effect") as told:
        model.learn(96, callback=[callback, scales])
    assert len(told) == 1
    first = 2 if algorithm is DQN else 0  # AnnealNoise speaks off-policy after the first step
    assert {scale for _, scale in scales.seen[first:]} == {expected}
    later = Scales()
    model.learn(64, callback=later)  # without it, the schedule has its effect again
    assert later.seen[-1][1] < expected


def test_without_a_number_of_steps_it_is_refused() -> None:
    model = build(PPO, schedule="linear")
    _, callback = model._setup_learn(0)
    with pytest.raises(ValueError, match=r"schedule='linear' needs the number of timesteps .* learn\(total_timesteps\)"):
        model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    assert model.policy.noise_state()["steps"] == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(schedule="linaer"), ValueError, "schedule must be one of .*'linaer'.*Did you mean.*linear"),
        (dict(schedule=0.5), ValueError, "schedule must be one of .*got 0.5"),
        (dict(schedule="linear", schedule_end=-0.1), ValueError, "schedule_end must be .*>= 0, got -0.1"),
        (dict(schedule="linear", schedule_end=math.nan), ValueError, "schedule_end must be .*got nan"),
        (dict(schedule="linear", schedule_end=math.inf), ValueError, "schedule_end must be .*got inf"),
        (dict(schedule="linear", schedule_fraction=0.0), ValueError, "schedule_fraction must be .*got 0.0"),
        (dict(schedule="linear", schedule_fraction=1.5), ValueError, "schedule_fraction must be .*got 1.5"),
        (dict(schedule="exponential", schedule_end=0.0), ValueError, "schedule_end must be .*never reaches 0"),
        (dict(schedule="constant", schedule_end=0.1), ValueError, "schedule_end=0.1 has no effect"),
        (dict(schedule="constant", schedule_fraction=0.1), ValueError, "schedule_fraction=0.1 has no effect"),
        (dict(schedule="linear", schedule_end="0"), TypeError, "schedule_end must be .*got '0'"),
    ],
)
def test_bad_schedules_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(PPO, **settings)


def test_training_in_small_calls_says_once_that_its_noise_is_over() -> None:
    model = build(PPO)
    model.learn(64)
    with pytest.warns(UserWarning, match=r"from step 64 to 128 without weight noise.*schedule=\"constant\"") as told:
        model.learn(64, reset_num_timesteps=False)
        model.learn(64, reset_num_timesteps=False)
    assert len([one for one in told if "without weight noise" in str(one.message)]) == 1


@pytest.mark.parametrize("settings", [dict(schedule="linear"), dict(schedule="constant")])
def test_whoever_has_chosen_a_schedule_is_told_nothing(settings: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    model = build(PPO, **settings)
    model.learn(64)
    model.learn(64, reset_num_timesteps=False)
    model = build(PPO)  # nor whoever steers the noise, or starts anew
    model.learn(64)
    model.learn(64)
    model.learn(64, AnnealNoise(1.0, 0.5), reset_num_timesteps=False)
    assert not [one for one in recwarn if "noise" in str(one.message)]


def test_the_default_gives_way_where_nobody_has_said_how_long_training_is() -> None:
    model = build(PPO)
    _, callback = model._setup_learn(0)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 16)
    assert model.policy.effective_scale == 1.0


def test_a_model_that_learned_sigma_by_default_goes_on_under_constant_noise() -> None:
    """DQN's default was constant noise of learned sigma; settings saved then name no schedule."""
    model = build(DQN)
    state = model.policy.noise_state()
    state["settings"] |= dict(schedule=None, learn_sigma=True)
    with pytest.warns(UserWarning, match="which learned sigma by default; it goes on with sigma as it is, fixed"):
        model.policy.set_noise_state(state)
    assert model.policy.noise_settings.falls == "constant"


def test_a_resumed_training_is_told_nothing_where_its_noise_is_over(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Its end is the one that it had: the noise has fallen as it was to fall."""
    model = build(PPO).learn(128)
    model.num_timesteps = 96  # as a checkpoint has it
    model.save(tmp_path / "model")
    PPO.load(tmp_path / "model", env=model.get_env()).learn(128 - 96, reset_num_timesteps=False)
    assert not [one for one in recwarn if "without weight noise" in str(one.message)]
    with pytest.warns(UserWarning, match="from step 96 to 160 without weight noise"):
        PPO.load(tmp_path / "model", env=model.get_env()).learn(64, reset_num_timesteps=False)
