"""The rules of the house that a machine can check: the import contract, sizes, and documented parameters."""

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = "sb3_flipout"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
MAX_FILE, MAX_FUNCTION = 300, 60

_TENSORS = ("torch", "numpy", "typing_extensions")
_SB3 = (*_TENSORS, "stable_baselines3", "sb3_contrib")
# What of the policies those may know who only look at them: what all have in common.
_OF_POLICIES = ("policies.base", "policies.observations", "policies.state")

# Ring -> what else of the package, and which third parties, it may import. The longest matching prefix counts.
RINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "checks": ((), ("numpy",)),
    "finite": ((), _TENSORS),
    "noise": (("checks",), _TENSORS),
    "layers": (("checks", "noise"), _TENSORS),
    # ale_py and minatar are extras, imported where they are asked for.
    "envs": (("checks",), ("gymnasium", "numpy", "ale_py", "minatar")),
    "samples": ((), _SB3),
    "envs.subprocesses": (("checks",), ("gymnasium", "stable_baselines3")),
    "envs.vector": (("checks",), ("gymnasium", "numpy", "stable_baselines3")),
    "buffers": (("noise", "samples"), _SB3),
    "replay_buffers": (("noise", "samples"), _SB3),
    "policies": (("checks", "finite", "noise", "layers"), (*_SB3, "gymnasium")),
    "diagnostics": (("checks", "noise", "layers", *_OF_POLICIES), (*_SB3, "gymnasium", "matplotlib")),
    "callbacks": (("checks", "finite", "noise", "layers", "diagnostics", *_OF_POLICIES), (*_SB3, "gymnasium", "matplotlib")),
    "hooks": (
        (
            "checks",
            "finite",
            "noise",
            *_OF_POLICIES,
            "policies.learning_noise",
            "buffers",
            "replay_buffers",
            "samples",
        ),
        (*_SB3, "gymnasium"),
    ),
    # The estimator knows of no SB3; the algorithm stands on it.
    "evolution.shaping": (("checks",), _TENSORS),
    "evolution.estimator": (("checks", "noise", "layers", "evolution.shaping"), _TENSORS),
    "evolution": (("checks", "noise", "layers", "policies"), (*_SB3, "gymnasium")),
    # ray is an extra, imported where it is asked for.
    "evolution.ray_workers": (("checks", "evolution"), (*_TENSORS, "ray")),
    "checkpoints": (("checks", "finite"), _SB3),
    # safetensors is an extra, imported where it is asked for.
    "export": (("layers", "policies", "evolution", "registration"), (*_SB3, "gymnasium", "safetensors")),
    "registration": (("policies", "hooks"), (*_SB3, "gymnasium")),
    # rl_zoo3 is an extra, imported where it is asked for.
    "zoo": (
        ("checks", "envs", "policies", "callbacks", "registration", "evolution"),
        (*_SB3, "gymnasium", "rl_zoo3", "optuna", "sqlalchemy", "rliable", "pandas", "matplotlib", "tqdm", "yaml"),
    ),
    "": (
        (
            "noise",
            "layers",
            "envs",
            "diagnostics",
            "buffers",
            "policies",
            "callbacks",
            "evolution",
            "registration",
            "zoo",
            "checkpoints",
            "export",
        ),
        (),
    ),
}

