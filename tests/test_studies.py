"""The learning studies in benchmarks/: they build what their tables say, and their arms differ in what their pages say."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import defaults
import replay
import runs
import zoo_runs

from sb3_flipout.policies import ActorSettings, OnPolicySettings, ValueSettings

PAGES = Path(__file__).parent.parent / "docs" / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def tiny(task: zoo_runs.Task, **changes: Any) -> zoo_runs.Task:
    return replace(task, steps=600, episodes=2, changes={**task.changes, **changes})


@pytest.mark.parametrize("task", ["PPO CartPole-v1", "PPO Pendulum-v1", "DQN CartPole-v1", "TD3 Pendulum-v1"])
def test_an_arm_is_rl_zoo_s_but_for_the_noise(task: str, tmp_path: Path) -> None:
    models = {}
    for arm in ("stock", "flipout"):
        of_task, (noise, changes) = tiny(defaults.TASKS[task]), defaults.ARMS["flipout"]
        if arm == "flipout":
            changes = {**of_task.flipout_changes, **changes, "policy": "FlipoutMlpPolicy"}
        models[arm] = zoo_runs.build(of_task, {**of_task.changes, **changes}, noise, 0, str(tmp_path))[1]
    stock, ours = models["stock"], models["flipout"]
    assert type(stock) is type(ours) and hasattr(ours.policy, "noise_settings")
    for name in ("n_steps", "batch_size", "gamma", "n_envs", "use_sde", "buffer_size", "train_freq"):
        assert getattr(stock, name, None) == getattr(ours, name, None), name
    assert stock.policy.net_arch == ours.policy.net_arch and stock.lr_schedule(0.5) == ours.lr_schedule(0.5)
    for model in models.values():
        model.get_env().close()
    if task.startswith("DQN"):
        assert ours.exploration_initial_eps == ours.exploration_final_eps == 0.0 < stock.exploration_final_eps
    if task.startswith("TD3"):
        assert ours.action_noise is None is not stock.action_noise


def test_a_run_says_what_it_was_and_how_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(defaults.TASKS, "tiny", tiny(defaults.TASKS["PPO CartPole-v1"]))
    row = defaults.make(zoo_runs.Run("tiny", "linear@.3 fixed", 3))
    assert (row["task"], row["arm"], row["seed"], row["steps"]) == ("tiny", "linear@.3 fixed", 3, 600)
    assert 8 <= row["worst"] <= row["score"] <= 500 and row["noise"]["schedule"] == "linear" and row["commit"]
    assert row["sigma_growth"] == {"mlp_extractor.policy_net.0": 1, "mlp_extractor.policy_net.2": 1, "action_net": 1}
    assert defaults.make(zoo_runs.Run("tiny", "stock", 3))["noise"] is None


def test_intervals_and_failures_are_counted_on_common_fresh_seeds() -> None:
    scores = {"stock": [100.0, 102.0, 98.0], "flipout": [101.0, 40.0, 99.0, 7.0]}
    rows = [
        dict(task="PPO CartPole-v1", arm=arm, seed=defaults.CONFIRMING + i, score=score)
        for arm, found in scores.items()
        for i, score in enumerate(found)
    ]
    rows.append(dict(task="PPO CartPole-v1", arm="flipout", seed=0, score=1e9))
    (line,) = defaults.table(rows, fresh=True).splitlines()[2:]
    assert line.startswith("| PPO CartPole-v1 | flipout | 3 | 100.0 (98.0) | 80.0 (40.0) | [")
    assert line.endswith("**not excluded** | 0, 1 |")


@pytest.mark.parametrize("arm", replay.ARMS)
def test_arms_of_the_replay_study_differ_in_the_update_alone(monkeypatch: pytest.MonkeyPatch, arm: str) -> None:
    held, task, noise = replay.TASKS["CartPole-v1"]
    monkeypatch.setitem(replay.TASKS, "tiny", (held, tiny(task, learning_rate=0.0), noise))
    seen: list[float] = []
    original = replay.Studied.worst_first_ratio

    def look(model: Any) -> float:
        seen.append(float(model.rollout_buffer.advantages.std()))
        return original(model)

    monkeypatch.setattr(replay.Studied, "worst_first_ratio", look)
    row = replay.make(replay.Run("tiny", arm, 0, 1.0, "step"))
    assert row["worst_first_ratio"] <= 1e-5  # of exact replay, and of mean weights against themselves
    assert row["mean_against_acting"] > 0.01, "the noise did nothing, so this test shows nothing"
    assert row["approx_kl"] == pytest.approx(0, abs=1e-6)  # nothing has moved
    weighted = [abs(std - 1) > 1e-3 for std in seen]
    assert weighted == [arm == "truncated"] * 3


#: Settings of the policies that the studies' tasks have.
KINDS = dict(PPO=OnPolicySettings, A2C=OnPolicySettings, DQN=ValueSettings, SAC=ActorSettings, TD3=ActorSettings)


@pytest.mark.parametrize("study", ["defaults", "sparse_control"])
def test_runs_on_file_had_the_settings_of_their_arms(study: str) -> None:
    """Else a default that changes would change what an arm on a page means."""
    if study == "sparse_control":
        pytest.importorskip("pink")
        arms = importlib.import_module(study).FLIPOUT
    else:
        arms = {arm: noise for arm, (noise, _) in defaults.ARMS.items()}
    rows = [row for row in runs.read(PAGES / f"{study}.jsonl") if row["noise"] is not None]
    assert rows
    for row in rows:
        wanted = {name: value for name, value in arms[row["arm"]].items() if name != "ent_coef"}
        if study == "sparse_control":
            wanted["act_by_mode"] = row["task"] == "SAC"
        # Through JSON, as the file was; what a line does not have came later, and had no effect before.
        expected = json.loads(json.dumps(asdict(KINDS[row["task"].split()[0]](**wanted))))
        assert {name: row["noise"].get(name, value) for name, value in expected.items()} == expected, (row["task"], row["arm"])
