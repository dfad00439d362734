"""What is exact replay worth? PPO under weight noise, with and without it, at three noise scales.

    python benchmarks/replay.py --jobs 2
    python benchmarks/replay.py --report

All arms explore alike, under fixed sigma. They differ in what the update makes of the rollout:

- `exact`: each transition is learned under the very weights that chose its action; the package's own way.
- `uncorrected`: by the mean weights, as if they had acted: the old log-probabilities are theirs.
- `truncated`: the same, and each advantage is multiplied by the ratio of the probabilities of the action under the mean
  weights and under the weights that chose it, at most 2: truncated importance sampling, as in PSN-RLVR (2026).

Advantages are normalised once over the rollout, in all arms, so that weights of single transitions keep their meaning. Score:
mean return of the *mean weights* over 100 episodes at the end. Needs `pip install ".[bench,zoo]"`.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium.spaces import Discrete
from intervals import difference_interval, mean_interval
from rl_zoo3.utils import ALGOS
from runs import Row, execute, left_of, options, read, versions_of
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from zoo_runs import Run as ZooRun
from zoo_runs import Task, train

import sb3_flipout

SCALES = (0.5, 1.0, 2.0)
ARMS = ("exact", "uncorrected", "truncated")
HELD = ("step", "episode")
TRUNCATED_AT = 2.0
_DENSE = dict(learn_sigma=False, schedule="constant")

#: By task: how long noise is held, the task, and settings of the noise.
TASKS: dict[str, tuple[tuple[str, ...], Task, dict[str, Any]]] = {
    "CartPole-v1": (HELD, Task("ppo", "CartPole-v1", 30_000), _DENSE),
    "Acrobot-v1": (HELD, Task("ppo", "Acrobot-v1", 100_000), _DENSE),
    # The settings of mountain_car_continuous.py.
    "MountainCarContinuous-v0": (
        ("episode",),
        Task(
            "ppo",
            "MountainCarContinuous-v0",
            40_000,
            changes=dict(
                n_envs=4, n_steps=256, learning_rate=3e-4, ent_coef=0.004, vf_coef=0.19, use_sde=False, policy_kwargs="dict()"
            ),
        ),
        dict(learn_sigma=False, schedule="linear", schedule_fraction=0.625),
    ),
}


class Run(NamedTuple):
    """One training run."""

    task: str
    arm: str
    seed: int
    scale: float
    resample: str


class Studied(PPO):
    """PPO whose update takes the rollout as its arm says, and that notes what came of it."""

    arm: str
    notes: dict[str, list[float]]

    def train(self) -> None:
        buffer, exact = self.rollout_buffer, self.arm == "exact"
        buffer.advantages = (buffer.advantages - buffer.advantages.mean()) / (buffer.advantages.std() + 1e-8)
        of_mean = self.log_probs_of_mean_weights()
        ratio = np.exp(of_mean - buffer.log_probs)
        self.note("mean_against_acting", np.abs(ratio - 1).mean())
        if not exact:
            buffer.log_probs = of_mean
        if self.arm == "truncated":
            buffer.advantages *= np.minimum(ratio, TRUNCATED_AT)
        with nullcontext() if exact else sb3_flipout.perturbed(self.policy, None):
            self.note("first_ratio", self.worst_first_ratio())
            super().train()
        for name in ("approx_kl", "clip_fraction"):
            self.note(name, self.logger.name_to_value[f"train/{name}"])

    def note(self, name: str, value: float) -> None:
        self.notes.setdefault(name, []).append(float(value))

    def log_probs_of_mean_weights(self) -> np.ndarray:
        buffer = self.rollout_buffer
        obs = th.as_tensor(buffer.observations).flatten(0, 1)
        actions = th.as_tensor(buffer.actions).flatten(0, 1)
        with th.no_grad(), sb3_flipout.perturbed(self.policy, None):
            _, log_probs, _ = self.policy.evaluate_actions(obs, self._of_space(actions))
        return log_probs.numpy().reshape(buffer.log_probs.shape)

    def worst_first_ratio(self) -> float:
        batch = next(iter(self.rollout_buffer.get(None)))
        with th.no_grad():
            _, log_probs, _ = self.policy.evaluate_actions(batch.observations, self._of_space(batch.actions))
        return float((th.exp(log_probs - batch.old_log_prob) - 1).abs().max())

    def _of_space(self, actions: th.Tensor) -> th.Tensor:
        return actions.long().flatten() if isinstance(self.action_space, Discrete) else actions


class Curve(BaseCallback):
    """Collect the returns of training episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.returns: list[float] = []

    def _on_step(self) -> bool:
        self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True


