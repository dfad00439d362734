"""What all perturbed layers share: sigma, the base draw, and the way to the network that says what their rows see.

A layer is in one of two states, and ``module.training`` is neither: without active noise it computes what its torch.nn
parent computes, with the very same code; with active noise each row sees its own weights.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch as th
from torch import nn

from sb3_flipout.layers import functional
from sb3_flipout.layers.block import Block, MaybePair, Pair
from sb3_flipout.layers.config import LayerNoise
from sb3_flipout.layers.row_layout import FIRST, RowLayout
from sb3_flipout.noise.bases import base_draws
from sb3_flipout.noise.keys import fold
from sb3_flipout.noise.rows import RowNoise
from sb3_flipout.noise.signs import LayerVectors, factors, salts
from sb3_flipout.noise.tables import FactorKind

if TYPE_CHECKING:
    from sb3_flipout.layers.network import PerturbedNetwork

Bases = tuple[int, dict[str, th.Tensor]]  # base key, and draws by name


class RowView(NamedTuple):
    """
    What the rows of one layer see.

    :param noise: Row noise
    :param vectors: The layer's factor vectors, alternately over inputs and outputs, each (N, units), those over outputs
        multiplied by the noise scale; none where rows are not told apart by factors
    """

    noise: RowNoise
    vectors: tuple[th.Tensor, ...]


class FlipoutLayer(nn.Module, ABC):
    """
    Mixin of all perturbed layers; stands before the torch.nn class in their bases.

    Parameters beside the parent's: one named ``<name>_sigma`` for each perturbed weight and bias. Nothing keeps sigma positive,
    and 0 is exactly the plain layer. Where the base is symmetric about 0 (all families but ``factorised``) sigma's sign changes
    no law; with ``factorised``, where the factors alone are the noise, one flipped sign changes how weights go together.
    """

    #: What ``noise_on=`` may name.
    NOISE_ON: ClassVar[tuple[str, ...]] = ("all",)
    #: The torch.nn class whose weights these are.
    PLAIN: ClassVar[type[nn.Module]]

    noise_config: LayerNoise
    noise_on: str = "all"
    noise_index: int | None
    noise_scaled: bool = True  # whether the noise scale multiplies the layer's noise
    row_layout: RowLayout = FIRST
    base_key: int
    keeps_base: bool = False  # whether base draws are part of the state_dict: those of an ensemble are as much as weights
    blocks: tuple[Block, ...] = (Block(),)  # the perturbed ones
    quiet_blocks: tuple[Block, ...] = ()  # those that noise_on= leaves alone
    _base_draws: dict[str, th.Tensor]
    _network: PerturbedNetwork | None = None
    _slot: int = -1

    # ---- construction -------------------------------------------------------------------------------------------

    def init_noise(
        self, config: LayerNoise, base_key: int | None = None, noise_index: int | None = None, noise_on: str = "all"
    ) -> None:
        """
        Add sigma and draw the base; constructors and in-place conversion both come here.

        :param config: How the layer is perturbed
        :param base_key: Key of the base perturbation; ``None`` draws one from torch's generator, as weights are drawn
        :param noise_index: The layer's number in its network; ``None``: numbered when the network is first perturbed
        :param noise_on: Which of its weights are perturbed: one of the class's ``NOISE_ON``
        """
        self.noise_config = config
        self.noise_index = noise_index
        self._choose_blocks(noise_on)
        if config.init == "noisynet":
            self._init_noisynet_means()
        for block in self.blocks:
            self._init_sigma(block)
        self.redraw(drawn_base_key() if base_key is None else base_key)

    @classmethod
    def why_not(cls, plain: nn.Module) -> str | None:
        """
        Say why a torch.nn layer cannot be served.

        :param plain: Layer to be converted
        :return: The reason, to follow the layer's name; ``None`` if it can be served
        """
        return None

    def _choose_blocks(self, noise_on: str) -> None:
        """Set ``blocks`` and ``quiet_blocks``; layers of one block have nothing to choose."""

    def _init_noisynet_means(self) -> None:
        """Mu ~ U(-b, b): b = sqrt(3/p) for independent and 1/sqrt(p) for factorised noise (Fortunato et al. 2018, 3.2)."""
        numerator = 3.0 if self.noise_config.family == "gaussian" else 1.0
        for block in self.blocks:
            bound = math.sqrt(numerator / self.fan_in(block))
            for mean in block.means(self):
                if mean is not None:
                    nn.init.uniform_(mean, -bound, bound)

    def _init_sigma(self, block: Block) -> None:
        config, spec = self.noise_config, self.noise_config.spec
        weight, bias = block.means(self)
        learned = config.learn_sigma and spec.sigma == "per_weight"
        sigma = config.sigma(self.fan_in(block))
        per_layer = spec.sigma == "per_layer"
        for name, mean in ((block.weight_sigma, weight), (block.bias_sigma, None if per_layer else bias)):
            if name is None:
                continue
            if mean is None or spec.sigma == "none":
                self.register_parameter(name, None)
            else:
                initial = mean.detach().new_full(() if per_layer else mean.shape, sigma)
                setattr(self, name, nn.Parameter(initial, requires_grad=learned))

    # ---- the network that it belongs to ---------------------------------------------------------------------------

    @property
    def network(self) -> PerturbedNetwork | None:
        """The network that says what the rows of this layer see; ``None`` until it is first perturbed."""
        return self._network

    def join(self, network: PerturbedNetwork, slot: int) -> None:
        """
        Become part of a network; only :func:`~sb3_flipout.layers.network.attach` and copies of networks call this.

        :param network: The network
        :param slot: Place among its layers
        """
        self._network, self._slot = network, slot

    def row_view(self) -> RowView | None:
        """
        Look up what the rows see now.

        :return: The layer's part of the active noise; ``None`` for mean weights
        """
        network = self._network
        return None if network is None else network.view(self._slot, self)

    def noted(self, output: th.Tensor) -> th.Tensor:
        """
        Hand out what was computed under noise, after a note for passes that autograd repeats.

        :param output: Output of the layer
        :return: The same
        """
        if self._network is not None:
            self._network.note(output)
        return output

    # ---- weights and base draws -----------------------------------------------------------------------------------

    @property
    def like(self) -> th.Tensor:
        """A mean weight, to tell the layer's floating-point type and device."""
        weight: th.Tensor = getattr(self, self.blocks[0].weight)
        return weight

    def means(self) -> list[th.Tensor]:
        """
        List the mean weights and biases that are perturbed.

        :return: The layer's own tensors, each weight before its bias
        """
        return [mean for block in self.blocks for mean in block.means(self) if mean is not None]

    def redraw(self, base_key: int) -> None:
        """
        Draw the base perturbation, a pure function of the base key and the layer's number.

        New tensors are bound, never filled in place: a backward pass that still waits sees the draw it was made with.

        :param base_key: Key of the base, any integer
        """
        draws = {}
        for block, pair in zip(self.blocks, self._draw_bases(base_key), strict=True):
            names = (block.weight_base, block.bias_base)
            draws |= {name: draw for name, draw in zip(names, pair, strict=True) if name is not None and draw is not None}
        self.bind((base_key, draws))

    def _draw_bases(self, base_key: int) -> list[MaybePair]:
        sharing, law = self.noise_config.noise_sharing, self.noise_config.spec.base
        means = [block.means(self) for block in self.blocks]
        like = means[0][0]
        if law is not None and sharing != "independent":
            shapes = [mean.shape for pair in means for mean in pair if mean is not None]
            draws = iter(base_draws(law, fold(base_key, self.noise_index or 0), shapes, like))
            return [(next(draws), None if bias is None else next(draws)) for _, bias in means]
        if sharing == "shared":  # factors of one key for all rows: NoisyNet's factorised draw
            vectors = [self._factors(block, th.tensor([base_key], device=like.device)) for block in self.blocks]
            pairs = zip(vectors, means, self.blocks, strict=True)
            return [(self._outer(r, s, block)[0], None if bias is None else r[0]) for (s, r), (_, bias), block in pairs]
        return [(None, None)] * len(means)

    def keep_base(self) -> None:
        """Make the base draws part of the ``state_dict``, as what they are in an ensemble: no noise, but weights."""
        key, draws = self.bases()
        self.keeps_base, self._base_draws = True, {}
        self.bind((key, draws))

    def bases(self) -> Bases:
        """
        Take the base draws, to be bound again later.

        :return: Base key, and draws by name
        """
        names = [name for block in self.blocks for name in (block.weight_base, block.bias_base)]
        kept: Any = self._buffers if self.keeps_base else self._base_draws
        return self.base_key, {name: kept[name] for name in names if name is not None and name in kept}

    def bind(self, bases: Bases) -> None:
        """
        Bind base draws that the layer had before.

        :param bases: Base key and draws, as :meth:`bases` gives them
        """
        self.base_key, draws = bases
        if not self.keeps_base:
            self._base_draws = dict(draws)
            return
        for name, draw in draws.items():  # a copy: what is in a state_dict is written into by others
            self.register_buffer(name, draw.clone())

    def base_of(self, block: Block) -> MaybePair:
        """
        Look up the base draws of a weight and its bias.

        :param block: Which weight
        :return: Draws; ``None`` where the family has none
        """
        kept: Any = self._buffers if self.keeps_base else self._base_draws
        return kept.get(block.weight_base), kept.get(block.bias_base)

    def _apply(self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> Any:
        """Follow the weights to another device or type: draws are slices of tables, one for each of both."""
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._base_draws and next(iter(self._base_draws.values())).dtype != self.like.dtype:
            self.redraw(self.base_key)
        elif self._base_draws and next(iter(self._base_draws.values())).device != self.like.device:
            self.redraw(self.base_key)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """
        Keep in copies and pickles what makes the layer; draws follow from their key, and a network tells its copies itself.

        :return: Attributes
        """
        state = dict(super().__getstate__())  # type: ignore[arg-type]
        for name in ("_base_draws", "_network", "_slot"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """
        Become a copy, and draw the base again.

        :param state: What :meth:`__getstate__` gave
        """
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._base_draws = {}
        if not self.keeps_base:
            self.redraw(self.base_key)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """
        Pickle layers whose class was derived at run time by the plain class it was derived from.

        :param protocol: Pickle protocol
        :return: How to make the layer again
        """
        derived_from = vars(type(self)).get("DERIVED_FROM")
        if derived_from is None:
            return super().__reduce_ex__(protocol)
        from sb3_flipout.layers.derived import empty_derived  # the table of classes stands on this file

        return empty_derived, derived_from, self.__getstate__()

    # ---- perturbations -------------------------------------------------------------------------------------------

    def deltas(
        self, weight_eps: th.Tensor | None = None, bias_eps: th.Tensor | None = None, block: Block | None = None
    ) -> Pair:
        """
        Compute the base perturbation, which moves with sigma (and the means), so it is never stored.

        :param weight_eps: Draw to use instead of the base
        :param bias_eps: The same for the bias
        :param block: Which weight; ``None`` for the first
        :return: Perturbation of weight and bias, before row factors and noise scale
        """
        spec, block = self.noise_config.spec, block or self.blocks[0]
        weight, bias = block.means(self)
        weight_sigma, bias_sigma = block.sigmas(self)
        weight_base, bias_base = self.base_of(block)
        delta_weight = functional.delta(weight, weight_sigma, weight_base if weight_eps is None else weight_eps, spec.relative)
        delta_weight = self._unpruned(delta_weight, block.weight)
        if bias is None:
            return delta_weight, None
        bias_sigma = weight_sigma if spec.sigma == "per_layer" else bias_sigma
        delta_bias = functional.delta(bias, bias_sigma, bias_base if bias_eps is None else bias_eps, spec.relative)
        return delta_weight, self._unpruned(delta_bias, block.bias)

    def _unpruned(self, delta: th.Tensor, name: str | None) -> th.Tensor:
        """Without noise where ``torch.nn.utils.prune`` has taken the weight away."""
        mask = self._buffers.get(f"{name}_mask")
        return delta if mask is None else delta * mask

    def vectors(self) -> LayerVectors:
        """
        Say which row factors the layer needs: none when one draw is shared, or when each row has its own.

        :return: Number of the layer, law and lengths of its factor vectors
        """
        blocks = self.blocks if self._by_factors() else ()
        sizes = tuple(size for block in blocks for size in self._sizes(block))
        return LayerVectors(self.noise_index or 0, self.noise_config.spec.factor, sizes, self.noise_scaled)

    def _by_factors(self) -> bool:
        """Whether factors tell rows apart: with a factorised family also where each row's noise is independent of others'."""
        sharing = self.noise_config.noise_sharing
        return sharing == "flipout" or (sharing == "independent" and self.noise_config.spec.row_draw is None)

    def row_weights(self, keys: th.Tensor, scale: th.Tensor, block: Block | None = None) -> Pair:
        """
        Materialise the weights that each row sees, in memory N times that of the layer.

        :param keys: Noise keys, shape (N,)
        :param scale: Noise scales, shape (N,)
        :param block: Which weight; ``None`` for the first
        :return: Weights, shape (N, O, ...), and biases, shape (N, O)
        """
        block = block or self.blocks[0]
        weight, bias = block.means(self)
        delta_weight, delta_bias = self._row_deltas(block, keys)
        c = scale.to(weight.dtype)
        weight = weight + c.view(-1, *[1] * weight.dim()) * delta_weight
        return weight, None if bias is None or delta_bias is None else bias + c[:, None] * delta_bias

    def _row_deltas(self, block: Block, keys: th.Tensor) -> Pair:
        if self.noise_config.noise_sharing == "shared":
            delta_weight, delta_bias = self.deltas(block=block)
            return delta_weight[None], None if delta_bias is None else delta_bias[None]
        if not self._by_factors():
            weight, bias = block.means(self)
            first = 2 * block.number + 2
            bias_eps = None if bias is None else self._row_draw(keys, first + 1, bias.shape)
            return self.deltas(self._row_draw(keys, first, weight.shape), bias_eps, block)
        delta_weight, delta_bias = self.deltas(block=block)
        s, r = self._factors(block, keys)
        return delta_weight * self._outer(r, s, block), None if delta_bias is None else delta_bias * r

    def _factors(self, block: Block, keys: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Factors over inputs, shape (N, in), and over outputs, shape (N, out), without noise scale."""
        (size_in, size_out), kind = self._sizes(block), self.noise_config.spec.factor
        return self._hash(keys, 2 * block.number, size_in, kind), self._hash(keys, 2 * block.number + 1, size_out, kind)

    def _hash(self, keys: th.Tensor, vector: int, n: int, kind: FactorKind) -> th.Tensor:
        word_salts = salts(self.noise_index or 0, vector, n, kind).to(keys.device)
        return factors(keys, word_salts, kind, self.like.dtype)[:, :n]

    def _row_draw(self, keys: th.Tensor, vector: int, shape: th.Size) -> th.Tensor:
        kind = self.noise_config.spec.row_draw
        assert kind is not None, "families without a draw per row are told apart by factors"
        return self._hash(keys, vector, shape.numel(), kind).view(len(keys), *shape)

    # What a layer says that is no matrix product: where inputs and outputs lie in its weights.

    def fan_in(self, block: Block) -> int:
        """
        Count the inputs that one output adds up.

        :param block: Which weight
        :return: Number of inputs
        """
        return functional.fan_in(block.means(self)[0])

    def _sizes(self, block: Block) -> tuple[int, int]:
        """Count input and output units or channels."""
        weight = block.means(self)[0]
        return weight.shape[1], weight.shape[0]

    def _outer(self, r: th.Tensor, s: th.Tensor, block: Block) -> th.Tensor:
        """What each row multiplies the base perturbation by: (N, out) and (N, in) -> (N, *weight.shape)."""
        return r[:, :, None] * s[:, None, :]

    def extra_repr(self) -> str:
        """
        Describe the layer as torch.nn does, with its noise.

        :return: The parent's description and the noise settings
        """
        config, on = self.noise_config, "" if self.noise_on == "all" else f", noise_on={self.noise_on!r}"
        return f"{super().extra_repr()}, family={config.family!r}, noise_sharing={config.noise_sharing!r}{on}"


def drawn_base_key() -> int:
    """
    Draw a base key from torch's generator, so that it follows ``torch.manual_seed`` as weights do.

    :return: Key
    """
    return int(th.randint(2**62, (), device="cpu"))
