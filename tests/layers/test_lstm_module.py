"""FlipoutLSTM as a module: the plain nn.LSTM it is without noise, conversion and back, copies, settings, what is refused."""

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch as th
from cases import every_family
from lstm_cases import HELD, HELD_SCALE, H, I, N, T, every_lstm_noise, make_lstm, sequences, states
from stats import FALSE_FAIL, hoeffding
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from sb3_flipout.diagnostics import gradient_variance
from sb3_flipout.layers import (
    NOISYNET_SIGMA,
    FlipoutGRU,
    FlipoutLayer,
    FlipoutLinear,
    FlipoutLSTM,
    effective_weight,
    network_of,
    perturb,
    perturbed,
    redraw,
    restore,
)

NAMES = [f"{what}_{kind}_l{layer}" for layer in range(2) for what in ("weight", "bias") for kind in ("ih", "hh")]


def plain_twin(lstm: FlipoutLSTM) -> nn.LSTM:
    options = {name: getattr(lstm, name) for name in ("num_layers", "bias", "batch_first", "dropout")}
    twin = nn.LSTM(lstm.input_size, lstm.hidden_size, dtype=lstm.like.dtype, **options)
    twin.load_state_dict({name: value for name, value in lstm.state_dict().items() if "sigma" not in name})
    return twin


def zero_sigma(lstm: nn.Module) -> None:
    with th.no_grad():
        for name, value in lstm.named_parameters():
            if name.endswith("_sigma"):
                value.zero_()


def flat(found: Any) -> list[th.Tensor]:
    """Output, packed or not, and states."""
    y, (h, c) = found
    return [getattr(y, "data", y), h, c]


def output(net: nn.Module, x: th.Tensor | None = None) -> th.Tensor:
    with perturbed(net, HELD, HELD_SCALE):
        return flat(net(sequences() if x is None else x))[0].detach()


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert th.equal(a, b)


# ---- without noise it is nn.LSTM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False, "num_layers": 1}, {"dropout": 0.5}], ids=str)
def test_without_noise_it_is_the_plain_lstm(options: dict[str, Any]) -> None:
    lstm = make_lstm(dtype=th.float32, **options)
    twin, x, hx = plain_twin(lstm), sequences(th.float32), states(lstm.num_layers, th.float32)
    x = x.transpose(0, 1) if lstm.batch_first else x
    packed = pack_padded_sequence(x, th.tensor([2, 4, 1]), lstm.batch_first, enforce_sorted=False)
    for training in (True, False):
        lstm.train(training), twin.train(training)
        for given in ((x,), (x, hx), (packed,), (packed, hx), (x[0],)):
            found = []
            for net in (lstm, twin):
                th.manual_seed(0)
                found.append(net(*given))
            assert_equal(*found)
            with perturbed(lstm, HELD), perturbed(lstm, None):
                th.manual_seed(0)
                assert_equal(lstm(*given), found[1])


@every_lstm_noise
def test_sigma_frozen_at_zero_is_the_plain_lstm_bit_for_bit(noise: dict[str, str]) -> None:
    """With nn.LSTM's fused operations, whose sums are rounded in another order than a loop's."""
    lstm = make_lstm(dtype=th.float32, learn_sigma=False, **noise)
    zero_sigma(lstm)
    twin, x = plain_twin(lstm), sequences(th.float32)
    with perturbed(lstm, HELD):
        found = lstm(x)
    if noise["family"] == "dropconnect":  # has no sigma that could be 0
        assert not th.allclose(found[0], twin(x)[0])
        return
    assert_equal(found, twin(x))
    for net in (lstm, twin):
        net.zero_grad()
    with perturbed(lstm, HELD):
        lstm(x)[0].square().sum().backward()
    twin(x)[0].square().sum().backward()
    for name, value in twin.named_parameters():
        assert th.equal(getattr(lstm, name).grad, value.grad)
    with th.no_grad():
        lstm.get_parameter("weight_hh_l1_sigma").view(-1)[-1:].fill_(0.5)  # one number is enough
    with perturbed(lstm, HELD):
        assert not th.allclose(lstm(x)[0], twin(x)[0])


