"""What does exploring by flipout cost a whole training? Environment steps per second, arms in turn.

    python benchmarks/throughput.py --task PPO A2C --rounds 3 --out docs/benchmarks/throughput.md
    python benchmarks/throughput.py --task SAC TD3 --rounds 3 --out docs/benchmarks/throughput_off_policy.md

One process, one torch thread. In each round every arm of a task trains a new model from the round's seed, in shuffled order;
what is timed is `learn`, that is collection and updates, after one short untimed training per arm. The settings of a task are
those of rl_zoo3 ("zoo") or SB3's defaults, and the same for all its arms:

- stock: "MlpPolicy"
- stock, fused Adam: the same with optimizer_kwargs=dict(eps=1e-5, fused=True), and "stock, fused" with dict(fused=True).
  Flipout policies ask for torch's fused Adam; this arm says what part that plays (the default one walks over the parameters
  in Python). A2C's RMSpropTFLike has no such implementation.
- flipout: "FlipoutMlpPolicy" as it is: with PPO and A2C the noise falls to 0 over the first 30 % of the steps, and costs
  little from there on; with SAC and TD3 it is constant, so what is measured there is the next arm, twice
- flipout, constant: the same with schedule="constant", noise at all times; flipout, heads: the last layer alone, constant
- gSDE: "MlpPolicy" with use_sde=True, sde_sample_freq=4, SB3's own state-dependent exploration (continuous actions)

"1,024 environments" and "4,096 environments" are gymnasium's CartPole in numpy behind GymnasiumVecEnv, network 256-128-64,
8 steps a rollout in four minibatches, two epochs: what is left there is the network, whose second product flipout has to pay.

Reading: "× stock" is the arm's median speed over stock's (below 1: slower), by the clock and by the time of the process;
"paired" is the median of the ratios of process times within rounds, with the smallest and the largest. Where the networks are
small, what counts is the number of torch operations, not their size: a slower environment brings the ratio closer to 1.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gymnasium
import torch as th
from runs import head_of
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecMonitor

import sb3_flipout  # noqa: F401  (registers the policies)
from sb3_flipout.envs.vector import GymnasiumVecEnv


def linear(initial: float) -> Callable[[float], float]:
    return lambda progress_remaining: progress_remaining * initial


@dataclass(frozen=True)
class Task:
    """An algorithm on an environment, and the arms that run it."""

    algorithm: type[PPO] | type[A2C] | type[SAC] | type[TD3]
    env: str
    n_envs: int
    steps: int
    settings: dict[str, Any]
    arms: tuple[str, ...]
    in_numpy: bool = False

    def make(self, seed: int) -> Any:
        if not self.in_numpy:
            return make_vec_env(self.env, n_envs=self.n_envs, seed=seed)
        made = gymnasium.make_vec(self.env, self.n_envs, vectorization_mode="vector_entry_point")
        return VecMonitor(GymnasiumVecEnv(made))


ARMS: dict[str, dict[str, Any]] = {
    "stock": dict(policy="MlpPolicy"),
    "stock, fused Adam": dict(policy="MlpPolicy", policy_kwargs=dict(optimizer_kwargs=dict(eps=1e-5, fused=True))),
    "stock, fused": dict(policy="MlpPolicy", policy_kwargs=dict(optimizer_kwargs=dict(fused=True))),
    "flipout": dict(policy="FlipoutMlpPolicy"),
    "flipout, constant": dict(policy="FlipoutMlpPolicy", policy_kwargs=dict(schedule="constant")),
    "flipout, heads": dict(policy="FlipoutMlpPolicy", policy_kwargs=dict(perturb="heads", schedule="constant")),
    "gSDE": dict(policy="MlpPolicy", use_sde=True, sde_sample_freq=4),
}
OURS = ("flipout", "flipout, constant", "flipout, heads")
DISCRETE = ("stock", "stock, fused Adam", *OURS)
OFF_POLICY = ("stock", "stock, fused", "flipout", "flipout, constant")

ZOO_CARTPOLE: dict[str, Any] = dict(
    n_steps=32,
    batch_size=256,
    gae_lambda=0.8,
    gamma=0.98,
    n_epochs=20,
    ent_coef=0.0,
    learning_rate=linear(0.001),
    clip_range=linear(0.2),
)
ZOO_PENDULUM: dict[str, Any] = dict(
    n_steps=1024, gae_lambda=0.95, gamma=0.9, n_epochs=10, ent_coef=0.0, learning_rate=1e-3, clip_range=0.2
)

VECTOR: dict[str, Any] = dict(n_steps=8, batch_size=2048, n_epochs=2, policy_kwargs=dict(net_arch=[256, 128, 64]))

TASKS: dict[str, Task] = {
    "PPO CartPole-v1, zoo": Task(PPO, "CartPole-v1", 8, 16_384, ZOO_CARTPOLE, DISCRETE),
    "PPO CartPole-v1, SB3 defaults": Task(PPO, "CartPole-v1", 8, 98_304, {}, DISCRETE),
    "PPO Pendulum-v1, zoo": Task(PPO, "Pendulum-v1", 4, 40_960, ZOO_PENDULUM, (*DISCRETE, "gSDE")),
    "PPO CartPole-v1, 1,024 environments": Task(PPO, "CartPole-v1", 1024, 327_680, VECTOR, DISCRETE, in_numpy=True),
    "PPO CartPole-v1, 4,096 environments": Task(
        PPO, "CartPole-v1", 4096, 655_360, {**VECTOR, "batch_size": 8192}, DISCRETE, in_numpy=True
    ),
    "SAC Pendulum-v1, SB3 defaults": Task(SAC, "Pendulum-v1", 1, 1_000, {}, OFF_POLICY),
    "TD3 Pendulum-v1, SB3 defaults": Task(TD3, "Pendulum-v1", 1, 1_000, {}, OFF_POLICY),
    "A2C CartPole-v1, zoo": Task(A2C, "CartPole-v1", 8, 32_000, dict(ent_coef=0.0), ("stock", *OURS)),
}


class Speed(NamedTuple):
    """Environment steps per second of one training."""

    by_clock: float
    by_process: float


def speed(task: Task, arm: str, seed: int, steps: int) -> Speed:
    env = task.make(seed)
    # Algorithms write into policy_kwargs: SAC its use_sde, which TD3 would trip over.
    settings, of_arm = deepcopy(task.settings), deepcopy(ARMS[arm])
    of_arm["policy_kwargs"] = {**settings.pop("policy_kwargs", {}), **of_arm.pop("policy_kwargs", {})}
    model = task.algorithm(env=env, seed=seed, device="cpu", **settings, **of_arm)
    start, used = time.perf_counter(), time.process_time()
    model.learn(steps)
    made = model.num_timesteps
    found = Speed(made / (time.perf_counter() - start), made / (time.process_time() - used))
    env.close()
    return found


def measure(task: Task, rounds: int, steps: int) -> dict[str, list[Speed]]:
    order, shuffle = list(task.arms), random.Random(0).shuffle
    speeds: dict[str, list[Speed]] = {arm: [] for arm in task.arms}
    for arm in order:
        speed(task, arm, 0, 1)  # one rollout and its update
    for number in range(rounds):
        shuffle(order)
        for arm in order:
            speeds[arm].append(speed(task, arm, number, steps))
    return speeds


HEAD = (
    "| task | arm | steps per second | × stock by the clock | by process time | paired [min, max] |",
    "|---|---|---:|---:|---:|---:|",
)


def rows(name: str, speeds: dict[str, list[Speed]]) -> list[str]:
    lines, stock = [], speeds["stock"]
    for arm, own in speeds.items():
        by_clock, by_process = (
            median(one[i] for one in own) / median(one[i] for one in stock) for i in range(len(Speed._fields))
        )
        paired = [ours.by_process / theirs.by_process for ours, theirs in zip(own, stock, strict=True)]
        ratios = f"{by_clock:.2f} | {by_process:.2f} | {median(paired):.2f} [{min(paired):.2f}, {max(paired):.2f}]"
        lines.append(f"| {name} | {arm} | {median(one.by_clock for one in own):.0f} | {ratios} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    algorithms = sorted({task.algorithm.__name__ for task in TASKS.values()})
    parser.add_argument("--task", nargs="+", choices=algorithms, default=algorithms, help="the tasks of these algorithms")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, help="environment steps of one training; by default those of the task")
    parser.add_argument("--out", type=Path, help="where to write the table, such as docs/benchmarks/throughput.md")
    args = parser.parse_args()
    th.set_num_threads(1)
    lines = list(HEAD)
    print("\n".join(lines))
    for name in (name for name, task in TASKS.items() if task.algorithm.__name__ in args.task):
        found = rows(name, measure(TASKS[name], args.rounds, args.steps or TASKS[name].steps))
        print("\n".join(found), flush=True)
        lines += found
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        title = "Throughput off-policy" if "off_policy" in args.out.name else "Throughput"
        args.out.write_text("\n".join([head_of(title, __doc__, f"{args.rounds} rounds"), *lines]) + "\n")


if __name__ == "__main__":
    main()
