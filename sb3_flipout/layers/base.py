"""What all perturbed layers share: sigma, the base draw, and the way to the network that says what their rows see.

A layer is in one of two states, and ``module.training`` is neither: without active noise it computes what its torch.nn
parent computes, with the very same code; with active noise each row sees its own weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch as th
from torch import nn

from sb3_flipout.layers.block import Block, FixedDelta, MaybePair
from sb3_flipout.layers.config import LayerNoise
from sb3_flipout.layers.row_layout import FIRST, RowLayout
from sb3_flipout.layers.row_view import Network, RowView
from sb3_flipout.layers.weights import PerturbedWeights
from sb3_flipout.noise.bases import base_draws, drawn_base_key, factor_draws
from sb3_flipout.noise.keys import fold
from sb3_flipout.noise.signs import LayerVectors

_DELTAS = PerturbedWeights.deltas

Bases = tuple[int, dict[str, th.Tensor]]  # base key, and draws by name


class FlipoutLayer(PerturbedWeights):
    """
    Mixin of all perturbed layers; stands before the torch.nn class in their bases.

    Parameters beside the parent's: one named ``<name>_sigma`` for each perturbed weight and bias. Nothing keeps sigma
    positive, and 0 is exactly the plain layer. Where the base is symmetric about 0 (all families but ``factorised``) sigma's
    sign changes no law; with ``factorised``, where the factors alone are the noise, one flipped sign changes how weights go
    together.
    """

    #: What ``noise_on=`` may name.
    NOISE_ON: ClassVar[tuple[str, ...]] = ("all",)
    #: The torch.nn class whose weights these are.
    PLAIN: ClassVar[type[nn.Module]]

    noise_on: str = "all"
    row_layout: RowLayout = FIRST
    base_key: int
    _network: Network | None = None
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
        learned = config.learns
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
    def network(self) -> Network | None:
        """The network that says what the rows of this layer see; ``None`` until it is first perturbed."""
        return self._network

    def join(self, network: Network, slot: int) -> None:
        """
        Become part of a network; only :func:`~sb3_flipout.layers.interface.attach` and copies of networks call this.

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
        view = None if network is None else network.view(self._slot, self)
        unheard = view is not None and self.noise_config.noise_sharing == "independent" and self._is_silent()
        return None if unheard else view

    def _is_silent(self) -> bool:
        """
        Look whether sigma is frozen at 0.

        Then nothing is heard of the noise, and the torch.nn class's own operations are asked for: products row by row, or a
        loop over steps, round in another order, so nothing else is bitwise equal to stock. Sigma that is learned has a
        gradient at 0 too.
        """
        sigmas = self._sigmas()
        learned = any(sigma.requires_grad for sigma in sigmas)
        return bool(sigmas) and not learned and not any(bool(sigma.any()) for sigma in sigmas)

    def _sigmas(self) -> list[th.Tensor]:
        return [sigma for block in self.blocks for sigma in block.sigmas(self) if sigma is not None]

    @property
    def learns_sigma(self) -> bool:
        """Whether gradients flow into sigma."""
        if "parametrizations" in self._modules:
            return any(sigma.requires_grad for sigma in self._sigmas())
        named = self._parameters.items()  # not by attribute: it is asked in every pass of an update without noise
        return any(own.requires_grad for name, own in named if own is not None and name.endswith("_sigma"))

    def fixed_delta(self) -> FixedDelta | None:
        """
        Say what the base perturbation is made of, if nothing that learns is in it.

        :return: Draws and sigma; ``None`` where it moves with what learns (optimizers and line searches write where autograd
            does not count it), where a subclass computes it otherwise, or where nothing counts what is written
        """
        block, named = self.blocks[0], self._parameters
        found = (named.get(block.weight_sigma), named.get(block.bias_sigma or ""))
        sigmas = tuple([sigma for sigma in found if sigma is not None])
        if not sigmas or self.noise_config.spec.relative or self._buffers or "parametrizations" in self._modules:
            return None
        if any([sigma.requires_grad or sigma.is_inference() for sigma in sigmas]) or type(self).deltas is not _DELTAS:
            return None
        if th._C._are_functorch_transforms_active() or th.is_inference_mode_enabled():
            return None
        stamp = [number for sigma in sigmas for number in (sigma.data_ptr(), sigma._version)]
        return FixedDelta(self._base_draws, sigmas, tuple(stamp))

    # ---- weights and base draws -----------------------------------------------------------------------------------

    def redraw(self, base_key: int) -> None:
        """
        Draw the base perturbation, a pure function of the base key and the layer's number.

        New tensors are bound, never filled in place: a backward pass that still waits sees the draw it was made with.

        :param base_key: Key of the base, any integer
        """
        if th.is_inference_mode_enabled():  # what is drawn while a policy is evaluated serves training, too
            with th.inference_mode(False):
                return self.redraw(base_key)
        draws: dict[str, th.Tensor] = {}
        for block, pair in zip(self.blocks, self._draw_bases(base_key), strict=True):
            names = (block.weight_base, block.bias_base)
            draws |= {name: draw for name, draw in zip(names, pair, strict=True) if name is not None and draw is not None}
        self.bind((base_key, draws))

    def _draw_bases(self, base_key: int) -> list[MaybePair]:
        sharing, law = self.noise_config.noise_sharing, self.noise_config.spec.base
        means = [(getattr(self, b.weight), None if b.bias is None else getattr(self, b.bias)) for b in self.blocks]
        like = means[0][0]
        if law is not None and sharing != "independent":
            shapes = [mean.shape for pair in means for mean in pair if mean is not None]
            draws = iter(base_draws(law, fold(base_key, self.noise_index or 0), shapes, like))
            return [(next(draws), None if bias is None else next(draws)) for _, bias in means]
        if sharing == "shared":  # factors of one key for all rows: NoisyNet's factorised draw
            sizes = tuple([size for block in self.blocks for size in self._sizes(block)])
            vectors = LayerVectors(self.noise_index or 0, self.noise_config.spec.factor, sizes, scaled=False)
            drawn = factor_draws(vectors, base_key, like)
            pairs = zip(drawn[::2], drawn[1::2], means, strict=True)
            return [(self._outer(r, s)[0], None if bias is None else r[0]) for s, r, (_, bias) in pairs]
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

    def _apply(self, fn: Callable[[th.Tensor], th.Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow_weights()
        return result

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._follow_weights()  # `assign=True` puts others in their place

    def _follow_weights(self) -> None:
        """Follow the weights to another device or type: draws are slices of tables, one for each of both."""
        draw, like = next(iter(self._base_draws.values()), None), self.like
        if draw is not None and (draw.dtype, draw.device) != (like.dtype, like.device):
            self.redraw(self.base_key)

    def __getstate__(self) -> dict[str, Any]:
        """
        Keep in copies and pickles what makes the layer; draws follow from their key, and a network tells its copies itself.

        :return: Attributes
        """
        state: dict[str, Any] = dict(super().__getstate__())  # type: ignore[no-untyped-call]
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
        make_empty, plain = derived_from
        return make_empty, (plain,), self.__getstate__()

    def extra_repr(self) -> str:
        """
        Describe the layer as torch.nn does, with its noise.

        :return: The parent's description and the noise settings
        """
        config, on = self.noise_config, "" if self.noise_on == "all" else f", noise_on={self.noise_on!r}"
        return f"{super().extra_repr()}, family={config.family!r}, noise_sharing={config.noise_sharing!r}{on}"
