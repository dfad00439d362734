"""The runs of ``deep_sea.py``: tasks, arms, and how one is trained.

A run is learned when more than 90 of the last 100 training episodes were good, and solved if the mean weights (with members:
their vote) are good afterwards too. Good: the treasure was reached; in the stochastic variant, where a right move can slip,
that no action left the diagonal, as in bsuite.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import boot_dqn
import gymnasium as gym
import numpy as np
import torch as th
from exploration_training import GoalRecord, Watch
from runs import Row, made_with
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import set_random_seed

from sb3_flipout import Checkpoints, resume
from sb3_flipout.envs import DeepSea
from sb3_flipout.policies.extractors import OneHotExtractor

CONFIRMING = 100  # seeds from here on had no part in the choice, but for CHOSEN_ON of deep_sea.py
MEMBERS, TRANSITIONS, GRADIENT_STEPS, PRIOR, LEARNING_RATE = 20, 64, 2, 0.35, 1e-3
ROWS = MEMBERS * TRANSITIONS
EPISODES_KEPT = 50  # episodes between checkpoints, at whose ends no episode is in its midst

#: Size, whether it is deterministic, and the cap of episodes.
TASKS: dict[str, tuple[int, bool, int]] = {
    **{
        f"sea-{size}": (size, True, cap)
        for size, cap in ((6, 1000), (10, 1000), (20, 2000), (30, 3000), (50, 3000), (100, 6000))
    },
    **{f"stochastic-{size}": (size, False, 3000) for size in (10, 20)},
}
SEEDS = {"sea-30": 5, "sea-50": 5, "sea-100": 3, "stochastic-10": 5, "stochastic-20": 5}  # where it is not ten


def ages(held: int, count: int, newest: bool) -> np.ndarray:
    """
    Draw how many transitions ago what is sampled was stored: evenly, or half of them so that the logarithm of the age is even,
    as many one to ten steps old as ten to a hundred, or ten thousand to a hundred thousand.
    """
    found = np.random.randint(0, held, size=count)
    if newest:
        half = found[: count // 2]
        half[:] = held ** np.random.random(len(half)) - 1
    return found


class NewestOftener(ReplayBuffer):
    """
    Replay that samples the newest transitions oftener, see :func:`ages`: what an episode has found is learned from in the next
    ones, however much the buffer holds, and nothing is forgotten.
    """

    def sample(self, batch_size: int, env: Any = None) -> Any:
        return self._get_samples((self.pos - 1 - ages(self.size(), batch_size, True)) % self.buffer_size, env=env)


def falling(steps: int, power: float, first: int = 10_000) -> Callable[[float], float]:
    """
    Let the learning rate fall as one over a power of the environment steps, after the first ones. At a given step it does
    not depend on the length of the run.

    :param steps: Steps of the whole run
    :param power: Power
    :param first: Steps before it falls
    :return: Learning rate by the share of the run that is left, as SB3 takes it
    """
    return lambda left: LEARNING_RATE * min(1.0, (first / max(1.0, (1 - left) * steps)) ** power)


def dropping(steps: int, first: int = 0) -> Callable[[float], float]:
    """
    Learn with 3e-4 up to environment step 200,000, and with a third of it from there on; the first steps with 1e-3.

    :param steps: Steps of the whole run
    :param first: How many first steps
    :return: Learning rate by the share of the run that is left, as SB3 takes it
    """

    def rate(left: float) -> float:
        step = (1 - left) * steps
        return LEARNING_RATE if step < first else 3e-4 if step < 200_000 else 1e-4

    return rate


_ENSEMBLE: dict[str, Any] = dict(members=MEMBERS, prior_scale=PRIOR, keys_per_transition=MEMBERS)
_LEARNED = dict(learn_sigma=True, schedule="constant")
_NOISYNET = dict(**_LEARNED, family="factorised", noise_sharing="shared")
_GREEDY: dict[str, Any] = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
_TWICE = dict(**_GREEDY, replay_buffer_class=NewestOftener, batch_size=2 * ROWS)
OPTIMISM = 0.1  # a tenth of the treasure


class Arm(NamedTuple):
    """
    An arm of SB3's DQN.

    :param algorithm: Changes of the algorithm's arguments
    :param noise: ``policy_kwargs`` of the flipout policy; none for the stock one
    :param rate: Makes the learning rate by the environment steps of a whole run, where it falls
    :param optimism: Added to all values at the start
    """

    algorithm: dict[str, Any]
    noise: dict[str, Any]
    rate: Callable[[int], Callable[[float], float]] | None = None
    optimism: float = 0.0


ARMS = {
    "members": Arm(_GREEDY, _ENSEMBLE),
    "members, newest oftener": Arm({**_GREEDY, "replay_buffer_class": NewestOftener}, _ENSEMBLE),
    "members, slower": Arm({**_TWICE, "learning_rate": 3e-4}, _ENSEMBLE),
    "members, ever slower": Arm(_TWICE, _ENSEMBLE, partial(falling, power=0.5)),
    "members, soon slower": Arm(_TWICE, _ENSEMBLE, partial(falling, power=0.5, first=2_000)),
    "members, settling": Arm(_TWICE, _ENSEMBLE, partial(falling, power=1.0)),
    "members, slower, dropping": Arm(_TWICE, _ENSEMBLE, dropping),
    "members, dropping twice": Arm(_TWICE, _ENSEMBLE, partial(dropping, first=2_000)),
    "members, one key": Arm(_GREEDY, {**_ENSEMBLE, "keys_per_transition": 1}),
    "members, 10": Arm({**_GREEDY, "batch_size": 10 * TRANSITIONS}, {**_ENSEMBLE, "members": 10, "keys_per_transition": 10}),
    "members, no prior": Arm(_GREEDY, {**_ENSEMBLE, "prior_scale": 0.0}),
    "members, bootstrap": Arm(_GREEDY, {**_ENSEMBLE, "bootstrap": 0.5}),
    "members, reward noise": Arm(_GREEDY, {**_ENSEMBLE, "reward_noise": 0.1}),
    "members, bootstrap and reward noise": Arm(_GREEDY, {**_ENSEMBLE, "bootstrap": 0.5, "reward_noise": 0.1}),
    "members, optimism": Arm(_GREEDY, _ENSEMBLE, optimism=OPTIMISM),
    "flipout-step": Arm(_GREEDY, dict(**_LEARNED, resample="step")),
    "flipout-episode": Arm(_GREEDY, dict(**_LEARNED, resample="episode")),
    "noisynet-step": Arm(_GREEDY, dict(**_NOISYNET, resample="step")),
    "noisynet-episode": Arm(_GREEDY, dict(**_NOISYNET, resample="episode")),
    "epsilon": Arm(dict(exploration_initial_eps=1.0, exploration_final_eps=0.1), {}),
}
#: Arms that are written out in boot_dqn.py.
PLAIN = ("boot-dqn", "index-head")


class Run(NamedTuple):
    """One training run."""

    task: str
    arm: str
    seed: int


class NeverWrong(gym.Wrapper[Any, Any, Any, Any]):
    """
    Say that the goal is reached where no action left the diagonal, on which the treasure is: slips are nobody's fault, and
    after one of them left is as good as right, or better. So does bsuite count its bad episodes.
    """

    def reset(self, **kwargs: Any) -> Any:
        self._right = True
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> Any:
        sea: Any = self.env
        on_diagonal = sea._row == sea._column
        self._right &= not on_diagonal or int(action) == int(sea.action_mapping[sea._row, sea._column])
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "reached_goal": self._right}


def sea(run: Run) -> gym.Env[Any, Any]:
    size, deterministic, _ = TASKS[run.task]
    made = DeepSea(size, mapping_seed=run.seed, deterministic=deterministic, integer_observations=True)
    return made if deterministic else NeverWrong(made)


def build(run: Run) -> DQN:
    size, _, cap = TASKS[run.task]
    arm = ARMS[run.arm]
    env = make_vec_env(lambda: sea(run), seed=run.seed)
    network = dict(net_arch=[50], features_extractor_class=OneHotExtractor, features_extractor_kwargs=dict(features_dim=50))
    settings: dict[str, Any] = dict(
        learning_rate=LEARNING_RATE if arm.rate is None else arm.rate(cap * size),
        batch_size=ROWS,
        buffer_size=cap * size,  # all of a run: what is forgotten would be searched again
        learning_starts=100,
        train_freq=1,
        gradient_steps=GRADIENT_STEPS,
        target_update_interval=4,
        gamma=0.99,
        exploration_fraction=min(1.0, 100 / cap),  # of those that explore so
    )
    policy = "FlipoutMlpPolicy" if arm.noise else "MlpPolicy"
    settings |= dict(arm.algorithm, policy_kwargs={**network, **arm.noise}, seed=run.seed, device="cpu")
    model = DQN(policy, env, **settings)
    model.set_logger(Logger(folder=None, output_formats=[]))
    if arm.optimism:
        with th.no_grad():
            for net in (model.q_net, model.q_net_target):
                net.q_net[-1].bias += arm.optimism
    return model


class Kept(Watch):
    """A watch whose record is the model's, and saved with it: a run that was stopped goes on from its checkpoint."""

    def _init_callback(self) -> None:
        known: dict[str, Any] = self.model.__dict__
        self.goals = known.setdefault("goals", self.goals)
        self.cpu_before = known.setdefault("cpu_seconds", 0.0)
        self.begun_at = known.setdefault("begun_at", made_with()["commit"])
        self._begun = time.process_time()

    def _on_step(self) -> bool:
        self.model.__dict__["cpu_seconds"] = self.cpu_before + time.process_time() - self._begun
        return super()._on_step()


