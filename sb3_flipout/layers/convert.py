"""In-place conversion of a built network, and back."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.config import layer_noise, one_of
from sb3_flipout.layers.conv import FlipoutConv2d
from sb3_flipout.layers.linear import FlipoutLinear

M = TypeVar("M", bound=nn.Module)

#: Which torch.nn class becomes which perturbed class. Exact types only: a subclass may use its weights in its own way
#: (``nn.MultiheadAttention`` never calls the ``forward`` of its ``out_proj``).
PERTURBED_CLASSES: dict[type[nn.Module], type[FlipoutLayer]] = {nn.Linear: FlipoutLinear, nn.Conv2d: FlipoutConv2d}

#: What ``layers=`` may name, and the torch.nn classes it stands for.
LAYER_CHOICES: dict[str, tuple[type[nn.Module], ...]] = {
    "all": tuple(PERTURBED_CLASSES),
    "linear": (nn.Linear,),
}

_NOISE_PARAMETERS = ("weight_sigma", "bias_sigma")
_NOISE_BUFFERS = ("weight_base", "bias_base")
_NOISE_ATTRIBUTES = ("noise_config", "noise_index", "base_key", "_active", "explicit_noise", "_noisy_network")


def perturb(module: M, layers: str = "all", base_key: int = 0, **noise: Any) -> M:
    """
    Turn the plain layers of a network into perturbed ones, in place.

    Modules and parameters stay the same objects under the same names, so references to them stay valid; an optimizer
    made before must be made anew, since sigma is new. Layers that are perturbed in the same way already are left alone.

    :param module: Network, or a single layer
    :param layers: ``"all"``, or ``"linear"`` for linear layers only (NoisyNet's choice)
    :param base_key: Key of the base perturbation, any integer
    :param noise: ``family``, ``sigma_init``, ``learn_sigma``, ``noise_sharing``, ``init`` as in
        :class:`~sb3_flipout.layers.config.LayerNoise`
    :return: The same network
    :raises ValueError: If a setting is unknown, out of range or unfit, or a layer is already perturbed in another way
    """
    one_of("layers", layers, LAYER_CHOICES)
    if isinstance(base_key, bool) or not isinstance(base_key, int):
        raise TypeError(f"base_key must be an integer, got {type(base_key).__name__}.")
    config = layer_noise(noise)
    present = [layer for layer in module.modules() if isinstance(layer, FlipoutLayer)]
    for layer in present:
        if layer.noise_config != config:
            raise ValueError(f"a layer is already perturbed with {layer.noise_config}, not {config}; call restore first.")
    wanted = [plain for plain in module.modules() if type(plain) in LAYER_CHOICES[layers]]
    if not wanted and not present:
        names = ", ".join(plain.__name__ for plain in LAYER_CHOICES[layers])
        raise ValueError(f"{type(module).__name__} has no layer to perturb with layers={layers!r}, which stands for: {names}.")
    following = 1 + max((layer.noise_index or 0 for layer in present), default=-1)
    for number, plain in enumerate(wanted, start=following):
        plain.__class__ = PERTURBED_CLASSES[type(plain)]
        assert isinstance(plain, FlipoutLayer), "the table holds perturbed classes"
        plain.init_noise(config, base_key, number)
    return module


def restore(module: M) -> M:
    """
    Turn perturbed layers back into plain torch.nn ones with the mean weights, in place.

    :param module: Network, or a single layer
    :return: The same network
    """
    plain_classes: dict[type[nn.Module], type[nn.Module]] = {noisy: plain for plain, noisy in PERTURBED_CLASSES.items()}
    for layer in list(module.modules()):
        layer.__dict__.pop("_noisy_network", None)
        layer.__dict__.pop("explicit_noise", None)
        plain = plain_classes.get(type(layer))
        if plain is not None:
            layer.__class__ = plain
            books: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
                (_NOISE_PARAMETERS, layer._parameters),
                (_NOISE_BUFFERS, layer._buffers),
                (_NOISE_ATTRIBUTES, layer.__dict__),
            )
            for names, book in books:
                for name in names:
                    book.pop(name, None)
            layer._non_persistent_buffers_set.difference_update(_NOISE_BUFFERS)
    return module
