"""Short policy names on SB3's own algorithm classes, and the few methods that tell a policy what happens.

Nothing of an algorithm is copied. Each wrapped method calls the original and does nothing else when the policy is no
flipout policy; :func:`unregister` takes everything back.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_flipout.policies import actor_critic, on_policy, value_based
from sb3_flipout.policies.base import FlipoutPolicy
from sb3_flipout.rollout import keyed, store_noise

Method = Callable[..., Any]
Aliases = Mapping[str, type[FlipoutPolicy]]

_ACTOR_CRITIC: dict[str, type[FlipoutPolicy]] = {
    "FlipoutMlpPolicy": on_policy.FlipoutActorCriticPolicy,
    "FlipoutCnnPolicy": on_policy.FlipoutActorCriticCnnPolicy,
    "FlipoutMultiInputPolicy": on_policy.FlipoutMultiInputActorCriticPolicy,
}
_TD3: dict[str, type[FlipoutPolicy]] = {
    "FlipoutMlpPolicy": actor_critic.FlipoutTD3Policy,
    "FlipoutCnnPolicy": actor_critic.FlipoutTD3CnnPolicy,
    "FlipoutMultiInputPolicy": actor_critic.FlipoutTD3MultiInputPolicy,
}

#: Which names each algorithm gets.
ALIASES: dict[type[BaseAlgorithm], Aliases] = {
    PPO: _ACTOR_CRITIC,
    A2C: _ACTOR_CRITIC,
    DQN: {
        "FlipoutMlpPolicy": value_based.FlipoutDQNPolicy,
        "FlipoutCnnPolicy": value_based.FlipoutDQNCnnPolicy,
        "FlipoutMultiInputPolicy": value_based.FlipoutDQNMultiInputPolicy,
    },
    SAC: {
        "FlipoutMlpPolicy": actor_critic.FlipoutSACPolicy,
        "FlipoutCnnPolicy": actor_critic.FlipoutSACCnnPolicy,
        "FlipoutMultiInputPolicy": actor_critic.FlipoutSACMultiInputPolicy,
    },
    TD3: _TD3,
    DDPG: _TD3,
}

#: Algorithms that have no flipout policy; the name says why.
REFUSED: dict[type[BaseAlgorithm], dict[str, type[BasePolicy]]] = {}

if find_spec("sb3_contrib") is not None:  # an extra: the rest works without it
    from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO

    from sb3_flipout.policies import actor_critic_contrib, maskable, quantile, recurrent, refused

    ALIASES[TRPO] = _ACTOR_CRITIC
    ALIASES[MaskablePPO] = {
        "FlipoutMlpPolicy": maskable.FlipoutMaskableActorCriticPolicy,
        "FlipoutCnnPolicy": maskable.FlipoutMaskableActorCriticCnnPolicy,
        "FlipoutMultiInputPolicy": maskable.FlipoutMaskableMultiInputActorCriticPolicy,
    }
    ALIASES[RecurrentPPO] = {
        "FlipoutMlpLstmPolicy": recurrent.FlipoutRecurrentPolicy,
        "FlipoutCnnLstmPolicy": recurrent.FlipoutRecurrentCnnPolicy,
        "FlipoutMultiInputLstmPolicy": recurrent.FlipoutRecurrentMultiInputPolicy,
    }
    ALIASES[QRDQN] = {
        "FlipoutMlpPolicy": quantile.FlipoutQRDQNPolicy,
        "FlipoutCnnPolicy": quantile.FlipoutQRDQNCnnPolicy,
        "FlipoutMultiInputPolicy": quantile.FlipoutQRDQNMultiInputPolicy,
    }
    ALIASES[TQC] = {
        "FlipoutMlpPolicy": actor_critic_contrib.FlipoutTQCPolicy,
        "FlipoutCnnPolicy": actor_critic_contrib.FlipoutTQCCnnPolicy,
        "FlipoutMultiInputPolicy": actor_critic_contrib.FlipoutTQCMultiInputPolicy,
    }
    ALIASES[CrossQ] = {"FlipoutMlpPolicy": actor_critic_contrib.FlipoutCrossQPolicy}
    REFUSED[ARS] = {"FlipoutMlpPolicy": refused.NoFlipoutForARS}


def _setup_model(original: Method, algorithm: Any) -> None:
    """Make the rollout buffer store noise, whatever its class: RecurrentPPO lets nobody choose it."""
    given = getattr(algorithm, "rollout_buffer_class", None)
    if given is not None:
        keyed(given)  # refuse an unfit one before anything is built
    original(algorithm)
    store_noise(algorithm.rollout_buffer)


def _collect_rollouts(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell that a rollout starts: only here do base and rollout-long keys change, never between rollout and update."""
    policy = _policy(algorithm)
    policy.begin_rollout()
    with policy.collecting(algorithm.n_envs):
        finished = original(algorithm, *args, **kwargs)
    return _after_collection(algorithm, finished)


