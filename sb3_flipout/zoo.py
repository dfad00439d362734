"""rl_zoo3's own commands, with this package's algorithms known to them.

::

    python -m sb3_flipout.zoo train --algo flipes --env CartPole-v1 --conf-file zoo_configs/flipes.yml
    python -m sb3_flipout.zoo enjoy --algo flipes --env CartPole-v1 --folder logs --no-render

All commands and options are rl_zoo3's: ``train``, ``enjoy``, ``plot_train``, ``plot_from_file``, ``all_plots``. The algorithms
that rl_zoo3 has itself need none of this: ``python -m rl_zoo3.train --gym-packages sb3_flipout`` serves them.
"""

from __future__ import annotations

import sys
from typing import Any

import sb3_flipout.registration  # noqa: F401  (registers the policies)
from sb3_flipout.evolution import FlipES

#: By the name that ``--algo`` takes.
ALGORITHMS: dict[str, Any] = {"flipes": FlipES}


def main() -> None:
    """
    Run one of rl_zoo3's commands.

    :raises SystemExit: If rl_zoo3 is not installed, or the command is unknown
    """
    try:
        import rl_zoo3
        from rl_zoo3 import cli
    except ImportError as error:
        sys.exit(f'sb3_flipout.zoo needs rl_zoo3; pip install "sb3_flipout[zoo]" does it ({error}).')
    known = ("train", "enjoy", "plot_train", "plot_from_file", "all_plots")
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(f"usage: python -m sb3_flipout.zoo {{{','.join(known)}}} ...\nThe rest is as of rl_zoo3's own commands.")
    rl_zoo3.ALGOS.update(ALGORITHMS)
    cli.main()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
