"""Models that version 0.1.0 saved: names of modules that have moved since, and what its weights have in another form."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch as th

from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.noise import Stream, fold
from sb3_flipout.noise.bases import table_size

#: Where policies were that a saved model names, and where they are.
MOVED_MODULES = {
    "value_based": "dqn",
    "actor_critic": "sac_td3",
    "actor_critic_contrib": "contrib",
    "maskable": "contrib",
    "quantile": "contrib",
    "recurrent": "contrib",
}

_PACKAGE = "sb3_flipout.policies"


def register_moved_modules(available: Iterable[str]) -> None:
    """
    Let pickled policy classes be found under the names that they had.

    :param available: Modules of this package that can be imported
    """
    known = set(available)
    for old, new in MOVED_MODULES.items():
        if new in known:
            sys.modules.setdefault(f"{_PACKAGE}.{old}", import_module(f"{_PACKAGE}.{new}"))


#: What was a choice of ``perturb`` in 0.1.0, and what says it now.
_MOVED_CHOICES = {"linear": 'perturb="policy", layers="linear"', "hidden": 'perturb="policy", layers="hidden"'}


def moved_hint(perturb: Any) -> str:
    """
    Say today's words for a choice of ``perturb`` that 0.1.0 had.

    :param perturb: What came
    :return: A hint; empty where it was no such choice
    """
    if not (isinstance(perturb, str) and perturb in _MOVED_CHOICES):
        return ""
    load = 'Load what 0.1.0 saved so with custom_objects={"policy_kwargs": dict(...)}.'
    return f"Which kinds of layer is a setting of its own: {_MOVED_CHOICES[perturb]}. {load}"


def translated_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """
    Say settings of 0.1.0 in today's words.

    :param saved: Settings by name
    :return: The same, as far as weights depend on them
    """
    settings = dict(saved)
    if settings.get("perturb") in ("linear", "hidden"):
        settings["layers"], settings["perturb"] = settings["perturb"], "policy"
    return settings


def with_bases(policy: Any, state_dict: dict[str, Any], seed: int) -> dict[str, Any]:
    """
    Add to the weights of an ensemble what 0.1.0 drew from its seed: base draws of the members, and of their priors.

    :param policy: Policy with members
    :param state_dict: Weights, which gets them
    :param seed: Seed of the saved noise
    :return: The weights
    """
    unit = (state_dict.pop("prior._extra_state", None) or {}).get("unit")
    for name, layer in policy.named_modules():
        if isinstance(layer, FlipoutLayer) and layer.keeps_base:
            of_prior = name.startswith("prior.")
            base_key = fold(seed, Stream.PRIOR) if of_prior else fold(seed, Stream.BASE, 0)
            for buffer, draw in _old_draws(layer, base_key).items():
                state_dict[f"{name}.{buffer}"] = draw
    if hasattr(policy, "prior"):
        state_dict["prior.unit"] = th.full_like(policy.prior.unit, float("nan") if unit is None else unit)
    return state_dict


def _old_draws(layer: FlipoutLayer, base_key: int) -> dict[str, th.Tensor]:
    """Draws from 0.1.0's table, which was made by torch's generator."""
    draws = layer.bases()[1]
    n = sum(draw.numel() for draw in draws.values())
    size = table_size(n)
    table = th.randn(size, generator=th.Generator().manual_seed(0x5B3F11), device="cpu", dtype=th.float32)
    if layer.noise_config.spec.base == "sign":
        table = th.where(table < 0, -1.0, 1.0)
    start = fold(base_key, layer.noise_index or 0) % (size - n + 1)
    parts = table[start : start + n].split([draw.numel() for draw in draws.values()])  # type: ignore[no-untyped-call]
    return {name: part.view(draw.shape).to(draw) for (name, draw), part in zip(draws.items(), parts, strict=True)}
