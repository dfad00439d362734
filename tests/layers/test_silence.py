"""Noise of scale 0 costs what the mean weights cost, and fixed perturbations are kept only while nothing moves them."""

from typing import Any

import pytest
import torch as th
from cases import KEYS, N, every_geometry, every_noise, inputs, make, plain_twin
from torch import nn

from sb3_flipout.layers import FlipoutLinear, FlipoutLSTM, attach, base, flipout_layers, perturb, perturbed, redraw
from sb3_flipout.layers.visits import Visits
from sb3_flipout.layers.weights import PerturbedWeights
from sb3_flipout.noise import RowNoise, RowsByKey

SILENT: dict[str, Any] = {"number": 0.0, "minus": -0.0, "rows": th.zeros(N)}


@pytest.mark.parametrize("scale", SILENT.values(), ids=SILENT)
def test_it_is_known_to_be_silent(scale: Any) -> None:
    noise = RowNoise(KEYS, scale)
    assert noise.silent and noise[2:4].silent and RowNoise.cat([noise, noise]).silent
    assert not noise.at_scale(th.ones(N)).silent and not RowNoise(KEYS).silent
    assert RowNoise(KEYS).at_scale(th.zeros(N)).silent
    one_row = th.zeros(N)
    one_row[3] = 1e-30
    assert not RowNoise(KEYS, one_row).silent and not RowNoise(KEYS).at_scale(one_row).silent


@every_geometry
@every_noise
def test_rows_see_the_mean_weights_bit_for_bit(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer, x = make(geometry, **noise), inputs(geometry)
    layer.requires_grad_(False)
    plain = plain_twin(geometry, layer)
    for scale in SILENT.values():
        with perturbed(layer, KEYS, scale):
            assert th.equal(layer(x), plain(x))


def test_neither_factors_nor_perturbations_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    net = perturb(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), learn_sigma=False)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed for noise that nobody hears")

    monkeypatch.setattr(RowNoise, "factors", never)
    monkeypatch.setattr(FlipoutLinear, "deltas", never)
    x = th.randn(N, 3, requires_grad=True)
    with perturbed(net, KEYS, 0.0):
        net(x).sum().backward()
    assert x.grad is not None and net[0].weight.grad is not None


def test_an_lstm_is_torchs_own() -> None:
    plain = nn.LSTM(3, 5, batch_first=True)
    ours = FlipoutLSTM(3, 5, batch_first=True, learn_sigma=False)
    ours.load_state_dict(plain.state_dict(), strict=False)
    x = th.randn(N, 4, 3)
    with perturbed(ours, KEYS, 0.0):
        assert th.equal(ours(x)[0], plain(x)[0])


def test_sigma_that_learns_has_a_gradient_of_zero_and_not_none() -> None:
    layer, x = FlipoutLinear(3, 2, learn_sigma=True), th.randn(N, 3)
    with perturbed(layer, KEYS, 0.0):
        layer(x).sum().backward()
    for sigma in (layer.weight_sigma, layer.bias_sigma):
        assert sigma is not None and sigma.grad is not None and not sigma.grad.any()


def test_noise_that_the_scale_does_not_reach_is_heard() -> None:
    layer, x = FlipoutLinear(3, 2, learn_sigma=False), th.randn(N, 3)
    layer.noise_scaled = False  # as of a member's prior
    attach([layer])
    with perturbed(layer, KEYS, 0.0):
        silenced = layer(x)
    with perturbed(layer, KEYS, 1.0):
        assert th.equal(silenced, layer(x))
    assert not th.allclose(silenced, nn.functional.linear(x, layer.weight, layer.bias))


def test_each_input_still_stands_for_its_rows() -> None:
    net = perturb(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), learn_sigma=False)
    network, x = attach(flipout_layers([net])), th.randn(2, 3)
    with network.activate(RowsByKey(th.arange(5), 0.0, th.arange(10))):
        assert th.allclose(
            net(x), nn.functional.linear(nn.functional.linear(x, *net[0].means()), *net[1].means()).repeat(5, 1)
        )


def seen(layer: FlipoutLinear, x: th.Tensor) -> th.Tensor:
    with perturbed(layer, KEYS):
        return layer(x.to(layer.weight.dtype))


def sigmas(layer: FlipoutLinear) -> list[nn.Parameter]:
    return [sigma for sigma in (layer.weight_sigma, layer.bias_sigma) if sigma is not None]


def written_into(layer: FlipoutLinear) -> None:
    with th.no_grad():
        for sigma in sigmas(layer):
            sigma *= 2


def replaced(layer: FlipoutLinear) -> None:
    layer.weight_sigma = nn.Parameter(th.full_like(sigmas(layer)[0], 3.0), requires_grad=layer.learns_sigma)


def given_other_data(layer: FlipoutLinear) -> None:
    """As TRPO's line search does with what learns."""
    for sigma in sigmas(layer):
        sigma.data = sigma.data * 2 + 1


def given_as_one_vector(layer: FlipoutLinear) -> None:
    """As SB3's load_from_vector does."""
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector * 2 + 1, layer.parameters())


