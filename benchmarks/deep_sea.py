"""How far does deep exploration reach? DeepSea of size 10 to 100, one setting for all sizes; and its stochastic variant.

    python benchmarks/deep_sea.py --jobs 2                                           # the page's runs, seeds 100 and up
    python benchmarks/deep_sea.py --tasks sea-20 --arms members boot-dqn --seeds 5
    python benchmarks/deep_sea.py --tasks sea-100 --arms "members, slower, dropping" --keep runs   # hours; goes on
    python benchmarks/deep_sea.py --report

Tasks, arms and what counts as solved are in `deep_sea_runs.py`. Needs `pip install ".[bench,zoo]"`.
"""

from __future__ import annotations

import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from deep_sea_runs import (
    ARMS,
    CONFIRMING,
    GRADIENT_STEPS,
    LEARNING_RATE,
    MEMBERS,
    PLAIN,
    PRIOR,
    ROWS,
    SEEDS,
    TASKS,
    TRANSITIONS,
    Run,
    train,
)
from runs import Row, execute, left_of, options, read, versions_of


def table(rows: list[Row]) -> str:
    lines = [
        "| task | arm | seeds | solved | episodes: median (min to max) | first good episode, median | CPU seconds, median | "
        "ms per episode | rows per step | learned parameters | MiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task, arm in product(TASKS, [*ARMS, *PLAIN]):
        found = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
        if found:
            lines.append(_line(task, arm, found))
    return "\n".join(lines)


def _line(task: str, arm: str, rows: list[Row]) -> str:
    cap = rows[0]["cap"]
    solved = [row["solved"] or np.inf for row in rows]
    first = [row["first_good"] or np.inf for row in rows]
    told = f"{_told(np.median(solved), cap)} ({_told(min(solved), cap)} to {_told(max(solved), cap)})"
    seconds = np.median([row["cpu_seconds"] for row in rows])
    done = sum(np.isfinite(solved))
    return (
        f"| {task} | {arm} | {len(rows)} | {done} | {told} | {_told(np.median(first), cap)} | {seconds:.0f} | "
        f"{1000 * np.median([row['cpu_seconds'] / row['episodes'] for row in rows]):.0f} | {rows[0]['rows_per_step']} | "
        f"{rows[0]['learned_parameters']:,} | {_mebibytes(rows)} |"
    )


def _mebibytes(rows: list[Row]) -> str:
    """Memory of the replay buffer, all networks, gradients and Adam's moments; blank where a run did not tell."""
    known = [row for row in rows if "buffer_bytes" in row]
    if not known:
        return ""
    row = known[-1]
    numbers = row["all_parameters"] + 3 * row["learned_parameters"]
    return f"{(row['buffer_bytes'] + 4 * numbers) / 2**20:.1f}"


def _told(episodes: float, cap: int) -> str:
    return f"{episodes:.0f}" if np.isfinite(episodes) else f">{cap}"


def exponent(rows: list[Row], arm: str, draws: int = 10_000) -> str:
    """Fit an arm's episodes to size: slope of logarithms, bootstrapped over seeds; sizes from 10 on, of three seeds."""
    found: dict[int, list[float]] = {}
    for row in rows:
        size, deterministic, _ = TASKS[row["task"]]
        if row["arm"] == arm and deterministic and size >= 10:
            found.setdefault(size, []).append(float(row["solved"] or np.inf))
    found = {size: episodes for size, episodes in found.items() if len(episodes) >= 3}
    failed = [size for size in sorted(found) if not np.all(np.isfinite(found[size]))]
    found = {size: episodes for size, episodes in found.items() if size not in failed}
    without = f" Left out, since not all seeds are solved: {', '.join(map(str, failed))}." if failed else ""
    if len(found) < 3:
        return f"Of `{arm}` too few sizes have been run, and solved in all seeds, for an exponent.{without}"
    generator, sizes = np.random.default_rng(0), np.array(sorted(found))

    def slope(medians: list[float]) -> float:
        return float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])

    fitted = slope([float(np.median(found[size])) for size in sizes])
    again = [
        slope([float(np.median(generator.choice(found[size], len(found[size])))) for size in sizes]) for _ in range(draws)
    ]
    low, high = np.percentile(again, [2.5, 97.5])
    return (
        f"Episodes of `{arm}` grow as size to the power {fitted:.2f} (95 % bootstrap interval over seeds [{low:.2f}, "
        f"{high:.2f}], sizes {', '.join(map(str, sizes))}).{without}"
    )


#: Seeds from 100 on that a choice was made on all the same.
CHOSEN_ON = [("sea-100", "members, slower, dropping", seed) for seed in (100, 101)]


def is_fresh(row: Row) -> bool:
    """Whether a run had no part in the choice of its setting."""
    return row["seed"] >= CONFIRMING and (row["task"], row["arm"], row["seed"]) not in CHOSEN_ON


