"""Compilation changes nothing: same outputs and gradients, noise on and off, through the module or its wrapper."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch as th
from cases import KEYS, SCALES, every_noise, image, inputs, make, small_net

from sb3_flipout.layers import perturb, perturbed, redraw

# Importing inductor makes torch warn of its own use of torch.jit.
INDUCTOR = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")]
BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    th._dynamo.reset()
    yield
    th._dynamo.reset()


def run(net: Any, where: Any, x: th.Tensor, parameters: list[th.Tensor]) -> list[th.Tensor]:
    """Outputs and gradients under two sets of keys, and without noise."""
    found = []
    for keys, scale in [(KEYS, None), (KEYS + 1, SCALES["per_row"]), (None, None)]:
        with perturbed(where, keys, scale):
            y = net(x)
        gradients = th.autograd.grad(y.square().sum(), parameters, allow_unused=True)
        found += [y, *(g for g in gradients if g is not None)]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_network_computes_the_same(backend: str) -> None:
    net = perturb(small_net(), base_key=3)
    parameters = [p for p in net.parameters() if p.requires_grad]
    compiled = th.compile(net, backend=backend)
    for draw in (3, 4):
        redraw(compiled, draw)
        expected = run(net, net, image(), parameters)
        for where in (net, compiled):
            for a, b in zip(run(compiled, where, image(), parameters), expected, strict=True):
                th.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


SLOW = [pytest.param(geometry, marks=pytest.mark.slow) for geometry in [("linear", "tokens"), ("conv", "groups")]]


@every_noise
@pytest.mark.parametrize("geometry", [("linear", "plain"), *SLOW], ids="-".join)
def test_every_noise_compiles(geometry: tuple[str, str], noise: dict[str, str]) -> None:
    layer, x = make(geometry, **noise), inputs(geometry).requires_grad_()
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = run(layer, layer, x, parameters)
    compiled = th.compile(layer, backend="eager")
    for a, b in zip(run(compiled, compiled, x, parameters), expected, strict=True):
        th.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_with_the_context_inside(backend: str) -> None:
    net = perturb(small_net(), base_key=3)

    def step(x: th.Tensor, keys: th.Tensor) -> th.Tensor:
        with perturbed(net, keys):
            return net(x)

    expected = step(image(), KEYS)
    th.testing.assert_close(th.compile(step, backend=backend)(image(), KEYS), expected, rtol=1e-5, atol=1e-5)
