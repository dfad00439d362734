"""One training run of an algorithm of rl_zoo3 with its hyperparameters, stock or by weight noise, for the learning studies."""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch as th
from rl_zoo3.exp_manager import ExperimentManager
from runs import Row, made_with
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import sync_envs_normalization

import sb3_flipout  # noqa: F401  (registers the policies)
from sb3_flipout.diagnostics import sigmas
from sb3_flipout.layers import FlipoutLayer

TEST_SEED = 10_000  # far from training's seeds


@dataclass(frozen=True)
class Task:
    """An algorithm on an environment, with rl_zoo3's hyperparameters but for what is said here."""

    algo: str
    env: str
    steps: int = 0  # 0: as many as rl_zoo3 says
    config: str | None = None  # another file than rl_zoo3's own
    changes: dict[str, Any] = field(default_factory=dict)  # in all arms
    flipout_changes: dict[str, Any] = field(default_factory=dict)  # in the arms with weight noise
    episodes: int = 100  # of the evaluation


class Run(NamedTuple):
    """One training run."""

    task: str
    arm: str
    seed: int


class Manager(ExperimentManager):
    """rl_zoo3's, with changes that reach into policy_kwargs; ``None`` takes a hyperparameter away."""

    changes: dict[str, Any]
    policy_kwargs: dict[str, Any]

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        found, saved = super().read_hyperparameters()
        found.update(self.changes)
        found = {name: value for name, value in found.items() if value is not None}
        written = found.get("policy_kwargs", {})
        # As rl_zoo3 does itself with this text, which is Python.
        written = eval(written) if isinstance(written, str) else written
        found["policy_kwargs"] = {**written, **self.policy_kwargs}
        return found, saved


def build(task: Task, changes: dict[str, Any], policy_kwargs: dict[str, Any], seed: int, folder: str) -> tuple[Manager, Any]:
    manager = Manager(
        argparse.Namespace(),
        task.algo,
        task.env,
        folder,
        n_timesteps=task.steps,
        eval_freq=-1,
        seed=seed,
        verbose=0,
        device="cpu",
        config=task.config,
    )
    manager.changes, manager.policy_kwargs = changes, policy_kwargs
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        made = manager.setup_experiment()
    assert made is not None
    return manager, made[0]


def evaluate(manager: Manager, model: Any, seed: int, episodes: int) -> list[float]:
    """Give the returns of the mean weights in new episodes."""
    manager.seed = TEST_SEED + seed
    with contextlib.redirect_stdout(io.StringIO()):
        env = manager.create_envs(10, eval_env=True, no_log=True)
    if model.get_vec_normalize_env() is not None:
        sync_envs_normalization(model.get_env(), env)
    returns, _ = evaluate_policy(model, env, episodes, deterministic=True, return_episode_rewards=True)
    env.close()
    return [float(value) for value in returns]


def train(task: Task, run: Run, changes: dict[str, Any], policy_kwargs: dict[str, Any], callback: Any = None) -> Row:
    """Train, and judge the mean weights."""
    th.set_num_threads(1)  # the networks are small: more threads only get into other runs' way
    cpu = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        manager, model = build(task, changes, policy_kwargs, run.seed, folder)
        before = mean_sigmas(model.policy)
        model.learn(manager.n_timesteps, callback=callback)
        returns = evaluate(manager, model, run.seed, task.episodes)
        model.get_env().close()
    growth = {name: round(sigma / before[name], 3) for name, sigma in mean_sigmas(model.policy).items() if before[name]}
    return dict(
        **run._asdict(),
        score=float(np.mean(returns)),
        worst=min(returns),
        steps=manager.n_timesteps,
        cpu_seconds=round(time.process_time() - cpu, 1),
        noise=asdict(model.policy.noise_settings) if growth else None,
        sigma_growth=growth or None,
        **made_with(),
    )


def mean_sigmas(policy: Any) -> dict[str, float]:
    """Give the mean size of sigma of each layer that has it; nothing of a stock policy."""
    found = {name: sigmas(layer) for name, layer in policy.named_modules() if isinstance(layer, FlipoutLayer)}
    return {name: float(sigma.mean()) for name, sigma in found.items() if sigma is not None}
