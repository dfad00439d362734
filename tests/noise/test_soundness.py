"""Noise that is handed on belongs to the rows: each row's numbers say whose they are, whatever the operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch.nn import functional as F

from sb3_flipout.noise import NoiseOwner, RowNoise, noise_of, with_noise
from sb3_flipout.noise.ladder import checked_ladder, geometric_ladder
from sb3_flipout.noise.row_operations import same_noise
from sb3_flipout.noise.rows import RowsByKey
from sb3_flipout.noise.signs import factors_at
from sb3_flipout.noise.stream import EvaluationStream
from sb3_flipout.noise.transitions import reward_draws

N = 4
IDX, MASK = th.tensor([2, 0, 3]), th.tensor([True, False, True, True])


def batch(*shape: int, first: int = 1) -> Any:
    """Row n is full of the number first + n, and its key is ten times that."""
    numbers = th.arange(first, first + N, dtype=th.float32).view(N, *[1] * len(shape)).expand(N, *shape).clone()
    return with_noise(numbers, RowNoise(th.arange(first, first + N) * 10, 0.5, OWNER))


OWNER = NoiseOwner()
X, Y, FLAT = batch(2, 3), batch(2, 3, first=5), batch()
PLAIN = th.ones(N, 2, 3)
FOUR = th.tensor([0, 1, 1, 0])  # as many as there are rows, so that lengths do not tell


def belongs(result: Any) -> bool:
    """Whether there is noise; if so, it is that of the rows. Zeros are padding."""
    noise = noise_of(result)
    if noise is None:
        return False
    assert len(noise) == len(result) and noise.scale.tolist() == [0.5] * len(noise) and noise.owner is OWNER
    for row, key in zip(result, noise.keys.tolist(), strict=True):
        assert set(th.as_tensor(row).flatten().tolist()) <= {key / 10, 0.0}
    return True


KEEPS: dict[str, Callable[[], Any]] = {
    "cat": lambda: th.cat([X, Y]),
    "cat by name": lambda: th.cat(tensors=[X, Y], dim=0),
    "cat, negative": lambda: th.cat([X, Y], -3),
    "cat by axis": lambda: th.cat([X, Y], axis=0),  # type: ignore[call-overload]
    "concat": lambda: th.concat([X, Y]),
    "concatenate": lambda: th.concatenate([X, Y]),
    "cat of one": lambda: th.cat([X]),
    "cat of columns": lambda: th.cat([X, X.clone()], 1),
    "cat of columns by name": lambda: th.cat([X, X * 1], dim=2),
    "cat of columns by axis": lambda: th.cat([X, X], axis=1),  # type: ignore[call-overload]
    "cat of one's columns": lambda: th.cat([X], dim=1),
    "index_select": lambda: X.index_select(0, IDX),
    "index_select by name": lambda: th.index_select(X, dim=0, index=IDX),
    "index_select, index by name": lambda: th.index_select(X, 0, index=IDX),
    "pad": lambda: F.pad(X, (1, 1)),
    "pad by name": lambda: F.pad(X, pad=(1, 2, 0, 1)),
    "pad of two dimensions": lambda: F.pad(X[:, 0], (2, 1)),
    "view": lambda: X.view(N, 6),
    "view of a size": lambda: X.view(th.Size([N, 6])),
    "view, all but rows": lambda: X.view(-1, 6),
    "reshape": lambda: X.reshape((-1, 3, 2)),
    "reshape to more": lambda: X.reshape(N, 1, 6),
    "expand": lambda: X[:, :1].expand(-1, 5, 3),
    "expand, rows given": lambda: X[:, :1].expand(N, 5, 3),
    "repeat": lambda: X.repeat(1, 2, 1),
    "permute": lambda: X.permute(0, 2, 1),
    "flip": lambda: X.flip(1),
    "flip of several": lambda: X.flip([1, 2]),
    "flip by name": lambda: th.flip(X, dims=(-1,)),
    "roll": lambda: X.roll(1, 1),
    "transpose": lambda: X.transpose(1, 2),
    "transpose by name": lambda: th.transpose(X, dim0=2, dim1=1),
    "movedim": lambda: X.movedim(1, 2),
    "flatten": lambda: X.flatten(1),
    "unsqueeze": lambda: X.unsqueeze(1),
    "unsqueeze at the end": lambda: FLAT.unsqueeze(-1),
    "squeeze": lambda: X[:, :1].squeeze(1),
    "slice": lambda: X[1:3],
    "list": lambda: X[[3, 1]],
    "tensor": lambda: X[IDX],
    "mask": lambda: X[MASK],
    "column": lambda: X[:, 0],
    "columns": lambda: X[:, th.tensor([1, 0])],
    "new axis behind": lambda: X[:, None],
    "ellipsis": lambda: X[..., 0],
    "ellipsis, new axis": lambda: X[..., None, 0],
    "ellipsis alone": lambda: X[...],
    "ellipsis, all columns": lambda: X[..., 0, 0],
    "rows and columns": lambda: X[IDX, 0],
    "rows, all, columns": lambda: X[IDX, :, IDX.clamp(max=2)],
    "rows of a slice": lambda: X[::2, :, 0],
    "arithmetic": lambda: (X + PLAIN - PLAIN) * 1,
    "plain first": lambda: PLAIN * 0 + X,
}
LOSES: dict[str, Callable[[], Any]] = {
    "cat of different rows": lambda: th.cat([X, Y], 1),
    "cat with a plain one": lambda: th.cat([X, PLAIN]),
    "cat with a plain one first": lambda: th.cat([PLAIN, X]),
    "index_select of columns": lambda: X.index_select(1, th.tensor([0])),
    "pad of rows": lambda: F.pad(X, (0, 0, 0, 0, 1, 1)),
    "pad that moves rows": lambda: F.pad(X, (0, 0, 0, 0, 1, -1)),
    "pad that moves rows of two dimensions": lambda: F.pad(X[:, 0], (0, 0, -1, 1)),
    "pad of rows of two dimensions": lambda: F.pad(X[:, 0], (0, 0, 1, 0)),
    "view of other rows": lambda: X.view(8, 3),
    "view of other rows, counted": lambda: X.view(-1, 3),
    "view as another type": lambda: X.view(th.int32),
    "expand of a new dimension": lambda: X.expand(2, N, 2, 3),
    "expand of a new dimension of as many": lambda: X.expand(N, N, 2, 3),
    "permute by name": lambda: X.permute(dims=(1, 0, 2)),
    "repeat of rows": lambda: X.repeat(2, 1, 1),
    "repeat, more dimensions": lambda: X.repeat(1, 1, 1, 1),
    "permute of rows": lambda: X.permute(1, 0, 2),
    "flip of rows": lambda: X.flip(0),
    "flip of both": lambda: X.flip([0, 1]),
    "flip of rows, negative": lambda: X.flip(-3),
    "roll of rows": lambda: X.roll(1, 0),
    "roll of all": lambda: X.roll(1),
    "transpose of rows": lambda: X.transpose(0, 1),
    "transpose of rows by name": lambda: th.transpose(X, dim0=1, dim1=0),
    "flatten of rows": lambda: X.flatten(),
    "unsqueeze before": lambda: X.unsqueeze(0),
    "squeeze of what there is": lambda: X.squeeze(),
    "a row": lambda: X[1],
    "a row by a tensor": lambda: X[th.tensor(1)],
    "all by a flag": lambda: X[th.tensor(True)],
    "new axis before": lambda: X[None],
    "numbers of rows in two dimensions": lambda: X[IDX[:, None]],
    "ellipsis, everything": lambda: X[..., 0, 0, 0],
    "apart": lambda: batch(2, 3, 4)[:, FOUR, :, FOUR],
    "apart behind an ellipsis": lambda: batch(2, 3, 4)[..., FOUR, :, FOUR],
    "apart by a new axis": lambda: X[:, FOUR, None, FOUR],
    "apart by a number": lambda: batch(2, 3, 4)[:, FOUR, :, 0],
    "flip of a single dimension": lambda: FLAT.flip(-1),
    "sum over rows": lambda: X.sum(0),
    "broadcast to more dimensions": lambda: FLAT + th.zeros(2, N),
    "two different ones": lambda: X + Y * 0,
}


@pytest.mark.parametrize("name", KEEPS)
def test_rows_that_stay_rows_keep_their_noise(name: str) -> None:
    assert belongs(KEEPS[name]())


@pytest.mark.parametrize("name", LOSES)
def test_where_rows_cannot_be_told_there_is_no_noise(name: str) -> None:
    assert noise_of(LOSES[name]()) is None


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_split_have_the_noise_of_theirs(dim: int) -> None:
    for parts in (X.split(1, dim), th.chunk(X, 2, dim=dim), th.tensor_split(X, 2, dim)):
        assert len(parts) >= 2 and all(belongs(part) for part in parts)


def test_neighbours_that_stand_together_stay_behind_the_rows() -> None:
    """Two tensors side by side in an index: torch leaves what they select where they stand."""
    taken = batch(2, 3, 4)[:, th.tensor([0, 1]), th.tensor([2, 0])]
    assert taken.shape == (N, 2, 4) and belongs(taken)


def test_whose_noise_it_is_stays_known() -> None:
    noise = noise_of(X)
    assert noise is not None and noise.at_scale(th.full((N,), 2.0)).owner is OWNER
    assert RowNoise.cat([noise, noise]).owner is OWNER
    other = RowNoise(noise.keys, 1.0, NoiseOwner())
    assert RowNoise.cat([noise, other]).owner is None and RowNoise.cat([noise, RowNoise(noise.keys, 1.0)]).owner is None
    by_key = RowsByKey(th.arange(2), 1.0, th.arange(4))
    assert by_key[1:].keys.tolist() == [0, 1, 1] and by_key[1:].owner is by_key.owner
    stream = EvaluationStream(3, 0, None, OWNER)
    assert stream.next(2, 1.0, th.device("cpu")).owner is OWNER


def test_the_same_noise() -> None:
    noise = RowNoise(th.arange(3), 0.5, OWNER)
    assert same_noise(noise, noise) and same_noise(noise, RowNoise(th.arange(3), th.full((3,), 0.5), OWNER))
    for other in (None, RowNoise(th.arange(2), 0.5, OWNER), RowNoise(th.arange(1), 0.5, OWNER)):
        assert not same_noise(noise, other)
    assert not same_noise(RowNoise(th.zeros(1, dtype=th.int64), 0.5), RowNoise(th.zeros(3, dtype=th.int64), 0.5))
    for other in (RowNoise(th.arange(3), 0.6, OWNER), RowNoise(th.arange(3), 0.5), RowNoise(th.arange(3) + 1, 0.5, OWNER)):
        assert not same_noise(noise, other)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_draws_have_the_type_that_is_asked_for(dtype: th.dtype) -> None:
    keys = th.arange(3)
    for kind in ("sign", "normal"):
        assert factors_at(keys, keys, 0, 0, kind, dtype).dtype == dtype  # type: ignore[arg-type]
    assert reward_draws(keys, keys, dtype).dtype == dtype and reward_draws(keys, keys).dtype == th.float32


# ---- ladders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ladder", [(0.5, 2), [1.0], (0.0, 1.0), range(1, 3)])
def test_ladders_become_tuples_of_numbers(ladder: Any) -> None:
    found = checked_ladder(ladder)
    assert found == tuple(float(one) for one in ladder) and all(type(one) is float for one in found)
    assert checked_ladder(None) is None


@pytest.mark.parametrize(
    "ladder", [(), [], "12", 3.0, (1.0, -0.1), (1.0, float("nan")), (float("inf"),), (True, 1.0), (1.0, "2"), ((1.0,),)]
)
def test_what_is_no_ladder_is_refused(ladder: Any) -> None:
    with pytest.raises(ValueError, match=r"^noise_ladder must be a tuple of finite numbers >= 0, one per environment"):
        checked_ladder(ladder)


def test_a_ladder_of_one_stands_in_the_middle() -> None:
    assert geometric_ladder(0.5, 8.0, 1) == (2.0,) and geometric_ladder(0.5, 8.0, 2) == (0.5, 8.0)
