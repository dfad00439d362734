"""RecurrentPPO: noise replayed through padded sequences, and stock's own training without noise."""

from typing import Any

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from torch import nn

from sb3_flipout import FlipoutLSTM, perturbed
from sb3_flipout.noise import noise_of

RATIO_TOLERANCE = 1e-5

#: Name -> (kind of policy, actions, observations, arguments of the policy).
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "discrete": ("Mlp", "discrete", "vector", {}),
    "box": ("Mlp", "box", "vector", {}),
    "key-per-episode": ("Mlp", "discrete", "vector", dict(resample="episode")),
    "key-per-three-steps": ("Mlp", "discrete", "vector", dict(resample=3, family="factorised")),
    "two-layers-all": ("Mlp", "discrete", "vector", dict(n_lstm_layers=2, perturb="all")),
    "hidden": ("Mlp", "discrete", "vector", dict(layers="hidden")),
    "shared-lstm": ("Mlp", "discrete", "vector", dict(shared_lstm=True, enable_critic_lstm=False)),
    "no-critic-lstm": ("Mlp", "discrete", "vector", dict(enable_critic_lstm=False)),
    "dict": ("MultiInput", "discrete", "dict", {}),
    "image": ("Cnn", "discrete", "image", {}),
}


def build(case: str, prefix: str = "Flipout", **policy_kwargs: Any) -> RecurrentPPO:
    kind, action, observation, of_case = CASES[case]
    if prefix:
        policy_kwargs.setdefault("schedule", "constant")  # noise in all rollouts, to the last
    else:  # stock knows no noise
        of_case = {name: value for name, value in of_case.items() if name not in ("resample", "family", "perturb", "layers")}
    return RecurrentPPO(
        f"{prefix}{kind}LstmPolicy",
        vector_env(action, 3, observation=observation),
        n_steps=24,
        batch_size=18,
        n_epochs=2,
        seed=1,
        device="cpu",
        policy_kwargs={"lstm_hidden_size": 8, **of_case, **policy_kwargs},
    )


class SequenceProbe(BaseCallback):
    """At the end of each rollout, before the first optimiser step, evaluate the sequences as the update will."""

    def __init__(self) -> None:
        super().__init__()
        self.ratios: list[float] = []
        self.values: list[float] = []
        self.effects: list[float] = []
        self.resets_inside = False

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        policy = self.model.policy
        policy.set_training_mode(True)
        for batch in self.model.rollout_buffer.get(18):
            actions = batch.actions.long().flatten() if batch.actions.shape[-1] == 1 else batch.actions
            real = batch.mask > 1e-8
            with th.no_grad():
                states, starts = batch.lstm_states, batch.episode_starts
                values, log_prob, _ = policy.evaluate_actions(batch.observations, actions, states, starts)
                with perturbed(policy, None):
                    _, of_mean, _ = policy.evaluate_actions(batch.observations, actions, states, starts)
            difference = (th.exp(log_prob - batch.old_log_prob) - 1)[real]
            self.ratios.append(float(difference.abs().max()))
            self.values.append(float((values.flatten() - batch.old_values)[real].abs().max()))
            self.effects.append(float((th.exp(of_mean - batch.old_log_prob) - 1)[real].abs().mean()))
            self.resets_inside |= bool(starts[real].any())
            keys = noise_of(batch.observations).keys
            assert len(keys) == len(real) and not keys[~real].any()  # padding has key 0
        policy.set_training_mode(False)


@pytest.mark.parametrize("case", CASES)
def test_ratios_and_values_are_exact_before_the_update(case: str) -> None:
    probe = SequenceProbe()
    build(case).learn(144, callback=probe)
    assert len(probe.ratios) >= 8 and probe.resets_inside
    assert max(probe.ratios) <= RATIO_TOLERANCE and max(probe.values) <= 1e-5
    assert min(probe.effects) > 1e-4  # the noise is on


@pytest.mark.parametrize("case", CASES)
def test_without_noise_training_is_stock(case: str) -> None:
    """The LSTM runs nn.LSTM's own code then, so it is equal bit for bit, which is more than the 1e-6 that is asked for."""
    ours, stock = build(case, sigma_init=0.0, learn_sigma=False).learn(144), build(case, prefix="").learn(144)
    own = ours.policy.state_dict()
    for name, expected in stock.policy.state_dict().items():
        assert th.equal(own[name], expected), name


def test_lstms_are_perturbed_as_asked_for() -> None:
    found = {}
    for choice in ("policy", "heads", "all", "linear", "hidden"):
        noise = dict(layers=choice) if choice in ("linear", "hidden") else dict(perturb=choice)
        policy = build("discrete", **noise).policy
        lstms = [name for name in ("lstm_actor", "lstm_critic") if isinstance(getattr(policy, name), FlipoutLSTM)]
        found[choice] = lstms
        assert len(policy.perturbed_network.layers) > 0
        assert all(type(getattr(policy, name)) is nn.LSTM for name in {"lstm_actor", "lstm_critic"} - set(lstms))
    both = ["lstm_actor", "lstm_critic"]
    assert found == dict(policy=both[:1], linear=[], heads=[], hidden=both[:1], all=both)


def test_sigma_of_the_lstm_learns() -> None:
    model = build("discrete", learn_sigma=True)
    before = {name: sigma.clone() for name, sigma in model.policy.lstm_actor.named_parameters() if name.endswith("sigma")}
    model.learn(144)
    assert set(before) == {f"{kind}_{part}_l0_sigma" for kind in ("weight", "bias") for part in ("ih", "hh")}
    after = dict(model.policy.lstm_actor.named_parameters())
    assert all(not th.equal(after[name], sigma) for name, sigma in before.items())


def test_a_loaded_model_acts_the_same_and_goes_on(tmp_path: Any) -> None:
    model = build("discrete", resample="episode").learn(72)
    model.save(tmp_path / "model")
    loaded = RecurrentPPO.load(tmp_path / "model", env=vector_env("discrete", 3))
    observations = np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)
    for deterministic in (True, False):
        th.manual_seed(0)
        one, states = model.predict(observations, deterministic=deterministic)
        th.manual_seed(0)
        other, other_states = loaded.predict(observations, deterministic=deterministic)
        assert np.array_equal(one, other) and all(np.array_equal(a, b) for a, b in zip(states, other_states, strict=True))
    loaded.learn(72, reset_num_timesteps=False)
    assert loaded.num_timesteps == 144


def test_mean_predictions_draw_nothing() -> None:
    policy = build("discrete").policy
    before = policy.noise_state()
    policy.predict(np.zeros((2, 5), np.float32), deterministic=True)
    assert policy.noise_state() == before
    policy.predict(np.zeros((2, 5), np.float32), deterministic=False)
    assert policy.noise_state()["evaluations"] == before["evaluations"] + 1
