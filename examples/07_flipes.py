"""An evolution strategy in one batched forward pass: FlipES on a thousand environments that step in one call.

    python examples/07_flipes.py [--steps 700000]

You should see the return of the mean weights rise to 500, CartPole's most, within some five seconds on one core, without a
gradient through the network, at well over ten thousand environment steps per second.
"""

import argparse
import time

import gymnasium as gym
import torch as th
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from sb3_flipout.envs.vector import GymnasiumVecEnv
from sb3_flipout.evolution import FlipES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=700_000, help="environment steps (default: %(default)s)")
steps = parser.parse_args().steps
th.set_num_threads(1)

members = 128
env = VecMonitor(GymnasiumVecEnv(gym.make_vec("CartPole-v1", members, vectorization_mode="vector_entry_point")))
model = FlipES("FlipoutMlpPolicy", env, population_size=members, learning_rate=0.1, seed=0, device="cpu")
began, alone = time.perf_counter(), gym.make("CartPole-v1")
while model.num_timesteps < steps:
    model.learn(steps // 10, reset_num_timesteps=False)
    mean, _ = evaluate_policy(model, alone, n_eval_episodes=20, warn=False)
    seconds = time.perf_counter() - began
    print(f"generation {model._n_updates:3}, {model.num_timesteps:9,} steps, {seconds:5.1f} s: mean weights {mean:5.1f}")
print(f"{model.num_timesteps / seconds:,.0f} environment steps per second")
