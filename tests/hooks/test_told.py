"""What the hooks tell, word for word, and when."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from told_cases import Spied, build, warned

from sb3_flipout.hooks import _batches, _finite, _models, _told

# ---- batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "times", "instead"), [(3, 10, 10), (64, 10, 60), (7, 2, 8)])
def test_batch_sizes(batch_size: int, times: int, instead: int) -> None:
    with pytest.raises(ValueError) as told:
        _batches._check_divides(batch_size, times)
    assert str(told.value) == (
        f"batch_size={batch_size} must be a multiple of keys_per_transition={times}: a batch holds each of its transitions "
        f"{times} times. Use batch_size={instead}, say."
    )
    _batches._check_divides(instead, times)


def test_the_batch_is_looked_at_before_training() -> None:
    for members, times, size in ((4, 2, 7), (4, 4, 6)):
        model = build(DQN, dict(members=members, keys_per_transition=times), batch_size=4)
        model.batch_size = size
        with pytest.raises(ValueError, match=rf"^batch_size={size} must be a multiple of keys_per_transition={times}"):
            _batches.check_batch_size(model, model.policy)
    model = build(DQN, dict(members=4), batch_size=7)
    _batches.check_batch_size(model, model.policy)


def test_a_sample_without_numbers() -> None:
    with pytest.raises(TypeError) as told:
        _batches._numbers(SimpleNamespace(actions=th.zeros(2, 1)))
    assert str(told.value) == (
        "a sample of the replay buffer carries no numbers of its transitions, which bootstrap and reward_noise need: what was "
        "put in place of its `sample` makes the actions anew. Hand on the actions that `sample` of the class gives."
    )


def test_a_buffer_that_was_filled_without_numbers() -> None:
    filled = build(DQN).learn(8)
    members = dict(members=4, bootstrap=0.5)
    model = build(DQN, members)
    model.replay_buffer = filled.replay_buffer
    assert warned(lambda: _batches.number_stored(model, model.policy)) == [
        "the replay buffer held 8 transitions without the numbers that bootstrap and reward_noise need: they were stored "
        "without these settings. They have been given numbers now."
    ]
    assert warned(lambda: _batches.number_stored(model, model.policy)) == []


# ---- while it collects and learns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("initial", "final", "tells"), [(0.1, 0.0, True), (0.0, 0.1, True), (0.0, 0.0, False)])
def test_epsilon(initial: float, final: float, tells: bool) -> None:
    model = build(DQN, exploration_initial_eps=initial, exploration_final_eps=final)
    told = [
        "DQN explores by weight noise and by epsilon-greedy at once. To explore by weight noise alone, pass "
        "exploration_initial_eps=0.0 and exploration_final_eps=0.0."
    ]
    assert warned(lambda: _told._warn_of_epsilon(model)) == (told if tells else [])
    assert warned(lambda: _told._warn_of_epsilon(model)) == [], "once per model"
    assert warned(lambda: _told._warn_of_epsilon(build(A2C))) == []


def test_a_schedule_needs_the_steps_of_the_training() -> None:
    model = build(A2C, dict(schedule="linear"))
    model._total_timesteps = 0
    with pytest.raises(ValueError) as told:
        _told._follow_schedule(model)
    assert str(told.value) == (
        "schedule='linear' needs the number of timesteps of the whole training, and A2C has not been told: it is not in a "
        'call of learn(total_timesteps). Use schedule="constant", and set policy.noise_scale where you collect by hand.'
    )


@pytest.mark.parametrize(("total", "at", "follows"), [(0, 0, False), (1, 1, True), (8, 4, True)])
def test_an_update_leaves_the_schedule_where_it_has_come_to(total: int, at: int, follows: bool) -> None:
    model = build(A2C, dict(schedule="linear"))
    model._total_timesteps, model.num_timesteps, model._num_timesteps_at_start = total, at, 0
    before = model.policy._schedule_factor

    def update(algorithm: Any, *args: Any, **kwargs: Any) -> Any:
        assert algorithm is model
        return args, kwargs

    model._last_obs = np.zeros((2, 5), np.float32)
    assert _told.train_on_rollout(update, model, 1, by="name") == ((1,), dict(by="name"))
    assert model.policy._schedule_factor == (model.policy.noise_settings.factor_at(at / total) if follows else before)
    assert (model.policy._schedule_factor < before) == follows


def test_noise_that_is_over() -> None:
    model = build(A2C)

    def follow(total: int, began: int) -> list[str]:
        model._total_timesteps, model._num_timesteps_at_start = total, began
        return warned(lambda: _told._warn_of_fallen_noise(model))

    assert follow(100, 0) == [] and follow(100, 1) == []
    assert follow(100, 90) == [
        "this call of learn() goes on from step 90 to 100 without weight noise: by default it falls to 0 over the first part "
        "of all steps that SB3 knows of, and those are over. Where training is cut into calls of "
        'learn(reset_num_timesteps=False), use policy_kwargs=dict(schedule="constant"), or AnnealNoise.'
    ]
    assert follow(100, 90) == [], "once per model"


@pytest.mark.parametrize("why", ["constant", "steered", "goes_on"])
def test_noise_that_is_not_over(why: str) -> None:
    model = build(A2C, dict(schedule="constant") if why == "constant" else None)
    if why != "constant":
        setattr(model.policy.marks, why, True)
    model._total_timesteps, model._num_timesteps_at_start = 100, 90
    assert warned(lambda: _told._warn_of_fallen_noise(model)) == []


def test_a_training_that_goes_on() -> None:
    model = build(A2C)
    for began, total, before, goes_on in (
        (0, 100, 100, False),
        (1, 100, 100, True),
        (50, 100, 100, True),
        (50, 150, 100, False),
    ):
        model._total_timesteps = before

        def set_up(algorithm: Any, *args: Any, began: int = began, total: int = total, **kwargs: Any) -> Any:
            assert (args, kwargs) == ((total,), dict(by="name"))
            algorithm._num_timesteps_at_start, algorithm._total_timesteps = began, total
            algorithm._last_obs = np.zeros((2, 4), np.float32)
            return total, NoCallback()

        found, _ = _told.set_up_learning(set_up, model, total, by="name")
        assert found == total and model.policy.marks.goes_on is goes_on


class NoCallback(BaseCallback):
    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("dones", [None, np.array([True, False])])
def test_ends_of_episodes(dones: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, infos = build(A2C), [{}, {}]
    spied = Spied(model, monkeypatch, "end_step")
    _told.end_step(lambda *args: spied.calls.append(args), model, infos, dones)
    assert spied.calls == [(model, infos, dones), *([] if dones is None else [("end_step", dones)])]


@pytest.mark.parametrize("hook", ["_on_rollout_start", "_on_rollout_end"])
def test_forward_passes_of_a_user_s_callbacks_are_no_steps(hook: str) -> None:
    model = build(A2C)
    model.policy.marks.step_due = True
    callback = _told._TellsOfOthers()
    callback.model = model
    getattr(callback, hook)()
    assert model.policy.marks.step_due is False and callback._on_step() is True


@pytest.mark.parametrize(("made", "told_of"), [(3, 1), (2, 2)])
def test_steps_that_nobody_told_of(made: int, told_of: int) -> None:
    model = build(A2C)
    model._setup_learn(100)

    def collect() -> None:
        with _told._counted_steps(model):
            model.num_timesteps += made * model.n_envs
            for _ in range(told_of):
                model.policy._keys.step += 1

    model.policy.begin_rollout()
    told = [
        f"A2C has made {made} collection steps, and the noise has been told of {told_of}, so resample='step' is not kept: the "
        "other steps drew fresh noise, or none. In a collect_rollouts of your own, call self._update_info_buffer(infos, dones)"
        " after each step of the environments, and off-policy choose actions by self._sample_action(learning_starts, "
        "action_noise, n_envs), as SB3's do."
    ]
    assert warned(collect) == (told if made > told_of else [])
    assert warned(collect) == [], "once per model"


@pytest.mark.parametrize("algorithm", [A2C, DQN])
def test_a_collection_in_its_order(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(algorithm)
    model._setup_learn(100)
    spied = Spied(model, monkeypatch, "meet_observations", "begin_rollout", "collecting", "end_episodes")

    def collect(*args: Any, **kwargs: Any) -> Any:
        spied.calls.append((args, kwargs))
        return True

    hook = _told.collect_rollout if algorithm is A2C else _told.collect_transitions
    monkeypatch.setattr(_finite, "check_rollout", lambda *_: True)
    assert hook(collect, model, 1, by="name") is True
    collecting = [("collecting", 2)] if algorithm is A2C else []  # off-policy each step is told by itself
    assert spied.calls[1:] == [("begin_rollout",), *collecting, ((model, 1), dict(by="name"))]
    assert spied.calls[0][0] == "meet_observations" and spied.calls[0][1] is model._last_obs


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("kind", ["on-policy", "off-policy"])
def test_a_collection_that_was_broken_off(kind: str, ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(A2C if kind == "on-policy" else DQN)
    model._setup_learn(100)
    spied = Spied(model, monkeypatch, "end_episodes")
    monkeypatch.setattr(_finite, "check_rollout", lambda *_: True)
    finished = not ended if kind == "on-policy" else SimpleNamespace(continue_training=not ended)
    hook = _told.collect_rollout if kind == "on-policy" else _told.collect_transitions
    assert hook(lambda *_: finished, model) is finished
    assert [(name, flags.tolist(), flags.dtype) for name, flags in spied.calls] == (
        [("end_episodes", [True, True], np.dtype(bool))] if ended else []
    )


def test_the_choice_of_an_action(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(DQN)
    model._setup_learn(100)
    spied = Spied(model, monkeypatch, "collecting", "follow_schedule")
    given = _told.sample_action(lambda *args: args, model, 4, "action noise", 2)
    assert given == (model, 4, "action noise", 2)
    assert spied.calls == [("follow_schedule", 0.0), ("collecting", 2)]
    assert _told.sample_action(lambda *args, **kwargs: (args, kwargs), model, 4, n_envs=3) == ((model, 4), dict(n_envs=3))
    assert _told.sample_action(lambda *args: args, model, 4) == (model, 4)
    assert [call for call in spied.calls if call[0] == "collecting"] == [
        ("collecting", 2),
        ("collecting", 3),
        ("collecting", 1),
    ]


# ---- saving -------------------------------------------------------------------------------------------------------------


def test_save_takes_what_the_stock_method_takes(tmp_path: Path) -> None:
    model = build(PPO, batch_size=4, n_epochs=1)
    model.save(tmp_path / "by-place", ["verbose"])
    model.save(tmp_path / "by-name", exclude=["verbose"])
    for name in ("by-place", "by-name"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as file:
            data = json.loads(file.read("data"))
        assert "verbose" not in data and _models.STATE in data
    assert _models.STATE not in vars(model), "it is the file's"
