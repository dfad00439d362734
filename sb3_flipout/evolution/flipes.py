"""FlipES as an SB3 algorithm: an evolution strategy whose population acts in one batched forward pass."""

from __future__ import annotations

import copy
from contextlib import closing
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from typing_extensions import Self

from sb3_flipout.checks import check_integer
from sb3_flipout.evolution.estimator import Group, Population
from sb3_flipout.evolution.kept_noise import KeepsNoise
from sb3_flipout.evolution.playing import Played, Player, frozen, merge, normalisation, seed_of_environments, statistics_of
from sb3_flipout.evolution.policy import FlipESCnnPolicy, FlipESMultiInputPolicy, FlipESPolicy
from sb3_flipout.evolution.telling import Tells
from sb3_flipout.evolution.workers import Generation, Job, Workers

_Found = list[tuple[slice, Played | None]]  # members, and what came of their episodes; None where their worker was lost


class FlipES(KeepsNoise, Tells):
    """
    Evolution strategy on weight noise (Wen et al. 2018, section 4.4; Salimans et al. 2017): each environment plays under the
    perturbation of one member of the population, and the returns say where the mean weights go.

    A member keeps its perturbation for its episodes. An environment whose member has played them takes the next member, so
    the population may be larger than the number of environments; at the end of a generation environments wait for the last
    member, and their steps count.

    :param policy: ``"FlipoutMlpPolicy"``, ``"FlipoutCnnPolicy"``, ``"FlipoutMultiInputPolicy"``, or a policy class
    :param env: Environment, or its id; a ``VecEnv`` of many environments makes it fast
    :param learning_rate: Learning rate of the policy's optimizer, or a schedule of it
    :param population_size: Members of a generation; even where they are antithetic
    :param episodes_per_member: Episodes over which a member's fitness, its mean return, is taken
    :param antithetic: Whether members come in pairs with opposite perturbations
    :param base_perturbations: Number of base draws, each for an equal part of the population; the parts play in turn
    :param shaping: Fitness shaping: ``"centred_ranks"``, ``"none"``, ``"normalised"`` or ``"top"`` (of ARS)
    :param top: Share of the antithetic pairs that ``"top"`` uses, in (0, 1]
    :param workers: Processes that play the population, as :class:`~sb3_flipout.evolution.ray_workers.RayWorkers`; ``None``:
        it plays in ``env``, in this process. With workers, ``env`` says the spaces, and keeps the statistics of a
        ``VecNormalize``; callbacks are called once for each chunk of members that comes back
    :param policy_kwargs: Keyword arguments of the policy, the noise settings among them
    :param stats_window_size: Number of episodes over which logged means are taken
    :param tensorboard_log: Folder of tensorboard logs; ``None`` for none
    :param verbose: 0 for silence, 1 for what is logged, 2 for more
    :param seed: Seed of everything
    :param device: Device of the policy
    :param _init_setup_model: Whether to build the policy now
    :raises TypeError: If a value has a wrong type
    :raises ValueError: If a value is out of range or unfit
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "FlipoutMlpPolicy": FlipESPolicy,
        "FlipoutCnnPolicy": FlipESCnnPolicy,
        "FlipoutMultiInputPolicy": FlipESMultiInputPolicy,
    }
    policy: FlipESPolicy
    population: Population

    def __init__(
        self,
        policy: str | type[FlipESPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 0.05,
        population_size: int = 64,
        episodes_per_member: int = 1,
        antithetic: bool = True,
        base_perturbations: int = 1,
        shaping: str = "centred_ranks",
        top: float = 1.0,
        workers: Workers | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            support_multi_env=True,
            seed=seed,
            supported_action_spaces=(spaces.Box, spaces.Discrete),
        )
        self.population_size = population_size
        self.episodes_per_member = check_integer("episodes_per_member", episodes_per_member, 1)
        self.antithetic, self.base_perturbations = antithetic, base_perturbations
        self.shaping, self.top, self.workers = shaping, top, workers
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        made = self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **self.policy_kwargs)
        if not isinstance(made, FlipESPolicy):
            raise TypeError(
                f"policy must be a FlipESPolicy, got {type(made).__name__}; name one of {', '.join(self.policy_aliases)}, or "
                "derive a class of yours from sb3_flipout.evolution.FlipESPolicy."
            )
        self.policy = made.to(self.device)
        self._restore_noise()
        self._job: Job | None = None
        self.population = Population(
            self.policy,
            check_integer("population_size", self.population_size, 2),
            self.policy._noise_seed,
            self.antithetic,
            self.base_perturbations,
            self.shaping,
            self.top,
        )
        self.population.generation = self._n_updates

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "population", "workers", "_job", "_began"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    # ---- learning ---------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "FlipES",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Learn for a number of environment steps; whole generations are made.

        :param total_timesteps: Environment steps
        :param callback: Callback, or a list of them, called at each step of the environments
        :param log_interval: Generations between two logs
        :param tb_log_name: Name of the run in tensorboard
        :param reset_num_timesteps: Whether steps are counted from 0
        :param progress_bar: Whether to show a progress bar
        :return: The model
        """
        with frozen(self._vec_normalize_env):  # it resets the environments, and nobody plays what it sees
            total, listed = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        self.policy.guard.check_whole(self.policy, self.policy.perturbed_network)
        self.policy.marks.steered = False
        self.policy.meet_observations(self._last_obs)
        if self.workers is not None:
            self.workers.start(self._told_workers())
        listed.on_training_start(locals(), globals())
        while self.num_timesteps < total:
            fitness = self._evaluate_generation(listed)
            if fitness is None:
                break
            self._learn_from(fitness)
            if log_interval is not None and self._n_updates % log_interval == 0:
                self.dump_logs()
        listed.on_training_end()
        return self

    def _told_workers(self) -> Job:
        """The same object as long as nothing has changed, so that workers go on from one ``learn`` to the next."""
        sizes = self.population_size, self.antithetic, self.base_perturbations, self.episodes_per_member
        how = normalisation(self._vec_normalize_env)
        if self._job is None or self._job[1:] != (*sizes, how):
            self._job = Job(copy.deepcopy(self.policy).cpu(), *sizes, how)
        return self._job

    def _evaluate_generation(self, callback: BaseCallback) -> th.Tensor | None:
        """Give the fitness of each member; ``None`` where a callback has asked to stop."""
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        self.policy.follow_schedule(1 - self._current_progress_remaining)
        self.policy.set_training_mode(False)
        population = self.population
        # Seed and number also where a generation was broken off, or the noise was reseeded.
        population.scale, population.seed, population.generation = (
            self.policy.effective_scale,
            self.policy._noise_seed,
            self._n_updates,
        )
        callback.on_rollout_start()
        plays = self._play_here if self.workers is None else self._play_elsewhere
        self._began = self.num_timesteps
        try:
            found = plays(population.ask(), callback)
        finally:
            self._began = None
        if found is None:
            return None
        callback.on_rollout_end()
        fitness = np.full(self.population_size, np.nan)
        for members, played in sorted(found, key=lambda item: item[0].start):
            if played is not None:
                fitness[members] = played.fitness
                merge(statistics_of(self._vec_normalize_env), played.statistics)
        return th.as_tensor(fitness)

    def _play_here(self, groups: list[Group], callback: BaseCallback) -> _Found | None:
        assert self.env is not None, "learning needs environments"
        player, found = Player(self.policy, self.env, self.episodes_per_member), _Found()

        def on_step(step: dict[str, Any]) -> bool:
            self.num_timesteps += self.n_envs
            ended = np.flatnonzero(step["ended"])  # members' episodes; a thousand environments have few ends in a step
            self._update_info_buffer([step["infos"][env] for env in ended], np.ones(len(ended), dtype=bool))
            callback.update_locals(step)
            return callback.on_step()

        for group in groups:
            seed = seed_of_environments(self.population.seed, self._n_updates, group.rows.start)
            played = player.play(group, slice(None), seed, on_step)
            if played is None:
                return None
            found.append((group.rows, played))
        return found

    def _play_elsewhere(self, groups: list[Group], callback: BaseCallback) -> _Found | None:
        assert self.workers is not None, "asked by _evaluate_generation"
        found, statistics = _Found(), statistics_of(self._vec_normalize_env)
        collects = statistics is not None and self._vec_normalize_env.training  # type: ignore[union-attr]
        weights = {name: tensor.cpu().numpy() for name, tensor in self.policy.state_dict().items()}
        generation = Generation(self._n_updates, self.population.seed, self.population.scale, weights, statistics, collects)
        chunks = self.workers.chunks([group.rows for group in groups])
        with closing(self.workers.play(generation, chunks)) as plays:
            for members, played in plays:
                found.append((members, played))
                if played is None:
                    continue
                self.num_timesteps += played.steps
                callback.update_locals(dict(played=played))
                if not callback.on_step():
                    return None
        if all(played is None for _, played in found):
            raise RuntimeError(
                "all workers were lost in one generation, so nothing can be learned from it. Look at what ended them (the "
                "cluster's logs say it), and whether they have enough memory and time."
            )
        for _, played in sorted(found, key=lambda item: item[0].start):
            self._note_episodes(played)
        return found

    def _note_episodes(self, played: Played | None) -> None:
        """For the logs, in the order of the members: workers are done in any order."""
        for reward, length, success in [] if played is None else played.episodes.tolist():
            self.ep_info_buffer.append(dict(r=reward, l=length))  # type: ignore[union-attr]
            if not np.isnan(success):
                self.ep_success_buffer.append(success)  # type: ignore[union-attr]

    def _learn_from(self, fitness: th.Tensor) -> None:
        self._update_learning_rate(self.policy.optimizer)
        self.policy.optimizer.zero_grad()
        told = self.population.tell(fitness.to(self.device))
        self._warn_of(told)
        if told.stepped:
            self.policy.optimizer.step()
        self._n_updates += 1
        alive = fitness[th.isfinite(fitness)]
        if len(alive):
            for name, value in (("mean", alive.mean()), ("max", alive.max()), ("std", alive.std(correction=0))):
                self.logger.record(f"rollout/fitness_{name}", float(value))
        self.logger.record("train/dropped_members", told.dropped)
        if self.workers is not None:
            self.logger.record("train/replaced_workers", self.workers.replaced)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("noise/scale", self.policy.effective_scale)
