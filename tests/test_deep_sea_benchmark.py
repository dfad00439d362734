"""The deep-exploration benchmark: its arms are what its page says, and its plain references do what they say."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stats import hoeffding

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import boot_dqn
import deep_sea
import deep_sea_runs
import deep_sea_table
import runs

from sb3_flipout.envs import DeepSea


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deep_sea_runs.TASKS, "tiny", (3, True, 60))


@pytest.mark.parametrize("arm", [*deep_sea_runs.ARMS, *deep_sea_runs.PLAIN])
def test_every_arm_runs(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(deep_sea_runs.TASKS, "tiny", (3, "reward noise" not in arm, 20))
    row = deep_sea_runs.train(deep_sea_runs.Run("tiny", arm, 3))
    assert row["episodes"] == 20 and row["learned"] is None  # a hundred episodes are not made
    slower = ("slower", "slower, dropping", "dropping twice", "ever slower", "soon slower", "settling")
    twice = [f"members, {how}" for how in slower]
    others = {"members, 10": 640} | dict.fromkeys(twice, 2560)
    assert row["rows_per_step"] == deep_sea_runs.GRADIENT_STEPS * others.get(arm, deep_sea_runs.ROWS)
    assert row["commit"] and 0 < row["learned_parameters"] < row["all_parameters"]


def test_a_run_that_was_stopped_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(deep_sea_runs, "EPISODES_KEPT", 10)
    run, steps = deep_sea_runs.Run("tiny", "members, ever slower", 3), deep_sea_runs.Kept._on_step
    seen: list[tuple[int, int, int]] = []

    def stopped(watch: Any) -> bool:
        seen.append((watch.num_timesteps, watch.goals.episodes, watch.model.replay_buffer.size()))
        return steps(watch) and len(seen) != 110

    monkeypatch.setattr(deep_sea_runs.Kept, "_on_step", stopped)
    monkeypatch.setattr(deep_sea_runs, "made_with", lambda: dict(commit="0ther"))
    assert deep_sea_runs.train(run, tmp_path)["episodes"] == 36
    monkeypatch.setattr(deep_sea_runs, "made_with", runs.made_with)
    row = deep_sea_runs.train(run, tmp_path)
    assert row["episodes"] == 60 and row["begun_at"] == "0ther"
    # From the checkpoint, at the end of an episode, the last step of which had not been stored.
    assert seen[109:112] == [(110, 36, 109), (91, 30, 89), (92, 30, 90)]
    assert deep_sea_runs.train(run)["begun_at"] == row["commit"]


def test_arms_of_members_differ_in_what_the_page_names() -> None:
    ours = deep_sea_runs.ARMS["members"]
    for name, arm in deep_sea_runs.ARMS.items():
        if name.startswith("members"):
            assert len({*arm.noise.items()} ^ {*ours.noise.items()}) <= 4
            assert arm.algorithm.keys() <= {*ours.algorithm, "batch_size", "replay_buffer_class", "learning_rate"}
            assert (arm.optimism > 0) == (name == "members, optimism")
    usual, hopeful = (deep_sea_runs.build(deep_sea_runs.Run("tiny", name, 0)) for name in ("members", "members, optimism"))
    for one in ("q_net", "q_net_target"):
        before, after = (getattr(model, one).q_net[-1].bias for model in (usual, hopeful))
        th.testing.assert_close(after, before + deep_sea_runs.OPTIMISM)
    settings = deep_sea_runs.build(deep_sea_runs.Run("tiny", "members", 0))
    assert (
        settings.policy.noise_settings.members == settings.policy.noise_settings.keys_per_transition == deep_sea_runs.MEMBERS
    )
    assert settings.batch_size == deep_sea_runs.MEMBERS * deep_sea_runs.TRANSITIONS and settings.target_update_interval == 4


@pytest.mark.parametrize(("arm", "quarter"), [("members, ever slower", 5e-4), ("members, settling", 2.5e-4)])
@pytest.mark.parametrize("size", [10, 100])
def test_the_learning_rate_is_the_same_after_as_many_steps_at_all_sizes(size: int, arm: str, quarter: float) -> None:
    cap = deep_sea_runs.TASKS[f"sea-{size}"][2]
    model = deep_sea_runs.build(deep_sea_runs.Run(f"sea-{size}", arm, 0))
    rates = [model.lr_schedule(1 - step / (cap * size)) for step in (0, 5_000, 10_000)]
    assert rates == pytest.approx([1e-3] * 3)
    assert size == 10 or model.lr_schedule(1 - 40_000 / (cap * size)) == pytest.approx(quarter)


@pytest.mark.parametrize("stored", [700, 1500], ids=["filling", "full"])
def test_half_of_a_batch_is_even_in_the_logarithm_of_age(stored: int) -> None:
    """Shares of age groups, by Hoeffding's bound."""
    buffer = deep_sea_runs.NewestOftener(1000, spaces.Discrete(5000), spaces.Discrete(2), "cpu")
    for number in range(stored):
        buffer.add(np.array(number), np.array(number + 1), np.array([0]), np.array([0.0]), np.array([False]), [{}])
    held, n = min(stored, 1000), 100_000
    ages = stored - 1 - np.asarray(buffer.sample(2 * n).observations).flatten()
    assert 0 <= ages.min() and ages.max() < held
    for group, expected in ((ages[:n], lambda age: math.log(age + 1, held)), (ages[n:], lambda age: age / held)):
        for age in (1, 3, 10, 100, 500):
            assert abs((group < age).mean() - expected(age)) <= hoeffding(n, comparisons=20) / 2
    assert stored == 700 or buffer.full