def _collect_transitions(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for replayed transitions, whose collection steps are marked one by one."""
    _policy(algorithm).begin_rollout()
    return _after_collection(algorithm, original(algorithm, *args, **kwargs))


def _after_collection(algorithm: Any, finished: Any) -> Any:
    """Where a callback broke off, SB3 has not told the ends of episodes of the last step, so all count as ended."""
    if not getattr(finished, "continue_training", finished):
        _policy(algorithm).end_episodes(np.ones(algorithm.n_envs, dtype=bool))
    return finished


def _sample_action(original: Method, algorithm: Any, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> Any:
    """Mark the collection step: its prediction acts in the training environments, every other one is evaluation."""
    with _policy(algorithm).collecting(n_envs):
        return original(algorithm, learning_starts, action_noise, n_envs)


def _train(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Mark the update."""
    with _policy(algorithm).updating():
        return original(algorithm, *args, **kwargs)


def _update_info_buffer(original: Method, algorithm: Any, infos: Any, dones: np.ndarray | None = None) -> None:
    """Tell ends of episodes: SB3 calls this once per environment step, with the flags of all environments."""
    original(algorithm, infos, dones)
    if dones is not None:
        _policy(algorithm).end_episodes(dones)


def _setup_learn(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell that the environments were reset: SB3 binds a new first observation when it does so."""
    _install(type(algorithm))
    _warn_of_epsilon(algorithm)
    before = algorithm._last_obs
    result = original(algorithm, *args, **kwargs)
    if algorithm._last_obs is not before:
        _policy(algorithm).end_episodes(np.ones(algorithm.n_envs, dtype=bool))
    return result


def _warn_of_epsilon(algorithm: Any) -> None:
    """Say, once per model, that epsilon-greedy is still on: weight noise is there to replace it."""
    policy = _policy(algorithm)
    epsilon = max(getattr(algorithm, "exploration_initial_eps", 0.0), getattr(algorithm, "exploration_final_eps", 0.0))
    if epsilon > 0 and not policy.__dict__.get("warned_of_epsilon"):
        policy.__dict__["warned_of_epsilon"] = True
        warnings.warn(
            f"{type(algorithm).__name__} explores by weight noise and by epsilon-greedy at once. To explore by weight noise "
            "alone, pass exploration_initial_eps=0.0 and exploration_final_eps=0.0.",
            stacklevel=6,
        )


_ON_POLICY: dict[str, Method] = {
    "_setup_model": _setup_model,
    "collect_rollouts": _collect_rollouts,
    "train": _train,
    "_update_info_buffer": _update_info_buffer,
    "_setup_learn": _setup_learn,
}
_OFF_POLICY: dict[str, Method] = {
    "_sample_action": _sample_action,
    "train": _train,
    "collect_rollouts": _collect_transitions,
    "_update_info_buffer": _update_info_buffer,
    "_setup_learn": _setup_learn,
}

# What register changed: for each class the methods it put there (with what stood in the class itself, or None where the
# method was inherited), and the names it added.
_INSTALLED: dict[type[BaseAlgorithm], tuple[dict[str, Method | None], list[str]]] = {}


def _policy(algorithm: Any) -> Any:
    """The policy itself, also where the user has compiled it."""
    return getattr(algorithm.policy, "_orig_mod", algorithm.policy)


def _plainly(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    return original(algorithm, *args, **kwargs)


def _wrap(original: Method, wrapper: Method) -> Method:
    @functools.wraps(original)
    def method(self: BaseAlgorithm, *args: Any, **kwargs: Any) -> Any:
        if wrapper is _setup_model:  # there is no policy yet
            return (wrapper if issubclass(self.policy_class, FlipoutPolicy) else _plainly)(original, self, *args, **kwargs)
        policy = _policy(self)
        # A subclass that is registered too calls the method of its parent inside its own: the outer one has told already.
        inside: set[str] = policy.__dict__.setdefault("told_methods", set())
        if not isinstance(policy, FlipoutPolicy) or wrapper.__name__ in inside:
            return original(self, *args, **kwargs)
        inside.add(wrapper.__name__)
        try:
            return wrapper(original, self, *args, **kwargs)
        finally:
            inside.discard(wrapper.__name__)

    method.wraps_for_flipout = True  # type: ignore[attr-defined]
    return method


def _install(algorithm_class: type[BaseAlgorithm]) -> None:
    """Wrap the methods that are not wrapped: all of a class, or those that a subclass of it has overridden."""
    wrappers = _OFF_POLICY if issubclass(algorithm_class, OffPolicyAlgorithm) else _ON_POLICY
    for method_name, wrapper in wrappers.items():
        current = getattr(algorithm_class, method_name)
        if not hasattr(current, "wraps_for_flipout"):
            methods, _ = _INSTALLED.setdefault(algorithm_class, ({}, []))
            methods[method_name] = algorithm_class.__dict__.get(method_name)
            setattr(algorithm_class, method_name, _wrap(current, wrapper))


def register(algorithm_class: type[BaseAlgorithm] | None = None, aliases: Aliases | None = None) -> None:
    """
    Give an algorithm class its flipout policy names; called at import for those of SB3. Repeating it changes nothing.

    Subclasses of a registered class need no registration of their own, whatever methods they override.

    :param algorithm_class: Algorithm class; ``None`` for all that this package knows
    :param aliases: Policy names and classes; by default those of the known class it derives from
    :raises TypeError: If ``algorithm_class`` is no SB3 algorithm class
    :raises ValueError: If no names are known for it, or a name stands for a foreign policy already; nothing is changed then
    """
    if algorithm_class is None:
        for known, known_aliases in ALIASES.items():
            register(known, known_aliases)
        for known, refusals in REFUSED.items():
            known.policy_aliases = {**refusals, **known.policy_aliases}
        return
    if not (isinstance(algorithm_class, type) and issubclass(algorithm_class, BaseAlgorithm)):
        raise TypeError(f"algorithm_class must be an SB3 algorithm class, got {algorithm_class!r}.")
    aliases = _known_aliases(algorithm_class) if aliases is None else aliases
    for name, policy_class in aliases.items():
        present = algorithm_class.policy_aliases.get(name)
        if present not in (None, policy_class):
            raise ValueError(
                f"{algorithm_class.__name__} has a foreign policy of the name {name!r} already: {present}. Remove it from "
                f"{algorithm_class.__name__}.policy_aliases, or register under another name with aliases=."
            )
    _install(algorithm_class)
    names = _INSTALLED.setdefault(algorithm_class, ({}, []))[1]
    own = vars(algorithm_class).get("policy_aliases")
    if own is None:  # its parent's, which must not get names that are not its own
        algorithm_class.policy_aliases = dict(algorithm_class.policy_aliases)
    names.extend(name for name in aliases if own is None or name not in own)
    algorithm_class.policy_aliases.update(aliases)


def _known_aliases(algorithm_class: type[BaseAlgorithm]) -> Aliases:
    for base in algorithm_class.__mro__:
        if base in ALIASES:
            return ALIASES[base]
    known = ", ".join(known.__name__ for known in ALIASES)
    raise ValueError(
        f"no flipout policies are known for {algorithm_class.__name__}; known are {known} and their subclasses. "
        "Give the policies that fit by aliases={'FlipoutMlpPolicy': ...}."
    )


def unregister(algorithm_class: type[BaseAlgorithm] | None = None) -> None:
    """
    Take back what :func:`register` changed on a class, and on its subclasses, which inherit what it had.

    :param algorithm_class: Algorithm class; ``None`` for all. A class that is not registered is left as it is
    """
    for refusing, refused_names in REFUSED.items() if algorithm_class is None else ():
        for name, policy_class in refused_names.items():
            if refusing.policy_aliases.get(name) is policy_class:
                del refusing.policy_aliases[name]
    for known in [known for known in _INSTALLED if issubclass(known, algorithm_class or BaseAlgorithm)]:
        methods, names = _INSTALLED.pop(known)
        for method_name, before in methods.items():
            if before is None:
                delattr(known, method_name)
            else:
                setattr(known, method_name, before)
        for name in names:
            known.policy_aliases.pop(name, None)
        parents = (getattr(base, "policy_aliases", None) for base in known.__mro__[1:])
        if "policy_aliases" in vars(known) and known.policy_aliases == next(parents, None):  # register's copy
            del known.policy_aliases
