"""`update_noise="mean"`: the noise is that of the behaviour alone; what learns are the mean weights, as in stock SB3."""

from typing import Any

import numpy as np
import pytest
import torch as th
from sac_td3_cases import ALGORITHMS, Recorder, build
from stable_baselines3 import DQN, PPO, SAC

BEHAVIOUR = dict(update_noise="mean", learn_sigma=False, sigma_init=1.0)


def train_afresh(model: Any, weights: Any, replay_buffer: Any) -> None:
    """Four gradient steps from given weights and transitions, whatever the model has learned before."""
    model._setup_learn(40)
    model.replay_buffer, model._n_updates = replay_buffer, 0
    model.policy.load_state_dict(weights, strict=False)
    for net in (model.actor, model.critic):
        net.optimizer.state.clear()
    if getattr(model, "ent_coef_optimizer", None) is not None:
        model.log_ent_coef.data.zero_()
        model.ent_coef_optimizer.state.clear()
    np.random.seed(3)
    th.manual_seed(3)
    model.train(4, 8)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_steps_are_those_of_stock(algorithm: Any) -> None:
    stock, ours = build(algorithm, policy="MlpPolicy"), build(algorithm, noise=BEHAVIOUR)
    weights = {name: weight.clone() for name, weight in stock.policy.state_dict().items()}
    replay_buffer = ours.learn(40).replay_buffer
    train_afresh(stock, weights, replay_buffer)
    train_afresh(ours, weights, replay_buffer)
    own = ours.policy.state_dict()
    for name, weight in stock.policy.state_dict().items():
        assert th.equal(weight, own[name]), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_collection_is_under_noise_and_no_gradient_step_is(algorithm: Any) -> None:
    model, recorder = build(algorithm, noise=BEHAVIOUR), Recorder()
    model.learn(40, callback=recorder)
    assert recorder.acting and all(keys is not None for keys in recorder.acting)
    assert recorder.learning and all(seen.keys is None for seen in recorder.learning)


def test_critics_that_are_perturbed_learn_by_their_mean_weights_too() -> None:
    model, recorder = build(SAC, noise=dict(BEHAVIOUR, perturb="all")), Recorder()
    model.learn(40, callback=recorder)
    assert {seen.net for seen in recorder.learning} >= {"actor", "critic"}
    assert all(seen.keys is None for seen in recorder.learning)


def test_by_default_the_actor_learns_under_noise() -> None:
    model, recorder = build(SAC), Recorder()
    model.learn(40, callback=recorder)
    assert any(seen.net == "actor" and seen.grad and seen.keys is not None for seen in recorder.learning)


class _Reads(th.nn.Module):
    """Reads the weights of a layer that it never calls."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = th.nn.Linear(size, size)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_a_layer_whose_weights_are_read_is_named() -> None:
    class Actor(build(SAC).policy_class):  # type: ignore[misc]
        def make_actor(self, features_extractor: Any = None) -> Any:
            actor = super().make_actor(features_extractor)
            actor.latent_pi.append(_Reads(8))
            return actor

    model = build(SAC, policy=Actor, noise=BEHAVIOUR)
    with pytest.raises(ValueError, match=r"actor\.latent_pi\.4\.layer learn, and were never called"):
        model.learn(40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(update_noise="mean"), r'update_noise="mean" does not fit learn_sigma=True.*learn_sigma=False'),
        (dict(update_noise="same"), r"update_noise must be one of .*'same'"),
        (dict(BEHAVIOUR, members=3), r'update_noise="mean" does not fit members=3'),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(SAC, noise=settings)


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_others_say_whose_setting_it_is(algorithm: Any) -> None:
    with pytest.raises(TypeError, match=r"update_noise is for actor-critics such as SAC and TD3"):
        algorithm("FlipoutMlpPolicy", "CartPole-v1", policy_kwargs=dict(update_noise="mean"))
