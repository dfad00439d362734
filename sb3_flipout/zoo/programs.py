"""rl_zoo3's programs, run in this process as the command line would."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib import import_module


def run(module: str, name: str, arguments: Sequence[str]) -> None:
    """
    Run a program that is a function, which reads ``sys.argv``.

    :param module: Module that it is in
    :param name: Name of the function
    :param arguments: Words of its command line
    """
    sys.argv = [f"{module}.{name}", *arguments]
    getattr(import_module(module), name)()


def run_script(module: str, arguments: Sequence[str]) -> None:
    """
    Run a program that is a script.

    :param module: Module that it is
    :param arguments: Words of its command line
    """
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it may have been imported
    runpy.run_module(module, run_name="__main__")
