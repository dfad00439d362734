"""SB3's SubprocVecEnv that tells which environment has raised, died or hangs, instead of waiting for it for ever."""

from __future__ import annotations

import functools
import inspect
import shutil
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import SubprocVecEnv

from sb3_flipout.checks import check_number

_MakeEnv = Callable[[], "gym.Env[Any, Any]"]


class GuardedSubprocVecEnv(SubprocVecEnv):
    """
    Environments in processes of their own, as SB3's ``SubprocVecEnv``; what goes wrong in one of them is told.

    Of SB3's class an error in an environment shows as ``EOFError`` or ``ConnectionResetError``, with ``start_method="fork"``
    not at all, and an environment that hangs stops training without a word.

    ::

        from stable_baselines3.common.env_util import make_vec_env
        from sb3_flipout.envs.subprocesses import GuardedSubprocVecEnv

        env = make_vec_env("CartPole-v1", 8, vec_env_cls=GuardedSubprocVecEnv, vec_env_kwargs=dict(timeout=60))

    After such an error all processes are ended, so the environments are of no use any more.

    :param env_fns: What makes each environment
    :param start_method: ``"forkserver"``, ``"spawn"`` or ``"fork"``; by default as SB3's
    :param timeout: Seconds that an environment has for a step, a reset, or to be made; ``None`` for as long as it takes
    :raises TypeError: If ``timeout`` is no number
    :raises ValueError: If ``timeout`` is not above 0
    :raises RuntimeError: There and in each later call, if an environment raises or its process ends
    :raises TimeoutError: There and in each later call, if an environment takes longer than ``timeout``
    """

    processes: list[Any]

    def __init__(self, env_fns: Sequence[_MakeEnv], start_method: str | None = None, timeout: float | None = 600.0) -> None:
        self.timeout = None if timeout is None else check_number("timeout", timeout, above=True)
        self._notes = Path(tempfile.mkdtemp(prefix="sb3_flipout-"))  # in which environments write what they raised
        self._forget_notes = weakref.finalize(self, shutil.rmtree, self._notes, ignore_errors=True)
        self._guarded: tuple[_Guarded, ...] = ()
        made: list[_MakeEnv] = [functools.partial(_make, env_fn, self._note(place)) for place, env_fn in enumerate(env_fns)]
        super().__init__(made, start_method)

    # SB3 makes the connections and uses them throughout; here they are put in an envelope.
    @property
    def remotes(self) -> tuple[_Guarded, ...]:
        """Connections to the processes, one for each environment."""
        return self._guarded

    @remotes.setter
    def remotes(self, connections: Iterable[Any]) -> None:
        self._guarded = tuple(_Guarded(one, place, self) for place, one in enumerate(connections))

    def _note(self, place: int) -> Path:
        """Where an environment writes what it raised."""
        return self._notes / str(place)

    def ended(self, place: int) -> RuntimeError:
        """
        End all processes, since one of them has ended by itself.

        :param place: Which one
        :return: Error that says why
        """
        process, note = self.processes[place], self._note(place)
        process.join(5)
        told, code = note.read_text() if note.exists() else "", process.exitcode
        self._end()
        if told:
            return RuntimeError(f"environment {place} of {len(self._guarded)} raised, in its process:\n{told}")
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        memory = " It is often the operating system's, for want of memory: use fewer environments." if code == -9 else ""
        return RuntimeError(f"the process of environment {place} of {len(self._guarded)} {how}, and said nothing.{memory}")

    def late(self, place: int) -> TimeoutError:
        """
        End all processes, since one of them hangs.

        :param place: Which one
        :return: Error that says so
        """
        self._end()
        return TimeoutError(
            f"environment {place} of {len(self._guarded)} has not answered within timeout={self.timeout} seconds. If it may "
            "take so long, give a larger timeout; else look for what it waits for."
        )

    def _end(self) -> None:
        for process in self.processes:
            process.kill()  # one that hangs may not hear of less
        for process in self.processes:
            process.join()
        for one in self._guarded:
            one.connection.close()
        self.closed = True

    def close(self) -> None:
        """End the processes; those that an error has ended already are left alone."""
        super().close()
        self._forget_notes()


class _Guarded:
    """The connection to one process, which does not wait for what cannot come."""

    def __init__(self, one: Any, place: int, owner: GuardedSubprocVecEnv) -> None:
        self.connection, self.place, self.owner = one, place, owner

    def __reduce__(self) -> Any:
        return _itself, (self.connection,)  # to the process itself goes SB3's own

    def send(self, message: Any) -> None:
        if self.owner.closed:
            raise RuntimeError(
                "these environments have been closed, by close() or because one of them failed; make new ones to go on."
            )
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self.owner.ended(self.place) from error

    def recv(self) -> Any:
        process, timeout = self.owner.processes[self.place], self.owner.timeout
        # An answer, or the end of the process: where processes are forked, others hold its end of the connection open.
        ready = connection.wait([self.connection, process.sentinel], timeout)
        if not ready:
            raise self.owner.late(self.place)
        if self.connection in ready or self.connection.poll():
            try:
                return self.connection.recv()
            except (EOFError, ConnectionResetError) as error:
                raise self.owner.ended(self.place) from error
        raise self.owner.ended(self.place)

    def close(self) -> None:
        self.connection.close()


def _itself(one: Any) -> Any:
    return one


def _make(env_fn: _MakeEnv, note: Path) -> gym.Env[Any, Any]:
    try:
        return _Noting(env_fn(), note)
    except Exception:
        note.write_text(traceback.format_exc())
        raise


class _Noting(gym.Wrapper[Any, Any, Any, Any]):
    """Writes down what the environment raises, since its process cannot say it; for all else it is not there."""

    _OWN = ("env", "_note", "_action_space", "_observation_space", "_metadata", "_cached_spec")

    def __init__(self, env: gym.Env[Any, Any], note: Path) -> None:
        super().__init__(env)
        self._note = note

    def _noting(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception:
            self._note.write_text(traceback.format_exc())
            raise

    def step(self, action: Any) -> Any:
        return self._noting(self.env.step, action)

    def reset(self, **kwargs: Any) -> Any:
        return self._noting(self.env.reset, **kwargs)

    def render(self) -> Any:
        return self._noting(self.env.render)

    def __setattr__(self, name: str, value: Any) -> None:
        """``set_attr`` is about the environment."""
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            self._noting(setattr, self.env, name, value)

    def get_wrapper_attr(self, name: str) -> Any:
        """What ``get_attr`` and ``env_method`` ask for; a method that raises is written down, too."""
        found = super().get_wrapper_attr(name)
        return functools.partial(self._noting, found) if inspect.ismethod(found) else found
