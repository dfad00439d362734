"""One run of the exploration benchmark: training until the goal is learned, and what of it is recorded."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import torch as th
from exploration_tasks import EXTRACTORS, TASKS, Run, settings
from runs import Row, made_with
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger

from sb3_flipout.callbacks import AnnealNoise

WINDOW, NEEDED = 100, 90  # learned: more than NEEDED of the last WINDOW episodes reach the goal
CURVE_POINTS = 30
TEST_SEED = 10_000  # far from training's seeds


class GoalRecord:
    """Training episodes in the order of their ends: how many, the first that reached the goal, and when enough did."""

    def __init__(self) -> None:
        self.episodes = 0
        self.first_success: int | None = None
        self.learned: int | None = None  # the episode with which the training criterion was first met
        self._last: deque[bool] = deque(maxlen=WINDOW)

    def add(self, reached: bool) -> None:
        self.episodes += 1
        self._last.append(reached)
        if reached and self.first_success is None:
            self.first_success = self.episodes
        if self.learned is None and len(self._last) == WINDOW and sum(self._last) > NEEDED:
            self.learned = self.episodes


class Watch(BaseCallback):
    """Record training episodes, and stop when the goal is learned or the cap is reached."""

    def __init__(self, cap: int | None) -> None:
        super().__init__()
        self.cap = cap
        self.goals = GoalRecord()
        self.returns: list[tuple[int, float]] = []  # (steps so far, return)

    def _on_step(self) -> bool:
        for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
            # Environments that end with the same step stand in a fixed order; none is counted beyond the end of the run.
            if done and not self._finished():
                self.goals.add(bool(info.get("reached_goal", False)))
                self.returns.append((self.num_timesteps, float(info["episode"]["r"])))
        return not self._finished()

    def _finished(self) -> bool:
        return self.goals.learned is not None or (self.cap is not None and self.goals.episodes >= self.cap)


def build(run: Run) -> DQN:
    chosen, task = settings(run), TASKS[run.task]
    policy_kwargs = dict(chosen["policy_kwargs"])
    if "features_extractor_class" in policy_kwargs:
        policy_kwargs["features_extractor_class"] = EXTRACTORS[policy_kwargs["features_extractor_class"]]
    env = make_vec_env(lambda: task.make(run.seed), n_envs=run.n_envs, seed=run.seed)
    model = DQN(chosen["policy"], env, **chosen["algorithm"], policy_kwargs=policy_kwargs, seed=run.seed, device="cpu")
    model.set_logger(Logger(folder=None, output_formats=[]))  # SB3's own leaves a directory in /tmp for each run
    return model


def evaluate(model: DQN, run: Run) -> tuple[float, float]:
    """Give the share of episodes in which the mean weights (with members: the vote) reach the goal, and their mean return."""
    task = TASKS[run.task]
    env = make_vec_env(lambda: task.make(run.seed), n_envs=min(10, task.evaluation_episodes), seed=TEST_SEED + run.seed)
    reached = []

    def note(of_step: dict[str, Any], _: dict[str, Any]) -> None:
        if of_step["done"]:
            reached.append(bool(of_step["info"].get("reached_goal", False)))

    score, _ = evaluate_policy(model, env, task.evaluation_episodes, deterministic=True, callback=note)
    env.close()
    return float(np.mean(reached)), float(score)


def curve(returns: list[tuple[int, float]], steps: int) -> list[list[float]]:
    """Thin training returns out to (steps, mean return of the episodes that ended in the steps up to there)."""
    parts: dict[int, list[float]] = {}
    for at, value in returns:
        parts.setdefault(-(-at * CURVE_POINTS // steps), []).append(value)
    return [[part * steps // CURVE_POINTS, round(float(np.mean(values)), 4)] for part, values in parts.items()]


def train(run: Run) -> Row:
    th.set_num_threads(1)  # the networks are small: more threads only get into other runs' way
    # Adam's moments of a unit that has died stay denormal for ever, over which some processors take many times as long.
    th.set_flush_denormal(True)
    task, chosen = TASKS[run.task], settings(run)
    wall, cpu = time.perf_counter(), time.process_time()
    model, watch = build(run), Watch(run.cap)
    annealing = [AnnealNoise(**chosen["anneal"])] if "anneal" in chosen else []
    model.learn(chosen["total_steps"], callback=[watch, *annealing])
    share, score = evaluate(model, run)
    has_goal = task.steps is None
    reached = share > NEEDED / WINDOW if has_goal else None
    goals = watch.goals
    return dict(
        **run._asdict(),
        episodes=goals.episodes,
        first_success_episode=goals.first_success,
        learned_episode=goals.learned,
        solved_episode=goals.learned if reached else None,
        evaluation_reached=reached,
        evaluation_return=score,
        env_steps=model.num_timesteps,
        wall_seconds=round(time.perf_counter() - wall, 2),
        cpu_seconds=round(time.process_time() - cpu, 2),
        curve=None if has_goal else curve(watch.returns, chosen["total_steps"]),
        settings=chosen,
        **made_with(),
    )
