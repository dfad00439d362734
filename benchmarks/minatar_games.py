"""MinAtar's five games: DQN by weight noise against epsilon-greedy and NoisyNet, all settings fixed beforehand.

    python benchmarks/minatar_games.py --jobs 2              # seeds 100 to 104
    python benchmarks/minatar_games.py --report

The arms are those of `exploration_tasks.py`, where the settings of the games are, too. 300,000 steps; score: mean return of
the mean weights (with members: of their vote) over 30 episodes at the end. Needs `pip install ".[bench,minatar]"`. A file
called minatar.py would hide the package of that name.
"""

from __future__ import annotations

import sys
from itertools import product

import numpy as np
from exploration_tasks import Run
from exploration_training import train
from intervals import difference_interval
from runs import Row, execute, left_of, options, read, versions_of

GAMES = ("breakout", "asterix", "freeway", "seaquest", "spaceinvaders")
OTHERS = ("epsilon", "noisynet-step")
OURS = ("flipout-falling", "members-all", "falling-and-epsilon")
ARMS = (*OTHERS, *OURS)


def scores(rows: list[Row]) -> dict[str, dict[str, dict[int, float]]]:
    """Score of each run, by game, arm and seed."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        game, arm = row["task"].removeprefix("minatar-"), row["arm"]
        found.setdefault(game, {}).setdefault(arm, {})[row["seed"]] = float(row["evaluation_return"])
    return found


def table(rows: list[Row]) -> str:
    found = scores(rows)
    lines = ["| game | " + " | ".join(f"{arm} (seeds)" for arm in ARMS) + " |", "|---|" + "---:|" * len(ARMS)]
    for game in GAMES:
        cells = (list(found.get(game, {}).get(arm, {}).values()) for arm in ARMS)
        lines.append(f"| {game} | " + " | ".join(f"{np.mean(one):.2f} ({len(one)})" if one else "" for one in cells) + " |")
    return "\n".join(lines)


def times(rows: list[Row]) -> str:
    """Processor time of whole trainings over that of epsilon-greedy, on the seeds that both have run."""
    seconds = {(row["task"].removeprefix("minatar-"), row["arm"], row["seed"]): row.get("cpu_seconds") for row in rows}
    lines = ["| game | " + " | ".join(ARMS[1:]) + " |", "|---|" + "---:|" * len(ARMS[1:])]
    for game in GAMES:
        cells = []
        for arm in ARMS[1:]:
            pairs = [
                (own, seconds.get((game, ARMS[0], seed)))
                for (one, who, seed), own in seconds.items()
                if (one, who) == (game, arm)
            ]
            ratios = [own / plain for own, plain in pairs if own and plain]
            cells.append(f"{np.median(ratios):.1f}" if ratios else "")
        lines.append(f"| {game} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def losses(rows: list[Row]) -> str:
    """Games on which an arm of ours is behind one of the others, on the seeds that both have."""
    found, lines = scores(rows), []
    for game, arm, other in product(GAMES, OURS, OTHERS):
        ours, theirs = found.get(game, {}).get(arm, {}), found.get(game, {}).get(other, {})
        seeds = sorted(ours.keys() & theirs.keys())
        pair = [np.array([one[seed] for seed in seeds]) for one in (ours, theirs)]
        if not seeds or pair[0].mean() >= pair[1].mean():
            continue
        told = f"- {game}: {arm} {pair[0].mean():.2f} against {pair[1].mean():.2f} of {other}"
        if len(seeds) == 1:
            lines.append(f"{told}, one seed, which tells little")
            continue
        low, high = difference_interval(*pair)
        lines.append(f"{told}, {len(seeds)} seeds, 95 % interval of the difference [{low:.2f}, {high:.2f}]")
    return "\n".join(lines) or "None so far."


def over_games(rows: list[Row], arms: tuple[str, ...]) -> str:
    """Interquartile means over games and seeds, each game's scores divided by the best arm's mean, by rliable."""
    from rliable import library, metrics

    found = scores(rows)
    games = [game for game in GAMES if all(arm in found.get(game, {}) for arm in arms)]
    if len(games) < 2:
        return f"Not yet: {len(games)} of {len(GAMES)} games have been run by all of them."
    seeds = sorted(set.intersection(*(set(found[game][arm]) for game in games for arm in arms)))
    if not seeds:
        return "No seed has been run by all arms."
    best = {game: max(np.mean([found[game][arm][seed] for seed in seeds]) for arm in arms) for game in games}
    values = {arm: np.array([[found[game][arm][seed] / best[game] for game in games] for seed in seeds]) for arm in arms}
    np.random.seed(0)  # rliable 1.2 draws from numpy's own generator, whatever it is given
    points, intervals = library.get_interval_estimates(values, lambda one: np.array([metrics.aggregate_iqm(one)]), reps=20_000)
    of = f"{', '.join(games)}; seeds {', '.join(map(str, seeds))}."
    lines = [of, "", "| arm | IQM | 95 % interval |", "|---|---:|---|"]
    for arm in arms:
        low, high = (float(end[0]) for end in intervals[arm])
        interval = f"{low:.3f} to {high:.3f}" if len(seeds) > 1 else "one seed: none"
        lines.append(f"| {arm} | {float(points[arm][0]):.3f} | {interval} |")
    return "\n".join(lines)


#: Of what was looked into.
REMARKS = """\
Why members learn nothing on Asterix: it seems to be their prior. By a look (seed 1, 30,000 steps, one run each; no script
of it is kept), the members' values of sampled states were 0.59 in the mean without a prior, 1.47 with one of 0.1, and 3.88
with 0.35, while episodes returned some 0.5 in all three. Each member takes the maximum over five actions of what is left
of its prior, and along an episode such maxima can add up to values that drown the rewards.
"""


def report(rows: list[Row]) -> str:
    return f"""# MinAtar's five games

