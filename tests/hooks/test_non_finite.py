"""What is told of numbers that are not finite, word for word, and of shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import DQN
from told_cases import build

from sb3_flipout.finite import NonFiniteError
from sb3_flipout.hooks import _finite

AT_7 = SimpleNamespace(num_timesteps=7)
STOP = (
    "a policy that learned from it would be lost, so training stops; nothing has learned from it. Mend the environment (SB3's "
    "VecCheckNan tells the very step), or replace the number by np.nan_to_num in a wrapper. A features extractor of your own "
    "may get such observations: they are not looked at then."
)


@pytest.mark.parametrize(("places", "several"), [([3], "environment 3"), ([0, 2], "environments [0, 2]")])
def test_what_came_in(places: list[int], several: str) -> None:
    told = _finite._wrong(AT_7, "reward", places, np.inf)
    assert str(told) == f"the reward of {several} was inf at step 7 or shortly before: {STOP}"
    assert told.where == f"reward of {several}"


@pytest.mark.parametrize("guarded", [False, True])
def test_what_is_broken(guarded: bool) -> None:
    told = _finite._broken(AT_7, "q.weight", guarded)
    advice = " The callback StopOnNonFinite stops at that gradient step and goes back to a model that is good."
    assert str(told) == (
        "q.weight of the policy of SimpleNamespace is not finite at step 7: a gradient step has broken it, at most some 1000 "
        f"steps ago. Try a lower learning rate, a smaller sigma, or rewards of a smaller scale.{'' if guarded else advice}"
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
        _finite.check_rollout(model, model.policy)
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
        _finite.check_rollout(model, model.policy)
    assert told.value.where == f"{what} of environment 1"
    model.policy.marks.numbers_guarded = True
    assert _finite.check_rollout(model, model.policy) is False
    assert str(model.policy.marks.non_finite) == str(told.value)


def test_a_finite_rollout_and_one_without_such_arrays() -> None:
    model = build()
    for buffer in (rollout(), SimpleNamespace()):
        model.rollout_buffer = buffer
        assert _finite.check_rollout(model, model.policy) is True


@pytest.mark.parametrize("name", ["values", "log_probs", "actions", "rewards"])
def test_a_rollout_that_has_one_array_alone(name: str) -> None:
    model = build()
    model.rollout_buffer = SimpleNamespace(**{name: np.full((3, 2), np.nan, np.float32)})
    with pytest.raises(NonFiniteError) as told:
        _finite.check_rollout(model, model.policy)
    assert told.value.where == ("reward of environments [0, 1]" if name == "rewards" else name)


@pytest.mark.parametrize(
    ("next_look", "steps", "now", "looks"),
    [
        (1000, 999, False, False),
        (1000, 1000, False, True),
        (1000, 0, False, False),
        (1001, 0, False, True),
        (1000, 999, True, True),
    ],
)
def test_when_parameters_are_looked_at(next_look: int, steps: int, now: bool, looks: bool) -> None:
    model = build()
    with th.no_grad():
        model.policy.action_net.weight[0, 0] = th.nan
    model.policy.marks.next_looks, model.num_timesteps = (next_look, 1000), steps
    if looks:
        with pytest.raises(NonFiniteError, match=r"^action_net\.weight of the policy of A2C is not finite"):
            _finite.check_parameters(model, model.policy, now)
        assert model.policy.marks.next_looks == (steps + _finite.LOOK_EVERY, _finite.LOOK_EVERY)
    model.policy.marks.numbers_guarded = True
    _finite.check_parameters(model, model.policy, now)


def test_several_arrays_are_wrong_and_the_first_is_told() -> None:
    model = build()
    model.rollout_buffer = with_nan("values")
    model.rollout_buffer.rewards[0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=r"^the reward of environment 0 was inf"):
        _finite.check_rollout(model, model.policy)


@pytest.mark.parametrize("named", [False, True])
def test_shapes(named: bool) -> None:
    box = spaces.Box(-1, 1, (5,), np.float32)
    observed = np.zeros((2, 4), np.float32)
    algorithm = SimpleNamespace(
        observation_space=spaces.Dict(seen=box) if named else box, _last_obs=dict(seen=observed) if named else observed
    )
    cause = RuntimeError("of torch")
    with pytest.raises(ValueError) as told:
        _finite._check_shapes(algorithm, cause)
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
    _finite._check_shapes(SimpleNamespace(observation_space=space, _last_obs=observed), RuntimeError())
    _finite._check_shapes(SimpleNamespace(observation_space=SimpleNamespace(), _last_obs=observed), RuntimeError())


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
        _finite.store_transition(lambda *args: stored.append(args), model, model.replay_buffer, *transition)

    if what is not None and not guarded:
        with pytest.raises(NonFiniteError) as told:
            store()
        assert told.value.where == what
    else:
        store()
        assert (model.policy.marks.non_finite is None) == (what is None)
    assert stored == ([(model, model.replay_buffer, *transition)] if what is None else [])
