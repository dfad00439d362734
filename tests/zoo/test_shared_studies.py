"""Studies that workers share: dead ones' trials are made again, and what is wrong with a storage is told in a line."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from sb3_flipout.zoo import storage as storages
from sb3_flipout.zoo import studies
from sb3_flipout.zoo.space import VERSION, Refused

ROOT = Path(__file__).parents[2]
_QUIET = pytest.mark.filterwarnings("ignore:Heartbeat of storage", "ignore:optuna.storages._heartbeat.fail_stale_trials")


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


@_QUIET
@pytest.mark.parametrize("kind", ["journal", "database"])
def test_a_trial_without_a_sign_of_life_is_made_again(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_FLIPOUT_HEARTBEAT", "1")
    url = str(tmp_path / "study.log") if kind == "journal" else f"sqlite:///{tmp_path}/study.db"
    study = studies.join_study(storages.open_storage(url), "a")
    lost = study.ask()
    lost.suggest_float("x", 0, 1)
    study._storage.record_heartbeat(lost._trial_id)  # type: ignore[attr-defined]
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert states(study) == ["RUNNING", "COMPLETE"]  # nobody takes it for dead at once
    time.sleep(3.2)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[2].params == lost.params
    assert study.trials[2].system_attrs["failed_trial"] == 0


@_QUIET
def test_a_trial_that_is_made_again_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has inherited the signs of its first life."""
    monkeypatch.setenv("SB3_FLIPOUT_HEARTBEAT", "1")
    study = studies.join_study(storages.open_storage(str(tmp_path / "study.log")), "a")
    study.ask()
    study._storage.record_heartbeat(0)  # type: ignore[attr-defined]
    time.sleep(3.2)
    optuna.storages.fail_stale_trials(study)
    again = study.ask()
    assert again.number == 1
    assert study._storage._get_stale_trial_ids(study._study_id) == []  # type: ignore[attr-defined]


@_QUIET
def test_others_are_awaited_and_their_trials_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_FLIPOUT_HEARTBEAT", "1")
    study = studies.join_study(storages.open_storage(str(tmp_path / "study.log")), "a")
    study.ask()
    assert studies.await_others(study, 1) is True  # after two seconds without a sign
    assert states(study) == ["FAIL", "WAITING"]
    study.optimize(lambda _: 1.0, n_trials=1)
    assert studies.await_others(study, 1) is False


@_QUIET
def test_one_given_up_by_others_ends_quietly(tmp_path: Path) -> None:
    storage = storages.open_storage(str(tmp_path / "study.log"))
    study = studies.join_study(storage, "a")
    study.tell(study.ask(), 1.0)
    storage.record_heartbeat(0)  # not a trial that runs
    assert "heartbeat" not in study.trials[0].system_attrs


def test_a_study_of_another_version_is_refused(tmp_path: Path) -> None:
    storage = storages.open_storage(str(tmp_path / "study.log"))
    studies.join_study(storage, "a").set_user_attr(studies._MADE_WITH, VERSION + 1)
    with pytest.raises(ValueError, match=r"'a' was made with version 2 .* this is version 1.*--study-name"):
        studies.join_study(storage, "a")


