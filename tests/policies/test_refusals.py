"""What policies refuse: by name, with what is near, and with nothing changed."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.policies import ActorCriticPolicy

from sb3_flipout.policies import FlipoutActorCriticPolicy, NoiseStateError

ON_POLICY = [PPO, A2C, TRPO, MaskablePPO, RecurrentPPO]
VALUES = [DQN, QRDQN]
ACTORS = [SAC, TD3, DDPG, TQC, CrossQ]
OFF_POLICY = [*VALUES, *ACTORS]
EVERY = [*ON_POLICY, *OFF_POLICY]


def build(algorithm: Any, **noise: Any) -> Any:
    discrete = algorithm in (DQN, QRDQN, MaskablePPO)
    name = "FlipoutMlpLstmPolicy" if algorithm is RecurrentPPO else "FlipoutMlpPolicy"
    arguments = dict(buffer_size=20) if algorithm in OFF_POLICY else {}
    return algorithm(name, vector_env("discrete" if discrete else "box", 2), policy_kwargs=noise, seed=1, **arguments)


@contextmanager
def refuses(error: type[Exception], message: str, algorithm: Any) -> Iterator[None]:
    """Building fails with a message, and leaves names, methods and the user's dictionary as they were."""
    before = (dict(algorithm.policy_aliases), algorithm.train, algorithm.load.__func__)
    with pytest.raises(error, match=re.escape(message)):
        yield
    assert before == (dict(algorithm.policy_aliases), algorithm.train, algorithm.load.__func__)


# ---- names and words that are nearly right ------------------------------------------------------------------------------

NAMES = {
    "sigma_int": "sigma_init",
    "learn_sigmas": "learn_sigma",
    "resampel": "resample",
    "noise_share": "noise_sharing",
    "pertrub": "perturb",
    "layer": "layers",
    "skipp": "skip",
    "perturb_frozn": "perturb_frozen",
    "schedul": "schedule",
    "schedule_ends": "schedule_end",
    "famly": "family",
}
NAMES_OF_SOME = [
    *((algorithm, "base_every_rollout", "base_every_rollouts") for algorithm in ON_POLICY),
    *((algorithm, "base_every_step", "base_every_steps") for algorithm in OFF_POLICY),
    *((algorithm, "target_nois", "target_noise") for algorithm in OFF_POLICY),
    *((algorithm, "member", "members") for algorithm in OFF_POLICY),
    *((algorithm, "prior_scal", "prior_scale") for algorithm in VALUES),
]


@pytest.mark.parametrize(
    ("algorithm", "wrong", "right"),
    [(algorithm, *names) for algorithm in EVERY for names in NAMES.items()] + NAMES_OF_SOME,
)
def test_a_name_that_is_nearly_right_is_suggested(algorithm: Any, wrong: str, right: str) -> None:
    message = f"policy_kwargs={{{wrong!r}: 1}} is no argument of this policy. Did you mean {right!r}?"
    with refuses(TypeError, message, algorithm):
        build(algorithm, **{wrong: 1})


WORDS = {
    "family": ("gausian", "gaussian"),
    "resample": ("episod", "episode"),
    "noise_sharing": ("independant", "independent"),
    "perturb": ("head", "heads"),
    "layers": ("liner", "linear"),
    "init": ("noisnet", "noisynet"),
    "schedule": ("linaer", "linear"),
}
WORDS_OF_SOME = [(algorithm, "target_noise", "mena", "mean") for algorithm in OFF_POLICY]


@pytest.mark.parametrize(
    ("algorithm", "name", "wrong", "right"),
    [(algorithm, name, *words) for algorithm in (PPO, RecurrentPPO, DQN, SAC, CrossQ) for name, words in WORDS.items()]
    + WORDS_OF_SOME,
)
def test_a_word_that_is_nearly_right_is_suggested(algorithm: Any, name: str, wrong: str, right: str) -> None:
    pattern = rf"^{name} must be one of \".*\"{right}\".*, got '{wrong}'\. Did you mean '{right}'\?"
    with pytest.raises(ValueError, match=pattern.replace('\\".*\\"', '.*\\"')):
        build(algorithm, **{name: wrong})


