"""Policies as ONNX, for runtimes without Python."""

from __future__ import annotations

import logging
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import torch as th

from sb3_flipout.evolution.policy import FlipESPolicy
from sb3_flipout.export.graphs import ActorCriticGraph, ActorGraph, Graph, NetworkGraph, RecurrentGraph, ValueGraph, VoteGraph
from sb3_flipout.policies import FlipoutPolicyMixin
from sb3_flipout.policies.observations import drawn, stacked

_ROWS = 3  # of the batch that is traced; the graph takes any number


def graph_of(policy: Any) -> Graph:
    """
    Make the graph of what a policy does without chance: a module of tensors alone, for ONNX or ``torch.jit.trace``.

    :param policy: A flipout policy, or a model with one
    :return: Module from observations to actions, in evaluation mode
    :raises TypeError: If it is no flipout policy
    """
    policy = getattr(policy, "policy", policy)
    if not isinstance(policy, FlipoutPolicyMixin):
        raise TypeError(f"policy must be a flipout policy or a model with one, got {type(policy).__name__}.")
    if hasattr(policy, "member_values") and policy.members is not None:
        return VoteGraph(policy).eval()
    if isinstance(policy, FlipESPolicy):
        return NetworkGraph(policy).eval()
    plain: Any = policy.to_plain_policy()
    plain.set_training_mode(False)
    if hasattr(plain, "lstm_actor"):
        return RecurrentGraph(plain).eval()
    if hasattr(plain, "q_net") or hasattr(plain, "quantile_net"):
        return ValueGraph(plain).eval()
    return (ActorGraph if hasattr(plain, "actor") else ActorCriticGraph)(plain).eval()


def export_onnx(policy: Any, path: str | Path) -> Path:
    """
    Write what ``predict(deterministic=True)`` does as an ONNX graph: the mean weights, or the vote of a policy's members.

    Inputs are ``obs``, or the names of a dictionary of observations, as the environment gives them (images channel first, as
    SB3 transposes them), with any number of rows; the output is ``actions``, scaled and clipped as by ``predict``. A recurrent
    policy takes ``hidden``, ``cell``, shape (layers, N, units), and ``episode_start``, shape (N,), and gives the next two as
    ``next_hidden`` and ``next_cell``. Statistics of ``VecNormalize`` are the environment's, and not in it.

    :param policy: A flipout policy, or a model with one
    :param path: File
    :return: The file
    :raises TypeError: If it is no flipout policy
    :raises ValueError: If observations have the names that the graph has for itself
    :raises ImportError: If onnx and onnxscript are not installed
    """
    graph, path = graph_of(policy).cpu(), Path(path)
    inputs, names = example_inputs(graph)
    outputs = ["actions", *(f"next_{name}" for name in graph.states[:2])]
    if len({*names, *outputs}) < len(names) + len(outputs):
        raise ValueError(f"the observations have names that the graph has for itself, {', '.join(outputs)}: rename {names}.")
    batch = th.export.Dim("batch", min=1)
    shapes = tuple({1 if name in ("hidden", "cell") else 0: batch} for name in names)
    try:
        with warnings.catch_warnings(), _Quiet("torch.onnx"):
            warnings.simplefilter("ignore")  # the exporter's, of itself
            program: Any = th.onnx.export(
                graph, inputs, input_names=names, output_names=outputs, dynamic_shapes=(shapes,), dynamo=True, verbose=False
            )
            unfinished = path.with_name(f".{path.name}.unfinished")
            program.save(str(unfinished), external_data=False)
            unfinished.replace(path)
    except ImportError as error:
        raise ImportError(
            f'exporting to ONNX needs onnx and onnxscript; pip install "sb3_flipout[onnx]" does it ({error}).'
        ) from error
    return path


class _Quiet:
    """Keeps a logger's warnings of itself away."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: Any) -> None:
        self._logger.setLevel(self._level)


def example_inputs(graph: Graph) -> tuple[tuple[th.Tensor, ...], list[str]]:
    """
    Make a batch that a graph takes: to trace it by.

    :param graph: Graph
    :return: Tensors, and their names
    """
    batch = stacked(list(islice(drawn(graph.policy.observation_space), _ROWS)))
    parts = batch if isinstance(batch, dict) else {"obs": batch}
    inputs, names = [th.as_tensor(part) for part in parts.values()], list(parts)
    if graph.states:
        lstm = graph.policy.lstm_actor
        inputs += [th.zeros(lstm.num_layers, _ROWS, lstm.hidden_size) for _ in range(2)] + [th.zeros(_ROWS)]
        names += list(graph.states)
    return tuple(inputs), names