@every_lstm_noise
def test_scale_zero_and_learned_sigma_zero_are_the_plain_lstm(noise: dict[str, str]) -> None:
    lstm, x, hx = make_lstm(**noise), sequences(), states()
    expected = flat(plain_twin(lstm)(x, hx))
    with perturbed(lstm, HELD, 0.0):
        for a, b in zip(flat(lstm(x, hx)), expected, strict=True):
            th.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with perturbed(lstm, HELD, th.tensor([0.0, 1.0, 0.0])):
        y = lstm(x, hx)[0]
    th.testing.assert_close(y[:, ::2], expected[0][:, ::2], rtol=0, atol=1e-12)
    assert not th.allclose(y[:, 1], expected[0][:, 1])


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_between_layers_is_that_of_nn_lstm(packed: bool) -> None:
    """The same draws from torch's generator, in training mode only."""
    lstm = make_lstm(num_layers=3, dropout=0.4)
    twin, x = plain_twin(lstm), sequences()
    given = pack_padded_sequence(x, th.tensor([2, 4, 1]), enforce_sorted=False) if packed else x
    for training in (True, False):
        lstm.train(training), twin.train(training)
        found, after = [], []
        for net in (lstm, twin):
            th.manual_seed(0)
            with perturbed(lstm, HELD, 0.0):
                found.append(flat(net(given)))
            after.append(th.get_rng_state())
        assert th.equal(*after)
        for a, b in zip(*found, strict=True):
            th.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_forward_draws_nothing_without_dropout(untouched_rng: None) -> None:
    with th.random.fork_rng():
        lstm = make_lstm()
    with perturbed(lstm, HELD):
        lstm.train()(sequences())[0].sum().backward()
    redraw(lstm)


@pytest.mark.parametrize("batch_first", [False, True])
def test_episodes_without_noise_are_those_of_recurrent_ppo(batch_first: bool) -> None:
    policies = pytest.importorskip("sb3_contrib.common.recurrent.policies")
    twin = plain_twin(make_lstm(dtype=th.float32))
    lstm, hx = perturb(copy.deepcopy(twin)), states(dtype=th.float32)
    features = sequences(th.float32).transpose(0, 1)  # (N, T, F), as the policy gets them
    some = th.zeros(N, T)
    some[1, 2] = some[0, 0] = some[0, 3] = 1.0
    for starts in (some, th.zeros(N, T)):
        process = policies.RecurrentActorCriticPolicy._process_sequence
        expected, after = process(features.flatten(0, 1), hx, starts.flatten(), twin)
        y, found = lstm.forward_episodes(features, hx, starts, batch_first=True)
        assert_equal((y.flatten(0, 1), found), (expected, after))
        if batch_first:
            lstm.batch_first = True
        y, found = lstm.forward_episodes(features.transpose(0, 1), hx, starts.T, batch_first=False)
        assert_equal((y.transpose(0, 1).flatten(0, 1), found), (expected, after))


def test_episodes_without_noise_run_the_fused_operation_over_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    lstm, x, calls = make_lstm(), sequences(), []
    forward = nn.LSTM.forward
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, x, hx=None: (calls.append(len(x)), forward(self, x, hx))[1])
    for starts, expected in ((None, [T]), (th.zeros(T, N), [T]), (th.eye(T, N), [1] * T)):
        calls.clear()
        lstm.forward_episodes(x, None, starts)
        assert calls == expected


# ---- construction and conversion ------------------------------------------------------------------------------------


def test_constructor_draws_and_names_as_nn_lstm_does() -> None:
    th.manual_seed(0)
    plain = nn.LSTM(I, H, 2)
    th.manual_seed(0)
    lstm = FlipoutLSTM(I, H, 2)
    assert list(lstm.state_dict())[: len(NAMES)] == list(plain.state_dict())
    assert sorted(lstm.state_dict()) == sorted(NAMES + [f"{name}_sigma" for name in NAMES])
    for name, value in plain.state_dict().items():
        assert th.equal(lstm.state_dict()[name], value)
    sigma = lstm.weight_hh_l0_sigma.clone()
    th.manual_seed(1), plain.reset_parameters()
    th.manual_seed(1), lstm.reset_parameters()
    assert th.equal(lstm.weight_hh_l1, plain.weight_hh_l1) and th.equal(lstm.weight_hh_l0_sigma, sigma)


def test_sigma_is_in_units_of_each_weights_own_inputs() -> None:
    lstm = FlipoutLSTM(16, 4, 2, sigma_init=0.3)
    for name, inputs in (("ih_l0", 16), ("hh_l0", 4), ("ih_l1", 4), ("hh_l1", 4)):
        for what in ("weight", "bias"):
            sigma = lstm.get_parameter(f"{what}_{name}_sigma")
            th.testing.assert_close(sigma, th.full_like(sigma, 0.3 / math.sqrt(inputs)))


