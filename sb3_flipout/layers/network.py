"""The perturbed layers of one network, and the one place that knows what their rows see now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from types import TracebackType
from typing import Any, NamedTuple

import torch as th
from torch import nn

from sb3_flipout.checks import check_integer
from sb3_flipout.layers import recomputation
from sb3_flipout.layers.base import FlipoutLayer, RowView
from sb3_flipout.layers.block import Block, Pair
from sb3_flipout.noise.keys import fold
from sb3_flipout.noise.rows import RowNoise
from sb3_flipout.noise.signs import FactorPlan


class Ask(Enum):
    """What rows can see besides noise."""

    #: Nobody has said anything: layers use their mean weights.
    NOTHING = "nothing"
    #: Mean weights were asked for by name.
    MEAN_WEIGHTS = "mean weights"
    #: An update runs, in which every pass has to say what its rows see; a layer that is called without raises.
    EXPLICIT = "explicit"


class _Seen(NamedTuple):
    """
    What the rows see: one value, replaced as a whole.

    :param what: Row noise, or what else they see
    :param views: Under noise, what each layer needs of it; ``None`` for layers that keep their mean weights
    """

    what: RowNoise | Ask
    views: tuple[RowView | None, ...] | None = None


_NOTHING = _Seen(Ask.NOTHING)


class PerturbedNetwork:
    """
    Perturbed layers that belong together: one noise for all of them, hashed at once.

    It holds the only switch. What the rows see now is one field of it; layers read their part and keep no copy. Making one
    changes nothing else: :func:`attach` is what numbers layers and tells them of their network.

    :param layers: Perturbed layers, numbered
    :param of_policy: Whether it is the network of a policy, whose layers no other network may take
    """

    def __init__(self, layers: Sequence[FlipoutLayer], of_policy: bool = False) -> None:
        self.layers = tuple(layers)
        self.of_policy = of_policy
        self.plan = FactorPlan([layer.vectors() for layer in self.layers])
        #: Numbers of the layers that have been called under noise, while somebody wants to know.
        self.visited: set[int] | None = None
        self._now = _NOTHING
        self._was_noisy = False

    # ---- what the rows see ---------------------------------------------------------------------------------------

    @property
    def active(self) -> RowNoise | Ask | None:
        """What was said about the rows: row noise, or mean weights by name; ``None`` if nothing was."""
        what = self._now.what
        return None if what in (Ask.NOTHING, Ask.EXPLICIT) else what

    def view(self, slot: int, layer: FlipoutLayer) -> RowView | None:
        """
        Read what the rows of one layer see.

        :param slot: Place of the layer among the layers
        :param layer: The layer
        :return: Its part of the noise; ``None`` for mean weights
        :raises RuntimeError: If an update runs and nobody has said what the rows of this pass see
        """
        now = self._now
        if now.views is None:
            if now.what is Ask.MEAN_WEIGHTS or th.compiler.is_compiling():
                return None
            return self._unsaid(slot, layer)
        view = now.views[slot]
        if view is not None and self.visited is not None and not th.compiler.is_compiling():
            self.visited.add(slot)
        return view

    def _unsaid(self, slot: int, layer: FlipoutLayer) -> RowView | None:
        """A pass that nobody has said anything about: one that autograd repeats, one that was forgotten, or mean weights."""
        if self._was_noisy and recomputation.in_backward():
            seen = recomputation.look_up(self)
            if seen is not None:
                return seen.views[slot] if seen.views is not None else None
        if self._now.what is Ask.EXPLICIT:
            raise RuntimeError(
                f"a perturbed {type(layer).__name__} was called in an update without noise, so what it learned from would not "
                "be what was collected. Call the policy's own methods with the observations of the batch, which carry their "
                "noise; ask for mean weights with `with sb3_flipout.perturbed(policy, None):`; or leave the module out with "
                'policy_kwargs=dict(skip=["its.name"]).'
            )
        return None

    def note(self, output: th.Tensor) -> None:
        """
        Remember what the rows saw, where autograd may ask for the pass again.

        :param output: What a layer has computed under noise
        """
        if not th.compiler.is_compiling() and recomputation.is_recorded():
            recomputation.note(output, self, self._now)

    def activate(self, what: RowNoise | Ask | None, only: Sequence[FlipoutLayer] | None = None) -> Activation:
        """
        Make a context in which the rows see something.

        :param what: Row noise; ``None`` for mean weights
        :param only: Layers that it is about; ``None`` for all. The others see what they saw before
        :return: Context manager; leaving it restores what was seen before
        """
        return Activation(self, Ask.MEAN_WEIGHTS if what is None else what, only)

    @th.compiler.disable  # type: ignore[untyped-decorator]
    def _seen(self, what: RowNoise | Ask, only: Sequence[FlipoutLayer] | None) -> _Seen:
        views: tuple[RowView | None, ...] | None = None
        if isinstance(what, RowNoise):
            views, self._was_noisy = self._views(what), True
        if only is None:
            return _Seen(what, views)
        before = self._now.views or (None,) * len(self.layers)
        chosen = [layer in only for layer in self.layers]
        views = views or (None,) * len(self.layers)
        return _Seen(what, tuple(new if hit else old for hit, new, old in zip(chosen, views, before, strict=True)))

    def _views(self, noise: RowNoise) -> tuple[RowView, ...]:
        """What each layer needs of row noise: the noise itself, and the factor vectors of its rows."""
        if not self.plan.width:
            return tuple([RowView(noise, ()) for _ in self.layers])
        dtypes = {layer.like.dtype for layer in self.layers}
        # In networks of several types the factors are made in full precision, and each layer casts its own.
        dtype = dtypes.pop() if len(dtypes) == 1 else th.float64 if th.float64 in dtypes else th.float32
        vectors = noise.factors(self.plan, dtype).split(self.plan.sizes, dim=1)  # type: ignore[no-untyped-call]
        return tuple([RowView(noise, tuple([vectors[piece] for piece in pieces])) for pieces in self.plan.pieces])

    # ---- base perturbations --------------------------------------------------------------------------------------

    def redraw(self, base_key: int) -> None:
        """
        Draw the base perturbation of every layer.

        :param base_key: Key of the base
        """
        for layer in self.layers:
            layer.redraw(base_key)

    def bases(self) -> list[Any]:
        """
        Take the base draws of all layers, to be bound again later.

        :return: Base key and draws, layer by layer
        """
        return [layer.bases() for layer in self.layers]

    def bind(self, bases: list[Any]) -> None:
        """
        Bind base draws that :meth:`bases` gave.

        :param bases: Base key and draws, layer by layer
        """
        for layer, of_layer in zip(self.layers, bases, strict=True):
            layer.bind(of_layer)

    # ---- copies --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """
        Keep the layers in copies and pickles, and nothing of the run: in a copy nothing is active.

        :return: Attributes
        """
        return {"layers": self.layers, "plan": self.plan, "of_policy": self.of_policy}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """
        Become a copy, and tell the copied layers of it.

        :param state: What :meth:`__getstate__` gave
        """
        self.__dict__.update(state)
        self.visited, self._now, self._was_noisy = None, _NOTHING, False
        for slot, layer in enumerate(self.layers):
            layer.join(self, slot)


class Activation:
    """Context manager of :meth:`PerturbedNetwork.activate`."""

    def __init__(self, network: PerturbedNetwork, what: RowNoise | Ask, only: Sequence[FlipoutLayer] | None) -> None:
        self._network, self._what, self._only = network, what, only
        self._before: list[_Seen] = []  # what was seen before each time it was entered

    def __enter__(self) -> None:
        network = self._network
        self._before.append(network._now)
        network._now = network._seen(self._what, self._only)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._network._now = self._before.pop()


# ---- layers and their network ---------------------------------------------------------------------------------------


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
    """
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
        if network is not None:
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
    :raises ValueError: If the module holds the networks of several policies
    """
    module = getattr(module, "_orig_mod", module)  # a compiled module forwards to the one it wraps
    named = getattr(module, "perturbed_network", None)
    if isinstance(named, PerturbedNetwork):
        return named
    layers = flipout_layers([module])
    known = {id(layer.network): layer.network for layer in layers}
    network = next(iter(known.values()), None)
    if len(known) == 1 and network is not None and (network.of_policy or _is_whole(network)):
        return network
    if any(of_layer is not None and of_layer.of_policy for of_layer in known.values()):
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


def perturbed(
    module: nn.Module, keys: th.Tensor | RowNoise | None, scale: th.Tensor | float | None = None
) -> Activation:
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
    :raises ValueError: If ``keys`` or ``scale`` has a wrong shape or device, or the network has no perturbed layer
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
        raise ValueError(f"keys must be on the network's device {device}, got {noise.keys.device}; use keys.to({str(device)!r}).")
    return network.activate(noise, only)


def _part(network: PerturbedNetwork, module: nn.Module) -> list[FlipoutLayer] | None:
    """The layers of a network that are in a module; ``None`` for all of them."""
    module = getattr(module, "_orig_mod", module)
    if getattr(module, "perturbed_network", None) is network:
        return None
    layers = flipout_layers([module])
    return None if len(layers) == len(network.layers) else layers


def redraw(module: nn.Module, base_key: int | None = None) -> None:
    """
    Draw a new base perturbation for every perturbed layer of a network.

    Policies redraw by themselves, as their settings say; what is drawn here by hand is not saved with them.

    :param module: Network with perturbed layers, or one such layer
    :param base_key: Key of the base, any integer; by default the one that follows from each layer's present key
    :raises TypeError: If ``base_key`` is not an integer
    """
    key = None if base_key is None else check_integer("base_key", base_key)
    network = network_of(module)
    for layer in network.layers if _part(network, module) is None else flipout_layers([module]):
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
