"""Does RecurrentPPO solve a task that needs memory as fast through a flipout LSTM? CartPole-v1 without velocities.

    python benchmarks/memory.py --jobs 2

rl-zoo's settings for CartPoleNoVel-v1 in all arms (PPO without memory: the same without the LSTM), at most 100,000 steps.
Every 4,096 steps the *mean weights* are judged over 20 episodes on environments of another seed; a run is solved at the first
mean return of 475 or more, and stops there. A run that is not solved counts as more than 100,000.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from learning import Row, run
from rl_zoo3.wrappers import MaskVelocityWrapper
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

import sb3_flipout  # noqa: F401  (registers the policies)

SOLVED, EVERY = 475.0, 4096

HEADER = f"""# CartPole-v1 without velocities: RecurrentPPO

`python benchmarks/memory.py --jobs 2`: rl-zoo's settings for CartPoleNoVel-v1, noise at its defaults, chosen on none of these
seeds. Solved: the **mean weights** reach a mean return of
{SOLVED:.0f} over 20 episodes, judged every {EVERY} steps.

"""

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


def train(task: str, arm: str, seed: int, steps: int) -> Row:
    th.set_num_threads(1)
    algorithm, policy, policy_kwargs = ARMS[arm]
    env = VecNormalize(make_vec_env(make_env, n_envs=8, seed=seed))
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
        seed=seed,
        device="cpu",
    )
    watch = UntilSolved(seed)
    model.learn(steps, callback=watch)
    at, last = watch.scores[-1]
    best = max(score for _, score in watch.scores)
    return dict(task=task, arm=arm, seed=seed, steps=steps, solved_at=at if last >= SOLVED else None, best=best)


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


def main() -> None:
    arms = ["stock", "flipout", "ppo"]
    run(__doc__, train, ["CartPole-without-velocities"], ARMS, arms, 100_000, HEADER, "docs/benchmarks/memory.json", table)


if __name__ == "__main__":
    main()