@pytest.mark.parametrize("came", ["0", "-3", "soon", "1.5"])
def test_heartbeat_must_be_seconds(came: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_FLIPOUT_HEARTBEAT", came)
    with pytest.raises(ValueError, match=f"SB3_FLIPOUT_HEARTBEAT must be a number of seconds, 1 or more, got '{came}'"):
        storages.heartbeat()


def told(url: str) -> str:
    with pytest.raises(Refused) as found:
        storages.open_storage(url)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_database_that_cannot_be_reached_is_told_in_a_line() -> None:
    line = told("postgresql+psycopg://studies:secret@127.0.0.1:1/studies")
    assert "studies:***@127.0.0.1:1/studies cannot be used: connection failed" in line
    assert "secret" not in line


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/a.db", "nonsense://x", "no url", "postgresql://a:b@c:54x/d"])
def test_a_url_that_is_none_is_told_in_a_line(url: str) -> None:
    assert "cannot be used" in told(url) or "needs a driver" in told(url)


def test_a_missing_driver_is_told_in_a_line() -> None:
    assert 'pip install "sb3_flipout[distributed]"' in told("mysql://a@b/c")


def test_a_full_disk_is_told_in_a_line_and_leaves_whole_lines(tmp_path: Path) -> None:
    """What a process may write is limited to little more than what is there already."""
    url = str(tmp_path / "study.log")
    study = studies.join_study(storages.open_storage(url), "a")
    before = Path(url).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(Refused) as found, storages.one_line_errors(url):
            study.set_user_attr("more", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"the study's file {url} cannot be used" in str(found.value) and os.strerror(errno.EFBIG) in str(found.value)
    assert Path(url).read_bytes() == before
    study = studies.load_study(storages.open_storage(url), "a")
    study.set_user_attr("more", 1)
    assert studies.load_study(storages.open_storage(url), "a").user_attrs["more"] == 1


def test_half_a_line_of_a_worker_that_died_is_taken_away(tmp_path: Path) -> None:
    url = str(tmp_path / "study.log")
    studies.join_study(storages.open_storage(url), "a").set_user_attr("one", 1)
    whole = Path(url).read_bytes()
    Path(url).write_bytes(whole + b'{"op_code":5,"worker_id":"0')
    study = studies.load_study(storages.open_storage(url), "a")
    assert study.user_attrs["one"] == 1 and Path(url).read_bytes() == whole


def test_errors_of_the_training_are_its_own() -> None:
    for error in (ImportError("No module named 'mujoco'"), OSError("no such file")):
        with pytest.raises(type(error)), storages.one_line_errors(None):
            raise error


def test_a_study_that_there_is_not_is_told(tmp_path: Path) -> None:
    storage = storages.open_storage(str(tmp_path / "study.log"))
    studies.join_study(storage, "cartpole")
    with pytest.raises(Refused, match=r"no study 'cartpol' .*Did you mean 'cartpole'"):
        studies.load_study(storage, "cartpol")


# ---- two workers, one of which dies ---------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[str]:
    script = ["sh", str(ROOT / "examples" / "study_database.sh")]
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are for one user, and the server can be another's
        Path(folder).chmod(0o755)
        started = subprocess.run([*script, "start", f"{folder}/server", "5499"], capture_output=True, text=True)
        assert started.returncode == 0, started.stderr
        yield started.stdout.strip()
        subprocess.run([*script, "stop", f"{folder}/server"], check=True, capture_output=True)


def worker(url: str, steps: int, seed: int, folder: Path) -> subprocess.Popen[Any]:
    command = f"train --algo a2c --env CartPole-v1 -n {steps} -optimize --max-total-trials 8 --sampler random"
    options = f"--storage {url} --study-name shared --n-evaluations 1 --eval-episodes 1 --no-optim-plots --seed {seed}"
    env = {**os.environ, "SB3_FLIPOUT_HEARTBEAT": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "sb3_flipout.zoo", *command.split(), *options.split()]
    with (folder / f"worker{seed}.log").open("w") as log:
        return subprocess.Popen(words, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["database", "journal"])
def test_two_workers_finish_a_study_though_one_is_killed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The first is in a trial of hours when it is killed; the second makes that trial again, and seven of its own."""
    url = request.getfixturevalue("server") if kind == "database" else str(tmp_path / "study.log")
    first = worker(url, 100_000_000, 1, tmp_path)
    storage = None
    until = time.monotonic() + 120
    while time.monotonic() < until:
        time.sleep(1)
        if kind == "database" or Path(url).exists():
            storage = storage or storages.open_storage(url)
            known = optuna.get_all_study_names(storage)
            if known and states(optuna.load_study(storage=storage, study_name="shared")) == ["RUNNING"]:
                break
    second = worker(url, 300, 2, tmp_path)
    time.sleep(15)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=400) == 0, (tmp_path / "worker2.log").read_text()[-3000:]
    study = optuna.load_study(storage=storage, study_name="shared")
    found = states(study)
    assert found.count("COMPLETE") + found.count("PRUNED") == 8 and found.count("COMPLETE") >= 7
    assert found[0] == "FAIL" and "RUNNING" not in found
    (again,) = (trial for trial in study.trials if trial.system_attrs.get("failed_trial") == 0)
    assert again.params == study.trials[0].params and again.state == TrialState.COMPLETE
    assert len(study.trials_dataframe()) == 9  # the table is whole
    if kind == "database":
        storage.engine.dispose()
