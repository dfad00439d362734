"""What :class:`~sb3_flipout.callbacks.MonitorNoise` measures: the numbers behind the tags of docs/logged_values.md."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_flipout.diagnostics.actions import divergence, entropy_split, pairwise_disagreement
from sb3_flipout.diagnostics.distances import disagreement, rms_distance
from sb3_flipout.diagnostics.gradients import base_kept, row_correlation
from sb3_flipout.diagnostics.outputs import noise_share
from sb3_flipout.diagnostics.views import ActionView, action_view, stacked
from sb3_flipout.diagnostics.weights import sigmas, signal_to_noise
from sb3_flipout.layers import FlipoutLayer, perturbed
from sb3_flipout.noise import RowNoise, fold, fold_in
from sb3_flipout.noise.keys import restrict
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.observations import n_rows

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Of larger tensors, elements at equal distances stand for all: of weights in quantiles and histograms, of units in shares.
_WEIGHTS, _UNITS = 16_384, 1_024


@dataclass
class Draws:
    """
    What a policy did with the same observations, under draw after draw of the noise.

    :param mean: Under the mean weights
    :param views: Under each draw
    :param layers: Outputs of each layer, by its name; one tensor per draw, shape (N, units)
    """

    mean: ActionView
    views: list[ActionView] = field(default_factory=list)
    layers: dict[str, list[th.Tensor]] = field(default_factory=dict)


def thinned(values: th.Tensor, limit: int = _WEIGHTS) -> th.Tensor:
    """
    Take elements at equal distances, where there are many.

    :param values: Values, shape (..., n)
    :param limit: How many may stay
    :return: At most ``limit`` of each row
    """
    return values[..., :: -(-values.shape[-1] // limit)] if values.shape[-1] > limit else values


def noisy_layers(policy: FlipoutPolicyMixin) -> dict[str, FlipoutLayer]:
    """
    List the layers that make the actions noisy, by their names; without the members' prior, which is not learned.

    :param policy: Flipout policy
    :return: Perturbed layers by their names in ``policy.named_modules()``
    """
    acting = {id(layer) for layer in policy.perturbed_network.layers}
    return {name: layer for name, layer in policy.named_modules() if isinstance(layer, FlipoutLayer) and id(layer) in acting}


@contextmanager
def _quietly(policy: nn.Module) -> Iterator[None]:
    """Look without a trace: no gradients, evaluation mode, and the base that was there before."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with th.no_grad(), base_kept(policy):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _recorded(layers: Mapping[str, FlipoutLayer], into: dict[str, list[th.Tensor]]) -> Iterator[None]:
    """Record the outputs of layers, as far as they are one tensor with one row each: not of recurrent layers."""

    def hook(name: str) -> Any:
        def record(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, th.Tensor) and not output.is_nested and output.dim() > 1:
                into.setdefault(name, []).append(thinned(output.flatten(1), _UNITS))

        return record

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name)).remove)
        yield


def draw(policy: FlipoutPolicyMixin, obs: PyTorchObs, draws: int, seed: int) -> Draws:
    """
    See what a policy does with observations under draws of its noise: fresh keys, and a fresh base where it moves in training.

    :param policy: Flipout policy, which is left as it was
    :param obs: N observations, as tensors
    :param draws: Number of draws
    :param seed: Seed of the keys, which training never sees
    :return: What it did
    """
    settings, network, n = policy.noise_settings, policy.perturbed_network, n_rows(obs)
    base_moves = settings.noise_sharing == "shared" or policy.redraws_base
    members, scales = policy.members, _row_scales(policy, n)
    with _quietly(policy):
        with perturbed(policy, None):
            found = Draws(action_view(policy, obs))
        with _recorded(noisy_layers(policy), found.layers):
            for number in range(draws):
                if base_moves:
                    network.redraw(fold(seed, number, 0))
                keys = fold_in(fold(seed, number, 1), th.arange(n, device=policy.device))
                with perturbed(policy, RowNoise(restrict(keys, members), scales)):
                    found.views.append(action_view(policy, obs))
    return found


