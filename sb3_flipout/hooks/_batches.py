"""What members need of the batches that a replay buffer gives: repeated, numbered, and with rewards of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch as th

from sb3_flipout.checks import warn_user
from sb3_flipout.noise import Stream, fold
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.observations import n_rows
from sb3_flipout.replay_buffers import asked_of, number_transitions, numbers_of
from sb3_flipout.samples import repeat_rows, with_parts


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


def number_stored(algorithm: Any, policy: FlipoutPolicyMixin) -> None:
    """
    Let the replay buffer number its transitions by the policy's present seed, where members draw something for each; say so if
    some had no number.

    :param algorithm: Algorithm
    :param policy: Its policy
    :raises TypeError: If the buffer cannot be given numbers
    """
    bootstrap = _bootstrap(policy)
    if bootstrap is None:
        return
    without = number_transitions(algorithm.replay_buffer, fold(policy._noise_seed, Stream.TRANSITIONS))
    if without:
        warn_user(
            f"the replay buffer held {without} transitions without the numbers that bootstrap and reward_noise need: they "
            "were stored without these settings. They have been given numbers now.",
        )


def _bootstrap(policy: Any) -> Any:
    found = getattr(getattr(policy, "learning", None), "bootstrap", None)
    return found if found is not None and found.needs_numbers else None


@contextmanager
def batches_for_members(algorithm: Any, policy: FlipoutPolicyMixin) -> Iterator[None]:
    """
    Let the replay buffer give what members learn from while SB3 trains.

    :param algorithm: Algorithm
    :param policy: Its policy, whose settings say what that is
    :return: Context manager
    """
    times, bootstrap = _keys_per_transition(policy), _bootstrap(policy)
    buffer: Any = getattr(algorithm, "replay_buffer", None)
    # Members alone need nothing of a buffer: it is listened to where it can be.
    if times == 1 and bootstrap is None and (policy.members is None or not _can_be_heard(buffer)):
        yield
        return
    number_stored(algorithm, policy)
    sample, own = buffer.sample, vars(buffer).get("sample")  # a user can have put one on the buffer itself
    first = next(iter(signature(asked_of(buffer)).parameters.values()), None) if times > 1 else None
    inside = False

    def for_members(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # a buffer that asks itself once more, for a batch that it likes better
            return sample(*args, **kwargs)
        inside = True
        try:
            given = sample(*_share(first, args, kwargs, times), **kwargs) if times > 1 else sample(*args, **kwargs)
        finally:
            inside = False
        if given is None:  # not yet, as a buffer of the user's may say
            return None
        samples = _repeated(given, times) if times > 1 else given
        return _noted(policy, samples, None if bootstrap is None else _numbers(given).repeat_interleave(times))

    buffer.sample = for_members
    try:
        yield
    finally:
        _learning(policy).batches.clear()
        if own is None:
            del buffer.sample  # the class's own is under it
        else:
            buffer.sample = own


def _can_be_heard(buffer: Any) -> bool:
    """Whether a buffer of whatever kind has a `sample` that another can be put before."""
    return hasattr(buffer, "sample") and hasattr(buffer, "__dict__")


def _share(first: Parameter | None, args: tuple[Any, ...], named: dict[str, Any], times: int) -> tuple[Any, ...]:
    """Positional arguments of `sample`: the first is the size of the batch, divided, and taken out of the named ones."""
    name, default = ("batch_size", Parameter.empty) if first is None else (first.name, first.default)
    size = args[0] if args else named.pop(name, default)
    if not isinstance(size, int | np.integer):
        raise TypeError(
            f"keys_per_transition={times} divides the size of the batch, which must be the first argument of the replay "
            f"buffer's sample, got {'none' if size is Parameter.empty else repr(size)}. Say replay_buffer.sample(batch_size)."
        )
    _check_divides(int(size), times)  # `train` can be called with another one
    return (int(size) // times, *args[1:])


def _repeated(given: Any, times: int) -> Any:
    """Each transition for its members; a batch that cannot be told how to repeat would be learned from as another."""
    obs = getattr(given, "observations", None)
    samples = repeat_rows(given, times, n_rows(obs) if isinstance(obs, th.Tensor | dict) else 0)
    for name in ("observations", "next_observations", "actions", "rewards", "dones"):
        before, after = (getattr(batch, name, None) for batch in (given, samples))
        if before is None or after is None or n_rows(after) != times * n_rows(before):
            raise TypeError(
                f"keys_per_transition={times} repeats each transition of a batch, and {name} of what the replay buffer gives "
                f"({type(given).__name__}) cannot be repeated. Give tensors in a named tuple, a dataclass, or an object that "
                "holds them as attributes, as ReplayBufferSamples of stable_baselines3 does; or leave keys_per_transition out."
            )
    return samples


def _numbers(samples: Any) -> th.Tensor:
    numbers = numbers_of(samples)
    if numbers is None:
        raise TypeError(
            "a sample of the replay buffer carries no numbers of its transitions, which bootstrap and reward_noise need: what "
            "was put in place of its `sample` makes the actions anew. Hand on the actions that `sample` of the class gives."
        )
    return numbers


def _noted(policy: Any, samples: Any, numbers: th.Tensor | None) -> Any:
    """The batch with the rewards of its rows' members; it is noted, so that networks know it again."""
    learning = _learning(policy)
    if numbers is not None:
        samples = with_parts(samples, rewards=learning.noise_on_rewards(samples.rewards, numbers))
    learning.note(samples, numbers)
    return samples


def _learning(policy: Any) -> Any:
    return policy.learning