def begun(run: Run, folder: Path) -> DQN:
    """
    Take a run up where it was stopped, or begin it.

    :param run: Run
    :param folder: Its checkpoints
    :return: Model; its replay buffer lacks the last step before the checkpoint, which SB3 had not stored yet
    """
    try:
        model: Any = resume(folder, make_vec_env(lambda: sea(run), seed=run.seed), device="cpu")
    except FileNotFoundError:
        return build(run)
    set_random_seed(run.seed + model.num_timesteps)  # what the replay buffer samples by is not saved, nor are slips
    model.get_env().seed(run.seed + model.num_timesteps)
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model


def train(run: Run, keep: Path | None = None) -> Row:
    th.set_num_threads(1)
    # Adam's moments of a cell that is not sampled any more stay denormal for ever: some processors take twenty times as long.
    th.set_flush_denormal(True)
    _, deterministic, cap = TASKS[run.task]
    cpu = time.process_time()
    made = _train_plain(run) if run.arm in PLAIN else _train_sb3(run, keep)
    goals: GoalRecord = made.pop("goals")
    episodes = 1 if deterministic else 30
    good = _good_share(run, made.pop("act"), episodes) > 0.9
    return dict(
        **run._asdict(),
        cap=cap,
        episodes=goals.episodes,
        first_good=goals.first_success,
        learned=goals.learned,
        solved=goals.learned if good else None,
        cpu_seconds=round(made.pop("cpu_before", 0.0) + time.process_time() - cpu, 1),
        **made,
        **made_with(),
    )


