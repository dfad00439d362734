"""In-place conversion: what is converted and what is not, the way back, copies and saved states."""

import copy
import io
import pickle
import re
from typing import Any

import pytest
import torch as th
from cases import KEYS, SCALES, TABLES, every_noise, image, make, small_net
from torch import nn

from sb3_flipout.layers import (
    PERTURBED_CLASSES,
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutConvTranspose2d,
    FlipoutEmbedding,
    FlipoutLayer,
    FlipoutLinear,
    FlipoutMultiheadAttention,
    OneHotLinear,
    effective_weight,
    perturb,
    perturbed,
    redraw,
    restore,
)


def perturbed_output(net: nn.Module, scale: Any = SCALES["per_row"]) -> th.Tensor:
    with perturbed(net, KEYS, scale):
        return net(image()).detach()


@every_noise
def test_perturb_is_in_place(noise: dict[str, str]) -> None:
    net = small_net()
    modules, parameters, buffers = list(net.modules()), dict(net.named_parameters()), dict(net.state_dict())
    plain = net(image())
    assert perturb(net, **noise) is net
    assert all(a is b for a, b in zip(net.modules(), modules, strict=True))
    now = dict(net.named_parameters())
    assert all(now[name] is value for name, value in parameters.items())
    assert set(now) - set(parameters) <= {f"{i}.{name}_sigma" for i in (0, 3, 5, 6) for name in ("weight", "bias")}
    assert set(net.state_dict()) == set(now) and set(buffers) <= set(now), "the base is not saved"
    assert [type(layer) for layer in net if isinstance(layer, FlipoutLayer)] == [FlipoutConv2d, *[FlipoutLinear] * 3]
    assert [layer.noise_index for layer in net if isinstance(layer, FlipoutLayer)] == [0, 1, 2, 3]
    assert th.equal(net(image()), plain)