#: Of runs that did not end, and of what was decided.
REMARKS = """\
Size 100 takes a learning rate that falls late. Runs without were stopped by hand; none of them had met the treasure:

| arm | seed | commit | furthest row of the diagonal, until episode | cells seen, of 5,050 | stopped after |
|---|---:|---|---|---:|---:|
| members | 100 | 5361428 | 34 until 700, 51 until 1,100, 71 until 2,604 | 4,903 | 2,604 |
| members, newest oftener | 100 | 0c73546 | 26 until 600, 52 until 1,050, 68 until 2,250 | 4,965 | 2,250 |
| members, slower, buffer 200,000 | 101 | 72c3616 | 39 until 600, 62 until 1,050, 96 until 1,900 | 5,039 | 2,150 |
| members, ever slower | 100 | 428cddf | 67 until 1,233, 79 until 1,466, 86 until 1,838 | 5,018 | 1,858 |
| members, ever slower | 101 | e3b47ce | 25 until 450, 32 until 595 | 4,410 | 650 |
| members, slower | 100 | e3b47ce | 46 until 735, 65 until 1,256, 86 until 1,808 | 5,031 | 2,085 |
| members, slower | 101 | e3b47ce | 45 until 724, 71 until 1,245, 92 until 1,790, 96 until 2,071 | 5,039 | 2,121 |
| members, settling | 100 | 332c043 | 46 until 735, 64 until 1,250, 70 until 1,398 | 4,953 | 1,400 |
| members, settling | 101 | 332c043 | 45 until 735, 73 until 1,250, 82 until 1,500, 84 until 1,824 | 5,000 | 1,950 |
| members, soon slower | 103 | db95636 | 44 until 655, 77 until 1,222, 83 until 1,766, 91 until 2,050 | 5,029 | 2,200 |
| members, soon slower | 104 | db95636 | 43 until 653, 54 until 1,068 | 4,865 | 1,100 |

What holds them up, by looks into their networks (no script of which is kept): values are a little wrong everywhere, a
maximum over two actions picks what is too high, and along a hundred steps it adds up. At the end, what has not been tried
promises no more than that at the first cell, and members walk where everything is known. Residuals of Bellman's
equation, how much values of rows 0 to 59 are too high, and what was promised at the first cell, in the mean over members:

| run, seed, episode | residual (root mean square) | too high by | promised | members that head for it, of 20 |
|---|---:|---:|---:|---:|
| newest oftener, 100, 1,640 | 0.018 | 0.28 | 0.28 | 1 |
| ever slower, 100, 1,850 | 0.014 | 0.24 | 0.20 | 0 |
| settling, 101, 1,850 | 0.014 | 0.28 | 0.18 | 2 |
| soon slower, 103, 2,200 | 0.0085 | 0.15 | 0.05 | 0 |
| slower, 101, 2,050 | 0.0091 | 0.17 | 0.07 | 0 |
| the last, and 2,000 gradient steps on what it had, with a learning rate of 3e-4 | 0.0092 | 0.18 | 0.07 | 0 |
| the same, 4,000 with 1e-4 | 0.0051 | 0.11 | 0.06 | 2 |

So `slower, dropping` goes on from `slower` with a third of its learning rate after 200,000 steps, episode 2,000. That was
chosen on seeds 100 and 101, whose runs were taken up there from the checkpoints of `slower` in the table above; 101 met the
treasure in episode 2,060 and had learned after 2,248, 100 in 2,300 and after 2,471. A fresh one, 102, met it in 2,284 and had
learned after 2,452. At size 10 it takes more episodes than `members`, 219 against 157. So `soon slower` begins as `members`
does, and has come to 1e-4 by step 200,000, too. At sizes 10 and 20 it takes as few episodes as `members`; at 100 it stops
finding new cells, as those before it. `dropping twice` has 1e-3 for 2,000 steps, and is `slower, dropping` from there on; so
it was decided by those two runs of `soon slower`, on seeds 103 and 104. At sizes 10 to 50 it takes about as few episodes as
`members`, too (two runs at 50); at 100 one run has begun, and had come to row 80 and 5,030 cells at episode 2,200.

`settling` and `soon slower` have larger errors than `slower`, and as large ones, at a sixth and a third of its learning rate:
in a network that begins with 1e-3, the layers above the first grow larger, and stay so where it falls soon, before the first
has grown (norms of sigma, layer by layer: of `settling` 17.9 and 4.8 above the first; of `soon slower`, seed 103, 74, 15.6
and 3.3; of `slower, dropping`, seeds 101 and 102, 98, 13.7 to 14.8 and 1.6). A step in the first layer then moves values
further, which is likely why. From the networks of `ever slower`, 1e-4 helped less (0.011, 0.20, 6 members), as did 3e-5
(0.011, 0.21, 0) and, at 2.3e-4, a target network that moves a tenth of the way (0.014, 0.22, 5). A network that begins anew
on its transitions with 1e-3 has values of 6 after 2,500 gradient steps, and of 7.7 where Adam's moments of cells that are not
sampled stand still. From those of `newest oftener`, of 20 members headed for what had not been tried: 0 after 2,000 more
gradient steps, after 3,000 with 3e-4 8, with that target network 8, with Adam's epsilon 1e-5 7, with AMSGrad 4, after 9,000
with 3e-4 12, and 15 with twice the transitions besides.

The run with a buffer of 200,000 transitions had another end: at episode 2,110 its values were wrong by 0.007, too high by
0.003, and 19 of 20 members headed for what was not in the buffer. But this held 2,000 episodes, and the first ones, which had
tried the upper rows, had left it; since then the buffer holds all of a run. [Tables in place of networks](deep_sea_table.md)
had that limit, too. With errors of 0.01 at each update they needed twice the episodes at size 50; without errors, with the
newest sampled oftener, they learned size 100, one seed each.

What was tried before, on seed 1, without gain: room for 10,000 transitions only (size 50 after 949 episodes, as in the
table); at size 30, where the setting itself took 487 episodes, Adam's epsilon 1e-4 and 1e-5 instead of 1e-8 (495 and
457: first-layer weights of rare cells are moved by Adam as far as those of common ones) and double Q-learning (484);
double Q-learning at size 100, stopped after 600 episodes and 22 CPU minutes, at row 29.

The index head learns sizes 10 and 20 in as few episodes as members and a quarter of their time; from 30 on it takes
more episodes, and at 50 two of five seeds are not solved. So it stays in the benchmark, and is no part of the package.

On the stochastic seas no one of the options is needed: at size 20 all seeds are solved without, soonest, and at 10 one
seed of five is not, as with masks or reward noise alone. Both together solve all five, later.

Seconds of masks at size 20, of the newest oftener and of the slower arms were taken beside other work, on a machine that was
up to half as fast as for the other rows. Only the slower arms' rows had denormal numbers flushed, in which Adam's moments of
cells no longer sampled end: at size 100 an episode took 2.7 CPU seconds with them and 1.7 without, late in the run."""


