"""Who finds the goal of MountainCarContinuous-v0, and who has learned it at the end? PPO: stock, gSDE, and flipout.

    python benchmarks/mountain_car_continuous.py --jobs 2         # goes on where it was stopped
    python benchmarks/mountain_car_continuous.py --report

40,000 steps, 4 environments, VecNormalize, the same settings in all arms. First success: environment steps, over all
environments, until an episode first reaches the goal; a run without one counts as its cap. Score: mean return of the *mean
weights* over 50 episodes at the end, on environments of another seed. SAC and TD3: `sparse_control.py`.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch as th
from runs import Row, execute, left_of, made_with, options, read, versions_of
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

import sb3_flipout  # noqa: F401  (registers the policies)

ENV, STEPS = "MountainCarContinuous-v0", 40_000

PPO_SETTINGS: dict[str, Any] = dict(
    n_steps=256,
    batch_size=256,
    n_epochs=10,
    gamma=0.9999,
    gae_lambda=0.9,
    learning_rate=3e-4,
    clip_range=0.1,
    ent_coef=0.004,
    vf_coef=0.19,
    max_grad_norm=5,
)


def _flipout(sigma_init: float, **noise: Any) -> dict[str, Any]:
    return dict(policy="FlipoutMlpPolicy", policy_kwargs=dict(sigma_init=sigma_init, resample="episode", **noise))


_FALLS: dict[str, Any] = dict(schedule="linear", schedule_fraction=0.6)

#: Arguments of the algorithm, by arm.
ARMS: dict[str, dict[str, Any]] = {
    "stock": dict(policy="MlpPolicy"),
    "gsde": dict(policy="MlpPolicy", use_sde=True),
    "recipe": _flipout(2.0, **_FALLS),
    "recipe-1": _flipout(1.0, **_FALLS),
    "constant": _flipout(2.0, schedule="constant"),
}


class FirstSuccess(BaseCallback):
    """Note the step of the first success."""

    first: int | None = None

    def _on_step(self) -> bool:
        for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
            if done and not info["TimeLimit.truncated"] and self.first is None:
                self.first = self.num_timesteps
        return True


class Run(NamedTuple):
    """One training run."""

    arm: str
    seed: int


def train(run: Run) -> Row:
    th.set_num_threads(1)
    env = VecNormalize(make_vec_env(ENV, n_envs=4, seed=run.seed))
    success = FirstSuccess()
    model = PPO(env=env, seed=run.seed, device="cpu", **PPO_SETTINGS, **deepcopy(ARMS[run.arm]))
    model.learn(STEPS, callback=success)
    judged = VecNormalize(make_vec_env(ENV, n_envs=10, seed=1000 + run.seed), training=False, norm_reward=False)
    judged.obs_rms = env.obs_rms
    score = float(evaluate_policy(model, judged, n_eval_episodes=50, deterministic=True)[0])
    return dict(**run._asdict(), first_success=success.first, cap=STEPS, score=score, **made_with())


def report(rows: list[Row]) -> str:
    return f"""# MountainCarContinuous-v0: finding the goal, and learning it

Made by `python benchmarks/mountain_car_continuous.py --report` from [the runs](mountain_car_continuous.jsonl)
({versions_of(rows)}).

The reward is +100 at the goal and minus the squared action on the way, so an agent that does not find the goal learns to
stand still, at 0. PPO, 40,000 steps, 4 environments.

`recipe` is what the handbook advises: `sigma_init=2.0, resample="episode", schedule="linear", schedule_fraction=0.6`, the
other noise settings at their defaults. `VecNormalize` and PPO's settings, which stand in the script, are the same in all arms.
The recipe was chosen on seeds 0 to 4, and confirmed on seeds 200 to 209, below. `recipe-1` is the same with
sigma 1, `constant` with noise that does not fall.

Under constant noise the perturbed policies reach the goal and the mean weights need not: PPO raises the return of the policies
that act, and those are perturbed. While each episode's noise pushes the car up by itself, the mean weights need not learn to.
Falling noise takes that push away step by step, and they have to take it over. `NoiseEvalCallback` warns when the mean weights
stay behind the sampled ones.

{table(rows)}
"""


def table(rows: list[Row]) -> str:
    lines = [
        "| arm | first success per seed | median | score of mean weights per seed | mean |",
        "|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        found = [row for row in rows if row["arm"] == arm]
        first = [row["first_success"] or row["cap"] for row in found]
        words = ", ".join(str(row["first_success"] or f">{row['cap']}") for row in found)
        scores = [row["score"] for row in found]
        ends = f"{', '.join(f'{score:.1f}' for score in scores)} | {np.mean(scores):.1f}"
        lines.append(f"| {arm} | {words} | {np.median(first):.0f} | {ends} |")
    return "\n".join(lines)


def main() -> int:
    parser = options(__doc__, "docs/benchmarks/mountain_car_continuous.jsonl", 10, 200)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        return 0
    runs = [Run(arm, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for arm in args.arms]
    return execute(train, left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    return f"{row['arm']}, {row['seed']}: {row['first_success']}, {row['score']:.1f}"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
