"""Checks of what users give: each names the argument, what came, what is allowed, and the remedy.

Settings come from Python, YAML, command lines and numpy, and they are saved with the model. So what passes a check is a plain
Python value, whatever it came as.
"""

from __future__ import annotations

import difflib
import math
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

# Packages whose lines can lie between a user's line and a warning of ours.
_NOT_THE_USERS = ("sb3_flipout", "stable_baselines3", "sb3_contrib", "torch", "contextlib")


def warn_user(message: str) -> None:
    """
    Warn, and point to the line of the user's that led here, however many of SB3's and ours lie between.

    :param message: What is to be said
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_once(warned: set[str], what: str, message: str) -> None:
    """
    Warn, if that has not been said yet.

    :param warned: What has been
    :param what: What this is about, in a word
    :param message: What is to be said
    """
    if what not in warned:
        warned.add(what)
        warn_user(message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """
    Suggest the known name that is nearest to an unknown one; of equally near ones the first.

    :param name: What came
    :param known: Names that exist
    :return: `` Did you mean 'x'?`` with a leading space; empty where nothing is near
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=max(1, len(names)))
    if not near:
        return ""
    nearest = min(near, key=lambda one: (-difflib.SequenceMatcher(None, one, name).ratio(), names.index(one)))
    return f" Did you mean {nearest!r}?"


def check_choice(name: str, value: Any, allowed: Collection[str], hint: str = "") -> str:
    """
    Refuse a value that is not one of the allowed words.

    :param name: Name of the argument
    :param value: What came
    :param allowed: The words
    :param hint: What to do instead, if it needs saying; a sentence
    :return: The word, as a plain ``str``
    :raises ValueError: If it is none of them
    """
    if isinstance(value, str) and value in allowed:
        return str(value)
    near = did_you_mean(value, allowed) if isinstance(value, str) else ""
    words = ", ".join(f'"{word}"' for word in allowed)
    raise ValueError(f"{name} must be one of {words}, got {value!r}.{near}{_sentence(hint)}")


def check_flag(name: str, value: Any) -> bool:
    """
    Refuse what is no boolean: ``"False"`` and 0 are none.

    :param name: Name of the argument
    :param value: What came; numpy's booleans are taken too
    :return: The flag, as a plain ``bool``
    :raises TypeError: If it is none
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{name} must be True or False, got {value!r} of type {type(value).__name__}; pass {name}=True or =False."
        )
    return bool(value)


def check_number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, hint: str = "", above: bool = False
) -> float:
    """
    Refuse what is no finite number in a range.

    :param name: Name of the argument
    :param value: What came; numpy's numbers are taken too
    :param low: Least value
    :param high: Largest value
    :param hint: What to do instead, if it needs saying; a sentence
    :param above: Whether the least value itself is refused
    :return: The number, as a plain ``float``
    :raises TypeError: If it is no number
    :raises ValueError: If it is not finite or out of range
    """
    bounds = f"{'>' if above else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {bounds}, got {value!r} of type {type(value).__name__}.{_sentence(hint)}")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high and not (above and number == low)):
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}.{_sentence(hint)}")
    return number


def check_integer(name: str, value: Any, low: int | None = None, high: int | None = None, hint: str = "") -> int:
    """
    Refuse what is no whole number in a range.

    :param name: Name of the argument
    :param value: What came; numpy's integers are taken too
    :param low: Least value; ``None`` for no limit
    :param high: Largest value; ``None`` for no limit
    :param hint: What to do instead, if it needs saying; a sentence
    :return: The number, as a plain ``int``
    :raises TypeError: If it is no integer
    :raises ValueError: If it is out of range
    """
    if high is not None:
        allowed = f"an integer in [{low}, {high}]"
    else:
        allowed = "an integer" if low is None else f"an integer >= {low}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}.{_sentence(hint)}")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {allowed}, got {number}.{_sentence(hint)}")
    return number


def check_strings(name: str, value: Any) -> tuple[str, ...]:
    """
    Refuse what is neither a string nor a list of strings.

    :param name: Name of the argument
    :param value: What came; one string stands for a list of one
    :return: The strings, plain ``str`` each
    :raises TypeError: If it is neither
    """
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, (Sequence, np.ndarray)) or not all(isinstance(item, str) for item in strings):
        raise TypeError(
            f"{name} must be a string or a list of strings, got {value!r} of type {type(value).__name__}. "
            f"Leave {name} out for none."
        )
    return tuple(str(item) for item in strings)


def check_names(given: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """
    Refuse keyword arguments that do not exist.

    :param given: Keyword arguments by name
    :param known: Names that exist
    :param what: What they are called in the message
    :raises TypeError: If a name is unknown
    """
    for name in given:
        if name not in known:
            raise TypeError(f"unknown {what} {name!r}; allowed are {', '.join(known)}.{did_you_mean(name, known)}")


def _sentence(hint: str) -> str:
    return f" {hint}" if hint else ""
