"""The perturbed layers of one network, taken together: numbering, redrawing, and switching noise on and off."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers.base import Bases, FlipoutLayer
from sb3_flipout.layers.block import Block, Pair
from sb3_flipout.noise.keys import fold
from sb3_flipout.noise.rows import RowNoise
from sb3_flipout.noise.signs import FactorPlan


class NoisyNetwork:
    """
    A network with perturbed layers, and the plan by which one hash serves all of them.

    :param module: Network on which noise is switched
    :param parts: Where its perturbed layers are, if not in ``module`` as a whole; layers without a number, or with one that
        another part has too, are numbered here
    """

    def __init__(self, module: nn.Module, parts: Sequence[nn.Module] | None = None) -> None:
        # A compiled module forwards attributes to the one it wraps; noise is switched on the wrapped one.
        self.module: nn.Module = getattr(module, "_orig_mod", module)
        self.parts = [self.module] if parts is None else list(parts)
        self.layers = _flipout_layers(self.parts)
        self.module.__dict__["_noisy_network"] = self
        self._number()
        self._planned = [(layer.noise_config, layer.noise_index) for layer in self.layers]
        self.plan = FactorPlan([layer.vectors() for layer in self.layers])

    def _fits(self, layers: list[FlipoutLayer]) -> bool:
        # The same layer can have been restored and perturbed anew in another way, or renumbered in a larger network.
        return self.layers == layers and self._planned == [(layer.noise_config, layer.noise_index) for layer in layers]

    @staticmethod
    def of(module: nn.Module) -> NoisyNetwork:
        """
        Give the network of a module, remembered on the module as long as its perturbed layers stay the same.

        :param module: Network
        :return: Its perturbed layers and their plan
        """
        module = getattr(module, "_orig_mod", module)
        known: NoisyNetwork | None = module.__dict__.get("_noisy_network")
        if known is None or known.module is not module:
            return NoisyNetwork(module)
        return known if known._fits(_flipout_layers(known.parts)) else NoisyNetwork(module, known.parts)

    def _number(self) -> None:
        following = 1 + max((layer.noise_index for layer in self.layers if layer.noise_index is not None), default=-1)
        taken: set[int] = set()
        for layer in self.layers:
            if layer.noise_index in taken:  # two networks, perturbed apart and then joined
                layer.noise_index = None
            elif layer.noise_index is not None:
                taken.add(layer.noise_index)
            if layer.noise_index is None:
                layer.noise_index = following
                layer.redraw(layer.base_key)  # the draw depends on the number
                following += 1

    def redraw(self, base_key: int) -> None:
        """
        Draw the base perturbation of every layer.

        :param base_key: Key of the base
        """
        for layer in self.layers:
            layer.redraw(base_key)

    def bases(self) -> list[Bases]:
        """
        Give the base draws of all layers, to be bound again later.

        :return: Base key and draws, layer by layer
        """
        return [layer.bases() for layer in self.layers]

    def bind(self, bases: list[Bases]) -> None:
        """
        Bind base draws that :meth:`bases` gave.

        :param bases: Base key and draws, layer by layer
        """
        for layer, of_layer in zip(self.layers, bases, strict=True):
            layer.bind(of_layer)

    def activate(self, noise: RowNoise | None) -> _Activation:
        """
        Make a context in which the rows see this noise.

        :param noise: Row noise; ``None`` for mean weights
        :return: Context manager; leaving it restores what was active before
        """
        return _Activation(self, noise)

    def views(self, noise: RowNoise) -> list[tuple[RowNoise, tuple[th.Tensor, ...]]]:
        """
        Give each layer its part of the factors.

        :param noise: Row noise
        :return: For each layer, the noise and the layer's factor vectors
        """
        if not self.plan.width:
            return [(noise, ()) for _ in self.layers]
        vectors = noise.factors(self.plan, self.layers[0].like.dtype).split(self.plan.sizes, dim=1)  # type: ignore[no-untyped-call]
        return [(noise, tuple([vectors[piece] for piece in pieces])) for pieces in self.plan.pieces]


def _flipout_layers(modules: Sequence[nn.Module]) -> list[FlipoutLayer]:
    return [layer for module in modules for layer in module.modules() if isinstance(layer, FlipoutLayer)]


class _Activation:
    """Context manager of :meth:`NoisyNetwork.activate`."""

    def __init__(self, network: NoisyNetwork, noise: RowNoise | None) -> None:
        self._network = network
        self._noise = noise
        self._before: list[list[Any]] = []  # what was active before each time it was entered

    def __enter__(self) -> None:
        network, noise = self._network, self._noise
        states: list[Any] = [None] * len(network.layers) if noise is None else network.views(noise)
        before = [network.module.__dict__.get("explicit_noise")]
        # Written past nn.Module.__setattr__: these are no parameters, buffers or modules, and this is the hot path.
        network.module.__dict__["explicit_noise"] = (noise,)
        for layer, state in zip(network.layers, states, strict=True):
            before.append(layer.__dict__.get("_active"))
            layer.__dict__["_active"] = state
        self._before.append(before)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        network, before = self._network, self._before.pop()
        network.module.__dict__["explicit_noise"] = before[0]
        for layer, state in zip(network.layers, before[1:], strict=True):
            layer.__dict__["_active"] = state


def perturbed(module: nn.Module, keys: th.Tensor | RowNoise | None, scale: th.Tensor | float | None = None) -> _Activation:
    """
    Make a context in which the rows of a network see perturbed weights.

    ``with perturbed(net, keys): y = net(x)``

    It concerns this network only, not the process, and it draws nothing: the same keys give the same output, whatever
    the batch around a row. :func:`redraw` is what draws a new base perturbation.

    :param module: Network with perturbed layers, or one such layer
    :param keys: Noise keys, shape (N,), int64, on the network's device; ``None`` asks for mean weights by name
    :param scale: Noise scales c, shape (N,) or one number; 1 if not given
    :return: Context manager; leaving it restores what was active before
    :raises TypeError: If ``keys`` is not an int64 tensor
    :raises ValueError: If ``keys`` or ``scale`` has a wrong shape or device, or the network has no perturbed layer
    """
    network = NoisyNetwork.of(module)
    if keys is None:
        return network.activate(None)
    if not network.layers:
        raise ValueError(f"{type(module).__name__} has no perturbed layer; call sb3_flipout.perturb(module) first.")
    if isinstance(keys, RowNoise) and scale is not None:
        raise ValueError("scale must be None where keys is row noise, which has its own; give RowNoise(keys, scale).")
    noise = keys if isinstance(keys, RowNoise) else RowNoise(keys, scale)
    device = network.layers[0].like.device
    if noise.keys.device != device:
        raise ValueError(
            f"keys must be on the network's device {device}, got {noise.keys.device}; use keys.to({str(device)!r})."
        )
    return network.activate(noise)


def redraw(module: nn.Module, base_key: int | None = None) -> None:
    """
    Draw a new base perturbation for every perturbed layer of a network.

    Policies redraw by themselves, as their ``base_every`` says; what is drawn here by hand is not saved with them.

    :param module: Network with perturbed layers, or one such layer
    :param base_key: Key of the base, any integer; by default the one that follows from the layer's present key
    :raises TypeError: If ``base_key`` is not an integer
    """
    if base_key is not None and (isinstance(base_key, bool) or not isinstance(base_key, int)):
        raise TypeError(f"base_key must be an integer or None, got {type(base_key).__name__}.")
    for layer in NoisyNetwork.of(module).layers:
        layer.redraw(fold(layer.base_key, 0) if base_key is None else base_key)


def effective_weight(layer: FlipoutLayer, key: int | th.Tensor, scale: float = 1.0, name: str | None = None) -> Pair:
    """
    Materialise exactly the weights that the row with this key sees (Wen et al. 2018, eq. (3)).

    :param layer: Perturbed layer
    :param key: Noise key: an integer, or an int64 tensor of one element
    :param scale: Noise scale c
    :param name: Which weight of an LSTM, such as ``"weight_hh_l0"``; other layers have one only
    :return: That weight and its bias (``None`` if the layer has none), shapes of the layer's own
    :raises TypeError: If ``layer`` is not a perturbed layer
    :raises ValueError: If ``name`` is no weight of the layer, or missing where there are several
    """
    if not isinstance(layer, FlipoutLayer):
        raise TypeError(f"layer must be a perturbed layer, got {type(layer).__name__}; call sb3_flipout.perturb(layer) first.")
    block = _block(layer, name)
    mean, mean_bias = block.means(layer)
    if block in layer.quiet_blocks:
        return mean, mean_bias
    keys = th.as_tensor(key, dtype=th.int64, device=mean.device).reshape(1)
    weight, bias = layer.row_weights(keys, th.full((1,), scale, dtype=mean.dtype, device=mean.device), block)
    return weight[0], None if bias is None else bias[0]


def _block(layer: FlipoutLayer, name: str | None) -> Block:
    known = {block.weight: block for block in (*layer.blocks, *layer.quiet_blocks)}
    if name is None and len(known) == 1:
        return layer.blocks[0]
    if name not in known:
        raise ValueError(f"name must be a weight of the {type(layer).__name__}: {', '.join(sorted(known))}; got {name!r}.")
    return known[name]