@pytest.mark.parametrize("geometry", [("linear", "plain"), ("conv", "all_at_once")], ids="-".join)
@every_noise
def test_a_converted_layer_is_a_constructed_one(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    table, _, plain_class = TABLES[geometry[0]]
    constructed = make(geometry, number=0, **noise)
    converted = perturb(plain_class(**table[geometry[1]][0], dtype=th.float64), base_key=11, **noise)
    converted.load_state_dict(constructed.state_dict())
    assert type(converted) is type(constructed) and repr(converted) == repr(constructed)
    redraw(converted, 11)  # the shared dropconnect and factorised draws do not depend on what was loaded, nor do others
    shape = table[geometry[1]][1]
    x = th.randn(6, *shape, dtype=th.float64, generator=th.Generator().manual_seed(0))
    found = []
    for layer in (constructed, converted):
        with perturbed(layer, KEYS):
            found.append(layer(x))
    assert th.equal(*found)


class Scaled(nn.Linear):
    """Uses its weight in its own way."""

    def forward(self, input: th.Tensor) -> th.Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class Renamed(nn.Linear):
    """Uses its weight as its parent does."""


def test_only_layers_that_use_their_weights_in_a_known_way_are_converted() -> None:
    attention = nn.MultiheadAttention(4, 2)
    others = [Scaled(4, 4), nn.Bilinear(2, 2, 2)]
    types = [type(layer) for layer in others]
    known = [nn.Conv1d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.Embedding(3, 2), attention]
    net = nn.ModuleList([nn.Linear(4, 4), *others, *known, Renamed(4, 4)])
    plain = (
        r"some layers stay plain.* 1: Scaled uses its weights in its own way, not as Linear\. "
        r"2: Bilinear has no perturbed version\. .*name them: skip=\['1', '2'\]"
    )
    with pytest.warns(UserWarning, match=plain) as warned:
        assert perturb(net) is net
    assert len(warned) == 1
    perturbed_types = [FlipoutConv1d, FlipoutConvTranspose2d, FlipoutEmbedding, FlipoutMultiheadAttention]
    assert [type(layer) for layer in net][:7] == [FlipoutLinear, *types, *perturbed_types]
    assert isinstance(net[7], FlipoutLinear) and isinstance(net[7], Renamed)
    # Attention's output projection is a subclass of nn.Linear that a perturbed attention calls.
    assert isinstance(attention.out_proj, FlipoutLinear)
    assert sum(isinstance(layer, FlipoutLayer) for layer in net.modules()) == 7
    convolutions = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
    others_known = {nn.Linear, nn.Embedding, OneHotLinear, nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.GRUCell}
    assert set(PERTURBED_CLASSES) == convolutions | others_known


def test_linear_layers_only() -> None:
    net = perturb(small_net(), layers="linear")
    assert [type(layer) for layer in net][::3] == [nn.Conv2d, FlipoutLinear, FlipoutLinear]
    perturb(net)  # the rest joins, with numbers of its own
    assert type(net[0]) is FlipoutConv2d
    assert sorted(layer.noise_index for layer in net if isinstance(layer, FlipoutLayer)) == [0, 1, 2, 3]


@pytest.mark.parametrize("layers", ["conv", "", None, ["linear"]])
def test_unknown_choice_of_layers_is_refused(layers: Any) -> None:
    net = small_net()
    with pytest.raises(ValueError, match='layers must be one of "all", "linear", "hidden", got ' + re.escape(repr(layers))):
        perturb(net, layers=layers)
    assert not any(isinstance(layer, FlipoutLayer) for layer in net.modules())


@pytest.mark.parametrize("base_key", ["a", 1.5, True])
def test_a_bad_base_key_changes_nothing(base_key: Any) -> None:
    net = small_net()
    types = [type(layer) for layer in net]
    with pytest.raises(TypeError, match=f"base_key must be an integer, got {base_key!r} of type {type(base_key).__name__}"):
        perturb(net, base_key=base_key)
    assert [type(layer) for layer in net] == types


def test_without_a_base_key_it_is_drawn_as_weights_are() -> None:
    keys = []
    for seed in (0, 0, 1):
        th.manual_seed(seed)
        net = perturb(small_net())
        keys.append({layer.base_key for layer in net if isinstance(layer, FlipoutLayer)})
    assert all(len(of_net) == 1 for of_net in keys) and keys[0] == keys[1] != keys[2]


def test_perturbing_again_changes_nothing() -> None:
    net = perturb(small_net(), base_key=7)
    redraw(net, 8)
    before, parameters = perturbed_output(net), list(net.parameters())
    perturb(net, base_key=99)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert th.equal(perturbed_output(net), before)


@pytest.mark.parametrize(
    "other", [{"family": "factorised"}, {"sigma_init": 0.1}, {"noise_sharing": "shared"}, {"learn_sigma": False}]
)
def test_perturbing_in_another_way_is_refused(other: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Linear(2, 2), FlipoutLinear(2, 2))
    before = net[1].noise_config
    with pytest.raises(ValueError, match=r"already perturbed .* call restore first"):
        perturb(net, **other)
    assert type(net[0]) is nn.Linear and net[1].noise_config is before
    perturb(restore(net), **other)
    assert all(isinstance(layer, FlipoutLinear) for layer in net)


@every_noise
def test_restore_leaves_nothing_behind(noise: dict[str, str]) -> None:
    net = small_net()
    plain, before = net(image()), [(type(module), set(vars(module))) for module in net.modules()]
    names, parameters = list(net.state_dict()), list(net.parameters())
    books = [(list(m._parameters), list(m._buffers), m._non_persistent_buffers_set) for m in copy.deepcopy(net).modules()]
    perturb(net, **noise)
    perturbed_output(net)
    redraw(net)
    assert restore(net) is net
    assert [(type(module), set(vars(module))) for module in net.modules()] == before
    assert books == [(list(m._parameters), list(m._buffers), m._non_persistent_buffers_set) for m in net.modules()]
    assert list(net.state_dict()) == names
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert th.equal(net(image()), plain)


def test_restore_of_a_plain_network_and_of_a_single_layer() -> None:
    net = small_net()
    assert restore(net) is net
    layer = restore(FlipoutConv2d(2, 3, 2))
    assert type(layer) is nn.Conv2d and list(layer.state_dict()) == ["weight", "bias"]
    assert repr(layer) == repr(nn.Conv2d(2, 3, 2))


@every_noise
def test_copies_behave_alike_and_stand_alone(noise: dict[str, str]) -> None:
    net = perturb(small_net(), base_key=3, **noise)
    expected = perturbed_output(net)
    stream = io.BytesIO()
    th.save(net, stream)
    stream.seek(0)
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), th.load(stream, weights_only=False)]
    for twin in twins:
        assert th.equal(perturbed_output(twin), expected)
        redraw(twin)
        with perturbed(twin, KEYS[:2]):
            assert th.equal(net(image()), restore(copy.deepcopy(net))(image())), "noise of a copy reaches the original"
    assert th.equal(perturbed_output(net), expected)