@every_family
def test_sigmas_of_families(family: str) -> None:
    for options in ({}, {"bias": False}):
        lstm = make_lstm(family=family, **options)
        kinds = {name: value for name, value in lstm.named_parameters() if name.endswith("_sigma")}
        per_weight = family in ("gaussian", "factorised", "multiplicative")
        weights, biases = (4, 0 if options else 4) if family != "dropconnect" else (0, 0)
        assert len(kinds) == weights + (biases if per_weight else 0)
        assert all(value.requires_grad == per_weight for value in kinds.values())
        assert family != "isotropic" or all(value.dim() == 0 for value in kinds.values())


@pytest.mark.parametrize(("family", "numerator"), [("gaussian", 3.0), ("factorised", 1.0)])
def test_noisynet_initialisation(family: str, numerator: float) -> None:
    lstm = FlipoutLSTM(64, 16, family=family, init="noisynet", noise_on="hidden")
    bound = math.sqrt(numerator / 16)
    flattened = lstm.weight_hh_l0.detach().flatten() / bound
    assert flattened.abs().max() <= 1 and flattened.abs().max() > 1 - math.log(1 / FALSE_FAIL) / flattened.numel()
    assert abs(flattened.mean()) <= hoeffding(flattened.numel())
    assert lstm.weight_ih_l0.abs().max() <= 0.25, "weights without noise keep nn.LSTM's initialisation"
    expected = NOISYNET_SIGMA if family == "gaussian" else 0.5 / 4
    assert float(lstm.weight_hh_l0_sigma.detach()[0, 0]) == pytest.approx(expected)


@pytest.mark.parametrize("layers", ["all", "hidden"])
@every_lstm_noise
def test_perturb_and_restore_in_place(layers: str, noise: dict[str, str]) -> None:
    net = nn.Sequential(nn.LSTM(I, H, 2))
    plain, before = net[0](sequences(th.float32)), set(vars(net[0]))
    parameters, books = dict(net.named_parameters()), [list(net[0]._parameters), list(net[0]._buffers)]
    assert perturb(net, layers, **noise) is net and type(net[0]) is FlipoutLSTM
    now = dict(net.named_parameters())
    assert all(now[name] is value for name, value in parameters.items())
    new = {name.removeprefix("0.") for name in set(now) - set(parameters)}
    assert new <= {f"{name}_sigma" for name in NAMES if layers == "all" or "_hh_" in name}
    assert set(net.state_dict()) == set(now), "the base is not saved"
    assert_equal(net[0](sequences(th.float32)), plain)
    assert not th.equal(output(net, sequences(th.float32)), plain[0])
    redraw(net)
    assert restore(net) is net and type(net[0]) is nn.LSTM
    assert set(vars(net[0])) == before and not net[0]._non_persistent_buffers_set
    assert [list(net[0]._parameters), list(net[0]._buffers)] == books
    assert all(value is parameters[name] for name, value in net.named_parameters())
    assert_equal(net[0](sequences(th.float32)), plain)


@every_lstm_noise
def test_a_converted_lstm_is_a_constructed_one(noise: dict[str, str]) -> None:
    for options in ({}, {"noise_on": "hidden"}):
        constructed = make_lstm(**options, **noise)
        constructed.noise_index = 0
        redraw(constructed, 11)
        converted = perturb(nn.LSTM(I, H, 2, dtype=th.float64), options.get("noise_on", "all"), base_key=11, **noise)
        converted.load_state_dict(constructed.state_dict())
        assert repr(converted) == repr(constructed)
        assert th.equal(output(converted), output(constructed))


