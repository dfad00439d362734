"""Write docs/api.rst: every public name, by module.

python docs/make_api.py
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).parent / "api.rst"

#: Public modules, and what is in them. A name stands under the first module that has it.
MODULES: dict[str, str] = {
    "sb3_flipout": "What most need",
    "sb3_flipout.policies": "Policies and their settings",
    "sb3_flipout.callbacks": "Callbacks",
    "sb3_flipout.diagnostics": "Measuring what the noise does",
    "sb3_flipout.layers": "Perturbed layers, and networks of them",
    "sb3_flipout.noise": "Keys, signs and row noise",
    "sb3_flipout.evolution": "Evolution strategies",
    "sb3_flipout.envs": "Environments",
    "sb3_flipout.envs.vector": "Vector environments of gymnasium",
    "sb3_flipout.envs.subprocesses": "Environments in processes",
    "sb3_flipout.envs.wrappers": "Wrappers",
    "sb3_flipout.policies.extractors": "Features extractors",
    "sb3_flipout.export": "Policies without pickles and without Python",
    "sb3_flipout.checkpoints": "Checkpoints",
    "sb3_flipout.finite": "Numbers that are not finite",
    "sb3_flipout.buffers": "Rollout buffers",
    "sb3_flipout.replay_buffers": "Replay buffers",
    "sb3_flipout.zoo": "rl_zoo3",
}


def public_names(module: ModuleType) -> list[str]:
    """List the public names of a module: its ``__all__``, or what it defines itself."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    defined = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
    return sorted(name for name in defined if not name.startswith("_"))


def is_documented(value: object) -> bool:
    """Tell whether it is a class or a function: tables and types are described where they are used."""
    return inspect.isclass(value) or inspect.isroutine(value)


def page() -> str:
    """Make the page."""
    seen: set[int] = set()
    lines = ["All public names", "================", "", "Made by ``python docs/make_api.py``."]
    for name, title in MODULES.items():
        module = importlib.import_module(name)
        values = {one: getattr(module, one) for one in public_names(module)}
        listed = [one for one, value in values.items() if is_documented(value) and id(value) not in seen]
        seen |= {id(values[one]) for one in listed}
        if listed:
            heading = f"{title}: {name}"
            items = [f"   {name}.{one}" for one in listed]
            lines += ["", heading, "-" * len(heading), "", ".. autosummary::", "   :toctree: _api", "", *items]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
