"""Layers that are plain and are called where actions are chosen: what a policy of the user's has beside what SB3 knows of."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from sb3_flipout.checks import warn_once
from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.layers.convert import LAYER_CHOICES, is_skipped
from sb3_flipout.policies.observations import drawn, looked_at, stacked

_LOOKED_AT = 4  # observations
# What SB3 and sb3-contrib call what computes values alone, beside the actions.
_CRITICS = ("value_net", "mlp_extractor.value_net", "vf_features_extractor", "lstm_critic", "critic")


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
    settings, called = policy.noise_settings, []
    kinds = tuple(LAYER_CHOICES[settings.layers])
    plain = {
        name: layer
        for name, layer in policy.named_modules()
        if isinstance(layer, kinds)
        and not isinstance(layer, FlipoutLayer)
        and not is_skipped(name, (*settings.skip, *_CRITICS))
        and (settings.perturb_frozen or any(parameter.requires_grad for parameter in layer.parameters()))
    }
    handles = [layer.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, layer in plain.items()]
    try:
        with looked_at(policy):
            observations = stacked(list(islice(drawn(policy.observation_space), _LOOKED_AT)))
            policy.outputs_of(policy, policy.obs_to_tensor(observations)[0])
    except Exception:  # a policy of the user's that chooses in another way
        return []
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(called))