def _row_scales(policy: FlipoutPolicyMixin, n: int) -> th.Tensor:
    """Noise scales of N rows; the rungs of a ladder in turn, so that each environment's has its share."""
    rungs = th.tensor(policy.noise_ladder or (1.0,), device=policy.device)
    return policy.effective_scale * rungs.repeat(-(-n // len(rungs)))[:n]


def weight_statistics(layers: Mapping[str, FlipoutLayer], scale: float) -> dict[str, float]:
    """
    Compute sigma and signal-to-noise ratios, of all layers together and of each.

    :param layers: Perturbed layers by name
    :param scale: Noise scale c
    :return: Numbers by tag
    """
    found: dict[str, float] = {}
    every_sigma, every_ratio = [], []
    for name, layer in layers.items():
        sigma, ratio = sigmas(layer), signal_to_noise(layer, scale)
        every_ratio.append(ratio)
        found |= _of_ratios(f"noise/{name}", ratio)
        if sigma is not None:
            every_sigma.append(sigma)
            found[f"noise/{name}/sigma"] = float(sigma.mean())
    found |= _of_ratios("noise", th.cat(every_ratio))
    return found | ({"noise/sigma": float(th.cat(every_sigma).mean())} if every_sigma else {})


def _of_ratios(prefix: str, ratios: th.Tensor) -> dict[str, float]:
    if not len(ratios):  # no noise at all
        return {}
    values = thinned(ratios).float().quantile(ratios.new_tensor(QUANTILES, dtype=th.float32)).tolist()
    return {f"{prefix}/snr_q{round(100 * q):02d}": value for q, value in zip(QUANTILES, values, strict=True)}


def action_statistics(found: Draws) -> dict[str, float]:
    """
    Compute how noise moves outputs and actions.

    :param found: What :func:`draw` saw
    :return: Numbers by tag
    """
    outputs = th.stack([view.outputs for view in found.views])
    numbers = {"noise/output_share": noise_share(outputs), **_distance(found)}
    # A layer that is called in some draws only, or with another number of rows each time, has no share.
    regular = {name: layer for name, layer in found.layers.items() if len({one.shape for one in layer}) == 1}
    numbers |= {f"noise/{name}/output_share": noise_share(th.stack(layer)) for name, layer in regular.items()}
    varies = (outputs != outputs[:1]).any(0).all(0)  # in every row, by entry: others have no correlation
    if bool(varies.any()):
        numbers["noise/correlation"] = row_correlation(outputs[..., varies]).value
    if found.mean.compared:
        numbers["noise/kl"] = divergence(
            stacked([found.mean.compared] * len(found.views)), stacked([view.compared for view in found.views])
        )
    if found.mean.acting:
        split = entropy_split(stacked([view.acting for view in found.views]))
        numbers |= {f"noise/entropy_{part}": value for part, value in split._asdict().items()}
    return numbers


def _distance(found: Draws) -> dict[str, float]:
    if found.mean.discrete:
        shares = [disagreement(found.mean, view) for view in found.views]
        return {"noise/disagreement": sum(shares) / len(shares)}
    squares = [rms_distance(found.mean, view) ** 2 for view in found.views]
    return {"noise/action_distance": math.sqrt(sum(squares) / len(squares))}


def has_members(policy: Any) -> bool:
    """
    Tell whether a policy is an ensemble whose members have values.

    :param policy: Flipout policy
    :return: Whether it has ``member_values``
    """
    return policy.members is not None and hasattr(policy, "member_values")


def member_statistics(policy: Any, obs: PyTorchObs) -> dict[str, float]:
    """
    Compute how the members of an ensemble differ, over all of them; nothing where there are none.

    :param policy: Flipout policy
    :param obs: N observations, as tensors
    :return: Numbers by tag
    """
    if not has_members(policy):
        return {}
    with _quietly(policy):
        values = policy.member_values(obs)  # (members, N, actions)
    choices = values.argmax(2)
    votes = nn.functional.one_hot(choices, values.shape[2]).sum(0).max(1).values / len(values)
    return {
        "noise/member_disagreement": pairwise_disagreement(choices),
        "noise/member_value_std": float(values.std(0).mean()),
        "noise/vote_share": float(votes.mean()),
    }


def histograms(layers: Mapping[str, FlipoutLayer], scale: float) -> dict[str, th.Tensor]:
    """
    Compute what histograms show: sigma and the logarithm of signal-to-noise, weight by weight.

    :param layers: Perturbed layers by name
    :param scale: Noise scale c
    :return: Values by tag
    """
    found = {}
    for name, layer in layers.items():
        sigma, ratio = sigmas(layer), signal_to_noise(layer, scale)
        if sigma is not None:
            found[f"noise/{name}/sigma_histogram"] = thinned(sigma).cpu()
        if bool((ratio > 0).any()):
            found[f"noise/{name}/snr_histogram"] = thinned(ratio[ratio > 0].log10()).cpu()
    return found
