"""A weight with its bias, as a perturbed layer knows them: by name."""

from __future__ import annotations

from typing import NamedTuple

import torch as th
from torch import nn

Pair = tuple[th.Tensor, th.Tensor | None]  # of a weight and of its bias, if it has one
MaybePair = tuple[th.Tensor | None, th.Tensor | None]


class FixedDelta(NamedTuple):
    """
    What a base perturbation is made of that moves only by hand: base draws, and sigma that is fixed.

    :param draws: Base draws by name, never written into
    :param sigmas: Sigma of weight and bias, as far as there are both
    :param stamp: Of each sigma where its numbers lie, and how often autograd has seen them written into
    """

    draws: dict[str, th.Tensor]
    sigmas: tuple[th.Tensor, ...]
    stamp: tuple[int, ...]

    def held(self) -> FixedDelta:
        """
        Hold on to the numbers themselves: ``parameter.data = other`` moves a parameter to others, and as long as these are
        held, nothing else can lie where they do.

        :return: The same, for a later comparison
        """
        return self._replace(sigmas=tuple([sigma.detach() for sigma in self.sigmas]))

    def still(self, before: FixedDelta) -> bool:
        """
        Tell whether nothing has moved.

        :param before: What it was made of before, held
        :return: Whether these are the same numbers, and nobody has written into them
        """
        return self.draws is before.draws and self.stamp == before.stamp


class Block:
    """
    A weight with its bias, by their names in a layer. Most layers are one block, an LSTM two per layer.

    Vectors of block i are numbered 2i (factors over inputs) and 2i + 1 (over outputs). The draws of a row of its own, under
    ``noise_sharing="independent"``, are numbered 2i + 2 (weight) and 2i + 3 (bias); no layer has both kinds.

    :param weight: Name of the weight; sigma and base are named after it
    :param bias: Name of the bias; ``None`` where the layer has no such name
    :param number: The block's number among the perturbed ones of its layer
    """

    def __init__(self, weight: str = "weight", bias: str | None = "bias", number: int = 0) -> None:
        self.weight, self.bias, self.number = weight, bias, number
        # Written out once, since the hot path asks for them.
        self.weight_sigma, self.bias_sigma = f"{weight}_sigma", bias and f"{bias}_sigma"
        self.weight_base, self.bias_base = f"{weight}_base", bias and f"{bias}_base"

    def means(self, layer: nn.Module) -> Pair:
        """
        Look up mean weight and mean bias.

        :param layer: The layer
        :return: The layer's own tensors
        """
        return getattr(layer, self.weight), None if self.bias is None else getattr(layer, self.bias)

    def sigmas(self, layer: nn.Module) -> MaybePair:
        """
        Look up sigma of weight and bias; a family may have none, or one for both, which is that of the weight.

        :param layer: The layer
        :return: The layer's own parameters
        """
        return getattr(layer, self.weight_sigma), None if self.bias_sigma is None else getattr(layer, self.bias_sigma)

    def noise_names(self) -> list[str]:
        """
        List the names that noise has given the layer.

        :return: Names of sigma and of base draws
        """
        return [name for name in (self.weight_sigma, self.bias_sigma, self.weight_base, self.bias_base) if name]
