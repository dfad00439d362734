"""Which modules are perturbed, which stay plain and why, and the classes that are made for a user's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from sb3_flipout.layers import (
    PERTURBED_CLASSES,
    FlipoutEmbedding,
    FlipoutLayer,
    FlipoutLinear,
    FlipoutMultiheadAttention,
    OneHotLinear,
    flipout_layers,
    perturb,
    perturbed,
    restore,
)
from sb3_flipout.layers.attention import ChildrenBypassed
from sb3_flipout.layers.config import LayerNoise
from sb3_flipout.layers.convert import Wanted, checked_patterns, is_skipped, names_to_skip, perturb_named
from sb3_flipout.layers.derived import empty_derived, own_matrices, plain_class, why_plain
from sb3_flipout.layers.recurrent import FlipoutGRU, FlipoutLSTM

KEYS = th.arange(3)


@pytest.mark.parametrize(
    ("name", "patterns", "skipped"),
    [
        ("a", ["a"], True),
        ("a.b.c", ["a"], True),
        ("a.b.c", ["a.b"], True),
        ("a.b.c", ["a.b.c"], True),
        ("a.b.c", ["b"], False),
        ("a.b.c", ["x", "*.c"], True),
        ("ab", ["a"], False),
        ("a b.c", ["a"], False),
        ("a", [], False),
    ],
)
def test_what_is_skipped(name: str, patterns: list[str], skipped: bool) -> None:
    assert is_skipped(name, patterns) is skipped


def test_patterns() -> None:
    assert checked_patterns("a*", ["", "ab"]) == ("a*",)
    assert checked_patterns(["ab", "c"], ["ab", "c"]) == ("ab", "c")
    with pytest.raises(TypeError, match=r"^skip must be"):
        checked_patterns(1, ["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="skip='' fits no module"):
        checked_patterns("", ["", "a"])


class Queries(nn.Module):
    """Uses a matrix and a vector itself, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.queries = nn.Parameter(th.randn(3, 2))
        self.scale = nn.Parameter(th.randn(2))
        self.later = nn.UninitializedParameter()


class OwnLinear(nn.Linear):
    """Uses its weight in its own way."""

    def forward(self, input: th.Tensor) -> th.Tensor:
        return input @ self.weight.t().square()


def test_matrices_of_one_s_own() -> None:
    module = Queries()
    assert own_matrices("net", module) == {"net.queries": "a matrix that Queries uses itself"}
    assert own_matrices("", module) == {"queries": "a matrix that Queries uses itself"}
    assert own_matrices("net", nn.Linear(2, 2)) == {} and own_matrices("net", nn.MultiheadAttention(2, 1)) == {}
    normed = parametrizations.weight_norm(nn.Linear(2, 2))
    assert own_matrices("net", normed) == {} and own_matrices("net", normed.parametrizations.weight) == {}
    assert names_to_skip({"net": module, "net.layer": module.layer}) == ["net", "net.layer", "net.queries"]


class Xs(nn.Module):
    """Has a matrix whose name begins as a test of names might not expect."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.X = nn.Linear(2, 2), nn.Parameter(th.randn(3, 2))


def test_names_of_matrices() -> None:
    assert set(own_matrices("", Xs())) == {"X"} and set(own_matrices("XX", Xs())) == {"XX.X"}


class Lazy(nn.Module):
    """Has a weight of no shape yet, and no vector."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.UninitializedParameter()


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: nn.Bilinear(2, 2, 2, bias=False), "Bilinear has no perturbed version"),
        (
            lambda: parametrizations.weight_norm(nn.Bilinear(2, 2, 2, bias=False)),
            "ParametrizedBilinear has no perturbed version",
        ),
        (lambda: parametrize_bias(nn.Bilinear(2, 2, 2)), "ParametrizedBilinear has no perturbed version"),
        (lambda: nn.LayerNorm(2), None),
        (lambda: parametrize_bias(nn.LayerNorm(2)), None),
        (Lazy, None),
    ],
)
def test_what_has_weights_and_no_perturbed_version(made: Any, why: str | None) -> None:
    net = nn.Sequential(nn.Linear(2, 2), made())
    left = perturb_named(dict(net.named_modules()), LayerNoise(), Wanted(), lambda: 5)
    assert left == ({} if why is None else {"1": why})


def parametrize_bias(layer: nn.Module) -> nn.Module:
    return register_parametrization(layer, "bias", nn.Tanh())


