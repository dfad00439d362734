"""Members at play: their episodes in a vector environment, wherever that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_flipout.evolution.estimator import Group
from sb3_flipout.evolution.policy import FlipESPolicy
from sb3_flipout.noise import Stream, fold

#: Statistics of observations: of an array, or by the names of a Dict's parts; ``None`` where nothing is normalised.
Statistics = RunningMeanStd | dict[str, RunningMeanStd] | None


class Played(NamedTuple):
    """
    What came of the episodes of some members.

    :param fitness: Mean return of each member over its episodes, float64, shape (members,)
    :param steps: Environment steps, those of environments that wait for others included
    :param episodes: Return, length and success (NaN where none was told) of each episode, float32, shape (episodes, 3)
    :param statistics: Of the observations that were seen, where they are normalised
    """

    fitness: np.ndarray
    steps: int
    episodes: np.ndarray
    statistics: Statistics


def seed_of_environments(seed: int, generation: int, first: int) -> int:
    """
    Derive the seed of the environments in which some members play, so that their episodes do not depend on who played before.

    :param seed: Seed of the population
    :param generation: Number of the generation
    :param first: Number of the first of the members
    :return: Seed, from 0 to 2^31 - 1
    """
    return fold(seed, Stream.POPULATION_ENVIRONMENTS, generation, first) % 2**31


class Player:
    """
    Lets members play in a vector environment: an environment whose member has played its episodes takes the next member.

    Where observations are normalised, all members of a generation see the same statistics: what they see meanwhile is
    collected, and counts from the next generation on.

    :param policy: Policy
    :param env: Environments
    :param episodes_per_member: Episodes of each member
    """

    def __init__(self, policy: FlipESPolicy, env: VecEnv, episodes_per_member: int) -> None:
        self.policy, self.env, self.episodes_per_member = policy, env, episodes_per_member
        self._normalised: VecNormalize | None = unwrap_vec_normalize(env)

    def play(
        self, group: Group, some: slice, seed: int, on_step: Callable[[dict[str, Any]], bool] | None = None
    ) -> Played | None:
        """
        Play the episodes of some members of a group.

        :param group: Group
        :param some: Which of its members
        :param seed: Seed of the environments
        :param on_step: Told of each step what a callback of SB3 may read; ``False`` stops
        :return: What came of it; ``None`` where it was stopped
        """
        numbers = range(*some.indices(len(group.noise)))
        desk, n_envs = _Desk(len(numbers), self.env.num_envs, self.episodes_per_member), self.env.num_envs
        steps, seen = 0, _fresh(self._normalised)
        self.env.seed(seed)
        with self.policy.collecting(n_envs):
            with frozen(self._normalised):
                obs: Any = self.env.reset()
            self._note(seen)
            while desk.plays.any():
                actions = self._actions(group, obs, np.flatnonzero(desk.plays), numbers.start + desk.member)
                with frozen(self._normalised):  # and not while callbacks run, which may save it
                    obs, rewards, dones, infos = self.env.step(actions)
                self._note(seen)
                if self._normalised is not None:
                    rewards = self._normalised.get_original_reward()
                ended = dones & desk.plays
                desk.add(rewards, dones, infos)
                steps += n_envs
                if on_step is not None and not on_step(
                    dict(actions=actions, rewards=rewards, dones=dones, ended=ended, infos=infos, new_obs=obs)
                ):
                    return None
        episodes = np.array(desk.episodes, dtype=np.float32).reshape(-1, 3)
        return Played(desk.returns / self.episodes_per_member, steps, episodes, seen)

    def _actions(self, group: Group, obs: Any, playing: np.ndarray, member: np.ndarray) -> np.ndarray:
        """The actions of the members at play. Environments that wait take any: nobody asks the network for them."""
        some = {name: part[playing] for name, part in obs.items()} if isinstance(obs, dict) else obs[playing]
        with group.members(th.as_tensor(member[playing], device=self.policy.device)):
            chosen, _ = self.policy.predict(some, deterministic=True)
        actions: np.ndarray = chosen[np.zeros(len(member), dtype=np.int64)]
        actions[playing] = chosen
        return actions

    def _note(self, seen: Statistics) -> None:
        if seen is None or self._normalised is None:
            return
        obs = self._normalised.get_original_obs()
        if isinstance(seen, dict):
            assert isinstance(obs, dict), "the statistics are of the environment's own parts"
            for name, statistics in seen.items():
                statistics.update(obs[name])
        else:
            assert isinstance(obs, np.ndarray), "the statistics are of an array"
            seen.update(obs)


@contextmanager
def frozen(normalised: VecNormalize | None) -> Iterator[None]:
    """
    Let the statistics of observations stand still.

    :param normalised: The environment's wrapper; ``None`` for none
    :return: Context manager
    """
    if normalised is None:
        yield
        return
    before, normalised.training = normalised.training, False
    try:
        yield
    finally:
        normalised.training = before


def normalisation(normalised: VecNormalize | None) -> tuple[Any, ...] | None:
    """
    Say how observations are normalised, beside the statistics.

    :param normalised: The environment's wrapper; ``None`` for none
    :return: Its settings; ``None`` where observations are not normalised
    """
    if normalised is None or not normalised.norm_obs:
        return None
    return normalised.clip_obs, normalised.epsilon, tuple(normalised.norm_obs_keys or ())


def statistics_of(normalised: VecNormalize | None) -> Statistics:
    """
    Give the statistics that observations are normalised by, if they move.

    :param normalised: The environment's wrapper; ``None`` for none
    :return: The statistics themselves, no copy; ``None`` where nothing is normalised
    """
    return normalised.obs_rms if normalised is not None and normalised.norm_obs else None


def merge(statistics: Statistics, seen: Statistics) -> None:
    """
    Add what some members saw to the statistics.

    :param statistics: Statistics, changed in place
    :param seen: What to add
    """
    if isinstance(statistics, dict) and isinstance(seen, dict):
        for name, part in seen.items():
            statistics[name].combine(part)
    elif isinstance(statistics, RunningMeanStd) and isinstance(seen, RunningMeanStd):
        statistics.combine(seen)


def _fresh(normalised: VecNormalize | None) -> Statistics:
    moving = statistics_of(normalised) if normalised is not None and normalised.training else None
    if moving is None:
        return None
    if isinstance(moving, dict):
        return {name: RunningMeanStd(epsilon=0.0, shape=part.mean.shape) for name, part in moving.items()}
    return RunningMeanStd(epsilon=0.0, shape=moving.mean.shape)


class _Desk:
    """Who plays where: hands members out to environments, and keeps what they earn."""

    def __init__(self, members: int, n_envs: int, episodes_per_member: int) -> None:
        self.member = np.arange(n_envs) % members  # of each environment
        self.plays = np.arange(n_envs) < members
        self.returns = np.zeros(members)
        self.episodes: list[tuple[float, int, float]] = []
        self._left = np.full(members, episodes_per_member)
        self._waiting = iter(range(n_envs, members))
        self._return, self._length = np.zeros(n_envs), np.zeros(n_envs, dtype=np.int64)

    def add(self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Count a step, and hand out the next members where one has played its episodes."""
        np.add.at(self.returns, self.member[self.plays], rewards[self.plays])
        self._return += rewards
        self._length += 1
        for env in np.flatnonzero(dones & self.plays):
            success = infos[env].get("is_success")
            self.episodes.append((self._return[env], self._length[env], np.nan if success is None else float(success)))
            self._left[self.member[env]] -= 1
            if self._left[self.member[env]] == 0:
                following = next(self._waiting, None)
                self.plays[env] = following is not None
                self.member[env] = self.member[env] if following is None else following
        self._return[dones], self._length[dones] = 0, 0
