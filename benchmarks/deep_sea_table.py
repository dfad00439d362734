"""What does replay cost in deep exploration? DeepSea by tables, in which nothing has to be fitted that was not sampled.

    python benchmarks/deep_sea_table.py --jobs 2
    python benchmarks/deep_sea_table.py --report

The members of `deep_sea.py` without networks: each has a table of values, which begin as N(0, 0.35^2) as its prior does, and a
sampled transition moves its entry 0.4 of the way to its target in all tables. Members, batches, gradient steps, target's sync
and discount are those of `deep_sea.py`. Arms differ in what is sampled, how much, and whether updates err.
"""

from __future__ import annotations

import sys
from itertools import product
from typing import NamedTuple

import numpy as np
from deep_sea_runs import GRADIENT_STEPS, MEMBERS, PRIOR, TRANSITIONS, ages
from exploration_training import GoalRecord
from runs import Row, execute, left_of, made_with, options, read, versions_of

from sb3_flipout.envs import DeepSea

#: Whether the newest are sampled oftener, transitions per gradient step, gradient steps per step, room, error of each entry.
ARMS: dict[str, tuple[bool, int, int, int, float]] = {
    "even": (False, TRANSITIONS, GRADIENT_STEPS, 200_000, 0.0),
    "newest oftener": (True, TRANSITIONS, GRADIENT_STEPS, 200_000, 0.0),
    "even, room for 10,000": (False, TRANSITIONS, GRADIENT_STEPS, 10_000, 0.0),
    "even, twice the gradient steps": (False, TRANSITIONS, 2 * GRADIENT_STEPS, 200_000, 0.0),
    "even, four times the transitions": (False, 4 * TRANSITIONS, GRADIENT_STEPS, 200_000, 0.0),
    "even, errors of 0.01": (False, TRANSITIONS, GRADIENT_STEPS, 200_000, 0.01),
}
SIZES, CAP = (10, 20, 30, 50, 100), 3000
STEP, DISCOUNT, SYNC = 0.4, 0.99, 4


class Run(NamedTuple):
    """One training run."""

    size: int
    arm: str
    seed: int


class Tables:
    """The members' values, and the transitions that they learn from."""

    def __init__(self, size: int, room: int) -> None:
        self.values = np.random.normal(0, PRIOR, (MEMBERS, size * size, 2)).astype(np.float32)
        self.target = self.values.copy()
        self.room, self.stored = room, 0
        self.cells, self.next_cells, self.actions = (np.zeros(room, np.int64) for _ in range(3))
        self.rewards, self.goes_on = (np.zeros(room, np.float32) for _ in range(2))

    def store(self, cell: int, action: int, reward: float, next_cell: int, terminated: bool) -> None:
        place = self.stored % self.room
        self.cells[place], self.actions[place], self.rewards[place] = cell, action, reward
        self.next_cells[place], self.goes_on[place] = next_cell, not terminated
        self.stored += 1

    def learn(self, newest: bool, transitions: int, error: float) -> None:
        held = min(self.stored, self.room)
        places = (self.stored - 1 - ages(held, transitions, newest)) % self.room
        entries = np.arange(MEMBERS)[:, None], self.cells[places], self.actions[places]
        best = self.target[entries[0], self.next_cells[places]].max(2)
        aims = self.rewards[places] + DISCOUNT * self.goes_on[places] * best
        moved = STEP * (aims - self.values[entries])
        self.values[entries] += moved if error == 0 else moved + np.random.normal(0, error, moved.shape)


def train(run: Run) -> Row:
    np.random.seed(run.seed)
    newest, transitions, gradient_steps, room, error = ARMS[run.arm]
    env = DeepSea(run.size, mapping_seed=run.seed, integer_observations=True)
    tables, goals, steps = Tables(run.size, room), GoalRecord(), 0
    seen = np.zeros(run.size * run.size, bool)
    while goals.learned is None and goals.episodes < CAP:
        cell, member, terminated = int(env.reset()[0]), np.random.randint(MEMBERS), False
        while not terminated:
            seen[cell] = True
            action = int(tables.values[member, cell].argmax())
            obs, reward, terminated, _, info = env.step(action)
            # Where an episode ends is no cell, and is never asked for its value.
            tables.store(cell, action, float(reward), 0 if terminated else int(obs), terminated)
            cell, steps = int(obs), steps + 1
            for _ in range(gradient_steps):
                tables.learn(newest, transitions, error)
            if steps % SYNC == 0:
                tables.target[:] = tables.values
        goals.add(bool(info["reached_goal"]))
    return dict(**run._asdict(), learned=goals.learned, episodes=goals.episodes, cells=int(seen.sum()), **made_with())


def table(rows: list[Row]) -> str:
    lines = [
        "| size | sampled | seeds | learned | episodes: median (min to max) | cells seen |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for size, arm in product(SIZES, ARMS):
        found = [row for row in rows if (row["size"], row["arm"]) == (size, arm)]
        if found:
            ends = sorted(row["learned"] or np.inf for row in found)
            told = " ".join(f"{end:.0f}" if np.isfinite(end) else f">{CAP}" for end in (np.median(ends), ends[0], ends[-1]))
            median, low, high = told.split()
            cells = np.median([row["cells"] for row in found])
            done = sum(map(np.isfinite, ends))
            lines.append(f"| {size} | {arm} | {len(found)} | {done} | {median} ({low} to {high}) | {cells:.0f} |")
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    return f"""# What replay costs in deep exploration

Made by `python benchmarks/deep_sea_table.py --report` from [the runs](deep_sea_table.jsonl) ({versions_of(rows)}).

DeepSea by {MEMBERS} tables in place of [{MEMBERS} members](deep_sea.md): each begins as N(0, {PRIOR}^2) in every entry, as a
member's prior does; a sampled transition moves its entry {STEP} of the way to its target, in all tables. {TRANSITIONS}
transitions per gradient step, {GRADIENT_STEPS} gradient steps per step, targets from tables {SYNC} steps old at most, discount
{DISCOUNT}, room for 200,000 transitions, but for what the arm says. Learned: more than 90 of 100 episodes found the treasure.

By runs like these it was chosen what the arm `members, newest oftener` of [the networks](deep_sea.md) samples, and no seed
of those had a part in it; all seeds that were run here are shown, and nothing was chosen among them.

{table(rows)}

`newest oftener`: half of each batch as in `even`, half with the logarithm of the age even (as many are one to ten steps old
as ten thousand to a hundred thousand). What is learned is held up by replay from size 50 on: a buffer that grows samples a
new transition ever more seldom. And by errors, which a maximum over actions turns into hopes, and which grow with the way.
"""


def main() -> int:
    parser = options(__doc__, "docs/benchmarks/deep_sea_table.jsonl", 3, 0)
    parser.add_argument("--sizes", nargs="+", type=int, choices=SIZES, default=list(SIZES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        return 0
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [Run(size, arm, seed) for seed, size, arm in product(seeds, args.sizes, args.arms)]
    return execute(train, left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    return f"{row['size']}, {row['arm']}, {row['seed']}: {row['learned']} episodes"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
