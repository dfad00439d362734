"""Weights are tensors that can be averaged, converted, sent and copied; no noise comes with them, and no table is written."""

from __future__ import annotations

import copy
import inspect
import sys
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
import torch.multiprocessing as mp
from gymnasium import make
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import sb3_flipout
from sb3_flipout import perturbed
from sb3_flipout.noise import Scales, bases, tables
from sb3_flipout.registration import ALIASES

ON = dict(n_steps=8, batch_size=8, n_epochs=1)
OFF = dict(learning_starts=4, batch_size=4, buffer_size=50, train_freq=2)
NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
KEYS = th.arange(6)


def build(algorithm: Any = PPO, policy: Any = "FlipoutMlpPolicy", seed: int | None = 1, **noise: Any) -> Any:
    discrete = {base.__name__ for base in algorithm.__mro__} & {"PPO", "MaskablePPO", "DQN"} or algorithm.__name__ == "QRDQN"
    known = inspect.signature(algorithm).parameters
    chosen = {**(OFF if issubclass(algorithm, OffPolicyAlgorithm) else ON), **NO_EPSILON}
    arguments = {name: value for name, value in chosen.items() if name in known}
    lstm = dict(lstm_hidden_size=8) if "Lstm" in str(policy) else {}
    if "Flipout" in str(policy):
        noise.setdefault("schedule", "constant")  # noise to the last step, whatever calls of learn() there are
    kwargs = dict(net_arch=[8], **lstm, **noise)
    return algorithm(policy, make("CartPole-v1" if discrete else "Pendulum-v1"), seed=seed, policy_kwargs=kwargs, **arguments)


def weights_of(policy: nn.Module) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def process_tables() -> dict[Any, bytes]:
    """What belongs to the process, bit by bit."""
    known = {("base", *name): table for name, table in bases._TABLES.items()}
    known |= {("factors", *name): table for name, (table, _) in tables._TABLES.items()}
    there = {name: table for name, table in known.items() if table.device.type != "meta"}
    return {name: table.contiguous().flatten().view(th.uint8).numpy().tobytes() for name, table in there.items()}


def logits(policy: Any, obs: th.Tensor, keys: th.Tensor | None) -> th.Tensor:
    with th.no_grad(), perturbed(policy, keys):
        return policy.get_distribution(obs).distribution.logits


def next_keys(model: Any, n: int = 5) -> list[list[int]]:
    """The keys under which it will act next."""
    stream = copy.deepcopy(model.policy._keys)
    return [stream.next(model.n_envs, Scales(1.0), model.device).keys.tolist() for _ in range(n)]


EVERY = [(algorithm, next(iter(names))) for algorithm, names in ALIASES.items()]


@pytest.mark.parametrize(("algorithm", "policy"), EVERY)
def test_a_state_dict_has_tensors_only(algorithm: Any, policy: str) -> None:
    members = dict(members=3) if issubclass(algorithm, OffPolicyAlgorithm) else {}
    for noise in ({}, members):
        model = build(algorithm, policy, **noise)
        for name, value in model.policy.state_dict().items():
            assert type(value) is th.Tensor and not name.endswith("_extra_state"), name
        assert any(name.endswith("_sigma") for name in model.policy.state_dict())


def test_two_state_dicts_are_averaged() -> None:
    one, other = build(seed=1).learn(16).policy, build(seed=2).learn(16).policy
    average = {name: (value + other.state_dict()[name]) / 2 for name, value in one.state_dict().items()}
    mean = build(seed=3).policy
    before = mean.noise_state()
    mean.load_state_dict(average)
    assert mean.noise_state() == before
    obs = th.rand(6, 4)
    plain = build(policy="MlpPolicy", seed=3).policy
    plain.load_state_dict({name: average[name] for name in plain.state_dict()})
    with th.no_grad():
        assert th.equal(logits(mean, obs, None), plain.get_distribution(obs).distribution.logits)
    assert not th.equal(logits(mean, obs, KEYS), logits(mean, obs, None))


def test_numpy_and_back() -> None:
    one, other = build(seed=1).learn(16).policy, build(seed=2).policy
    arrays = {name: value.numpy().copy() for name, value in one.state_dict().items()}
    other.load_state_dict({name: th.from_numpy(array) for name, array in arrays.items()})
    obs = th.rand(6, 4)
    assert th.equal(logits(one, obs, None), logits(other, obs, None))
    assert not th.equal(logits(one, obs, KEYS), logits(other, obs, KEYS))  # the noise is each one's own


