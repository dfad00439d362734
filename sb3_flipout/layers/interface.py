"""What users and policies call: which network layers belong to, what its rows are to see, and their weights written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch as th
from torch import nn

from sb3_flipout.checks import check_integer
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.block import Block, Pair
from sb3_flipout.layers.network import Activation, PerturbedNetwork
from sb3_flipout.noise.compiling import uncompiled
from sb3_flipout.noise.keys import fold
from sb3_flipout.noise.rows import RowNoise


def flipout_layers(modules: Iterable[nn.Module]) -> list[FlipoutLayer]:
    """
    List the perturbed layers inside modules, each once.

    :param modules: Modules
    :return: Layers, in the order of ``modules()``
    """
    found: dict[int, FlipoutLayer] = {}
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, FlipoutLayer):
                found.setdefault(id(layer), layer)
    return list(found.values())


def attach(layers: Sequence[FlipoutLayer], of_policy: bool = False) -> PerturbedNetwork:
    """
    Make perturbed layers one network: number those that have no number of their own, and tell each of its network.

    Layers that belonged to other networks leave them.

    :param layers: Perturbed layers
    :param of_policy: Whether it is the network of a policy, whose layers no other network may take
    :return: Their network
    :raises ValueError: If layers are of a network whose rows see something now: they would not see it any more
    """
    if any(isinstance(layer.network, PerturbedNetwork) and layer.network.is_said for layer in layers):
        raise ValueError(
            "perturbed layers that several networks share belong to one of them, whose rows see noise (or mean weights by "
            "name) at this moment; they would lose it. Make them one network before, by a module that holds all: "
            "perturbed(torch.nn.ModuleList([first, second]), None). Then name its parts as you like."
        )
    for layer in _without_number(layers):
        layer.noise_index = 1 + max((other.noise_index for other in layers if other.noise_index is not None), default=-1)
        layer.redraw(layer.base_key)  # the draw depends on the number
    network = PerturbedNetwork(layers, of_policy)
    for slot, layer in enumerate(layers):
        layer.join(network, slot)
    return network


def without(layers: Sequence[FlipoutLayer]) -> None:
    """
    Take layers out of their networks, before they become plain.

    :param layers: Perturbed layers
    """
    for network in {id(layer.network): layer.network for layer in layers}.values():
        if isinstance(network, PerturbedNetwork):
            rest = tuple(layer for layer in network.layers if not any(layer is leaving for leaving in layers))
            network.__setstate__(PerturbedNetwork(rest, network.of_policy).__getstate__())


def _without_number(layers: Sequence[FlipoutLayer]) -> Iterator[FlipoutLayer]:
    taken: set[int] = set()
    for layer in layers:
        if layer.noise_index in taken:  # two networks, perturbed apart and then joined
            layer.noise_index = None
        if layer.noise_index is None:
            yield layer
        assert layer.noise_index is not None, "attach has just numbered it"
        taken.add(layer.noise_index)


def network_of(module: nn.Module) -> PerturbedNetwork:
    """
    Find the network that the perturbed layers of a module belong to; they are made one where they are none yet.

    :param module: Module; one that names its network as ``perturbed_network``, as policies do, is believed
    :return: Network, whose layers may be more than those of the module
    :raises ValueError: If the module holds the networks of several policies, or layers of another network that sees something
        now
    """
    module = uncompiled(module)
    named = getattr(module, "perturbed_network", None)
    if isinstance(named, PerturbedNetwork):
        return named
    layers = flipout_layers([module])
    known = {id(layer.network): layer.network for layer in layers}
    networks = [network for network in known.values() if isinstance(network, PerturbedNetwork)]
    if len(known) == len(networks) == 1 and (networks[0].of_policy or _is_whole(networks[0])):
        return networks[0]
    if any(network.of_policy for network in networks):
        raise ValueError(
            f"{type(module).__name__} holds layers of several networks, that of a policy among them, so one noise cannot be "
            "about all of them. Name the policy itself, or one of its networks."
        )
    return attach(layers)


def _is_whole(network: PerturbedNetwork) -> bool:
    """Whether all layers of a network are still its own, and perturbed as when it was made."""
    vectors = network.plan.layers
    return all(
        isinstance(layer, FlipoutLayer) and layer.network is network and layer.vectors() == known
        for layer, known in zip(network.layers, vectors, strict=True)
    )


def perturbed(module: nn.Module, keys: th.Tensor | RowNoise | None, scale: th.Tensor | float | None = None) -> Activation:
    """
    Make a context in which the rows of a network see perturbed weights.

    ``with perturbed(net, keys): y = net(x)``

    It concerns this network only, not the process, and it draws nothing: the same keys give the same output, whatever
    the batch around a row. :func:`redraw` is what draws a new base perturbation.

    :param module: Network with perturbed layers, or a part of one
    :param keys: Noise keys, shape (N,), int64, on the network's device; ``None`` asks for mean weights by name
    :param scale: Noise scales c, shape (N,) or one number; 1 if not given
    :return: Context manager; leaving it restores what was active before
    :raises TypeError: If ``keys`` is not an int64 tensor
    :raises ValueError: If ``keys`` or ``scale`` has a wrong shape or device, the network has no perturbed layer, or another
        network that sees something now shares layers with it; when entered, if the layers have been named otherwise since
    """
    network = network_of(module)
    only = _part(network, module)
    if keys is None:
        return network.activate(None, only)
    if not network.layers or only == []:
        raise ValueError(f"{type(module).__name__} has no perturbed layer; call sb3_flipout.perturb(module) first.")
    if isinstance(keys, RowNoise) and scale is not None:
        raise ValueError("scale must be None where keys is row noise, which has its own; give RowNoise(keys, scale).")
    noise = keys if isinstance(keys, RowNoise) else RowNoise(keys, scale)
    device = network.layers[0].like.device
    if noise.keys.device != device:
        raise ValueError(
            f"keys must be on the network's device {device}, got {noise.keys.device}; use keys.to({str(device)!r})."
        )
    return network.activate(noise, only)


def _part(network: PerturbedNetwork, module: nn.Module) -> list[FlipoutLayer] | None:
    """The layers of a network that are in a module; ``None`` for all of them."""
    module = uncompiled(module)
    if getattr(module, "perturbed_network", None) is network:
        return None
    layers = flipout_layers([module])
    return None if len(layers) == len(network.layers) else layers


def layers_of(module: nn.Module) -> Sequence[FlipoutLayer]:
    """
    List the perturbed layers that :func:`perturbed` and :func:`redraw` are about, given a module.

    :param module: Network with perturbed layers, or a part of one
    :return: Layers
    """
    network = network_of(module)
    part = _part(network, module)
    return network.layers if part is None else part


def redraw(module: nn.Module, base_key: int | None = None) -> None:
    """
    Draw a new base perturbation for every perturbed layer of a network.

    Policies redraw by themselves, as their settings say; what is drawn here by hand is not saved with them. With ``members``
    it is: there the base is a part of the weights, and a new one makes other members of all that has been learned.

    :param module: Network with perturbed layers, or one such layer
    :param base_key: Key of the base, any integer; by default the one that follows from each layer's present key
    :raises TypeError: If ``base_key`` is not an integer
    """
    key = None if base_key is None else check_integer("base_key", base_key)
    for layer in layers_of(module):
        layer.redraw(fold(layer.base_key, 0) if key is None else key)


def effective_weight(layer: FlipoutLayer, key: int | th.Tensor, scale: float = 1.0, name: str | None = None) -> Pair:
    """
    Materialise exactly the weights that the row with this key sees (Wen et al. 2018, eq. (3)).

    :param layer: Perturbed layer
    :param key: Noise key: an integer, or an int64 tensor of one element
    :param scale: Noise scale c
    :param name: Which weight, of layers that have several, such as ``"weight_hh_l0"`` of an LSTM
    :return: That weight and its bias (``None`` if it has none), shapes of the layer's own
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
