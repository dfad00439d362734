"""What the hooks tell, word for word, and when."""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout.finite import NonFiniteError
from sb3_flipout.hooks import _batches, _models, _numbers, _told

AT_7 = SimpleNamespace(num_timesteps=7)
STOP = (
    "a policy that learned from it would be lost, so training stops; nothing has learned from it. Mend the environment (SB3's "
    "VecCheckNan tells the very step), or replace the number by np.nan_to_num in a wrapper. A features extractor of your own "
    "may get such observations: they are not looked at then."
)


def build(algorithm: Any = A2C, policy_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    sizes: dict[str, Any] = dict(n_steps=4)
    if algorithm is DQN:
        sizes = dict(buffer_size=100, learning_starts=4, batch_size=4, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    return algorithm("FlipoutMlpPolicy", env, **{**sizes, **kwargs}, policy_kwargs=policy_kwargs, seed=1, device="cpu")


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught]


# ---- numbers that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("places", "several"), [([3], "environment 3"), ([0, 2], "environments [0, 2]")])
def test_what_came_in(places: list[int], several: str) -> None:
    told = _numbers._wrong(AT_7, "reward", places, np.inf)
    assert str(told) == f"the reward of {several} was inf at step 7 or shortly before: {STOP}"
    assert told.where == f"reward of {several}"


def test_what_is_broken() -> None:
    told = _numbers._broken(AT_7, "q.weight")
    assert str(told) == (
        "q.weight of the policy of SimpleNamespace is not finite at step 7: a gradient step has broken it, at most some 1000 "
        "steps ago. Try a lower learning rate, a smaller sigma, or rewards of a smaller scale. The callback StopOnNonFinite "
        "stops at that gradient step and goes back to a model that is good."
    )
    assert told.where == "q.weight"


def rollout(**changed: Any) -> Any:
    names = ("observations", "rewards", "values", "log_probs", "actions")
    arrays = {name: np.zeros((3, 2), np.float32) for name in names}
    arrays["observations"] = np.zeros((3, 2, 5), np.float32)
    return SimpleNamespace(**{**arrays, **changed})


def with_nan(name: str) -> Any:
    buffer = rollout()
    getattr(buffer, name)[1, 1] = np.nan
    return buffer


@pytest.mark.parametrize("name", ["values", "log_probs", "actions"])
def test_outputs_of_a_rollout(name: str) -> None:
    model = build()
    model.rollout_buffer = with_nan(name)
    with pytest.raises(NonFiniteError) as told:
        _numbers.check_rollout(model, model.policy)
    assert str(told.value) == (
        f"{name} of the rollout of A2C that ended at step 0 are not finite, though its observations are: the numbers are too "
        "large for the network. Bring observations to a scale of about 1 (VecNormalize does that), or use a smaller sigma."
    )
    assert told.value.where == name


@pytest.mark.parametrize(("name", "what"), [("observations", "observation"), ("rewards", "reward")])
def test_what_a_rollout_was_given(name: str, what: str) -> None:
    model = build()
    model.rollout_buffer = with_nan(name)
    with pytest.raises(NonFiniteError) as told:
        _numbers.check_rollout(model, model.policy)
    assert told.value.where == f"{what} of environment 1"
    model.policy.marks.numbers_guarded = True
    assert _numbers.check_rollout(model, model.policy) is False
    assert str(model.policy.marks.non_finite) == str(told.value)


def test_a_finite_rollout_and_one_without_such_arrays() -> None:
    model = build()
    for buffer in (rollout(), SimpleNamespace()):
        model.rollout_buffer = buffer
        assert _numbers.check_rollout(model, model.policy) is True


def test_several_arrays_are_wrong_and_the_first_is_told() -> None:
    model = build()
    model.rollout_buffer = with_nan("values")
    model.rollout_buffer.rewards[0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=r"^the reward of environment 0 was inf"):
        _numbers.check_rollout(model, model.policy)


@pytest.mark.parametrize("named", [False, True])
def test_shapes(named: bool) -> None:
    box = spaces.Box(-1, 1, (5,), np.float32)
    observed = np.zeros((2, 4), np.float32)
    algorithm = SimpleNamespace(
        observation_space=spaces.Dict(seen=box) if named else box, _last_obs=dict(seen=observed) if named else observed
    )
    cause = RuntimeError("of torch")
    with pytest.raises(ValueError) as told:
        _numbers._check_shapes(algorithm, cause)
    what = "observation 'seen'" if named else "observation"
    assert str(told.value) == (
        f"the environments gave the {what} in shape (4,), and their space says (5,). Mend the environment: "
        "gymnasium.utils.env_checker.check_env finds such things."
    )
    assert told.value.__cause__ is cause


@pytest.mark.parametrize(
    "observed", [dict(other=np.zeros((2, 4))), dict(seen=[0.0]), np.zeros((2, 5)), None, dict(seen=np.zeros((2, 5)))]
)
def test_shapes_that_say_nothing(observed: Any) -> None:
    space: Any = spaces.Dict(seen=spaces.Box(-1, 1, (5,))) if isinstance(observed, dict) else spaces.Box(-1, 1, (5,))
    _numbers._check_shapes(SimpleNamespace(observation_space=space, _last_obs=observed), RuntimeError())
    _numbers._check_shapes(SimpleNamespace(observation_space=SimpleNamespace(), _last_obs=observed), RuntimeError())


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
        "the replay buffer held 8 transitions without the numbers that bootstrap and reward_noise need: it was filled without "
        "these settings. They have been given numbers now."
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


class Spied:
    """A policy's calls in their order, each made all the same."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.calls: list[Any] = []
        for name in names:
            monkeypatch.setattr(model.policy, name, self._recorded(name, getattr(model.policy, name)))

    def _recorded(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args, *kwargs.values()))
            return method(*args, **kwargs)

        return call


@pytest.mark.parametrize("algorithm", [A2C, DQN])
def test_a_collection_in_its_order(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(algorithm)
    model._setup_learn(100)
    spied = Spied(model, monkeypatch, "meet_observations", "begin_rollout", "collecting", "end_episodes")

    def collect(*args: Any, **kwargs: Any) -> Any:
        spied.calls.append((args, kwargs))
        return True

    hook = _told.collect_rollout if algorithm is A2C else _told.collect_transitions
    monkeypatch.setattr(_numbers, "check_rollout", lambda *_: True)
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
    monkeypatch.setattr(_numbers, "check_rollout", lambda *_: True)
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
    assert _told.sample_action(lambda *args: args, model, 4)[2:] == (None, 1)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize(
    ("reward", "last", "what"),
    [
        ([0.0, np.nan], None, "reward of environment 1"),
        ([0.0, 0.0], np.full(4, np.inf, np.float32), "observation of environment 1"),
        ([np.nan, 0.0], np.full(4, np.inf, np.float32), "reward of environment 0"),
        ([0.0, 0.0], np.zeros(4, np.float32), None),
        ([0.0, 0.0], None, None),
    ],
)
def test_a_transition_that_is_stored(reward: list[float], last: Any, what: str | None, guarded: bool) -> None:
    model, stored = build(DQN), []
    model.policy.marks.numbers_guarded = guarded
    infos = [{}, {} if last is None else {"terminal_observation": last}]
    transition = (np.zeros(2), np.zeros((2, 4), np.float32), np.array(reward), np.array([False, last is not None]), infos)

    def store() -> None:
        _numbers.store_transition(lambda *args: stored.append(args), model, model.replay_buffer, *transition)

    if what is not None and not guarded:
        with pytest.raises(NonFiniteError) as told:
            store()
        assert told.value.where == what
    else:
        store()
        assert (model.policy.marks.non_finite is None) == (what is None)
    assert stored == ([(model, model.replay_buffer, *transition)] if what is None else [])


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
