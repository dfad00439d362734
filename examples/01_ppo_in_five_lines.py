"""PPO that explores by weight noise: the policy's name is all that differs from stock Stable-Baselines3.

    python examples/01_ppo_in_five_lines.py [--steps 15000]

You should see two scores on CartPole-v1 (a random policy gets about 22, the best is 500): that of the mean weights, which
is the policy you deploy, and that of actions sampled from it. In training the weights are perturbed anew at every step, less
and less over the first 30 % of it (policy_kwargs=dict(schedule="constant") keeps the noise).
"""

import argparse

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_flipout  # noqa: F401  (adds the policy names)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=15_000, help="environment steps (default: %(default)s)")
steps = parser.parse_args().steps
th.set_num_threads(1)  # the nets are small

env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
model = PPO("FlipoutMlpPolicy", env, n_steps=256, seed=0, device="cpu").learn(steps)

for name, deterministic in [("mean weights (deterministic=True)", True), ("sampled actions (deterministic=False)", False)]:
    score, spread = evaluate_policy(model, env, n_eval_episodes=20, deterministic=deterministic)
    print(f"{name:36s} {score:5.1f} +- {spread:.1f}")
