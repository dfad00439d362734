"""Settings of a layer: what is refused, units and defaults of sigma, initialisation after Fortunato et al. 2018."""

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch as th
from cases import every_family, every_noise
from stats import FALSE_FAIL, hoeffding
from torch import nn

from sb3_flipout.layers import NOISYNET_SIGMA, FlipoutConv2d, FlipoutLinear, LayerNoise, perturb
from sb3_flipout.noise import FAMILIES

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"family": "gauss"},
        ValueError,
        "family must be one of " + ", ".join(f'"{name}"' for name in FAMILIES) + r", got 'gauss'\. Did you mean 'gaussian'\?",
    ),
    ({"family": ["gaussian"]}, ValueError, "family must be one of"),
    ({"family": None}, ValueError, "got None"),
    ({"noise_sharing": "rows"}, ValueError, 'noise_sharing must be one of "flipout", "shared", "independent", got \'rows\''),
    ({"init": "zero"}, ValueError, 'init must be one of "keep", "noisynet", got \'zero\''),
    ({"sigma_init": -0.1}, ValueError, "sigma_init must be a finite number >= 0, got -0.1. .*None for the default"),
    ({"sigma_init": math.nan}, ValueError, "got nan"),
    ({"sigma_init": math.inf}, ValueError, "got inf"),
    ({"sigma_init": True}, TypeError, "sigma_init must be a number >= 0, got True of type bool. .*None for the default"),
    ({"sigma_init": -1}, ValueError, "got -1. Use 0.0 for no perturbation, None for the default.$"),
    ({"learn_sigma": "no"}, TypeError, "^learn_sigma must be True or False, got 'no' of type str; pass learn_sigma=True or"),
    ({"sigma_init": "0.5"}, TypeError, "got '0.5' of type str"),
    ({"sigma_init": th.tensor(0.5)}, TypeError, "got .* of type Tensor"),
    ({"family": "dropconnect", "sigma_init": 0.5}, ValueError, "there is no sigma"),
    ({"family": "dropconnect", "sigma_init": 0}, ValueError, "there is no sigma"),
    ({"init": "noisynet", "sigma_init": 0.5}, ValueError, "0.017 by definition"),
    *(
        ({"init": "noisynet", "family": family}, ValueError, f"defined for .*got family='{family}'")
        for family in FAMILIES
        if family not in ("gaussian", "factorised")
    ),
    ({"sigma": 0.5}, TypeError, "(unknown noise setting|unexpected keyword argument) 'sigma'"),
]


