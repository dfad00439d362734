"""The batches that a replay buffer gives in updates: gradient steps are told by them, and they are changed for members."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from threading import RLock
from typing import Any

import numpy as np
import torch as th

from sb3_flipout.checks import warn_user
from sb3_flipout.noise import Stream, fold
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.learning_noise import LearningNoise, learning_of
from sb3_flipout.policies.observations import n_rows
from sb3_flipout.replay_buffers import asked_of, number_transitions, numbers_of
from sb3_flipout.samples import repeat_rows, with_parts


def check_batch_size(algorithm: Any, policy: FlipoutPolicyMixin) -> None:
    """
    Look, before training, whether the batch can be made of repeated transitions.

    :param algorithm: Algorithm
    :param policy: Its policy
    :raises ValueError: If the batch size is no multiple of ``keys_per_transition``
    """
    learning = learning_of(policy)
    if learning is not None and learning.keys_per_transition > 1:
        _check_divides(algorithm.batch_size, learning.keys_per_transition)


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
    learning = learning_of(policy)
    if learning is None or not learning.member_data.needs_numbers:
        return
    without = number_transitions(algorithm.replay_buffer, fold(policy._noise_seed, Stream.TRANSITIONS))
    if without:
        warn_user(
            f"the replay buffer held {without} transitions without the numbers that bootstrap and reward_noise need: they "
            "were stored without these settings. They have been given numbers now.",
        )


@contextmanager
def batches_of_update(algorithm: Any, policy: FlipoutPolicyMixin) -> Iterator[None]:
    """
    Listen to the replay buffer while SB3 trains, and let it give what members learn from. Where mean weights learn it gives
    what it always does.

    :param algorithm: Algorithm
    :param policy: Its policy, whose settings say what members learn from
    :return: Context manager
    :raises TypeError: If members need something of a buffer that has no ``sample``
    """
    learning = learning_of(policy)
    buffer: Any = getattr(algorithm, "replay_buffer", None)
    if learning is None or not learning.active:
        yield
        return
    number_stored(algorithm, policy)
    if not _can_be_heard(buffer):
        if learning.keys_per_transition > 1:
            raise TypeError(
                f"keys_per_transition={learning.keys_per_transition} needs batches of the model's replay_buffer, and "
                f"{'None' if buffer is None else type(buffer).__name__} has no `sample` that can be listened to. Give a "
                "replay buffer of SB3's or one that derives from it, or leave keys_per_transition out."
            )
        yield  # others need nothing of it
        return
    batches = _HeardBatches(buffer, learning)
    buffer.sample = batches
    try:
        yield
    finally:
        batches.leave()


def _can_be_heard(buffer: Any) -> bool:
    """Whether another `sample` can stand on a buffer, of whatever kind: it has room for one, and its own is no property."""
    return (
        hasattr(buffer, "sample")
        and hasattr(buffer, "__dict__")
        and not hasattr(getattr(type(buffer), "sample", 0), "__set__")
    )


class _HeardBatches:
    """
    Stands in the place of a replay buffer's ``sample``, on the buffer itself, while a policy learns from it.

    :param buffer: Replay buffer
    :param learning: The noise that it learns under
    """

    def __init__(self, buffer: Any, learning: LearningNoise) -> None:
        self.buffer, self.learning = buffer, learning
        # A user can have put one on the buffer; and a model can train inside another's `train`, on the same buffer.
        self.own = vars(buffer).get("sample")
        self.sample: Any = self.own.sample if isinstance(self.own, _HeardBatches) else buffer.sample
        self.asks = False  # whether `sample` is running
        self.one_at_a_time = RLock()  # a user may fetch batches ahead, in other threads
        times = learning.keys_per_transition
        self.size = _SizeOfBatch(asked_of(buffer, self.sample), times) if times > 1 else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Sample transitions, for members.

        :param args: What the buffer's own ``sample`` takes
        :param kwargs: The same by name
        :return: What it gives, made for members
        """
        with self.one_at_a_time:
            return self._sampled(args, kwargs)

    def _sampled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # A buffer may ask itself once more, for a batch that it likes better; and a user may keep its `sample`, for later.
        if self.asks or self.learning.unseen is None:
            return self.sample(*args, **kwargs)
        self.learning.unseen.at_batch()
        if self.size is not None:
            args, kwargs = self.size.divided(args, kwargs)
        self.asks = True
        try:
            given = self.sample(*args, **kwargs)
        finally:
            self.asks = False
        if given is None or self.learning.settings.members is None:  # None: not yet, as a buffer of the user's may say
            return given
        return self._for_members(given)

    def _for_members(self, given: Any) -> Any:
        """Each transition once for each of its members, with the rewards of that member; networks know the batch again."""
        learning, times = self.learning, self.learning.keys_per_transition
        samples = _repeated(given, times) if times > 1 else given
        numbers = None
        if learning.member_data.needs_numbers:
            numbers = _numbers(given).repeat_interleave(times)
            if learning.member_data.reward_noise > 0:
                samples = with_parts(samples, rewards=learning.perturbed_rewards(_rewards(samples), numbers))
        learning.batches.note(samples, learning.step, numbers)
        return samples

    def leave(self) -> None:
        """Put the buffer's own ``sample`` back, and let go of batches that nobody holds."""
        self.learning.batches.let_go()
        vars(self.buffer).pop("sample", None)  # the class's own is under it
        if self.own is not None:
            self.buffer.sample = self.own

    def __reduce__(self) -> Any:
        """
        Have in copies of the buffer, and in files, that are made while SB3 trains, what they would have at other times.

        :return: How to make it again
        """
        return (getattr, (self.buffer, "sample")) if self.own is None else (_itself, (self.own,))


