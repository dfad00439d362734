"""What MonitorNoise shows beside numbers: the figure of sigma, and the layout of tensorboard's custom scalars."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sb3_flipout.diagnostics.statistics import QUANTILES, thinned
from sb3_flipout.layers import FlipoutLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Charts = dict[str, list[Any]]  # kind of each, and expressions of the tags in it

_MEMBERS = "Members"

_LAYOUT: dict[str, Charts] = {
    "Noise: how much": {
        "noise scale and mean sigma": ["Multiline", ["^noise/scale$", "^noise/sigma$"]],
        "sigma of each layer": ["Multiline", ["^noise/.+/sigma$"]],
        "signal-to-noise, median and 5 to 95 %": ["Margin", ["noise/snr_q50", "noise/snr_q05", "noise/snr_q95"]],
        "median signal-to-noise of each layer": ["Multiline", ["^noise/.+/snr_q50$"]],
        "share of output variance due to noise": ["Multiline", ["^noise/(.+/)?output_share$"]],
    },
    "Noise: what it does to actions": {
        "KL from the mean policy; AdaptNoise's distance and target": ["Multiline", ["^noise/(kl|distance|target)$"]],
        "how often, or how far, the action is another one": [
            "Multiline",
            ["^noise/disagreement$", "^noise/action_distance$"],
        ],
        "entropy, and its parts": ["Multiline", ["^noise/entropy_.*$"]],
        "correlation of environments": ["Multiline", ["^noise/correlation$"]],
        "resamples per second": ["Multiline", ["^noise/resamples_per_second$"]],
    },
    _MEMBERS: {
        "share of members that vote for the chosen action": ["Multiline", ["^noise/vote_share$"]],
        "how often two members disagree": ["Multiline", ["^noise/member_disagreement$"]],
        "spread of values over members": ["Multiline", ["^noise/member_value_std$"]],
    },
    "Evaluation": {
        "return of mean weights, sampled weights and vote": ["Multiline", ["^noise_eval/(mean|sampled|vote)/return$"]],
        "how far the mean weights lag": ["Multiline", ["^noise_eval/lag$"]],
    },
}


def layout(members: bool) -> dict[str, Charts]:
    """
    Make the layout of tensorboard's custom scalars.

    :param members: Whether there are members to show
    :return: Charts by group
    """
    return {group: charts for group, charts in _LAYOUT.items() if members or group != _MEMBERS}


def sigma_figure(layers: Mapping[str, FlipoutLayer]) -> Figure | None:
    """
    Draw sigma of the weights, layer by layer: quantiles 5, 25, 50, 75 and 95 % in the unit of ``sigma_init``.

    :param layers: Perturbed layers by name
    :return: Figure; ``None`` where the family has no sigma
    """
    from matplotlib.figure import Figure  # takes a third of a second to import, so only where figures are asked for

    boxes = [box for name, layer in layers.items() for box in _boxes(name, layer)]
    if not boxes:
        return None
    figure = Figure(figsize=(1.6 + 0.9 * len(boxes), 4.2), layout="constrained")
    axis = figure.subplots()
    axis.bxp(boxes, showfliers=False, patch_artist=True, boxprops={"facecolor": "#9ecae1"}, medianprops={"color": "#08306b"})
    unit = "1" if _relative(layers) else "1/√fan_in"
    axis.set(ylabel=f"|σ| in units of {unit}", title="σ of each layer: 5, 25, 50, 75 and 95 %")
    axis.set_ylim(bottom=0)
    axis.tick_params(axis="x", rotation=60, labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    return figure


def _relative(layers: Mapping[str, FlipoutLayer]) -> bool:
    return next(iter(layers.values())).noise_config.spec.relative


def _boxes(name: str, layer: FlipoutLayer) -> Iterator[dict[str, Any]]:
    """Quantiles of each weight of a layer that has sigma."""
    for block in layer.blocks:
        sigma = block.sigmas(layer)[0]
        if sigma is not None:
            unit = 1.0 if layer.noise_config.spec.relative else math.sqrt(layer.fan_in(block))
            values = thinned(sigma.detach().flatten().abs() * unit).float().cpu()
            numbers = values.quantile(values.new_tensor(QUANTILES)).tolist()
            label = name if len(layer.blocks) == 1 else f"{name}.{block.weight}"
            yield {"label": label, **dict(zip(("whislo", "q1", "med", "q3", "whishi"), numbers, strict=True))}
