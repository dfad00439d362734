"""A compiled policy is compiled once, and trains with the noise that the eager one has."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch as th
from stable_baselines3 import A2C, DQN, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_flipout  # noqa: F401  (registers the policies)

OFF = dict(learning_starts=16, batch_size=16, train_freq=4, buffer_size=500)
GREEDY = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
CASES: dict[str, tuple[type[BaseAlgorithm], str, dict[str, Any], dict[str, Any]]] = {
    "PPO": (PPO, "CartPole-v1", dict(n_steps=32, batch_size=16, n_epochs=2), {}),
    "PPO, learned sigma, episode": (
        PPO,
        "CartPole-v1",
        dict(n_steps=32, batch_size=16, n_epochs=2),
        dict(learn_sigma=True, resample="episode"),
    ),
    "A2C, factorised": (A2C, "Pendulum-v1", dict(n_steps=16), dict(family="factorised")),
    "DQN": (DQN, "CartPole-v1", {**OFF, **GREEDY}, {}),
    "DQN, members": (DQN, "CartPole-v1", {**OFF, **GREEDY}, dict(members=4, prior_scale=1.0)),
    "SAC": (SAC, "Pendulum-v1", OFF, {}),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    th._dynamo.reset()
    yield
    th._dynamo.reset()


def trained(case: str, compiled: bool, **noise: Any) -> Any:
    algorithm, env, settings, kwargs = CASES[case]
    kwargs = dict(net_arch=[8], schedule="constant", **kwargs, **noise)
    model = algorithm("FlipoutMlpPolicy", env, seed=1, device="cpu", policy_kwargs=kwargs, **settings)
    if compiled:
        model.policy = th.compile(model.policy, backend="eager")
    return model


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_again(case: str) -> None:
    model = trained(case, compiled=True)
    model.learn(96)  # rollouts and updates of each kind have been seen
    with th.compiler.set_stance("fail_on_recompile"):
        model.learn(128, reset_num_timesteps=False)


@pytest.mark.parametrize("case", CASES)
def test_noise_and_weights_are_those_of_the_eager_policy(case: str) -> None:
    eager, compiled = (trained(case, one).learn(96) for one in (False, True))
    policy = compiled.policy._orig_mod
    assert policy.noise_state() == eager.policy.noise_state()
    for (name, one), other in zip(eager.policy.named_parameters(), policy.parameters(), strict=True):
        th.testing.assert_close(other, one, rtol=1e-4, atol=1e-5, msg=name)
    bases = [network.layers[0].bases()[0] for network in (eager.policy.perturbed_network, policy.perturbed_network)]
    assert bases[0] == bases[1]


def test_the_compiler_is_not_imported_with_the_package() -> None:
    """It takes a second, more than the package and stable_baselines3 together."""
    code = "import sys, stable_baselines3, sb3_flipout; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
