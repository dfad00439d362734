"""A population spread over Ray actors: on this machine, or on any Ray cluster."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import torch as th

from sb3_flipout.checks import check_flag, check_integer, check_number, warn_user
from sb3_flipout.evolution.playing import Played
from sb3_flipout.evolution.workers import Generation, Job, MakeEnv, Worker, Workers


class RayWorkers(Workers):
    """
    Ray actors that play a population.

    ::

        import sb3_flipout
        from sb3_flipout import FlipES
        from sb3_flipout.evolution import RayWorkers
        from stable_baselines3.common.env_util import make_vec_env

        def make_env():
            return make_vec_env("CartPole-v1", 16)

        with RayWorkers(make_env, workers=4) as workers:
            model = FlipES("FlipoutMlpPolicy", "CartPole-v1", population_size=256, workers=workers)
            model.learn(1_000_000)

    Weights go out once per generation, through Ray's object store; to a worker go the numbers of its members, and their
    fitness comes back. A worker that dies, or that is not done in time, costs the members that it was playing, and is
    replaced. An error in an environment is raised here.

    :param make_env: Makes the environments of a worker: a ``VecEnv``, or one gymnasium environment
    :param workers: Number of actors
    :param members_per_chunk: Members that a worker is given at a time; even, so that antithetic twins are together
    :param address: Address of a Ray cluster, as of ``ray.init``; ``None`` for the one that is connected, or the one that
        ``RAY_ADDRESS`` names, or one that is started here
    :param timeout: Seconds that a worker has for a chunk before it counts as lost
    :param start_timeout: Seconds that workers have to start, for which the cluster must have room
    :param actor_options: Options of the actors, as of ``.options(...)`` in Ray: ``dict(num_cpus=2)``, say
    :param device: Device on which a worker computes
    :param fallback: Whether to play in this process, with a warning, where Ray is not installed or cannot be reached
    :raises TypeError: If a value has a wrong type
    :raises ValueError: If a value is out of range, or, when a model starts, if its population is smaller than the workers
    :raises ImportError: When a model starts, if Ray is not installed
    :raises ConnectionError: When a model starts, if no Ray cluster can be reached
    """

    def __init__(
        self,
        make_env: MakeEnv,
        workers: int,
        members_per_chunk: int = 16,
        address: str | None = None,
        timeout: float = 600.0,
        start_timeout: float = 120.0,
        actor_options: dict[str, Any] | None = None,
        device: str = "cpu",
        fallback: bool = False,
    ) -> None:
        super().__init__(members_per_chunk)
        if not callable(make_env):
            raise TypeError(
                f"make_env must be a function that makes environments, got {type(make_env).__name__}; environments themselves "
                'cannot go to a worker: give lambda: make_vec_env("CartPole-v1", 16), say.'
            )
        self.make_env = make_env
        self.workers = check_integer("workers", workers, 1)
        self.address = address
        self.timeout = check_number("timeout", timeout, 0.0, above=True)
        self.start_timeout = check_number("start_timeout", start_timeout, 0.0, above=True)
        self.actor_options = dict(actor_options or {})
        self.device, self.fallback = device, check_flag("fallback", fallback)
        self._ray: Any = None
        self._job: Job | None = None
        self._stored: Any = None  # reference to it in the object store
        self._session: Any = None  # of Ray, in which the actors are
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}  # replacements, by what says that they are ready
        self._here: Worker | None = None  # in place of actors, where Ray is not to be had

    # ---- the actors -------------------------------------------------------------------------------------------------

    def start(self, job: Job) -> None:
        """
        Start the actors.

        :param job: What does not change while the model learns
        :raises ValueError: If the population is smaller than the number of workers
        :raises ImportError: If Ray is not installed
        :raises ConnectionError: If no Ray cluster can be reached
        """
        if job is self._job and (self._here is not None or self._session == _session(self._ray)):
            return
        self._check_sizes(job)
        self.close()
        self._begin(job)
        self._job = job

    def _begin(self, job: Job) -> None:
        try:
            self._ray = _connected(self.address)
        except (ImportError, ConnectionError) as error:
            if not self.fallback:
                raise
            warn_user(f"the population plays in this process: {error}")
            self._here = Worker(job, self.make_env, self.device)
            return
        self._stored, self._session = self._ray.put(job), _session(self._ray)
        self._actors = [self._hired() for _ in range(self.workers)]
        try:  # so that what is wrong with make_env is said now, and not as a worker that was lost
            self._ray.get([actor.ready.remote() for actor in self._actors], timeout=self.start_timeout)
        except self._ray.exceptions.GetTimeoutError as error:
            self.close()
            raise ConnectionError(
                f"{self.workers} workers were not ready within start_timeout={self.start_timeout} seconds: the cluster has "
                f"{self._ray.available_resources()} to give. Ask for fewer workers, or for less by actor_options, "
                "dict(num_cpus=0.5) say."
            ) from error
        except self._ray.exceptions.ActorDiedError as error:
            self.close()
            raise RuntimeError(f"a worker died while it was made: {error}") from error

    def _check_sizes(self, job: Job) -> None:
        size = job.population_size
        if size < self.workers:
            raise ValueError(
                f"population_size={size} must be at least workers={self.workers}, so that each has something to do; "
                f"use workers={size}, or a larger population."
            )
        chunks = job.base_perturbations * -(-size // job.base_perturbations // self.members_per_chunk)
        if chunks < self.workers:
            even = max(2, size // self.workers // 2 * 2)
            warn_user(
                f"population_size={size} makes {chunks} chunks of members_per_chunk={self.members_per_chunk}, so only "
                f"{chunks} of {self.workers} workers play. Use members_per_chunk={even}, say.",
            )

    def _hired(self) -> Any:
        options = {"num_cpus": 1, "max_restarts": 0, **self.actor_options}
        return self._ray.remote(_Actor).options(**options).remote(self._stored, self.make_env, self.device)

    def close(self) -> None:
        """End all actors. Ray itself, and other work on its cluster, goes on."""
        actors, self._actors, self._starting = self._actors, [], {}
        self._here = self._job = self._stored = None
        if self._ray is not None and self._session is not None and self._session == _session(self._ray):
            for actor in actors:
                self._ray.kill(actor)

    # ---- a generation -----------------------------------------------------------------------------------------------

    def play(self, generation: Generation, chunks: Sequence[slice]) -> Generator[tuple[slice, Played | None], None, None]:
        """
        Play a generation: each worker is given a chunk, and another one when it is done.

        :param generation: Generation
        :param chunks: Its members, in chunks
        :return: Chunks as they come back, each with what came of it; ``None`` where its worker was lost
        """
        if self._here is not None:
            for chunk in chunks:
                yield chunk, self._here.play(generation, chunk)
            return
        told, waiting = self._ray.put(generation), deque(chunks)
        coming = list(self._starting.values())
        idle = deque(actor for actor in self._actors if all(actor is not one for one in coming))
        running: dict[Any, _Running] = {}
        try:
            while waiting or running:
                while waiting and idle:
                    actor, chunk = idle.popleft(), waiting.popleft()
                    result = actor.play.remote(told, chunk.start, chunk.stop)
                    running[result] = _Running(actor, chunk, time.monotonic() + self.timeout)
                ready = self._next(running)
                if ready in self._starting:
                    idle.extend(self._welcomed(ready))
                elif ready is not None or running:
                    result = min(running, key=lambda one: running[one].deadline) if ready is None else ready
                    item = running.pop(result)
                    played = None if ready is None else self._result(result)
                    if played is None:
                        self._replace(item.actor)
                    else:
                        idle.append(item.actor)
                    yield item.chunk, played
                else:  # nobody is left, and nobody comes
                    while waiting:
                        yield waiting.popleft(), None
        finally:  # stopped: nobody waits for what is still being played, now or in the next generation
            for item in running.values():
                self._replace(item.actor)
                self.replaced -= 1

    def _next(self, running: dict[Any, _Running]) -> Any:
        """A result, or a replacement that is ready; ``None`` where neither comes in time."""
        soonest = min((item.deadline for item in running.values()), default=time.monotonic() + self.start_timeout)
        awaited = [*running, *self._starting]
        done = self._ray.wait(awaited, timeout=max(0.0, soonest - time.monotonic()))[0] if awaited else []
        return done[0] if done else None

    def _welcomed(self, ready: Any) -> list[Any]:
        """A replacement that can play now; none if it died while it was made, after which there is one worker less."""
        actor = self._starting.pop(ready)
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError:
            self._actors = [one for one in self._actors if one is not actor]
            return []
        return [actor]

    def _result(self, result: Any) -> Played | None:
        errors = self._ray.exceptions
        try:
            played: Played = self._ray.get(result)
        except errors.RayTaskError:  # of the environment, or of ours: the same everywhere
            raise
        except errors.RayError:
            return None
        return played

    def _replace(self, lost: Any) -> None:
        """End an actor, and hire another one, which plays when the cluster has room for it and it is ready."""
        self._ray.kill(lost)
        self.replaced += 1
        new = self._hired()
        self._starting[new.ready.remote()] = new
        self._actors = [new if one is lost else one for one in self._actors]


class _Running(NamedTuple):
    """A chunk that is being played: by whom, and until when."""

    actor: Any
    chunk: slice
    deadline: float


class _Actor:
    """What runs in a process of Ray."""

    def __init__(self, job: Job, make_env: MakeEnv, device: str) -> None:
        th.set_num_threads(1)  # a sum over several threads rounds otherwise
        self._worker = Worker(job, make_env, device)

    def ready(self) -> bool:
        return True

    def play(self, generation: Generation, first: int, stop: int) -> Played:
        return self._worker.play(generation, slice(first, stop))


def _session(ray: Any) -> Any:
    """What Ray is connected to, to be compared; ``None`` for nothing."""
    return ray.get_runtime_context().get_job_id() if ray is not None and ray.is_initialized() else None


def _connected(address: str | None) -> Any:
    """Ray, connected to a cluster."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('RayWorkers needs Ray, which is not installed; pip install "sb3_flipout[ray]" does it.') from error
    if not ray.is_initialized():
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        except Exception as error:
            raise ConnectionError(
                f"no Ray cluster could be reached at address={address!r}: {error} Start one with `ray start --head`, give the "
                "address of one, or leave address out for workers on this machine; fallback=True plays in this process."
            ) from error
    return ray


def _knock(address: str | None) -> None:
    """Look whether anybody listens: Ray itself takes minutes to find out that nobody does."""
    host, _, port = (address or os.environ.get("RAY_ADDRESS", "")).removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
