"""Draws of the base perturbation: slices of one long table of noise (Salimans et al. 2017, section 2.1).

A draw is a pure function of its key and its size: the key says where in the table it begins. Nothing is generated or copied
for it, which matters where each gradient step has a draw of its own: generating 1.6 million normals takes 13 ms, as long as
a whole step of DQN. The table is at least four times as long as the draw, so two draws hardly ever begin at the same place,
and where they overlap no weight finds its own number again.

The table's numbers are hashed from their places and looked up among 65,536 quantiles, as those of row factors are: integer
operations and one look-up, so that every machine has the same bits. A generator's normals differ between processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import torch as th

from sb3_flipout.noise.compiling import eager
from sb3_flipout.noise.keys import fold_in, signed
from sb3_flipout.noise.signs import FactorPlan, LayerVectors, factors, word_count
from sb3_flipout.noise.tables import FactorKind, build_outside_modes

BaseLaw = Literal["normal", "sign"]

_LEAST = 1 << 22  # 16 MiB in float32, and enough for the layers of most policies together
_SEED = 0x5B3F11  # any: the same table everywhere
_WORDS_AT_ONCE = 1 << 16  # of the table while it is made, so that making it takes little memory

# By (law, size, dtype, device). Each is made on the CPU first, so that all devices have the same numbers. Nothing outside this
# file gets hold of a table: layers get views that are no parameters and no buffers, so that nobody writes into them.
_TABLES: dict[tuple[BaseLaw, int, th.dtype, th.device], th.Tensor] = {}

# Where the factors of one layer lie, by (layer, device). The same layer draws anew in each step, of the same plan.
_PLANS: dict[tuple[LayerVectors, th.device], FactorPlan] = {}


def drawn_base_key() -> int:
    """
    Draw a base key from torch's generator, so that it follows ``torch.manual_seed`` as weights do.

    :return: Key
    """
    return int(th.randint(2**62, (), device="cpu"))


def table_size(n: int) -> int:
    """
    Compute the size of the table from which a draw is sliced: a power of two, at least four times as long.

    :param n: Numbers in the draw
    :return: Numbers in the table
    """
    return int(max(_LEAST, 1 << (4 * n - 1).bit_length()))


@eager
def base_draws(law: BaseLaw, key: int, shapes: Sequence[th.Size], like: th.Tensor) -> list[th.Tensor]:
    """
    Draw the base of the weights of one layer: neighbouring parts of one slice.

    The results are views of the table: never write into them, and never register them as buffers.

    :param law: ``"normal"`` for N(0, 1), ``"sign"`` for +1 and -1
    :param key: Key of the draw, any integer
    :param shapes: Shapes of the weights
    :param like: Tensor whose floating-point type and device the draws get
    :return: One tensor per shape
    """
    lengths = [shape.numel() for shape in shapes]
    n = sum(lengths)
    size = table_size(n)
    start, table = key % (size - n + 1), _table(law, size, like.dtype, like.device)
    starts = accumulate(lengths, initial=start)
    return [table.narrow(0, at, of_it).view(shape) for at, of_it, shape in zip(starts, lengths, shapes, strict=False)]


@eager
def factor_draws(layer: LayerVectors, key: int, like: th.Tensor) -> list[th.Tensor]:
    """
    Draw the factors of one key that all rows share: NoisyNet's factorised draw (Fortunato et al. 2018, eq. (10)).

    :param layer: The layer's factor vectors
    :param key: Key of the draw, any integer (taken modulo 2^64)
    :param like: Tensor whose floating-point type and device the draws get
    :return: One tensor per vector, shape (1, units)
    """
    name = (layer, like.device)
    if name not in _PLANS:
        with build_outside_modes():
            _PLANS[name] = FactorPlan([layer])
    plan = _PLANS[name]
    drawn = plan.expand(th.tensor([signed(key)], device=like.device), None, like.dtype).split_with_sizes(plan.sizes, dim=1)
    return [drawn[piece] for piece in plan.pieces[0]]


def _table(law: BaseLaw, size: int, dtype: th.dtype, device: th.device) -> th.Tensor:
    name = (law, size, dtype, device)
    if name not in _TABLES:
        with build_outside_modes():
            _TABLES[name] = _build(law, size).to(device=device, dtype=dtype)
    return _TABLES[name]


def _build(law: BaseLaw, size: int) -> th.Tensor:
    """Row w of the table is what one key, the seed, has in its word number w."""
    kind: FactorKind = "sign" if law == "sign" else "normal"
    words = word_count(size, kind)
    key = th.tensor([_SEED], device="cpu")
    parts = []
    for first in range(0, words, _WORDS_AT_ONCE):
        numbers = th.arange(first, min(first + _WORDS_AT_ONCE, words), device="cpu")
        parts.append(factors(key, fold_in(_SEED, numbers), kind, th.float32)[0])
    return th.cat(parts)[:size].clone()
