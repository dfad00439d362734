"""The slow, obvious perturbed LSTM: weights materialised for each row and step, `nn.LSTM`'s equations in explicit loops.

Beside what `oracle.py` documents: blocks are numbered in the order ih_l0, hh_l0, ih_l1, ..., those without noise left out.
Block i has the vectors 2i (over inputs), 2i + 1 (over gates), and, where rows have draws of their own, 2i + 2 (weight) and
2i + 3 (bias). The base is one slice of the table, block after block, each weight before its bias.
"""

from typing import Any

import oracle
import torch as th

Weights = dict[str, th.Tensor]  # by their names in nn.LSTM


def noisy_blocks(layer: Any) -> list[str]:
    kinds = ("hh",) if layer.noise_on == "hidden" else ("ih", "hh")
    return [f"{kind}_l{number}" for number in range(layer.num_layers) for kind in kinds]


def noisy_names(layer: Any) -> list[str]:
    """Names of the perturbed weights and biases, in the order of their base draws."""
    return [f"{what}_{block}" for block in noisy_blocks(layer) for what in (("weight", "bias") if layer.bias else ("weight",))]


def base(layer: Any) -> dict[str, th.Tensor]:
    law, names = layer.noise_config.spec.base, noisy_names(layer)
    if law is None:
        return {}
    shapes = {name: getattr(layer, name).shape for name in names}
    n, size = sum(shape.numel() for shape in shapes.values()), 4 * 2**20
    while size < 4 * n:
        size *= 2
    at = oracle.fold(layer.base_key, layer.noise_index) % (size - n + 1)
    found = {}
    for name, shape in shapes.items():
        found[name] = oracle.base_elements(law, at, shape.numel()).view(shape).double()
        at += shape.numel()
    return found


def noise(layer: Any, key: int) -> dict[str, th.Tensor]:
    """What multiplies sigma (and the mean, where the family says so) of each perturbed weight and bias of one row."""
    spec, sharing, number = layer.noise_config.spec, layer.noise_config.noise_sharing, layer.noise_index
    found = {}
    for block, kind in enumerate(noisy_blocks(layer)):
        weight, bias = f"weight_{kind}", f"bias_{kind}"
        gates, inputs = getattr(layer, weight).shape
        if sharing == "independent" and spec.row_draw is not None:
            flat = oracle.factors(key, number, 2 * block + 2, gates * inputs, spec.row_draw)
            own = th.tensor(flat, dtype=th.float64).view(gates, inputs)
            own_bias = th.tensor(oracle.factors(key, number, 2 * block + 3, gates, spec.row_draw), dtype=th.float64)
        else:
            draws = base(layer)
            own = draws.get(weight, th.ones(gates, inputs, dtype=th.float64))
            own_bias = draws.get(bias, th.ones(gates, dtype=th.float64))
            if sharing != "shared" or not draws:  # shared without a base: NoisyNet, the factors of one key for all rows
                of = layer.base_key if sharing == "shared" else key
                s = th.tensor(oracle.factors(of, number, 2 * block, inputs, spec.factor), dtype=th.float64)
                r = th.tensor(oracle.factors(of, number, 2 * block + 1, gates, spec.factor), dtype=th.float64)
                own, own_bias = own * th.outer(r, s), own_bias * r
        found[weight], found[bias] = own, own_bias
    return found


def row_weights(layer: Any, key: int, scale: float = 1.0, sigmas: Weights | None = None) -> Weights:
    """All weights of the row with this key; differentiable in means and sigmas (the layer's, or others by the same names)."""
    spec, drawn = layer.noise_config.spec, noise(layer, key)
    found = {name: getattr(layer, name) for name in layer._flat_weights_names}
    for name in noisy_names(layer):
        mean, owner = found[name], name.replace("bias", "weight") if spec.sigma == "per_layer" else name
        sigma = (sigmas or {}).get(f"{owner}_sigma", getattr(layer, f"{owner}_sigma"))
        delta = drawn[name] if sigma is None else sigma * drawn[name]
        found[name] = mean + scale * (mean * delta if spec.relative else delta)
    return found


def step(weights: Weights, number: int, x: th.Tensor, h: th.Tensor, c: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """One step of one layer for one row."""
    gates = weights[f"weight_ih_l{number}"] @ x + weights[f"weight_hh_l{number}"] @ h
    if f"bias_ih_l{number}" in weights:
        gates = gates + weights[f"bias_ih_l{number}"] + weights[f"bias_hh_l{number}"]
    size = len(h)
    i, f, g, o = (gates[gate * size : (gate + 1) * size] for gate in range(4))
    c = th.sigmoid(f) * c + th.sigmoid(i) * th.tanh(g)
    return th.sigmoid(o) * th.tanh(c), c


def sequence(
    layer: Any, x: th.Tensor, weights: list[Weights], state: tuple[th.Tensor, th.Tensor], starts: list[bool]
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """One row: inputs (T, I) and weights for each step; gives outputs (T, H) and last states (layers, H)."""
    h, c = list(state[0].unbind(0)), list(state[1].unbind(0))
    outputs = []
    for t, start in enumerate(starts):
        below = x[t]
        for number in range(layer.num_layers):
            if start:
                h[number], c[number] = th.zeros_like(h[number]), th.zeros_like(c[number])
            h[number], c[number] = step(weights[t], number, below, h[number], c[number])
            below = h[number]
        outputs.append(below)
    return th.stack(outputs), th.stack(h), th.stack(c)


def forward(
    layer: Any,
    x: th.Tensor,  # (T, N, I)
    keys: th.Tensor,  # (T, N)
    scale: th.Tensor,  # (T, N)
    state: tuple[th.Tensor, th.Tensor] | None = None,
    starts: th.Tensor | None = None,  # (T, N)
) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Outputs (T, N, H) and last states (layers, N, H)."""
    zeros = th.zeros(layer.num_layers, x.shape[1], layer.hidden_size, dtype=x.dtype)
    h, c = (zeros, zeros) if state is None else state
    flags = th.zeros(keys.shape) if starts is None else starts
    rows = []
    for n in range(x.shape[1]):
        weights = [row_weights(layer, int(key), float(of)) for key, of in zip(keys[:, n], scale[:, n], strict=True)]
        rows.append(sequence(layer, x[:, n], weights, (h[:, n], c[:, n]), [bool(flag) for flag in flags[:, n]]))
    y, h, c = (th.stack(parts, dim=1) for parts in zip(*rows, strict=True))
    return y, h, c
