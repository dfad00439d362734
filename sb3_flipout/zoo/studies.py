"""Optuna studies that several machines share: storages in which a worker that died is noticed, and its trial made again."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from sb3_flipout.zoo.space import VERSION

#: Seconds between two signs of life of a running trial. One that gave none for twice as long is made again by others.
HEARTBEAT = 60
_RETRIES = 3
_MADE_WITH = "sb3_flipout_search_space"

OnStale = Callable[[optuna.Study, FrozenTrial], None]


def heartbeat() -> int:
    """
    Look up how often a running trial gives a sign of life.

    :return: Seconds: those of the environment variable ``SB3_FLIPOUT_HEARTBEAT``, or ``HEARTBEAT``
    :raises ValueError: If the variable holds no positive integer
    """
    came = os.environ.get("SB3_FLIPOUT_HEARTBEAT", str(HEARTBEAT))
    if not came.isdecimal() or int(came) < 1:
        raise ValueError(f"SB3_FLIPOUT_HEARTBEAT must be a number of seconds, 1 or more, got {came!r}; leave it out for 60.")
    return int(came)


def _retry() -> OnStale:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES)


class Database(RDBStorage):
    """
    A database in which trials give signs of life.

    :param url: Where it is, as SQLAlchemy has it: ``postgresql://user:password@host/name``
    """

    def __init__(self, url: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            super().__init__(
                url,
                engine_kwargs=dict(pool_pre_ping=True) if "sqlite" not in url else None,  # a connection can have been cut
                heartbeat_interval=heartbeat(),
                heartbeat_stale_trial_callback=_retry(),
            )

    def endswith(self, end: str) -> bool:
        """
        Say no: rl_zoo3 asks storages, which are texts to it, whether they are files.

        :param end: Ending of a file's name
        :return: ``False``
        """
        return False


class Journal(JournalStorage, BaseHeartbeat):
    """
    Optuna's journal file, in which trials give signs of life as in a database.

    :param path: The file, on a disk that all workers share
    """

    endswith = Database.endswith

    def __init__(self, path: str) -> None:
        self._interval = heartbeat()
        super().__init__(JournalFileBackend(path))

    def record_heartbeat(self, trial_id: int) -> None:
        """
        Give a sign of life.

        :param trial_id: Trial that is running
        """
        try:
            self.set_trial_system_attr(trial_id, "heartbeat", time.time())
        except UpdateFinishedTrialError:  # others took it for dead
            return

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        oldest = time.time() - 2 * self._interval
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        return [trial._trial_id for trial in running if _last_sign(trial) < oldest]

    def get_heartbeat_interval(self) -> int:
        """
        Look up how often a running trial gives a sign of life.

        :return: Seconds
        """
        return self._interval

    def get_heartbeat_stale_trial_callback(self) -> OnStale:
        """
        Look up what is done with a trial whose worker died.

        :return: Puts it into the queue again, three times at most
        """
        return _retry()


def _last_sign(trial: FrozenTrial) -> float:
    # A trial that is made again has inherited the signs of its first life.
    begun = trial.datetime_start or datetime.now()
    return max(begun.timestamp(), float(trial.system_attrs.get("heartbeat", 0.0)))


def opened(storage: Any) -> Any:
    """
    Open the storage of a study.

    :param storage: What rl_zoo3's ``--storage`` takes: a file that ends in ``.log``, or the URL of a database; ``None`` for
        memory. What is open is handed back
    :return: Optuna's storage
    """
    if not isinstance(storage, str):
        return storage
    if not storage.endswith(".log"):
        return Database(storage)
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    return Journal(storage)


@contextmanager
def told(storage: Any) -> Iterator[None]:
    """
    Tell in one line what is wrong with a storage.

    :param storage: What the user gave
    :return: Context manager
    :raises SystemExit: If it cannot be reached, or written to
    """
    try:
        yield
    except (SQLAlchemyError, StorageInternalError) as error:
        raise SystemExit(f"the study's database {_shown(storage)} cannot be used: {_cause(error)}") from error
    except ImportError as error:
        raise SystemExit(
            f'the study\'s database {_shown(storage)} needs a driver; pip install "sb3_flipout[distributed]" brings that of '
            f"PostgreSQL ({error})."
        ) from error
    except OSError as error:
        if not isinstance(storage, str) or not storage.endswith(".log"):
            raise
        raise SystemExit(f"the study's file {storage} cannot be used: {error}") from error


def _shown(storage: Any) -> str:
    url = storage if isinstance(storage, str) else str(getattr(storage, "url", storage))
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return repr(url)


def _cause(error: BaseException) -> str:
    """The first line of what the driver said, which stands at the bottom of the chain."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    original = getattr(error, "orig", None) or error
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    return lines[0] if lines else type(original).__name__


def joined(storage: Any, name: str) -> optuna.Study:
    """
    Join a study, or begin it.

    :param storage: Optuna's storage
    :param name: Name of the study
    :return: The study
    :raises ValueError: If its trials have another search space than this version
    """
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction="maximize")
    check_version(study)
    if _MADE_WITH not in study.user_attrs:
        study.set_user_attr(_MADE_WITH, VERSION)
    return study


def check_version(study: optuna.Study) -> None:
    """
    Refuse a study of another search space.

    :param study: Study
    :raises ValueError: If its trials have another search space than this version
    """
    made_with = study.user_attrs.get(_MADE_WITH, VERSION)
    if made_with != VERSION:
        raise ValueError(
            f"the study {study.study_name!r} was made with version {made_with} of sb3_flipout's search space, this is version "
            f"{VERSION}: their trials cannot be compared. Start another by --study-name, or install the one it was made with."
        )


def await_others(study: optuna.Study, total: int) -> bool:
    """
    Wait until a study is complete, or there is something left to do: a trial of a worker that died.

    :param study: Study
    :param total: Number of trials that are wanted
    :return: Whether there is something left
    """
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        over, running = (sum(state in some for state in states) for some in (_OVER, (TrialState.RUNNING,)))
        if over >= total or over + running < total:
            return over < total
        print(f"{over} of {total} trials are over; waiting for {running} of other workers.", flush=True)
        time.sleep(max(1, heartbeat() // 2))


_OVER = (TrialState.COMPLETE, TrialState.PRUNED)
