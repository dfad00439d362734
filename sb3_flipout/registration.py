"""Short policy names on SB3's own algorithm classes; :func:`unregister` takes everything back."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy

from sb3_flipout.hooks import install, installed, uninstall
from sb3_flipout.policies import dqn, on_policy, sac_td3
from sb3_flipout.policies.base import FlipoutPolicyMixin

Aliases = Mapping[str, type[FlipoutPolicyMixin]]

#: Which names each algorithm gets: what the files of policies say.
ALIASES: dict[type[BaseAlgorithm], Aliases] = {**on_policy.ALIASES, **dqn.ALIASES, **sac_td3.ALIASES}

#: Algorithms that have no flipout policy; the name says why.
REFUSED: dict[type[BaseAlgorithm], Mapping[str, type[BasePolicy]]] = {}

if find_spec("sb3_contrib") is not None:  # an extra: the rest works without it
    from sb3_flipout.policies import contrib

    ALIASES.update(contrib.ALIASES)
    REFUSED.update(contrib.REFUSED)

# The names that register added to each class.
_NAMES: dict[type[BaseAlgorithm], list[str]] = {}


def register(algorithm_class: type[BaseAlgorithm] | None = None, aliases: Aliases | None = None) -> None:
    """
    Add the flipout policy names to an algorithm class; called at import for those of SB3. Repeating it changes nothing.

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
    install(algorithm_class)
    own = vars(algorithm_class).get("policy_aliases")
    if own is None:  # its parent's, which must not get names that are not its own
        algorithm_class.policy_aliases = dict(algorithm_class.policy_aliases)
    _NAMES.setdefault(algorithm_class, []).extend(name for name in aliases if own is None or name not in own)
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
    for known in [known for known in installed() if issubclass(known, algorithm_class or BaseAlgorithm)]:
        uninstall(known)
    for known in [known for known in _NAMES if issubclass(known, algorithm_class or BaseAlgorithm)]:
        for name in _NAMES.pop(known):
            known.policy_aliases.pop(name, None)
        parents = (getattr(base, "policy_aliases", None) for base in known.__mro__[1:])
        if "policy_aliases" in vars(known) and known.policy_aliases == next(parents, None):  # register's copy
            del known.policy_aliases
