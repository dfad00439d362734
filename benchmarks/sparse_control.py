"""Who finds the goal of MountainCarContinuous-v0 off-policy, and has learned it at the end? SAC and TD3.

    python benchmarks/sparse_control.py --jobs 2                # all arms of the page, seeds 100 to 104
    python benchmarks/sparse_control.py --report

Both algorithms have rl_zoo3's settings of SAC for this task (50,000 steps, networks of 64-64 units, an update after each 32
steps). First success: environment steps until an episode first reaches the goal. Score: mean return of the *mean weights* over
100 episodes at the end, in environments of other seeds. Needs `pip install ".[bench,zoo]"`.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import numpy as np
from pink import PinkActionNoise, PinkNoiseDist
from runs import Row, execute, left_of, options, read, versions_of
from stable_baselines3.common.callbacks import BaseCallback
from zoo_runs import Run, Task, train

EPISODE = 999
CONFIRMING = 100  # seeds from here on had no part in the choice
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

_HELD: dict[str, Any] = dict(resample="rollout", schedule="linear", learn_sigma=False)
_LEARNED = dict(learn_sigma=True)


def _held(sigma: float, fraction: float, update: str = "independent", **more: Any) -> dict[str, Any]:
    return {**_HELD, "sigma_init": sigma, "schedule_fraction": fraction, "update_noise": update, **more}


FLIPOUT: dict[str, dict[str, Any]] = {
    "flipout": dict(_RECIPE),
    "1 in inputs' units": dict(_RECIPE, sigma_init=1.0, sigma_unit="inputs"),
    "3@.5": _held(3.0, 0.5, **_LEARNED),
    "3@.5 ent .001": _held(3.0, 0.5, **_LEARNED, ent_coef=0.001),
    "3@.5 ent .01": _held(3.0, 0.5, **_LEARNED, ent_coef=0.01),
    "3@.5 fixed": _held(3.0, 0.5),
    "3@.5 mean": _held(3.0, 0.5, "mean"),
    "3@.3 mean": _held(3.0, 0.3, "mean"),
    "2@.3 mean": _held(2.0, 0.3, "mean"),
    "2@.5 mean": _held(2.0, 0.5, "mean"),
    "1@.5 mean": _held(1.0, 0.5, "mean"),
    "2@.5": _held(2.0, 0.5),
    "1@.5": _held(1.0, 0.5),
    "3@.5 mean ent .01": _held(3.0, 0.5, "mean", ent_coef=0.01),
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
            entropy = policy_kwargs.pop("ent_coef", "auto" if run.arm in ("flipout", "1 in inputs' units") else None)
            changes = dict(changes, ent_coef=entropy) if entropy is not None else changes
    row = train(task, run, {**task.changes, **changes}, policy_kwargs, watch)
    return dict(row, first_success=watch.first, episodes=len(watch.ends), last_successes=sum(watch.ends[-20:]))


def table(rows: list[Row]) -> str:
    lines = [
        "| algorithm | arm | first success per seed | median | score of the mean weights per seed | at least 90 |",
        "|---|---|---|---:|---|---:|",
    ]
    for task, arm in product(TASKS, [*dict.fromkeys([*BASELINES["SAC"], *BASELINES["TD3"]]), *FLIPOUT]):
        found = sorted((row for row in rows if (row["task"], row["arm"]) == (task, arm)), key=lambda row: row["seed"])
        if found:
            first = [row["first_success"] or row["steps"] for row in found]
            told = ", ".join(str(row["first_success"] or f">{row['steps']}") for row in found)
            scores = [row["score"] for row in found]
            good = f"{sum(score >= 90 for score in scores)} of {len(scores)}"
            listed = ", ".join(f"{score:.1f}" for score in scores)
            lines.append(f"| {task} | {arm} | {told} | {np.median(first):.0f} | {listed} | {good} |")
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    fresh, others = ([row for row in rows if (row["seed"] >= CONFIRMING) == new] for new in (True, False))
    return f"""# Sparse control off-policy: MountainCarContinuous-v0

Made by `python benchmarks/sparse_control.py --report` from [the runs](sparse_control.jsonl) ({versions_of(rows)}).

rl_zoo3's settings of SAC for this task, in TD3 too: 50,000 steps, networks of 64-64 units, 32 gradient steps after each 32
steps. `gsde` is rl_zoo3's own arm, with `use_expln=True`; `gsde-no-expln` the same without; `stock` acts by SAC's own
Gaussian, or in TD3 under Ornstein-Uhlenbeck noise of 0.5; `pink` under pink noise (pink-noise-rl). `ent auto`, `ent .01`:
another entropy coefficient than rl_zoo3's 0.1. `flipout` is the handbook's recipe:
`{_RECIPE}`,
with `act_by_mode=True` and `ent_coef="auto"` in SAC.

## Fresh seeds, {CONFIRMING} and later

{table(fresh)}

## What the recipe was chosen among

Names say sigma, the share of training over which it falls, and `mean` where `update_noise="mean"`; all hold the noise for 32
steps. Sigma is learned in `3@.5`, `3@.5 ent .001` and `3@.5 ent .01`, and fixed in the others.

{table(others)}

## Why

- **The push has to turn.** Noise held for an episode of 999 steps pushes one way, and the car needs swings. gSDE holds its
  noise for `train_freq` = 32 steps; so does the recipe.
- **SAC's own Gaussian drowns weight noise.** Its standard deviation is about 1 at first. `act_by_mode` leaves it out of
  collection.
- **SAC's entropy can pay for never arriving.** With a discount of 0.9999 and `ent_coef=0.1`, the entropy of a wide Gaussian
  over the steps that remain is worth more than the 100 of the goal, and the goal ends it. gSDE starts with a standard
  deviation of 0.025, whose entropy is a cost. With `ent_coef="auto"`, SB3's default, nothing of this stands in the way.
- **An actor that learns under noise as large as exploring needs saturates.** TD3's did under sigma 3 in both seeds: every
  action at its limit, where tanh has no gradient, and the score -99.9. With `update_noise="mean"` the noise is that of the
  behaviour alone, as in Plappert et al. 2018, and what learns is stock TD3.
- **The noise has to go**, so that the buffer fills with what the mean weights do: `schedule="linear"`.
"""


def main() -> int:
    parser = options(__doc__, "docs/benchmarks/sparse_control.jsonl", 5, CONFIRMING)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=["stock", "stock ent auto", "gsde", "pink", "flipout"])
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        return 0
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [Run(task, arm, seed) for seed, task, arm in product(seeds, args.tasks, args.arms)]
    runs = [run for run in runs if run.arm in FLIPOUT or run.arm in BASELINES[run.task]]
    return execute(make, left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    return f"{row['task']}, {row['arm']}, {row['seed']}: first {row['first_success']}, {row['score']:.1f}"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
