"""From keys to row factors: the vectors that turn one base perturbation into a different one for every row.

A row's factors are a pure function of (key, layer, vector): 64-bit words are hashed from the key and a constant of the
word's place, and each word is cut into pieces that are looked up in a table: 8 signs per byte, or one normal quantile
per 16 bits. No generator is involved, so the bits do not depend on device, batch size, order, or compilation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th

from sb3_flipout.noise.compiling import recording
from sb3_flipout.noise.keys import FINALISER, GOLDEN, fold, fold_in, mix, signed
from sb3_flipout.noise.tables import FactorKind, factor_table


@dataclass(frozen=True)
class _Cut:
    """How words become factors: the integer type a word is viewed as, and how many factors come from one word."""

    piece: th.dtype
    numpy_piece: type[np.unsignedinteger[Any]]
    per_word: int


_CUTS: dict[str, _Cut] = {
    "sign": _Cut(th.uint8, np.uint8, 64),
    "sqrt_normal": _Cut(th.int16, np.uint16, 4),
    "normal": _Cut(th.int16, np.uint16, 4),
}


def word_count(n: int, kind: FactorKind) -> int:
    """
    Count the words that give n factors.

    :param n: Number of factors
    :param kind: What a word is cut into
    :return: Number of words
    """
    return -(-n // _CUTS[kind].per_word)


def salts(layer: int, vector: int, n: int, kind: FactorKind) -> th.Tensor:
    """
    Constants of the words that make up one factor vector of one layer.

    :param layer: The layer's number in its network
    :param vector: Which vector of the layer: 0 over its inputs, 1 over its outputs (more in an LSTM)
    :param n: Length of the vector
    :param kind: What a word is cut into
    :return: One int64 per word, shape (ceil(n / factors per word),), CPU
    """
    words = word_count(n, kind)
    start = fold(0, layer, vector)
    if th.compiler.is_compiling():  # inductor folds the constants of a symbolic range without wrapping them
        return th.tensor([fold(start, word) for word in range(words)], device="cpu")
    return fold_in(start, th.arange(words, device="cpu"))


def factors(
    keys: th.Tensor,  # shape: (N,)
    word_salts: th.Tensor,  # shape: (words,)
    kind: FactorKind,
    dtype: th.dtype = th.float32,
) -> th.Tensor:
    """
    Hash keys into factors. Word j of a key is output number ``key`` of the SplitMix64 generator that starts at salt j.

    :param keys: Noise keys, shape (N,), int64
    :param word_salts: Constants of the words, shape (words,), int64, on the device of ``keys``
    :param kind: ``"sign"`` (+1 or -1), ``"normal"`` (16-bit quantiles of N(0, 1)) or ``"sqrt_normal"`` (f of those)
    :param dtype: Floating-point type of the result
    :return: Factors, shape (N, words * factors per word)
    """
    cut = _CUTS[kind]
    columns = len(word_salts) * cut.per_word
    if not len(keys):
        return th.empty(0, columns, dtype=dtype, device=keys.device)
    if keys.device.type == "cpu" and dtype != th.bfloat16 and not recording():
        # The same bits by numpy: its small operations cost a third of torch's, and hashing a batch is some twenty of them.
        table = factor_table(kind, dtype, keys.device)[1]
        assert table is not None, "numpy has a table of every type but bfloat16"
        rows = table.take(_words(keys.numpy(), word_salts.numpy()).view(cut.numpy_piece), axis=0)
        return th.from_numpy(rows.reshape(len(keys), columns))
    pieces = fold_in(word_salts, keys[:, None]).view(cut.piece).to(th.int32)
    pieces = pieces if kind == "sign" else pieces & 0xFFFF  # int16 is signed, the table is not
    return factor_table(kind, dtype, keys.device)[0].index_select(0, pieces.flatten()).view(len(keys), columns)


def factors_at(
    keys: th.Tensor,  # shape: (N, ...)
    places: th.Tensor,  # shape: that of keys
    layer: int,
    vector: int,
    kind: FactorKind,
    dtype: th.dtype = th.float32,
) -> th.Tensor:
    """
    Hash single elements of factor vectors: what an embedding needs, which looks up few of its many inputs.

    :param keys: Noise keys, int64
    :param places: Which element of the vector, int64, the shape and device of ``keys``
    :param layer: The layer's number in its network
    :param vector: Which vector of the layer
    :param kind: What the factors are
    :param dtype: Floating-point type of the result
    :return: ``factors(keys, salts(layer, vector, ...))[places]``, element by element, the shape of ``keys``
    """
    cut = _CUTS[kind]
    bits = 64 // cut.per_word
    # By shift and mask, not by division, which takes far longer: numbers per word are powers of 2.
    word, piece = places >> (cut.per_word.bit_length() - 1), places & (cut.per_word - 1)
    # fold_in(salt, key), with the salt of each element's own word.
    words = mix(fold_in(fold(0, layer, vector), word) + (keys + 1) * signed(GOLDEN))
    pieces = (words >> (piece * bits)) & ((1 << bits) - 1)
    if kind == "sign":
        return (1 - 2 * pieces).to(dtype)
    return factor_table(kind, dtype, keys.device)[0].index_select(0, pieces.flatten()).view(keys.shape)


_GOLDEN = np.uint64(GOLDEN)
_FINALISER = tuple((np.uint64(shift), np.uint64(multiplier)) for shift, multiplier in FINALISER)


def _words(keys: np.ndarray, word_salts: np.ndarray) -> np.ndarray:
    """``fold_in(word_salts, keys[:, None])`` in numpy: uint64, shape (N, words)."""
    words = (keys.view(np.uint64)[:, None] * _GOLDEN) + (word_salts.view(np.uint64) + _GOLDEN)
    for shift, multiplier in _FINALISER:
        words ^= words >> shift
        words *= multiplier
    return words


def signs(keys: th.Tensor, layer: int, n: int, vector: int = 0) -> th.Tensor:
    """
    Sign vectors of a layer: the s (``vector=0``, over inputs) and r (``vector=1``, over outputs) of Wen et al. 2018, eq. (3).

    :param keys: Noise keys, shape (N,), int64, any device
    :param layer: The layer's number in its network, 0 or more
    :param n: Length of each sign vector
    :param vector: Which vector of the layer
    :return: +1 and -1, shape (N, n), float32, on the device of ``keys``
    :raises TypeError: If ``keys`` is not an int64 tensor
    :raises ValueError: If ``keys`` has more or fewer than one dimension
    """
    check_keys(keys)
    return factors(keys, salts(layer, vector, n, "sign").to(keys.device), "sign")[:, :n]


def check_keys(keys: th.Tensor) -> None:
    """
    Refuse what cannot be the noise keys of a batch.

    :param keys: What the caller gave as keys
    :raises TypeError: If it is not an int64 tensor
    :raises ValueError: If it has more or fewer than one dimension
    """
    if not isinstance(keys, th.Tensor) or keys.dtype != th.int64:
        came = f"a tensor of {keys.dtype}" if isinstance(keys, th.Tensor) else type(keys).__name__
        raise TypeError(f"keys must be an int64 tensor with one key per row, got {came}; use torch.tensor([...]) of integers.")
    if keys.dim() != 1:
        raise ValueError(f"keys must have shape (N,), one key per row, got shape {tuple(keys.shape)}; flatten them first.")


@dataclass(frozen=True)
class LayerVectors:
    """
    The factor vectors that one layer needs.

    :param layer: The layer's number in its network
    :param kind: What its factors are
    :param sizes: Lengths, alternately over inputs and over outputs: (in, out), or (in, out, hidden, out, ...) in an LSTM
    :param scaled: Whether the noise scale multiplies the layer's noise
    """

    layer: int
    kind: FactorKind
    sizes: tuple[int, ...]
    scaled: bool = True


class FactorPlan:
    """
    Where the factors of all layers of one network lie in a single block, so that one hash serves them all.

    Vectors over outputs of scaled layers lie behind all others, since only they are multiplied by the noise scale.

    :param layers: What each layer needs
    """

    def __init__(self, layers: Sequence[LayerVectors]) -> None:
        self.layers = tuple(layers)
        #: Sizes to split a block by, and for each layer the positions of its vectors among the pieces.
        self.sizes: list[int] = []
        self.pieces: list[list[int]] = [[0] * len(layer.sizes) for layer in layers]
        self._groups: list[tuple[FactorKind, th.Tensor]] = []  # kind, salts
        self._outputs: list[slice] = []  # columns over outputs
        self.width = 0
        for kind in dict.fromkeys(layer.kind for layer in layers):
            self._add_group(kind, layers)

    def _add_group(self, kind: FactorKind, layers: Sequence[LayerVectors]) -> None:
        per_word = _CUTS[kind].per_word
        parts: list[th.Tensor] = []
        first_output = self.width
        for multiplied in (False, True):
            first_output = self.width
            for position, layer in enumerate(layers):
                for vector, size in enumerate(layer.sizes if layer.kind == kind else ()):
                    if (layer.scaled and vector % 2 == 1) is not multiplied:
                        continue
                    parts.append(salts(layer.layer, vector, size, kind))
                    self.pieces[position][vector] = len(self.sizes)
                    self.sizes += [size, parts[-1].numel() * per_word - size]  # the vector, the rest of its last word
                    self.width += sum(self.sizes[-2:])
        self._groups.append((kind, th.cat(parts) if parts else th.empty(0, dtype=th.int64)))
        self._outputs.append(slice(first_output, self.width))

    def expand(self, keys: th.Tensor, scale: th.Tensor | None, dtype: th.dtype) -> th.Tensor:
        """
        Compute the factors of all layers.

        :param keys: Noise keys, shape (N,), int64
        :param scale: Noise scales, shape (N,); ``None`` for 1
        :param dtype: Floating-point type of the layers
        :return: Block of factors, shape (N, ``width``); those over outputs are multiplied by the scale
        """
        blocks = []
        for number, (kind, word_salts) in enumerate(self._groups):
            if word_salts.device != keys.device:  # moved once, then remembered: a network stays where it is
                word_salts = word_salts.to(keys.device)
                self._groups[number] = (kind, word_salts)
            blocks.append(factors(keys, word_salts, kind, dtype))
        block = th.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]
        return block if scale is None else self._scale_outputs(block, scale)

    def scaled(self, block: th.Tensor, scale: th.Tensor) -> th.Tensor:
        """
        Multiply factors that :meth:`expand` computed without a scale by one; nothing is hashed.

        :param block: Block of factors of scale 1, shape (N, ``width``)
        :param scale: Noise scales, shape (N,)
        :return: New block of factors; those over outputs are multiplied by the scale
        """
        return self._scale_outputs(block.clone(), scale)

    def _scale_outputs(self, block: th.Tensor, scale: th.Tensor) -> th.Tensor:
        for columns in self._outputs:
            block[:, columns] *= scale.to(block.dtype)[:, None]
        return block
