"""The divergence of noisy weights from a prior, against torch's own, weight by weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as of_torch

from sb3_flipout import kl_divergence, perturb
from sb3_flipout.layers import flipout_layers

NETS: dict[str, Any] = {
    "linear": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)),
    "conv": lambda: nn.Conv2d(4, 6, (2, 3), groups=2),
    "lstm": lambda: nn.LSTM(3, 4),
    "embedding": lambda: nn.Embedding(7, 3),
}


def perturbed_net(name: str, family: Any = "gaussian") -> nn.Module:
    th.manual_seed(0)
    net = perturb(NETS[name]().double(), family=family, sigma_init=0.3)
    with th.no_grad():
        for parameter_name, parameter in net.named_parameters():
            if parameter_name.endswith("sigma"):  # each another, and some negative
                parameter.mul_(th.randn(parameter.shape, dtype=th.float64))
    return net


def slowly(net: nn.Module, prior: float) -> th.Tensor:
    total = th.zeros((), dtype=th.float64)
    for layer in flipout_layers([net]):
        spec = layer.noise_config.spec
        for block in layer.blocks:
            weight, bias = block.means(layer)
            fan_in = weight[0].numel() if not isinstance(layer, nn.Embedding) else layer.fan_in(block)
            sigma, bias_sigma = block.sigmas(layer)
            bias_sigma = sigma if spec.sigma == "per_layer" else bias_sigma
            for mean, own, scale in ((weight, sigma, prior / fan_in**0.5), (bias, bias_sigma, prior)):
                if mean is not None:
                    own = own.abs() * (mean.abs() if spec.relative else 1)
                    total = total + of_torch(Normal(mean, own.expand_as(mean)), Normal(0.0, scale)).sum()
    return total


@pytest.mark.parametrize("family", ["gaussian", "multiplicative", "isotropic"])
@pytest.mark.parametrize("name", NETS)
def test_it_is_torchs(name: str, family: Any) -> None:
    net = perturbed_net(name, family)
    for prior in (0.5, 2.0):
        found, expected = kl_divergence(net, prior), slowly(net, prior)
        assert found.shape == () and float(found.detach()) > 0
        th.testing.assert_close(found, expected)
        parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
        gradients = [th.autograd.grad(one, parameters, allow_unused=True) for one in (found, expected)]
        for one, other in zip(*gradients, strict=True):
            th.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # torch's own squares ratios of small sigmas


def test_at_the_prior_it_is_zero() -> None:
    net = perturb(nn.Linear(16, 3).double(), sigma_init=1.0)
    with th.no_grad():
        net.weight.zero_(), net.bias.zero_()
        net.weight_sigma.fill_(0.5 / 4), net.bias_sigma.fill_(0.5)
    assert float(kl_divergence(net, 0.5).detach()) == pytest.approx(0, abs=1e-12)


def test_a_part_of_a_network() -> None:
    net = perturbed_net("linear")
    parts = [kl_divergence(layer, 1.0) for layer in (net[0], net[2])]  # type: ignore[index]
    th.testing.assert_close(kl_divergence(net, 1.0), parts[0] + parts[1])


@pytest.mark.parametrize(
    ("net", "prior", "error", "match"),
    [
        (nn.Linear(2, 2), 1.0, ValueError, "has no perturbed layers; call sb3_flipout.perturb"),
        (
            perturb(nn.Linear(2, 2), family="factorised"),
            1.0,
            ValueError,
            "are not normal; their family must be one of gaussian",
        ),
        (perturb(nn.Linear(2, 2), family="dropconnect"), 1.0, ValueError, "are not normal"),
        (perturb(nn.Linear(2, 2), sigma_init=0.0), 1.0, ValueError, "a sigma is 0 or not finite"),
        (perturb(nn.Linear(2, 2)), 0.0, ValueError, "prior must be"),
        (perturb(nn.Linear(2, 2)), "1", TypeError, "prior must be"),
    ],
)
def test_bad_input_is_refused(net: nn.Module, prior: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        kl_divergence(net, prior)
