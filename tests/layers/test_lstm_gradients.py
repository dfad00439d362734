"""Gradients of FlipoutLSTM: of every step's noise, of states, second derivatives, and what is frozen."""

from typing import Any

import oracle_lstm
import pytest
import torch as th
from lstm_cases import (
    HELD,
    HELD_SCALE,
    STEPWISE,
    STEPWISE_SCALE,
    T,
    every_lstm_noise,
    every_option,
    make_lstm,
    sequences,
    states,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

from sb3_flipout.layers import perturbed, redraw

STARTS = th.tensor([[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
NEAR = {"rtol": 1e-10, "atol": 1e-10}


def loss(y: th.Tensor, h: th.Tensor, c: th.Tensor) -> th.Tensor:
    weights = th.linspace(0.5, 2.0, y.numel(), dtype=y.dtype).view(y.shape)  # every step counts, each in its own way
    return (weights * y.square()).sum() + h.sum() + c.tanh().sum()


def trained(lstm: Any) -> dict[str, th.Tensor]:
    return {name: value for name, value in lstm.named_parameters() if value.requires_grad}


@every_option
@every_lstm_noise
def test_gradients_are_those_of_the_materialised_weights(options: dict[str, Any], noise: dict[str, str]) -> None:
    lstm, x = make_lstm(**options, **noise), sequences().requires_grad_()
    hx = tuple(state.requires_grad_() for state in states(lstm.num_layers))
    wanted = [x, *hx, *trained(lstm).values()]
    slow = th.autograd.grad(loss(*oracle_lstm.forward(lstm, x, STEPWISE, STEPWISE_SCALE, hx, STARTS)), wanted)
    with perturbed(lstm, STEPWISE.flatten(), STEPWISE_SCALE.flatten()):
        y, after = lstm.forward_episodes(x, hx, STARTS)
    for a, b in zip(th.autograd.grad(loss(y, *after), wanted), slow, strict=True):
        th.testing.assert_close(a, b, **NEAR)


@every_lstm_noise
def test_gradients_of_held_keys(noise: dict[str, str]) -> None:
    lstm, x = make_lstm(**noise), sequences().requires_grad_()
    wanted = [x, *trained(lstm).values()]
    expected = oracle_lstm.forward(lstm, x, HELD.expand(T, -1), HELD_SCALE.expand(T, -1))
    slow = th.autograd.grad(loss(*expected), wanted)
    with perturbed(lstm, HELD, HELD_SCALE):
        y, after = lstm(x)
    for a, b in zip(th.autograd.grad(loss(y, *after), wanted), slow, strict=True):
        th.testing.assert_close(a, b, **NEAR)


@pytest.mark.parametrize("family", ["gaussian", "factorised", "multiplicative"])
@pytest.mark.parametrize("keys", [HELD.expand(T, -1), STEPWISE], ids=["held", "stepwise"])
def test_the_noise_of_every_step_reaches_sigma(family: str, keys: th.Tensor) -> None:
    """Sigma's gradient is the sum over steps, each with the noise of its own key; elsewhere only the last one's arrived."""
    lstm, x = make_lstm(family=family), sequences()
    sigmas = {name: value for name, value in lstm.named_parameters() if name.endswith("_sigma")}
    of_steps = [{name: value.detach().clone().requires_grad_() for name, value in sigmas.items()} for _ in range(T)]
    total = th.zeros(())
    for n in range(x.shape[1]):
        weights = [oracle_lstm.row_weights(lstm, int(keys[t, n]), 1.0, of_steps[t]) for t in range(T)]
        zeros = th.zeros(2, lstm.hidden_size, dtype=th.float64)
        y, _, _ = oracle_lstm.sequence(lstm, x[:, n], weights, (zeros, zeros), [False] * T)
        total = total + y.square().sum()
    leaves = [sigma for step in of_steps for sigma in step.values()]
    parts = th.stack([th.cat([g.flatten() for g in step]) for step in _steps(th.autograd.grad(total, leaves), len(sigmas))])
    with perturbed(lstm, keys.flatten()):
        found = th.autograd.grad(lstm(x)[0].square().sum(), list(sigmas.values()))
    flat = th.cat([g.flatten() for g in found])
    th.testing.assert_close(flat, parts.sum(0), **NEAR)
    assert all(float((flat - part).abs().max()) > 1e-3 for part in parts), "one step alone would have passed"


def _steps(gradients: Any, size: int) -> list[Any]:
    return [gradients[at : at + size] for at in range(0, len(gradients), size)]


@every_lstm_noise
def test_gradcheck(noise: dict[str, str]) -> None:
    lstm, keys = make_lstm(**noise), STEPWISE[:3, :2].flatten()
    parameters = trained(lstm)

    def run(x: th.Tensor, h: th.Tensor, c: th.Tensor, *values: th.Tensor) -> Any:
        with perturbed(lstm, keys, STEPWISE_SCALE[:3, :2].flatten()):
            y, after = th.func.functional_call(lstm, dict(zip(parameters, values, strict=True)), (x, (h, c)))
        return y, *after

    state = [of[:, :2].contiguous().requires_grad_() for of in states()]
    arguments = (sequences()[:3, :2].contiguous().requires_grad_(), *state, *parameters.values())
    assert gradcheck(run, arguments, fast_mode=True)
    assert gradgradcheck(run, arguments, fast_mode=True)


def test_full_gradcheck() -> None:
    """Entry by entry, with packed sequences of two lengths and keys that change."""
    lstm = make_lstm()
    parameters, given = trained(lstm), pack_padded_sequence(sequences(), th.tensor([3, 2, 2]))

    def run(x: th.Tensor, h: th.Tensor, c: th.Tensor, *values: th.Tensor) -> Any:
        with perturbed(lstm, th.tensor([5, -3, 77, 5, 8, 77, 9])):
            inputs = (given._replace(data=x), (h, c))
            y, after = th.func.functional_call(lstm, dict(zip(parameters, values, strict=True)), inputs)
        return y.data, *after

    state = [of.clone().requires_grad_() for of in states()]
    assert gradcheck(run, (given.data.clone().requires_grad_(), *state, *parameters.values()))


@every_lstm_noise
def test_second_derivatives_are_those_of_the_materialised_weights(noise: dict[str, str]) -> None:
    lstm, x = make_lstm(**noise), sequences().requires_grad_()
    wanted, found = [x, *trained(lstm).values()], []
    for of in ("fast", "slow"):
        with perturbed(lstm, STEPWISE.flatten(), STEPWISE_SCALE.flatten()):
            y, after = lstm(x)
        value = loss(y, *after) if of == "fast" else loss(*oracle_lstm.forward(lstm, x, STEPWISE, STEPWISE_SCALE))
        first = th.autograd.grad(value, wanted, create_graph=True)
        found.append(th.autograd.grad(sum((g * g.detach().cos()).sum() for g in first), wanted))
    for a, b in zip(*found, strict=True):
        th.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@every_lstm_noise
def test_a_redraw_between_forward_and_backward_changes_no_gradient(noise: dict[str, str]) -> None:
    lstm, x, gradients = make_lstm(**noise), sequences(), []
    for again in (False, True):
        redraw(lstm, 11)
        with perturbed(lstm, HELD, HELD_SCALE):
            value = lstm(x)[0].square().sum()
        if again:
            redraw(lstm)
            with perturbed(lstm, HELD + 1):
                lstm(x)
        gradients.append(th.autograd.grad(value, list(trained(lstm).values())))
    for a, b in zip(*gradients, strict=True):
        assert th.equal(a, b)


@pytest.mark.parametrize("noise_on", ["all", "hidden"])
def test_what_is_frozen_gets_no_gradient(noise_on: str) -> None:
    """Sigma learned at 0 has a gradient; frozen, it has none, and means have theirs."""
    for learn_sigma in (True, False):
        lstm = make_lstm(noise_on=noise_on, learn_sigma=learn_sigma)
        with th.no_grad():
            for name, value in lstm.named_parameters():
                if name.endswith("_sigma"):
                    value.zero_()
        with perturbed(lstm, HELD):
            lstm(sequences())[0].square().sum().backward()
        for name, value in lstm.named_parameters():
            if name.endswith("_sigma") and not learn_sigma:
                assert value.grad is None
            else:
                assert value.grad is not None and bool(value.grad.any()), name
