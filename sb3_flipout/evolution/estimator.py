"""Evolution strategies vectorised by flipout: a population in one batched forward pass, its gradient in one matrix product.

Wen et al. 2018, section 4.4 ("FlipES"), on the estimator of Salimans et al. 2017. No part of this knows of environments or of
SB3: a fitness function of your own, a perturbed network, any torch optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_flipout.checks import check_choice, check_flag, check_integer, check_number
from sb3_flipout.evolution.shaping import SHAPINGS
from sb3_flipout.layers import FlipoutLayer, perturbed, redraw
from sb3_flipout.layers.interface import layers_of
from sb3_flipout.layers.network import Activation
from sb3_flipout.noise import RowNoise, Stream, fold, fold_in


class Told(NamedTuple):
    """
    What came of a generation.

    :param used: Members whose fitness counts
    :param dropped: Members whose fitness was not finite, and their antithetic twins
    :param stepped: Whether there is a gradient: not where no member is left, all have the same fitness, or the scale is 0
    """

    used: int
    dropped: int
    stepped: bool


class Population:
    """
    The members of an evolution strategy: perturbations of one network's weights, told apart by keys.

    ::

        import torch as th
        from sb3_flipout import perturb
        from sb3_flipout.evolution import Population

        net = perturb(th.nn.Linear(3, 1), learn_sigma=False)  # is to find the sum of three numbers
        optimizer = th.optim.Adam(net.parameters(), lr=0.05)
        population = Population(net, 1024)
        for _ in range(100):
            inputs, fitness = th.randn(1024, 3), th.empty(1024)
            for group in population.ask():
                x = inputs[group.rows]
                with group.members():  # row n is member n
                    fitness[group.rows] = -(net(x)[:, 0] - x.sum(dim=1)).square().detach()
            optimizer.zero_grad()
            population.tell(fitness)
            optimizer.step()

    Member n sees the weights ``W + c_n dW o r_n s_n^T``. The estimate is
    ``1/N sum_n u_n / c_n (dW o r_n s_n^T) / v``, with utility u and the variance v of a weight's perturbation at scale 1:
    unbiased for the gradient of the mean fitness under Gaussian perturbations, of whatever sigma. Where perturbations are
    relative to the weights, v is its mean over a layer, since weights of 0 have none. Parameters that are not perturbed get no
    gradient, and stay as they are: those of normalisation layers, skipped or frozen ones.

    The attribute ``scale`` multiplies all perturbations of the generations that are asked for from then on.

    :param module: Network with perturbed layers, or a part of one: its other layers then keep their mean weights
    :param size: Number of members N; even where they are antithetic
    :param seed: Seed, any integer: the generations are a pure function of it
    :param antithetic: Whether members come in pairs with opposite perturbations (Salimans et al. 2017, section 2.1)
    :param base_perturbations: Number M of base draws, each for N / M members
    :param shaping: Fitness shaping: ``"centred_ranks"``, ``"none"``, ``"normalised"`` or ``"top"`` (of ARS)
    :param top: Share of the pairs that ``"top"`` uses, in (0, 1]
    :raises TypeError: If a value has a wrong type
    :raises ValueError: If a value is out of range, or the network has no perturbed layer
    """

    def __init__(
        self,
        module: nn.Module,
        size: int,
        seed: int = 0,
        antithetic: bool = True,
        base_perturbations: int = 1,
        shaping: str = "centred_ranks",
        top: float = 1.0,
    ) -> None:
        self.module = module
        self.layers: Sequence[FlipoutLayer] = layers_of(module)
        if not self.layers:
            raise ValueError(f"{type(module).__name__} has no perturbed layer; call sb3_flipout.perturb(module) first.")
        self.antithetic = check_flag("antithetic", antithetic)
        self.size = check_integer("size", size, 2)
        self.base_perturbations = check_integer("base_perturbations", base_perturbations, 1)
        per_group = self.base_perturbations * (2 if self.antithetic else 1)
        if self.size % per_group:
            what = "pairs of members" if self.antithetic else "members"
            raise ValueError(
                f"size={self.size} must be a multiple of {per_group}: {what} are divided over "
                f"base_perturbations={self.base_perturbations}. Use size={-(-self.size // per_group) * per_group}, say."
            )
        self.seed = check_integer("seed", seed)
        self.shaping = check_choice("shaping", shaping, SHAPINGS)
        self.top = check_number("top", top, 0.0, 1.0, above=True)
        if self.top < 1 and self.shaping != "top":
            raise ValueError(f'top={top} has no effect with shaping={shaping!r}; give shaping="top", or leave top out.')
        self.scale = 1.0
        self.generation = 0  # the one that `ask` gives next
        self._asked: list[Group] = []

    def ask(self) -> list[Group]:
        """
        Begin the next generation.

        :return: Its members, in groups under one base draw each, in the order of their rows
        """
        device = self.layers[0].like.device
        step = 2 if self.antithetic else 1
        numbers = th.arange(self.size, device=device) // step
        keys = fold_in(fold(self.seed, Stream.POPULATION_KEYS, self.generation), numbers)
        scales = th.full((self.size,), float(self.scale), device=device)
        if self.antithetic:
            scales[1::2] *= -1
        self._asked, each = [], self.size // self.base_perturbations
        for number in range(self.base_perturbations):
            rows = slice(number * each, (number + 1) * each)
            base = fold(self.seed, Stream.POPULATION_BASE, self.generation, number)
            self._asked.append(Group(self.module, self.layers, rows, RowNoise(keys[rows], scales[rows]), base))
        self.generation += 1
        return self._asked

    def tell(self, fitness: th.Tensor) -> Told:
        """
        Add the estimate to the gradients of the mean weights: downhill for an optimizer, which minimises.

        :param fitness: Fitness of each member, the larger the better, shape (N,); a member whose fitness is not finite is
            dropped, with its antithetic twin
        :return: What came of it
        :raises TypeError: If it is no tensor
        :raises ValueError: If the shape is another one
        :raises RuntimeError: If no generation has been asked for since the last was told
        """
        if not isinstance(fitness, th.Tensor):
            raise TypeError(f"fitness must be a tensor, got {type(fitness).__name__}; use torch.as_tensor(fitness).")
        if not self._asked:
            raise RuntimeError("tell needs a generation that was asked for; call ask() before each tell().")
        if fitness.shape != (self.size,):
            raise ValueError(f"fitness must have shape ({self.size},), one number per member, got {tuple(fitness.shape)}.")
        pairs = th.arange(self.size, device=fitness.device) // (2 if self.antithetic else 1)
        whole = th.isfinite(fitness)
        if self.antithetic:
            whole = (whole[::2] & whole[1::2]).repeat_interleave(2)
        utilities, used = th.zeros_like(fitness, dtype=th.float64), int(whole.sum())
        if used:
            utilities[whole] = SHAPINGS[self.shaping](fitness[whole].double(), pairs[whole], self.top)
        groups, self._asked = self._asked, []
        differs = used > 0 and bool((fitness[whole] != fitness[whole][0]).any())
        differs = differs and any(bool(group.noise.scale.any()) for group in groups)
        if differs:
            self._add_gradients(groups, utilities / used)
        return Told(used, self.size - used, differs)

    def _add_gradients(self, groups: list[Group], shares: th.Tensor) -> None:
        means, gradients = [], []
        sums = [_estimate(group, shares[group.rows]) for group in groups]
        for number, mean in enumerate(mean for layer in self.layers for mean in layer.means()):
            if mean.requires_grad:  # not a frozen one
                means.append(mean)
                gradients.append(-th.stack([of_group[number] for of_group in sums]).sum(0))
        th.autograd.backward(means, gradients)


class Group:
    """
    Members under one base draw, which are evaluated together.

    :param module: Network
    :param layers: Its perturbed layers
    :param rows: Which of the population's members they are
    :param noise: Their keys and scales
    :param base_key: Key of their base draw
    """

    def __init__(self, module: nn.Module, layers: Sequence[FlipoutLayer], rows: slice, noise: RowNoise, base_key: int) -> None:
        self.module, self.layers = module, layers
        self.rows, self.noise, self.base_key = rows, noise, base_key

    def members(self, some: slice | th.Tensor | None = None) -> AbstractContextManager[None]:
        """
        Make a context in which row n of a batch is member n of the group.

        :param some: Which members of the group the batch has; ``None`` for all of them
        :return: Context manager
        """
        return _Members(self, self.noise if some is None else self.noise[some])


class _Members:
    """Context manager of :meth:`Group.members`."""

    def __init__(self, group: Group, noise: RowNoise) -> None:
        self._group = group
        self._activation: Activation = perturbed(group.module, noise)

    def __enter__(self) -> None:
        redraw_to(self._group.module, self._group.layers, self._group.base_key)
        self._activation.__enter__()

    def __exit__(self, *error: object) -> None:
        self._activation.__exit__(None, None, None)


def redraw_to(module: nn.Module, layers: Sequence[FlipoutLayer], base_key: int) -> None:
    """
    Draw a base perturbation, unless it is the present one.

    :param module: Network
    :param layers: Its perturbed layers
    :param base_key: Key of the base
    """
    if any(layer.base_key != base_key for layer in layers):
        redraw(module, base_key)


@th.no_grad()
def _estimate(group: Group, shares: th.Tensor) -> list[th.Tensor]:
    """The part of the estimate that a group's members give, for each mean weight and bias of the network."""
    redraw_to(group.module, group.layers, group.base_key)
    keys, scales = group.noise.keys, group.noise.scale.double()
    shares = th.where(scales == 0, th.zeros_like(scales), shares.to(scales.device) / scales)
    found = []
    for layer in group.layers:
        relative = layer.noise_config.spec.relative
        for block in layer.blocks:
            for total, variance in zip(layer.summed_deltas(keys, shares, block), layer.variances(block), strict=True):
                if total is not None and variance is not None:
                    size = variance.mean() if relative else variance
                    found.append(th.where(size == 0, th.zeros_like(total), total / size))
    return found