def test_layers_choices() -> None:
    net = nn.ModuleList([nn.Linear(2, 2), nn.LSTM(2, 2), nn.Conv2d(1, 1, 1), nn.GRU(2, 2), nn.LSTMCell(2, 2)])
    perturb(net, layers="linear")
    assert [type(layer) for layer in net][:2] == [FlipoutLinear, nn.LSTM]
    perturb(net, layers="hidden")
    assert net[1].noise_on == "hidden" and "noise_on='hidden'" in repr(net[1]) and type(net[2]) is nn.Conv2d
    assert net[3].noise_on == "hidden" and type(net[3]) is FlipoutGRU
    perturb(net, layers="hidden")
    perturb(net, layers="linear")
    with pytest.raises(ValueError, match="FlipoutLSTM is already perturbed with noise_on='hidden', not 'all'; call restore"):
        perturb(net)
    assert type(net[2]) is nn.Conv2d
    with pytest.warns(UserWarning, match=r"stay plain.* 4: LSTMCell has no perturbed version\. .*skip=\['4'\]") as warned:
        perturb(restore(net))
    assert len(warned) == 1
    kinds = [isinstance(layer, FlipoutLayer) for layer in net]
    assert kinds == [True, True, True, True, False] and "noise_on" not in repr(net)
    assert [layer.noise_index for layer in net[:4]] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="has no layer to perturb with layers='hidden', which stands for: LSTM, GRU"):
        perturb(nn.Linear(2, 2), layers="hidden")


@pytest.mark.parametrize("option", [{"bidirectional": True}, {"proj_size": 2}], ids=lambda option: next(iter(option)))
def test_options_that_cannot_be_served_are_named(option: dict[str, Any]) -> None:
    (name, value), *_ = option.items()
    match = rf"FlipoutLSTM cannot serve {name}={value}; use .*{name}=(False|0)\b"
    with pytest.raises(ValueError, match=match):
        FlipoutLSTM(I, H, **option)
    net = nn.Sequential(nn.Linear(I, I), nn.LSTM(I, H, **option))
    why = rf" 1: LSTM .*{name}={value}"
    with pytest.raises(ValueError, match=rf"has no layer to perturb with layers='hidden', .*{why}"):
        perturb(net, layers="hidden")
    assert [type(layer) for layer in net] == [nn.Linear, nn.LSTM], "nothing is half changed"
    with pytest.warns(UserWarning, match=rf"some layers stay plain.*{why}.*skip=\['1'\]") as warned:
        perturb(net)
    assert len(warned) == 1 and [type(layer) for layer in net] == [FlipoutLinear, nn.LSTM]
    perturb(restore(net), layers="linear")  # says what it wants, so there is nothing to warn of
    assert [type(layer) for layer in net] == [FlipoutLinear, nn.LSTM]


@pytest.mark.parametrize("noise_on", ["input", None, "weight_hh_l0"])
def test_unknown_choice_of_weights_is_refused(noise_on: Any) -> None:
    with pytest.raises(ValueError, match='noise_on must be one of "all", "hidden", got ' + repr(noise_on)):
        FlipoutLSTM(I, H, noise_on=noise_on)
    with pytest.raises(TypeError, match="unknown noise setting 'sigma'"):
        FlipoutLSTM(I, H, sigma=0.1)
    with pytest.raises(TypeError, match="unknown noise setting 'noise_on'"):
        FlipoutLinear(I, H, noise_on=noise_on)


# ---- copies, states, types, networks --------------------------------------------------------------------------------


@every_lstm_noise
def test_copies_and_saved_states(noise: dict[str, str]) -> None:
    lstm = make_lstm(**noise)
    expected, stream = output(lstm), io.BytesIO()
    th.save(lstm, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), th.load(stream, weights_only=False)):
        assert th.equal(output(twin), expected)
        assert_equal(twin(sequences()), lstm(sequences()))
        assert all(buffer is None or buffer.untyped_storage().nbytes() < 1000 for buffer in twin._buffers.values())
        with th.no_grad():
            twin.weight_hh_l0.add_(1.0)  # the copy's own, in its list of flat weights too
        assert not th.allclose(twin(sequences())[0], lstm(sequences())[0])
        redraw(twin)
    assert th.equal(output(lstm), expected)
    other = make_lstm(seed=4, **noise)
    other.load_state_dict(lstm.state_dict())
    redraw(other, 11)
    assert th.equal(output(other), expected)


@every_lstm_noise
def test_changing_the_type_keeps_the_noise(noise: dict[str, str]) -> None:
    lstm = make_lstm(dtype=th.float32, **noise)
    single = output(lstm, sequences(th.float32))
    assert_equal(lstm.double()(sequences()), plain_twin(lstm)(sequences()))
    th.testing.assert_close(output(lstm).float(), single, rtol=1e-3, atol=1e-4)
    lstm.bfloat16()
    th.testing.assert_close(output(lstm, sequences(th.bfloat16)).float(), single, rtol=0.2, atol=0.4)


