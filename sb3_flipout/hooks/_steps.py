"""Gradient steps of a user's own optimizers count as the policy's do: the noise of updates moves with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch as th

from sb3_flipout.checks import warn_user

_MAY_HOLD = (th.optim.Optimizer, dict, list, tuple)
_MOST = 100  # of how many things is looked at each: in long records there are no optimizers


@contextmanager
def own_steps_counted(algorithm: Any, policy: Any) -> Iterator[None]:
    """
    Count the gradient steps of optimizers that the algorithm, or its policy, holds besides the policy's own, and that step the
    same parameters. Say once if parameters have changed without a step that was counted.

    :param algorithm: Algorithm
    :param policy: Its policy
    :return: Context manager
    """
    learning: Any = getattr(policy, "learning", None)
    if learning is None:
        yield
        return
    known: th.optim.Optimizer = policy.step_optimizer
    step, version = learning.step, _version(known)
    with ExitStack() as stack:
        for optimizer in _optimizers([*vars(algorithm).values(), *vars(policy).values()]):
            if optimizer is not known and not _parameters(optimizer).isdisjoint(_parameters(known)):
                stack.callback(optimizer.register_step_post_hook(learning.count).remove)
        yield
    if learning.step == step and _version(known) != version:
        learning.count()
        if "steps" not in learning.warned:
            learning.warned.add("steps")
            warn_user(
                f"`train` of {type(algorithm).__name__} has changed the parameters of its policy without a step of an "
                "optimizer that is known, so all of it learned under the noise of one gradient step. Keep the optimizer as an "
                "attribute of the algorithm or of its policy; or call model.policy.learning.count() after each step."
            )


def _parameters(optimizer: th.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _version(optimizer: th.optim.Optimizer) -> int:
    """A number that grows when somebody writes into the parameters."""
    return sum(parameter._version for group in optimizer.param_groups for parameter in group["params"])


def _optimizers(values: Iterable[Any]) -> Iterator[th.optim.Optimizer]:
    """Optimizers among things, and in lists and dictionaries that are among them."""
    for value in values:
        if not isinstance(value, _MAY_HOLD):
            continue
        if isinstance(value, th.optim.Optimizer):
            yield value
        elif len(value) <= _MOST:
            held = value.values() if isinstance(value, dict) else value
            yield from (part for part in held if isinstance(part, th.optim.Optimizer))