def _itself(given: Any) -> Any:
    return given


class _SizeOfBatch:
    """
    The argument of a buffer's ``sample`` that says how many: the one that is called ``batch_size``, else the first.

    :param sample: What is asked for a batch
    :param times: By how much it is divided
    """

    def __init__(self, sample: Any, times: int) -> None:
        parameters = signature(sample).parameters
        by_place = [
            one for one in parameters.values() if one.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        ]
        found = parameters.get("batch_size") or next(iter(by_place), None)
        self.times = times
        self.name = "batch_size" if found is None else found.name
        self.default: Any = Parameter.empty if found is None else found.default
        # It comes first where `sample` takes whatever comes, and has no place where it takes it by name alone.
        self.place = 0 if found is None else by_place.index(found) if found in by_place else -1

    def divided(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """
        Ask for a batch of as many transitions as make, repeated, the batch that was asked for.

        :param args: Arguments of ``sample``
        :param named: The same by name
        :return: Both, with the size divided
        :raises TypeError: If the size is not among them
        :raises ValueError: If it cannot be divided
        """
        by_place = 0 <= self.place < len(args)
        size = args[self.place] if by_place else named.get(self.name, self.default)
        if not isinstance(size, int | np.integer):
            raise TypeError(
                f"keys_per_transition={self.times} divides the size of the batch, which must be the argument {self.name} of "
                f"the replay buffer's sample, got {'none' if size is Parameter.empty else repr(size)}. Say "
                "replay_buffer.sample(batch_size)."
            )
        _check_divides(int(size), self.times)  # `train` can be called with another one
        share = int(size) // self.times
        if by_place:
            return (*args[: self.place], share, *args[self.place + 1 :]), named
        return args, {**named, self.name: share}


def _repeated(given: Any, times: int) -> Any:
    """Each transition for its members; a batch that cannot be told how to repeat would be learned from as another."""
    obs = getattr(given, "observations", None)
    samples = repeat_rows(given, times, n_rows(obs) if isinstance(obs, th.Tensor | dict) else 0)
    for name in ("observations", "next_observations", "actions", "rewards", "dones"):
        before, after = (getattr(batch, name, None) for batch in (given, samples))
        if before is None and name != "observations":  # a batch of the user's may have other names for the rest
            continue
        if before is None or after is None or n_rows(after) != times * n_rows(before):
            raise TypeError(
                f"keys_per_transition={times} repeats each transition of a batch, and {name} of what the replay buffer gives "
                f"({type(given).__name__}) cannot be repeated. Give tensors in a named tuple, a dataclass, or an object that "
                "holds them as attributes, as ReplayBufferSamples of stable_baselines3 does; or leave keys_per_transition out."
            )
    return samples


def _rewards(samples: Any) -> th.Tensor:
    rewards = getattr(samples, "rewards", None)
    if not isinstance(rewards, th.Tensor):
        raise TypeError(
            f"reward_noise perturbs the rewards of a batch, and what the replay buffer gives ({type(samples).__name__}) has "
            f"{'none' if rewards is None else f'rewards of type {type(rewards).__name__}'}. Give a tensor `rewards`, or leave "
            "reward_noise out."
        )
    return rewards


def _numbers(samples: Any) -> th.Tensor:
    numbers = numbers_of(samples)
    if numbers is None:
        raise TypeError(
            "a sample of the replay buffer carries no numbers of its transitions, which bootstrap and reward_noise need: what "
            "was put in place of its `sample` makes the actions anew. Hand on the actions that `sample` of the class gives."
        )
    return numbers
