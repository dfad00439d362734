"""Does PPO learn as well through flipout networks? CartPole-v1 and Acrobot-v1, rl-zoo hyperparameters, mean weights.

    python benchmarks/learning_on_policy.py --task CartPole-v1 Acrobot-v1 --seeds 5 --jobs 2

Each arm trains for 100,000 steps per seed; the score is the mean return of the *mean weights* (deterministic=True) over 100
episodes on an environment of another seed. The interval is a 95 % bootstrap (BCa) of the difference of means over seeds.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

import sb3_flipout  # noqa: F401  (registers the policies)

HEADER = """# Learning with PPO

`python benchmarks/learning_on_policy.py`: 100,000 steps, rl-zoo's hyperparameters, score of the **mean weights** over 100
episodes, five seeds. Arms but `stock` are `FlipoutMlpPolicy` with `sigma_init=0.5` and what their name says.

"""


def linear(initial: float) -> Any:
    return lambda progress_remaining: progress_remaining * initial


# rl_zoo3's hyperparams/ppo.yml, but for the 100,000 steps of Acrobot (there 1e6).
TASKS: dict[str, dict[str, Any]] = {
    "CartPole-v1": dict(
        n_envs=8,
        normalize=False,
        algorithm=dict(n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20, ent_coef=0.0),
        schedules=dict(learning_rate=0.001, clip_range=0.2),
    ),
    "Acrobot-v1": dict(
        n_envs=16,
        normalize=True,
        algorithm=dict(n_steps=256, gae_lambda=0.94, gamma=0.99, n_epochs=4, ent_coef=0.0),
        schedules={},
    ),
}

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("MlpPolicy", {}),
    "flipout": ("FlipoutMlpPolicy", dict(sigma_init=0.5)),
    # Variants of one setting each, for the choice of defaults.
    "flipout-episode": ("FlipoutMlpPolicy", dict(sigma_init=0.5, resample="episode")),
    "flipout-rollout": ("FlipoutMlpPolicy", dict(sigma_init=0.5, resample="rollout")),
    "flipout-heads": ("FlipoutMlpPolicy", dict(sigma_init=0.5, perturb="heads")),
    "flipout-fixed-base": ("FlipoutMlpPolicy", dict(sigma_init=0.5, base_every=None)),
    "flipout-fixed-sigma": ("FlipoutMlpPolicy", dict(sigma_init=0.5, learn_sigma=False)),
    "flipout-multiplicative": ("FlipoutMlpPolicy", dict(sigma_init=0.5, family="multiplicative")),
}


def train(task: str, arm: str, seed: int, steps: int) -> dict[str, Any]:
    th.set_num_threads(1)
    setting, (policy, policy_kwargs) = TASKS[task], ARMS[arm]
    env = make_vec_env(task, n_envs=setting["n_envs"], seed=seed)
    env = VecNormalize(env) if setting["normalize"] else env
    schedules = {name: linear(value) for name, value in setting["schedules"].items()}
    model = PPO(policy, env, seed=seed, policy_kwargs=policy_kwargs, **setting["algorithm"], **schedules)
    model.learn(steps)
    test_env: Any = make_vec_env(task, n_envs=10, seed=1000 + seed)
    if setting["normalize"]:
        test_env = VecNormalize(test_env, training=False, norm_reward=False)
        test_env.obs_rms = env.obs_rms
    score, spread = evaluate_policy(model, test_env, n_eval_episodes=100, deterministic=True)
    return dict(task=task, arm=arm, seed=seed, steps=steps, score=score, spread=spread)


def difference_interval(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def mean_difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.mean(a, axis=axis) - np.mean(b, axis=axis)

    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return float(ours[0] - theirs[0]), float(ours[0] - theirs[0])
    result = bootstrap((ours, theirs), mean_difference, n_resamples=20_000, method="percentile", rng=0)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def report(rows: list[dict[str, Any]]) -> str:
    lines = ["| task | arm | score per seed | mean |", "|---|---|---|---|"]
    scores = {}
    for task, arm in dict.fromkeys((row["task"], row["arm"]) for row in rows):
        found = np.array([row["score"] for row in rows if (row["task"], row["arm"]) == (task, arm)])
        scores[task, arm] = found
        lines.append(f"| {task} | {arm} | {', '.join(f'{score:.1f}' for score in found)} | {found.mean():.1f} |")
    for task, arm in scores:
        if arm != "stock" and (task, "stock") in scores:
            stock, ours = scores[task, "stock"], scores[task, arm]
            low, high = difference_interval(ours, stock)
            loss = 0.1 * abs(stock.mean())
            lines.append(
                f"\n{task}: {arm} - stock, 95 % interval [{low:.1f}, {high:.1f}]; a loss of 10 % would be {-loss:.1f}: "
                f"{'excluded' if low > -loss else 'not excluded'}."
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=["stock", "flipout"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="to confirm, on seeds that nothing was chosen by")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/learning_on_policy.json"))
    args = parser.parse_args()
    runs = list(product(args.task, args.arm, range(args.first_seed, args.first_seed + args.seeds)))
    with ProcessPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(train, *run, args.steps) for run in runs]
        rows = []
        for future in futures:
            rows.append(future.result())
            print(rows[-1], flush=True)
    if args.out.exists():  # runs of other arms and tasks are kept, so that a table can grow over several calls
        fresh = {(row["task"], row["arm"], row["seed"]) for row in rows}
        rows = [row for row in json.loads(args.out.read_text()) if (row["task"], row["arm"], row["seed"]) not in fresh] + rows
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(HEADER + report(rows) + "\n")
    print(report(rows))


if __name__ == "__main__":
    main()
