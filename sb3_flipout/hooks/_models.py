"""What SB3's algorithms tell a flipout policy when a model is built, saved and loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_flipout.buffers import keyed, store_noise
from sb3_flipout.hooks._batches import number_stored
from sb3_flipout.noise.compiling import uncompiled
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.learning_noise import learning_of

Method = Callable[..., Any]

#: Where an algorithm's data has the noise state, in a saved model and while it is built from one.
STATE = "flipout_noise"
#: By what copies of the policy's networks are known, which the algorithm holds and so are saved with it.
_ORIGINS = "origins"

#: Held while a model is built: SB3 seeds the one generator of torch, and two models built in threads would seed each other.
_BUILDING = threading.RLock()


def policy_of(algorithm: Any) -> Any:
    """
    Find the policy of an algorithm, itself also where the user has compiled it.

    :param algorithm: Algorithm
    :return: Its policy
    """
    return uncompiled(algorithm.policy)


def has_flipout_policy(algorithm: Any) -> bool:
    """
    Tell whether an algorithm has a flipout policy; before it is built, whether it will have one.

    :param algorithm: Algorithm
    :return: Whether it has
    """
    policy = getattr(algorithm, "policy", None)
    if policy is None:
        kind = algorithm.policy_class  # which may be a function that makes a policy
        return isinstance(kind, type) and issubclass(kind, FlipoutPolicyMixin)
    return isinstance(uncompiled(policy), FlipoutPolicyMixin)


def set_up(original: Method, algorithm: Any) -> None:
    """Make the rollout buffer store noise, whatever its class, and continue from the noise state of a loaded model."""
    given = getattr(algorithm, "rollout_buffer_class", None)
    if given is not None:
        keyed(given)  # refuse an unfit one before anything is built
    state = algorithm.__dict__.pop(STATE, None)
    with _BUILDING:
        original(algorithm)
    if hasattr(algorithm, "rollout_buffer"):
        store_noise(algorithm.rollout_buffer)
    if state is not None:
        policy_of(algorithm).set_noise_state(state)
        if (learning := learning_of(policy_of(algorithm))) is not None:
            learning.comes_from(state.get(_ORIGINS, ()))
    if getattr(algorithm, "replay_buffer", None) is not None:
        number_stored(algorithm, policy_of(algorithm))


def save(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Save the noise state beside the algorithm's own data."""
    policy = policy_of(algorithm)
    learning = learning_of(policy)
    algorithm.__dict__[STATE] = {**policy.noise_state(), _ORIGINS: [] if learning is None else list(learning.origins)}
    try:
        return original(algorithm, *args, **kwargs)
    finally:
        del algorithm.__dict__[STATE]


def load(original: Method, cls: type[BaseAlgorithm], *args: Any, **kwargs: Any) -> Any:
    """Explore by other noise where a seed is given."""
    model = original(*args, **kwargs)
    if kwargs.get("seed") is not None and has_flipout_policy(model):
        policy_of(model).reseed_noise(kwargs["seed"])
    return model


def seed(original: Method, algorithm: Any, seed: int | None = None) -> None:
    """Seed the noise with everything else; while a model is built there is none yet."""
    original(algorithm, seed)
    if seed is not None and getattr(algorithm, "policy", None) is not None:
        policy_of(algorithm).reseed_noise(seed)


def set_parameters(original: Method, algorithm: Any, load_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse the optimizer of a policy without noise before anything is changed."""
    bound = signature(original).bind(algorithm, load_path_or_dict, *args, **kwargs)
    given = {**bound.arguments, **kwargs}
    if not isinstance(load_path_or_dict, Mapping):  # a path: read here, as SB3 would
        device = given.get("device", "auto")
        load_path_or_dict = load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]
    weights = load_path_or_dict.get("policy")
    learned = any(name.endswith("_sigma") for name in policy_of(algorithm).state_dict())
    if isinstance(weights, Mapping) and learned and not any(name.endswith("_sigma") for name in weights):
        others = [name for name in load_path_or_dict if name != "policy"]
        if others or given.get("exact_match", True):
            raise ValueError(
                "these are the parameters of a policy without noise: it has no sigma, and its optimizer none for it. "
                "To take its "
                'weights as mean weights and keep the sigma that is here: model.set_parameters({"policy": params["policy"]}, '
                "exact_match=False)."
            )
    return original(algorithm, load_path_or_dict, *args, **kwargs)
