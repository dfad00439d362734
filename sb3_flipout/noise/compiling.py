"""Keeping torch.compile away from what counts in Python, at no price where nothing is compiled.

``torch.compiler.disable`` imports the compiler where it decorates, which takes a second or more, and costs some microseconds
in each call. With ``recursive=False`` Dynamo looks at the method anew in each call (torch 2.13), as if to compile it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch as th

F = TypeVar("F", bound=Callable[..., Any])

# What `torch._dynamo.skip` does, which torch.compiler.disable(recursive=False) once was; without the import of the compiler.
_dynamo: Any = th._C._dynamo.eval_frame
_STEP_OVER = _dynamo._FrameExecStrategy(_dynamo._FrameAction.SKIP, _dynamo._FrameAction.DEFAULT)


def eager(function: F) -> F:
    """
    Keep a function, and all that it calls, out of compiled graphs.

    :param function: Function
    :return: The same, for torch.compile to leave alone
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _dynamo.get_eval_frame_callback() is None:  # nothing is being compiled around this call
            return function(*args, **kwargs)
        return _disabled(function)(*args, **kwargs)

    return _left_alone(call)


def steps_aside(method: F) -> F:
    """
    Keep a method's own lines out of compiled graphs; what it calls, SB3's methods and the network, is compiled.

    :param method: Method that says what a pass sees, and calls its parent's
    :return: The same, for torch.compile to step over
    """
    return _left_alone(method)


def uncompiled(module: Any) -> Any:
    """
    Find the module inside one that ``torch.compile`` has made, which hands on most of what it is asked, and is of no class of
    that module's.

    :param module: Module, compiled or not
    :return: The one that was compiled; a module that was not, itself
    """
    return getattr(module, "_orig_mod", module)


def recording() -> bool:
    """
    Tell whether torch records what is computed, or computes something else in its place: ``torch.compile``,
    ``torch.jit.trace``, ``torch.func``, and modes that dispatch anew (``make_fx``). What numpy computed would be a constant.

    :return: Whether it does
    """
    compiled_or_traced = th.compiler.is_compiling() or th._C._get_tracing_state() is not None
    return compiled_or_traced or th._C._are_functorch_transforms_active() or th._C._len_torch_dispatch_stack() > 0


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return th.compiler.disable(function)  # type: ignore[no-untyped-call]


def _left_alone(function: Any) -> Any:
    _dynamo.set_code_exec_strategy(function.__code__, _STEP_OVER)  # where it is a frame of its own
    function._torchdynamo_disable = True  # where it is called in a graph
    return function
