"""ONNX graphs, run by onnxruntime, act as the policy does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch as th
from export_cases import CASES, DISCRETE, VECTOR, Spaces, build
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, PPO

import sb3_flipout
from sb3_flipout import export_onnx
from sb3_flipout.export import graph_of
from sb3_flipout.export.onnx import example_inputs

ROWS = 1000


def sampled(space: spaces.Space[Any], rows: int) -> Any:
    space.seed(0)
    if isinstance(space, spaces.Dict):
        return {name: sampled(part, rows) for name, part in space.spaces.items()}
    return np.stack([space.sample() for _ in range(rows)])


def trained_a_little(model: Any) -> Any:
    """Weights that are not those of the beginning, so that actions differ."""
    th.manual_seed(1)
    with th.no_grad():
        for parameter in model.policy.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter.add_(0.3 * th.randn_like(parameter))
    return model


def run(path: Path, obs: Any, **states: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    given = {**(obs if isinstance(obs, dict) else {"obs": obs}), **states}
    return session.run(None, given)  # type: ignore[no-any-return]


def compared(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.shape == wanted.shape
    if np.issubdtype(wanted.dtype, np.integer):
        assert np.array_equal(found, wanted)
    else:
        assert np.abs(found - wanted).max() <= 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if case != "lstm"])
def test_actions_are_those_of_the_policy(case: str, tmp_path: Path) -> None:
    model = trained_a_little(build(case))
    obs = sampled(model.observation_space, ROWS)
    path = export_onnx(model, tmp_path / "policy.onnx")
    model.policy.set_training_mode(False)
    wanted = model.policy.predict(obs, deterministic=True)[0]
    assert len(np.unique(wanted, axis=0)) > 1
    compared(run(path, obs)[0], wanted)
    one = {name: part[:1] for name, part in obs.items()} if isinstance(obs, dict) else obs[:1]
    compared(run(path, one)[0], wanted[:1])


@pytest.mark.parametrize("kind", [DQN, QRDQN])
@pytest.mark.parametrize("prior_scale", [0.0, 0.8])
def test_members_vote(kind: Any, prior_scale: float, tmp_path: Path) -> None:
    greedy = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0, learning_starts=10, buffer_size=100)
    noise = dict(net_arch=[8], members=4, prior_scale=prior_scale)
    model = kind("FlipoutMlpPolicy", Spaces(VECTOR, DISCRETE), policy_kwargs=noise, seed=3, device="cpu", **greedy)
    trained_a_little(model.learn(40))
    sb3_flipout.flipout_policy(model).noise_scale = 1.3
    obs = sampled(VECTOR, ROWS)
    wanted = model.predict(obs, deterministic=True)[0]
    assert len(np.unique(wanted)) > 1
    mean = model.policy.online(th.as_tensor(obs))
    best = (mean.mean(dim=1) if mean.dim() == 3 else mean).argmax(dim=1).numpy()
    assert not np.array_equal(best, wanted)  # the mean weights would act otherwise
    compared(run(export_onnx(model, tmp_path / "policy.onnx"), obs)[0], wanted)


def test_a_recurrent_policy_remembers(tmp_path: Path) -> None:
    model = trained_a_little(build("lstm"))
    path, obs, rows = export_onnx(model, tmp_path / "policy.onnx"), sampled(VECTOR, 200), 4
    hidden = cell = np.zeros((1, rows, 8), np.float32)
    state, actions = None, []
    for step in range(50):
        now = obs[rows * step : rows * (step + 1)]
        start = np.array([step % (7 + row) == 0 for row in range(rows)], np.float32)
        wanted, state = model.predict(now, state, start.astype(bool), deterministic=True)
        found, hidden, cell = run(path, now, hidden=hidden, cell=cell, episode_start=start)
        compared(found, wanted)
        assert np.abs(hidden - state[0]).max() <= 1e-5 and np.abs(cell - state[1]).max() <= 1e-5
        actions += wanted.tolist()
    assert len(set(actions)) > 1


@pytest.mark.filterwarnings(
    "ignore:.torch.jit", "ignore:Converting a tensor to a Python"
)  # torch would rather not have it used
@pytest.mark.parametrize("case", ["ppo", "dqn, members", "dqn, look-up", "sac"])
def test_torchscript_by_tracing(case: str, tmp_path: Path) -> None:
    model = trained_a_little(build(case))
    graph = graph_of(model)
    th.jit.trace(graph, example_inputs(graph)[0]).save(str(tmp_path / "policy.pt"))
    obs = sampled(model.observation_space, 50)
    with th.no_grad():
        found = th.jit.load(str(tmp_path / "policy.pt"))(th.as_tensor(obs)).numpy()
    compared(found, model.predict(obs, deterministic=True)[0])


def test_names_that_the_graph_has_for_itself_are_refused(tmp_path: Path) -> None:
    space = spaces.Dict({"actions": VECTOR})
    with pytest.raises(ValueError, match="names that the graph has for itself, actions"):
        export_onnx(PPO("FlipoutMultiInputPolicy", Spaces(space, DISCRETE), device="cpu"), tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


def test_a_plain_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a flipout policy or a model with one, got ActorCriticPolicy"):
        export_onnx(PPO("MlpPolicy", Spaces(VECTOR, DISCRETE), device="cpu"), tmp_path / "policy.onnx")
