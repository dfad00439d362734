"""rl_zoo3's own commands, with this package's algorithms, configurations and search space known to them.

::

    python -m sb3_flipout.zoo train --algo ppo --env CartPole-v1
    python -m sb3_flipout.zoo enjoy --algo ppo --env CartPole-v1 --folder logs --no-render
    python -m sb3_flipout.zoo benchmark --algos ppo dqn --envs CartPole-v1 --seeds 5

All of ``train``'s and ``enjoy``'s options are rl_zoo3's; where no ``--conf-file`` is given, ours is taken. Most works by
``python -m rl_zoo3.train --gym-packages sb3_flipout`` too: the policies and the search space are known there, the two
algorithms that rl_zoo3 has not, FlipES and MaskablePPO, are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sb3_flipout.registration  # noqa: F401  (registers the policies)
from sb3_flipout.checks import check_choice
from sb3_flipout.evolution import FlipES

_HERE = Path(__file__).resolve()
#: Where the configurations are: inside the wheel, or in the checkout that an editable installation stands on.
_FOLDERS = (_HERE.with_name("configs"), _HERE.parents[2] / "zoo_configs")


def configs() -> dict[str, Path]:
    """
    Find the configuration files of this package.

    :return: File by the name that rl_zoo3's ``--algo`` takes
    """
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    return {path.stem: path for path in sorted(folder.glob("*.yml"))}


def config(algo: str) -> Path:
    """
    Find the configuration file of an algorithm: what rl_zoo3's ``--conf-file`` takes.

    :param algo: Name of the algorithm, as ``--algo`` takes it: ``"ppo"``, ``"dqn"``, ``"flipes"``, ...
    :return: Path of the YAML file
    :raises ValueError: If there is none for it
    """
    found = configs()
    return found[check_choice("algo", algo, found)]


def algorithms() -> dict[str, Any]:
    """
    Look up the algorithms that rl_zoo3 has not.

    :return: Class by the name that ``--algo`` takes
    """
    from sb3_contrib import MaskablePPO

    return {"flipes": FlipES, "ppo_mask": MaskablePPO}


def register() -> None:
    """
    Make our algorithms and our search space known to rl_zoo3, in this process. Repeating it changes nothing.

    Importing ``sb3_flipout`` does it where rl_zoo3 is loaded already, so that ``--gym-packages sb3_flipout`` is enough.

    :raises ImportError: If rl_zoo3 is not installed
    """
    from sb3_flipout.zoo import manager, search

    manager.install(algorithms())
    search.install()
