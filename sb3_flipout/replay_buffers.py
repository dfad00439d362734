"""Replay buffers that store a number with each transition, from which members draw bootstrap masks and reward noise.

The number stands beside the action, in one more column of the array of actions. So it is taken wherever a buffer takes the
actions of its sample, by whatever indices: SB3's own classes, ``HerReplayBuffer``, n-step returns, and classes of the user's.
It costs 8 bytes per transition. A transition that is written as SB3 writes it, wherever, has its action in both columns until
it gets its number: so those are found that were not stored by ``add`` at the place where ``add`` stores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_flipout.noise import fold, fold_in
from sb3_flipout.noise.keys import signed
from sb3_flipout.samples import with_parts

_NAME = "transition_numbers"
_GIVES_SAMPLES = ("_get_samples", "_get_real_samples", "_get_virtual_samples")  # by given places; the last two are HER's
_TWO_COLUMNS = (
    "inside `sample` and `_get_samples` of a class of your own, samples.actions has a second column, the numbers of the "
    "transitions: compute with samples.actions[:, :1], and hand samples.actions on as it is"
)
_OR_LEAVE_OUT = "or leave out bootstrap and reward_noise."
_FEW = 16  # numbers that are hashed sooner one by one than by torch


class _Asked(threading.local):
    """Buffers whose `sample` is running in this thread, by `id`: others may sample at the same time, or save them."""

    def __init__(self) -> None:
        self.buffers: set[int] = set()


_ASKED = _Asked()


class NumberedBufferMixin(ReplayBuffer):
    """Stands before a replay buffer class in the bases of the class that :func:`numbered` makes."""

    # Class attributes, so that a buffer that is made from the class of another one has them, too.
    numbers_key: int = 0  # from which numbers are hashed, with how many there were before
    numbered: int = 0  # transitions that have been given one

    @property
    def _known_as(self) -> type[ReplayBuffer]:
        """The class that the user knows: what this one was made from, or the user's own that derives from what was made."""
        return vars(type(self)).get("DERIVED_FROM", type(self))

    def add(self, *args: Any, **kwargs: Any) -> None:
        """
        Store a step of all environments, and give each transition a number.

        :param args: What the stock buffer takes: observation, next observation, action, reward, done, infos
        :param kwargs: The same by name
        """
        _widen_again(self)
        before = self.pos
        super().add(*args, **kwargs)
        # A class of the user's may store several steps at once; where it stores elsewhere, `sample` finds what has no number.
        steps = 1 if self.buffer_size == 1 else (self.pos - before) % self.buffer_size
        _number(self, (before + np.arange(steps)) % self.buffer_size)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """
        Sample transitions; their actions carry the numbers.

        :param args: What the stock buffer takes
        :param kwargs: The same by name
        :return: What the stock buffer gives
        :raises TypeError: If the buffer has not taken its actions from ``self.actions``, or its sample has none
        """
        if id(self) in _ASKED.buffers:  # a class that asks itself once more, for a batch that it likes better
            return super().sample(*args, **kwargs)
        _widen_again(self)
        _ASKED.buffers.add(id(self))
        try:
            samples = _with_numbers(self, partial(super().sample, *args, **kwargs))
        except (IndexError, RuntimeError) as error:  # torch's
            if not self._known_as.__module__.startswith("stable_baselines3."):
                error.args = (f"{error} (If that is about actions: {_TWO_COLUMNS}.)",)
            raise
        finally:
            _ASKED.buffers.discard(id(self))
        if samples is None:  # not yet, as a class of the user's may say
            return None
        both: Any = getattr(samples, "actions", None)
        if not _are_numbered(both) or _lacks_number(both).any():
            raise TypeError(f"a sample of {self._known_as.__name__} {_why_lost(samples, both)}; {_OR_LEAVE_OUT}")
        rewards = getattr(samples, "rewards", None)
        several = np.ndim(getattr(self, "rewards", 0)) > 2  # objectives
        if isinstance(rewards, th.Tensor) and rewards.numel() == 2 * len(both) and not several:
            raise TypeError(
                f"a sample of {self._known_as.__name__} has {len(both)} actions and rewards of shape "
                f"{tuple(rewards.shape)}; {_TWO_COLUMNS}; where they are of two objectives, let self.rewards have a last "
                f"dimension for these; {_OR_LEAVE_OUT}"
            )
        return _split_off_numbers(samples)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """
        Pickle by the class it was made from, since the class itself is made at run time.

        :param protocol: Pickle protocol
        :return: How to make it again
        """
        if self._known_as is type(self):
            return super().__reduce_ex__(protocol)
        state = getattr(self, "__getstate__", None)  # which Python 3.10 has in classes that define it only
        return _empty_numbered, (self._known_as,), dict(self.__dict__) if state is None else state()


