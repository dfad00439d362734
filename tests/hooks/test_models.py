"""What is told when a model is built, seeded, and asked which policy and networks it has."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_flipout import hooks
from sb3_flipout.buffers import KeyedBufferMixin
from sb3_flipout.hooks import _finite, _models, _told
from sb3_flipout.policies.on_policy import FlipoutActorCriticPolicy
from sb3_flipout.replay_buffers import NumberedBufferMixin


def small() -> dict[str, Any]:
    """SB3 writes into policy_kwargs, so each model has its own."""
    return dict(seed=0, device="cpu", policy_kwargs=dict(net_arch=[4]))


@pytest.fixture(scope="module")
def ppo() -> PPO:
    return PPO("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, **small())


def compiled(policy: Any) -> Any:
    """As ``torch.compile`` wraps it."""
    return SimpleNamespace(_orig_mod=policy)


def test_a_policy_that_torch_has_wrapped_is_itself(ppo: PPO) -> None:
    assert _models.policy_of(ppo) is ppo.policy
    assert _models.policy_of(SimpleNamespace(policy=compiled(ppo.policy))) is ppo.policy


@pytest.mark.parametrize(
    ("of", "has"),
    [
        (lambda ppo: ppo, True),
        (lambda ppo: SimpleNamespace(policy=compiled(ppo.policy)), True),
        (lambda ppo: SimpleNamespace(policy=th.nn.Linear(1, 1)), False),
        (lambda ppo: SimpleNamespace(policy=None, policy_class=FlipoutActorCriticPolicy), True),
        (lambda ppo: SimpleNamespace(policy_class=FlipoutActorCriticPolicy), True),
        (lambda ppo: SimpleNamespace(policy_class=ActorCriticPolicy), False),
        (lambda ppo: SimpleNamespace(policy_class=lambda *args: FlipoutActorCriticPolicy(*args)), False),
    ],
)
def test_who_has_a_flipout_policy(of: Callable[[PPO], Any], has: bool, ppo: PPO) -> None:
    assert _models.has_flipout_policy(of(ppo)) is has


def test_a_seed_reaches_sb3_and_the_noise() -> None:
    heard: list[Any] = []

    def original(algorithm: Any, *args: Any) -> None:
        heard.append((algorithm, args))

    policy = SimpleNamespace(reseed_noise=lambda seed: heard.append(seed))
    algorithm = SimpleNamespace(policy=policy)
    _models.seed(original, algorithm, 3)
    assert heard == [(algorithm, (3,)), 3]
    heard.clear()
    _models.seed(original, algorithm)
    assert heard == [(algorithm, (None,))], "no seed: SB3 seeds nothing either"
    heard.clear()
    for without in (SimpleNamespace(policy=None), SimpleNamespace()):
        _models.seed(original, without, 3)
    assert [args for _, args in heard] == [(3,), (3,)]


class Built:
    """An algorithm that is being built, and notes in which order things happen."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)
        self.policy = SimpleNamespace(set_noise_state=self.note, noise_settings=SimpleNamespace(needs_numbers=False))
        self.noted: list[Any] = []

    def note(self, what: Any) -> None:
        self.noted.append(what)


def test_a_model_that_is_built_continues_from_its_noise_state() -> None:
    algorithm = Built(**{_models.STATE: "state"})
    _models.set_up(lambda built: built.note("built"), algorithm)
    assert algorithm.noted == ["built", "state"] and _models.STATE not in vars(algorithm)
    _models.set_up(lambda built: built.note("again"), algorithm)
    assert algorithm.noted == ["built", "state", "again"]


def test_an_unfit_buffer_is_refused_before_anything_is_built() -> None:
    with pytest.raises(TypeError, match="must be a subclass of RolloutBuffer"):
        _models.set_up(lambda built: pytest.fail("it is built"), Built(rollout_buffer_class=ReplayBuffer))
    algorithm = Built(rollout_buffer_class=RolloutBuffer)
    _models.set_up(lambda built: built.note("built"), algorithm)
    assert algorithm.noted == ["built"]


def test_buffers_store_noise_and_numbers(ppo: PPO) -> None:
    assert isinstance(ppo.rollout_buffer, KeyedBufferMixin)
    noise = dict(members=4, prior_scale=0.3, bootstrap=0.5, net_arch=[4])
    off = dict(buffer_size=50, seed=0, device="cpu", exploration_initial_eps=0.0, exploration_final_eps=0.0)
    assert isinstance(DQN("FlipoutMlpPolicy", "CartPole-v1", policy_kwargs=noise, **off).replay_buffer, NumberedBufferMixin)  # type: ignore[arg-type]


def test_the_networks_that_learn_and_their_targets() -> None:
    made: dict[str, Any] = {"q_net": 1, "q_net_target": 2, "quantile_net": 3, "quantile_net_target": 4, "actor": 5}
    made |= {"actor_target": 6, "critic": 7, "critic_target": 8}
    policy = SimpleNamespace(**made, value_net=9)
    algorithm = SimpleNamespace(policy=policy, **{name: 10 * number for name, number in made.items()}, log_ent_coef=3)
    expected = {f"model.{name}": 10 * number for name, number in made.items()}
    assert _told._networks(algorithm) == {**expected, **{f"model.policy.{name}": number for name, number in made.items()}}
    assert _told._networks(SimpleNamespace(policy=SimpleNamespace(actor=1), critic=None)) == {"model.policy.actor": 1}


@pytest.mark.parametrize("algorithm", [DQN, SAC, TD3])
def test_every_algorithm_s_networks_are_found(algorithm: Any) -> None:
    env = "CartPole-v1" if algorithm is DQN else "Pendulum-v1"
    names = {"q_net", "q_net_target"} if algorithm is DQN else {"actor", "critic", "critic_target"}
    model = algorithm("FlipoutMlpPolicy", env, buffer_size=10, **small())
    assert {name.rsplit(".", 1)[1] for name in _told._networks(model)} >= names


@pytest.mark.parametrize(("kind", "table"), [(PPO, hooks._ON_POLICY), (DQN, hooks._OFF_POLICY)])
def test_each_kind_of_algorithm_has_its_wrappers(kind: Any, table: Any) -> None:
    def own(name: str) -> Any:
        return lambda self, *args, **kwargs: getattr(kind, name)(self, *args, **kwargs)

    made = type("Own", (kind,), {name: own(name) for name in table})
    hooks.install(made)
    try:
        assert all(vars(made)[name].wraps_for_flipout is True for name in table)
    finally:
        hooks.uninstall(made)


def test_first_observations_are_looked_at(ppo: PPO) -> None:
    ppo._last_obs = np.zeros((1, 4), np.float32)
    _finite.check_first_observations(ppo, ppo.policy)
    ppo._last_obs = np.full((1, 4), np.nan, np.float32)
    with pytest.raises(_finite.NonFiniteError, match=r"observation.*environment 0"):
        _finite.check_first_observations(ppo, ppo.policy)
