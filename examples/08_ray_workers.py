"""An evolution strategy whose population plays in several processes, or on a cluster: FlipES on Ray.

    pip install ".[ray]"
    python examples/08_ray_workers.py [--workers 2] [--generations 30]

You should see the fitness rise, and the same numbers with any number of workers. On a cluster, run it where Ray's head is,
with RAY_ADDRESS set.
"""

import argparse

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout import FlipES
from sb3_flipout.evolution import RayWorkers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--generations", type=int, default=30)
args = parser.parse_args()


def make_env():
    return make_vec_env("CartPole-v1", 16)


class Tell(BaseCallback):
    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        print(f"generation {self.model._n_updates + 1:3}, {self.num_timesteps:8,} steps: {sum(returns) / len(returns):5.1f}")


with RayWorkers(make_env, args.workers, members_per_chunk=16) as workers:
    model = FlipES("FlipoutMlpPolicy", make_env(), 0.1, population_size=64, workers=workers, seed=0, device="cpu")
    for _ in range(args.generations):
        model.learn(1, callback=Tell(), reset_num_timesteps=False)
