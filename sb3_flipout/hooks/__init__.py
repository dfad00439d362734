"""SB3's hooks for flipout policies: a few methods of its algorithms, wrapped in a few lines each.

Each wrapped method calls the original, and does nothing else where the policy is no flipout policy. Methods that a subclass
overrides are wrapped too, when a model of it is built.
"""

from __future__ import annotations

import functools
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_flipout.hooks import _models as models
from sb3_flipout.hooks import _told as told
from sb3_flipout.hooks._finite import store_transition
from sb3_flipout.hooks._models import Method

# What is put in place of the methods of each class, with what stood in the class itself (None where it was inherited).
_INSTALLED: dict[type[BaseAlgorithm], dict[str, Any]] = {}


def _set_up(original: Method, algorithm: Any) -> None:
    """Wrap what a subclass has overridden, too: this is the first that is heard of it."""
    install(type(algorithm))
    models.set_up(original, algorithm)


_EVERY: dict[str, Method] = {
    "_setup_model": _set_up,
    "save": models.save,
    "set_random_seed": models.seed,
    "set_parameters": models.set_parameters,
    "_update_info_buffer": told.end_step,
    "_setup_learn": told.set_up_learning,
}
_ON_POLICY: dict[str, Method] = {**_EVERY, "collect_rollouts": told.collect_rollout, "train": told.train_on_rollout}
_OFF_POLICY: dict[str, Method] = {
    **_EVERY,
    "collect_rollouts": told.collect_transitions,
    "_sample_action": told.sample_action,
    "_store_transition": store_transition,
    "train": told.train,
}


def _wrap(original: Method, wrapper: Method) -> Method:
    what = wrapper.__name__

    @functools.wraps(original)
    def method(self: BaseAlgorithm, *args: Any, **kwargs: Any) -> Any:
        if not models.has_flipout_policy(self):
            return original(self, *args, **kwargs)
        if getattr(self, "policy", None) is None:
            return wrapper(original, self, *args, **kwargs)
        running = models.policy_of(self).marks.running
        # A subclass's method calls its parent's inside its own, and both are wrapped: the outer one tells.
        if what in running:
            return original(self, *args, **kwargs)
        running.add(what)
        try:
            return wrapper(original, self, *args, **kwargs)
        finally:
            running.discard(what)

    method.wraps_for_flipout = True  # type: ignore[attr-defined]
    return method


def _wrap_load(original: Any) -> Any:
    """The same for `load`, which belongs to the class."""
    function = original.__func__

    @functools.wraps(function)
    def load(cls: type[BaseAlgorithm], *args: Any, **kwargs: Any) -> Any:
        return models.load(functools.partial(function, cls), cls, *args, **kwargs)

    load.wraps_for_flipout = True  # type: ignore[attr-defined]
    return classmethod(load)


def install(algorithm_class: type[BaseAlgorithm]) -> None:
    """
    Wrap the methods of an algorithm that are not wrapped: all of a class, or those that a subclass of it has overridden.

    :param algorithm_class: Algorithm class
    """
    wrappers = _OFF_POLICY if issubclass(algorithm_class, OffPolicyAlgorithm) else _ON_POLICY
    for name in (*wrappers, "load"):
        current = getattr(algorithm_class, name)
        if not getattr(current, "wraps_for_flipout", False):
            before = _INSTALLED.setdefault(algorithm_class, {})
            before[name] = algorithm_class.__dict__.get(name)
            new = _wrap_load(current) if name == "load" else _wrap(current, wrappers[name])
            setattr(algorithm_class, name, new)


def uninstall(algorithm_class: type[BaseAlgorithm]) -> None:
    """
    Put back what stood in a class before :func:`install`.

    :param algorithm_class: Algorithm class; one that was never installed stays as it is
    """
    for name, before in _INSTALLED.pop(algorithm_class, {}).items():
        if before is None:
            delattr(algorithm_class, name)
        else:
            setattr(algorithm_class, name, before)


def installed() -> list[type[BaseAlgorithm]]:
    """
    List the classes whose methods are wrapped.

    :return: Algorithm classes
    """
    return list(_INSTALLED)