def test_why_layers_stay_plain() -> None:
    assert why_plain(nn.Bilinear(2, 2, 2)) == "has no perturbed version"
    assert why_plain(OwnLinear(2, 2)) == "uses its weights in its own way, not as Linear"
    assert why_plain(nn.LazyLinear(2)) == "has no weights yet; run the network once before it is perturbed"
    spectral = "has another weight after each pass in training mode (spectral norm)"
    assert why_plain(spectral_norm(nn.Linear(2, 2))) == spectral
    assert why_plain(parametrizations.spectral_norm(nn.Linear(2, 2))) == spectral
    assert why_plain(parametrizations.weight_norm(nn.Linear(2, 2))) is None
    assert why_plain(nn.Linear(2, 2)) is None
    assert why_plain(nn.Embedding(2, 2, sparse=True)) == "cannot serve sparse=True, since sigma has dense gradients"


class Net(nn.Module):
    """Has something of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.own = OwnLinear(2, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.LayerNorm(2)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.attention = nn.MultiheadAttention(2, 1, add_bias_kv=True)
        self.served = nn.MultiheadAttention(2, 1)
        self.queries = Queries()
        self.last = nn.Linear(2, 2)


def sorted_out(**wanted: Any) -> tuple[set[str], dict[str, str], Net]:
    net = Net()
    left = perturb_named(dict(net.named_modules()), LayerNoise(), Wanted(**wanted), lambda: 5)
    return {name for name, layer in net.named_modules() if isinstance(layer, FlipoutLayer)}, left, net


LEFT = {
    "own": "OwnLinear uses its weights in its own way, not as Linear",
    "frozen": "Linear is frozen; perturb_frozen=True perturbs it",
    "bilinear": "Bilinear has no perturbed version",
    "attention": "MultiheadAttention cannot serve add_bias_kv=True",
    "queries.queries": "a matrix that Queries uses itself",
}
CHOSEN = {"first", "served", "served.out_proj", "queries.layer", "last"}


def test_all_layers() -> None:
    chosen, left, net = sorted_out()
    assert chosen == CHOSEN and left == LEFT
    numbers = {name: net.get_submodule(name).noise_index for name in chosen}
    assert sorted(numbers.values()) == list(range(5)), "one number each"  # type: ignore[type-var]
    assert numbers["first"] == 0 and numbers["last"] == 4
    assert all(layer.base_key == 5 for layer in flipout_layers([net]))


def test_frozen_ones_stay_plain_unless_they_are_asked_for() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    with pytest.warns(UserWarning, match=r"1: Linear is frozen; perturb_frozen=True perturbs it\."):
        perturb(net)
    assert [type(layer) for layer in net] == [FlipoutLinear, nn.Linear]
    perturb(net, perturb_frozen=True)
    assert [type(layer) for layer in net] == [FlipoutLinear, FlipoutLinear]


def test_frozen_ones_too() -> None:
    chosen, left, _ = sorted_out(frozen=True)
    assert chosen == {*CHOSEN, "frozen"} and left == {name: why for name, why in LEFT.items() if name != "frozen"}


def test_linear_ones_alone() -> None:
    chosen, left, _ = sorted_out(layers="linear")
    assert chosen == {"first", "queries.layer", "last"}
    assert left == {name: LEFT[name] for name in ("own", "frozen")}


def test_left_out_by_name() -> None:
    skip = ("own", "queries", "attention", "bilinear", "frozen", "last")
    assert sorted_out(skip=skip)[:2] == (CHOSEN - {"queries.layer", "last"}, {})
    assert sorted_out(skip=("queries.queries",))[:2] == (CHOSEN, {n: w for n, w in LEFT.items() if n != "queries.queries"})


def test_layers_that_are_added_later_have_the_next_numbers() -> None:
    net = Net()
    perturb_named({"first": net.first}, LayerNoise(), Wanted(), lambda: 5)
    assert net.first.noise_index == 0
    perturb_named({"first": net.first, "last": net.last}, LayerNoise(), Wanted(), lambda: 6)
    assert (net.first.noise_index, net.last.noise_index) == (0, 1)
    assert (net.first.base_key, net.last.base_key) == (5, 6)
    assert perturb_named({"first": net.first}, LayerNoise(), Wanted(), lambda: pytest.fail("nothing to draw")) == {}


# ---- classes that are made at run time ----------------------------------------------------------------------------------


class MyLinear(nn.Linear):
    """A user's class that leaves the forward pass as it is."""


class MyEncoderLayer(nn.TransformerEncoderLayer):
    """A user's encoder layer."""


