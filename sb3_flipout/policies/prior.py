"""The frozen random functions that are added to the values of an ensemble's members."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers import attach
from sb3_flipout.layers.config import layer_noise
from sb3_flipout.layers.convert import Wanted, perturb_named
from sb3_flipout.layers.interface import flipout_layers
from sb3_flipout.layers.row_layout import RowLayout
from sb3_flipout.noise import RowNoise
from sb3_flipout.policies.observations import to_take_from

# The layers of the prior are numbered from here, apart from those of the learned network: the same keys give them other signs.
FIRST_NUMBER = 1000


class Prior(nn.Module):
    """
    One frozen random function p_k per member, for Q_k = f_k + beta p_k (Osband et al. 2018, "Randomized Prior Functions").

    A network of zero means, whose perturbation alone is the prior: weights N(0, 1/fan_in), biases 0, the law (there
    truncated) of the priors in ``boot_dqn`` of bsuite, the agent of Osband et al. Its size would follow that of the
    observations: on a one-hot observation of d numbers, the first layer shrinks as 1/sqrt(d). So it is divided by its root
    mean square over the rows of the first gradient step, each under its own member (unit variance from data, as in Mishkin
    and Matas 2016): beta is in standard deviations of the members' values. Before that gradient step it is not divided. Which
    rows those are, SB3 says: it asks the target network first, so they are the next observations of the first batch.
    The noise scale multiplies what comes out, once, and not the weights of each layer: a scale of 0 gives mean weights.

    Which functions these are is as much a part of the ensemble as its weights, so all of it is in the ``state_dict``. A prior
    is the same whenever it is asked: dropout drops nothing in it, and batch normalisation looks at no batch.

    :param network: Value network of plain layers, which becomes the prior
    :param base_key: Key of its base perturbation
    :param layouts: Where rows lie in what layers get, by their names in the network, as far as it is known; ``None`` for those
        in which no row can have weights of its own: they stay as they are, the same for all members
    """

    unit: th.Tensor  # the root mean square, one number; NaN until it is measured

    def __init__(self, network: nn.Module, base_key: int, layouts: Mapping[str, RowLayout | None] | None = None) -> None:
        super().__init__()
        layouts = layouts or {}
        self.network = network
        # Nobody is told of layers that stay plain: of the network that learns they have been told, by names that `skip` knows.
        config = layer_noise(dict(family="gaussian", sigma_init=1.0, learn_sigma=False))
        left_plain = tuple([name for name, layout in layouts.items() if layout is None])
        perturb_named(dict(network.named_modules()), config, Wanted("all", left_plain, True), lambda: base_key)
        for name, layout in layouts.items():
            if layout is not None:
                network.get_submodule(name).row_layout = layout  # type: ignore[assignment]
        layers = flipout_layers([network])
        for layer in layers:
            layer.noise_index = FIRST_NUMBER + (layer.noise_index or 0)
            layer.noise_scaled, layer.mean_is_zero = False, True
            # A bias is the same in all states: where it outweighs the rest, a member prefers one action everywhere.
            bias_sigmas = [block.sigmas(layer)[1] for block in layer.blocks]
            for tensor in [*layer.means(), *(sigma for sigma in bias_sigmas if sigma is not None)]:
                nn.init.zeros_(tensor)
        self.perturbed_network = attach(layers, of_policy=True)
        self.perturbed_network.redraw(base_key)
        for layer in layers:
            layer.keep_base()
        self.register_buffer("unit", th.tensor(float("nan"), device=layers[0].like.device, dtype=layers[0].like.dtype))
        self.requires_grad_(False)
        self.eval()
        self._known = False  # whether `unit` is, so that no device has to be asked for it again

    def train(self, mode: bool = True) -> Prior:
        """
        Stay in evaluation mode.

        :param mode: What is asked for
        :return: Itself
        """
        return super().train(False)

    def measure(self, noise: RowNoise, *given: Any, **named: Any) -> None:
        """
        Fix the unit by the rows of a batch; later calls change nothing.

        :param noise: Which member each row is
        :param given: Observations, shape (N, ...), and what else the network takes
        :param named: The same by name
        """
        if self._is_measured():
            return
        with th.no_grad():
            values = self._values(noise, given, named)
            # Values that no weight changes are left out: actions that the network masks by a large negative number.
            of_means = self._values(None, given, named)
            of_means = noise.for_rows(of_means) if noise.rows_per_input > 1 else of_means
            drawn = values[(values != of_means) | (of_means == 0)]
            size = drawn.square().mean().sqrt()
            if bool(size > 0):  # 0 tells nothing: then the next batch is asked
                self.unit.copy_(size)

    def _is_measured(self) -> bool:
        self._known = self._known or bool(th.isfinite(self.unit))
        return self._known

    def _values(self, noise: RowNoise | None, given: tuple[Any, ...], named: dict[str, Any]) -> th.Tensor:
        """Nothing in it learns, so no graph is built, but where somebody asks for gradients by the observations."""
        with self.perturbed_network.activate(noise):
            values: Any = self.network(to_take_from(given[0]), *given[1:], **named)
        if not isinstance(values, th.Tensor):
            raise TypeError(
                f"prior_scale adds a prior to the values of a network, which gives a {type(values).__name__}. Let its forward "
                "give one tensor of values, or leave prior_scale out."
            )
        return values

    def forward(self, noise: RowNoise, *given: Any, **named: Any) -> th.Tensor:
        """
        Compute the prior of each row's member.

        :param noise: Which member each row is, and its noise scale
        :param given: Observations, shape (N, ...), and what else the network takes
        :param named: The same by name
        :return: What the network gives, in the prior's unit
        """
        values = self._values(noise, given, named)
        # Where the network masks an action by minus infinity, the values that the prior is added to do it.
        values = values.nan_to_num(nan=th.nan, posinf=0.0, neginf=0.0)
        scale = noise.scale.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
        return scale * (values / self.unit) if self._is_measured() else scale * values

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load the unit too, and ask for it again."""
        super()._load_from_state_dict(*args, **kwargs)
        self._known = False