def test_the_ensemble_is_its_networks_and_their_priors() -> None:
    agent = boot_dqn.Ensemble(9, 2, 3, 0.5)
    obs = th.arange(4)
    values = agent.values(obs, th.tensor([2, 0]))
    prior = th.stack([agent.priors[k](obs) for k in (2, 0)], dim=1)
    expected = th.stack([agent.nets[k](obs) for k in (2, 0)], dim=1) + 0.5 * prior / prior.square().mean().sqrt()
    th.testing.assert_close(values, expected)
    assert sum(p.numel() for p in agent.parameters() if p.requires_grad) == 3 * (9 * 50 + 50 + 50 * 51 + 2 * 51)


def test_the_index_head_is_linear_in_the_index() -> None:
    agent, obs = boot_dqn.IndexHead(9, 2, 0.0), th.arange(4)
    a, b = agent.draw(2)
    assert th.allclose(agent.draw(5).norm(dim=1), th.ones(5))
    both = agent.values(obs, th.stack([a, b, a + b]))
    mean = agent.values(obs, th.zeros(1, 4))[:, 0]
    th.testing.assert_close(both[:, 0] + both[:, 1] - mean, both[:, 2], rtol=1e-4, atol=1e-5)


def test_the_reference_solves_a_small_sea() -> None:
    th.manual_seed(0)
    agent, goals = boot_dqn.Ensemble(16, 2, 5, 0.35), deep_sea_runs.GoalRecord()

    def finished(good: bool) -> bool:
        goals.add(good)
        return goals.learned is not None

    env = DeepSea(4, mapping_seed=1, integer_observations=True)
    boot_dqn.learn(agent, env, 0, 4 * 400, finished, 32, 5)
    assert goals.learned is not None
    assert int(boot_dqn.vote(agent, th.tensor([0]), 5)) == env.action_mapping[0, 0]


@pytest.mark.parametrize("wrong_on_the_diagonal", [False, True])
def test_a_good_episode_of_the_stochastic_sea_leaves_the_diagonal_by_slips_alone(wrong_on_the_diagonal: bool) -> None:
    env: Any = deep_sea_runs.sea(deep_sea_runs.Run("stochastic-10", "members", 4))
    sea, slipped = env.unwrapped, 0
    for seed in range(20):
        env.reset(seed=seed)
        info: dict[str, Any] = {}
        for step in range(10):
            on_diagonal = sea._row == sea._column
            right = int(sea.action_mapping[sea._row, sea._column])
            wrong = step == 0 if wrong_on_the_diagonal else not on_diagonal  # off it, left is the better move
            info = env.step(1 - right if wrong else right)[4]
        slipped += not on_diagonal
        assert info["reached_goal"] is not wrong_on_the_diagonal
    assert slipped  # 20 episodes without one: (1 - 1/10)^200 = 7e-10


def row(size: int, seed: int, solved: int | None, arm: str = "members") -> dict[str, Any]:
    return dict(
        task=f"sea-{size}", arm=arm, seed=seed, cap=3000, episodes=3000, first_good=solved, learned=solved, solved=solved,
        cpu_seconds=2.0, rows_per_step=1, learned_parameters=10,
    )  # fmt: skip


def test_the_exponent_is_that_of_the_medians() -> None:
    rows = [row(size, seed, round(3 * size**1.5)) for size in (10, 20, 30, 50) for seed in range(3)]
    rows += [row(size, seed, size, "another") for size in (10, 20, 30) for seed in range(3)]
    told = "to the power 1.50 (95 % bootstrap interval over seeds [1.50, 1.50], sizes 10, 20, 30, 50)"
    assert f"Episodes of `members` grow as size {told}" in deep_sea.exponent(rows, "members")
    assert "Episodes of `another` grow as size to the power 1.00" in deep_sea.exponent(rows, "another")
    assert "Of `members` too few sizes" in deep_sea.exponent(rows[:6], "members")
    of_two = [*rows, row(100, 0, 9_999), row(100, 1, 9_999)]
    assert deep_sea.exponent(of_two, "members") == deep_sea.exponent(rows, "members"), "two seeds tell of no interval"


