"""Layers that are plain and on which actions depend: what a policy of the user's has beside what SB3 knows of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch as th

from sb3_flipout.checks import warn_once
from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.layers.convert import LAYER_CHOICES, is_skipped
from sb3_flipout.policies.observations import drawn, looked_at, stacked

_LOOKED_AT = 4  # observations
# What SB3 and sb3-contrib call what no action depends on: where nothing else is plain, nothing has to be run.
_VALUES = ("value_net", "mlp_extractor.value_net", "vf_features_extractor", "lstm_critic", "critic")
_TARGETS = ("critic_target", "actor_target", "q_net_target", "quantile_net_target")


def warn_of_plain_in_actions(policy: Any, known: Iterable[str], where_layers_belong: str) -> None:
    """
    Say once which layers explore nothing, though actions depend on them.

    :param policy: Flipout policy, in which nothing changes
    :param known: Names of layers of which that is known
    :param where_layers_belong: What is to be done about them
    """
    plain = sorted(set(plain_in_actions(policy)) - set(known))
    if plain:
        warn_once(
            policy.marks.warned,
            "plain layers",
            f"actions depend on {', '.join(plain)}, which stay{'s' if len(plain) == 1 else ''} plain, so nothing explores "
            f"through their weights: perturb={policy.noise_settings.perturb!r} takes the parts that SB3's policies have, and "
            f"what is there when the policy has been built. {where_layers_belong}; there, "
            "skip= says of them that this is as it should be.",
        )


def plain_in_actions(policy: Any) -> list[str]:
    """
    Find the layers that could be perturbed, and are neither perturbed nor left out by name, on which actions depend.

    :param policy: Flipout policy, in which nothing changes
    :return: Names of the layers in the policy; none if it could not be asked
    """
    settings, kinds = policy.noise_settings, tuple(LAYER_CHOICES[policy.noise_settings.layers])
    skipped = (*settings.skip, *_VALUES, *_TARGETS)
    plain = {
        name: list(filter(_learns, layer.parameters()))
        for name, layer in policy.named_modules()
        if isinstance(layer, kinds) and not isinstance(layer, FlipoutLayer) and not is_skipped(name, skipped)
    }
    weights = [weight for of_layer in plain.values() for weight in of_layer]
    if not weights:
        return []
    try:
        # cuDNN's LSTMs have no gradients in evaluation mode.
        with looked_at(policy), th.enable_grad(), th.backends.cudnn.flags(enabled=False):
            observations = stacked(list(islice(drawn(policy.observation_space), _LOOKED_AT)))
            outputs = policy.outputs_of(policy, policy.obs_to_tensor(observations)[0])
            chosen_by = [outputs[i].sum() for i in policy.action_outputs if outputs[i].requires_grad]
            gradients = th.autograd.grad(chosen_by, weights, allow_unused=True)
    except Exception:  # a policy of the user's that chooses in another way
        return []
    moved = {id(weight) for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    return [name for name, of_layer in plain.items() if any(id(weight) in moved for weight in of_layer)]


def _learns(parameter: th.Tensor) -> bool:
    return parameter.requires_grad
