"""Layers of a user's policy that actions depend on and nothing explores through: perturbed, or said once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch as th
from helpers import ReplayProbe, vector_env
from sb3_contrib import QRDQN, RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC, TD3
from torch import nn

from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.policies import FlipoutActorCriticPolicy, FlipoutDQNPolicy, FlipoutSACPolicy, FlipoutTD3Policy
from sb3_flipout.policies.contrib import FlipoutQRDQNPolicy, FlipoutRecurrentPolicy


def on_policy(policy: Any, algorithm: Any = PPO, **kwargs: Any) -> Any:
    settings: dict[str, Any] = dict(n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    return algorithm(policy, vector_env("discrete", 2), **{**settings, **kwargs})


def perturbed_of(model: Any) -> set[str]:
    return {name for name, layer in model.policy.named_modules() if isinstance(layer, FlipoutLayer)}


# ---- on-policy ---------------------------------------------------------------------------------------------------------


class Trunk(nn.Module):
    """Hidden layers that both nets have in common, before SB3's two."""

    latent_dim_pi = latent_dim_vf = 6

    def __init__(self, features: int) -> None:
        super().__init__()
        self.shared_net, self.policy_net, self.value_net = nn.Linear(features, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, features: th.Tensor) -> Any:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return th.tanh(self.policy_net(th.tanh(self.shared_net(features))))

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return th.tanh(self.value_net(th.tanh(self.shared_net(features))))


class WithTrunk(FlipoutActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor: Any = Trunk(self.features_dim)


def test_what_stands_before_both_nets_is_perturbed_and_replayed() -> None:
    probe = ReplayProbe(8)
    model = on_policy(WithTrunk, policy_kwargs=dict(schedule="constant")).learn(32, callback=probe)
    assert perturbed_of(model) == {"mlp_extractor.shared_net", "mlp_extractor.policy_net", "action_net"}
    assert probe.worst_ratio < 1e-5 and probe.worst_value < 1e-5


class Adapted(FlipoutActorCriticPolicy):
    """A layer that SB3's policies do not have; made while the policy is built, or after it."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.adapter = nn.Linear(5, 5)

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return self.adapter(super().extract_features(obs, features_extractor))


class Late(Adapted):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.late = nn.Linear(5, 5)

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        found = super().extract_features(obs, features_extractor)
        return self.late(found) if hasattr(self, "late") else found  # SB3's constructor does not ask


class AdaptedRecurrent(FlipoutRecurrentPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.adapter = nn.Linear(5, 5)

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return self.adapter(super().extract_features(obs, features_extractor))


@pytest.mark.parametrize(
    ("policy", "noise", "said"),
    [
        (Adapted, {}, "actions depend on adapter, which stays plain, so nothing explores"),
        (Late, {}, "actions depend on adapter, late, which stay plain"),
        (Late, dict(perturb="all"), "actions depend on late, which stays plain"),
        (AdaptedRecurrent, {}, "actions depend on adapter, which stays plain"),
    ],
)
def test_plain_layers_that_actions_depend_on_are_said_once(policy: Any, noise: dict[str, Any], said: str) -> None:
    algorithm = RecurrentPPO if policy is AdaptedRecurrent else PPO
    model = on_policy(policy, algorithm, policy_kwargs=noise)
    with pytest.warns(UserWarning, match=said):
        model.learn(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(16)


@pytest.mark.parametrize("noise", [dict(skip=["adapter"]), dict(perturb="heads"), dict(perturb="all")], ids=str)
def test_nothing_is_said_of_layers_that_are_meant_to_be_plain(noise: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_policy(Adapted, policy_kwargs=noise).learn(16)
        on_policy(WithTrunk).learn(16)


class OwnCritic(FlipoutActorCriticPolicy):
    """Values from a network with a name of the user's, which no action depends on."""

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.baseline = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, obs: Any, deterministic: bool = False) -> Any:
        actions, _, log_prob = super().forward(obs, deterministic)
        return actions, self.predict_values(obs), log_prob

    def predict_values(self, obs: Any) -> th.Tensor:
        return self.baseline(self.extract_features(obs, self.vf_features_extractor))


def test_nothing_is_said_of_critics_of_any_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_policy(OwnCritic).learn(16)


class Frozen(Adapted):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.adapter.requires_grad_(False)


