"""The estimator of evolution strategies, against explicit sums over members and against gradients that are known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_flipout.evolution import Group, Population, Told
from sb3_flipout.layers import FlipoutLayer, OneHotLinear, effective_weight, flipout_layers, perturb, perturbed
from sb3_flipout.layers.recurrent import FlipoutGRU
from sb3_flipout.noise import FAMILIES
from sb3_flipout.noise.families import NOISE_SHARINGS

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 4),
    "no bias": lambda: nn.Linear(5, 4, bias=False),
    "conv": lambda: nn.Conv2d(4, 6, (2, 3), groups=2),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(7, 3, padding_idx=2),
    "one-hot": lambda: OneHotLinear(7, 3),
    "gru": lambda: nn.GRU(3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
}
NOISES = [(family, sharing) for family in FAMILIES for sharing in NOISE_SHARINGS]


def network(kind: str, **noise: Any) -> nn.Module:
    with th.random.fork_rng(devices=[]):
        th.manual_seed(1)
        net = nn.Sequential(LAYERS[kind]()).double()
        perturb(net, base_key=5, **noise)
        for parameter in net.parameters():
            nn.init.normal_(parameter)
    return net


def gradients_by_hand(population: Population, groups: list[Group], utilities: th.Tensor) -> list[th.Tensor]:
    """Sum over members, each with its whole matrices written down."""
    total: dict[int, th.Tensor] = {}
    for group in groups:
        with group.members():
            pass  # leaves its base drawn
        for row, key, c in zip(range(group.rows.start, group.rows.stop), group.noise.keys, group.noise.scale, strict=True):
            number = 0
            for layer in population.layers:
                for block in layer.blocks:
                    seen = effective_weight(layer, key, float(c), block.weight)
                    for mean, weight, variance in zip(block.means(layer), seen, layer.variances(block), strict=True):
                        if mean is None or weight is None or variance is None:
                            continue
                        size = variance.mean() if layer.noise_config.spec.relative else variance
                        part = utilities[row] / population.size * (weight - mean) / (float(c) ** 2 * size)
                        total[number] = total.get(number, th.zeros_like(mean)) + part
                        number += 1
    return [total[number].detach() for number in sorted(total)]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("family", "sharing"), NOISES)
@pytest.mark.parametrize("bases", [1, 3])
def test_the_estimate_is_the_sum_over_members(kind: str, family: str, sharing: str, bases: int) -> None:
    net = network(kind, family=family, noise_sharing=sharing)
    population = Population(net, 12, seed=3, base_perturbations=bases, shaping="none")
    population.scale = 0.7
    groups = population.ask()
    fitness = th.randn(12, dtype=th.float64, generator=th.Generator().manual_seed(2))
    assert population.tell(fitness) == Told(12, 0, True)
    expected = gradients_by_hand(population, groups, fitness)
    means = [mean for layer in population.layers for mean in layer.means()]
    assert len(means) == len(expected)
    for mean, gradient in zip(means, expected, strict=True):
        assert mean.grad is not None
        th.testing.assert_close(mean.grad, -gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed", "embedding", "gru"])
@pytest.mark.parametrize("family", FAMILIES)
def test_variances_are_those_of_drawn_weights(kind: str, family: str) -> None:
    """Mean over the weights of squared perturbations over their variances: 1, within six standard errors (2e-9)."""
    net = network(kind, family=family)
    # So many draws show a variance that is wrong by 30 %; lowrank needs more, since a product of two normals has long tails.
    layer, draws = flipout_layers([net])[0], 1500 if family == "lowrank" else 400
    found = []
    for draw in range(draws):
        layer.redraw(draw)
        squares = []
        for block in layer.blocks:
            seen, means = effective_weight(layer, draw, 1.0, block.weight), block.means(layer)
            pairs = zip(seen, means, layer.variances(block), strict=True)
            squares += [
                ((w - m).square() / v)[v > 0] for w, m, v in pairs if w is not None and m is not None and v is not None
            ]
        found.append(th.cat([part.flatten() for part in squares]).detach().mean())
    samples = th.stack(found)
    if kind == "embedding":
        samples = samples * (7 / 6)  # the entry of padding_idx keeps its mean
    assert abs(float(samples.mean()) - 1) < 6 * float(samples.std()) / draws**0.5 + 1e-4


@pytest.mark.parametrize("sharing", ["flipout", "independent"])
@pytest.mark.parametrize("family", ["gaussian", "isotropic", "factorised", "lowrank"])
@pytest.mark.parametrize("antithetic", [True, False])
def test_it_is_unbiased_on_a_quadratic(family: str, sharing: str, antithetic: bool) -> None:
    """F(W) = -|W - 1|^2 / 2, whose smoothed gradient is 1 - W: false-fail rate 1e-6 over all weights."""
    from stats import assert_mean

    net = nn.Sequential(nn.Linear(3, 2)).double()
    perturb(net, family=family, noise_sharing=sharing, sigma_init=0.8)
    layer: Any = net[0]
    units = th.cat([th.zeros(1, 3), th.eye(3)]).double().expand(8, 4, 3)  # answered by a member's bias, and by its columns
    population = Population(net, 8, seed=1, antithetic=antithetic, shaping="none")
    estimates = []
    for _ in range(600):
        (group,) = population.ask()
        with group.members(), th.no_grad():
            answers = net(units)
        bias, columns = answers[:, :1], answers[:, 1:] - answers[:, :1]
        net.zero_grad()
        population.tell(-(th.cat([bias, columns], dim=1) - 1).square().sum((1, 2)) / 2)
        estimates.append(-th.cat([layer.weight.grad.flatten(), layer.bias.grad]))
    expected = 1 - th.cat([layer.weight.flatten(), layer.bias]).detach()
    assert_mean(th.stack(estimates), expected)


def test_a_population_learns_a_regression() -> None:
    th.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    perturb(net, sigma_init=0.1)
    x = th.randn(64, 3)
    y = x[:, :1] * x[:, 1:2]
    population, optimizer = Population(net, 256, seed=1), th.optim.Adam([p for p in net.parameters()], 0.02)

    def loss() -> float:
        return float((net(x) - y).square().mean().detach())

    before = loss()
    for _ in range(150):
        (group,) = population.ask()
        fitness = th.zeros(256)
        with th.no_grad():
            for n in range(0, 256, 64):
                keys = slice(n, n + 64)
                # Each member sees all inputs: 64 members, 64 inputs each, as rows with middle dimensions.
                with group.members(keys):
                    fitness[keys] = -(net(x.expand(64, 64, 3)) - y).square().mean(dim=(1, 2))
        optimizer.zero_grad()
        population.tell(fitness)
        optimizer.step()
    assert loss() < 0.3 * before


def test_generations_are_a_function_of_the_seed() -> None:
    net = network("linear")
    one, other, third = (Population(net, 4, seed=seed) for seed in (1, 1, 2))
    for population in (one, other, third):
        population.ask()
    (a,), (b,), (c,) = one.ask(), other.ask(), third.ask()
    assert th.equal(a.noise.keys, b.noise.keys) and a.base_key == b.base_key
    assert not th.equal(a.noise.keys, c.noise.keys) and a.base_key != c.base_key
    assert a.noise.keys.tolist()[::2] == a.noise.keys.tolist()[1::2] and a.noise.scale.tolist() == [1, -1, 1, -1]
    other.generation = 7  # a resumed one begins where it is told
    assert not th.equal(other.ask()[0].noise.keys, b.noise.keys)


def test_members_that_die_are_dropped_with_their_twins() -> None:
    net = network("linear")
    population = Population(net, 8, shaping="none")
    groups = population.ask()
    fitness = th.arange(8.0)
    fitness[3] = th.nan
    assert population.tell(fitness) == Told(6, 2, True)
    kept = th.tensor([0.0, 1.0, 0.0, 0.0, 4.0, 5.0, 6.0, 7.0]) * 8 / 6
    layer: Any = net[0]
    expected = gradients_by_hand(population, groups, kept.double())
    th.testing.assert_close(layer.weight.grad, -expected[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fitness", [th.full((8,), 2.0), th.full((8,), th.inf)])
def test_where_nothing_is_told_apart_nothing_is_done(fitness: th.Tensor) -> None:
    net = network("linear")
    population = Population(net, 8)
    population.ask()
    assert not population.tell(fitness).stepped
    assert all(parameter.grad is None for parameter in net.parameters())


def test_fitness_shapings() -> None:
    from sb3_flipout.evolution.shaping import SHAPINGS

    fitness, pairs = th.tensor([5.0, -1.0, 2.0, 2.0, 0.0, 9.0]), th.tensor([0, 0, 1, 1, 2, 2])
    assert SHAPINGS["centred_ranks"](fitness, pairs, 1.0).tolist() == pytest.approx([0.3, -0.5, 0.0, 0.0, -0.3, 0.5])
    assert SHAPINGS["none"](fitness, pairs, 1.0) is fitness
    normal = SHAPINGS["normalised"](fitness, pairs, 1.0)
    assert float(normal.mean()) == pytest.approx(0, abs=1e-6) and float(normal.std(correction=0)) == pytest.approx(1)
    top = SHAPINGS["top"](fitness, pairs, 0.5)  # two of three pairs: 0 and 2
    used = th.tensor([5.0, -1.0, 0.0, 9.0])
    assert top.tolist() == pytest.approx((fitness * th.tensor([1, 1, 0, 0, 1, 1]) * 1.5 / used.std(correction=0)).tolist())


def test_a_parametrised_layer_learns_through_its_parametrisation() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    perturb(net)
    population = Population(net, 8)
    population.ask()
    population.tell(th.arange(8.0))
    assert all(parameter.grad is not None for name, parameter in net.named_parameters() if "original" in name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(size=7), ValueError, r"size=7 must be a multiple of 2: pairs of members .* Use size=8, say"),
        (dict(size=8, base_perturbations=3), ValueError, r"size=8 must be a multiple of 6.*Use size=12"),
        (dict(size=8, antithetic=False, base_perturbations=3), ValueError, r"size=8 must be a multiple of 3: members"),
        (dict(size=1), ValueError, "size must be an integer >= 2, got 1"),
        (dict(size=8, shaping="ranks"), ValueError, "shaping must be one of"),
        (dict(size=8, top=0.5), ValueError, "top=0.5 has no effect with shaping='centred_ranks'"),
        (dict(size=8, top=0.0), ValueError, "top must be a finite number > 0 and <= 1"),
        (dict(size=8, antithetic=1), TypeError, "antithetic must be True or False"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Population(network("linear"), **arguments)


def test_a_plain_network_and_wrong_fitness_are_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no perturbed layer"):
        Population(nn.Sequential(nn.Linear(2, 2)), 4)
    population = Population(network("linear"), 4)
    with pytest.raises(RuntimeError, match="tell needs a generation"):
        population.tell(th.zeros(4))
    population.ask()
    with pytest.raises(TypeError, match="fitness must be a tensor, got list"):
        population.tell([1.0, 2.0, 3.0, 4.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fitness must have shape \(4,\).*got \(3,\)"):
        population.tell(th.zeros(3))


def test_what_it_is_tested_on_is_perturbed() -> None:
    assert all(isinstance(layer, FlipoutLayer) for layer in flipout_layers([network("gru"), network("conv")]))
    assert isinstance(network("gru")[0], FlipoutGRU)  # type: ignore[index]


def test_frozen_weights_stay_and_a_scale_of_0_is_no_step() -> None:
    net = perturb(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    net[0].bias.requires_grad_(False)
    population = Population(net, 8)
    population.ask()
    assert population.tell(th.arange(8.0)).stepped
    assert net[0].bias.grad is None and net[0].weight.grad is not None
    population.scale = 0.0
    population.ask()
    assert not population.tell(th.arange(8.0)).stepped


def test_a_part_of_a_network_is_searched_alone() -> None:
    """Also where the whole has been used under noise before, so that the part belongs to it."""
    body, head = nn.Linear(3, 4), nn.Linear(4, 1)
    whole = perturb(nn.Sequential(body, head), learn_sigma=False, base_key=5)
    before = body.base_key  # type: ignore[attr-defined]
    x = th.randn(12, 3)
    with perturbed(whole, th.arange(12)):
        whole(x)
    population = Population(head, 12, seed=3, shaping="none")
    (group,) = population.ask()
    hidden = nn.functional.linear(x, body.weight, body.bias)
    with group.members(), th.no_grad():
        found = whole(x)
    expected = [
        nn.functional.linear(row, *effective_weight(head, key, float(c)))
        for row, key, c in zip(hidden, group.noise.keys, group.noise.scale, strict=True)
    ]
    th.testing.assert_close(found, th.stack(expected))
    fitness = th.randn(12)
    population.tell(fitness)
    assert body.weight.grad is None and body.bias.grad is None and body.base_key == before  # type: ignore[attr-defined]
    for mean, gradient in zip((head.weight, head.bias), gradients_by_hand(population, [group], fitness), strict=True):
        th.testing.assert_close(mean.grad, -gradient)
