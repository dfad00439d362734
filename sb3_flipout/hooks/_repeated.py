"""Each sampled transition learned under several keys: the replay buffer gives fewer transitions, each of them repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

from sb3_flipout.policies.base import FlipoutPolicyMixin


def _keys_per_transition(policy: FlipoutPolicyMixin) -> int:
    return int(getattr(policy.noise_settings, "keys_per_transition", 1))


def check_batch_size(algorithm: Any, policy: FlipoutPolicyMixin) -> None:
    """
    Look, before training, whether the batch can be made of repeated transitions.

    :param algorithm: Algorithm
    :param policy: Its policy
    :raises ValueError: If the batch size is no multiple of ``keys_per_transition``
    """
    times = _keys_per_transition(policy)
    if times > 1:
        _check_divides(algorithm.batch_size, times)


def _check_divides(batch_size: int, times: int) -> None:
    if batch_size % times:
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of keys_per_transition={times}: a batch holds each of its "
            f"transitions {times} times. Use batch_size={max(1, round(batch_size / times)) * times}, say."
        )


@contextmanager
def repeated_samples(algorithm: Any, policy: FlipoutPolicyMixin) -> Iterator[None]:
    """
    Let the replay buffer fill its batches with repeated transitions while SB3 trains.

    :param algorithm: Algorithm
    :param policy: Its policy, whose setting ``keys_per_transition`` says how often
    :return: Context manager
    """
    times = _keys_per_transition(policy)
    if times == 1:
        yield
        return
    buffer = algorithm.replay_buffer
    sample, own = buffer.sample, vars(buffer).get("sample")  # a user can have put one on the buffer itself

    def fewer(batch_size: int, *args: Any, **kwargs: Any) -> Any:
        _check_divides(batch_size, times)  # `train` can be called with another one
        return repeat_rows(sample(batch_size // times, *args, **kwargs), times)

    buffer.sample = fewer
    try:
        yield
    finally:
        if own is None:
            del buffer.sample  # the class's own is under it
        else:
            buffer.sample = own


def repeat_rows(samples: Any, times: int) -> Any:
    """
    Repeat each row of a batch, one copy after the other: row n comes from row n // times.

    :param samples: Tensor, or a dictionary, named tuple or dataclass of tensors; what is none stays
    :param times: How often
    :return: The same with ``times`` as many rows
    """
    if isinstance(samples, th.Tensor):
        return samples.repeat_interleave(times, dim=0)
    if isinstance(samples, dict):
        return {name: repeat_rows(part, times) for name, part in samples.items()}
    if hasattr(samples, "_replace"):
        return samples._replace(**{name: repeat_rows(part, times) for name, part in samples._asdict().items()})
    if dataclasses.is_dataclass(samples) and not isinstance(samples, type):
        parts = {field.name: getattr(samples, field.name) for field in dataclasses.fields(samples)}
        return dataclasses.replace(samples, **{name: repeat_rows(part, times) for name, part in parts.items()})
    return samples
