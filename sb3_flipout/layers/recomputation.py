"""Forward passes that run again in the backward pass: activation checkpointing.

``torch.utils.checkpoint`` forgets what a block computed and computes it once more when gradients are asked for. By then the
``with perturbed(...)`` block is over. So while something stands ready to recompute, a layer notes on the autograd graph under
which noise it ran, and when it is called in a backward pass without noise, it looks there.
"""

from __future__ import annotations

from typing import Any

import torch as th

_MARK = "sb3_flipout"


def in_backward() -> bool:
    """
    Tell whether autograd is running a backward pass in this thread.

    :return: Whether it is
    """
    return bool(th._C._current_graph_task_id() != -1)


def is_recorded() -> bool:
    """
    Tell whether something waits to recompute what runs now: hooks on the tensors that autograd saves.

    :return: Whether it does
    """
    return th._C._autograd._top_saved_tensors_default_hooks(False) is not None


def note(output: th.Tensor, owner: object, seen: Any) -> None:
    """
    Write on the graph under which noise an output was computed.

    :param output: Output of a layer
    :param owner: The network whose noise it is
    :param seen: What its rows saw
    """
    node: Any = output.grad_fn
    if node is not None:
        node.metadata[_MARK] = (*node.metadata.get(_MARK, ()), (owner, seen))


def look_up(owner: object) -> Any:
    """
    Find under which noise the part of the graph was computed whose gradient is asked for now.

    :param owner: The network whose noise is looked for
    :return: What its rows saw; ``None`` if nothing is noted
    :raises RuntimeError: In a reentrant checkpoint, which leaves no graph to look at
    """
    node = th._C._current_autograd_node()
    if node is None:
        return None
    if type(node).__name__ == "CheckpointFunctionBackward":
        raise RuntimeError(
            "a perturbed layer runs again in the backward pass of torch.utils.checkpoint(..., use_reentrant=True), where it "
            "cannot be told which noise it had. Use use_reentrant=False, or leave the module out with skip=."
        )
    waiting: list[Any] = [node]
    known: set[Any] = set()
    while waiting:
        nearest = waiting.pop(0)
        for noted_owner, seen in nearest.metadata.get(_MARK, ()):
            if noted_owner is owner:
                return seen
        for following, _ in nearest.next_functions:
            if following is not None and following not in known:
                known.add(following)
                waiting.append(following)
    return None
