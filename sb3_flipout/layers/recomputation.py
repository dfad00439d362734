"""Forward passes that run again in the backward pass: activation checkpointing.

``torch.utils.checkpoint`` forgets what a block computed and computes it once more when gradients are asked for. By then the
``with perturbed(...)`` block may be over, or another be open. So a network notes on each checkpoint that it is called in what
its rows saw there, and when the checkpoint runs again, they see that.

Torch has no public way to tell in which checkpoint code runs. The hooks by which a checkpoint keeps autograd from saving
tensors know it, in variables of their own.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, TypeVar

import torch as th

T = TypeVar("T")

# Asked for in every pass of every layer, so by torch's own names: the hooks that stand ready, and the backward pass that runs.
top_hooks: Any = th._C._autograd._top_saved_tensors_default_hooks
backward_task: Any = th._C._current_graph_task_id

_MARK = "_seen_by_sb3_flipout"
_BACKWARD = object()


class _Checkpoint(NamedTuple):
    """
    A checkpoint that code runs in.

    :param frame: Torch's record of it, which lives as long as the graph
    :param again: Whether it is being computed again
    """

    frame: Any
    again: bool


def place() -> object | None:
    """
    Tell where code runs, so that what is switched on inside a checkpoint is known to be switched on again with it.

    :return: The innermost checkpoint, or a mark of the backward pass; ``None`` outside both
    """
    around = _checkpoints()
    if around:
        frame: object = around[0].frame
        return frame
    return _BACKWARD if _in_backward() else None


def seen(owner: object, now: T, switched_on_at: object | None) -> T:
    """
    Find out what the rows of a network see: what they see now, or, in what is computed again, what they saw then.

    :param owner: The network
    :param now: What its rows see now
    :param switched_on_at: The :func:`place` where that was said
    :return: What they see
    :raises RuntimeError: In a backward pass that runs a layer again in a way that does not tell when it ran first
    """
    fresh: list[Any] = []
    around = _checkpoints()
    for frame, again in around:
        if frame is switched_on_at:  # the checkpoint holds the `with`, so it says the same again by itself
            break
        if again:
            now = frame.__dict__.get(_MARK, {}).get(owner, now)
            break
        fresh.append(frame)
    for frame in fresh:
        frame.__dict__.setdefault(_MARK, {}).setdefault(owner, now)
    if not around and switched_on_at is None and _in_backward():
        _check_no_function_repeats_it()
    return now


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return bool(backward_task() != -1)


def _check_no_function_repeats_it() -> None:
    """Refuse autograd functions that compute a forward pass again in their backward pass: they leave no note."""
    if isinstance(th._C._current_autograd_node(), th.autograd.function.BackwardCFunction):
        raise RuntimeError(
            "a perturbed layer runs again in the backward pass of torch.utils.checkpoint(..., use_reentrant=True), or of "
            "another function that computes a forward pass again, where it cannot be told which noise it had. Use "
            "use_reentrant=False, or leave the module out with skip=."
        )


def _checkpoints() -> list[_Checkpoint]:
    """The checkpoints that code runs in now, the innermost first."""
    autograd: Any = th._C._autograd
    hooks: list[Any] = []
    while (top := top_hooks(False)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    for pair in reversed(hooks):
        autograd._push_saved_tensors_default_hooks(*pair)
    found = [_checkpoint_of(pack) for pack, _ in hooks]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _checkpoint_of(pack: Any) -> _Checkpoint | None:
    """The checkpoint whose hook a function is; ``None`` for hooks of others."""
    hook = inspect.unwrap(pack)
    if not (inspect.isfunction(hook) or inspect.ismethod(hook)):  # builtins, partials and objects with __call__
        return None
    known = inspect.getclosurevars(hook).nonlocals
    if "target_frame_ref" in known:
        return _Checkpoint(known["target_frame_ref"](), True)
    return _Checkpoint(known["frame"], False) if "frame" in known and hasattr(known["frame"], "recompute_fn") else None
