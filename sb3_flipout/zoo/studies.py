"""Optuna studies that several workers share: what they agree on, and how they end together."""

from __future__ import annotations

import time
import warnings
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import TrialState

from sb3_flipout.checks import did_you_mean
from sb3_flipout.zoo.space import VERSION, Refused
from sb3_flipout.zoo.storage import heartbeat

_MADE_WITH = "sb3_flipout_search_space"
_OVER = (TrialState.COMPLETE, TrialState.PRUNED)


def join_study(storage: Any, name: str) -> optuna.Study:
    """
    Join a study, or begin it.

    :param storage: Optuna's storage
    :param name: Name of the study
    :return: The study
    :raises Refused: If its trials have another search space than this version
    """
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, direction="maximize")
    check_version(study)
    if _MADE_WITH not in study.user_attrs:
        study.set_user_attr(_MADE_WITH, VERSION)
    return study


def load_study(storage: Any, name: str) -> optuna.Study:
    """
    Load a study that there is.

    :param storage: Optuna's storage
    :param name: Name of the study
    :return: The study
    :raises Refused: If there is none of the name, or it has another search space than this version
    """
    known = optuna.get_all_study_names(storage)
    if name not in known:
        raise Refused(f"there is no study {name!r} in that storage.{did_you_mean(name, known)}")
    study = optuna.load_study(storage=storage, study_name=name)
    check_version(study)
    return study


def check_version(study: optuna.Study) -> None:
    """
    Refuse a study of another search space.

    :param study: Study
    :raises Refused: If its trials have another search space than this version
    """
    made_with = study.user_attrs.get(_MADE_WITH, VERSION)
    if made_with != VERSION:
        raise Refused(
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
