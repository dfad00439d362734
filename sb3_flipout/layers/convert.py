"""In-place conversion of a built network, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.config import LayerNoise, layer_noise, one_of
from sb3_flipout.layers.conv import FlipoutConv2d
from sb3_flipout.layers.linear import FlipoutLinear
from sb3_flipout.layers.lstm import FlipoutLSTM

M = TypeVar("M", bound=nn.Module)

#: Which torch.nn class becomes which perturbed class. Exact types only: a subclass may use its weights in its own way
#: (``nn.MultiheadAttention`` never calls the ``forward`` of its ``out_proj``).
PERTURBED_CLASSES: dict[type[nn.Module], type[FlipoutLayer]] = {
    nn.Linear: FlipoutLinear,
    nn.Conv2d: FlipoutConv2d,
    nn.LSTM: FlipoutLSTM,
}

#: What ``layers=`` may name: the torch.nn classes it stands for, and which of their weights.
LAYER_CHOICES: dict[str, dict[type[nn.Module], str]] = {
    "all": dict.fromkeys(PERTURBED_CLASSES, "all"),
    "linear": {nn.Linear: "all"},
    "hidden": {nn.LSTM: "hidden"},
}

_NOISE_ATTRIBUTES = (
    "noise_config",
    "noise_on",
    "noise_index",
    "base_key",
    "blocks",
    "quiet_blocks",
    "_active",
    "explicit_noise",
    "_noisy_network",
)


def perturb(module: M, layers: str = "all", base_key: int = 0, **noise: Any) -> M:
    """
    Turn the plain layers of a network into perturbed ones, in place.

    Modules and parameters stay the same objects under the same names, so references to them stay valid; an optimizer
    made before must be made anew, since sigma is new. Layers that are perturbed in the same way already are left alone.

    :param module: Network, or a single layer
    :param layers: ``"all"``; ``"linear"`` for linear layers only (NoisyNet's choice); or ``"hidden"`` for the
        hidden-to-hidden weights of LSTMs only (the choice of Wen et al. 2018). Another call can add others
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
        _check_present(layer, config, layers)
    wanted = [plain for plain in module.modules() if type(plain) in LAYER_CHOICES[layers]]
    for plain in wanted:
        PERTURBED_CLASSES[type(plain)].check_plain(plain)
    if not wanted and not present:
        names = ", ".join(plain.__name__ for plain in LAYER_CHOICES[layers])
        raise ValueError(f"{type(module).__name__} has no layer to perturb with layers={layers!r}, which stands for: {names}.")
    following = 1 + max((layer.noise_index or 0 for layer in present), default=-1)
    for number, plain in enumerate(wanted, start=following):
        noise_on = LAYER_CHOICES[layers][type(plain)]
        plain.__class__ = PERTURBED_CLASSES[type(plain)]
        assert isinstance(plain, FlipoutLayer), "the table holds perturbed classes"
        plain.init_noise(config, base_key, number, noise_on)
    return module


def _check_present(layer: FlipoutLayer, config: LayerNoise, layers: str) -> None:
    """Refuse to perturb in one way what is perturbed in another."""
    if layer.noise_config != config:
        raise ValueError(f"a layer is already perturbed with {layer.noise_config}, not {config}; call restore first.")
    asked = {PERTURBED_CLASSES[plain]: noise_on for plain, noise_on in LAYER_CHOICES[layers].items()}
    noise_on = asked.get(type(layer), layer.noise_on)
    if noise_on != layer.noise_on:
        raise ValueError(
            f"a {type(layer).__name__} is already perturbed with noise_on={layer.noise_on!r}, not {noise_on!r}; call restore "
            "first."
        )


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
            assert isinstance(layer, FlipoutLayer), "the table holds perturbed classes"
            sigmas = [name for block in layer.blocks for name in (block.weight_sigma, block.bias_sigma) if name]
            bases = [name for block in layer.blocks for name in (block.weight_base, block.bias_base) if name]
            layer.__class__ = plain  # type: ignore[assignment]
            books: tuple[tuple[Iterable[str], dict[str, Any]], ...] = (
                (sigmas, layer._parameters),
                (bases, layer._buffers),
                (_NOISE_ATTRIBUTES, layer.__dict__),
            )
            for names, book in books:
                for name in names:
                    book.pop(name, None)
            layer._non_persistent_buffers_set.difference_update(bases)
    return module
