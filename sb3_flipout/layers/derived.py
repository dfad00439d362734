"""Which class a plain layer becomes, and classes derived from users' own."""

from __future__ import annotations

from typing import Any

import torch as th
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from sb3_flipout.layers.attention import (
    ChildrenBypassed,
    FlipoutMultiheadAttention,
    FlipoutTransformerEncoder,
    FlipoutTransformerEncoderLayer,
)
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.conv import (
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutConv3d,
    FlipoutConvTranspose1d,
    FlipoutConvTranspose2d,
    FlipoutConvTranspose3d,
)
from sb3_flipout.layers.embedding import FlipoutEmbedding, FlipoutOneHotLinear
from sb3_flipout.layers.linear import FlipoutLinear
from sb3_flipout.layers.recurrent import FlipoutGRU, FlipoutGRUCell, FlipoutLSTM

#: Which torch.nn class becomes which perturbed class.
PERTURBED_CLASSES: dict[type[nn.Module], type[FlipoutLayer]] = {
    perturbed_class.PLAIN: perturbed_class
    for perturbed_class in (
        FlipoutLinear,
        FlipoutConv1d,
        FlipoutConv2d,
        FlipoutConv3d,
        FlipoutConvTranspose1d,
        FlipoutConvTranspose2d,
        FlipoutConvTranspose3d,
        FlipoutEmbedding,
        FlipoutOneHotLinear,
        FlipoutMultiheadAttention,
        FlipoutLSTM,
        FlipoutGRU,
        FlipoutGRUCell,
    )
}

#: Parents whose fused path reads the weights of their children, and what they become when a child is perturbed.
BYPASSING_PARENTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoderLayer: FlipoutTransformerEncoderLayer,
    nn.TransformerEncoder: FlipoutTransformerEncoder,
}

# What a subclass may not have changed, or its weights would be used in another way than ours.
_WAYS_TO_USE_WEIGHTS = ("forward", "__call__", "_conv_forward", "_output_padding")

# By plain class: classes made at run time, so that equal layers have one class.
_DERIVED: dict[type[nn.Module], type[FlipoutLayer]] = {}
_DERIVED_PARENTS: dict[type[nn.Module], type[nn.Module]] = {}


def perturbed_class(layer: nn.Module) -> type[FlipoutLayer] | None:
    """
    Choose what a plain layer becomes.

    A subclass of a known class that uses its weights as its parent does, a parametrised layer for example, becomes a class
    derived from both.

    :param layer: Plain layer
    :return: Perturbed class; ``None`` if it has none
    """
    kind = type(layer)
    if kind in PERTURBED_CLASSES:
        return PERTURBED_CLASSES[kind]
    known = _known_base(kind)
    return None if known is None else _derived(kind, PERTURBED_CLASSES[known])