def test_autocast_is_the_same_up_to_rounding() -> None:
    lstm, x = make_lstm(dtype=th.float32), sequences(th.float32)
    exact = output(lstm, x)
    with th.autocast("cpu", dtype=th.bfloat16):
        rough = output(lstm, x)
    th.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.3)


class Net(nn.Module):
    """An LSTM between linear layers; takes (N, T, 4), gives (N, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.lstm, self.head = nn.Linear(4, I), nn.LSTM(I, H, batch_first=True), nn.Linear(H, 2)

    def forward(self, x: th.Tensor) -> th.Tensor:
        last: th.Tensor = self.head(self.lstm(self.before(x).tanh())[0][:, -1])
        return last


@every_lstm_noise
def test_a_network_around_it(noise: dict[str, str]) -> None:
    """One plan for all its layers, of which the LSTM has several vectors."""
    net = perturb(Net().double(), base_key=4, **noise)
    x = th.randn(N, T, 4, dtype=th.float64, generator=th.Generator().manual_seed(8))
    with perturbed(net, HELD, HELD_SCALE):
        found = net(x)
    for n, (key, scale) in enumerate(zip(HELD.tolist(), HELD_SCALE.tolist(), strict=True)):
        plain, weights = Net().double(), {}
        for layer in ("before", "head"):
            weights[f"{layer}.weight"], weights[f"{layer}.bias"] = effective_weight(getattr(net, layer), key, scale)
        for kind in ("ih_l0", "hh_l0"):
            pair = effective_weight(net.lstm, key, scale, name=f"weight_{kind}")
            weights[f"lstm.weight_{kind}"], weights[f"lstm.bias_{kind}"] = pair
        th.testing.assert_close(th.func.functional_call(plain, weights, (x[n : n + 1],))[0], found[n], rtol=0, atol=1e-10)


def test_bases_can_be_bound_again() -> None:
    for options in ({}, {"bias": False}, {"noise_on": "hidden"}, {"family": "factorised"}):
        lstm = make_lstm(**options)
        network, before = network_of(lstm), output(lstm)
        kept = network.bases()
        redraw(lstm)
        assert th.equal(output(lstm), before) == (lstm.noise_config.spec.base is None)
        network.bind(kept)
        assert th.equal(output(lstm), before)


@every_lstm_noise
def test_blocks_have_draws_of_their_own(noise: dict[str, str]) -> None:
    """Weights of one shape in one layer and in the next; no entry of the noise is another's."""
    lstm = FlipoutLSTM(8, 8, 2, dtype=th.float64, **noise)
    with th.no_grad():
        for value in lstm.parameters():
            value.fill_(1.0)
    redraw(lstm, 5)
    drawn = [effective_weight(lstm, 7, name=block.weight)[0].detach() - 1.0 for block in lstm.blocks]
    for at, one in enumerate(drawn):
        for other in drawn[at + 1 :]:
            assert not th.allclose(one, other) and not th.allclose(one, -other)
            correlation = th.corrcoef(th.stack([one.flatten(), other.flatten()]))[0, 1]
            assert abs(float(correlation)) < 0.5  # 256 entries: eight standard deviations


def test_gradient_variance_of_a_network_with_an_lstm() -> None:
    net = perturb(Net(), sigma_init=0.5)
    x = th.randn(8, T, 4, generator=th.Generator().manual_seed(8))
    found = gradient_variance(net, lambda network, batch: network(batch[0]).square().mean(), [x], 5)
    assert found.value > 0 and math.isfinite(found.error)


# The LSTM is left out of the graph, and dynamo looks at .grad of what comes from there, which makes torch warn.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("sharing", ["flipout", "shared", "independent"])
def test_a_network_around_it_compiles(sharing: str) -> None:
    net = perturb(Net(), noise_sharing=sharing)
    x = th.randn(N, T, 4, generator=th.Generator().manual_seed(8))
    th._dynamo.reset()
    compiled = th.compile(net, backend="eager")
    for keys in (HELD, HELD + 1, None):
        with perturbed(net, keys):
            found = [(y, th.autograd.grad(y.sum(), net.lstm.weight_hh_l0)[0]) for y in (compiled(x), net(x))]
        for a, b in zip(*found, strict=True):
            th.testing.assert_close(a, b)
    th._dynamo.reset()