@every_noise
def test_a_saved_state_brings_back_the_perturbed_network(noise: dict[str, str]) -> None:
    """The base follows from its key; means and sigmas are what is saved."""
    net, other = (perturb(small_net(), base_key=3, **noise) for _ in range(2))
    with th.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    assert not th.equal(perturbed_output(other), perturbed_output(net))
    other.load_state_dict(net.state_dict())
    assert th.equal(perturbed_output(other), perturbed_output(net))


@every_noise
def test_changing_the_type_of_a_network_keeps_its_noise(noise: dict[str, str]) -> None:
    net = perturb(small_net(), base_key=3, **noise)
    single = perturbed_output(net)
    net.double()
    with perturbed(net, KEYS, SCALES["per_row"]):
        double = net(image().double())
        th.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)
    for layer in net:
        if isinstance(layer, FlipoutLayer):
            kept = {name: draw.clone() for name, draw in layer.bases()[1].items()}
            assert set(kept) == ({"weight_base", "bias_base"} if layer.noise_config.draws_base else set())
            layer.redraw(layer.base_key)
            assert all(draw.dtype == kept[name].dtype == th.float64 for name, draw in layer.bases()[1].items())
            assert all(th.equal(draw, kept[name]) for name, draw in layer.bases()[1].items())


def test_a_shared_layer_is_converted_once() -> None:
    layer = nn.Linear(3, 3)
    net = perturb(nn.Sequential(layer, nn.Tanh(), layer))
    assert net[0] is net[2] and net[0].noise_index == 0
    with perturbed(net, KEYS):
        y = net(th.ones(6, 3))
    assert y.shape == (6, 3)


def test_networks_perturbed_apart_and_then_joined_have_distinct_noise() -> None:
    """Both count their layers from 0."""
    a, b = (perturb(nn.Sequential(nn.Linear(4, 4)), base_key=3) for _ in range(2))
    joined = nn.Sequential(a, b)
    with perturbed(joined, KEYS):
        joined(th.ones(6, 4))
    numbers = [layer.noise_index for layer in joined.modules() if isinstance(layer, FlipoutLayer)]
    assert len(set(numbers)) == 2 and a[0].base_key == b[0].base_key
    assert not th.equal(a[0].bases()[1]["weight_base"], b[0].bases()[1]["weight_base"])


@pytest.mark.parametrize("part", [False, True], ids=["whole", "one_layer"])
@every_noise
def test_a_network_perturbed_anew_forgets_its_old_noise(noise: dict[str, str], part: bool) -> None:
    """The layers are the same objects, so whatever a network remembers of them has to be checked for more."""
    net = perturb(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    x = th.randn(6, 4, generator=th.Generator().manual_seed(0))
    for settings in (noise, {}):
        with perturbed(net, KEYS):
            net(x)
        perturb(restore(net[1] if part else net), **settings)
        with perturbed(net, KEYS):
            found = net(x)
        rows = x
        for layer in net:
            rows = th.stack(
                [
                    nn.functional.linear(row, *effective_weight(layer, key))
                    for row, key in zip(rows, KEYS.tolist(), strict=True)
                ]
            )
        th.testing.assert_close(found, rows)
