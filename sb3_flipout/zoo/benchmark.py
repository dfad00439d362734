"""Compare weight noise with stock, on the same seeds: trains what is left to train, and writes a table and a picture.

::

    python -m sb3_flipout.zoo benchmark --algos ppo dqn --envs CartPole-v1 Acrobot-v1 --seeds 5 --jobs 2
    python -m sb3_flipout.zoo benchmark --folder logs/benchmark --report     # from the folders, without training

Every run is rl_zoo3's ``train`` in a folder of its own, with our configuration or with rl_zoo3's. One that has its score is
not made again, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from tqdm import tqdm

from sb3_flipout.checks import did_you_mean
from sb3_flipout.zoo import configs, programs, register
from sb3_flipout.zoo.report import ARMS, write_report
from sb3_flipout.zoo.space import Refused

_EVALUATIONS = 20  # during a run, for the curves
_RUNNING: set[subprocess.Popen[bytes]] = set()  # processes of runs
_FAR = 10_000  # what seeds of the environments of the score are away from those of the training


class Run(NamedTuple):
    """One training."""

    algo: str
    env: str
    arm: str
    seed: int

    def folder(self, root: Path) -> Path:
        """
        Tell where its logs are.

        :param root: Folder of the benchmark
        :return: Folder of the run
        """
        return root / self.arm / self.algo / self.env.replace("/", "-") / f"seed-{self.seed}"


def config_of(algo: str, arm: str) -> Path:
    """
    Find the configuration file of an arm.

    :param algo: Algorithm, as ``--algo`` takes it
    :param arm: ``"flipout"`` or ``"stock"``
    :return: Its YAML file
    """
    import rl_zoo3

    return configs()[algo] if arm == "flipout" else Path(rl_zoo3.__file__).with_name("hyperparams") / f"{algo}.yml"


def entry_of(run: Run) -> dict[str, Any] | None:
    """
    Read what a configuration file has for a run, by the rules of rl_zoo3.

    :param run: Run
    :return: Its entry; ``None`` if there is none
    """
    from rl_zoo3.exp_manager import ExperimentManager

    path = config_of(run.algo, run.arm)
    known = yaml.safe_load(path.read_text()) if path.is_file() else {}
    if run.env in known:
        return dict(known[run.env])
    return dict(known["atari"]) if "atari" in known and ExperimentManager.is_atari(run.env) else None


def checked_runs(args: argparse.Namespace) -> list[Run]:
    """
    List the runs, seed by seed, so that a benchmark that is stopped has the same seeds in both arms.

    :param args: Options
    :return: Runs
    :raises Refused: If an algorithm or environment is unknown, or has no entry in one of the files
    """
    import gymnasium as gym

    for algo in args.algos:
        if algo not in configs():
            raise Refused(f"--algos: there is no configuration for {algo!r}.{did_you_mean(algo, configs())}")
    for env in args.envs:
        if env not in gym.registry:
            raise Refused(f"--envs: gymnasium knows no {env!r}.{did_you_mean(env, gym.registry)}")
    cases = product(range(args.first_seed, args.first_seed + args.seeds), args.algos, args.envs, ARMS)
    runs = [Run(algo, env, arm, seed) for seed, algo, env, arm in cases]
    for run in runs:
        if entry_of(run) is None:
            raise Refused(
                f"{config_of(run.algo, run.arm)} has no entry for {run.env}, so {run.algo} cannot be compared there; leave "
                "one of the two out."
            )
    return runs


def _settings(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """What a score is of; a run whose settings have changed since is left to be made."""
    entry = entry_of(run) or {}
    return dict(entry=entry, steps=args.n_timesteps or int(entry["n_timesteps"]), episodes=args.eval_episodes)


def is_done(run: Run, args: argparse.Namespace) -> bool:
    """
    Tell whether a run has its score.

    :param run: Run
    :param args: Options
    :return: Whether it has, with these settings
    """
    path = run.folder(args.folder) / "score.json"
    return path.is_file() and json.loads(path.read_text())["settings"] == json.loads(json.dumps(_settings(run, args)))


def make(run: Run, args: argparse.Namespace) -> str | None:
    """
    Train one run, in a process of its own, and score it.

    :param run: Run
    :param args: Options
    :return: What went wrong: the last line that the process wrote, and where the rest is; ``None`` if nothing did
    """
    folder = run.folder(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "score.json").unlink(missing_ok=True)  # of other settings
    task = json.dumps([run, _settings(run, args), str(args.folder)])
    log = folder / "log.txt"
    with log.open("w") as out:
        words = [sys.executable, "-c", f"from sb3_flipout.zoo.benchmark import train_one; train_one({task!r})"]
        # In a session of its own: rl_zoo3 takes Ctrl-C for the end of a training, and saves what there is.
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        _RUNNING.add(process)
        status = process.wait()
        _RUNNING.discard(process)
        if status == 0:
            return None
    last = (log.read_text().strip() or "no output").splitlines()[-1]
    return f"{' '.join(map(str, run))}: {last} ({log})"


def train_one(task: str) -> None:
    """
    Train and score; run in a process of its own.

    :param task: The run, its settings and the folder of the benchmark, as JSON
    """
    (algo, env, arm, seed), settings, root = json.loads(task)
    run = Run(algo, env, arm, seed)
    folder, steps = run.folder(Path(root)), settings["steps"]
    options: dict[str, Any] = {"algo": algo, "env": env, "seed": seed, "log-folder": folder, "n-timesteps": steps}
    options |= {"conf-file": config_of(algo, arm), "num-threads": 1, "verbose": 0}
    options |= {"eval-freq": max(1, steps // _EVALUATIONS), "eval-episodes": 5}
    register()
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    programs.run("rl_zoo3.train", "train", words)
    score = dict(run._asdict(), returns=_score(run, folder, steps, settings["episodes"]), settings=settings)
    unfinished = folder / "score.json.unfinished"
    unfinished.write_text(json.dumps(score))
    unfinished.replace(folder / "score.json")  # a score is there as a whole, or not at all


def _score(run: Run, folder: Path, steps: int, episodes: int) -> list[float]:
    """Returns of the trained agent, acting without chance: flipout by its mean weights, or its members' vote."""
    from rl_zoo3 import ALGOS, create_test_env, get_saved_hyperparams, utils
    from rl_zoo3.utils import get_model_path
    from stable_baselines3.common.evaluation import evaluate_policy

    name = vars(utils)["EnvironmentName"](run.env)
    _, model_path, log_path = get_model_path(0, str(folder), run.algo, name, False, None, False)
    hyperparams, stats = get_saved_hyperparams(f"{log_path}/{name}", norm_reward=False, test_mode=True)
    env_kwargs = hyperparams.pop("env_kwargs", {})
    env = create_test_env(run.env, 1, stats, run.seed + _FAR, None, False, hyperparams, env_kwargs)
    model = ALGOS[run.algo].load(model_path, device="cpu")
    if model.num_timesteps < steps:
        raise RuntimeError(f"the training ended after {model.num_timesteps} of {steps} steps, and has no score.")
    returns, _ = evaluate_policy(model, env, episodes, deterministic=True, return_episode_rewards=True)
    env.close()
    return [float(one) for one in returns]  # type: ignore[union-attr]


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Read the options.

    :param arguments: Words of the command line
    :return: Options
    """
    parser = argparse.ArgumentParser(
        prog="python -m sb3_flipout.zoo benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algos", nargs="+", default=["ppo"], metavar="ALGO", help=f"of {', '.join(configs())}")
    parser.add_argument("--envs", nargs="+", default=["CartPole-v1"], metavar="ENV", help="both files need entries for them")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("-n", "--n-timesteps", type=int, default=0, help="steps of each run; by default those of the files")
    parser.add_argument("--eval-episodes", type=int, default=100, help="of the score at the end (default: %(default)s)")
    parser.add_argument("-f", "--folder", type=Path, default=Path("logs/benchmark"), help="of logs, table and picture")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing: table and picture of the scores in the folder")
    args = parser.parse_args(arguments)
    if args.n_timesteps < 0:
        parser.error(f"--n-timesteps must be 1 or more, or 0 for those of the files, got {args.n_timesteps}")
    for name in ("seeds", "eval_episodes", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    return args


def _make_all(left: Sequence[Run], args: argparse.Namespace) -> int:
    """Make runs, some at a time; give how many failed. Ctrl-C ends those that run, and begins no other."""
    failed, pool = 0, ThreadPoolExecutor(args.jobs)
    try:
        with tqdm(total=len(left), unit="run") as bar:
            for future in as_completed([pool.submit(make, run, args) for run in left]):
                wrong = future.result()
                if wrong is not None:
                    failed += 1
                    bar.write(wrong)
                bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_RUNNING):
            process.kill()
    return failed


def main(arguments: Sequence[str]) -> int:
    """
    Make the runs that are left, and report.

    :param arguments: Words of the command line
    :return: Number of runs that failed
    :raises SystemExit: If something is asked for that there is not
    """
    args, failed = parsed(arguments), 0
    if not args.report:
        try:
            runs = checked_runs(args)
        except Refused as error:
            raise SystemExit(str(error)) from error
        left = [run for run in runs if not is_done(run, args)]
        print(f"{len(runs) - len(left)} of {len(runs)} runs are done already.")
        try:
            failed = _make_all(left, args)
        except KeyboardInterrupt:
            print("Stopped; the same command goes on with the runs that are left.", file=sys.stderr)
            return 130
    print(write_report(args.folder))
    return failed
