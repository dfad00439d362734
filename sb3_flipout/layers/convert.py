"""In-place conversion of a built network, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, TypeGuard, TypeVar, get_args

from torch import nn
from torch.nn.utils import parametrize
from typing_extensions import Unpack

from sb3_flipout.checks import check_choice, check_flag, check_integer, check_strings, did_you_mean, warn_user
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.config import LayerNoise, NoiseKwargs, layer_noise
from sb3_flipout.layers.derived import PERTURBED_CLASSES, guarded_parent, own_matrices, perturbed_class, plain_class, why_plain
from sb3_flipout.layers.embedding import OneHotLinear
from sb3_flipout.layers.interface import without
from sb3_flipout.layers.weights import PerturbedWeights
from sb3_flipout.noise.bases import drawn_base_key

M = TypeVar("M", bound=nn.Module)

Layers = Literal["all", "linear", "hidden"]
LAYERS: tuple[str, ...] = get_args(Layers)

#: What ``layers=`` may name: the torch.nn classes it stands for, and which of their weights.
LAYER_CHOICES: dict[str, dict[type[nn.Module], str]] = {
    "all": dict.fromkeys(PERTURBED_CLASSES, "all"),
    "linear": {nn.Linear: "all", OneHotLinear: "all"},
    "hidden": {nn.LSTM: "hidden", nn.GRU: "hidden"},
}


class _Candidate(NamedTuple):
    """A plain layer that is to be perturbed."""

    layer: nn.Module
    noise_on: str


def perturb(
    module: M,
    layers: Layers = "all",
    base_key: int | None = None,
    skip: str | Sequence[str] = (),
    perturb_frozen: bool = False,
    **noise: Unpack[NoiseKwargs],
) -> M:
    """
    Turn the plain layers of a network into perturbed ones, in place.

    Modules and parameters stay the same objects under the same names, so references to them stay valid; an optimizer
    made before must be made anew, since sigma is new. Layers that are perturbed in the same way already are left alone.
    Layers with weights that cannot be perturbed stay plain, and a warning names them.

    :param module: Network, or a single layer
    :param layers: ``"all"``; ``"linear"`` for linear layers only (NoisyNet's choice); or ``"hidden"`` for the
        hidden-to-hidden weights of LSTMs and GRUs only (the choice of Wen et al. 2018). Another call can add others
    :param base_key: Key of the base perturbation, any integer; ``None`` draws one from torch's generator, as layers draw
        their weights
    :param skip: Names of modules to leave out, with all that is in them, as in ``named_modules()``; ``*`` stands for anything
    :param perturb_frozen: Whether layers whose weights do not learn (``requires_grad`` is False) are perturbed too
    :param noise: ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :return: The same network
    :raises TypeError: If a setting is unknown, or a value has a wrong type
    :raises ValueError: If a setting is out of range or unfit, a name in ``skip`` fits no module, or a layer is already
        perturbed in another way
    """
    names = dict(module.named_modules())
    key = None if base_key is None else check_integer("base_key", base_key)
    config = layer_noise(noise)
    wanted = Wanted(
        check_choice("layers", layers, LAYERS),
        checked_patterns(skip, names_to_skip(names)),
        check_flag("perturb_frozen", perturb_frozen),
    )
    left = perturb_named(names, config, wanted, lambda: drawn_base_key() if key is None else key)
    warn_of_plain(left)
    return module


class Wanted(NamedTuple):
    """
    Which layers are to be perturbed.

    :param layers: Kinds of layers, as in :func:`perturb`
    :param skip: Names of modules to leave out
    :param frozen: Whether layers are perturbed whose weights do not learn
    """

    layers: str = "all"
    skip: tuple[str, ...] = ()
    frozen: bool = False


def perturb_named(
    names: Mapping[str, nn.Module], config: LayerNoise, wanted: Wanted, base_key: Callable[[], int]
) -> dict[str, str]:
    """
    Perturb layers among modules, in their order.

    :param names: Modules by the names that ``wanted.skip`` and messages use; with a module all that are in it
    :param config: How layers are perturbed
    :param wanted: Which layers
    :param base_key: Gives the key of the base perturbation, asked for if there is a layer to perturb
    :return: Layers with weights that stay plain without having been left out by name, and why
    :raises ValueError: If there is no such layer, or one is already perturbed in another way; nothing is changed then
    """
    present = [layer for layer in names.values() if isinstance(layer, FlipoutLayer)]
    for layer in present:
        _check_present(layer, config, wanted.layers)
    chosen, left = _sorted_out(names, wanted)
    if not chosen and not present:
        kinds = ", ".join(plain.__name__ for plain in LAYER_CHOICES[wanted.layers])
        root = type(next(iter(names.values()))).__name__
        raise ValueError(
            f"{root} has no layer to perturb with layers={wanted.layers!r}, which stands for: {kinds}.{_reasons(left)}"
        )
    if chosen:
        _convert(chosen, config, base_key(), present)
        _guard_parents(names.values())
    return left


def _convert(wanted: Sequence[_Candidate], config: LayerNoise, base_key: int, present: Sequence[FlipoutLayer]) -> None:
    following = 1 + max((layer.noise_index or 0 for layer in present), default=-1)
    for number, (plain, noise_on) in enumerate(wanted, start=following):
        flipout = perturbed_class(plain)
        assert flipout is not None, "only layers that have one are candidates"
        plain.__class__ = flipout
        assert isinstance(plain, FlipoutLayer), "the table holds perturbed classes"
        plain.init_noise(config, base_key, number, noise_on)


def _guard_parents(modules: Iterable[nn.Module]) -> None:
    """Keep modules with a fused path from going round children that are perturbed."""
    for parent in modules:
        guarded = guarded_parent(parent)
        if guarded is not None and any(isinstance(child, FlipoutLayer) for child in parent.modules()):
            parent.__class__ = guarded


def _sorted_out(names: Mapping[str, nn.Module], wanted: Wanted) -> tuple[list[_Candidate], dict[str, str]]:
    """Layers to perturb, and of those that stay plain without having been left out by name, why."""
    chosen: list[_Candidate] = []
    left: dict[str, str] = {}
    uncalled = {id(layer.out_proj) for layer in names.values() if _is_plain_attention(layer)}
    for name, layer in names.items():
        if isinstance(layer, FlipoutLayer) or is_skipped(name, wanted.skip) or id(layer) in uncalled:
            continue
        noise_on, reason = _noise_on(layer, wanted.layers), None
        if noise_on is not None:
            reason = (
                "is frozen; perturb_frozen=True perturbs it" if _is_frozen(layer) and not wanted.frozen else why_plain(layer)
            )
        elif wanted.layers == "all" and (matrices := own_matrices(name, layer)):
            left |= {own: why for own, why in matrices.items() if not is_skipped(own, wanted.skip)}
        elif wanted.layers == "all" and name and _has_weights(layer):
            reason = why_plain(layer)
        if reason is not None:
            left[name] = f"{type(layer).__name__} {reason}"
        elif noise_on is not None:
            chosen.append(_Candidate(layer, noise_on))
            if isinstance(layer, nn.MultiheadAttention):
                uncalled.discard(id(layer.out_proj))
    return chosen, left


def _is_plain_attention(layer: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether it is an attention that is not perturbed yet; as long as it stays so, it never calls its output projection."""
    return isinstance(layer, nn.MultiheadAttention) and not isinstance(layer, FlipoutLayer)


def _noise_on(layer: nn.Module, layers: str) -> str | None:
    """Which weights of a layer are asked for; ``None`` where the layer is none of the kind that is asked for."""
    for kind, noise_on in LAYER_CHOICES[layers].items():
        if isinstance(layer, kind):
            return noise_on
    return None


def _has_weights(layer: nn.Module) -> bool:
    """Whether a module has weights of its own; vectors, such as those of normalisation layers, are none."""
    if isinstance(layer, parametrize.ParametrizationList):  # what it holds are weights of the layer that it stands in
        return False
    parameters = list(layer.parameters(recurse=False))
    if parametrize.is_parametrized(layer):
        parameters += layer.get_submodule("parametrizations").parameters()
    return any(parameter.dim() > 1 for parameter in parameters if not _is_lazy(parameter))


def names_to_skip(names: Mapping[str, nn.Module]) -> list[str]:
    """
    List what ``skip`` may name.

    :param names: Modules by name
    :return: Their names, and those of matrices that modules hold beside other modules
    """
    return [*names, *(of_matrix for name, module in names.items() for of_matrix in own_matrices(name, module))]


def _is_lazy(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, nn.UninitializedParameter)


def _is_frozen(layer: nn.Module) -> bool:
    parameters = list(layer.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _reasons(left: Mapping[str, str]) -> str:
    return "".join(f" {name or 'It'}: {why}." for name, why in left.items())


def warn_of_plain(left: Mapping[str, str]) -> None:
    """
    Say which layers stay plain.

    :param left: Layers by name, and why
    """
    if left:
        warn_user(
            f"some layers stay plain, so nothing explores through their weights:{_reasons(left)} To say that this is as it "
            f"should be, name them: skip={sorted(left)!r}.",
        )


def checked_patterns(skip: str | Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """
    Refuse names of modules that fit none.

    :param skip: Names to leave out, with ``*`` for anything
    :param names: Names of all modules
    :return: The names, as a tuple
    :raises TypeError: If they are no strings
    :raises ValueError: If one fits no module
    """
    patterns = check_strings("skip", skip)
    known = [name for name in names if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
            raise ValueError(f"skip={pattern!r} fits no module; there are {shown}.{did_you_mean(pattern, known)}")
    return patterns


def is_skipped(name: str, patterns: Sequence[str]) -> bool:
    """
    Tell whether a module is left out, by its own name or by that of a module it is in.

    :param name: Name of the module
    :param patterns: Names to leave out
    :return: Whether it is
    """
    parts = name.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatchcase(part, pattern) for part in above for pattern in patterns)


def _check_present(layer: FlipoutLayer, config: LayerNoise, layers: str) -> None:
    """Refuse to perturb in one way what is perturbed in another."""
    if layer.noise_config != config:
        raise ValueError(f"a layer is already perturbed with {layer.noise_config}, not {config}; call restore first.")
    asked = _noise_on(layer, layers) or layer.noise_on
    if asked != layer.noise_on:
        present = f"a {type(layer).__name__} is already perturbed with noise_on={layer.noise_on!r}"
        raise ValueError(f"{present}, not {asked!r}; call restore first.")


def restore(module: M) -> M:
    """
    Turn perturbed layers back into plain torch.nn ones with the mean weights, in place.

    :param module: Network, or a single layer
    :return: The same network
    :raises ValueError: If layers have been parametrised since they were perturbed; then nothing is changed
    """
    layers = {layer: plain_class(layer) for layer in module.modules() if isinstance(layer, FlipoutLayer)}
    if None in layers.values():
        names = [name or "the layer" for name, layer in module.named_modules() if layers.get(layer, layer) is None]
        raise ValueError(
            f"{', '.join(names)} has been parametrised since it was perturbed; call remove_parametrizations first."
        )
    without(list(layers))
    for layer, plain in layers.items():
        noise = {name for block in layer.blocks for name in block.noise_names()}
        layer.__class__ = plain  # type: ignore[assignment]
        for book in (layer._parameters, layer._buffers):
            for name in noise:
                book.pop(name, None)
        # What the mixin says it has, and nothing that the plain class says too.
        for name in (*PerturbedWeights.__annotations__, *FlipoutLayer.__annotations__):
            layer.__dict__.pop(name, None)
    for parent in module.modules():
        plain = plain_class(parent)
        if plain is not None:
            parent.__class__ = plain
    return module