Made by `python benchmarks/minatar_games.py --report` from [the runs](minatar.jsonl) ({versions_of(rows)}).

DQN, 300,000 steps, settings of Young and Tian 2019 but for Adam and a gradient step every fourth step; chosen for none of
these games, and on none of these seeds. Runs of Breakout by `epsilon` and `flipout-falling` were made before runs noted their
commit: it is the one before that which brought them. Score: mean return of the mean weights (with members: of their vote)
over 30 episodes.

- `epsilon`: stock; epsilon falls to 0.1 over the first tenth
- `noisynet-step`: factorised, shared draw, sigma learned
- `flipout-falling`: our defaults
- `members-all`: ten members with a prior of 0.35, 32 transitions in a batch, each learned under all of them (320 rows)
- `falling-and-epsilon`: our defaults beside epsilon-greedy that falls to 0, as in BTR

{table(rows)}

Processor time of whole trainings, epsilon-greedy's taken as 1 (median of the seeds that both have run; the machine was not
always as busy):

{times(rows)}

## Over games

Each score is divided by the best arm's mean on the game, of the arms in the same table; shown is the interquartile mean (IQM)
over games and seeds, with a stratified 95 % bootstrap interval over seeds, by rliable. A table is of the seeds that all its
arms have run.

The defaults against the others:

{over_games(rows, (*OTHERS, "flipout-falling"))}

All arms:

{over_games(rows, ARMS)}

## Losses

{losses(rows)}

{REMARKS}"""


def main() -> int:
    parser = options(__doc__, "docs/benchmarks/minatar.jsonl", 5, 100)
    parser.add_argument("--games", nargs="+", choices=GAMES, default=list(GAMES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    if args.report:
        args.out.with_suffix(".md").write_text(report(read(args.out)))
        return 0
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    runs = [Run(f"minatar-{game}", arm, 1, seed, None) for seed, game, arm in product(seeds, args.games, args.arms)]
    return execute(train, left_of(runs, read(args.out)), args.out, args.jobs, brief)


def brief(row: Row) -> str:
    return f"{row['task']}, {row['arm']}, {row['seed']}: {row['evaluation_return']:.2f}"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