def _nearest_known(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The known class that a class is or is derived from; of several the nearest."""
    return next((base for base in kind.__mro__ if base in PERTURBED_CLASSES), None)


def _known_base(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The known class whose use of weights a subclass has left alone."""
    base = _nearest_known(kind)
    if base is None or issubclass(kind, FlipoutLayer):
        return None
    same = all(getattr(kind, way, None) is getattr(base, way, None) for way in _WAYS_TO_USE_WEIGHTS)
    return base if same else None


def _derived(kind: type[nn.Module], flipout: type[FlipoutLayer]) -> type[FlipoutLayer]:
    members = {
        "DERIVED_FROM": (empty_derived, kind),
        "__module__": __name__,
        "__doc__": f"{kind.__name__} with perturbed weights.",
    }
    if _is_parametrised(kind):
        # To take a parametrisation off, torch deletes the property of the class itself, and takes its first base.
        plain = kind.__bases__[0]
        base = PERTURBED_CLASSES.get(plain) or _derived(plain, flipout)
        own = {name: member for name, member in vars(kind).items() if name == "__deepcopy__"} | _properties(kind)
        return type(f"Flipout{kind.__name__}", (base,), own | members)
    if kind not in _DERIVED:
        _DERIVED[kind] = type(f"Flipout{kind.__name__}", (flipout, kind), members)
    return _DERIVED[kind]


def _is_parametrised(kind: type[nn.Module]) -> bool:
    """Whether it is a class that torch made for one layer, whose parametrised weights are its properties."""
    return kind.__module__ == parametrize.__name__


def _properties(kind: type[nn.Module]) -> dict[str, Any]:
    return {name: member for name, member in vars(kind).items() if isinstance(member, property)}


def _as_parametrised_now(plain: type[nn.Module], perturbed: type[nn.Module]) -> type[nn.Module]:
    """The parametrised class that a layer had; made anew where parametrisations have come or gone since."""
    now, before = _properties(perturbed), _properties(plain)
    if now.keys() == before.keys():
        return plain
    return type(plain.__name__, plain.__bases__, {name: m for name, m in vars(plain).items() if name not in before} | now)


def empty_derived(kind: type[nn.Module]) -> nn.Module:
    """
    Make an empty layer of a derived class, for pickles to fill.

    :param kind: The user's class that it was derived from
    :return: Layer without attributes
    """
    known = _known_base(kind)
    assert known is not None, "it was derived once"
    derived = _derived(kind, PERTURBED_CLASSES[known])
    return derived.__new__(derived)


def guarded_parent(parent: nn.Module) -> type[nn.Module] | None:
    """
    Choose what a parent of perturbed layers becomes whose fused path would go round them, or a subclass of one.

    :param parent: Module
    :return: Class; ``None`` if it has no such path, or is guarded already
    """
    kind = type(parent)
    if kind in BYPASSING_PARENTS:
        return BYPASSING_PARENTS[kind]
    if isinstance(parent, tuple(BYPASSING_PARENTS)) and not isinstance(parent, ChildrenBypassed):
        return _derived_parent(kind)
    return None


def _derived_parent(kind: type[nn.Module]) -> type[nn.Module]:
    if kind not in _DERIVED_PARENTS:
        members = {
            "DERIVED_FROM": (_empty_parent, kind),
            "__doc__": f"{kind.__name__} that calls its children while their noise is active.",
            "__reduce_ex__": _reduce_parent,
        }
        _DERIVED_PARENTS[kind] = type(f"Flipout{kind.__name__}", (ChildrenBypassed, kind), members)
    return _DERIVED_PARENTS[kind]


def _reduce_parent(parent: nn.Module, protocol: Any) -> Any:
    """Pickle by the class that the class was derived from, since it is made at run time."""
    return _empty_parent, (vars(type(parent))["DERIVED_FROM"][1],), parent.__dict__


def _empty_parent(kind: type[nn.Module]) -> nn.Module:
    derived = _derived_parent(kind)
    return derived.__new__(derived)


def plain_class(layer: nn.Module) -> type[nn.Module] | None:
    """
    Find what a perturbed layer, or a parent of some, was before.

    :param layer: Layer
    :return: Plain class; ``None`` if it is plain
    """
    kind = type(layer)
    derived_from = vars(kind).get("DERIVED_FROM")
    if derived_from is not None:
        plain: type[nn.Module] = derived_from[1]
        return _as_parametrised_now(plain, kind) if _is_parametrised(plain) else plain
    if kind in PERTURBED_CLASSES.values():
        assert isinstance(layer, FlipoutLayer), "the table holds perturbed classes"
        return layer.PLAIN
    return next((before for before, after in BYPASSING_PARENTS.items() if after is kind), None)


def why_plain(layer: nn.Module) -> str | None:
    """
    Say why a layer with weights stays plain.

    :param layer: Plain layer
    :return: The reason; ``None`` if it can be perturbed
    """
    flipout = perturbed_class(layer)
    if flipout is None:
        known = _nearest_known(type(layer))
        return "has no perturbed version" if known is None else f"uses its weights in its own way, not as {known.__name__}"
    if any(way in vars(layer) for way in _WAYS_TO_USE_WEIGHTS):
        return "has a forward of its own on the instance, which would be called in place of the perturbed one"
    if any(th.nn.parameter.is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
        return "has no weights yet; run the network once before it is perturbed"
    if _normalises_by_iteration(layer):
        return "has another weight after each pass in training mode (spectral norm)"
    return flipout.why_not(layer)


def own_matrices(name: str, module: nn.Module) -> dict[str, str]:
    """
    Find matrices that a module of other modules holds beside them: learned queries, or the low-rank part of an adapter.

    :param name: Name of the module
    :param module: Module
    :return: Their names, and why they stay plain
    """
    served = isinstance(module, (*PERTURBED_CLASSES, parametrize.ParametrizationList)) or parametrize.is_parametrized(module)
    if served or next(module.children(), None) is None:  # not by its truth: a compiled child has no length
        return {}
    why = f"a matrix that {type(module).__name__} uses itself"
    matrices = module.named_parameters(recurse=False)
    return {f"{name}.{own}".lstrip("."): why for own, w in matrices if not th.nn.parameter.is_lazy(w) and w.dim() > 1}


def _normalises_by_iteration(layer: nn.Module) -> bool:
    hooks: Any = layer._forward_pre_hooks.values()
    if any(isinstance(hook, SpectralNorm) for hook in hooks):
        return True
    if not parametrize.is_parametrized(layer):
        return False
    parametrizations: Any = layer.parametrizations
    return any(isinstance(step, _SpectralNorm) for of_weight in parametrizations.values() for step in of_weight)
