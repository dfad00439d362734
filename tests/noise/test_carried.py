"""Noise that travels with observations: what keeps rows keeps their keys, what does not says so, and nothing mixes them up."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from torch.nn import functional as F

from sb3_flipout.noise import NoiseOwner, RowNoise, noise_of, with_noise
from sb3_flipout.noise.carried import lost_by, without_noise
from sb3_flipout.noise.row_operations import _come_first

N = 6
KEYS, SCALE, OWNER = th.arange(N) * 31 - 100, th.linspace(-1, 2, N), NoiseOwner()
NOISE = RowNoise(KEYS, SCALE, OWNER)
ORDER = th.tensor([3, 0, 5, 1, 4, 2])


def data() -> th.Tensor:
    """As long as it is wide, so that what goes by sizes is found out; what stands in a row says which row it was."""
    return (1 + th.arange(N))[:, None, None].float() * th.ones(N, N, N)


def keyed() -> Any:
    return with_noise(data(), NOISE)


Operation = Callable[[Any], Any]

#: Operations after which row i is row i still.
KEEPS: dict[str, Operation] = {
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "to_device": lambda x: x.to("cpu"),
    "to_type": lambda x: x.to(th.float64),
    "cpu": lambda x: x.cpu(),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "long": lambda x: x.long(),
    "type": lambda x: x.type(th.float64),
    "contiguous": lambda x: x.contiguous(),
    "requires_grad": lambda x: x.requires_grad_(),
    "scaled": lambda x: x / 255,
    "scaled_from_the_left": lambda x: 2.0 * x,
    "shifted": lambda x: x - x.new_zeros(N, 1),
    "normalised": lambda x: (x - th.zeros(N)) / th.ones(N, 1),
    "clamp": lambda x: x.clamp(0, 100),
    "clip": lambda x: th.clip(x, 0, 100),
    "in_place": lambda x: x.mul_(1),
    "augmented": lambda x: x.__iadd__(0),
    "with_itself": lambda x: x + x,
    "comparison": lambda x: (x > 0).float() * x,
    "where": lambda x: th.where(th.ones(N, N, N) > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x < 0, 1.0),
    "noise_added": lambda x: x + 1e-4 * th.randn_like(x),
    "relu": lambda x: x.relu(),
    "functional": lambda x: F.relu(x),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "unsqueeze_last": lambda x: x.unsqueeze(-1),
    "unsqueeze_of_vectors": lambda x: x[:, 0, 0].unsqueeze(-1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "flatten": lambda x: x.flatten(1),
    "flatten_by_name": lambda x: x.flatten(start_dim=1),
    "unflatten": lambda x: x.unflatten(1, (2, 3)),
    "view": lambda x: x.view(N, -1),
    "view_open": lambda x: x.view(-1, N * N),
    "reshape": lambda x: x.reshape(N, 2, 3, N),
    "reshape_tuple": lambda x: x.reshape((N, N * N)),
    "permute": lambda x: x.permute(0, 2, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "movedim": lambda x: x.movedim(1, 2),
    "flip": lambda x: x.flip(1, 2),
    "roll": lambda x: x.roll(1, 2),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "columns": lambda x: x[:, 1:3],
    "one_column": lambda x: x[:, 0],
    "chosen_columns": lambda x: x[:, th.tensor([1, 0])],
    "chosen_pairs": lambda x: x[:, ORDER, ORDER],
    "last_columns": lambda x: x[..., -2:],
    "new_dimension": lambda x: x[:, None],
    "cat_columns": lambda x: th.cat([x, th.ones(N, 2, N) * x[:, :1]], 1),
    "cat_last": lambda x: th.cat([x, x], dim=-1),
    "copy": lambda x: copy.deepcopy(x),
    "chained": lambda x: (x.float().clone().permute(0, 2, 1) / 2).flatten(1).contiguous() * 2,
}


def first_of(rows: Any) -> th.Tensor:
    """The number that stands in each row, from 1; of noise added and scaled, the nearest."""
    plain = without_noise(rows)
    return plain.detach().double().flatten(1)[:, 0].round().long() - 1


def assert_own_keys(rows: Any) -> None:
    """Every row has the key and scale of the row that stands in it."""
    noise, which = noise_of(rows), first_of(rows)
    assert noise is not None and th.equal(noise.keys, KEYS[which]) and th.equal(noise.scale, SCALE[which])
    assert noise.owner is OWNER and lost_by(rows) is None


@pytest.mark.parametrize("name", KEEPS)
def test_what_keeps_rows_keeps_their_noise(name: str) -> None:
    found = KEEPS[name](keyed())
    assert len(found) == N
    noise = noise_of(found)
    assert noise is not None, f"lost by {lost_by(found)}"
    assert th.equal(noise.keys, KEYS) and th.equal(noise.scale, SCALE) and noise.owner is OWNER
    if name not in ("scaled", "scaled_from_the_left", "with_itself"):
        assert_own_keys(found)


#: Operations that take some rows, or take them in another order.
TAKES: dict[str, Operation] = {
    "slice": lambda x: x[2:5],
    "steps": lambda x: x[::2],
    "permutation": lambda x: x[ORDER],
    "list": lambda x: x[[4, 4, 0]],
    "array": lambda x: x[np.array([5, 2])],
    "mask": lambda x: x[th.arange(N) % 2 == 0],
    "with_columns": lambda x: x[ORDER, 1:],
    "pairs": lambda x: x[ORDER, ORDER],
    "pairs_apart": lambda x: x[ORDER, :, ORDER],
    "index_select": lambda x: x.index_select(0, ORDER),
    "split": lambda x: x.split(4)[1],
    "split_uneven": lambda x: th.split(x, [1, 3, 2])[1],
    "chunk": lambda x: x.chunk(3)[2],
    "chunk_by_name": lambda x: th.chunk(x, 2, dim=0)[1],
    "tensor_split": lambda x: x.tensor_split(3)[1],
    "cat": lambda x: th.cat([x[4:], x[:4]]),
    "cat_by_name": lambda x: th.cat(tensors=(x[ORDER], x[1:2]), dim=0),
    "cat_of_chunks": lambda x: th.cat(x.flatten(1).chunk(2)[::-1]),
    "twice": lambda x: x[ORDER][ORDER].clone()[1:],
}


@pytest.mark.parametrize("name", TAKES)
def test_rows_that_are_taken_keep_their_own_noise(name: str) -> None:
    assert_own_keys(TAKES[name](keyed()))


@pytest.mark.parametrize("name", ["split", "chunk", "tensor_split"])
def test_parts_along_other_dimensions_keep_all_rows(name: str) -> None:
    for part in getattr(th, name)(keyed(), 2, 1):
        assert_own_keys(part)


#: Operations after which the first dimension is no longer that of the rows, or holds others: name -> what is said.
LOSES: dict[str, tuple[str, Operation]] = {
    "transposed": ("transpose", lambda x: x.transpose(0, 1)),
    "swapped": ("swapaxes", lambda x: x.swapaxes(1, 0)),
    "permuted": ("permute", lambda x: x.permute(1, 0, 2)),
    "moved": ("movedim", lambda x: x.movedim(0, 1)),
    "moved_by_name": ("movedim", lambda x: x.movedim(source=1, destination=0)),
    "flipped": ("flip", lambda x: x.flip(0)),
    "flipped_twice": ("flip", lambda x: x.flip(1, 0)),
    "flipped_by_name": ("flip", lambda x: th.flip(x, dims=(1, 0))),
    "rolled": ("roll", lambda x: x.roll(1, 0)),
    "rolled_through": ("roll", lambda x: x.roll(1)),
    "rolled_by_name": ("roll", lambda x: x.roll(shifts=1, dims=0)),
    "rolled_both": ("roll", lambda x: x.roll((1, 1), (0, 1))),
    "rolled_vector": ("roll", lambda x: x[:, 0, 0].roll(1)),
    "folded": ("flatten", lambda x: x.flatten(0, 1)),
    "folded_by_view": ("view", lambda x: x.view(-1, N)),
    "all": ("reshape", lambda x: x.reshape(-1)),
    "row_vector": ("unsqueeze", lambda x: x.unsqueeze(0)),
    "front_of_a_vector": ("unsqueeze", lambda x: x[:, 0, 0].unsqueeze(-2)),
    "new_first": ("__getitem__", lambda x: x[None]),
    "one_row": ("__getitem__", lambda x: x[2]),
    "one_row_by_tensor": ("__getitem__", lambda x: x[th.tensor(2)]),
    "one_row_ellipsis": ("__getitem__", lambda x: x[2, ...]),
    "table_of_rows": ("__getitem__", lambda x: x[ORDER.view(2, 3)]),
    "elements": ("__getitem__", lambda x: x[x > 2]),
    "indices_apart": ("__getitem__", lambda x: x[:, None][:, th.zeros(N).long(), :, ORDER]),
    "stacked": ("stack", lambda x: th.stack([x, x])),
    "repeated": ("repeat", lambda x: x.repeat(2, 1, 1)),
    "repeat_interleave": ("repeat_interleave", lambda x: x.repeat_interleave(2, 0)),
    "sorted": ("sort", lambda x: x.sort(0, descending=True)[0]),
    "gathered": ("gather", lambda x: x.gather(0, ORDER[:, None, None].expand(N, N, N))),
    "mean_of_rows": ("mean", lambda x: x.mean(0)),
    "product": ("matmul", lambda x: th.matmul(th.eye(N)[ORDER], x[:, 0])),
    "broadcast": ("add", lambda x: x[:, 0, 0] + th.zeros(N, N)),
    "cumulated": ("cumsum", lambda x: x.cumsum(0)),
    "cat_with_others": ("cat", lambda x: th.cat([x[:3], data()[:3]])),
    "columns_of_other_rows": ("cat", lambda x: th.cat([x, x[ORDER]], 1)),
    "sum_of_other_rows": ("add", lambda x: x + x[ORDER]),
    "unbound": ("unbind", lambda x: x.unbind(0)[2]),
    "greatest": ("max", lambda x: x.max(1)[0]),
    "rows_in_turn": ("unbind", lambda x: next(iter(x))),
}


@pytest.mark.parametrize("name", LOSES)
def test_what_mixes_rows_loses_their_noise_and_says_so(name: str) -> None:
    operation, apply = LOSES[name]
    found = apply(keyed())
    assert noise_of(found) is None and lost_by(found) == operation and type(found) is th.Tensor


def test_values_are_those_of_plain_tensors() -> None:
    for name, operation in (KEEPS | TAKES | {name: apply for name, (_, apply) in LOSES.items()}).items():
        th.manual_seed(0)
        expected = operation(data())
        th.manual_seed(0)
        found = operation(keyed())
        assert th.equal(without_noise(found), expected), name


def test_numbers_and_pickles_are_plain() -> None:
    x = keyed()
    assert x[0, 0, 0].item() == 1 and x.tolist() == data().tolist() and np.array_equal(x.numpy(), data().numpy())
    loaded = pickle.loads(pickle.dumps(x))
    assert type(loaded) is th.Tensor and th.equal(loaded, data())


# ---- dictionaries ------------------------------------------------------------------------------------------------


def dictionary() -> Any:
    return with_noise({"a": data(), "b": data()[:, 0]}, NOISE)


@pytest.mark.parametrize(
    "operation",
    [
        lambda d: d.copy(),
        copy.copy,
        copy.deepcopy,
        dict,
        OrderedDict,
        lambda d: {name: part / 1.0 for name, part in d.items()},
        lambda d: d | {"c": d["a"].flatten(1)},
        lambda d: {"a": d["a"]},
    ],
    ids=["copy", "shallow", "deep", "dict", "ordered", "each", "more", "fewer"],
)
def test_dictionaries_keep_their_noise(operation: Operation) -> None:
    found = operation(dictionary())
    noise = noise_of(found)
    assert noise is not None and th.equal(noise.keys, KEYS) and noise.owner is OWNER
    for part in found.values():
        assert_own_keys(part)


@pytest.mark.parametrize("new", [False, True], ids=["in_place", "new"])
def test_rows_of_a_dictionary_in_another_order_keep_their_own_noise(new: bool) -> None:
    found = dictionary()
    if new:
        found = {name: part[ORDER] for name, part in found.items()}
    else:
        for name in found:
            found[name] = found[name][ORDER]
    noise = noise_of(found)
    assert noise is not None and th.equal(noise.keys, KEYS[ORDER])


def test_a_dictionary_whose_parts_have_other_rows_has_no_noise() -> None:
    found = dictionary()
    found["a"] = found["a"][ORDER]
    assert noise_of(found) is None
    plain = {name: part[0] for name, part in dictionary().items()}
    assert noise_of(plain) is None and lost_by(plain) == "__getitem__"
    assert noise_of({"a": keyed(), "b": data()}) is None and noise_of({}) is None


def test_a_part_that_an_operation_made_plain_does_not_take_the_noise_off_its_dictionary() -> None:
    """The user has replaced it under its name, so its rows are the dictionary's."""
    found = dictionary()
    found["a"] = F.avg_pool1d(found["a"], 2)
    assert lost_by(found["a"]) == "avg_pool1d"
    noise = noise_of(found)
    assert noise is not None and th.equal(noise.keys, KEYS)


