"""With sigma frozen at 0, training is SB3's own, bit for bit; and mean weights are SB3's at the start."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch as th
from helpers import CASES, vector_env
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO

from sb3_flipout import FlipoutLinear
from sb3_flipout.layers import PerturbedNetwork
from sb3_flipout.noise import FAMILIES

LEARNED = dict(learn_sigma=True, schedule="constant")
STOCK_NAMES = {
    "FlipoutMlpPolicy": "MlpPolicy",
    "FlipoutCnnPolicy": "CnnPolicy",
    "FlipoutMultiInputPolicy": "MultiInputPolicy",
}


SIZES = {
    PPO: dict(n_steps=128, batch_size=64, n_epochs=1),
    TRPO: dict(n_steps=64, batch_size=64, n_critic_updates=2, cg_max_steps=4),
    A2C: {},
}


def trained(algorithm, policy, case, noise):
    _, make_env, arguments = CASES[case]
    kwargs = {k: v for k, v in arguments.get("policy_kwargs", {}).items() if noise or k != "perturb"}
    arguments = {**arguments, "policy_kwargs": {**kwargs, **noise}}
    return algorithm(policy, make_env(), seed=3, **arguments, **SIZES[algorithm]).learn(256 if algorithm is TRPO else 512)


def assert_equal_weights(stock, ours):
    own = ours.policy.state_dict()
    for name, value in stock.policy.state_dict().items():
        assert th.equal(value, own[name]), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("algorithm", SIZES)
def test_sigma_frozen_at_zero_trains_bitwise_as_stock(algorithm, case):
    name = CASES[case][0]
    stock = trained(algorithm, STOCK_NAMES[name], case, {})
    ours = trained(algorithm, name, case, dict(sigma_init=0.0, learn_sigma=False))
    assert_equal_weights(stock, ours)


@pytest.mark.parametrize("noise_sharing", ["flipout", "independent"])
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.sigma != "none"])
def test_every_family_at_sigma_zero_is_stock(family, noise_sharing):
    stock = trained(PPO, "MlpPolicy", "mlp-discrete", {})
    silent = dict(family=family, noise_sharing=noise_sharing, sigma_init=0.0, learn_sigma=False)
    ours = trained(PPO, "FlipoutMlpPolicy", "mlp-discrete", silent)
    assert_equal_weights(stock, ours)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        dict(net_arch=[32, 16], activation_fn=th.nn.ReLU),
        dict(net_arch=dict(pi=[8], vf=[16, 16])),
        dict(net_arch=[]),
        dict(ortho_init=False),
        dict(log_std_init=-1.0, full_std=False),
    ],
)
def test_mean_weights_start_as_those_of_stock(kwargs):
    stock = PPO("MlpPolicy", vector_env(), n_steps=8, batch_size=8, seed=5, policy_kwargs=dict(kwargs))
    after_stock = th.get_rng_state()
    ours = PPO("FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, seed=5, policy_kwargs=dict(kwargs))
    assert_equal_weights(stock, ours)
    assert th.equal(th.get_rng_state(), after_stock), "construction must leave torch's generator as stock does"


@pytest.mark.parametrize("noise", [dict(schedule="constant"), dict(schedule="linear"), LEARNED], ids=str)
@pytest.mark.parametrize("case", ["mlp-discrete", "image"])
@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO])
def test_what_is_spared_changes_no_bit_of_training(algorithm, case, noise, monkeypatch):
    """Perturbations that are kept from pass to pass, and noise of scale 0 (after 30 % of the steps) that is not computed."""
    spared = trained(algorithm, CASES[case][0], case, noise)
    monkeypatch.setattr(PerturbedNetwork, "keeping_deltas", lambda self: nullcontext())
    monkeypatch.setattr(PerturbedNetwork, "_must_compute", lambda self, noise: True)
    other = trained(algorithm, CASES[case][0], case, noise)
    assert_equal_weights(other, spared)
    # What an update sees on its way: TRPO's line search judges steps that it does not keep.
    seen = [{k: v for k, v in one.logger.name_to_value.items() if k.startswith("train/")} for one in (other, spared)]
    assert seen[0] == seen[1] and len(seen[0]) > 3


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_at_scale_zero_training_is_stocks_bit_for_bit_with_the_same_optimizer(algorithm):
    kwargs = dict(optimizer_kwargs=dict(fused=True, eps=1e-5)) if algorithm is PPO else {}
    stock = trained(algorithm, "MlpPolicy", "mlp-discrete", kwargs)
    _, make_env, _ = CASES["mlp-discrete"]
    ours = algorithm("FlipoutMlpPolicy", make_env(), seed=3, **SIZES[algorithm])
    ours.policy.noise_scale = 0.0
    assert_equal_weights(stock, ours.learn(512))


def test_learned_sigma_moves_and_is_in_the_optimizer():
    model = trained(PPO, "FlipoutMlpPolicy", "mlp-discrete", dict(learn_sigma=True))
    fresh = PPO("FlipoutMlpPolicy", vector_env("discrete"), n_steps=8, batch_size=8, seed=3)
    in_optimizer = {id(p) for group in model.policy.optimizer.param_groups for p in group["params"]}
    for (name, now), (_, before) in zip(model.policy.named_parameters(), fresh.policy.named_parameters(), strict=True):
        assert id(now) in in_optimizer
        if name.endswith("_sigma"):
            assert not th.equal(now, before), name


def test_frozen_sigma_does_not_move():
    model = trained(PPO, "FlipoutMlpPolicy", "mlp-discrete", dict(learn_sigma=False))
    layer = model.policy.action_net
    assert isinstance(layer, FlipoutLinear)
    assert th.equal(layer.weight_sigma, th.full_like(layer.weight, 0.5 / 64**0.5))


def test_fused_optimizer_only_where_noise_is_learned_under_and_the_user_has_not_chosen():
    def flags(**kwargs):
        group = PPO(
            "FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, policy_kwargs=kwargs
        ).policy.optimizer.param_groups[0]
        return group["fused"], group["foreach"], group["eps"]

    assert flags(learn_sigma=True) == (True, None, 1e-5)
    assert flags() == flags(learn_sigma=False) == (True, None, 1e-5)
    assert flags(sigma_init=0.0) == (None, None, 1e-5)
    assert flags(learn_sigma=True, optimizer_kwargs=dict(eps=1e-3, foreach=True)) == (None, True, 1e-3)
    kwargs = dict(learn_sigma=True, optimizer_class=th.optim.Adamax)
    own = PPO("FlipoutMlpPolicy", vector_env(), n_steps=8, batch_size=8, policy_kwargs=kwargs).policy.optimizer
    assert isinstance(own, th.optim.Adamax)
    assert flags(optimizer_class=partial(th.optim.AdamW, eps=1e-7)) == (True, None, 1e-7)
    assert flags(optimizer_class=partial(th.optim.Adam, eps=1e-7, foreach=True)) == (None, True, 1e-7)
    assert flags(optimizer_class=lambda params, lr: th.optim.Adam(params, lr, eps=1e-4)) == (None, None, 1e-4)