@pytest.mark.parametrize(("settings", "error", "match"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings_are_refused_everywhere(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    for make in (LayerNoise, lambda **noise: FlipoutLinear(2, 2, **noise), lambda **noise: FlipoutConv2d(2, 2, 1, **noise)):
        with pytest.raises(error, match=match):
            make(**settings)
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=match):
        perturb(net, **settings)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear]
    assert all(th.equal(value, before[name]) for name, value in net.state_dict().items()) and len(before) == 4


def sigmas(layer: Any) -> list[th.Tensor]:
    return [sigma for sigma in (layer.weight_sigma, layer.bias_sigma) if sigma is not None]


@every_family
@pytest.mark.parametrize("sigma_init", [None, 0.0, 0.3, 2])
def test_sigma_is_in_the_familys_unit(family: str, sigma_init: float | None) -> None:
    spec = FAMILIES[family]
    if spec.sigma == "none":
        assert sigmas(FlipoutLinear(16, 3, family=family)) == []
        return
    number = 0.5 if sigma_init is None else sigma_init
    for layer, fan_in in [
        (FlipoutLinear(16, 3, family=family, sigma_init=sigma_init), 16),
        (FlipoutConv2d(4, 6, (3, 2), groups=2, family=family, sigma_init=sigma_init), 2 * 3 * 2),
    ]:
        expected = number if spec.relative else number / math.sqrt(fan_in)
        assert len(sigmas(layer)) == (1 if spec.sigma == "per_layer" else 2)
        for sigma in sigmas(layer):
            th.testing.assert_close(sigma.detach(), th.full_like(sigma, expected))


@pytest.mark.parametrize("fan_in", [0, 1])
def test_sigma_of_one_input_or_none(fan_in: int) -> None:
    assert LayerNoise(sigma_init=0.25).sigma(fan_in) == 0.25


def test_settings_are_plain_values_whatever_they_came_as() -> None:
    came: dict[str, Any] = dict(
        family=np.str_("gaussian"), sigma_init=np.float64(0.5), learn_sigma=np.False_, noise_sharing=np.str_("shared")
    )
    noise = LayerNoise(**came, init=np.str_("keep"))
    assert noise == LayerNoise("gaussian", 0.5, False, "shared", "keep")
    assert [type(getattr(noise, field.name)) for field in fields(noise)] == [str, float, bool, str, str]
    assert type(LayerNoise(sigma_init=1).sigma_init) is float


@every_family
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_of_sigma(family: str, bias: bool) -> None:
    layer, spec = FlipoutLinear(4, 3, bias, family=family), FAMILIES[family]
    shapes = {
        "per_weight": [layer.weight.shape, *([layer.bias.shape] if bias else [])],
        "per_layer": [th.Size([])],
        "none": [],
    }[spec.sigma]
    assert [sigma.shape for sigma in sigmas(layer)] == shapes


@every_noise
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_what_of_sigma_is_learned(noise: dict[str, str], learn_sigma: bool) -> None:
    layer = FlipoutLinear(4, 3, learn_sigma=learn_sigma, **noise)
    learned = learn_sigma and FAMILIES[noise["family"]].sigma == "per_weight"
    assert all(sigma.requires_grad == learned for sigma in sigmas(layer))
    assert layer.weight.requires_grad and layer.bias.requires_grad
    assert len(list(layer.parameters())) == 2 + len(sigmas(layer))


def test_isotropic_has_one_sigma_that_weight_and_bias_share() -> None:
    layer = FlipoutLinear(4, 3, family="isotropic")
    assert layer.bias_sigma is None and layer.weight_sigma.dim() == 0 and not layer.weight_sigma.requires_grad


def test_dropconnect_has_no_sigma() -> None:
    assert [name for name, _ in FlipoutLinear(4, 3, family="dropconnect").named_parameters()] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("family", "numerator", "sigma"), [("gaussian", 3.0, None), ("factorised", 1.0, 0.5), ("factorised", 1.0, 0.2)]
)
@pytest.mark.parametrize("build", ["constructor", "perturb"])
def test_noisynet_initialisation(family: str, numerator: float, sigma: float | None, build: str) -> None:
    """mu ~ U(-sqrt(3/p), sqrt(3/p)), sigma 0.017; or U(-1/sqrt p, 1/sqrt p), sigma_0 / sqrt p (section 3.2)."""
    th.manual_seed(0)
    settings: dict[str, Any] = {"family": family, "init": "noisynet"}
    if sigma is not None and sigma != 0.5:
        settings["sigma_init"] = sigma
    fan_in = 100
    layer = FlipoutLinear(fan_in, 200, **settings) if build == "constructor" else nn.Linear(fan_in, 200)
    if build == "perturb":
        perturb(layer, **settings)
    bound = math.sqrt(numerator / fan_in)
    weight, bias = layer.weight.detach().double() / bound, layer.bias.detach().double() / bound
    assert weight.abs().max() <= 1 + 1e-6 and bias.abs().max() <= 1 + 1e-6
    assert abs(weight.mean()) <= hoeffding(weight.numel(), comparisons=4)
    assert abs(weight.square().mean() - 1 / 3) <= hoeffding(weight.numel(), comparisons=4)
    assert abs(bias.mean()) <= hoeffding(bias.numel(), comparisons=4)
    for mean in (weight, bias):  # that no draw comes closer to the bound has probability 1e-6
        assert mean.abs().max() >= 1 + math.log(FALSE_FAIL) / mean.numel()
    expected = NOISYNET_SIGMA if sigma is None else sigma / math.sqrt(fan_in)
    assert expected == (0.017 if sigma is None else sigma / 10)
    for value in sigmas(layer):
        th.testing.assert_close(value.detach(), th.full_like(value, expected))


@every_noise
def test_keeping_the_initialisation_leaves_means_alone(noise: dict[str, str], untouched_rng: None) -> None:
    with th.random.fork_rng():
        net = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 2, 2))
    before = [value.clone() for value in net.parameters()]
    perturb(net, base_key=3, **noise)
    for layer, weight, bias in zip(net, before[::2], before[1::2], strict=True):
        assert th.equal(layer.weight, weight) and th.equal(layer.bias, bias)


@every_noise
def test_constructors_draw_the_means_of_torch(noise: dict[str, str]) -> None:
    for perturbed_class, plain_class, arguments in [(FlipoutLinear, nn.Linear, (4, 3)), (FlipoutConv2d, nn.Conv2d, (2, 3, 2))]:
        th.manual_seed(3)
        layer = perturbed_class(*arguments, **noise)
        state = th.get_rng_state()
        th.manual_seed(3)
        plain = plain_class(*arguments)
        assert th.equal(layer.weight, plain.weight) and th.equal(layer.bias, plain.bias)
        # The base key comes after them, and nothing else.
        assert layer.base_key == int(th.randint(2**62, ()))
        assert th.equal(th.get_rng_state(), state)


def test_a_layer_tells_its_noise() -> None:
    for layer in (FlipoutLinear(4, 3, family="factorised"), FlipoutConv2d(1, 1, 1, noise_sharing="shared")):
        config = layer.noise_config
        assert f"family='{config.family}', noise_sharing='{config.noise_sharing}'" in repr(layer)
    assert "in_features=4, out_features=3, bias=True" in repr(FlipoutLinear(4, 3))


def test_the_table_is_consistent() -> None:
    for name, spec in FAMILIES.items():
        assert spec.name == name and spec.source
        assert (spec.base is None) == (spec.row_draw is None)
        assert spec.sigma != "none" or spec.base is not None
