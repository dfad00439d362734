"""Single lines whose loss nothing else notices: found by breaking every line once and running the tests."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_flipout import FlipoutLinear, flipout_policy, perturb, perturbed
from sb3_flipout.callbacks import AdaptNoise, NoiseEvalCallback, StopOnNonFinite
from sb3_flipout.noise import RowNoise, Scales
from sb3_flipout.policies.prior import FIRST_NUMBER


def ppo(n_envs: int = 2, **policy_kwargs: Any) -> PPO:
    env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=0)
    return PPO(
        "FlipoutMlpPolicy", env, n_steps=8, batch_size=16, n_epochs=1, seed=0, policy_kwargs=policy_kwargs, device="cpu"
    )


def dqn(**policy_kwargs: Any) -> DQN:
    kwargs: dict[str, Any] = {"learning_starts": 4, "batch_size": 8, "exploration_initial_eps": 0, "exploration_final_eps": 0}
    kwargs["policy_kwargs"] = {"net_arch": [8], **policy_kwargs}
    return DQN("FlipoutMlpPolicy", "CartPole-v1", seed=0, device="cpu", **kwargs)


def test_a_copy_of_members_shares_no_base_draw() -> None:
    policy: Any = dqn(members=3).policy
    twin = copy.deepcopy(policy)
    ours, theirs = (one.q_net.q_net[0]._buffers["weight_base"] for one in (policy, twin))
    theirs.zero_()
    assert ours.abs().sum() > 0 and ours.data_ptr() != theirs.data_ptr()


def test_binding_members_draws_copies_them() -> None:
    layer = FlipoutLinear(3, 4)
    layer.keep_base()
    bases = layer.bases()
    layer.bind(bases)
    layer._buffers["weight_base"].zero_()  # as loading a state_dict writes into it
    assert bases[1]["weight_base"].abs().sum() > 0


def test_leaving_a_block_restores_what_was_seen_before() -> None:
    net = perturb(nn.Sequential(nn.Linear(3, 4)), base_key=0)
    x, keys = th.ones(2, 3), th.tensor([1, 2])
    with perturbed(net, keys):
        outside = net(x)
        with perturbed(net, None):
            inside = net(x)
        again = net(x)
    assert th.equal(outside, again) and not th.equal(outside, inside)


def test_acting_deterministically_in_a_rollout_draws_nothing() -> None:
    policy: Any = ppo().policy
    obs = th.zeros(2, 4)
    with policy.collecting(2):
        policy(obs, deterministic=True)
        assert policy.noise_state()["steps"] == 0
        policy.end_step(np.zeros(2, dtype=bool))
        policy(obs)
    assert policy.noise_state()["steps"] == 1


def test_evaluation_goes_on_where_it_was_after_loading(tmp_path: Path) -> None:
    model = ppo()
    obs = np.zeros((64, 4), np.float32)
    before = model.predict(obs)[0]
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    seen: list[list[int]] = []
    for one in (model, loaded):
        policy: Any = one.policy
        noise = policy._prediction_noise(th.as_tensor(obs), False)
        seen.append(noise.keys.tolist())
    assert seen[0] == seen[1] and before.shape == (64,)


def test_another_number_of_environments_gets_scales_of_its_own() -> None:
    policy: Any = ppo().policy
    policy.noise_scale = 0.5
    for n_envs in (2, 5, 1):
        noise = policy._keys.next(n_envs, Scales(0.5, None), policy.device)
        assert noise.scale.tolist() == [0.5] * n_envs and len(noise.keys) == n_envs


def test_without_a_period_adapt_noise_adapts_at_every_rollout_and_every_tenth_step() -> None:
    class Counted(AdaptNoise):
        adapted = 0

        def _adapt(self) -> None:
            self.adapted += 1

    on_policy, off_policy = Counted(measure="kl", target=0.1), Counted(measure="kl", target=0.1)
    ppo().learn(16 * 4, callback=on_policy)
    dqn().learn(40, callback=off_policy)
    assert (on_policy.adapted, off_policy.adapted) == (3, 4)  # the first rollout has nothing to look at yet


@pytest.mark.filterwarnings("ignore:the mean weights lag")
def test_each_evaluation_samples_weights_of_its_own() -> None:
    model = ppo(schedule="constant")
    seen: list[list[int]] = []

    class Watched(NoiseEvalCallback):
        def _arm(self, name: str, before_dump: Any) -> Any:
            arm: Any = super()._arm(name, before_dump)
            if name == "sampled":
                with arm.weights(1):
                    noise = self._policy.perturbed_network.active
                    seen.append(noise.keys.tolist())
            return arm

    model.learn(64, callback=Watched(make_vec_env("CartPole-v1", seed=1), n_eval_episodes=1, eval_freq=16))
    assert len(seen) == 2 and seen[0] != seen[1]


def test_once_something_is_not_finite_no_optimizer_moves_anything(tmp_path: Path) -> None:
    model = ppo()
    moved: list[bool] = []

    class Breaks(BaseCallback):
        def _on_rollout_end(self) -> None:
            optimizer = model.policy.optimizer
            guard.non_finite = "something"  # as if an earlier step of this update had found it
            before = [parameter.detach().clone() for parameter in model.policy.parameters()]
            for parameter in model.policy.parameters():
                parameter.grad = th.ones_like(parameter)
            optimizer.step()
            moved.append(any(not th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True)))
            guard.non_finite = None

        def _on_step(self) -> bool:
            return True

    guard = StopOnNonFinite(save_path=tmp_path / "good.zip")
    model.learn(16, callback=[guard, Breaks()])
    assert moved == [False]


@pytest.mark.parametrize("members", [None, 3])
def test_the_target_starts_as_the_online_network_also_where_init_draws(members: int | None) -> None:
    policy: Any = dqn(init="noisynet", members=members).policy
    online, target = policy.q_net.state_dict(), policy.q_net_target.state_dict()
    assert online.keys() == target.keys() and all(th.equal(online[name], target[name]) for name in online)


def test_values_of_members_follow_the_noise_scale() -> None:
    policy: Any = dqn(members=4).policy
    obs = np.ones((2, 4), np.float32)
    spreads = []
    for scale in (0.0, 0.5, 1.0):
        policy.noise_scale = scale
        spreads.append(float(policy.member_values(obs).std(dim=0).mean()))
    assert spreads[0] == 0 < spreads[1] < spreads[2]


def test_numbers_of_the_prior_s_layers_are_apart_from_the_network_s() -> None:
    policy: Any = dqn(members=3, prior_scale=1.0).policy
    own = {layer.noise_index for layer in policy.q_net.perturbed_network.layers}
    prior = policy.prior.perturbed_network
    assert min(layer.noise_index for layer in prior.layers) >= FIRST_NUMBER > max(own)
    factors = [
        network.plan.expand(RowNoise(th.arange(3)).keys, None, th.float32) for network in (policy.perturbed_network, prior)
    ]
    assert factors[0].shape == factors[1].shape and not th.equal(*factors)


def test_ppo_ends_where_its_schedule_ends() -> None:
    model = ppo(schedule="linear", schedule_fraction=1.0).learn(64)
    assert flipout_policy(model).effective_scale == 0.0  # and not where its last rollout began


def test_a_training_that_was_broken_off_ends_the_episodes_of_replayed_collection_too() -> None:
    class Stops(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 7

    model = dqn(resample="episode").learn(20, callback=Stops())
    policy: Any = model.policy
    assert policy._keys._drawn.tolist() == [policy._keys.step]


def test_a_copy_made_in_a_collection_step_is_in_none() -> None:
    policy: Any = dqn().policy
    with policy.collecting(1):
        twin = copy.deepcopy(policy)
    assert twin._acting_noise is None


def test_a_prior_whose_unit_is_loaded_is_asked_for_it_again() -> None:
    trained, fresh = dqn(members=3, prior_scale=1.0).learn(12), dqn(members=3, prior_scale=1.0)
    trained.set_parameters(fresh.get_parameters())  # whose unit is not measured yet
    policy: Any = trained.policy
    assert not th.isfinite(policy.prior.unit)
    assert th.isfinite(policy.member_values(np.ones((2, 4), np.float32))).all()


@pytest.mark.filterwarnings("ignore:the mean weights lag")
def test_evaluations_of_all_arms_go_on_over_calls_of_learn(tmp_path: Path) -> None:
    model = ppo(schedule="constant")
    callback = NoiseEvalCallback(make_vec_env("CartPole-v1", seed=1), n_eval_episodes=1, eval_freq=16, log_path=str(tmp_path))
    model.learn(64, callback=callback)
    model.learn(64, callback=callback, reset_num_timesteps=False)
    for log in (tmp_path / "evaluations.npz", tmp_path / "sampled" / "evaluations.npz"):
        assert np.load(log)["timesteps"].tolist() == [32, 64, 96, 128]
    assert len(callback.returns["sampled"]) == len(callback.returns["mean"]) == 4


def test_members_keep_their_base_draws_over_an_update() -> None:
    model = dqn(members=3).learn(12)
    before = [draw.data_ptr() for draw in model.policy.buffers()]
    model.train(gradient_steps=1, batch_size=4)
    assert [draw.data_ptr() for draw in model.policy.buffers()] == before


def test_an_update_that_cannot_start_marks_nothing() -> None:
    policy: Any = dqn().policy
    del policy.optimizer  # a policy of the user's may hold it elsewhere
    with pytest.raises(AttributeError), policy.updating():
        pass
    assert not policy.marks.updates and not policy.learning.active


def test_a_damaged_noise_state_changes_nothing() -> None:
    for policy in (flipout_policy(ppo()), flipout_policy(dqn())):
        before = policy.noise_state()
        for damage in ({"noise_scale": -1.0}, {"noise_ladder": [math.nan]}, {"steps": "x"}):
            with pytest.raises(ValueError):
                policy.set_noise_state({**before, "seed": 5, **damage})
        for name in ("rollouts", "gradient_steps"):
            if name in before:
                with pytest.raises(KeyError):
                    policy.set_noise_state({key: value for key, value in {**before, "seed": 5}.items() if key != name})
        assert policy.noise_state() == before
