"""SB3's own policy with the mean weights of a flipout policy, compared with it before it is handed out."""

from __future__ import annotations

from dataclasses import fields
from itertools import islice
from typing import Any

import torch as th
from stable_baselines3.common.policies import BasePolicy

from sb3_flipout.policies.observations import drawn, looked_at, stacked

_COMPARED = 16  # observations


def plain_copy(policy: Any, mixin: type) -> BasePolicy:
    """
    Make SB3's own policy with the mean weights.

    :param policy: Flipout policy
    :param mixin: What makes a class a flipout policy
    :return: Policy of the first class behind the mixins that is none of them: SB3's, or the user's own plain one
    :raises ValueError: If it does not compute what the mean weights compute
    """
    plain_class: Any = next(
        base
        for base in type(policy).__mro__
        if issubclass(base, BasePolicy) and not issubclass(base, mixin) and not issubclass(mixin, base)
    )
    noise_names = {field.name for field in fields(policy.noise_settings)}
    arguments = {name: value for name, value in policy._get_constructor_parameters().items() if name not in noise_names}
    own = {
        name.replace("_orig_mod.", ""): part for name, part in policy.state_dict().items()
    }  # in which torch.compile puts it
    with th.random.fork_rng(devices=[]):  # the initialisation, overwritten at once, must not move the global generator
        try:
            plain: BasePolicy = plain_class(**arguments)
            weights = plain.state_dict()
            plain.load_state_dict({name: own[name] for name in weights})
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(_refusal(policy, plain_class)) from error
    plain.set_training_mode(policy.training)
    plain = plain.to(policy.device)
    if not _agree(policy, plain):
        raise ValueError(_refusal(policy, plain_class))
    return plain


def _refusal(policy: Any, plain_class: type) -> str:
    return (
        f"{type(policy).__name__} computes something else than {plain_class.__name__}, "
        "from which a plain policy would be made. "
        "Write what you change as a plain policy of your own, and put the flipout class before it: "
        f"class {type(policy).__name__}(sb3_flipout.policies.{_nearest(policy)}, YourPlainPolicy). Then that is the plain one."
    )


def _nearest(policy: Any) -> str:
    return next(base.__name__ for base in type(policy).__mro__ if base.__module__.startswith("sb3_flipout."))


def _agree(policy: Any, plain: BasePolicy) -> bool:
    """Whether two policies say the same about observations of their space."""
    batch = stacked(list(islice(drawn(policy.observation_space), _COMPARED)))
    with looked_at(policy, plain):
        obs = policy.obs_to_tensor(batch)[0]
        pairs = zip(policy.mean_outputs(obs), policy.outputs_of(plain, obs), strict=True)
        return all(th.allclose(own, other, rtol=1e-4, atol=1e-5, equal_nan=True) for own, other in pairs)
