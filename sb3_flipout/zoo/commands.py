"""What ``python -m sb3_flipout.zoo`` runs: rl_zoo3's own programs, and two of ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from sb3_flipout.checks import did_you_mean
from sb3_flipout.zoo import config, configs, programs, register
from sb3_flipout.zoo.space import Refused

Command = Callable[[list[str]], Any]


def _function(module: str, name: str) -> Command:
    return lambda arguments: programs.run(module, name, arguments)


def _train(arguments: list[str]) -> None:
    # What rl_zoo3 would read, in all the ways in which an option can be written there.
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", default="ppo")
    parser.add_argument("-conf", "--conf-file")
    given, _ = parser.parse_known_args(arguments)
    if given.conf_file is None and given.algo in configs():
        arguments = ["--conf-file", str(config(given.algo)), *arguments]
    programs.run("rl_zoo3.train", "train", arguments)


def _record(arguments: list[str]) -> None:
    programs.run_script("rl_zoo3.record_video", arguments)


def _config(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise Refused(f"config takes the name of one algorithm, got {arguments}; there are {', '.join(configs())}.")
    try:
        print(config(arguments[0]))
    except ValueError as error:
        raise Refused(str(error)) from error


def _benchmark(arguments: list[str]) -> int:
    from sb3_flipout.zoo.benchmark import main as benchmark  # needs the extra

    return benchmark(arguments)


#: What each command does, and how.
COMMANDS: dict[str, tuple[str, Command]] = {
    "train": ("train, or search with -optimize: rl_zoo3.train, with our configurations where no --conf-file is given", _train),
    "enjoy": ("play a trained agent: rl_zoo3.enjoy", _function("rl_zoo3.enjoy", "enjoy")),
    "record": ("record a video of one: rl_zoo3.record_video", _record),
    "plot": ("plot training returns: rl_zoo3.plots.plot_train", _function("rl_zoo3.plots", "plot_train")),
    "plot_train": ("the same", _function("rl_zoo3.plots", "plot_train")),
    "plot_from_file": ("rl_zoo3.plots.plot_from_file", _function("rl_zoo3.plots", "plot_from_file")),
    "all_plots": ("rl_zoo3.plots.all_plots", _function("rl_zoo3.plots", "all_plots")),
    "benchmark": ("compare flipout with stock on the same seeds: table and picture; resumable", _benchmark),
    "config": ("print the path of our configuration file of an algorithm", _config),
}


def _usage() -> str:
    lines = [f"  {name:15} {what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(["usage: python -m sb3_flipout.zoo COMMAND ...", *lines, "COMMAND --help tells its options."])


def main(arguments: Sequence[str]) -> int:
    """
    Run a command.

    :param arguments: Its name, and its own arguments
    :return: Exit status
    :raises SystemExit: If the extra ``zoo`` is not installed, or the command is unknown
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        raise SystemExit(f"there is no command {name!r}.{did_you_mean(name, COMMANDS)}\n{_usage()}")
    try:
        import rl_zoo3  # noqa: F401

        register()
    except ImportError as error:
        raise SystemExit(f'sb3_flipout.zoo needs rl_zoo3; pip install "sb3_flipout[zoo]" does it ({error}).') from error
    with suppress(ImportError):  # an extra: MinAtar's games are registered where it is installed
        import sb3_flipout.envs.minatar  # noqa: F401
    try:
        return COMMANDS[name][1](rest) or 0
    except Refused as error:
        raise SystemExit(str(error)) from error