def make(run: Run) -> Row:
    _, task, noise = TASKS[run.task]
    notes: dict[str, list[float]] = {}
    ALGOS["ppo"] = type("StudiedPPO", (Studied,), dict(arm=run.arm, notes=notes))
    curve = Curve()
    changes = {**task.changes, "policy": "FlipoutMlpPolicy"}
    row = train(
        task, ZooRun(run.task, run.arm, run.seed), changes, dict(noise, sigma_init=run.scale, resample=run.resample), curve
    )
    worst = max(notes["first_ratio"])
    means = {name: float(np.mean(values)) for name, values in notes.items() if name != "first_ratio"}
    return dict(
        row,
        scale=run.scale,
        resample=run.resample,
        training_return=float(np.mean(curve.returns)),
        worst_first_ratio=worst,
        **means,
    )


def table(rows: list[Row]) -> str:
    """Compare exact replay with the others, at each scale."""
    lines = [
        "| task | noise held per | sigma | arm | score: mean (worst) | exact less this, 95 % interval | "
        "mean training return | off by | approx_kl | clip fraction |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    runs = {Run(*(row[name] for name in Run._fields)): row for row in rows}
    for task, held, scale, arm in product(TASKS, HELD, SCALES, ARMS):
        of_arm, of_exact = (
            {run.seed: row for run, row in runs.items() if run._replace(seed=0) == Run(task, name, 0, scale, held)}
            for name in (arm, "exact")
        )
        found = [of_arm[seed] for seed in sorted(of_arm.keys() & of_exact.keys())]
        if len(found) < 2:
            continue
        scores, exact = (np.array([some[row["seed"]]["score"] for row in found]) for some in (of_arm, of_exact))
        interval = "" if arm == "exact" else "[{:.1f}, {:.1f}]".format(*difference_interval(exact, scores))
        means = {name: np.mean([row[name] for row in found]) for name in ("training_return", "approx_kl", "clip_fraction")}
        off = max(row["worst_first_ratio"] if arm == "exact" else row["mean_against_acting"] for row in found)
        lines.append(
            f"| {task} | {held} | {scale:g} | {arm} | {scores.mean():.1f} ({scores.min():.1f}) | {interval} | "
            f"{means['training_return']:.1f} | {off:.2g} | {means['approx_kl']:.4f} | {means['clip_fraction']:.3f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw scores of the three arms over the noise scale, with 95 % bootstrap intervals of the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(task, held) for task, held in product(TASKS, HELD) if any(_of(rows, task, held, "exact"))]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), constrained_layout=True, squeeze=False)
    for axis, (task, held) in zip(axes[0], panels, strict=True):
        for shift, arm in zip((-0.04, 0.0, 0.04), ARMS, strict=True):
            found = _of(rows, task, held, arm)
            scales = sorted({row["scale"] for row in found})
            scores = [np.array([row["score"] for row in found if row["scale"] == scale]) for scale in scales]
            means = np.array([each.mean() for each in scores])
            ends = np.array([mean_interval(each) for each in scores]).T
            x = np.array(scales) * (1 + shift)
            axis.errorbar(x, means, abs(ends - means), marker="o", capsize=3, label=arm)
        axis.set(title=f"{task}\nnoise held per {held}", xlabel="sigma", xscale="log", xticks=SCALES)
        axis.set_xticks(SCALES, [f"{scale:g}" for scale in SCALES])
        axis.minorticks_off()
    axes[0][0].set_ylabel("return of the mean weights")
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def _of(rows: list[Row], task: str, held: str, arm: str) -> list[Row]:
    return [row for row in rows if (row["task"], row["resample"], row["arm"]) == (task, held, arm)]


def report(rows: list[Row]) -> str:
    seeds = len({row["seed"] for row in rows})
    return f"""# What exact replay is worth

Made by `python benchmarks/replay.py --report` from [the runs](replay.jsonl) ({versions_of(rows)}; at most {seeds} seeds).

PPO explores by weight noise of fixed sigma. Nothing was chosen by these runs: all scales and seeds are shown. The arms differ
in what the update makes of the rollout:

- `exact`: each transition is learned under the very weights that chose its action, as this package does.
- `uncorrected`: by the mean weights, as if they had acted.
- `truncated`: the same, with each advantage multiplied by the ratio of the action's probabilities under the mean weights and
  under those that acted, at most {TRUNCATED_AT:g}.

Score: the mean weights, 100 episodes, at the end. *Off by*: how far the ratio of the acting and the learning policy is from 1
before the first step of the optimizer, at its worst. For `exact` it is the ratio that PPO itself sees; in the other arms PPO
sees 1 whatever acted, and the mean over a rollout is told of what it should have seen.

![Score by noise scale](replay.png)

{table(rows)}
"""


def main() -> int:
    parser = options(__doc__, "docs/benchmarks/replay.jsonl", 10, 100)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES))
    parser.add_argument("--resample", nargs="+", choices=HELD, default=list(HELD))
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        draw(read(args.out), args.out.with_suffix(".png"))
        return 0
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    cases = product(seeds, args.tasks, args.resample, args.scales, args.arms)
    runs = [Run(task, arm, seed, scale, held) for seed, task, held, scale, arm in cases if held in TASKS[task][0]]
    return execute(make, left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    where = ", ".join(str(row[name]) for name in Run._fields)
    return f"{where}: {row['score']:.1f}, training {row['training_return']:.1f}"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
