"""Does PPO learn as well through flipout networks? CartPole-v1 and Acrobot-v1, rl-zoo hyperparameters, mean weights.

    python benchmarks/learning_on_policy.py --task CartPole-v1 Acrobot-v1 --seeds 5 --jobs 2

Each arm trains for 100,000 steps per seed; the score is the mean return of the *mean weights* (deterministic=True) over 100
episodes on an environment of another seed. The interval is a 95 % bootstrap (BCa) of the difference of means over seeds.
"""

from __future__ import annotations

from typing import Any

import torch as th
from learning import run
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

import sb3_flipout  # noqa: F401  (registers the policies)

HEADER = """# Learning with PPO

`python benchmarks/learning_on_policy.py`: 100,000 steps, rl-zoo's hyperparameters, score of the **mean weights** over 100
episodes, five seeds. Arms but `stock` are `FlipoutMlpPolicy` with the defaults of 2026-11-21 (learned sigma, constant noise)
and what their name says; [those of today](defaults.md) were chosen after it.

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

#: What the defaults were when this was run; benchmarks/defaults.py has those of today.
_BEFORE: dict[str, Any] = dict(sigma_init=0.5, learn_sigma=True, schedule="constant")

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("MlpPolicy", {}),
    "flipout": ("FlipoutMlpPolicy", dict(_BEFORE)),
    # Variants of one setting each, for the choice of defaults.
    "flipout-episode": ("FlipoutMlpPolicy", dict(_BEFORE, resample="episode")),
    "flipout-rollout": ("FlipoutMlpPolicy", dict(_BEFORE, resample="rollout")),
    "flipout-heads": ("FlipoutMlpPolicy", dict(_BEFORE, perturb="heads")),
    "flipout-fixed-base": ("FlipoutMlpPolicy", dict(_BEFORE, base_every_rollouts=None)),
    "flipout-fixed-sigma": ("FlipoutMlpPolicy", {**_BEFORE, "learn_sigma": False}),
    "flipout-multiplicative": ("FlipoutMlpPolicy", dict(_BEFORE, family="multiplicative")),
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


def main() -> None:
    run(__doc__, train, TASKS, ARMS, ["stock", "flipout"], 100_000, HEADER, "docs/benchmarks/learning_on_policy.json")


if __name__ == "__main__":
    main()
