"""Does RecurrentPPO solve a task that needs memory as fast through a flipout LSTM? CartPole-v1 without velocities.

    python benchmarks/memory.py --jobs 2                   # goes on where it was stopped
    python benchmarks/memory.py --report

rl-zoo's settings for CartPoleNoVel-v1 in all arms (PPO without memory: the same without the LSTM), at most 100,000 steps.
Every 4,096 steps the *mean weights* are judged over 20 episodes on environments of another seed; a run is solved at the first
mean return of 475 or more, and stops there. A run that is not solved counts as more than 100,000.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from rl_zoo3.wrappers import MaskVelocityWrapper
from runs import Row, execute, left_of, made_with, options, read, versions_of
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import sb3_flipout  # noqa: F401  (registers the policies)

SOLVED, EVERY, STEPS = 475.0, 4096, 100_000

_NETWORK = dict(ortho_init=False, activation_fn=nn.ReLU, net_arch=dict(pi=[64], vf=[64]))
_LSTM = dict(**_NETWORK, lstm_hidden_size=64, enable_critic_lstm=True)

#: Algorithm, policy, policy_kwargs, by arm.
ARMS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "stock": (RecurrentPPO, "MlpLstmPolicy", _LSTM),
    "flipout": (RecurrentPPO, "FlipoutMlpLstmPolicy", _LSTM),
    "flipout-episode": (RecurrentPPO, "FlipoutMlpLstmPolicy", dict(**_LSTM, resample="episode")),
    "ppo": (PPO, "MlpPolicy", _NETWORK),
}


def make_env() -> gym.Env[Any, Any]:
    return MaskVelocityWrapper(gym.make("CartPole-v1"))


class UntilSolved(BaseCallback):
    """Judge the mean weights now and then; stop once they solve the task."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.env = VecNormalize(make_vec_env(make_env, n_envs=10, seed=1000 + seed), training=False, norm_reward=False)
        self.scores: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        return not (self.scores and self.scores[-1][1] >= SOLVED)

    def _on_rollout_start(self) -> None:
        if self.num_timesteps // EVERY > len(self.scores):
            training = self.model.get_vec_normalize_env()
            assert training is not None
            self.env.obs_rms = training.obs_rms
            score, _ = evaluate_policy(self.model, self.env, n_eval_episodes=20, deterministic=True)
            self.scores.append((self.num_timesteps, float(score)))


def linear(initial: float) -> Any:
    return lambda progress_remaining: progress_remaining * initial


class Run(NamedTuple):
    """One training run."""

    arm: str
    seed: int


def train(run: Run) -> Row:
    th.set_num_threads(1)
    algorithm, policy, policy_kwargs = ARMS[run.arm]
    env = VecNormalize(make_vec_env(make_env, n_envs=8, seed=run.seed))
    model = algorithm(
        policy,
        env,
        n_steps=32,
        batch_size=256,
        gae_lambda=0.8,
        gamma=0.98,
        n_epochs=20,
        ent_coef=0.0,
        learning_rate=linear(0.001),
        clip_range=linear(0.2),
        policy_kwargs=dict(policy_kwargs),
        seed=run.seed,
        device="cpu",
    )
    watch = UntilSolved(run.seed)
    model.learn(STEPS, callback=watch)
    at, last = watch.scores[-1]
    best = max(score for _, score in watch.scores)
    return dict(**run._asdict(), steps=STEPS, solved_at=at if last >= SOLVED else None, best=best, **made_with())


def report(rows: list[Row]) -> str:
    return f"""# CartPole-v1 without velocities: RecurrentPPO

Made by `python benchmarks/memory.py --report` from [the runs](memory.jsonl) ({versions_of(rows)}).

rl-zoo's settings for CartPoleNoVel-v1, noise at its defaults, chosen on none of these seeds. Solved: the **mean weights**
reach a mean return of {SOLVED:.0f} over 20 episodes, judged every {EVERY} steps.

{table(rows)}
"""


def table(rows: list[Row]) -> str:
    lines = ["| arm | solved at step, per seed | median | best score per seed |", "|---|---|---|---|"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [row for row in rows if row["arm"] == arm]
        at = [row["solved_at"] or np.inf for row in found]
        words = [f">{row['steps']}" if row["solved_at"] is None else str(row["solved_at"]) for row in found]
        median = f"{np.median(at):.0f}" if np.isfinite(np.median(at)) else f">{found[0]['steps']}"
        best = ", ".join(f"{row['best']:.0f}" for row in found)
        lines.append(f"| {arm} | {', '.join(words)} | {median} | {best} |")
    return "\n".join(lines)


def main() -> int:
    parser = options(__doc__, "docs/benchmarks/memory.jsonl", 5, 100)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["stock", "flipout", "ppo"])
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        return 0
    runs = [Run(arm, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for arm in args.arms]
    return execute(train, left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    return f"{row['arm']}, {row['seed']}: {row['solved_at']}"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