def test_classes_of_a_user_s() -> None:
    net = nn.Sequential(MyLinear(2, 2), MyEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True))
    perturb(net, sigma_init=0.5)
    layer, encoder = net
    assert isinstance(layer, FlipoutLinear) and isinstance(layer, MyLinear) and plain_class(layer) is MyLinear
    assert isinstance(encoder, ChildrenBypassed) and type(encoder).__name__ == "FlipoutMyEncoderLayer"
    assert type(encoder).__module__ == "sb3_flipout.layers.derived" and plain_class(encoder) is MyEncoderLayer
    assert type(encoder).__doc__ == "MyEncoderLayer that calls its children while their noise is active."
    assert type(empty_derived(MyLinear)) is type(layer)
    x = th.randn(3, 4, 2)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(one) for one in again] == [type(one) for one in net]
        with perturbed(net, KEYS), perturbed(again, KEYS), th.no_grad():
            assert th.equal(net.eval()(x), again.eval()(x))
    assert perturb(net, sigma_init=0.5) is net and type(net[1]) is type(encoder), "it is done once"
    restore(net)
    assert [type(one) for one in net] == [MyLinear, MyEncoderLayer] and plain_class(net[0]) is None


def test_classes_are_made_for_classes_not_met_before() -> None:
    made = type("Unmet", (nn.TransformerEncoderLayer,), {"__module__": __name__})
    net = perturb(nn.Sequential(made(2, 1, 4, dropout=0.0, batch_first=True)), sigma_init=0.5).eval()
    kind = type(net[0])
    assert kind.__bases__ == (ChildrenBypassed, made) and kind.__name__ == "FlipoutUnmet"
    assert kind.__module__ == "sb3_flipout.layers.derived" and plain_class(net[0]) is made
    assert kind.__doc__ == "Unmet that calls its children while their noise is active."
    build, (of,), state = net[0].__reduce_ex__(2)  # type: ignore[misc]
    assert of is made and type(build(of)) is kind and state is vars(net[0])
    other = perturb(nn.Sequential(made(2, 1, 4, batch_first=True)))
    assert type(other[0]) is kind, "made once"


@pytest.mark.parametrize("base", PERTURBED_CLASSES, ids=lambda base: base.__name__)
def test_subclasses_of_every_class_are_served(base: type[nn.Module]) -> None:
    made = type("UnmetLayer", (base,), {"__module__": __name__})
    kind = type(empty_derived(made))
    assert kind.__bases__ == (PERTURBED_CLASSES[base], made) and kind.__name__ == "FlipoutUnmetLayer"
    assert kind.__module__ == "sb3_flipout.layers.derived" and kind.__doc__ == "UnmetLayer with perturbed weights."
    sizes = {OneHotLinear: (5, 2), nn.MultiheadAttention: (4, 2), nn.Embedding: (5, 2)}
    recurrent = issubclass(base, (nn.Linear, nn.LSTM, nn.GRU, nn.GRUCell))
    layer = perturb(made(*sizes.get(base, (2, 2) if recurrent else (2, 2, 1))))
    assert type(layer) is kind and plain_class(layer) is made
    build, (of,), _ = layer.__reduce_ex__(2)  # type: ignore[misc]
    assert of is made and type(build(of)) is kind


@pytest.mark.parametrize(
    ("made", "plain"),
    [
        (lambda **noise: FlipoutEmbedding(5, 3, 2, **noise), lambda: nn.Embedding(5, 3, 2)),
        (
            lambda **noise: FlipoutEmbedding(5, 3, scale_grad_by_freq=True, **noise),
            lambda: nn.Embedding(5, 3, scale_grad_by_freq=True),
        ),
        (lambda **noise: FlipoutMultiheadAttention(4, 2, 0.5, **noise), lambda: nn.MultiheadAttention(4, 2, 0.5)),
        (
            lambda **noise: FlipoutLSTM(4, 2, 2, dropout=0.5, batch_first=True, **noise),
            lambda: nn.LSTM(4, 2, 2, dropout=0.5, batch_first=True),
        ),
        (
            lambda **noise: FlipoutGRU(4, 2, 2, False, True, 0.25, **noise),
            lambda: nn.GRU(4, 2, 2, False, True, 0.25),
        ),
        (lambda **noise: FlipoutMultiheadAttention(4, 2, kdim=3, **noise), lambda: nn.MultiheadAttention(4, 2, kdim=3)),
    ],
)
def test_constructors_take_what_torch_s_take_and_noise(made: Any, plain: Any) -> None:
    th.manual_seed(0)
    layer = made(sigma_init=0.25, family="multiplicative", noise_sharing="shared")
    th.manual_seed(0)
    expected = plain()
    state = layer.state_dict()
    assert all(th.equal(value, state[name]) for name, value in expected.state_dict().items())
    config = LayerNoise(sigma_init=0.25, family="multiplicative", noise_sharing="shared")
    assert [one.noise_config for one in flipout_layers([layer])] == [config] * len(flipout_layers([layer]))
    for name in ("padding_idx", "dropout", "kdim", "scale_grad_by_freq", "batch_first", "num_layers", "bias"):
        assert getattr(layer, name, None) == getattr(expected, name, None)
    if isinstance(layer, FlipoutMultiheadAttention):
        assert type(layer.out_proj) is FlipoutLinear
    with pytest.raises(TypeError):
        made(sigma=0.25)
