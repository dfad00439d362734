"""The frozen random functions that are added to the values of an ensemble's members."""

from __future__ import annotations

from typing import Any

import torch as th
from torch import nn

from sb3_flipout.layers import NoisyNetwork, perturb

_NUMBERS = 1000  # the layers of the prior are numbered from here, apart from those of the learned network


class Prior(nn.Module):
    """
    One frozen random function p_k per member, for Q_k = f_k + beta p_k (Osband et al. 2018, "Randomized Prior Functions").

    A network of zero means, whose perturbation alone is the prior: weights N(0, 1/fan_in), biases 0, the law (there
    truncated) of the priors in ``boot_dqn`` of bsuite, the agent of Osband et al. Its size would follow that of the
    observations: on a one-hot observation of d numbers, the first layer shrinks as 1/sqrt(d). So it is divided by its root
    mean square over the rows of the first gradient step, each under its own member (unit variance from data, as in Mishkin
    and Matas 2016): beta is in standard deviations of the members' values. Before that gradient step it is not divided.
    The noise scale multiplies what comes out, once, and not the weights of each layer: a scale of 0 gives mean weights.

    :param network: Value network of plain layers, which becomes the prior
    :param base_key: Key of its base perturbation
    """

    def __init__(self, network: nn.Module, base_key: int) -> None:
        super().__init__()
        self.network = network
        self.unit: float | None = None  # the root mean square; None until it is measured
        perturb(network, base_key=base_key, family="gaussian", sigma_init=1.0, learn_sigma=False)
        self._layers = NoisyNetwork(network).layers
        for layer in self._layers:
            layer.noise_index = _NUMBERS + (layer.noise_index or 0)
            layer.noise_scaled = False
            # A bias is the same in all states: where it outweighs the rest, a member prefers one action everywhere.
            bias_sigmas = [block.sigmas(layer)[1] for block in layer.blocks]
            for tensor in [*layer.means(), *(sigma for sigma in bias_sigmas if sigma is not None)]:
                nn.init.zeros_(tensor)
        self.redraw(base_key)
        self.requires_grad_(False)

    def redraw(self, base_key: int) -> None:
        """
        Draw the base perturbation of every layer.

        :param base_key: Key of the base
        """
        for layer in self._layers:
            layer.redraw(base_key)

    def measure(self, obs: Any) -> None:
        """
        Fix the unit by the rows of a batch, under the keys that are active; later calls change nothing.

        :param obs: Observations, shape (N, ...)
        """
        if self.unit is None:
            with th.no_grad():
                # 0 under mean weights, whose rows tell nothing: then the next batch is asked.
                self.unit = self.network(obs).square().mean().sqrt().item() or None

    def forward(self, obs: Any) -> th.Tensor:
        """
        Compute the prior of each row's member; without active noise, 0.

        :param obs: Observations, shape (N, ...)
        :return: What the network gives, in the prior's unit
        """
        with th.no_grad():
            values: th.Tensor = self.network(obs)
        active = self._layers[0]._active
        if active is None:
            return values  # 0
        scale = active[0].scale.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
        return scale * (values / (self.unit or 1.0))

    def get_extra_state(self) -> dict[str, float | None]:
        """
        Give the unit; torch puts it into ``state_dict``.

        :return: Unit, as a plain Python value
        """
        return {"unit": self.unit}

    def set_extra_state(self, state: dict[str, float | None]) -> None:
        """
        Continue with a saved unit.

        :param state: What :meth:`get_extra_state` gave
        """
        self.unit = state["unit"]
