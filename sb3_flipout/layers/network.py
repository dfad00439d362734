"""The perturbed layers of one network, and the one place that knows what their rows see now."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch as th

from sb3_flipout.layers import recomputation
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.block import FixedDelta, Pair
from sb3_flipout.layers.row_view import Ask, RowView
from sb3_flipout.layers.visits import Visits
from sb3_flipout.layers.weights import PerturbedWeights
from sb3_flipout.noise.compiling import eager
from sb3_flipout.noise.rows import RowNoise
from sb3_flipout.noise.signs import FactorPlan


class _Seen(NamedTuple):
    """
    What the rows see: one value, replaced as a whole.

    :param what: Row noise, or what else they see
    :param views: Under noise, what each layer needs of it; ``None`` for layers that keep their mean weights
    :param place: Where it was said, if in a checkpoint or a backward pass
    """

    what: RowNoise | Ask
    views: tuple[RowView | None, ...] | None = None
    place: object | None = None


_NOTHING = _Seen(Ask.NOTHING)


class PerturbedNetwork:
    """
    Perturbed layers that belong together: one noise for all of them, hashed at once.

    It holds the only switch. What the rows see now is one field of it; layers read their part and keep no copy. Making one
    changes nothing else: :func:`~sb3_flipout.layers.interface.attach` is what numbers layers and tells them of their network.

    :param layers: Perturbed layers, numbered
    :param of_policy: Whether it is the network of a policy, whose layers no other network may take
    """

    def __init__(self, layers: Sequence[FlipoutLayer], of_policy: bool = False) -> None:
        self.layers = tuple(layers)
        self.of_policy = of_policy
        self.plan = FactorPlan([layer.vectors() for layer in self.layers])
        #: What is noted of its passes, while somebody wants to know.
        self.visits: Visits | None = None
        self._now = _NOTHING
        self._kept: dict[int, tuple[FixedDelta, Pair]] | None = None

    # ---- what the rows see ---------------------------------------------------------------------------------------

    @property
    def active(self) -> RowNoise | Ask | None:
        """What was said about the rows: row noise, or mean weights by name; ``None`` if nothing was."""
        what = self._now.what
        return None if what in (Ask.NOTHING, Ask.EXPLICIT) else what

    @property
    def is_said(self) -> bool:
        """Whether something has been said about the rows: noise, mean weights by name, or that an update runs."""
        return self._now is not _NOTHING

    def is_whole(self) -> bool:
        """
        Tell whether all layers are still of this network, and not of one that they have been made part of since.

        :return: Whether they are
        """
        return all([layer.network is self for layer in self.layers])

    def view(self, slot: int, layer: PerturbedWeights) -> RowView | None:
        """
        Read what the rows of one layer see.

        :param slot: Place of the layer among the layers
        :param layer: The layer
        :return: Its part of the noise; ``None`` for mean weights
        :raises RuntimeError: If an update runs and nobody has said what the rows of this pass see
        """
        if th.compiler.is_compiling():
            return None if self._now.views is None else self._now.views[slot]
        now = self._now
        if recomputation.top_hooks(False) is not None or recomputation.backward_task() != -1:
            now = recomputation.seen(self, now, now.place)
        if now.what is Ask.EXPLICIT and now.views is None:
            raise RuntimeError(
                f"a perturbed {type(layer).__name__} was called in an update without noise, so what it learned from would not "
                "be what was collected. Call the policy's own methods with the observations of the batch, which carry their "
                "noise; in an evaluate_actions of your own, write its lines into `with sb3_flipout.perturbed(self, "
                "sb3_flipout.noise.noise_of(obs)):`; off-policy, ask the whole network, self.q_net(samples.observations) say, "
                "and not parts of it; ask for mean weights with `with sb3_flipout.perturbed(policy, None):`; "
                'or leave the module out with policy_kwargs=dict(skip=["its.name"]).'
            )
        view = None if now.views is None else now.views[slot]
        if self.visits is not None:
            if view is not None or (now.views is None and isinstance(now.what, RowNoise)):
                self.visits.called.add(slot)
            self.visits.unsaid |= now.what is Ask.NOTHING
        return view

    def activate(self, what: RowNoise | Ask | None, only: Sequence[FlipoutLayer] | None = None) -> Activation:
        """
        Make a context in which the rows see something.

        :param what: Row noise; ``None`` for mean weights
        :param only: Layers that it is about; ``None`` for all. The others see what they saw before
        :return: Context manager; leaving it restores what was seen before
        """
        kind = _EagerActivation if self.of_policy else Activation
        return kind(self, Ask.MEAN_WEIGHTS if what is None else what, only)

    def _seen(self, what: RowNoise | Ask, only: Sequence[FlipoutLayer] | None) -> _Seen:
        views: tuple[RowView | None, ...] | None = None
        if isinstance(what, RowNoise):
            if self.visits is not None:
                self.visits.given_noise = True
            views = self._views(what) if self._must_compute(what) else None
        place = None
        if not th.compiler.is_compiling() and (recomputation.top_hooks(False) or recomputation.backward_task() != -1):
            place = recomputation.place()
        if only is None:
            return _Seen(what, views, place)
        now = self._now if place is None else recomputation.seen(self, self._now, self._now.place)
        before = now.views or (None,) * len(self.layers)
        chosen = [layer in only for layer in self.layers]
        views = views or (None,) * len(self.layers)
        return _Seen(what, tuple(new if hit else old for hit, new, old in zip(chosen, views, before, strict=True)), place)

    def _must_compute(self, noise: RowNoise) -> bool:
        """
        Whether anything is to be computed for row noise. At scale 0 rows see the mean weights, at the price of those alone;
        but the gradient of sigma that learns is 0 then, and not none, and each input may stand for several rows.
        """
        return (
            not noise.silent
            or noise.rows_per_input > 1
            or not all([layer.noise_scaled and not layer.learns_sigma for layer in self.layers])
        )

    def _views(self, noise: RowNoise) -> tuple[RowView, ...]:
        """What each layer needs of row noise: the noise itself, and the factor vectors of its rows."""
        rows = noise.materialise()
        if not self.plan.width:
            return tuple([RowView(noise, (), rows) for _ in self.layers])
        dtypes = [layer.like.dtype for layer in self.layers]
        dtype, one_type = dtypes[0], len(set(dtypes)) == 1
        if not one_type:  # the factors are made in full precision
            dtype = th.float64 if th.float64 in dtypes else th.float32
        vectors = noise.factors(self.plan, dtype).split_with_sizes(self.plan.sizes, dim=1)
        of_layers = [tuple([vectors[piece] for piece in pieces]) for pieces in self.plan.pieces]
        if not one_type:
            of_layers = [tuple([v.to(own) for v in of_layer]) for of_layer, own in zip(of_layers, dtypes, strict=True)]
        return tuple([RowView(noise, of_layer, rows) for of_layer in of_layers])

    # ---- base perturbations --------------------------------------------------------------------------------------

    @contextmanager
    def keeping_deltas(self) -> Iterator[None]:
        """
        Keep base perturbations of fixed sigma from one pass to the next while the context is open.

        Where sigma is replaced or written into, they are made anew. Only what is written into ``sigma.data``, of which
        autograd keeps no count, is not noticed before the context is left.

        :return: Context manager
        """
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before

    def kept_deltas(self, slot: int, layer: FlipoutLayer) -> Pair:
        """
        Compute the base perturbation of a layer of one weight, or look it up.

        :param slot: Place of the layer among the layers
        :param layer: The layer
        :return: Perturbation of weight and bias, before row factors and noise scale
        """
        if th.compiler.is_compiling() or self._kept is None:
            return layer.deltas()
        made_of = layer.fixed_delta()
        if made_of is None:
            return layer.deltas()
        known = self._kept.get(slot)
        if known is None or not made_of.still(known[0]):
            known = self._kept[slot] = (made_of.held(), layer.deltas())
        return known[1]

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

    @contextmanager
    def noting(self) -> Iterator[Visits]:
        """
        Note what is called, and under what.

        :return: Context manager, which gives what is noted
        """
        before, self.visits = self.visits, Visits()
        try:
            yield self.visits
        finally:
            self.visits = before

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
        self.visits, self._now, self._kept = None, _NOTHING, None
        for slot, layer in enumerate(self.layers):
            layer.join(self, slot)


class Activation:
    """
    Context manager of :meth:`PerturbedNetwork.activate`.

    :param network: Network
    :param what: What its rows see
    :param only: Layers that it is about; ``None`` for all
    """

    def __init__(self, network: PerturbedNetwork, what: RowNoise | Ask, only: Sequence[FlipoutLayer] | None) -> None:
        self._network, self._what, self._only = network, what, only
        self._before: list[_Seen] = []  # what was seen before each time it was entered

    def __enter__(self) -> None:
        network = self._network
        if not network.of_policy and not network.is_whole():  # nobody takes layers of a policy's
            raise ValueError(
                "what was to be perturbed has become part of another network since: its layers were named together with "
                "others, or beside a network that shares some. Call perturbed(...) again (Population(...), likewise)."
            )
        self._before.append(network._now)
        network._now = network._seen(self._what, self._only)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._network._now = self._before.pop()


class _EagerActivation(Activation):
    """That of a policy: noise is drawn and counted in Python, so a compiled policy leaves it alone and keeps its graphs."""

    __enter__ = eager(Activation.__enter__)
    __exit__ = eager(Activation.__exit__)
