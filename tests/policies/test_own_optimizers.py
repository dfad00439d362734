"""An optimizer that a user's policy makes in its own way is kept, and sigma that learns joins the group of its mean weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy

from sb3_flipout.policies import FlipoutActorCriticPolicy, FlipoutDQNPolicy, FlipoutSACPolicy


class Groups(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        critic = [*self.mlp_extractor.value_net.parameters(), *self.value_net.parameters()]
        ids = set(map(id, critic))
        actor = [one for one in self.parameters() if id(one) not in ids]
        groups = [dict(params=actor, weight_decay=0.0), dict(params=critic, weight_decay=0.1)]
        self.optimizer = th.optim.AdamW(groups, lr=lr_schedule(1))


class HeadsAlone(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        heads = [*self.action_net.parameters(), *self.value_net.parameters()]
        self.optimizer = self.optimizer_class(heads, lr=lr_schedule(1), **self.optimizer_kwargs)


class Momentum(DQNPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.optimizer = th.optim.SGD(self.q_net.parameters(), lr=lr_schedule(1), momentum=0.9)


class WeightDecay(ActorCriticPolicy):
    """SB3's class over all parameters, with an option that `optimizer_kwargs` does not have."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.optimizer = th.optim.Adam(self.parameters(), lr=lr_schedule(1), eps=1e-5, weight_decay=0.2)


class FlipoutWeightDecay(FlipoutActorCriticPolicy, WeightDecay):
    pass


class Decay(SACPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.actor.optimizer = th.optim.SGD(self.actor.parameters(), lr=lr_schedule(1), weight_decay=0.01)


class FlipoutGroups(FlipoutActorCriticPolicy, Groups):
    pass


class FlipoutHeadsAlone(FlipoutActorCriticPolicy, HeadsAlone):
    pass


class FlipoutMomentum(FlipoutDQNPolicy, Momentum):
    pass


class FlipoutDecay(FlipoutSACPolicy, Decay):
    pass


def build(algorithm: Any, policy: Any, **noise: Any) -> Any:
    env = vector_env("box" if algorithm in (SAC, TD3) else "discrete", 1)
    kwargs: dict[str, Any] = {}
    if algorithm is PPO:
        kwargs = dict(n_steps=16, batch_size=16)
    elif algorithm is not A2C:
        kwargs = dict(learning_starts=8, batch_size=8)
    if algorithm in (DQN, QRDQN):
        kwargs |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    return algorithm(policy, env, policy_kwargs=noise, seed=0, device="cpu", **kwargs)


def sizes(optimizer: th.optim.Optimizer) -> list[tuple[int, float]]:
    return [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_groups_stay_and_sigma_joins_that_of_its_mean(learn_sigma: bool) -> None:
    plain, model = build(PPO, Groups), build(PPO, FlipoutGroups, learn_sigma=learn_sigma)
    optimizer = model.policy.optimizer
    assert type(optimizer) is th.optim.AdamW
    (actor, none), (critic, some) = sizes(plain.policy.optimizer)
    assert sizes(optimizer) == [(actor * (2 if learn_sigma else 1), none), (critic, some)]
    sigmas = [p for name, p in model.policy.named_parameters() if "sigma" in name]
    before = [sigma.clone() for sigma in sigmas]
    model.learn(32)
    moved = [not th.equal(a, b) for a, b in zip(sigmas, before, strict=True)]
    assert moved and all(moved) if learn_sigma else not any(moved)


def test_what_the_optimizer_was_not_given_does_not_move() -> None:
    model = build(PPO, FlipoutHeadsAlone, learn_sigma=True)
    before = {name: p.clone() for name, p in model.policy.named_parameters()}
    model.learn(32)
    moved = {name for name, p in model.policy.named_parameters() if not th.equal(p, before[name])}
    heads = {name for name in before if name.split(".")[0] in ("action_net", "value_net")}
    assert moved == heads and {"action_net.weight_sigma", "value_net.weight"} <= heads


def test_options_stay_where_class_and_parameters_are_stocks() -> None:
    model = build(PPO, FlipoutWeightDecay)
    assert sizes(model.policy.optimizer) == [(len(list(build(PPO, "MlpPolicy").policy.parameters())), 0.2)]


@pytest.mark.parametrize("members", [None, 4])
def test_dqn_and_sac_keep_theirs(members: int | None) -> None:
    model = build(DQN, FlipoutMomentum, members=members, learn_sigma=True)
    assert type(model.policy.optimizer) is th.optim.SGD and model.policy.optimizer.defaults["momentum"] == 0.9
    learning = [p for p in model.policy.q_net.parameters() if p.requires_grad]
    assert {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]} == set(map(id, learning))
    model.learn(20)
    model = build(SAC, FlipoutDecay)
    assert type(model.actor.optimizer) is th.optim.SGD and sizes(model.actor.optimizer)[0][1] == 0.01
    assert type(model.critic.optimizer) is th.optim.Adam
    model.learn(20)


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN, QRDQN, SAC, TD3])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_stocks_optimizer_is_made_anew_over_all_parameters(algorithm: Any, learn_sigma: bool) -> None:
    model = build(algorithm, "FlipoutMlpPolicy", learn_sigma=learn_sigma)
    net = model.policy if algorithm in (PPO, A2C) else getattr(model, "actor", None) or model.policy.online
    optimizer = model.actor.optimizer if algorithm in (SAC, TD3) else model.policy.optimizer
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(map(id, found)) == set(map(id, net.parameters()))
    assert algorithm is A2C or optimizer.defaults["fused"]
