"""The members of a target network are those of the network that it follows, whatever is loaded or redrawn by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, SAC, TD3

import sb3_flipout

K = 4
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "DQN": (DQN, {}),
    "DQN, priors": (DQN, dict(prior_scale=0.5)),
    "QRDQN": (QRDQN, {}),
    "SAC, critics too": (SAC, dict(perturb="all")),
    "TD3": (TD3, {}),
    "TD3, critics too": (TD3, dict(perturb="all")),
}


def build(kind: str, seed: int) -> Any:
    algorithm, noise = KINDS[kind]
    value_based = algorithm in (DQN, QRDQN)
    kwargs: dict[str, Any] = dict(learning_starts=8, batch_size=8, train_freq=4, seed=seed, device="cpu")
    if value_based:
        kwargs |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    env = vector_env("discrete" if value_based else "box", 1)
    return algorithm("FlipoutMlpPolicy", env, policy_kwargs=dict(members=K, net_arch=[8], **noise), **kwargs)


def bases(net: Any) -> list[th.Tensor]:
    return [draw for layer in sb3_flipout.layers.flipout_layers([net]) for draw in layer.bases()[1].values()]


def same(target: Any, followed: Any) -> bool:
    return all(th.equal(a, b) for a, b in zip(bases(target), bases(followed), strict=True))


def pairs(model: Any) -> list[tuple[Any, Any]]:
    found = [(getattr(model.policy, target), getattr(model.policy, followed)) for target, followed in model.policy.targets]
    return [pair for pair in found if bases(pair[0])]


def load_online(model: Any, other: Any) -> None:
    for (_, mine), (_, its) in zip(pairs(model), pairs(other), strict=True):
        mine.load_state_dict(its.state_dict())


def load_target(model: Any, other: Any) -> None:
    for (mine, _), (its, _) in zip(pairs(model), pairs(other), strict=True):
        mine.load_state_dict(its.state_dict())


def redraw_all(model: Any, _other: Any) -> None:
    sb3_flipout.redraw(model.policy)


def redraw_one(model: Any, _other: Any) -> None:
    sb3_flipout.redraw(pairs(model)[0][1], 77)


@pytest.mark.parametrize("change", [load_online, load_target, redraw_all, redraw_one])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [0, 20])
def test_they_follow_at_the_next_update(kind: str, change: Callable[[Any, Any], None], trained: int) -> None:
    model, other = build(kind, 1), build(kind, 2)
    if trained:
        model.learn(trained)
    before = [draw.clone() for _, followed in pairs(model) for draw in bases(followed)]
    change(model, other)
    assert any(
        not th.equal(a, b) for target, followed in pairs(model) for a, b in zip(bases(target), bases(followed), strict=True)
    )
    model.learn(12, reset_num_timesteps=False)
    for target, followed in pairs(model):
        assert bases(target) and all(th.equal(a, b) for a, b in zip(bases(target), bases(followed), strict=True))
    now = [draw for _, followed in pairs(model) for draw in bases(followed)]
    assert all(th.equal(a, b) for a, b in zip(before, now, strict=True)) == (change is load_target)


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_done_by_hand_nothing_is_copied(kind: str) -> None:
    model = build(kind, 1).learn(20)
    before = [draw for pair in pairs(model) for net in pair for draw in bases(net)]
    model.learn(20, reset_num_timesteps=False)
    now = [draw for pair in pairs(model) for net in pair for draw in bases(net)]
    assert before and all(a is b for a, b in zip(before, now, strict=True))