def _as_known(original: Any) -> Any:
    """Other ways of sampling, which a class of the user's has beside `sample`, get actions as they know them."""

    @wraps(original)
    def method(self: NumberedBufferMixin, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _ASKED.buffers:
            return original(self, *args, **kwargs)
        samples = _with_numbers(self, partial(original, self, *args, **kwargs))
        return _split_off_numbers(samples) if _are_numbered(getattr(samples, "actions", None)) else samples

    return method


def _with_numbers(buffer: NumberedBufferMixin, ask: Callable[[], Any]) -> Any:
    """Ask for a sample; and once more where somebody has stored elsewhere, or written into the arrays, and all get numbers."""
    samples = ask()
    both = getattr(samples, "actions", None)
    if _are_numbered(both) and _lacks_number(both).any():
        _number(buffer)
        samples = ask()
    return samples


def _are_numbered(actions: Any) -> bool:
    return isinstance(actions, th.Tensor) and actions.dim() == 2 and actions.shape[1] == 2 and actions.dtype == th.int64


def _why_lost(samples: Any, actions: Any) -> str:
    """Why the numbers of a sample cannot be found, and what to do."""
    if not isinstance(actions, th.Tensor):
        return (
            f"is a {type(samples).__name__} without a tensor `actions`, beside which the numbers of its transitions stand. "
            "Give a named tuple, a dataclass, or an object with attributes, as ReplayBufferSamples of stable_baselines3 is one"
        )
    return (
        f"has actions of shape {tuple(actions.shape)} and type {actions.dtype}, and has lost the numbers of its transitions, "
        "which stand beside them. Take actions from self.actions as ReplayBuffer does, and leave their last dimension and "
        "their type as they are"
    )


def _lacks_number(both: Any) -> Any:
    """Which actions have no number beside them: written as SB3 writes them they stand twice, or there is still a zero."""
    return (both[..., 1] == both[..., 0]) | (both[..., 1] == 0)


def _number(buffer: NumberedBufferMixin, places: np.ndarray | None = None) -> None:
    """Give the transitions at these places, or all of them, a number, as far as they have none."""
    rows, envs = np.nonzero(_lacks_number(buffer.actions if places is None else buffer.actions[places]))
    numbers = _numbers_from(buffer.numbers_key, buffer.numbered, len(rows))
    buffer.actions[rows if places is None else places[rows], envs, 1] = numbers
    buffer.numbered += len(rows)


def _numbers_from(key: int, first: int, n: int) -> np.ndarray:
    """Hash the next numbers."""
    if n <= _FEW:
        return np.array([fold(key, count) for count in range(first, first + n)], dtype=np.int64)
    return fold_in(signed(key), th.arange(first, first + n, device="cpu")).numpy()


def _split_off_numbers(samples: Any) -> Any:
    """Take the numbers of a sample from beside its actions, and hang them on these."""
    actions = samples.actions[:, :1]
    setattr(actions, _NAME, samples.actions[:, 1])
    return with_parts(samples, actions=actions)


def asked_of(buffer: Any, sample: Any) -> Any:
    """
    Find the ``sample`` that says how a buffer is asked for a batch.

    :param buffer: Replay buffer, that numbers its transitions or not
    :param sample: Its ``sample``
    :return: The method as the buffer's own class, or the user on the buffer itself, has it
    """
    numbers = getattr(sample, "__func__", None) is NumberedBufferMixin.sample  # which takes whatever the class's own takes
    return super(NumberedBufferMixin, buffer).sample if numbers else sample


def numbers_of(samples: Any) -> th.Tensor | None:
    """
    Read the numbers of sampled transitions.

    :param samples: What a buffer has given
    :return: Numbers, shape (N,), int64; ``None`` if it has none
    """
    return getattr(samples.actions, _NAME, None)


@cache
def numbered(buffer_class: type[ReplayBuffer]) -> type[ReplayBuffer]:
    """
    Derive the version of a replay buffer class that numbers its transitions.

    :param buffer_class: Stock class, or a user's subclass of one
    :return: Subclass; a class that does so already is returned as it is
    """
    if issubclass(buffer_class, NumberedBufferMixin):
        return buffer_class
    members: dict[str, Any] = {
        "DERIVED_FROM": buffer_class,
        "__module__": __name__,
        "__doc__": f"{buffer_class.__name__} that stores a number with each transition.",
        **{name: _as_known(getattr(buffer_class, name)) for name in _GIVES_SAMPLES if hasattr(buffer_class, name)},
    }
    return type(f"Numbered{buffer_class.__name__}", (NumberedBufferMixin, buffer_class), members)


def number_transitions(buffer: Any, key: int) -> int:
    """
    Turn a replay buffer into the version of itself that numbers transitions, in place; one that does so already keeps its
    numbers, and takes the key for what is stored from now on.

    :param buffer: Replay buffer
    :param key: Key from which numbers are hashed, any integer
    :return: How many transitions were in it without a number; they have one now
    :raises TypeError: If it does not keep its actions as ``ReplayBuffer`` does
    """
    if isinstance(buffer, NumberedBufferMixin):
        buffer.numbers_key = key
        return _widen_again(buffer)
    actions = getattr(buffer, "actions", None)
    # Tensors, say, have no column added to them here; and whoever else reads a memory would not see the copy that has one.
    shape = actions.shape if isinstance(actions, np.ndarray) and not _is_of_others(actions) else None
    if not isinstance(buffer, ReplayBuffer) or shape != (buffer.buffer_size, buffer.n_envs, 1):
        raise _unfit(buffer)
    kind: type[ReplayBuffer] = type(buffer)
    stored = _widen(buffer, key, 0)
    if getattr(vars(buffer).get("sample"), "__func__", None) is kind.sample:
        del buffer.sample  # the class's own, bound: copies have it that were made in the middle of an update
    buffer.__class__ = numbered(kind)  # last, so that a buffer that is refused stays as it was
    assert isinstance(buffer, NumberedBufferMixin), "that is what numbered makes"
    buffer.numbers_key, buffer.numbered = key, stored
    return stored


def _unfit(buffer: Any) -> TypeError:
    what = "numbers of transitions, which bootstrap and reward_noise need"
    if buffer is None:
        return TypeError(f"the model has no replay_buffer that could be given {what}. Give it one, {_OR_LEAVE_OUT}")
    return TypeError(
        f"replay_buffer_class={type(buffer).__name__} cannot be given {what}: it must keep its actions in a numpy array of "
        "shape (buffer_size, n_envs, 1) that can be replaced, and not in a file or in memory that is shared. Derive it from "
        f"ReplayBuffer, DictReplayBuffer or HerReplayBuffer, {_OR_LEAVE_OUT}"
    )


def _is_of_others(array: np.ndarray) -> bool:
    """Whether an array shows memory that is not its own: of a file, or shared with other processes."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    return base is not None and not isinstance(base, (bytes, bytearray))  # of which an unpickled array is a view


def _widen(buffer: ReplayBuffer, key: int, first: int) -> int:
    """Give the array of actions a column of numbers, and the transitions that are stored theirs; how many these are."""
    numbers, rows = np.zeros_like(buffer.actions, dtype=np.int64), buffer.size()
    numbers[:rows, :, 0] = _numbers_from(key, first, rows * buffer.n_envs).reshape(rows, buffer.n_envs)
    both = np.concatenate([buffer.actions.astype(np.int64), numbers], axis=2)
    try:
        buffer.actions = both
    except AttributeError as error:  # a property of the user's
        raise _unfit(buffer) from error
    if np.shape(buffer.actions) != both.shape:  # one that does something else with what it is given
        raise _unfit(buffer)
    return rows * buffer.n_envs


def _widen_again(buffer: NumberedBufferMixin) -> int:
    """The same for an array that the user has put there since, as in a `reset` of their own; how many had no number."""
    fresh = _widen(buffer, buffer.numbers_key, buffer.numbered) if buffer.actions.shape[-1] == 1 else 0
    buffer.numbered += fresh
    return fresh


def _empty_numbered(buffer_class: type[ReplayBuffer]) -> ReplayBuffer:
    numbered_class = numbered(buffer_class)
    return numbered_class.__new__(numbered_class)