# ---- samples of buffers of one's own -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """SB3's samples as a user's dataclass."""

    observations: Any
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor


class DataclassBuffer(RolloutBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        return Samples(**super()._get_samples(batch_inds, env)._asdict())


class PlainObject:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


class ObjectBuffer(RolloutBuffer):
    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
        return PlainObject(**super()._get_samples(batch_inds, env)._asdict())


class ShufflingBuffer(RolloutBuffer):
    """Yields each batch in another order, and smaller: what it does to rows it does to their noise."""

    def get(self, batch_size: int | None = None) -> Any:
        for samples in super().get(batch_size):
            order = th.randperm(len(samples.actions), generator=th.Generator().manual_seed(1))[:-1]
            yield type(samples)(*[part[order] for part in samples])


class OwnGet(RolloutBuffer):
    """Makes batches by itself and hangs their noise on."""

    def get(self, batch_size: int | None = None) -> Any:
        names = ["observations", "actions", "values", "log_probs", "advantages", "returns"]
        if not self.generator_ready:
            for name in names:
                self.__dict__[name] = self.swap_and_flatten(self.__dict__[name])
            self.generator_ready = True
        chosen = np.random.permutation(self.buffer_size * self.n_envs)[:10]
        parts = [th.as_tensor(self.__dict__[name][chosen]) for name in names]
        parts[2:] = [part.flatten() for part in parts[2:]]
        parts[0] = with_noise(parts[0], self.row_noise(chosen))
        yield Samples(*parts)


@pytest.mark.parametrize("buffer", [DataclassBuffer, ObjectBuffer, ShufflingBuffer, OwnGet], ids=lambda kind: kind.__name__)
def test_first_ratio_with_samples_of_ones_own(buffer: type[RolloutBuffer]) -> None:
    kwargs: Any = dict(n_steps=16, batch_size=16, n_epochs=1, seed=0, rollout_buffer_class=buffer, device="cpu")
    model = PPO("FlipoutMlpPolicy", "CartPole-v1", policy_kwargs=dict(schedule="constant"), **kwargs)
    for _ in range(2):
        model.learn(16, reset_num_timesteps=False)
        assert abs(model.logger.name_to_value["train/approx_kl"]) <= 1e-7
        assert model.logger.name_to_value["train/clip_fraction"] == 0


def test_rows_of_other_noise_written_in_place_take_the_noise_away():
    """Else the keys would stay in the old order, without a sign."""
    noise = RowNoise(th.arange(4))
    order = th.tensor([2, 0, 3, 1])
    for write in (lambda x: x.__setitem__(slice(None), x[order]), lambda x: x.copy_(x[order])):
        obs = with_noise(th.rand(4, 3), noise)
        write(obs)
        assert noise_of(obs) is None and lost_by(obs) in ("__setitem__", "copy_")
        assert noise_of(copy.deepcopy(obs)) is None
    obs = with_noise(th.rand(4, 3), noise)
    obs[:, 0] = 0.0  # values, and rows stay where they are
    obs[:] = obs * 2
    assert noise_of(obs) is noise


def test_padding_and_dropout_behind_the_rows_keep_the_noise():
    noise = RowNoise(th.arange(4))
    obs = with_noise(th.rand(4, 3, 8, 8), noise)
    assert noise_of(th.nn.functional.pad(obs, (2, 2, 2, 2), mode="replicate")) is noise
    assert noise_of(th.nn.functional.dropout(obs, 0.5)) is noise
    lost = th.nn.functional.pad(obs, (0, 0, 0, 0, 0, 0, 0, 1))
    assert noise_of(lost) is None and lost_by(lost) == "pad"


def test_plain_dictionaries_are_stripped_too():
    keyed = with_noise(th.rand(4, 3), RowNoise(th.arange(4)))
    assert all(type(part) is th.Tensor for part in without_noise({"a": keyed, "b": th.rand(4)}).values())


@pytest.mark.parametrize("name", ["T", "mT", "data", "real", "H"])
def test_properties_carry_no_noise(name: str) -> None:
    made = getattr(with_noise(th.randn(N, N), NOISE), name)
    assert type(made) is th.Tensor and noise_of(made) is None


def test_padding_that_is_named_is_understood() -> None:
    padded = F.pad(keyed(), pad=(1, 1))
    assert noise_of(padded) is not None and noise_of(F.pad(keyed(), pad=(0, 0, 0, 0, 1, 0))) is None


ONE = th.zeros(7, dtype=th.int64)


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), ONE),
        (slice(None), ONE, ONE),
        (slice(None), ONE, slice(None)),
        (slice(None), ONE, ONE, slice(None), ONE),
        (slice(None), ONE, slice(None), ONE),
        (slice(None), ONE, None, ONE),
        (slice(None), slice(None), ONE),
        (slice(None), slice(None), ONE, ONE),
        (slice(None), None, ONE),
        (Ellipsis, ONE, ONE),
        (slice(None), 0, ONE),
        (slice(None), ONE, 0, ONE),
        (slice(None),),
        (Ellipsis,),
        (slice(None), slice(None), slice(None)),
        (slice(None), 0),
    ],
    ids=lambda index: ", ".join("tensor" if part is ONE else str(part) for part in index),
)
def test_tensors_that_stand_apart_come_first(index: tuple[Any, ...]) -> None:
    """As torch does it, which is seen by the size 7 of what they select."""
    assert _come_first(index) is (th.zeros(2, 3, 4, 5, 3)[index].shape[0] == len(ONE))
