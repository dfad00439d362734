"""What does exploring by flipout cost DQN on Atari? Agent steps per second on Pong, arms in turn.

    taskset -c 1 python benchmarks/throughput_atari.py --rounds 15 --out docs/benchmarks/throughput_atari.md

One process, one torch thread, one environment for each arm. The settings are those of rl_zoo3 (batches of 32, one gradient
step for four agent steps) with a small buffer. Each arm first trains untimed until it learns; then all arms go on in blocks of
200 agent steps, in shuffled order: `learn` is what is timed, that is the emulator, acting, and the update.

- stock: "CnnPolicy" with epsilon 0.01, so that it hardly ever saves itself the forward pass
- stock, fused Adam: the same with torch's fused Adam, which flipout policies ask for
- linear: "FlipoutCnnPolicy", layers="linear" (convolutions without noise, as in NoisyNet), schedule="constant" and epsilon 0
- all: the same with perturb="all"
- the same two with family="factorised", which needs no base draw and multiplies nothing by sigma

Reading: "× stock" is the arm's median speed over stock's (below 1: slower); "paired" is the median of the ratios within
rounds, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch as th
from runs import head_of
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack
from throughput import HEAD, Speed, rows

from sb3_flipout.envs import atari_id  # importing the package registers the policies

ENV, BLOCK, LEARNING_STARTS = "PongNoFrameskip-v4", 200, 200

SETTINGS: dict[str, Any] = dict(
    learning_rate=1e-4,
    batch_size=32,
    buffer_size=2000,
    learning_starts=LEARNING_STARTS,
    target_update_interval=1000,
    train_freq=4,
    gradient_steps=1,
    exploration_fraction=0.1,
    device="cpu",
)


def _stock(**policy_kwargs: Any) -> dict[str, Any]:
    epsilon = dict(exploration_initial_eps=0.01, exploration_final_eps=0.01)
    return dict(policy="CnnPolicy", policy_kwargs=policy_kwargs, **epsilon)


def _flipout(**policy_kwargs: Any) -> dict[str, Any]:
    epsilon = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    policy_kwargs = dict(policy_kwargs, schedule="constant")  # noise in all blocks; by default the later ones would have none
    return dict(policy="FlipoutCnnPolicy", policy_kwargs=policy_kwargs, **epsilon)


ARMS: dict[str, dict[str, Any]] = {
    "stock": _stock(),
    "stock, fused Adam": _stock(optimizer_kwargs=dict(fused=True)),
    "linear": _flipout(layers="linear"),
    "all": _flipout(perturb="all"),
    "linear, factorised": _flipout(layers="linear", family="factorised"),
    "all, factorised": _flipout(perturb="all", family="factorised"),
}


def learner(arm: str) -> DQN:
    """Make an arm's model and train it until it takes gradient steps."""
    env = VecFrameStack(make_atari_env(atari_id(ENV), n_envs=1, seed=0), n_stack=4)
    model = DQN(env=env, seed=0, **SETTINGS, **ARMS[arm])
    model.learn(LEARNING_STARTS + 20)
    return model


def speed(model: DQN, steps: int) -> Speed:
    """Agent steps per second while training goes on."""
    before, start, used = model.num_timesteps, time.perf_counter(), time.process_time()
    model.learn(steps, reset_num_timesteps=False, log_interval=1 << 30)
    made = model.num_timesteps - before
    return Speed(made / (time.perf_counter() - start), made / (time.process_time() - used))


def measure(arms: list[str], rounds: int, steps: int) -> dict[str, list[Speed]]:
    models = {arm: learner(arm) for arm in arms}
    speeds: dict[str, list[Speed]] = {arm: [] for arm in arms}
    order, shuffle = list(arms), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for arm in order:
            speeds[arm].append(speed(models[arm], steps))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="always with stock")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=BLOCK, help="agent steps of a block (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write the table, such as docs/benchmarks/throughput_atari.md")
    args = parser.parse_args()
    th.set_num_threads(1)
    speeds = measure(list(dict.fromkeys(["stock", *args.arms])), args.rounds, args.steps)
    lines = [*HEAD, *rows("DQN Pong, NatureCNN", speeds)]
    print("\n".join(lines))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join([head_of("Throughput on Atari", __doc__, f"{args.rounds} rounds"), *lines]) + "\n")


if __name__ == "__main__":
    main()