def test_nothing_is_said_of_layers_that_do_not_learn() -> None:
    model = on_policy(Frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(16)


class Regularised(FlipoutActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.adapter = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Dropout(0.5))

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return self.adapter(super().extract_features(obs, features_extractor))


def test_looking_for_plain_layers_changes_nothing() -> None:
    policy = on_policy(Regularised).policy
    policy.set_training_mode(True)
    before, generator = {name: value.clone() for name, value in policy.state_dict().items()}, th.get_rng_state()
    with pytest.warns(UserWarning, match=r"actions depend on adapter\.1, which stays plain"):
        policy.begin_learning()
    assert all(th.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert th.equal(th.get_rng_state(), generator) and policy.training


class Picky(Adapted):
    """Takes batches of as many rows as come in training, and no others."""

    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        if len(obs) not in (1, 2, 8):
            raise RuntimeError(f"no batches of {len(obs)}")
        return super().extract_features(obs, features_extractor)


def test_a_policy_that_cannot_be_asked_learns_all_the_same() -> None:
    model = on_policy(Picky)
    before = model.policy.action_net.weight.clone()
    model.learn(16)
    assert not th.equal(model.policy.action_net.weight, before)


# ---- off-policy --------------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """Takes the place of an extractor that had been perturbed, when the policy has been built."""

    def __init__(self, extractor: Any, width: int) -> None:
        super().__init__()
        self.extractor, self.features_dim, self.late = extractor, extractor.features_dim, nn.Linear(width, width)

    def forward(self, obs: Any) -> th.Tensor:
        return self.late(self.extractor(obs))


def late(policy: Any, nets: tuple[str, ...]) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        policy.__init__(self, *args, **kwargs)
        for name in nets:
            net = getattr(self, name)
            net.features_extractor = Features(net.features_extractor, 5)

    return type("Late", (policy,), {"__init__": __init__})


def off_policy(algorithm: Any, policy: Any, **noise: Any) -> Any:
    settings: dict[str, Any] = dict(learning_starts=4, batch_size=4, seed=0, device="cpu")
    action = "discrete" if algorithm in (DQN, QRDQN) else "box"
    if action == "discrete":
        settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0, target_update_interval=4)
    return algorithm(policy, vector_env(action, 1), policy_kwargs=dict(net_arch=[8], **noise), **settings)


@pytest.mark.parametrize(
    ("algorithm", "policy", "net"),
    [
        (DQN, FlipoutDQNPolicy, "q_net"),
        (QRDQN, FlipoutQRDQNPolicy, "quantile_net"),
        (SAC, FlipoutSACPolicy, "actor"),
        (TD3, FlipoutTD3Policy, "actor"),
    ],
)
def test_layers_put_into_networks_late_are_said_once(algorithm: Any, policy: Any, net: str) -> None:
    model = off_policy(algorithm, late(policy, (net, *([f"{net}_target"] if algorithm != SAC else []))))
    with pytest.warns(UserWarning, match=rf"actions depend on {net}\.features_extractor\.late, which stays plain"):
        model.learn(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(8)


class WithLayer(FlipoutDQNPolicy):
    def make_q_net(self) -> Any:
        net = super().make_q_net()
        net.features_extractor = Features(net.features_extractor, 5)
        return net


@pytest.mark.parametrize(
    "noise",
    [
        {},
        dict(skip=["q_net.features_extractor.late"]),
        dict(perturb="heads"),
        dict(members=3, perturb_frozen=True, keys_per_transition=2),  # a prior is frozen
    ],
    ids=str,
)
def test_nothing_is_said_of_value_networks_that_are_as_they_should_be(noise: dict[str, Any]) -> None:
    model = off_policy(DQN, WithLayer, **noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(8)
    assert ("q_net.features_extractor.late" in perturbed_of(model)) == (not {"skip", "perturb"} & noise.keys())


@pytest.mark.parametrize("algorithm", [SAC, TD3])
@pytest.mark.parametrize("noise", [{}, dict(perturb="heads")], ids=str)
def test_nothing_is_said_of_critics(algorithm: Any, noise: dict[str, Any]) -> None:
    policy = {SAC: FlipoutSACPolicy, TD3: FlipoutTD3Policy}[algorithm]
    model = off_policy(algorithm, late(policy, ("critic", "critic_target")), **noise)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(8)
