"""Who finds the goal of MountainCarContinuous-v0 off-policy, and has learned it at the end? SAC and TD3.

    python benchmarks/sparse_control.py --jobs 2                # all arms of the page, seeds 100 to 104
    python benchmarks/sparse_control.py --report

Both algorithms have rl_zoo3's settings of SAC for this task (50,000 steps, networks of 64-64 units, an update after each 32
steps). First success: environment steps until an episode first reaches the goal. Score: mean return of the *mean weights* over
100 episodes at the end, in environments of other seeds. Needs `pip install ".[bench,zoo]"`.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

from pink import PinkActionNoise, PinkNoiseDist
from runs import Row, execute, read
from stable_baselines3.common.callbacks import BaseCallback
from zoo_runs import Run, Task, train

EPISODE = 999
_OF_GSDE = dict(use_sde=False)  # rl_zoo3's own policy_kwargs have gSDE's settings
_NETWORK = "dict(net_arch=[64, 64])"

SAC = Task("sac", "MountainCarContinuous-v0")
#: TD3 by SAC's settings, which are the same in all arms; ent_coef has no meaning there.
TD3 = Task(
    "td3",
    "MountainCarContinuous-v0",
    50_000,
    changes=dict(
        learning_rate=3e-4,
        buffer_size=50_000,
        batch_size=512,
        train_freq=32,
        gradient_steps=32,
        gamma=0.9999,
        tau=0.01,
        learning_starts=0,
        policy_kwargs=_NETWORK,
    ),
)
TASKS = {"SAC": SAC, "TD3": TD3}
_NO_NOISE = dict(noise_type=None, noise_std=None)

#: What each arm changes of the algorithm's arguments.
BASELINES: dict[str, dict[str, dict[str, Any]]] = {
    "SAC": {
        "stock": dict(use_sde=False, policy_kwargs=_NETWORK),
        "gsde": {},
        "gsde-no-expln": dict(policy_kwargs="dict(log_std_init=-3.67, net_arch=[64, 64])"),
        "pink": dict(use_sde=False, policy_kwargs=_NETWORK),
        "stock ent auto": dict(use_sde=False, policy_kwargs=_NETWORK, ent_coef="auto"),
        "stock ent .01": dict(use_sde=False, policy_kwargs=_NETWORK, ent_coef=0.01),
        "gsde ent .01": dict(ent_coef=0.01),
    },
    "TD3": {"stock": {}, "pink": _NO_NOISE},  # stock: rl_zoo3's Ornstein-Uhlenbeck noise of 0.5
}
WEIGHT_NOISE: dict[str, dict[str, Any]] = {
    "SAC": dict(use_sde=False, policy_kwargs=_NETWORK, policy="FlipoutMlpPolicy"),
    "TD3": dict(**_NO_NOISE, policy="FlipoutMlpPolicy"),
}
#: The handbook's recipe for sparse control off-policy; SAC also acts by the mode, and has SB3's own entropy coefficient.
_RECIPE = dict(sigma_init=3.0, resample=32, update_noise="mean", learn_sigma=False, schedule="linear", schedule_fraction=0.5)

_HELD = dict(resample="rollout", schedule="linear", learn_sigma=False)


def _held(sigma: float, fraction: float, update: str = "independent", **more: Any) -> dict[str, Any]:
    return dict(_HELD, sigma_init=sigma, schedule_fraction=fraction, update_noise=update, **more)


FLIPOUT: dict[str, dict[str, Any]] = {
    "flipout": dict(_RECIPE),
    "3@.5 mean": _held(3.0, 0.5, "mean"),
    "3@.3 mean": _held(3.0, 0.3, "mean"),
    "2@.3 mean": _held(2.0, 0.3, "mean"),
    "2@.5 mean": _held(2.0, 0.5, "mean"),
    "1@.5 mean": _held(1.0, 0.5, "mean"),
    "2@.5": _held(2.0, 0.5),
    "1@.5": _held(1.0, 0.5),
    "3@.5 mean ent .01": _held(3.0, 0.5, "mean", ent_coef=0.01),
    "3@.5 ent .01": _held(3.0, 0.5, ent_coef=0.01),
    "1@.5 mean ent .01": _held(1.0, 0.5, "mean", ent_coef=0.01),
    "3@.5 mean ent auto": _held(3.0, 0.5, "mean", ent_coef="auto"),
    "2@.5 ent .01": _held(2.0, 0.5, ent_coef=0.01),
    "2@.5 mean ent .01": _held(2.0, 0.5, "mean", ent_coef=0.01),
}


class FirstSuccess(BaseCallback):
    """Note the step of the first success, and how many of the last 20 episodes succeed."""

    def __init__(self, pink: bool) -> None:
        super().__init__()
        self.pink = pink
        self.first: int | None = None
        self.ends: list[bool] = []

    def _on_training_start(self) -> None:
        if self.pink and hasattr(self.model.policy.actor, "action_dist"):
            self.model.policy.actor.action_dist = PinkNoiseDist(EPISODE, 1)
        elif self.pink:
            self.model.action_noise = PinkActionNoise(0.3, EPISODE, 1)  # its authors' scale

    def _on_step(self) -> bool:
        for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
            if done:
                self.ends.append(not info["TimeLimit.truncated"])
                if self.ends[-1] and self.first is None:
                    self.first = self.num_timesteps
        return True


def make(run: Run) -> Row:
    task, watch = TASKS[run.task], FirstSuccess(run.arm == "pink")
    if run.arm in BASELINES[run.task]:
        changes, policy_kwargs = BASELINES[run.task][run.arm], {}
    else:
        changes, policy_kwargs = WEIGHT_NOISE[run.task], dict(FLIPOUT[run.arm])
        if run.task == "SAC":
            policy_kwargs["act_by_mode"] = True
            entropy = policy_kwargs.pop("ent_coef", "auto" if run.arm == "flipout" else None)
            changes = dict(changes, ent_coef=entropy) if entropy is not None else changes
    row = train(task, run, {**task.changes, **changes}, policy_kwargs, watch)
    return dict(row, first_success=watch.first, episodes=len(watch.ends), last_successes=sum(watch.ends[-20:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=["stock", "stock ent auto", "gsde", "pink", "flipout"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/sparse_control.jsonl"))
    args = parser.parse_args()
    done = {Run(row["task"], row["arm"], row["seed"]) for row in read(args.out)}
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [Run(task, arm, seed) for seed, task, arm in product(seeds, args.tasks, args.arms)]
    left = [run for run in runs if run not in done and (run.arm in FLIPOUT or run.arm in BASELINES[run.task])]
    return execute(make, left, args.out, args.jobs, lambda row: f"{row}")


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
