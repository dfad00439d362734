"""The tables that pieces of a hashed word are looked up in: eight signs per byte, or one quantile per sixteen bits.

They belong to the process. So they are made in fixed types, outside whatever mode the caller is in (``inference_mode``,
another default type or device), and from numbers that do not depend on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch as th

from sb3_flipout.noise.compiling import eager

FactorKind = Literal["sign", "sqrt_normal", "normal"]

# Tables by (kind, dtype, device), for torch and for numpy. A dictionary and not functools.cache, which torch.compile warns of.
_TABLES: dict[tuple[FactorKind, th.dtype, th.device], tuple[th.Tensor, np.ndarray | None]] = {}


@contextmanager
def build_outside_modes() -> Iterator[None]:
    """
    Leave the modes that a caller may be in, so that what is built here serves every later caller.

    :return: Context manager
    """
    with th.inference_mode(False), th.no_grad(), th.device("cpu"):
        yield


def factor_table(kind: FactorKind, dtype: th.dtype, device: th.device) -> tuple[th.Tensor, np.ndarray | None]:
    """
    Look up or build the table of one kind of factor.

    :param kind: What a piece of a word stands for
    :param dtype: Floating-point type of the factors
    :param device: Device of the tensor
    :return: Row per value of a piece, shape (256, 8), lowest bit first, for signs and (65536, 1) for quantiles; and the same
        for numpy, which has every type but bfloat16
    """
    name = (kind, dtype, device)
    if name not in _TABLES:
        _TABLES[name] = _build(kind, dtype, device)
    return _TABLES[name]


@eager
def _build(kind: FactorKind, dtype: th.dtype, device: th.device) -> tuple[th.Tensor, np.ndarray | None]:
    """Not traced, unlike the look-up, which leaves compiled code in one piece."""
    with build_outside_modes():
        table = (_signs() if kind == "sign" else _quantiles(kind)).to(dtype)
        return table.to(device), None if dtype == th.bfloat16 else table.numpy()


def _signs() -> th.Tensor:
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return th.from_numpy(1.0 - 2.0 * bits)


def _quantiles(kind: FactorKind) -> th.Tensor:
    """
    Mid-point quantiles of N(0, 1): symmetric about 0, largest 4.3 standard deviations, rescaled to unit variance.

    Python computes them by rational functions, with a logarithm in the tails; another last bit there is lost in float32.
    """
    half = np.array([NormalDist().inv_cdf((piece + 0.5) / 65536) for piece in range(32768, 65536)])
    half = half / math.sqrt(math.fsum(half * half) / len(half))
    if kind == "sqrt_normal":  # f(z) = sgn(z) sqrt|z|: Fortunato et al. 2018, section 3, eq. (10)
        half = np.sqrt(half)
    return th.from_numpy(np.concatenate([-half[::-1], half])[:, None])
