"""Perturbed layers of one weight, applied once per forward pass: linear layers and convolutions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch as th

from sb3_flipout.layers import functional
from sb3_flipout.layers.base import FlipoutLayer
from sb3_flipout.layers.row_layout import FIRST
from sb3_flipout.layers.row_view import RowView

_REMEDY = (
    "The rows of a batch must be the first dimension of what a perturbed layer gets. "
    "If the network folds others into it, leave "
    'the module out: perturb(net, skip=["its.name"]), or policy_kwargs=dict(skip=["its.name"]).'
)


class OneWeightLayer(FlipoutLayer):
    """Mixin of perturbed layers whose parameters are ``weight``, ``bias``, ``weight_sigma`` and ``bias_sigma``."""

    weight: th.Tensor
    bias: th.Tensor | None
    weight_sigma: th.nn.Parameter | None
    bias_sigma: th.nn.Parameter | None

    def forward(self, input: th.Tensor) -> th.Tensor:
        """
        Apply the layer: mean weights, or each row's own while noise is active.

        :param input: Inputs, shape (N, ..., in_features) or (N, in_channels, ...)
        :return: Outputs, shape (N, ..., out_features) or (N, out_channels, ...)
        :raises ValueError: If noise is active for another number of rows
        """
        network = self._network
        view = None if network is None else network.view(self._slot, self)
        return super().forward(input) if view is None else self.forward_rows(input, view)

    def forward_rows(self, x: th.Tensor, view: RowView) -> th.Tensor:
        """
        Compute the layer, each row with its own weights.

        :param x: Inputs of N rows
        :param view: What the rows see
        :return: Outputs of N rows
        :raises ValueError: If ``x`` has another number of rows than there are keys
        """
        rows_per_key = view.noise.rows_per_key
        if rows_per_key > 1 and self._weights_pay(x, view):
            return self._forward_by_key(x, view)
        in_place = self.row_layout == FIRST and x.dim() == self._least_dims == 2 and x.shape[0] == view.rows
        if in_place and rows_per_key == 1 and view.of_keys:  # the usual case, where nothing has to be moved or repeated
            s, r = view.of_keys
            return self._flipped(x, s, r)
        if view.is_once(x) and self.row_layout == FIRST:
            return self._forward_inputs_once(x, view)
        self._check_rows(x, view.rows)
        if view.of_keys:
            s, r = (self._unit_dims(self._spread(vector, x), x) for vector in view.vectors())
            return self._flipped(x, s, r)
        scale = view.noise.scale.to(self.weight.dtype)
        if self.noise_config.noise_sharing == "shared":
            c = self._unit_dims(self._spread(scale[:, None], x), x)
            return functional.shared(self._op, x, (self.weight, self.bias), self.deltas(), c)
        if self._is_silent():  # asked here and not in `row_view`, so that it costs nothing elsewhere
            return super().forward(x)
        return self._op_per_row(*self._with_own_rows(x, view, scale))

    def _forward_inputs_once(self, x: th.Tensor, view: RowView) -> th.Tensor:
        """The first layer that is perturbed, where each input stands for several neighbouring rows."""
        for_rows = view.noise.for_rows
        if not view.of_keys:
            return self.forward_rows(for_rows(x), view)
        s, r = (self._unit_dims(vector.to(self.weight.dtype), x) for vector in view.vectors())
        return self._flipped(x, s, r, for_rows=for_rows)

    def _weights_pay(self, x: th.Tensor, view: RowView) -> bool:
        """Whether the weights of the keys are no more numbers than the inputs of all rows, and spare a product."""
        if len(view.of_keys) != 2 or self.noise_config.spec.rank_one or self.row_layout != FIRST or x.dim() < self._least_dims:
            return False
        once = view.is_once(x)
        if not once and x.shape[0] != view.rows:
            return False
        keys, inputs = view.rows // view.noise.rows_per_key, x.numel() * (view.noise.rows_per_input if once else 1)
        return self.weight.numel() * keys <= inputs

    def _forward_by_key(self, x: th.Tensor, view: RowView) -> th.Tensor:
        """Each key's rows with the weights that its factors make, which are made once for all of them."""
        s, r = (vector.to(self.weight.dtype) for vector in view.of_keys)
        (delta, delta_bias), bias = self.deltas(), self.bias
        outer = self._outer(r, s)
        weight = delta * outer if self.mean_is_zero else th.addcmul(self.weight, delta, outer)
        if bias is not None and delta_bias is not None:
            bias = delta_bias * r if self.mean_is_zero else th.addcmul(bias, delta_bias, r)
        x = x.expand(len(s), *x.shape) if view.is_once(x) else x.view(len(s), -1, *x.shape[1:])
        return self._op_per_key(x, weight, bias)

    def _op_per_key(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        """Apply weights (K, ...) to inputs (K, rows of a key, ...); gives (K * rows of a key, ...)."""
        biases = [None] * len(x) if bias is None else bias.unbind()
        return th.cat([self._op(*each) for each in zip(x.unbind(), weight.unbind(), biases, strict=True)])

    def _flipped(
        self, x: th.Tensor, s: th.Tensor, r: th.Tensor, for_rows: Callable[[th.Tensor], th.Tensor] = functional.each_its_own
    ) -> th.Tensor:
        """Each row with the weights that its factors make."""
        mean = None if self.mean_is_zero else (self.weight, self.bias)
        if self.noise_config.spec.rank_one and mean and not self._buffers:  # not where weights are pruned
            assert self.weight_sigma is not None, "the family has one per layer"
            return functional.rank_one(self._op, self._summed, x, mean, self.weight_sigma, s, r, for_rows)
        network = self._network
        deltas = self.deltas() if network is None else network.kept_deltas(self._slot, self)
        return functional.flipout(self._op, x, mean, deltas, s, r, for_rows)

    def _spread(self, vector: th.Tensor, x: th.Tensor) -> th.Tensor:
        return self.row_layout.spread(vector.to(self.weight.dtype), x.shape[self.row_layout.dim])

    def _with_own_rows(self, x: th.Tensor, view: RowView, scale: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """Inputs and the weights of each of their rows, under noise that every row draws for itself."""
        keys, size = view.noise.keys, x.shape[self.row_layout.dim]
        weight, bias = self.row_weights(self.row_layout.spread(keys, size), self.row_layout.spread(scale, size))
        return x, weight, bias

    def _check_rows(self, x: th.Tensor, rows: int) -> None:
        dim = self.row_layout.dim
        if x.dim() < max(self._least_dims, dim + 1) or not self.row_layout.fits(x.shape[dim], rows):
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)} and keys for {rows} rows. {_REMEDY}"
            )

    # What a kind of layer has to say: its op, and where the units lie in its inputs and outputs.
    _least_dims: int = 2

    @abstractmethod
    def _op(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        """Apply weights, the same for all rows."""

    @abstractmethod
    def _op_per_row(self, x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        """Apply weights that have a leading dimension of rows."""

    @abstractmethod
    def _summed(self, x: th.Tensor) -> th.Tensor:
        """Apply weights of 1, without bias: what one output of each group gets, as all of them do."""

    @abstractmethod
    def _unit_dims(self, factor: th.Tensor, x: th.Tensor) -> th.Tensor:
        """View factors (N, units) such that they broadcast against inputs or outputs."""
