"""What users do with perturbed networks beside calling them: share layers, fold rows, load, wrap, autocast, evaluate first."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import sb3_flipout
from sb3_flipout.diagnostics import figures
from sb3_flipout.evolution import Population
from sb3_flipout.layers import FlipoutLinear, effective_weight, perturb, perturbed, redraw, restore
from sb3_flipout.layers.embedding import OneHotLinear
from sb3_flipout.layers.row_layout import RowLayout
from sb3_flipout.noise import FAMILIES, RowNoise

KEYS = th.arange(3)


# ---- layers that two networks share ---------------------------------------------------------------------------------


def shared() -> tuple[nn.Linear, nn.Sequential, nn.Sequential]:
    th.manual_seed(0)
    trunk = nn.Linear(4, 8)
    nets = [nn.Sequential(trunk, nn.Tanh(), nn.Linear(8, n)) for n in (2, 1)]
    for net in nets:
        perturb(net)
    return trunk, *nets


def test_layers_are_not_taken_from_a_network_that_sees_noise() -> None:
    trunk, actor, critic = shared()
    x = th.randn(3, 4)
    with perturbed(actor, KEYS):
        before = trunk(x)
        for keys in (KEYS, None):
            with pytest.raises(ValueError, match=r"layers that several networks share .* Make them one network before"):
                perturbed(critic, keys)
        assert th.equal(trunk(x), before)
    assert not th.equal(trunk(x), before)


def test_as_one_network_parts_are_named_as_before() -> None:
    trunk, actor, critic = shared()
    x = th.randn(3, 4)
    perturbed(nn.ModuleList([actor, critic]), None)
    for _ in range(2):
        with perturbed(actor, KEYS):
            noisy, of_actor = trunk(x), actor(x)
            with perturbed(critic, None):
                plain = critic(x)
                assert not th.equal(trunk(x), noisy)
            assert th.equal(trunk(x), noisy) and th.equal(actor(x), of_actor)
        assert th.equal(critic(x), plain) and not th.equal(actor(x), of_actor)


@pytest.mark.parametrize("made", ["context", "population"])
def test_what_was_made_before_says_that_it_is_of_yesterday(made: str) -> None:
    _, actor, critic = shared()
    context: Any = perturbed(actor, KEYS) if made == "context" else Population(actor, 4).ask()[0].members()
    perturbed(critic, None)
    with pytest.raises(ValueError, match=r"has become part of another network since"), context:
        pass


# ---- rows in other places -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("frames", "rows", "inputs"), [(5, 3, 7), (4, 4, 7), (64, 64, 256), (64, 64, 4096), (64, 32, 4096)])
def test_sizes_that_agree_by_chance_decide_nothing(family: Any, frames: int, rows: int, inputs: int) -> None:
    """Time first, as many frames as rows; also where what is summed up is cut into blocks."""
    layer = perturb(nn.Linear(inputs, 3), family=family)
    layer.row_layout = RowLayout(1, "plain")
    x, keys = th.randn(frames, rows, inputs), th.arange(rows)
    with th.no_grad(), perturbed(layer, keys):
        found = layer(x)
    each = [nn.functional.linear(x[:, n], *effective_weight(layer, n)) for n in range(rows)]
    th.testing.assert_close(found, th.stack(each, 1), rtol=1e-3, atol=1e-3)


# ---- types and modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["flipout", "shared", "independent"])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.GRU, nn.LSTM])
def test_recurrent_layers_take_autocast(kind: Any, sharing: Any) -> None:
    net = perturb(kind(4, 8), noise_sharing=sharing)
    x = th.randn(3, 4) if kind is nn.GRUCell else th.randn(5, 3, 4)
    with perturbed(net, KEYS):
        exact = net(x)
        with th.autocast("cpu", th.bfloat16):
            found = net(x)
    exact, found = (out if kind is nn.GRUCell else out[0] for out in (exact, found))
    th.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", ["flipout", "shared", "independent"])
@pytest.mark.parametrize("first", ["pass", "redraw"])
def test_a_network_that_is_evaluated_first_can_be_trained(family: Any, sharing: Any, first: str) -> None:
    try:
        net = nn.Sequential(*[FlipoutLinear(4, 4, family=family, noise_sharing=sharing) for _ in range(2)])
    except ValueError:
        pytest.skip("no such family with this sharing")
    x, noise = th.randn(3, 4), RowNoise(KEYS, 0.5)
    with th.inference_mode():
        if first == "redraw":
            redraw(net)
        with perturbed(net, noise):
            before = net(x).clone()
    with perturbed(net, noise):
        found = net(x)
    found.sum().backward()
    assert th.equal(found.detach(), before) and net[0].weight.grad is not None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", ["flipout", "shared"])
def test_draws_follow_weights_that_are_assigned(family: Any, sharing: Any) -> None:
    net = perturb(nn.Sequential(nn.Linear(4, 3)), family=family, noise_sharing=sharing, base_key=5)
    with th.device("meta"):
        empty = perturb(nn.Sequential(nn.Linear(4, 3)), family=family, noise_sharing=sharing, base_key=5)
    empty.load_state_dict(net.state_dict(), assign=True)
    net_16 = perturb(nn.Sequential(nn.Linear(4, 3)), family=family, noise_sharing=sharing, base_key=5)
    net_16.load_state_dict({name: value.bfloat16() for name, value in net.state_dict().items()}, assign=True)
    x = th.randn(3, 4)
    with perturbed(net, KEYS), perturbed(empty, KEYS), perturbed(net_16, KEYS):
        assert th.equal(net(x), empty(x))
        th.testing.assert_close(net_16(x.bfloat16()).float(), net(x), rtol=0.1, atol=0.1)


# ---- what is done to layers -----------------------------------------------------------------------------------------


def test_a_layer_whose_instance_has_a_forward_of_its_own_stays_plain_and_it_is_said() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    net[0].forward = functools.partial(net[0].forward)
    with pytest.warns(UserWarning, match=r"0: Linear has a forward of its own on the instance"):
        perturb(net)
    assert not isinstance(net[0], FlipoutLinear) and isinstance(net[1], FlipoutLinear)


def test_restore_changes_nothing_where_it_cannot() -> None:
    net = perturb(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    weight_norm(net[1])
    with pytest.raises(ValueError, match=r"^1 has been parametrised since it was perturbed"):
        restore(net)
    assert isinstance(net[0], FlipoutLinear)
    parametrize.remove_parametrizations(net[1], "weight")
    assert [type(layer) for layer in restore(net)] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize(
    "plain",
    [nn.Linear(100, 64), OneHotLinear(100, 64), nn.Embedding(100, 64), nn.ConvTranspose2d(8, 32, 4, 2), nn.Conv2d(4, 8, 3)],
    ids=lambda plain: type(plain).__name__,
)
def test_the_figure_shows_sigma_in_the_unit_in_which_it_is_given(plain: nn.Module) -> None:
    layer = perturb(plain, sigma_init=0.7)
    assert next(figures._boxes("x", layer))["med"] == pytest.approx(0.7, rel=1e-5)
    assert sb3_flipout.layers.flipout_layers([layer]) == [layer]


class Doubled(nn.Module):
    def forward(self, weight: th.Tensor) -> th.Tensor:
        return 2 * weight

    def right_inverse(self, weight: th.Tensor) -> th.Tensor:
        return weight / 2


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize("kind", [nn.Linear, OwnLinear])
def test_parametrisations_come_and_go_while_perturbed(kind: type[nn.Linear]) -> None:
    net, keys, x = nn.Sequential(kind(4, 3)), th.arange(5), th.randn(5, 4)
    (layer,) = net
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrize.register_parametrization(layer, "bias", Doubled())
    weight, parametrised = layer.weight.detach().clone(), type(layer)
    perturb(net)
    assert type(restore(net)[0]) is parametrised
    perturb(net)
    with perturbed(net, keys):
        before = net(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter) and th.equal(layer.weight, weight)
    with perturbed(net, keys):
        th.testing.assert_close(net(x), before)
    twin = copy.deepcopy(net)
    restore(net)
    assert isinstance(layer, kind) and not isinstance(layer, FlipoutLinear)
    assert th.equal(layer.weight, weight) and parametrize.is_parametrized(layer, "bias")
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is kind
    parametrize.remove_parametrizations(twin[0], "bias")
    assert isinstance(twin[0], FlipoutLinear) and isinstance(twin[0], kind)
    parametrize.register_parametrization(twin[0], "weight", Doubled())
    with perturbed(twin, keys):
        th.testing.assert_close(twin(x), before)
    parametrize.remove_parametrizations(twin[0], "weight")
    with perturbed(twin, keys):
        th.testing.assert_close(twin(x), before)
    assert type(restore(twin)[0]) is kind
