"""Storages of studies that several machines share, in which a worker that died is noticed."""

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
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from sb3_flipout.zoo.space import Refused

#: Seconds between two signs of life of a running trial. One that gave none for twice as long is made again by others.
HEARTBEAT = 60
_RETRIES = 3
_LONGEST = 1 << 20  # bytes of a line of a journal

OnStale = Callable[[optuna.Study, FrozenTrial], None]


def heartbeat() -> int:
    """
    Look up how often a running trial gives a sign of life.

    :return: Seconds: those of the environment variable ``SB3_FLIPOUT_HEARTBEAT``, or ``HEARTBEAT``
    :raises Refused: If the variable holds no positive integer
    """
    came = os.environ.get("SB3_FLIPOUT_HEARTBEAT", str(HEARTBEAT))
    if not came.isdecimal() or int(came) < 1:
        raise Refused(f"SB3_FLIPOUT_HEARTBEAT must be a number of seconds, 1 or more, got {came!r}; leave it out for 60.")
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


class StudyFileError(RuntimeError):
    """A journal cannot be read or written."""


class _MendingLock(BaseJournalFileLock):
    """Optuna's lock; whoever has it takes away a last line of which only a part is there, since its writer died or failed."""

    def __init__(self, path: str) -> None:
        self._lock, self._path = JournalFileSymlinkLock(path), path

    def acquire(self) -> bool:
        got = self._lock.acquire()
        self._mend()
        return got

    def release(self) -> None:
        self._mend()
        self._lock.release()

    def _mend(self) -> None:
        with open(self._path, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            back = min(end, _LONGEST)
            file.seek(end - back)
            whole = file.read().rfind(b"\n") + 1
            if whole < back:
                file.truncate(end - back + whole)


class _JournalFile(JournalFileBackend):
    """Optuna's file, of which each line is whole."""

    def __init__(self, path: str) -> None:
        super().__init__(path, lock_obj=_MendingLock(path))
        self._lock.acquire()
        self._lock.release()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise StudyFileError(f"{self._file_path} cannot be written to: {error}") from error


class Journal(JournalStorage, BaseHeartbeat):
    """
    Optuna's journal file, in which trials give signs of life as in a database.

    :param path: The file, on a disk that all workers share
    """

    endswith = Database.endswith

    def __init__(self, path: str) -> None:
        self._interval = heartbeat()
        super().__init__(_JournalFile(path))

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


def open_storage(storage: Any) -> Any:
    """
    Open the storage of a study.

    :param storage: What rl_zoo3's ``--storage`` takes: a file that ends in ``.log``, or the URL of a database; ``None`` for
        memory. What is open is handed back
    :return: Optuna's storage
    :raises Refused: If it cannot be opened, in one line
    """
    if not isinstance(storage, str):
        return storage
    try:
        if not storage.endswith(".log"):
            return Database(storage)
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return Journal(storage)
    except ImportError as error:
        raise Refused(
            f'the study\'s database {_shown(storage)} needs a driver; pip install "sb3_flipout[distributed]" brings that of '
            f"PostgreSQL ({error})."
        ) from error
    except (ValueError, SQLAlchemyError, StorageInternalError) as error:
        raise Refused(f"the study's database {_shown(storage)} cannot be used: {_cause(error)}") from error
    except OSError as error:
        raise Refused(f"the study's file {storage} cannot be used: {error}") from error


@contextmanager
def one_line_errors(storage: Any) -> Iterator[None]:
    """
    Tell in one line what goes wrong with a storage while it is used; what goes wrong with a training is no matter of this.

    :param storage: What the user gave
    :return: Context manager
    :raises Refused: If the storage cannot be reached, or written to
    """
    try:
        yield
    except Exception as error:
        found = next((one for one in _chain(error) if isinstance(one, (SQLAlchemyError, StudyFileError))), None)
        if found is None:
            raise
        what = "file" if isinstance(found, StudyFileError) else "database"
        raise Refused(f"the study's {what} {_shown(storage)} cannot be used: {_cause(found)}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _shown(storage: Any) -> str:
    url = storage if isinstance(storage, str) else str(getattr(storage, "url", storage))
    try:
        return make_url(url).render_as_string(hide_password=True)
    except (ArgumentError, ValueError):
        return url.rsplit("@", 1)[-1]  # what stands before may be a password


def _cause(error: BaseException) -> str:
    """The first line of what the driver said, which stands at the bottom of the chain."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    original = getattr(error, "orig", None) or error
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    return lines[0] if lines else type(original).__name__
