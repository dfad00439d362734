"""Do our entries for rl_zoo3 reach the figures that rl_zoo3 publishes for the stock algorithm? Five seeds, mean weights.

    python benchmarks/zoo_entries.py --jobs 2                  # our entries, seeds 100 to 104
    python benchmarks/zoo_entries.py --jobs 2 --arms stock     # rl_zoo3's own entries, in the same way
    python benchmarks/zoo_entries.py --report

Each run appends one line to --out as it finishes, and a run that has its line is not made again. Needs
`pip install ".[bench,zoo]"`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from runs import Row, execute, left_of, options, read, versions_of
from zoo_runs import Run, Task, train

CONFIGS = Path(__file__).parent.parent / "zoo_configs"

#: Steps of the published figure, those figures (mean, and standard deviation over episodes), and steps of our runs where they
#: differ. From rl_zoo3's benchmark.md, each of one trained agent; LunarLander is version 2 there.
PUBLISHED: dict[tuple[str, str], tuple[int, float, float]] = {
    ("ppo", "CartPole-v1"): (100_000, 500.0, 0.0),
    ("ppo", "Pendulum-v1"): (100_000, -172.225, 104.159),
    ("ppo", "MountainCarContinuous-v0"): (20_000, 88.343, 2.572),
    ("ppo", "MountainCar-v0"): (1_000_000, -110.423, 19.473),
    ("ppo", "Acrobot-v1"): (1_000_000, -73.506, 18.201),
    ("ppo", "LunarLander-v3"): (1_000_000, 242.119, 31.823),
    ("dqn", "Acrobot-v1"): (100_000, -76.639, 11.752),
    ("dqn", "CartPole-v1"): (50_000, 500.0, 0.0),
    ("dqn", "MountainCar-v0"): (120_000, -100.849, 9.925),
    ("dqn", "LunarLander-v3"): (100_000, 154.382, 79.241),
}
STEPS = {("ppo", "MountainCar-v0"): 300_000}


def name(algo: str, env: str) -> str:
    """Give the name of a task, as on the other pages."""
    return f"{algo.upper()} {env}"


TASKS = {name(*entry): entry for entry in PUBLISHED}
ARMS = ("flipout", "stock")


def make(run: Run) -> Row:
    algo, env = entry = TASKS[run.task]
    config = str(CONFIGS / f"{algo}.yml") if run.arm == "flipout" else None
    return train(Task(algo, env, STEPS.get(entry, PUBLISHED[entry][0]), config=config), run, {}, {})


def table(rows: list[Row]) -> str:
    """Set each entry beside the published figure."""
    lines = [
        "| entry | steps | published: mean (deviation over episodes), steps | seeds | ours: mean ± standard error (worst) | "
        "reaches it | stock, same seeds |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        scores.setdefault((row["task"], row["arm"]), {})[row["seed"]] = row["score"]
    for task, entry in TASKS.items():
        if ours := scores.get((task, "flipout")):
            stock = scores.get((task, "stock"), {})
            lines.append(_line(entry, list(ours.values()), [value for seed, value in stock.items() if seed in ours]))
    return "\n".join(lines)


def _line(entry: tuple[str, str], ours: list[float], stock: list[float]) -> str:
    steps, mean, deviation = PUBLISHED[entry]
    error = float(np.std(ours, ddof=1) / np.sqrt(len(ours))) if len(ours) > 1 else 0.0
    reached = "yes" if np.mean(ours) >= mean - error else "**no**"
    beside = f"{np.mean(stock):.1f} ({min(stock):.1f}), {len(stock)} seeds" if stock else "not run"
    return (
        f"| {name(*entry)} | {STEPS.get(entry, steps):,} | {mean:.1f} ({deviation:.1f}), {steps:,} | {len(ours)} | "
        f"{np.mean(ours):.1f} ± {error:.1f} ({min(ours):.1f}) | {reached} | {beside} |"
    )


def report(rows: list[Row]) -> str:
    return f"""# Our entries for rl_zoo3 beside its published figures

Made by `python benchmarks/zoo_entries.py --report` from [the runs](zoo_entries.jsonl) ({versions_of(rows)}).

The entries of `zoo_configs/ppo.yml` and `dqn.yml` as they stand, trained through rl_zoo3's `ExperimentManager` for as many
steps as the published figure, but for PPO on MountainCar (300,000 of a million). Score: mean return of the **mean weights**
over 100 episodes at the end, in environments of other seeds. Published are the figures of rl_zoo3's `benchmark.md`, which says
of itself that it is no quantitative benchmark: each figure is that of one trained agent, and LunarLander was version 2 then.
An entry reaches the figure if its mean over seeds is at least the figure less one standard error of that mean. No setting
was chosen on any of these seeds. Rows of DQN on CartPole, LunarLander and MountainCar, and of stock, are those of
[defaults](defaults.md): the same settings and steps, on the same seeds.

{table(rows)}

Where an entry does not reach it: on Pendulum, PPO's stock does not on the same seeds and starting states either, and
the two are equal; on MountainCar PPO had 300,000 steps of a million; DQN's end of training on CartPole is a coin, for
stock too (seed 104 of it ends at 16, three others at 500, and a published figure is one agent's); on DQN's MountainCar
noise held for an episode finds the goal later than epsilon-greedy on one seed of five, which ends at -200.
"""


def main() -> None:
    parser = options(__doc__, "docs/benchmarks/zoo_entries.jsonl", seeds=5, first_seed=100)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["flipout"])
    args = parser.parse_args()
    failed = 0
    if not args.report:
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        runs = [Run(task, arm, seed) for task in args.tasks for arm in args.arms for seed in seeds]
        brief = "{task} {arm} seed {seed}: {score:.1f} (worst {worst:.1f}), {cpu_seconds} s".format_map
        failed = execute(make, left_of(runs, read(args.out)), args.out, args.jobs, brief)
    if rows := read(args.out):
        args.out.with_suffix(".md").write_text(report(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