def _train_sb3(run: Run, keep: Path | None) -> dict[str, Any]:
    size, _, cap = TASKS[run.task]
    watch = Kept(cap)
    if keep is None:
        model = build(run)
        model.learn(cap * size, callback=watch)
    else:
        folder = keep / f"{run.task}, {run.arm}, {run.seed}"
        model = begun(run, folder)
        saves = Checkpoints(folder, every=EPISODES_KEPT * size)
        model.learn(cap * size - model.num_timesteps, callback=[watch, saves], reset_num_timesteps=False)
    return dict(
        goals=watch.goals,
        cpu_before=watch.cpu_before,
        begun_at=watch.begun_at,
        act=lambda obs: int(np.asarray(model.predict(np.array([obs]), deterministic=True)[0])[0]),
        rows_per_step=model.batch_size * GRADIENT_STEPS,
        **sizes(model),
        settings=dict(
            gradient_steps=GRADIENT_STEPS,
            batch_size=model.batch_size,
            learning_rate="falling" if callable(model.learning_rate) else model.learning_rate,
        ),
    )


def sizes(model: DQN) -> Row:
    """Parameters, learned and all with those of target and prior, and the bytes of the whole replay buffer."""
    arrays = [value for value in vars(model.replay_buffer).values() if isinstance(value, np.ndarray)]
    return dict(
        learned_parameters=sum(p.numel() for p in model.q_net.parameters() if p.requires_grad),
        all_parameters=sum(p.numel() for p in [*model.policy.parameters(), *model.policy.buffers()]),
        buffer_bytes=sum(array.nbytes for array in arrays),
    )


def _train_plain(run: Run) -> dict[str, Any]:
    size, _, cap = TASKS[run.task]
    th.manual_seed(run.seed)
    kind = boot_dqn.Ensemble if run.arm == "boot-dqn" else boot_dqn.IndexHead
    members = (MEMBERS,) if run.arm == "boot-dqn" else ()
    agent, goals = kind(size * size, 2, *members, PRIOR), GoalRecord()

    def finished(good: bool) -> bool:
        goals.add(good)
        return goals.learned is not None or goals.episodes >= cap

    work = dict(gradient_steps=GRADIENT_STEPS, learning_rate=LEARNING_RATE)
    boot_dqn.learn(agent, sea(run), run.seed, cap * size, finished, TRANSITIONS, MEMBERS, **work)
    return dict(
        goals=goals,
        act=lambda obs: int(boot_dqn.vote(agent, th.tensor([int(obs)]), MEMBERS)[0]),
        rows_per_step=ROWS * GRADIENT_STEPS,
        learned_parameters=sum(p.numel() for p in agent.parameters() if p.requires_grad),
        all_parameters=2 * sum(p.numel() for p in agent.parameters()),  # the target network's too
        buffer_bytes=cap * size * 32,
        settings=dict(batch_size=TRANSITIONS, **work),
    )


def _good_share(run: Run, act: Any, episodes: int) -> float:
    env, good = sea(run), []
    for episode in range(episodes):
        obs, _ = env.reset(seed=10_000 + run.seed if episode == 0 else None)
        terminated, info = False, {}
        while not terminated:
            obs, _, terminated, _, info = env.step(act(obs))
        good.append(info["reached_goal"])
    return float(np.mean(good))