FILES = sorted(ROOT.rglob("*.py"))
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    """Name below the package: "noise.keys", "noise" for its __init__, "" for the package's own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def ring_of(name: str) -> str | None:
    if name == "":
        return ""
    return max((ring for ring in RINGS if ring and within(name, ring)), key=len, default=None)


def imports(tree: ast.AST, name: str, is_package: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Absolute name of each imported module, and the names taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                here = [PACKAGE, *filter(None, name.split("."))]
                here = here[: len(here) - node.level + is_package]
                source = ".".join([*here, *filter(None, [source])])
            yield source, tuple(alias.name for alias in node.names)


def own(source: str) -> str | None:
    return source[len(PACKAGE) + 1 :] if within(source, PACKAGE) else None


def breaches(tree: ast.AST, name: str, is_package: bool = False) -> list[str]:
    """Imports that the ring of this module may not make."""
    ring = ring_of(name)
    if ring is None:
        return [f"{name} belongs to no ring; add it to RINGS"]
    inner, third = RINGS[ring]
    found = []
    for source, names in imports(tree, name, is_package):
        target = own(source)
        if target is None:
            top = source.split(".")[0]
            if top not in third and top not in sys.stdlib_module_names:
                found.append(f"{name} imports {source}")
            continue
        # `from sb3_flipout import noise` imports a submodule, wherever it is written.
        targets = [f"{target}.{item}".lstrip(".") for item in names] if target == "" else [target]
        allowed = (*inner, ring) if ring else inner
        found += [f"{name} imports {t}" for t in targets if not any(within(t, prefix) for prefix in allowed)]
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_package_is_found() -> None:
    assert {"", "noise", "noise.keys", "layers", "layers.base", "envs"} <= set(MODULES)


@every_file
def test_imports_go_inward(path: Path) -> None:
    assert breaches(parse(path), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("noise.keys", "import math\nimport numpy as np\nfrom sb3_flipout.noise.signs import signs", 0),
        ("noise.keys", "from sb3_flipout.layers import perturb", 1),
        ("noise.keys", "from ..layers import perturb", 1),
        ("noise.keys", "from . import signs", 0),
        ("noise.keys", "import stable_baselines3.common", 1),
        ("noise.keys", "def f():\n    import gymnasium", 1),
        ("noise.keys", "from sb3_flipout import layers", 1),
        ("envs.chain", "import torch", 1),
        ("envs.chain", "from sb3_flipout.noise import fold", 1),
        ("policies.base", "from sb3_flipout.buffers import Buffer", 1),
        ("policies.base", "from sb3_flipout.callbacks import C", 1),
        ("policies.base", "from sb3_flipout.layers import perturb", 0),
        ("callbacks.noise", "from sb3_flipout.policies.base import Noisy", 0),
        ("callbacks.noise", "from sb3_flipout.policies.ppo import Noisy", 1),
        ("callbacks.noise", "from sb3_flipout.policies import Noisy", 1),
        ("zoo", "import rl_zoo3\nfrom sb3_flipout.registration import register", 0),
        ("zoo", "from sb3_flipout.diagnostics import Noisy", 1),
        ("", "from sb3_flipout.policies import Noisy", 0),
        ("registration", "from sb3_flipout.zoo import main", 1),
        ("registration", "from sb3_flipout import zoo", 1),
        ("registration", "from .zoo import main", 1),
        ("stray", "", 1),
    ],
)
def test_breaches_are_noticed(name: str, source: str, expected: int) -> None:
    assert len(breaches(ast.parse(source), name, is_package=name == "")) == expected


def edges(path: Path) -> set[str]:
    """Modules of the package that importing this one needs by name."""
    name, found = module_name(path), set()
    for source, names in imports(parse(path), name, path.name == "__init__.py"):
        target = own(source)
        if target is not None:
            for item in names or ("",):
                submodule = f"{target}.{item}".strip(".")
                bound = target in MODULES and item in bound_names(MODULES[target])
                found.add(submodule if submodule in MODULES and not bound else target)
    return (found & set(MODULES)) - {name}


def bound_names(path: Path) -> set[str]:
    """What a package's __init__ takes from its submodules (`noise.signs` is such a function, not the module)."""
    return {alias.name for node in parse(path).body if isinstance(node, ast.ImportFrom) for alias in node.names}


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node not in done:
            for following in sorted(graph.get(node, ())):
                found = visit(following, [*trail, node])
                if found:
                    return found
            done.add(node)
        return None

    return next(filter(None, (visit(node, []) for node in sorted(graph))), None)


def test_there_is_no_cycle() -> None:
    assert cycle({name: edges(path) for name, path in MODULES.items()}) is None


def test_cycles_are_noticed() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": set()}) is None
    found = cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    assert found is not None and found[0] == found[-1]
    assert all(pair in {("b", "c"), ("c", "b")} for pair in pairwise(found))
    assert "noise.keys" in edges(MODULES["noise.signs"]) and "layers.functional" in edges(MODULES["layers.weights"])