@pytest.mark.parametrize("noise", [{}, dict(members=3, prior_scale=1.0)], ids=str)
def test_safetensors(noise: dict[str, Any], tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    one, other = build(DQN, seed=1, **noise).learn(16), build(DQN, seed=2, **noise)
    safetensors.save_file(one.policy.state_dict(), tmp_path / "weights.safetensors")
    loaded = safetensors.load_file(tmp_path / "weights.safetensors")
    assert loaded.keys() == one.policy.state_dict().keys()
    other.policy.load_state_dict(loaded)
    obs = th.rand(6, 4)
    with th.no_grad(), perturbed(one.policy, None), perturbed(other.policy, None):
        assert th.equal(one.policy.online(obs), other.policy.online(obs))
    if noise:  # members are weights, and come with them
        assert th.equal(one.policy.member_values(obs), other.policy.member_values(obs))


def test_weights_are_loaded_without_strictness() -> None:
    plain, noisy = build(policy="MlpPolicy").learn(16).policy, build(seed=2).policy
    sigma = {name: value.clone() for name, value in noisy.named_parameters() if name.endswith("_sigma")}
    result = noisy.load_state_dict(plain.state_dict(), strict=False)
    assert set(result.missing_keys) == set(sigma) and not result.unexpected_keys
    obs = th.rand(6, 4)
    with th.no_grad():
        assert th.equal(logits(noisy, obs, None), plain.get_distribution(obs).distribution.logits)
    assert all(th.equal(value, dict(noisy.named_parameters())[name]) for name, value in sigma.items())
    assert not plain.load_state_dict(noisy.state_dict(), strict=False).missing_keys


@pytest.mark.parametrize(
    ("algorithm", "noise"), [(PPO, {}), (DQN, {}), (DQN, dict(members=3)), (SAC, dict(family="dropconnect"))]
)
def test_an_average_of_models_over_training_writes_into_no_table(algorithm: Any, noise: dict[str, Any]) -> None:
    model = build(algorithm, **noise)
    average = AveragedModel(model.policy, use_buffers=True)
    before, seen = process_tables(), [weights_of(model.policy)]
    average.update_parameters(model.policy)
    for _ in range(2):
        model.learn(8, reset_num_timesteps=False)
        average.update_parameters(model.policy)
        seen.append(weights_of(model.policy))
    after = process_tables()
    assert before and all(after[name] == table for name, table in before.items())
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            expected = sum(weights[name] for weights in seen) / len(seen)
            th.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    # The layers still see what the tables say.
    again = build(algorithm, **noise)
    for ours, theirs in zip(
        again.policy.perturbed_network.layers, build(algorithm, **noise).policy.perturbed_network.layers, strict=True
    ):
        assert all(th.equal(draw, theirs.bases()[1][name]) for name, draw in ours.bases()[1].items())


def test_loading_the_members_of_an_ensemble_writes_into_no_table() -> None:
    one, other = build(DQN, members=3, prior_scale=1.0), build(DQN, seed=2, members=3, prior_scale=1.0)
    before, obs = process_tables(), th.rand(6, 4)
    assert not th.equal(one.policy.member_values(obs), other.policy.member_values(obs))
    other.policy.load_state_dict(one.policy.state_dict())
    assert th.equal(one.policy.member_values(obs), other.policy.member_values(obs))
    assert before == process_tables()


# ---- two processes ------------------------------------------------------------------------------------------------------


class Loss(nn.Module):
    """What is trained in each process: the loss of a policy under noise of its own."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: th.Tensor, keys: th.Tensor | None) -> th.Tensor:
        with perturbed(self.policy, keys):
            distribution = self.policy.get_distribution(obs).distribution
            return distribution.logits.square().mean() + self.policy.predict_values(obs).square().mean()


def in_one_process(rank: int, folder: str) -> None:
    """Train by DistributedDataParallel, and write down gradients and noise."""
    th.set_num_threads(1)
    store, patience = f"file://{folder}/rendezvous", timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    try:
        model = build(seed=rank, learn_sigma=True)
        before = process_tables()
        loss = Loss(model.policy)
        parallel = DistributedDataParallel(loss)
        obs, keys = th.rand(6, 4, generator=th.Generator().manual_seed(rank)), th.arange(6) + 100 * rank
        alone = copy.deepcopy(loss)  # DDP has just sent the weights of the first process to both
        alone(obs, keys).backward()
        parallel(obs, keys).backward()
        bases_of = {
            layer.noise_index: layer.bases()[1]["weight_base"].clone() for layer in model.policy.perturbed_network.layers
        }
        result = {
            "weights": weights_of(model.policy),
            "averaged": {name: p.grad for name, p in loss.named_parameters() if p.grad is not None},
            "own": {name: p.grad for name, p in alone.named_parameters() if p.grad is not None},
            "bases": bases_of,
            "keys": next_keys(model),
            "unharmed": before == {name: table for name, table in process_tables().items() if name in before},
        }
        th.save(result, f"{folder}/{rank}.pt")
        dist.barrier()  # neither takes its group down while the other still talks
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_gradients_of_two_processes_are_averaged_and_each_has_its_own_noise(tmp_path: Any) -> None:
    child = mp.get_context("spawn").Process(target=in_one_process, args=(1, str(tmp_path)))
    child.start()
    in_one_process(0, str(tmp_path))
    child.join(timeout=100)
    assert child.exitcode == 0
    one, other = (th.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["unharmed"] and other["unharmed"]
    assert all(th.equal(value, other["weights"][name]) for name, value in one["weights"].items())
    assert one["averaged"].keys() == one["own"].keys() and any(name.endswith("_sigma") for name in one["own"])
    for name, gradient in one["averaged"].items():
        assert th.equal(gradient, other["averaged"][name]), name
        th.testing.assert_close(gradient, (one["own"][name] + other["own"][name]) / 2, rtol=1e-4, atol=1e-7)
    assert not any(th.equal(base, other["bases"][index]) for index, base in one["bases"].items())
    assert all(a != b for a, b in zip(one["keys"], other["keys"], strict=True))


# ---- copies of models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_copies_in_a_population_take_weights_and_optimizers_and_keep_their_noise(algorithm: Any) -> None:
    one, other = build(algorithm, seed=1).learn(16), build(algorithm, seed=2).learn(8)
    keys, state = next_keys(other), other.policy.noise_state()
    other.set_parameters(one.get_parameters())
    assert next_keys(other) == keys != next_keys(one) and other.policy.noise_state() == state
    ours, theirs = other.get_parameters(), one.get_parameters()
    assert ours.keys() == theirs.keys() and any("optimizer" in name for name in ours)
    for name, value in theirs["policy"].items():
        assert th.equal(ours["policy"][name], value), name
    for name in ours.keys() - {"policy"}:
        th.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    other.learn(8, reset_num_timesteps=False)


class Copy(BaseCallback):
    """Copies policy and, where it can be, model in the middle of a rollout."""

    def __init__(self, of_model: bool) -> None:
        super().__init__()
        self.of_model, self.copied = of_model, None

    def _on_step(self) -> bool:
        if self.n_calls == 12:
            self.copied = copy.deepcopy(self.model if self.of_model else self.model.policy)
        return True


def bases_in_rollouts(model: Any, policy: Any, rollouts: int) -> list[int]:
    class Bases(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            found.append(policy.perturbed_network.layers[0].base_key)

    found: list[int] = []
    model.learn(rollouts * 8, callback=Bases(), reset_num_timesteps=False)
    return found


@pytest.mark.parametrize("of_model", [True, False])
def test_a_copy_made_in_mid_training_trains_on_and_redraws_its_base(of_model: bool) -> None:
    model, callback = build(), Copy(of_model)
    model.learn(16, callback=callback)
    if of_model:
        copied = callback.copied
    else:
        copied = build(seed=5)
        copied.policy = callback.copied
    marks = copied.policy.marks
    assert copied.policy is not model.policy and not marks.running and not marks.collects and not marks.updates
    assert copied.policy.perturbed_network is not model.policy.perturbed_network
    before = weights_of(copied.policy)
    assert len(set(bases_in_rollouts(copied, copied.policy, 3))) == 3
    assert not all(th.equal(value, before[name]) for name, value in copied.policy.state_dict().items())
    assert len(set(bases_in_rollouts(model, model.policy, 3))) == 3


@pytest.mark.parametrize("algorithm", [DQN, SAC])
def test_a_copy_made_in_mid_training_learns_under_fresh_noise(algorithm: Any) -> None:
    model, callback = build(algorithm, resample="step"), Copy(True)
    model.learn(16, callback=callback)
    copied, step = callback.copied, callback.copied.policy.learning.step
    assert copied.policy._acting_noise is None and not copied.policy.learning.active
    assert copied.policy.learning is not model.policy.learning
    assert all(net.learning is copied.policy.learning for net in copied.policy._learning_networks())
    keys, steps_of_original = next_keys(copied), model.policy.learning.step
    copied.learn(8, reset_num_timesteps=False)
    assert next_keys(copied) != keys and copied.policy.learning.step == step + 4
    assert model.policy.learning.step == steps_of_original > step


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_train_of_a_subclass_has_its_noise_before_learn(algorithm: Any) -> None:
    class Own(algorithm):  # type: ignore[misc, valid-type]
        def train(self, *args: Any, **kwargs: Any) -> None:
            updates.append((self.policy.marks.updates, getattr(getattr(self.policy, "learning", None), "active", True)))
            super().train(*args, **kwargs)

    updates: list[tuple[bool, bool]] = []
    try:
        model = build(Own)
        if algorithm is PPO:  # a loop of one's own
            _, callback = model._setup_learn(8)
            model.collect_rollouts(model.env, callback, model.rollout_buffer, 8)
            model.train()
            assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-6
        else:  # from transitions that others have collected
            model.set_logger(configure(None, []))
            model.replay_buffer = build(algorithm).learn(16).replay_buffer
            model.train(gradient_steps=2, batch_size=4)
            assert model.policy.learning.step == 2
        assert updates == [(True, True)]
    finally:
        sb3_flipout.unregister(Own)


def test_the_modules_that_hold_tables_are_the_ones_looked_at() -> None:
    holders = {
        name
        for name, module in sys.modules.items()
        if name.startswith("sb3_flipout.") and isinstance(vars(module).get("_TABLES"), dict)
    }
    assert holders == {bases.__name__, tables.__name__}
    assert np.all([isinstance(table, th.Tensor) for table in bases._TABLES.values()])
