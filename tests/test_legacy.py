"""Models that version 0.1.0 saved (tests/fixtures/0.1.0/make.py says how) load and go on, or are refused with the remedy."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from sb3_contrib import RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC

from sb3_flipout.policies import FlipoutPolicyMixin

pytestmark = pytest.mark.filterwarnings("ignore:the model was saved by 0.1.0, which learned sigma")

FIXTURES = Path(__file__).parent / "fixtures" / "0.1.0"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
SMALL = dict(net_arch=[8])
#: Those whose settings have other names now, with what they are called.
RENAMED = {
    "ppo_base_every": dict(base_every_rollouts=2, resample="episode", **SMALL),
    "ppo_linear": dict(perturb="policy", layers="linear", **SMALL),
}
ALGORITHMS = {"ppo": PPO, "dqn": DQN, "dqn_members": DQN, "sac": SAC, "recurrent": RecurrentPPO} | dict.fromkeys(RENAMED, PPO)


def load(name: str) -> Any:
    objects = {"policy_kwargs": RENAMED[name]} if name in RENAMED else None
    env = gym.make("Pendulum-v1" if name == "sac" else "CartPole-v1")
    return ALGORITHMS[name].load(FIXTURES / f"{name}.zip", env=env, device="cpu", custom_objects=objects)


def test_there_is_a_zip_for_each_expectation_and_all_are_small() -> None:
    assert {path.stem for path in FIXTURES.glob("*.zip")} == set(EXPECTED) == set(ALGORITHMS)
    assert all(path.stat().st_size < 60_000 for path in FIXTURES.glob("*.zip"))


@pytest.mark.parametrize("learn_sigma", [None, True])
def test_on_policy_it_is_said_that_sigma_is_fixed_by_default_now(learn_sigma: bool | None) -> None:
    given = {} if learn_sigma is None else dict(learn_sigma=True, schedule="constant")
    objects = {"policy_kwargs": {**SMALL, **given}}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PPO.load(FIXTURES / "ppo.zip", custom_objects=objects)
    assert len([one for one in told if "goes on with sigma as it is, fixed" in str(one.message)]) == (learn_sigma is None)
    assert model.policy.action_net.weight_sigma.requires_grad is (learn_sigma is True)
    assert model.policy.noise_settings.falls == "constant"


def test_a_schedule_that_is_chosen_at_load_is_taken() -> None:
    objects = {"policy_kwargs": dict(schedule_fraction=0.5, learn_sigma=True, **SMALL)}
    assert PPO.load(FIXTURES / "ppo.zip", custom_objects=objects).policy.noise_settings.falls == "linear"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_saved_model_acts_as_it_did_and_goes_on(name: str) -> None:
    model, expected = load(name), EXPECTED[name]
    policy, obs = model.policy, np.array(expected["observations"], dtype=np.float32)
    assert isinstance(policy, FlipoutPolicyMixin) and type(policy).__module__.split(".")[-1] in (
        "on_policy",
        "dqn",
        "sac_td3",
        "contrib",
    )
    np.testing.assert_allclose(model.predict(obs, deterministic=True)[0], expected["actions"], rtol=1e-5, atol=1e-6)
    assert model.num_timesteps == 96 and policy._keys.step == expected["steps"] and policy.noise_scale == 0.5
    assert all(type(value) is th.Tensor for value in policy.state_dict().values())
    model.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == 160 and policy._keys.step == expected["steps"] + 64


def test_members_are_the_members_that_they_were() -> None:
    model, expected = load("dqn_members"), EXPECTED["dqn_members"]
    obs = th.tensor(expected["observations"])
    found = model.policy.member_values(obs)
    th.testing.assert_close(found, th.tensor(expected["member_values"]), rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.01
    assert model.policy.noise_settings.members == 3 and model.policy.noise_settings.prior_scale == 1.0


@pytest.mark.parametrize("name", ["ppo", "dqn_members", "sac"])
def test_what_was_loaded_is_saved_as_any_other_model(name: str, tmp_path: Path) -> None:
    model = load(name)
    model.save(tmp_path / "again")
    again = type(model).load(tmp_path / "again")
    assert again.policy.noise_state() == model.policy.noise_state()
    for key, value in model.policy.state_dict().items():
        assert th.equal(again.policy.state_dict()[key], value), key
    obs = np.array(EXPECTED[name]["observations"], dtype=np.float32)
    np.testing.assert_array_equal(*(one.predict(obs, deterministic=True)[0] for one in (model, again)))


def test_a_seed_and_other_settings_are_taken_at_load() -> None:
    one = PPO.load(FIXTURES / "ppo.zip", seed=3)
    other = PPO.load(FIXTURES / "ppo.zip", custom_objects={"policy_kwargs": dict(resample="rollout", **SMALL)})
    assert one.policy._noise_seed != other.policy._noise_seed
    assert other.policy.noise_settings.resample == "rollout" and other.policy._keys.step == 96


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("ppo_base_every", TypeError, "base_every is base_every_rollouts for PPO"),
        ("ppo_linear", ValueError, "got 'linear'. Which kinds of layer is a setting of its own: perturb=\"policy\", "),
    ],
)
def test_settings_with_other_names_are_refused_with_the_remedy(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(
        error, match=re.escape(message) + r'.*0\.1\.0 saved .*custom_objects={"policy_kwargs": dict\(\.\.\.\)}'
    ):
        PPO.load(FIXTURES / f"{name}.zip")
    assert load(name).policy.perturbed_network.layers  # the remedy


def test_weights_that_mean_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"perturb: saved 'policy', here 'heads'.*custom_objects="):
        PPO.load(FIXTURES / "ppo.zip", custom_objects={"policy_kwargs": dict(perturb="heads", **SMALL)})