def test_a_module_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(ValueError, match=r"skip='action_ne' fits no module; there are .*\. Did you mean 'action_net'\?"):
        build(PPO, skip="action_ne")


@pytest.mark.parametrize("algorithm", EVERY)
def test_arguments_of_sb3_and_far_names_are_left_to_sb3(algorithm: Any) -> None:
    build(algorithm, net_arch=[4], optimizer_kwargs=dict(eps=1e-5))
    with refuses(TypeError, "unexpected keyword argument 'zzz'", algorithm):
        build(algorithm, zzz=1)


def test_an_argument_of_ones_own_policy_may_look_like_a_setting() -> None:
    class Own(ActorCriticPolicy):
        def __init__(self, *args: Any, layer: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.layer = layer

    class Noisy(FlipoutActorCriticPolicy, Own):
        pass

    assert PPO(Noisy, vector_env(), policy_kwargs=dict(layer=3)).policy.layer == 3


# ---- settings without effect ----------------------------------------------------------------------------------------------

WITHOUT_EFFECT = [
    *(
        (algorithm, {period: 2, **noise}, f"{period}=2 has no effect with family={family!r} and noise_sharing={sharing!r}")
        for kind, period in ((ON_POLICY, "base_every_rollouts"), (OFF_POLICY, "base_every_steps"))
        for algorithm in kind
        for noise, family, sharing in (
            (dict(family="factorised"), "factorised", "flipout"),
            (dict(noise_sharing="independent"), "gaussian", "independent"),
        )
    ),
    *(
        (
            algorithm,
            dict(noise_sharing="shared", base_every_steps=2),
            "base_every_steps=2 has no effect with family='gaussian'",
        )
        for algorithm in OFF_POLICY
    ),
    *(
        (algorithm, dict(members=3, base_every_steps=2), "members=3 does not fit base_every_steps=2")
        for algorithm in OFF_POLICY
    ),
    *((algorithm, dict(prior_scale=0.5), "prior_scale=0.5 needs members") for algorithm in VALUES),
    *(
        (algorithm, {name: 0.5, "schedule": "constant"}, f'{name}=0.5 has no effect with schedule="constant"')
        for algorithm in (PPO, DQN, SAC)
        for name in ("schedule_end", "schedule_fraction")
    ),
    *((algorithm, dict(family="dropconnect", sigma_init=0.1), "sigma_init=0.1 does not fit") for algorithm in (PPO, DQN, SAC)),
    *((algorithm, dict(init="noisynet", sigma_init=0.1), "sigma_init=0.1 does not fit") for algorithm in (PPO, DQN, SAC)),
    *((algorithm, dict(layers="hidden"), 'layers="hidden" stands for') for algorithm in (PPO, DQN, SAC)),
]


ONLY_WITH_OTHERS = (
    *("base_every_rollouts", "base_every_steps", "prior_scale"),
    *("schedule_end", "schedule_fraction", "sigma_init", "layers"),
)


@pytest.mark.parametrize(("algorithm", "noise", "message"), WITHOUT_EFFECT)
def test_a_setting_without_effect_is_refused_and_goes_when_left_out(algorithm: Any, noise: Any, message: str) -> None:
    with refuses(ValueError, message, algorithm):
        build(algorithm, **noise)
    left_out = next(name for name in ONLY_WITH_OTHERS if name in noise)
    build(algorithm, **{name: value for name, value in noise.items() if name != left_out})


@pytest.mark.parametrize("algorithm", [PPO, RecurrentPPO, DQN, SAC])
@pytest.mark.parametrize("value", ["False", "no", 0, 1, None, th.tensor(True)])
@pytest.mark.parametrize("name", ["learn_sigma", "perturb_frozen"])
def test_a_flag_is_true_or_false(algorithm: Any, name: str, value: Any) -> None:
    if algorithm is DQN and name == "learn_sigma" and value is None:
        pytest.skip("None is the default there: learned with members")
    message = f"{name} must be True or False, got {value!r} of type {type(value).__name__}; pass {name}=True or =False."
    with refuses(TypeError, message, algorithm):
        build(algorithm, **{name: value})


@pytest.mark.parametrize("skip", [None, 5, [1], True])
def test_names_to_skip_are_strings(skip: Any) -> None:
    with refuses(TypeError, "skip must be", PPO):
        build(PPO, skip=skip)


# ---- nothing is changed ---------------------------------------------------------------------------------------------------


def everything(model: Any) -> tuple[Any, ...]:
    policy = model.policy
    weights = {name: value.tolist() for name, value in policy.state_dict().items()}
    bases = [layer.base_key for layer in policy.perturbed_network.layers]
    optimizers = str([value for name, value in model.get_parameters().items() if name != "policy"])
    return weights, policy.noise_state(), bases, optimizers, model.env.envs[0].unwrapped.np_random.bit_generator.state


def stock_model(algorithm: Any) -> Any:
    arguments = dict(buffer_size=20) if algorithm in OFF_POLICY else {}
    env = vector_env("discrete" if algorithm in VALUES else "box", 2)
    return algorithm("MlpPolicy", env, policy_kwargs=dict(net_arch=[8]), **arguments)


def stock_parameters(algorithm: Any) -> Any:
    return stock_model(algorithm).get_parameters()


def stock_zip(algorithm: Any) -> io.BytesIO:
    stock_model(algorithm).save(file := io.BytesIO())
    return file


SETTERS: dict[str, Any] = {
    "noise_scale": lambda model: setattr(model.policy, "noise_scale", -1.0),
    "noise_ladder": lambda model: setattr(model.policy, "noise_ladder", (1.0, -1.0)),
    "reseed_noise": lambda model: model.policy.reseed_noise("1"),
    "stock weights, strictly": lambda model: model.policy.load_state_dict(stock_parameters(type(model))["policy"]),
    "stock parameters": lambda model: model.set_parameters(stock_parameters(type(model))),
    "stock parameters, inexact": lambda model: model.set_parameters(stock_parameters(type(model)), exact_match=False),
    "stock zip": lambda model: model.set_parameters(stock_zip(type(model))),
    "stock zip, inexact": lambda model: model.set_parameters(stock_zip(type(model)), False),
    "state of other settings": lambda model: model.policy.set_noise_state(
        {**model.policy.noise_state(), "settings": dict(family="dropconnect"), "steps": 1000}
    ),
}


@pytest.mark.parametrize("setter", SETTERS)
@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC, TD3])
def test_what_is_refused_changes_nothing(algorithm: Any, setter: str, untouched_rng: None) -> None:
    with th.random.fork_rng():
        numpy_state = np.random.get_state()
        model, stock = build(algorithm, net_arch=[8]), stock_parameters(algorithm)
        np.random.set_state(numpy_state)
    before = everything(model)
    torch_before = th.get_rng_state()
    with pytest.raises((TypeError, ValueError)) as refused:
        SETTERS[setter](model)
    th.set_rng_state(torch_before)  # the stock model above
    np.random.set_state(numpy_state)
    assert everything(model) == before
    if "stock" not in setter:
        return
    assert "sigma" in str(refused.value) and "exact_match=False" in str(refused.value)
    assert isinstance(refused.value, NoiseStateError) == (setter == "stock weights, strictly")
    # The remedy that it names: the weights are taken as mean weights, and sigma stays.
    model.set_parameters({"policy": stock["policy"]}, exact_match=False)
    own = model.policy.state_dict()
    assert all(th.equal(own[name], value) for name, value in stock["policy"].items())
    assert all(own[name].tolist() == value for name, value in before[0].items() if name.endswith("_sigma"))
    assert model.policy.noise_state() == before[1]
    np.random.set_state(numpy_state)


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_a_refused_model_leaves_environment_and_generators_alone(algorithm: Any, untouched_rng: None) -> None:
    env = vector_env("discrete" if algorithm is DQN else "box", 2)
    before, attributes = str(env.envs[0].unwrapped.np_random.bit_generator.state), set(vars(env))
    kwargs = dict(sigma_init=-1.0)
    with pytest.raises(ValueError, match="sigma_init must be"):
        algorithm("FlipoutMlpPolicy", env, policy_kwargs=kwargs)
    assert kwargs.items() >= {("sigma_init", -1.0)} and set(vars(env)) == attributes  # SAC adds use_sde
    assert str(env.envs[0].unwrapped.np_random.bit_generator.state) == before
