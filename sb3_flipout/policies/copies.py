"""Copies of a policy's networks that an algorithm of the user's holds, such as further targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.learning import LearnsUnderNoise

_DEPTH, _MOST = 3, 100  # how deep is searched, and in what of how many things


def follow(own: Iterable[LearnsUnderNoise], values: Iterable[Any]) -> list[nn.Module]:
    """
    Let copies of networks learn under the noise of those that they are copied from: a copy belongs to no policy, and would see
    the mean weights. Copies of whole policies are policies of their own, and stay so, as do networks of other models.

    :param own: The networks of a policy
    :param values: Where copies are looked for: these things, and lists, dictionaries and modules that are among them
    :return: Networks of the same classes that are no copies, and never had noise
    """
    kinds = {type(net): net for net in own}
    plain_kinds = {kind.DERIVED_FROM[1] for kind in kinds if hasattr(kind, "DERIVED_FROM")}
    plain = []
    for held in _held(values, (LearnsUnderNoise, *plain_kinds)):
        like = kinds.get(type(held))
        if type(held) in plain_kinds:
            plain.append(held)
        elif like is not None and like.learning is not None and held.learning is not None:
            if held.learning.is_copy_of(like.learning):
                held.follow(like)
    return plain


def _held(values: Iterable[Any], kinds: tuple[type, ...], depth: int = 0) -> Iterator[Any]:
    """Networks among things and in what these hold; not in long records, which would be looked at in each training."""
    for value in values:
        if isinstance(value, nn.Module):
            if isinstance(value, kinds):
                yield value
            elif depth < _DEPTH and not isinstance(value, FlipoutPolicyMixin):
                yield from _held(value.children(), kinds, depth + 1)
        elif isinstance(value, (dict, list, tuple)) and depth < _DEPTH and len(value) <= _MOST:
            yield from _held(value.values() if isinstance(value, dict) else value, kinds, depth + 1)
