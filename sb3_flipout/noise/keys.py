"""Noise keys: 64-bit integers, and the hash that derives one key from another.

The hash is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"; finaliser "Mix13"
of Stafford): a bijection of the 64-bit integers, so distinct inputs never collide within one step. It is written twice,
once for Python integers (seeds, base keys, layer constants) and once for int64 tensors (one key per row); a test holds
them equal. int64 arithmetic wraps in torch on every device, which is what makes the bits the same on CPU and GPU.
"""

import torch as th

# SplitMix64's increment: 2^64 divided by the golden ratio, made odd.
GOLDEN = 0x9E3779B97F4A7C15
# Its finaliser: xor with the value shifted right, then multiply; three rounds, the last without multiplication.
FINALISER = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_MASK = (1 << 64) - 1


def signed(value: int) -> int:
    """
    Wrap an integer into the range of int64, as two's complement does.

    :param value: Any Python integer
    :return: The integer in [-2^63, 2^63) that is equal to it modulo 2^64
    """
    return ((value + (1 << 63)) & _MASK) - (1 << 63)


def mix(values: th.Tensor) -> th.Tensor:
    """
    Scramble each element: SplitMix64's finaliser, a bijection of the 64-bit integers.

    :param values: Integers of any shape, dtype int64
    :return: Scrambled integers, same shape and device, dtype int64
    """
    for shift, multiplier in FINALISER:
        # torch has no logical right shift for int64: shift, then mask off the copies of the sign bit.
        values = (values ^ ((values >> shift) & ((1 << (64 - shift)) - 1))) * signed(multiplier)
    return values


def fold_in(keys: th.Tensor | int, data: th.Tensor | int) -> th.Tensor:
    """
    Derive keys: output number ``data`` of the SplitMix64 generator whose state is ``key``.

    :param keys: Keys, int64, or one key as an integer
    :param data: What tells the derived keys apart, int64 or an integer; broadcast against ``keys``
    :return: Derived keys of the broadcast shape, int64
    """
    if isinstance(keys, int):
        keys = th.tensor(signed(keys)) if isinstance(data, int) else signed(keys)
    data = signed((data + 1) * GOLDEN) if isinstance(data, int) else (data + 1) * signed(GOLDEN)
    values = keys + data
    assert isinstance(values, th.Tensor), "one of the two is a tensor by now"
    return mix(values)  # not through as_tensor, which would move it to a default device


def fold(key: int, *data: int) -> int:
    """
    Derive one key from another and a path of integers; the same bits as repeated :func:`fold_in`.

    :param key: Key, any Python integer (taken modulo 2^64)
    :param data: Path of integers, folded in one after the other
    :return: Derived key in the range of int64
    """
    for item in data:
        key = (key + (item + 1) * GOLDEN) & _MASK
        for shift, multiplier in FINALISER:
            key = ((key ^ (key >> shift)) * multiplier) & _MASK
    return signed(key)


def restrict(keys: th.Tensor, members: int | None) -> th.Tensor:
    """
    Map keys to those of an ensemble's members.

    :param keys: Keys, int64
    :param members: Number K of members, whose keys are 0 to K - 1; ``None`` leaves the keys as they are
    :return: Keys, same shape
    """
    return keys if members is None else th.remainder(keys, members)
