"""A population that plays elsewhere: what goes to a worker, what comes back, and what a worker does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from typing_extensions import Self

from sb3_flipout.checks import check_integer
from sb3_flipout.evolution.estimator import Group, Population
from sb3_flipout.evolution.playing import Played, Player, Statistics, normalisation, seed_of_environments
from sb3_flipout.evolution.policy import FlipESPolicy

MakeEnv = Callable[[], VecEnv | gym.Env[Any, Any]]


class Job(NamedTuple):
    """
    What does not change while a model learns: all that a worker needs to know beside the generation.

    :param policy: Policy; its weights are replaced in each generation
    :param population_size: Members of a generation
    :param antithetic: Whether members come in pairs
    :param base_perturbations: Number of base draws
    :param episodes_per_member: Episodes of each member
    :param normalisation: How observations are normalised; ``None`` where they are not
    """

    policy: FlipESPolicy
    population_size: int
    antithetic: bool
    base_perturbations: int
    episodes_per_member: int
    normalisation: tuple[Any, ...] | None


class Generation(NamedTuple):
    """
    What goes to all workers, once per generation: keys follow from seed and number, and perturbations from keys.

    :param number: Number of the generation
    :param seed: Seed of the population
    :param scale: Noise scale
    :param weights: State of the policy
    :param statistics: Those that observations are normalised by; ``None`` for none
    :param collects: Whether the statistics move
    """

    number: int
    seed: int
    scale: float
    weights: dict[str, np.ndarray]
    statistics: Statistics
    collects: bool


class Worker:
    """
    Plays some members of a generation after others, in environments of its own.

    What it gives is a pure function of the generation and of the members that are asked for.

    :param job: What does not change
    :param make_env: Makes its environments
    :param device: Device of its policy
    :raises ValueError: If its environments have other spaces than the policy, or normalise where the model's own do not
    """

    def __init__(self, job: Job, make_env: MakeEnv, device: str = "cpu") -> None:
        policy = job.policy.to(device)
        self.env = BaseAlgorithm._wrap_env(make_env(), monitor_wrapper=False)
        check_for_correct_spaces(self.env, policy.observation_space, policy.action_space)
        self._normalised = unwrap_vec_normalize(self.env)
        own = normalisation(self._normalised)
        if own != job.normalisation:
            raise ValueError(
                "make_env and the model's own environments must both normalise observations by VecNormalize, or both not, and "
                "with the same clip_obs, epsilon and norm_obs_keys: the model's keep the statistics of all workers. Here: "
                f"{own}, the model's: {job.normalisation}."
            )
        policy.set_training_mode(False)
        self._asked: tuple[int, int, float] | None = None  # the generation that the last groups are of
        self._last: list[Group] = []
        self._player = Player(policy, self.env, job.episodes_per_member)
        self._population = Population(policy, job.population_size, 0, job.antithetic, job.base_perturbations)

    def play(self, generation: Generation, members: slice) -> Played:
        """
        Play the episodes of some members.

        :param generation: Generation
        :param members: Which of its members, all under one base draw
        :return: What came of it
        """
        self._player.policy.load_state_dict({name: th.from_numpy(np.array(w)) for name, w in generation.weights.items()})
        if self._normalised is not None:
            self._normalised.training = generation.collects
            if generation.statistics is not None:
                self._normalised.obs_rms = generation.statistics  # type: ignore[assignment]
        groups = self._groups(generation)
        group = next(group for group in groups if group.rows.start <= members.start < group.rows.stop)
        some = slice(members.start - group.rows.start, members.stop - group.rows.start)
        seed = seed_of_environments(generation.seed, generation.number, members.start)
        played = self._player.play(group, some, seed)
        assert played is not None, "nobody can stop it"
        return played

    def _groups(self, generation: Generation) -> list[Group]:
        """The members of a generation, whose keys are made once for all of its chunks."""
        asked, population = (generation.seed, generation.number, generation.scale), self._population
        if asked != self._asked:
            population.seed, population.generation, population.scale = asked
            self._asked, self._last = asked, population.ask()
        return self._last


class Workers(ABC):
    """
    Processes that play a population: argument ``workers`` of :class:`~sb3_flipout.evolution.flipes.FlipES`.

    Members are played in chunks of a fixed size, since a matrix product rounds by the shape of its batch: results do not
    depend on the number of workers, nor on which of them plays what.

    :param members_per_chunk: Members that are played at a time
    :raises TypeError: If it is no integer
    :raises ValueError: If it is below 1
    """

    def __init__(self, members_per_chunk: int) -> None:
        self.members_per_chunk = check_integer("members_per_chunk", members_per_chunk, 1)
        #: Workers that were lost and replaced so far.
        self.replaced = 0

    @abstractmethod
    def start(self, job: Job) -> None:
        """
        Start to work for a model; what was begun for another one ends. For the same job again, workers go on.

        :param job: What does not change while it learns
        """

    @abstractmethod
    def play(self, generation: Generation, chunks: Sequence[slice]) -> Generator[tuple[slice, Played | None], None, None]:
        """
        Play a generation.

        :param generation: Generation
        :param chunks: Its members, in chunks
        :return: Chunks as they come back, each with what came of it; ``None`` where its worker was lost
        """

    @abstractmethod
    def close(self) -> None:
        """End all workers; the next :meth:`start` makes new ones."""

    def chunks(self, groups: Sequence[slice]) -> list[slice]:
        """
        Cut a generation, so that the members of a chunk are under one base draw.

        :param groups: Members under one base draw each
        :return: Chunks of members
        """
        size = self.members_per_chunk
        return [
            slice(first, min(first + size, group.stop)) for group in groups for first in range(group.start, group.stop, size)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
