"""Numbers about weights, outputs and action distributions under noise, against cases computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch as th
from stats import z_bound
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_flipout import perturbed, redraw
from sb3_flipout.diagnostics import (
    base_kept,
    divergence,
    entropy_split,
    noise_deviation,
    noise_share,
    pairwise_disagreement,
    sigmas,
    signal_to_noise,
)
from sb3_flipout.layers import FlipoutConv2d, FlipoutLayer, FlipoutLinear
from sb3_flipout.noise import FAMILIES, fold_in

# ---- weights --------------------------------------------------------------------------------------------------------


def layer_of(kind: str, family: str, **noise: Any) -> FlipoutLayer:
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        layer = FlipoutLinear(6, 5, family=family, **noise) if kind == "fc" else FlipoutConv2d(2, 4, 3, family=family, **noise)
        for mean in layer.means():
            nn.init.normal_(mean)
    return layer


@pytest.mark.parametrize("sharing", ["flipout", "independent"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["fc", "conv"])
def test_deviation_is_that_of_drawn_weights(kind: str, family: str, sharing: str) -> None:
    """Squared perturbations over the squared deviation have the mean 1, for weights and for biases."""
    layer, scale, draws = layer_of(kind, family, noise_sharing=sharing), 0.7, 1000 if family == "lowrank" else 400
    deviation = noise_deviation(layer, scale)
    samples = []
    for number in range(draws):
        redraw(layer, number)
        weight, bias = layer.row_weights(fold_in(7, th.tensor([number])), th.full((1,), scale))
        moved = [weight[0] - layer.weight, bias[0] - layer.bias]
        samples.append(th.cat([part.flatten() for part in moved]).detach() / deviation)
    squares = th.stack(samples).double().square()
    for part in squares.split([layer.weight.numel(), layer.bias.numel()], dim=1):
        means = part.mean(1)
        error = means.std() / math.sqrt(draws)
        # A product of two normals has heavy tails, but each mean is over many weights, and many draws of them.
        assert abs(means.mean() - 1) <= z_bound() * error + 1e-5
        assert error < 0.05


def test_sigma_and_signal_to_noise_of_a_layer() -> None:
    layer = FlipoutLinear(2, 1)
    layer.weight.data, layer.bias.data = th.tensor([[3.0, -1.0]]), th.tensor([0.5])
    layer.weight_sigma.data, layer.bias_sigma.data = th.tensor([[-1.0, 2.0]]), th.tensor([0.0])
    assert sigmas(layer).tolist() == [1.0, 2.0, 0.0]
    assert noise_deviation(layer, 0.5).tolist() == [0.5, 1.0, 0.0]
    assert signal_to_noise(layer, 0.5).tolist() == [6.0, 1.0]  # the bias has no noise
    assert len(signal_to_noise(layer, 0.0)) == 0


def test_families_with_another_sigma() -> None:
    assert sigmas(FlipoutLinear(2, 1, family="dropconnect")) is None
    isotropic = FlipoutLinear(4, 1, family="isotropic")
    assert sigmas(isotropic).tolist() == [0.25]  # 0.5 / sqrt(4)
    assert noise_deviation(isotropic, 2.0).tolist() == [0.5] * 5
    relative = layer_of("fc", "multiplicative", sigma_init=0.25)
    assert signal_to_noise(relative, 2.0).tolist() == pytest.approx([2.0] * 35)  # 1 / (2 * 0.25), whatever the weight


def test_bases_are_bound_again_and_not_drawn() -> None:
    layer = layer_of("fc", "gaussian")
    redraw(layer, 0)  # which numbers it
    layer.bind((99, {"weight_base": th.ones(5, 6), "bias_base": th.ones(5)}))
    with base_kept(layer):
        redraw(layer, 3)
        assert not th.equal(layer.bases()[1]["weight_base"], th.ones(5, 6))
    base_key, bases = layer.bases()
    assert base_key == layer.base_key == 99
    assert th.equal(bases["weight_base"], th.ones(5, 6)) and th.equal(bases["bias_base"], th.ones(5))


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_share_of_four_outputs() -> None:
    # Two draws of two inputs: variance 2 by noise; means 1 and 3 have variance 2, of which 2 / 2 is left by the noise.
    assert noise_share(th.tensor([[2.0, 4.0], [0.0, 2.0]])) == pytest.approx(2 / 3)
    assert noise_share(th.tensor([[1.0, 3.0], [1.0, 3.0]])) == 0
    assert noise_share(th.tensor([[1.0, 1.0], [3.0, 3.0]])) == 1
    assert math.isnan(noise_share(th.ones(2, 2)))
    # Entries are added up: the second one has noise alone, of variance 2.
    outputs = th.tensor([[[2.0, 1.0], [4.0, 1.0]], [[0.0, -1.0], [2.0, -1.0]]])
    assert noise_share(outputs) == pytest.approx((2 + 2) / (2 + 2 + 2 + 0 - 4 / 2))


def test_share_of_a_linear_layer() -> None:
    """y = sum of x_i (w_i + noise): by noise sd^2 (|x|^2 + 1), by inputs the variance of the mean output."""
    layer, n, draws = layer_of("fc", "gaussian"), 200, 400
    x = th.randn(n, 6, generator=th.Generator().manual_seed(0))
    outputs = []
    with th.no_grad():
        for number in range(draws):
            redraw(layer, number)
            with perturbed(layer, fold_in(number, th.arange(n))):
                outputs.append(layer(x))
        means = layer(x)
    by_noise = 5 * float((0.25 / 6) * (x.square().sum(1) + 1).mean())
    by_input = float(means.var(0).sum())
    # 80,000 draws of rows: relative error of a variance below sqrt(2 * 3 / 80000) = 0.9 %, at 5 sigma 4.5 %.
    assert noise_share(th.stack(outputs)) == pytest.approx(by_noise / (by_noise + by_input), rel=0.045)


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1)])
def test_share_needs_two_of_each(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 of each or more"):
        noise_share(th.ones(shape))


# ---- actions --------------------------------------------------------------------------------------------------------

SURE = th.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # two draws that are sure of different actions, (draws, rows, actions)


def test_entropy_of_sure_but_different_draws_is_that_of_the_weights() -> None:
    split = entropy_split([Categorical(probs=SURE)])
    assert split == pytest.approx((math.log(2), 0, math.log(2)), abs=1e-5)
    assert entropy_split([Bernoulli(probs=SURE)]) == pytest.approx((2 * math.log(2), 0, 2 * math.log(2)), abs=1e-5)


def test_entropy_of_equal_draws_is_that_of_actions() -> None:
    even = Categorical(probs=th.full((3, 5, 4), 0.25))
    assert entropy_split([even]) == pytest.approx((math.log(4), math.log(4), 0), abs=1e-6)
    assert entropy_split([even, even]) == pytest.approx((2 * math.log(4), 2 * math.log(4), 0), abs=1e-6)


def test_entropy_of_a_mixture_by_hand() -> None:
    # Probabilities 1/2 and 1/4 of the first action: the mixture has 3/8.
    given = Categorical(probs=th.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]))
    h = lambda p: -p * math.log(p) - (1 - p) * math.log(1 - p)  # noqa: E731
    action = (h(0.5) + h(0.25)) / 2
    assert entropy_split([given]) == pytest.approx((h(0.375), action, h(0.375) - action), abs=1e-6)


def test_entropy_of_normal_draws() -> None:
    # Means +1 and -1 with deviation 1, in both components: variance 2 in all.
    given = Normal(th.tensor([[[1.0, 1.0]], [[-1.0, -1.0]]]), th.ones(2, 1, 2))
    one = 0.5 * math.log(2 * math.pi * math.e)
    assert entropy_split([given]) == pytest.approx((2 * one + math.log(2), 2 * one, math.log(2)), abs=1e-6)


def test_divergence_by_hand() -> None:
    reference = Normal(th.zeros(2, 1, 2), th.ones(2, 1, 2))
    given = Normal(th.tensor([[[1.0, 0.0]], [[2.0, 0.0]]]), th.ones(2, 1, 2))
    assert divergence([reference], [given]) == pytest.approx((0.5 + 2.0) / 2)
    p, q = th.tensor([[[0.5, 0.5]]]), th.tensor([[[0.25, 0.75]]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergence([Categorical(probs=p)], [Categorical(probs=q)]) == pytest.approx(expected)
    assert divergence([Categorical(probs=p)] * 2, [Categorical(probs=q)] * 2) == pytest.approx(2 * expected)


def test_divergence_of_probabilities_that_round_to_nothing_is_finite() -> None:
    # 200 nats are more than float32 has for a probability: 0.5 log(0.5) + 0.5 (log(0.5) + 200).
    even, sure = th.zeros(1, 1, 2), th.tensor([[[200.0, 0.0]]])
    expected = 100 - math.log(2)
    assert divergence([Categorical(logits=even)], [Categorical(logits=sure)]) == pytest.approx(expected)
    assert divergence([Bernoulli(logits=even[..., :1])], [Bernoulli(logits=sure[..., :1])]) == pytest.approx(expected)
    # What has no chance at all adds nothing in the reference, and is infinitely far in the other.
    never = th.tensor([[[0.0, -math.inf]]])
    assert divergence([Categorical(logits=never)], [Categorical(logits=even)]) == pytest.approx(math.log(2))
    assert divergence([Categorical(logits=even)], [Categorical(logits=never)]) == math.inf


def test_pairs_that_disagree_are_counted() -> None:
    assert pairwise_disagreement(th.tensor([[0], [0], [1]])) == pytest.approx(2 / 3)
    assert pairwise_disagreement(th.tensor([[0, 1], [0, 2]])) == pytest.approx(1 / 2)
    assert pairwise_disagreement(th.tensor([[[0, 1]], [[0, 2]]])) == 1
    with pytest.raises(ValueError, match="2 draws or more"):
        pairwise_disagreement(th.tensor([[0, 1]]))
