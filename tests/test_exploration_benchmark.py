"""The exploration benchmark: what may silently be wrong in a table that took days."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import DQN

from sb3_flipout.envs import Chain, DeepSea
from sb3_flipout.policies.dqn import ValueMixin

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import exploration
import exploration_report
import exploration_training
import runs
from exploration_tasks import ARMS, TASKS, Run, Task, settings
from exploration_training import GoalRecord

# What each arm must be, written down a second time: (family, sharing, resample, members, prior, target noise, learned sigma).
EXPECTED = {
    "noisynet-step": ("factorised", "shared", "step", None, 0.0, "independent", True),
    "noisynet-episode": ("factorised", "shared", "episode", None, 0.0, "independent", True),
    "flipout-step": ("gaussian", "flipout", "step", None, 0.0, "independent", True),
    "flipout-annealed": ("gaussian", "flipout", "step", None, 0.0, "independent", True),
    "flipout-falling": ("gaussian", "flipout", "step", None, 0.0, "independent", False),
    "falling-and-epsilon": ("gaussian", "flipout", "step", None, 0.0, "independent", False),
    "flipout-episode": ("gaussian", "flipout", "episode", None, 0.0, "independent", True),
    "members-all": ("gaussian", "flipout", "episode", 10, 0.35, "same", True),
    "members": ("gaussian", "flipout", "episode", 10, 0.35, "same", True),
    "members-no-prior": ("gaussian", "flipout", "episode", 10, 0.0, "same", True),
    "members-mean-target": ("gaussian", "flipout", "episode", 10, 0.35, "mean", True),
    "members-independent-target": ("gaussian", "flipout", "episode", 10, 0.35, "independent", True),
    "members-fixed-sigma": ("gaussian", "flipout", "episode", 10, 0.35, "same", False),
    "unbounded": ("gaussian", "flipout", "episode", None, 0.0, "same", True),
}


@pytest.fixture
def tiny(monkeypatch):
    """A chain that needs one step, and learning that starts at once."""
    algorithm = {**TASKS["chain-20"].algorithm, "learning_starts": 16, "batch_size": 16}
    task = Task(lambda seed: Chain(3), 12, algorithm, dict(net_arch=[16]), cap=6)
    monkeypatch.setitem(TASKS, "tiny", task)
    monkeypatch.setitem(TASKS, "other", task)
    return task


def fake_row(run, solved=None, **kwargs):
    row = dict(
        first_success_episode=solved and solved // 2,
        learned_episode=solved,
        solved_episode=solved,
        evaluation_return=1.0,
        cpu_seconds=3600.0,
        curve=None,
        **runs.made_with(),
    )
    return {**run._asdict(), **row, "settings": settings(run), **kwargs}


# ---- the criterion --------------------------------------------------------------------------------------------------


def goals_of(reached):
    goals = GoalRecord()
    for flag in reached:
        goals.add(flag)
    return goals


@pytest.mark.parametrize(
    "reached, first, learned",
    [
        ([False] * 300, None, None),
        ([True] * 99, 1, None),  # not yet a window of them
        ([True] * 100, 1, 100),
        ([False] * 10 + [True] * 90, 11, None),  # 90 are not over 90
        ([False] * 10 + [True] * 91, 11, 101),
        ([False] * 200 + [True] * 100, 201, 291),
        ([True, False] * 200, 1, None),
        ([True] * 100 + [False] * 100, 1, 100),  # stays the first time
    ],
)
def test_criterion(reached, first, learned):
    goals = goals_of(reached)
    assert (goals.episodes, goals.first_success, goals.learned) == (len(reached), first, learned)


def watch_steps(watch, steps):
    for number, (dones, infos) in enumerate(steps):
        watch.locals, watch.num_timesteps = dict(dones=np.array(dones), infos=infos), number
        if not watch._on_step():
            return number
    return None


def test_goals_are_read_at_the_ends_of_episodes_only():
    ended = dict(reached_goal=True, episode=dict(r=1.0))
    running = dict(reached_goal=True)
    watch = exploration_training.Watch(cap=4)
    stopped = watch_steps(watch, [([False, False], [running, running]), ([True, False], [ended, running])] * 5)
    assert stopped == 7 and watch.goals.episodes == 4 and watch.goals.first_success == 1


def test_no_episode_is_counted_beyond_the_end_of_the_run():
    ended = dict(reached_goal=False, episode=dict(r=0.0))
    watch = exploration_training.Watch(cap=5)
    watch_steps(watch, [([True] * 3, [ended] * 3)] * 3)
    assert watch.goals.episodes == len(watch.returns) == 5


@pytest.mark.parametrize("share, solved", [(1.0, True), (0.9, False), (0.0, False)])
def test_solved_needs_the_mean_weights_too(tiny, monkeypatch, share, solved):
    def learn_at_once(model, total_steps, callback):
        callback[0].goals = goals_of([True] * 120)

    monkeypatch.setattr(DQN, "learn", learn_at_once)
    monkeypatch.setattr(exploration_training, "evaluate", lambda model, run: (share, 11.0))
    row = exploration_training.train(Run("tiny", "epsilon", 1, 0, 200))
    assert row["learned_episode"] == 100 and row["evaluation_reached"] is solved
    assert row["solved_episode"] == (100 if solved else None)


def test_evaluation_is_on_the_mapping_of_training(monkeypatch):
    run = Run("deep-sea-6", "epsilon", 1, 3, 50)
    model = exploration_training.build(run)
    mapping = DeepSea(6, mapping_seed=3).action_mapping

    def goes_right(observation, state=None, episode_start=None, deterministic=False):
        assert deterministic
        return mapping.reshape(-1)[observation.argmax(axis=1)], None

    monkeypatch.setattr(model, "predict", goes_right)
    assert exploration_training.evaluate(model, run) == (1.0, pytest.approx(0.99))
    assert exploration_training.evaluate(model, run._replace(seed=4))[0] == 0.0


def test_a_run_from_start_to_end(tiny):
    row = exploration_training.train(Run("tiny", "epsilon", 1, 0, 150))
    assert row["solved_episode"] is not None and row["evaluation_reached"] is True and row["curve"] is None
    assert row["evaluation_return"] == Chain(3).goal_return
    assert row["episodes"] == row["learned_episode"] and row["env_steps"] == 12 * row["episodes"]
    assert json.loads(json.dumps(row)) == row


# ---- arms and settings ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:DQN explores by weight noise and by epsilon-greedy")  # as one of the arms is to
@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_with_what_the_table_says(tiny, arm, n_envs):
    model = exploration_training.build(Run("tiny", arm, n_envs, 0, 6))
    model.learn(60)
    assert model._n_updates > 0 and model.gradient_steps == (1 if n_envs == 1 else -1)
    noisy = isinstance(model.policy, ValueMixin)
    epsilon = {"epsilon": (1.0, 0.1), "falling-and-epsilon": (1.0, 0.0)}.get(arm, (0.0, 0.0))
    assert noisy is (arm != "epsilon") and (model.exploration_initial_eps, model.exploration_final_eps) == epsilon
    if noisy:
        s = model.policy.noise_settings
        assert s.base_every_steps is None and s.perturb == "policy" and s.sigma_init is None
        found = (s.family, s.noise_sharing, s.resample, s.members, s.prior_scale, s.target_noise, s.learn_sigma)
        assert found == EXPECTED[arm]


@pytest.mark.parametrize("arm, end", [("flipout-step", 1.0), ("flipout-annealed", 0.1)])
def test_the_noise_is_annealed_over_the_whole_training(tiny, monkeypatch, arm, end):
    ends = []
    monkeypatch.setattr(
        exploration_training, "evaluate", lambda model, run: ends.append(model.policy.noise_scale) or (0.0, 0.0)
    )
    row = exploration_training.train(Run("tiny", arm, 1, 0, 6))
    assert row["env_steps"] == row["settings"]["total_steps"] == 72 and ends == [pytest.approx(end)]


@pytest.mark.parametrize("n_envs", [1, 8])
@pytest.mark.parametrize("cap", [500, 2000])
def test_epsilon_falls_over_a_hundred_episodes_whatever_the_cap(cap, n_envs):
    chosen = settings(Run("chain-20", "epsilon", n_envs, 0, cap))
    assert chosen["algorithm"]["exploration_fraction"] * chosen["total_steps"] == pytest.approx(100 * 29)
    assert chosen["total_steps"] >= cap * 29 and chosen["total_steps"] % (n_envs * 29) == 0


def test_settings_of_every_run_can_be_written_as_json():
    runs = exploration.all_runs(**exploration.FULL)
    assert all(json.loads(json.dumps(settings(run))) == settings(run) for run in runs)
    batches = {task: TASKS[task].algorithm["batch_size"] for task in TASKS if task.startswith("deep-sea")}
    assert batches == {**dict.fromkeys(("deep-sea-6", "deep-sea-10", "deep-sea-14", "deep-sea-20"), 64)} | {
        "deep-sea-30": 256,
        "deep-sea-50": 256,
    }


# ---- the file of runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny, monkeypatch):
    """The runs that were trained, instead of training."""
    calls = []

    def train(run):
        calls.append(run)
        return fake_row(run)

    monkeypatch.setattr(exploration, "train", train)
    return calls


COMMAND = ["--tasks", "tiny", "other", "--arms", "epsilon", "members", "--n-envs", "1", "--seeds", "2"]


def test_finished_runs_are_skipped(trained, tmp_path, capsys):
    out = tmp_path / "runs" / "exploration.jsonl"
    assert exploration.main([*COMMAND, "--out", str(out)]) == 0
    assert len(trained) == len(set(trained)) == 8 == len(out.read_text().splitlines())
    assert [run.seed for run in trained] == [0] * 4 + [1] * 4  # seed by seed
    exploration.main([*COMMAND, "--out", str(out)])
    assert len(trained) == 8
    exploration.main([*COMMAND, "--seeds", "3", "--out", str(out)])
    assert len(trained) == 12 and {run.seed for run in trained[8:]} == {2}
    exploration.main([*COMMAND, "--cap", "5", "--out", str(out)])
    assert len(trained) == 20


def test_runs_under_other_settings_are_made_again(trained, tmp_path, monkeypatch):
    out = tmp_path / "exploration.jsonl"
    exploration.main([*COMMAND, "--out", str(out)])
    policy, algorithm, policy_kwargs = ARMS["members"]
    monkeypatch.setitem(ARMS, "members", (policy, algorithm, {**policy_kwargs, "prior_scale": 5.0}))
    exploration.main([*COMMAND, "--out", str(out)])
    assert len(trained) == 12 and {run.arm for run in trained[8:]} == {"members"}
    assert {row["settings"]["policy_kwargs"].get("prior_scale") for row in exploration.read(out).values()} == {None, 5.0}


@pytest.mark.parametrize("kept", [20, None])
def test_a_torn_last_line(trained, tmp_path, kept):
    out = tmp_path / "exploration.jsonl"
    exploration.main([*COMMAND, "--out", str(out)])
    lines = out.read_text().splitlines()
    # Torn in the middle; or complete but for its line break, which is a finished run.
    out.write_text("\n".join([*lines[:-1], lines[-1][:kept]]))
    assert len(exploration.read(out)) == (8 if kept is None else 7)
    exploration.main([*COMMAND, "--seeds", "3", "--out", str(out)])
    assert len(trained) == (12 if kept is None else 13)
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 12


def test_a_broken_line_in_the_middle_is_said(tiny, tmp_path):
    out = tmp_path / "exploration.jsonl"
    out.write_text('{"task": \n' + json.dumps(fake_row(Run("tiny", "epsilon", 1, 0, 6))) + "\n")
    with pytest.raises(ValueError, match="line 1"):
        exploration.read(out)


def test_a_failing_run_does_not_stop_the_others(tiny, tmp_path, monkeypatch, capsys):
    def train(run):
        if run.arm == "members":
            raise RuntimeError("broken arm")
        return fake_row(run)

    monkeypatch.setattr(exploration, "train", train)
    out = tmp_path / "exploration.jsonl"
    assert exploration.main([*COMMAND, "--out", str(out)]) == 1
    assert len(exploration.read(out)) == 4 and "broken arm" in capsys.readouterr().err


def test_list_counts(tiny, tmp_path, capsys):
    out = tmp_path / "exploration.jsonl"
    runs.append(out, fake_row(Run("tiny", "epsilon", 1, 0, 6)))
    runs.append(out, fake_row(Run("tiny", "epsilon", 1, 1, 6), settings={}))  # of other settings: not done
    before = out.read_bytes()
    assert exploration.main([*COMMAND, "--list", "--out", str(out)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["tiny", "1", "6", "epsilon", "1", "1", "1.00"] in lines
    assert ["tiny", "1", "6", "members", "0", "2", "2.00"] in lines  # guessed from the other arm on the task
    assert ["other", "1", "6", "members", "0", "2", "0.00"] in lines  # guessed from the number of steps
    assert lines[-1][:5] == ["total:", "1", "done,", "7", "left,"] and lines[-1][6] == "3.0"
    assert out.read_bytes() == before


def test_runs_of_the_full_benchmark_and_of_the_quick_one():
    full = exploration.all_runs(**exploration.FULL)
    assert len(full) == len(set(full)) == 5 * len(ARMS) * (9 * 2 + 6)
    quick = exploration.arguments(["--quick", "--seeds", "1"])
    runs = exploration.all_runs(quick.tasks, quick.arms, quick.n_envs, quick.seeds, quick.cap)
    assert len(runs) == 16 and {run.cap for run in runs} == {500}


# ---- the report -----------------------------------------------------------------------------------------------------


def test_report_says_where_we_lose(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rliable", None)
    rows = [fake_row(Run("chain-20", "epsilon", 1, seed, 2000), 400 + seed) for seed in range(3)]
    rows += [fake_row(Run("chain-20", "members", 1, seed, 2000), solved) for seed, solved in enumerate((300, None, None))]
    rows += [fake_row(Run("chain-20", "flipout-step", 1, seed, 2000), 200) for seed in range(3)]
    rows += [fake_row(Run("minatar-freeway", "epsilon", 1, 0, None), evaluation_return=3.0, curve=[[10, 1.5]])]
    text = exploration_report.write_report(rows, tmp_path / "exploration.jsonl")
    assert "| chain-20 | 1 | 2000 | epsilon | 3 of 3 | 3 of 3 | 401 (400 to 402) | 200 |" in text
    assert "| chain-20 | 1 | 2000 | members | 1 of 3 | 1 of 3 | >2000 (300 to >2000) | >2000 |" in text
    assert "| minatar-freeway | epsilon | 1 | 3.00 (3.00 to 3.00) | 1.50 |" in text
    lost = [line for line in text.splitlines() if line.startswith("- ")]
    assert lost == ["- chain-20, 1 env: `members` 1/3, >2000 episodes; `epsilon` 3/3, 401 episodes."]
    assert "make bench-install" in text
    assert (tmp_path / "exploration.md").read_text() == text and (tmp_path / "exploration.png").stat().st_size > 1000


def test_scores_are_paired_by_seed_and_task():
    solved = {
        ("chain-20", "epsilon"): (100, 2000, None),
        ("chain-20", "members"): (None, 100),
        ("chain-30", "members"): (100, 100),
    }
    rows = [
        fake_row(Run(t, a, 1, seed, 2000), value) for (t, a), values in solved.items() for seed, value in enumerate(values)
    ]
    table = exploration_report.table_of(rows[::-1])
    (cells,) = exploration_report.groups(table)  # chain-30 has one arm: nothing to compare
    matrices = exploration_report.score_matrices(table, cells)
    assert [cell.task for cell in cells] == ["chain-20"] and list(matrices) == ["epsilon", "members"]
    np.testing.assert_allclose(matrices["epsilon"], [[1.0], [1 - 1900 / 1901]])  # seed 2 has one arm only
    np.testing.assert_allclose(matrices["members"], [[0.0], [1.0]])


def test_curve_is_thinned_to_thirty_points():
    points = exploration_training.curve([(step, float(step)) for step in range(10, 3001, 10)], 3000)
    assert len(points) == 30 and points[0] == [100, 55.0] and points[-1] == [3000, 2955.0]


def test_statistics_with_rliable():
    pytest.importorskip("rliable", reason="in the bench extra")
    rows = [fake_row(Run("chain-20", arm, 1, seed, 2000), 200 + seed) for arm in ("epsilon", "members") for seed in range(3)]
    lines = exploration_report.statistics(exploration_report.table_of(rows))
    assert "3 seeds of: chain-20, 1 env" in lines and any(line.startswith("| members | 0.9") for line in lines)
