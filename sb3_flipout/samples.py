"""Batches that buffers give: named tuples as SB3's, or dataclasses and other objects of users' own."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch as th


def with_parts(samples: Any, **parts: Any) -> Any:
    """
    Put other parts into a batch.

    :param samples: Batch: a named tuple, a dataclass, or another object with attributes
    :param parts: What to put in, by name
    :return: Another batch with these parts and the others of the given one
    """
    if hasattr(samples, "_replace"):
        return samples._replace(**parts)
    if dataclasses.is_dataclass(samples) and not isinstance(samples, type):
        return _replaced(samples, parts)
    samples = copy.copy(samples)
    for name, part in parts.items():
        setattr(samples, name, part)
    return samples


def _replaced(samples: Any, parts: dict[str, Any]) -> Any:
    """The same of a dataclass, whose constructor does not take fields that it makes itself, or that were filled in later."""
    own = {field.name for field in dataclasses.fields(samples) if not field.init}
    found = dataclasses.replace(samples, **{name: part for name, part in parts.items() if name not in own})
    for name in own:
        before = getattr(samples, name, None)
        part = parts.get(name, before)
        if part is not before or not hasattr(found, name):  # else what it has made of the other parts is right
            object.__setattr__(found, name, part)
    return found


def repeat_rows(samples: Any, times: int, rows: int) -> Any:
    """
    Repeat each row of a batch, one copy after the other: row n comes from row n // times.

    :param samples: Tensor, array or list, or a dictionary, named tuple, dataclass or batch of them; what is none stays
    :param times: How often
    :param rows: Rows of the batch; what has not as many, such as the atoms of a distribution, stays
    :return: The same with ``times`` as many rows; what was given is left as it was
    """
    if isinstance(samples, th.Tensor):
        return samples.repeat_interleave(times, dim=0) if samples.dim() and len(samples) == rows else samples
    if isinstance(samples, np.ndarray):  # which transitions were sampled, say, whose priorities are to be set
        return samples.repeat(times, axis=0) if samples.ndim and len(samples) == rows else samples
    if isinstance(samples, dict):
        return {name: repeat_rows(part, times, rows) for name, part in samples.items()}
    if type(samples) in (list, tuple):
        return _repeated_list(samples, times, rows)
    if hasattr(samples, "_asdict"):
        names = list(samples._asdict())
    elif dataclasses.is_dataclass(samples) and not isinstance(samples, type):
        names = [field.name for field in dataclasses.fields(samples)]
    elif hasattr(samples, "observations") and hasattr(samples, "__dict__"):  # a batch of a user's own
        names = list(vars(samples))
    else:
        return samples
    return with_parts(samples, **{name: repeat_rows(getattr(samples, name), times, rows) for name in names})


def _repeated_list(listed: Any, times: int, rows: int) -> Any:
    """One thing of each row, such as its index; or several parts of a batch, each with all rows."""
    if any(_has_rows(part, rows) for part in listed):
        return type(listed)(repeat_rows(part, times, rows) for part in listed)
    return type(listed)(part for part in listed for _ in range(times)) if len(listed) == rows else listed


def _has_rows(part: Any, rows: int) -> bool:
    if isinstance(part, dict):
        return any(_has_rows(value, rows) for value in part.values())
    return isinstance(part, th.Tensor | np.ndarray) and part.ndim > 0 and len(part) == rows
