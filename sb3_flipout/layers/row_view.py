"""What the rows of one layer see, and whom the layer asks for it."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch as th

from sb3_flipout.layers.block import Pair
from sb3_flipout.layers.weights import PerturbedWeights
from sb3_flipout.noise.rows import RowNoise


class Ask(Enum):
    """What rows can see besides noise."""

    #: Nobody has said anything: layers use their mean weights.
    NOTHING = "nothing"
    #: Mean weights were asked for by name.
    MEAN_WEIGHTS = "mean weights"
    #: An update runs, in which every pass has to say what its rows see; a layer that is called without raises.
    EXPLICIT = "explicit"


class RowView(NamedTuple):
    """
    What the rows of one layer see.

    :param noise: Row noise
    :param of_keys: The layer's factor vectors, alternately over inputs and outputs, each (N, units), those over outputs
        multiplied by the noise scale; none where rows are not told apart by factors. Where the noise says that neighbouring
        rows have the same key, there is one vector for them all
    :param rows: Number of rows N
    """

    noise: RowNoise
    of_keys: tuple[th.Tensor, ...]
    rows: int

    def vectors(self, block: int = 0) -> tuple[th.Tensor, th.Tensor]:
        """
        Take the factor vectors of one weight, one for each row; ask first whether there are any, by ``of_keys``.

        :param block: Number of the weight in its layer
        :return: Factors over inputs and over outputs, each (N, units)
        """
        s, r = self.of_keys[2 * block : 2 * block + 2]
        return self.noise.repeat_keys(s), self.noise.repeat_keys(r)

    def is_once(self, x: th.Tensor) -> bool:
        """
        Tell whether a layer got each input once, and not once for each of the rows that it is for.

        :param x: Inputs, as many as there are, in the first dimension
        :return: Whether it did
        """
        times = self.noise.rows_per_input
        return times > 1 and x.dim() > 0 and 0 < x.shape[0] * times == self.rows


class Network(Protocol):
    """What a layer knows of the network that it belongs to: :class:`~sb3_flipout.layers.network.PerturbedNetwork`."""

    def view(self, slot: int, layer: PerturbedWeights) -> RowView | None:
        """
        Say what the rows of one layer see.

        :param slot: Place of the layer in the network
        :param layer: The layer
        :return: Its part of the noise; ``None`` for mean weights
        """

    def kept_deltas(self, slot: int, layer: Any) -> Pair:
        """
        Compute the base perturbation of a layer of one weight, or look it up where it does not move.

        :param slot: Place of the layer in the network
        :param layer: The layer
        :return: Perturbation of weight and bias, before row factors and noise scale
        """