def stepped(layer: FlipoutLinear) -> None:
    """By the fused optimizer, whose writing autograd does not count."""
    with th.enable_grad():
        seen(layer, th.ones(N, 3)).square().sum().backward()
    th.optim.Adam([*layer.parameters()], lr=0.5, fused=True).step()


def loaded(layer: FlipoutLinear) -> None:
    layer.load_state_dict({name: value * 1.5 for name, value in layer.state_dict().items()})


MOVES: dict[str, Any] = {
    "nothing": lambda layer: None,
    "base": lambda layer: redraw(layer, 5),
    "written": written_into,
    "replaced": replaced,
    "data": given_other_data,
    "vector": given_as_one_vector,
    "fused step": stepped,
    "loaded": loaded,
    "type": lambda layer: layer.double(),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("family", ["gaussian", "multiplicative", "factorised", "isotropic"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_what_moves_a_kept_perturbation_is_noticed(move: Any, learned: bool, family: str, grad: bool) -> None:
    if learned and family == "isotropic":
        pytest.skip("its sigma does not learn")
    layer, x = FlipoutLinear(3, 2, learn_sigma=learned, family=family), th.randn(N, 3)
    network = attach([layer])
    with th.set_grad_enabled(grad), network.keeping_deltas():
        before = seen(layer, x)
        assert th.equal(seen(layer, x), before)
        move(layer)
        with th.no_grad():
            layer.weight += 1  # the mean weights are never kept
        kept = seen(layer, x)
    assert th.equal(kept, seen(layer, x)) and not (kept.dtype == before.dtype and th.equal(kept, before))


def test_a_parametrised_sigma_is_not_kept() -> None:
    layer, x = FlipoutLinear(3, 2, learn_sigma=False), th.randn(N, 3)
    attach([layer])
    nn.utils.parametrize.register_parametrization(layer, "weight_sigma", nn.Softplus())
    layer.parametrizations.weight_sigma.original.requires_grad_()
    with layer.network.keeping_deltas():
        for _ in range(2):
            seen(layer, x).sum().backward()
    assert layer.learns_sigma and layer.parametrizations.weight_sigma.original.grad is not None


def test_a_parametrised_sigma_of_zero_that_learns_has_a_gradient() -> None:
    layer = FlipoutLinear(3, 2, learn_sigma=False, noise_sharing="independent", sigma_init=0.0)
    nn.utils.parametrize.register_parametrization(layer, "weight_sigma", nn.Identity())
    layer.parametrizations.weight_sigma.original.requires_grad_()
    seen(layer, th.randn(N, 3)).sum().backward()
    assert layer.parametrizations.weight_sigma.original.grad is not None


def test_a_class_that_computes_its_own_is_asked_each_time() -> None:
    class Own(FlipoutLinear):
        times = 1.0

        def deltas(self, *args: Any, **kwargs: Any) -> Any:
            weight, bias = super().deltas(*args, **kwargs)
            return weight * self.times, bias

    layer, x = Own(3, 2, learn_sigma=False), th.randn(N, 3)
    with attach([layer]).keeping_deltas():
        before = seen(layer, x)
        layer.times = 2.0
        assert not th.equal(seen(layer, x), before)


def test_a_fixed_perturbation_is_made_once_and_one_that_learns_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    made, deltas = [], PerturbedWeights.deltas
    monkeypatch.setattr(PerturbedWeights, "deltas", lambda *args: made.append(0) or deltas(*args))  # type: ignore[func-returns-value]
    monkeypatch.setattr(base, "_DELTAS", PerturbedWeights.deltas)
    for learned, grad, expected in ((False, True, 1), (False, False, 1), (True, False, 4), (True, True, 4)):
        layer, x = FlipoutLinear(3, 2, learn_sigma=learned), th.randn(N, 3)
        made.clear()
        with th.set_grad_enabled(grad), attach([layer]).keeping_deltas():
            for _ in range(4):
                seen(layer, x)
        assert len(made) == expected
        made.clear()
        seen(layer, x)
        assert len(made) == 1  # nothing is kept afterwards


def test_gradients_of_sigma_flow_where_a_pass_without_gradients_came_first() -> None:
    layer, x = FlipoutLinear(3, 2, learn_sigma=True), th.randn(N, 3)
    with attach([layer]).keeping_deltas():
        with th.no_grad():
            seen(layer, x)
        seen(layer, x).square().sum().backward()
    assert layer.weight_sigma is not None and layer.weight_sigma.grad is not None and layer.weight_sigma.grad.any()


def test_what_inference_mode_has_made_is_kept_from_autograd() -> None:
    layer, x = FlipoutLinear(3, 2, learn_sigma=False), th.randn(N, 3, requires_grad=True)
    with attach([layer]).keeping_deltas():
        with th.inference_mode():
            seen(layer, x)
        seen(layer, x).sum().backward()
    assert x.grad is not None


def test_who_is_called_is_noted_of_silent_noise_too() -> None:
    net = perturb(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), learn_sigma=False)
    network = attach(flipout_layers([net]))
    with network.noting() as visits:
        with network.activate(None):
            net(th.randn(N, 3))
        assert visits == Visits()
        with network.activate(RowNoise(KEYS, 0.0)):
            net[1](th.randn(N, 4))
    assert visits == Visits({1}, given_noise=True) and network.visits is None