def report(rows: list[Row]) -> str:
    fresh, others = ([row for row in rows if is_fresh(row) == new] for new in (True, False))
    return f"""# Deep exploration: DeepSea

Made by `python benchmarks/deep_sea.py --report` from [the runs](deep_sea.jsonl) ({versions_of(rows)}).

One setting for all sizes: {MEMBERS} members, each transition learned under all of them, prior of {PRIOR} standard
deviations, {TRANSITIONS} transitions per gradient step, {GRADIENT_STEPS} gradient steps per environment step, target network
every 4 steps, learning rate {LEARNING_RATE}, discount 0.99, two layers of 50 units, actions remapped at random in each cell.
Arms without members learn from as many rows, {ROWS} transitions in each gradient step. `boot-dqn` is {MEMBERS} networks with
prior networks of the members' law, `index-head` a last layer that is linear in a point drawn on the unit sphere in R^4
(HyperAgent's), both written out in `benchmarks/boot_dqn.py`, under the same settings.

With the newest oftener, half of each batch is sampled so that the logarithm of its age is even. The slower arms sample so,
too, and have {2 * TRANSITIONS} transitions per gradient step and a lower learning rate: `slower` 3e-4; `slower, dropping`
3e-4 for 200,000 environment steps, then 1e-4 (up to size 50 no run is as long, and the two are the same); `dropping twice`
besides {LEARNING_RATE} for the first 2,000; `ever slower` and
`soon slower` {LEARNING_RATE} for 10,000 and 2,000 steps, and then falling as one over the square root of the steps;
`settling` for 10,000, and then as one over the steps.

A run is learned when more than 90 of the last 100 episodes were good (the treasure reached; stochastic: no action left the
diagonal), and solved if the vote, or the mean weights, are good afterwards; one that is not counts as more than its cap. MiB:
replay buffer, all networks, gradients and Adam's moments.

Settings were chosen on the seeds at the end of the page, and confirmed on the others.

## Fresh seeds

{table(fresh)}

{exponent(fresh, "members")} {exponent(fresh, "members, dropping twice")}

{REMARKS}

## Seeds that the choice was made on

{table(others)}
"""


def main() -> int:
    parser = options(__doc__, "docs/benchmarks/deep_sea.jsonl", 10, CONFIRMING)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sea-10", "sea-20", "sea-30", "sea-50", "sea-100"])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *PLAIN], default=["members"])
    parser.add_argument("--keep", type=Path, help="folder of checkpoints, from which a run of ours that was stopped goes on")
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        return 0
    if args.keep and set(args.arms) & set(PLAIN):
        parser.error(f"--keep is for runs of SB3's DQN, not of {', '.join(PLAIN)}")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [
        Run(task, arm, seed)
        for seed, task, arm in product(seeds, args.tasks, args.arms)
        if seed - args.first_seed < SEEDS.get(task, args.seeds)
    ]
    return execute(partial(train, keep=args.keep), left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    return f"{row['task']}, {row['arm']}, {row['seed']}: {row['solved']} episodes, {row['cpu_seconds']} s"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