@every_file
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


@every_file
def test_functions_are_short(path: Path) -> None:
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions(parse(path))}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION} == {}


@every_file
def test_own_modules_are_imported_at_the_top(path: Path) -> None:
    tree, name = parse(path), module_name(path)
    if ring_of(name) == "zoo":  # what stands on the extra is imported where it is asked for
        tree = ast.Module([node for node in tree.body if not isinstance(node, FunctionNode)], [])
    late = [
        source
        for f in functions(tree)
        for source, _ in imports(f, name, path.name == "__init__.py")
        if own(source) is not None
    ]
    assert late == []


def parameters(node: FunctionNode) -> list[str]:
    """Names that a docstring has to explain."""
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    passed_on = [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None and a.arg not in ("args", "kwargs")]
    return [name for name in names + passed_on if name not in ("self", "cls") and not name.startswith("_")]


def decorators(node: FunctionNode | ast.ClassDef) -> set[str]:
    calls = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
    return {item.attr if isinstance(item, ast.Attribute) else getattr(item, "id", "") for item in calls}


def fields(node: ast.ClassDef) -> list[str]:
    annotated = (item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name))
    of_class = (item.target.id for item in annotated if "ClassVar" not in ast.unparse(item.annotation))
    return [name for name in of_class if not name.startswith("_")]


def undocumented(tree: ast.Module) -> list[str]:
    """Public things without a docstring, and parameters without a `:param x:` line."""
    return [gap for node in tree.body for gap in _gaps(node, "")]


def _gaps(node: ast.stmt, prefix: str) -> Iterator[str]:
    if not isinstance(node, (FunctionNode, ast.ClassDef)) or node.name.startswith("_"):
        return
    if decorators(node) & {"overload", "override", "setter"}:
        return
    name, text, expected = f"{prefix}{node.name}", ast.get_docstring(node) or "", []
    if not text:
        yield name
    if isinstance(node, ast.ClassDef):
        makers = [item for item in node.body if isinstance(item, FunctionNode) and item.name == "__init__"]
        expected = parameters(makers[0]) if makers else fields(node) if "dataclass" in decorators(node) else []
    elif "property" not in decorators(node):
        expected = parameters(node)
    yield from (f"{name}: {item}" for item in expected if f":param {item}:" not in text)
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            yield from _gaps(item, f"{name}.")


@every_file
def test_what_is_public_is_documented(path: Path) -> None:
    if not any(part.startswith("_") for part in module_name(path).split(".")):
        assert undocumented(parse(path)) == []


DOCUMENTED = '''
def f(x, *more, _y=1, **kwargs):
    """:param x: x
    :param more: m"""
@dataclass
class C:
    """:param a: a"""
    a: int
    def __init_subclass__(cls): ...
    def _private(self, z): ...
    @property
    def p(self):
        """P."""
'''
BARE = '''
def f(x, *, y):
    """:param x: x"""
def g(): ...
class C:
    """C."""
    def __init__(self, a): ...
    def m(self): ...
@dataclass(frozen=True)
class D:
    """D."""
    a: int
'''


def test_gaps_in_the_documentation_are_noticed() -> None:
    assert undocumented(ast.parse(DOCUMENTED)) == []
    assert undocumented(ast.parse(BARE)) == ["f: y", "g", "C: a", "C.m", "D: a"]


#: Packages that are installed under another name than they are imported by, of those that the project names.
IMPORTED_AS = {"opencv-python-headless": "cv2", "pink-noise-rl": "pink", "gymnasium-robotics": "gymnasium_robotics"}


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_no_script_hides_a_package(folder: str) -> None:
    """A script's own folder comes first where Python looks: benchmarks/minatar.py hid MinAtar from itself."""
    needed = {re.split(r"[^\w-]", one)[0].lower() for one in importlib.metadata.requires("sb3_flipout") or []}
    imported = {IMPORTED_AS.get(name, name).replace("-", "_") for name in needed} | sys.stdlib_module_names
    assert "minatar" in imported
    assert not {path.stem for path in (ROOT.parent / folder).glob("*.py")} & imported
