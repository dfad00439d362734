"""`python -m sb3_flipout.zoo benchmark`, `config` and `record`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sb3_flipout import zoo
from sb3_flipout.zoo import benchmark, commands, report

ROOT = Path(__file__).parents[2]


def run(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sb3_flipout.zoo", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )


def scored(
    folder: Path, arm: str, seed: int, returns: list[float], algo: str = "ppo", env: str = "CartPole-v1", steps: int = 300
) -> Path:
    """A run's folder, as the benchmark leaves it."""
    path = benchmark.Run(algo, env, arm, seed).folder(folder)
    (path / algo / f"{env}_1").mkdir(parents=True)
    row = dict(algo=algo, env=env, arm=arm, seed=seed, returns=returns, settings=dict(steps=steps, episodes=2))
    (path / "score.json").write_text(json.dumps(row))
    np.savez(
        path / algo / f"{env}_1" / "evaluations.npz", timesteps=np.arange(1, 4) * 100, results=np.full((3, 5), returns[0])
    )
    return path


def test_the_table_compares_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed in range(4):
        scored(tmp_path, "flipout", seed, [100.0 + seed, 100.0 + seed])
        scored(tmp_path, "stock", seed, [10.0 * seed])
    scored(tmp_path, "flipout", 9, [-1e6])  # stock has no such seed
    (benchmark.Run("ppo", "CartPole-v1", "stock", 9).folder(tmp_path)).mkdir(parents=True)
    (benchmark.Run("ppo", "CartPole-v1", "stock", 9).folder(tmp_path) / "score.json.unfinished").write_text("{")
    for arm, steps in (("flipout", 300), ("stock", 400)):
        scored(tmp_path, arm, 7, [1e6], steps=steps)
    told = report.write_report(tmp_path)
    assert "flipout ppo CartPole-v1 7, flipout ppo CartPole-v1 9, stock ppo CartPole-v1 7" in told
    (line,) = [line for line in told.splitlines() if line.startswith("| ppo")]
    assert line.startswith("| ppo | CartPole-v1 | 4 | 101.5 [100.")
    assert " | 15.0 [" in line and line.endswith("| 1.00 [1.00, 1.00] |")
    assert line in (tmp_path / "benchmark.md").read_text()
    assert (tmp_path / "benchmark.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_to_compare_is_told(tmp_path: Path) -> None:
    scored(tmp_path, "flipout", 0, [1.0])
    with pytest.raises(SystemExit, match="no task with scores of both arms"):
        report.write_report(tmp_path)


def test_a_run_is_done_while_its_settings_are_the_same(tmp_path: Path) -> None:
    args = benchmark.parsed(["-f", str(tmp_path), "-n", "500"])
    one = benchmark.checked_runs(args)[0]
    assert not benchmark.is_done(one, args)
    path = scored(tmp_path, one.arm, one.seed, [1.0]) / "score.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings": benchmark._settings(one, args)}))
    assert benchmark.is_done(one, args)
    assert not benchmark.is_done(one, benchmark.parsed(["-f", str(tmp_path), "-n", "501"]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--algos pqo", "no configuration for 'pqo'. Did you mean 'ppo'"),
        ("--envs CartPol-v1", "no 'CartPol-v1'. Did you mean 'CartPole-v1'"),
        ("--algos flipes", "flipes.yml has no entry for CartPole-v1"),  # rl_zoo3 has no such file
        ("--algos dqn --envs Pendulum-v1", "dqn.yml has no entry for Pendulum-v1"),
    ],
)
def test_what_there_is_not_is_told_before_training(options: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=match):
        benchmark.main([*options.split(), "-f", str(tmp_path / "logs")])
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("option", ["--seeds", "--eval-episodes", "--jobs"])
def test_counts_must_be_positive(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.parsed([option, "0"])
    assert f"{option} must be 1 or more, got 0" in capsys.readouterr().err


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    args = benchmark.parsed(["-f", str(tmp_path), "-n", "100"])
    before = scored(tmp_path, "flipout", 0, [1.0], "dqn", "Pendulum-v1") / "score.json"
    wrong = benchmark.make(benchmark.Run("dqn", "Pendulum-v1", "flipout", 0), args)
    assert not before.exists()  # of other settings: it is not to stand for these
    assert wrong is not None and "dqn Pendulum-v1 flipout 0: ValueError: Hyperparameters not found" in wrong


@pytest.mark.slow
def test_both_arms_are_trained_scored_and_not_made_again(tmp_path: Path) -> None:
    words = ["benchmark", "--algos", "a2c", "--seeds", "1", "-n", "300", "--eval-episodes", "2", "--jobs", "2", "-f", "logs"]
    first = run(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "0 of 2 runs are done" in first.stdout and "| a2c | CartPole-v1 | 1 |" in first.stdout
    made = benchmark.Run("a2c", "CartPole-v1", "flipout", 0)
    with pytest.raises(RuntimeError, match=r"the training ended after \d+ of 100000 steps, and has no score"):
        benchmark._score(made, made.folder(tmp_path / "logs"), 100_000, 1)
    assert "2 of 2 runs are done" in run(*words, cwd=tmp_path).stdout
    folder = tmp_path / "logs" / "flipout" / "a2c" / "CartPole-v1" / "seed-0" / "a2c" / "CartPole-v1_1" / "CartPole-v1"
    assert "FlipoutMlpPolicy" in (folder / "config.yml").read_text()


@pytest.mark.slow
def test_ctrl_c_leaves_no_score_and_begins_no_other_run(tmp_path: Path) -> None:
    words = ["benchmark", "--algos", "a2c", "--seeds", "3", "-n", "200000", "--eval-episodes", "2", "-f", "logs"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sb3_flipout.zoo", *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, start_new_session=True)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("logs/*/*/*/*/*/*/*.monitor.csv")) and time.monotonic() < until:
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and b"goes on with the runs that are left" in told
    assert not list(tmp_path.glob("logs/**/score.json")) and len(list(tmp_path.glob("logs/*/*/*/seed-*"))) == 1


def train_words(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    seen: list[list[str]] = []
    monkeypatch.setattr(commands.programs, "run", lambda module, name, arguments: seen.append(list(arguments)))
    commands.main(["train", *words])
    return seen[0]


@pytest.mark.parametrize("words", [("--algo", "dqn"), ("--algo=dqn",), ("--alg", "dqn")])
def test_our_configuration_is_taken_however_the_algorithm_is_named(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_words(monkeypatch, *words) == ["--conf-file", str(zoo.config("dqn")), *words]


@pytest.mark.parametrize("words", [("-conf", "my.yml"), ("--conf-file=my.yml",), ("--conf", "my.yml")])
def test_a_users_own_configuration_is_left(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_words(monkeypatch, *words) == list(words)
    assert train_words(monkeypatch)[1] == str(zoo.config("ppo"))  # rl_zoo3's own choice


# ---- the other commands ---------------------------------------------------------------------------------------------


def test_configurations_are_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert zoo.configs().keys() == {path.stem for path in (ROOT / "zoo_configs").glob("*.yml")}
    assert commands.main(["config", "ppo"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == zoo.config("ppo") and "CartPole-v1" in yaml.safe_load(path.read_text())


@pytest.mark.parametrize("ask", [lambda: zoo.config("pop"), lambda: commands.main(["config", "pop"])])
def test_a_configuration_that_there_is_not_is_told(ask: Any) -> None:
    with pytest.raises((ValueError, SystemExit), match=r"algo must be one of .*'pop'. Did you mean 'ppo'"):
        ask()


def test_an_unknown_command_is_told() -> None:
    with pytest.raises(SystemExit, match=r"no command 'trian'. Did you mean 'train'"):
        commands.main(["trian"])


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert [name for name in commands.COMMANDS if f"  {name} " not in told] == []


def test_the_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "rl_zoo3.py").write_text("raise ImportError('no rl_zoo3 here')\n")
    found = run("train", cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert found.returncode == 1 and 'pip install "sb3_flipout[zoo]"' in found.stderr


@pytest.mark.slow
def test_a_video_is_recorded(tmp_path: Path) -> None:
    trained = run("train", "--algo", "a2c", "--env", "CartPole-v1", "-n", "200", "--eval-freq", "-1", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    found = run("record", "--algo", "a2c", "--env", "CartPole-v1", "-f", "logs", "-n", "20", "-o", "videos", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert list((tmp_path / "videos").glob("*.mp4"))


@pytest.mark.slow
def test_the_wheel_holds_the_configurations(tmp_path: Path) -> None:
    built = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(built, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {f"sb3_flipout/zoo/configs/{path.name}" for path in (ROOT / "zoo_configs").glob("*.yml")} <= inside
