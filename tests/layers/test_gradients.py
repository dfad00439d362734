"""Gradients: first and second derivatives, what is frozen, and what happens between forward and backward."""

from itertools import product
from typing import Any

import oracle
import pytest
import torch as th
from cases import KEYS, NOISES, SCALES, every_family, every_noise, inputs, make, noise_id
from torch.autograd import gradcheck, gradgradcheck

from sb3_flipout.layers import perturbed, redraw

GEOMETRIES = [("linear", "plain"), ("linear", "tokens"), ("conv", "groups")]
BIASES = [("linear", "plain"), ("linear", "no_bias")]
SCALE = SCALES["per_row"]
NAMES = ("weight", "bias", "weight_sigma", "bias_sigma")


def parameters(layer: Any) -> dict[str, th.Tensor]:
    return {name: value for name in NAMES if (value := getattr(layer, name)) is not None}


def slow(layer: Any, x: th.Tensor) -> th.Tensor:
    return oracle.forward(layer, x, KEYS, SCALE.tolist())


@pytest.mark.parametrize("geometry", BIASES, ids="-".join)
@every_family
def test_every_combination_of_what_is_trained(geometry: tuple[str, str], family: str) -> None:
    layer = make(geometry, family=family)
    known = parameters(layer)
    for flags in product([False, True], repeat=1 + len(known)):
        x = inputs(geometry).requires_grad_(flags[0])
        for value, flag in zip(known.values(), flags[1:], strict=True):
            value.requires_grad_(flag)
        wanted = [value for value in (x, *known.values()) if value.requires_grad]
        with perturbed(layer, KEYS, SCALE):
            y = layer(x)
        assert y.requires_grad == any(flags)
        if wanted:
            found = th.autograd.grad(y.square().sum(), wanted)
            for a, b in zip(found, th.autograd.grad(slow(layer, x).square().sum(), wanted), strict=True):
                th.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("geometry", BIASES, ids="-".join)
@every_family
def test_second_derivatives_are_those_of_the_materialised_weights(geometry: tuple[str, str], family: str) -> None:
    """As a Hessian-vector product takes them, with every parameter trained (also a sigma that is not by default)."""
    layer, x = make(geometry, family=family), inputs(geometry).requires_grad_()
    wanted = [x, *(value.requires_grad_() for value in parameters(layer).values())]
    found = []
    for of in ("fast", "slow"):
        with perturbed(layer, KEYS, SCALE):
            y = layer(x)
        loss = (y if of == "fast" else slow(layer, x)).tanh().square().sum()
        first = th.autograd.grad(loss, wanted, create_graph=True)
        found.append([*first, *th.autograd.grad(sum((g * g.detach().cos()).sum() for g in first), wanted)])
    for a, b in zip(*found, strict=True):
        th.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids="-".join)
@every_noise
def test_gradcheck(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer = make(geometry, **noise)
    names = [name for name, value in parameters(layer).items() if value.requires_grad]

    def run(x: th.Tensor, *values: th.Tensor) -> th.Tensor:
        with perturbed(layer, KEYS[:2], SCALE[2:4]):
            return th.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    arguments = (inputs(geometry, 2).requires_grad_(), *(getattr(layer, name) for name in names))
    assert gradcheck(run, arguments, fast_mode=True)
    assert gradgradcheck(run, arguments, fast_mode=True)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids="-".join)
@every_noise
def test_a_redraw_between_forward_and_backward_changes_no_gradient(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    """The backward pass belongs to the draw that the forward pass was made with."""
    layer, x = make(geometry, **noise), inputs(geometry).requires_grad_()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    gradients = []
    for again in (False, True):
        redraw(layer, 11)
        with perturbed(layer, KEYS, SCALE):
            loss = layer(x).square().sum()
        if again:
            redraw(layer)
        gradients.append(th.autograd.grad(loss, wanted))
    for a, b in zip(*gradients, strict=True):
        assert th.equal(a, b)


@pytest.mark.parametrize("noise", NOISES, ids=noise_id)
def test_another_activation_between_forward_and_backward_changes_no_gradient(noise: dict[str, str]) -> None:
    layer, x = make(("linear", "plain"), **noise), inputs(("linear", "plain"))
    with perturbed(layer, KEYS):
        expected = th.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    with perturbed(layer, KEYS):
        loss = layer(x).square().sum()
    with perturbed(layer, KEYS + 1, -2.0):
        layer(x)
        assert th.equal(th.autograd.grad(loss, layer.weight)[0], expected)


@every_family
def test_gradients_accumulate_over_uses(family: str) -> None:
    layer, x = make(("linear", "plain"), family=family), inputs(("linear", "plain"))
    with perturbed(layer, KEYS):
        layer(x).square().sum().backward()
        once = layer.weight.grad.clone()
        layer(x).square().sum().backward()
        th.testing.assert_close(layer.weight.grad, 2 * once)


@every_noise
def test_forward_and_backward_touch_no_generator(noise: dict[str, str], untouched_rng: None) -> None:
    layer, x = make_quietly(noise), inputs(("linear", "plain"))
    with perturbed(layer, KEYS):
        layer(x).sum().backward()
    redraw(layer)
    redraw(layer, 5)
    with perturbed(layer, KEYS), th.no_grad():
        layer(x)


def make_quietly(noise: dict[str, str]) -> Any:
    """A constructor may draw means; what comes after it may not."""
    with th.random.fork_rng():
        return make(("linear", "plain"), **noise)