def test_the_interval_of_the_exponent_is_over_seeds() -> None:
    """One seed of three at the largest size is slower; one resampled set in four has it twice, so that its median is, too."""
    sizes, slower = (10, 20, 30, 50), round(27 * 50**1.5)
    rows = [
        row(size, seed, slower if (size, seed) == (50, 2) else round(3 * size**1.5)) for size in sizes for seed in range(3)
    ]
    high = np.polyfit(np.log(sizes), np.log([3 * size**1.5 for size in sizes[:-1]] + [slower]), 1)[0]
    assert f"to the power 1.50 (95 % bootstrap interval over seeds [1.50, {high:.2f}]" in deep_sea.exponent(rows, "members")
    assert high > 2


def test_learning_rates_that_fall_do_so_by_the_steps_made() -> None:
    root, soon, drop = deep_sea_runs.falling(600, 0.5, 20), deep_sea_runs.falling(600, 1.0), deep_sea_runs.dropping(600_000)
    assert [root(1 - steps / 600) for steps in (0, 20, 80, 500)] == pytest.approx([1e-3, 1e-3, 5e-4, 2e-4])
    assert soon(0.0) == 1e-3, "600 steps are fewer than 10,000"
    assert [drop(1 - steps / 600_000) for steps in (0, 199_999, 200_001, 600_000)] == [3e-4, 3e-4, 1e-4, 1e-4]
    twice = deep_sea_runs.dropping(600_000, 2_000)
    assert [twice(1 - steps / 600_000) for steps in (0, 1_999, 2_001, 200_001)] == [1e-3, 1e-3, 3e-4, 1e-4]


def test_seeds_that_a_choice_was_made_on_are_not_fresh() -> None:
    chosen, fresh = (row(100, seed, 2248, "members, slower, dropping") for seed in (101, 102))
    others = row(100, 101, 2248), row(10, 99, 150)
    assert [deep_sea.is_fresh(one) for one in (chosen, fresh, *others)] == [False, True, True, False]
    twice = [row(100, seed, 2745, "members, dropping twice") for seed in (103, 104, 105)]
    assert [deep_sea.is_fresh(one) for one in twice] == [False, False, True]
    made = dict(commit="1234567", date="2026-11-30", torch="2", stable_baselines3="2")
    found = deep_sea.report([one | made for one in (chosen, row(10, 100, 150))])
    before, after = found.split("## Seeds that the choice was made on")
    assert "| sea-100 |" in after and "| sea-100 |" not in before and "| sea-10 |" in before


def test_runs_that_are_not_solved_count_as_more_than_the_cap() -> None:
    rows = [row(20, 100, 300), row(20, 101, None), row(20, 102, None)]
    (line,) = deep_sea.table(rows).splitlines()[2:]
    assert line.startswith("| sea-20 | members | 3 | 1 | >3000 (300 to >3000) | >3000 | 2 |")
    assert np.isfinite(rows[0]["solved"])


def test_tables_move_to_their_targets() -> None:
    np.random.seed(0)
    tables = deep_sea_table.Tables(3, 5)
    tables.target[:, 4] = np.array([1.0, 2.0])
    before = tables.values.copy()
    for _ in range(7):  # it holds the last five
        tables.store(8, 0, 7.0, 0, True)
    for number in range(5):
        tables.store(number % 2, 1, 0.5, 4, bool(number % 2))
    tables.learn(False, 64, 0.0)  # that one of the two entries is not sampled has probability (3/5)^64 + (2/5)^64 < 1e-14
    for cell, aim in ((0, 0.5 + 0.99 * 2.0), (1, 0.5)):
        np.testing.assert_allclose(tables.values[:, cell, 1], before[:, cell, 1] * 0.6 + 0.4 * aim, rtol=1e-5)
    before[:, :2, 1] = tables.values[:, :2, 1]
    assert np.array_equal(tables.values, before)


@pytest.mark.parametrize("arm", deep_sea_table.ARMS)
def test_tables_learn_a_small_sea(arm: str) -> None:
    row = deep_sea_table.train(deep_sea_table.Run(5, arm, 0))
    assert row["learned"] and 5 < row["cells"] <= 15 and row["commit"]
    other = {**row, "seed": 1, "learned": None, "size": 10, "cells": 14}
    assert "| 10 | " + arm + " | 1 | 0 | >3000 (>3000 to >3000) | 14 |" in deep_sea_table.table([row, other])
