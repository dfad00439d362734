"""Draws of the base perturbation: slices of one long table of noise (Salimans et al. 2017, section 2.1).

A draw is a pure function of its key and its size: the key says where in the table it begins. Nothing is generated or copied
for it, which matters where each gradient step has a draw of its own: generating 1.6 million normals takes 13 ms, as long as
a whole step of DQN. The table is at least four times as long as the draw, so two draws hardly ever begin at the same place,
and where they overlap no weight finds its own number again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch as th

BaseLaw = Literal["normal", "sign"]

_LEAST = 1 << 22  # 16 MiB in float32, and enough for the layers of most policies together
_SEED = 0x5B3F11  # any: the same table everywhere

# By (law, size, dtype, device). Each is made on the CPU first, so that all devices have the same numbers.
_TABLES: dict[tuple[BaseLaw, int, th.dtype, th.device], th.Tensor] = {}


def table_size(n: int) -> int:
    """
    Give the size of the table from which a draw is sliced: a power of two, at least four times as long.

    :param n: Numbers in the draw
    :return: Numbers in the table
    """
    return int(max(_LEAST, 1 << (4 * n - 1).bit_length()))


@th.compiler.disable  # type: ignore[untyped-decorator]
def base_draws(law: BaseLaw, key: int, shapes: Sequence[th.Size], like: th.Tensor) -> list[th.Tensor]:
    """
    Draw the base of the weights of one layer: neighbouring parts of one slice.

    The results are views of the table: never write into them.

    :param law: ``"normal"`` for N(0, 1), ``"sign"`` for +1 and -1
    :param key: Key of the draw, any integer
    :param shapes: Shapes of the weights
    :param like: Tensor whose floating-point type and device the draws get
    :return: One tensor per shape
    """
    n = sum(shape.numel() for shape in shapes)
    size = table_size(n)
    start = key % (size - n + 1)
    flat = _table(law, size, like.dtype, like.device)[start : start + n]
    return [part.view(shape) for part, shape in zip(flat.split([s.numel() for s in shapes]), shapes, strict=True)]  # type: ignore[no-untyped-call]


def _table(law: BaseLaw, size: int, dtype: th.dtype, device: th.device) -> th.Tensor:
    name = (law, size, dtype, device)
    if name not in _TABLES:
        normal = th.randn(size, generator=th.Generator().manual_seed(_SEED), device="cpu")
        table = normal if law == "normal" else th.where(normal < 0, -1.0, 1.0)
        _TABLES[name] = table.to(device=device, dtype=dtype)
    return _TABLES[name]
