"""Algorithms with a `predict` of their own, as for masked actions: what acts sees the noise of the step, or it is said."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_flipout
from sb3_flipout.noise import RowNoise

N_ENVS, START = 3, 30
ACTS = {DQN: "q_net", QRDQN: "quantile_net", SAC: "actor", TD3: "actor"}
ABOUT = r"nobody has said which noise their rows see, so the mean weights act and nothing explores"


def owning(algorithm: type[BaseAlgorithm], ask: Any, compares: bool = True) -> type[BaseAlgorithm]:
    """An algorithm that asks a part of its policy for actions, and notes what it would say under the noise of the step."""

    class Own(algorithm):  # type: ignore[valid-type, misc]
        seen: list[tuple[th.Tensor, th.Tensor]]

        def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
            obs, net = self.policy.obs_to_tensor(observation)[0], getattr(self.policy, ACTS[algorithm])
            noise = self.policy.learning.acting
            with th.no_grad():
                found = ask(self, net, obs)
                if compares:
                    with net.perturbed_network.activate(RowNoise(noise.keys, noise.scale)):
                        self.seen.append((found, ask(self, net, obs)))
            if algorithm in (SAC, TD3):
                return found.clamp(-1, 1).numpy(), state
            return found.reshape(len(obs), -1, self.action_space.n).mean(1).argmax(1).numpy(), state

    Own.seen = []
    return Own


def learn(own: Any, box: bool, **noise: Any) -> Any:
    kwargs: dict[str, Any] = dict(learning_starts=START, batch_size=8, seed=0, device="cpu")
    if not box:
        kwargs |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model = own("FlipoutMlpPolicy", vector_env("box" if box else "discrete", N_ENVS), policy_kwargs=noise, **kwargs)
    return model.learn(60)


def as_a_whole(_model: Any, net: Any, obs: th.Tensor) -> th.Tensor:
    return net.get_action_dist_params(obs)[0] if hasattr(net, "get_action_dist_params") else net(obs)


@pytest.mark.parametrize("algorithm", ACTS)
@pytest.mark.parametrize("members", [None, 4])
def test_a_network_that_acts_sees_the_noise_of_the_step(algorithm: Any, members: int | None) -> None:
    own = owning(algorithm, as_a_whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(own, algorithm in (SAC, TD3), members=members, schedule="constant", sigma_init=2.0)
    assert len(own.seen) == (60 - START) // N_ENVS
    for found, expected in own.seen:
        assert th.equal(found, expected)
        assert len(found.unique(dim=0)) == N_ENVS


def of_inner_modules(_model: Any, net: Any, obs: th.Tensor) -> th.Tensor:
    return net.q_net(net.extract_features(obs, net.features_extractor))


def about_more_rows(_model: Any, net: Any, obs: th.Tensor) -> th.Tensor:
    return net(th.cat([obs, -obs]))[: len(obs)]


def by_mean_weights(model: Any, net: Any, obs: th.Tensor) -> th.Tensor:
    with sb3_flipout.perturbed(model.policy, None):
        return net(obs)


@pytest.mark.parametrize("ask", [of_inner_modules, about_more_rows])
def test_where_the_mean_weights_act_it_is_said_once(ask: Any) -> None:
    with pytest.warns(UserWarning, match=ABOUT) as caught:
        learn(owning(DQN, ask, compares=False), box=False)
    assert len(caught) == 1


@pytest.mark.parametrize("algorithm", [DQN, SAC])
def test_several_candidates_of_each_environment(algorithm: Any) -> None:
    """The policy cannot tell their noise, and says how to; done so, each candidate has its environment's noise."""

    def candidates(model: Any, net: Any, obs: th.Tensor) -> th.Tensor:
        model.policy._predict(obs.repeat_interleave(2, 0))
        return as_a_whole(model, net, obs)

    def told(model: Any, net: Any, obs: th.Tensor) -> th.Tensor:
        numbers = th.arange(N_ENVS).repeat_interleave(2)
        with sb3_flipout.perturbed(model.policy, model.policy.learning.acting[numbers]):
            model.policy._predict(obs.repeat_interleave(2, 0), deterministic=True)
            return as_a_whole(model, net, obs.repeat_interleave(2, 0))[::2]

    with pytest.raises(
        ValueError, match=r"asked for actions of 6 rows in a step of 3 environments.*learning\.acting\[numbers"
    ):
        learn(owning(algorithm, candidates, compares=False), algorithm is SAC)
    own = owning(algorithm, told, compares=False)
    learn(own, algorithm is SAC, schedule="constant")
    with_noise = owning(algorithm, as_a_whole, compares=False)
    a, b = (learn(each, algorithm is SAC, schedule="constant").policy.state_dict() for each in (own, with_noise))
    # Matrix products of six rows and of three may round differently, by processor.
    th.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_who_asks_for_mean_weights_is_told_nothing() -> None:
    own = owning(DQN, by_mean_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(own, box=False)
    assert all(th.equal(found, expected) for found, expected in own.seen)


def test_outside_collection_a_network_has_its_mean_weights() -> None:
    model = learn(DQN, box=False, schedule="constant")
    obs = th.as_tensor(np.ones((N_ENVS, *model.observation_space.shape), dtype=np.float32))
    with th.no_grad():
        plain = model.q_net(obs)
        with sb3_flipout.perturbed(model.policy, None):
            assert th.equal(model.q_net(obs), plain)
    assert model.policy.learning.acting is None
