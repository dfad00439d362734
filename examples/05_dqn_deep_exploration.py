"""Deep exploration: DQN with an implicit ensemble finds the treasure of DeepSea, which epsilon-greedy misses.

    python examples/05_dqn_deep_exploration.py [--size 10] [--episodes 1000] [--seed 0] [--compare]

DeepSea (Osband et al.) is a grid of size x size cells. One sequence of actions out of 2^size leads to a reward of 1, and
each step of it costs a little, so a learner that tries actions at random learns to stay away. With `members=10` there are
10 keys, and so 10 value functions out of one network; each has a random prior of its own, and each episode follows one of
them. Where the data say nothing, the members disagree, and one of them is curious enough to go and look.

You should see after how many episodes the goal is learned (more than 90 of the last 100 episodes reach it), and that the
members agree in states that were visited and disagree in those that were not. --compare runs DQN with epsilon-greedy for
as many episodes as the ensemble has needed.
"""

import argparse
import time
from collections import Counter, deque

import numpy as np
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

import sb3_flipout  # noqa: F401  (gives DQN the policy names "FlipoutMlpPolicy" and so on)
from sb3_flipout.envs import DeepSea

WINDOW, NEEDED = 100, 90
DQN_SETTINGS = dict(
    learning_rate=1e-3,
    batch_size=64,
    buffer_size=50_000,
    learning_starts=100,
    train_freq=1,
    target_update_interval=4,  # a value moves one cell per update of the target network
    device="cpu",
)
NET = dict(net_arch=[50, 50])
MEMBERS = dict(members=10, prior_scale=0.35)  # and so noise that is held for an episode; docs/choosing.md has what is faster


class UntilLearned(BaseCallback):
    """Count visits and episodes that reach the goal; stop when enough of them do, or at the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.last: deque[bool] = deque(maxlen=WINDOW)
        self.visits: Counter[int] = Counter()  # cell -> how often an action was taken in it
        self.episodes = self.reached = 0
        self.first: int | None = None
        self.learned = False

    def _on_step(self) -> bool:
        self.visits[int(self.model._last_obs[0].argmax())] += 1
        if self.locals["dones"][0]:
            reached = bool(self.locals["infos"][0]["reached_goal"])
            self.last.append(reached)
            self.episodes += 1
            self.reached += reached
            if reached and self.first is None:
                self.first = self.episodes
            self.learned = sum(self.last) > NEEDED
        return not self.learned and self.episodes < self.limit


def train(name: str, size: int, seed: int, limit: int, policy: str, **kwargs: object) -> tuple[DQN, UntilLearned]:
    env = make_vec_env(lambda: DeepSea(size, mapping_seed=0), seed=seed)
    model = DQN(policy, env, seed=seed, **DQN_SETTINGS, **kwargs)
    watch = UntilLearned(limit)
    start = time.perf_counter()
    model.learn(limit * size, callback=watch)
    seconds = time.perf_counter() - start
    verdict = f"learned after {watch.episodes}" if watch.learned else f"not learned within {watch.episodes}"
    first = "" if watch.first is None else f", first in episode {watch.first}"
    print(f"{name:14s} {verdict} episodes; goal reached {watch.reached} times{first}; {seconds:.0f} s")
    return model, watch


def disagreement(model: DQN, size: int, visits: Counter[int]) -> None:
    """How far the members' values are apart: standard deviation over members, mean over actions."""
    states = np.eye(size * size, dtype=np.float32)  # every cell, as the agent sees it
    values = model.policy.member_values(states)  # (members, states, actions)
    spread = values.std(dim=0).mean(dim=1).numpy()
    visited = np.array([visits[cell] > 0 for cell in range(size * size)])

    start, corner = 0, size - 1  # the agent falls one row a step, so it never sees the top right cell
    print(f"\nDisagreement of the {len(values)} members (standard deviation of their values)")
    print(f"   visited state, top left      {spread[start]:.3f}   ({visits[start]} visits)")
    print(f"   unvisited state, top right   {spread[corner]:.3f}   ({visits[corner]} visits)")
    print(f"   mean over {visited.sum():3d} visited states     {spread[visited].mean():.3f}")
    print(f"   mean over {(~visited).sum():3d} unvisited states   {spread[~visited].mean():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=10, help="rows and columns of DeepSea (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=1000, help="give up after so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--compare", action="store_true", help="run epsilon-greedy for as many episodes")
    arguments = parser.parse_args()
    size, seed = arguments.size, arguments.seed
    th.set_num_threads(1)  # the nets are small

    print(f"DeepSea {size} x {size}; learned: more than {NEEDED} of the last {WINDOW} episodes reach the goal")
    no_epsilon = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    kwargs = dict(policy_kwargs={**NET, **MEMBERS}, **no_epsilon)
    model, watch = train(f"{MEMBERS['members']} members", size, seed, arguments.episodes, "FlipoutMlpPolicy", **kwargs)
    if arguments.compare:
        # From 1 to 0.1 over the first 100 episodes.
        epsilon = dict(exploration_fraction=min(1.0, 100 / watch.episodes), exploration_final_eps=0.1)
        train("epsilon-greedy", size, seed, watch.episodes, "MlpPolicy", policy_kwargs=NET, **epsilon)
    disagreement(model, size, watch.visits)


if __name__ == "__main__":
    main()
