"""How a layer is perturbed: the settings, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from sb3_flipout.noise.families import DEFAULT_SIGMA_INIT, FAMILIES, NOISE_SHARINGS, Family

#: Sigma of independent Gaussian noise in Fortunato et al. 2018, section 3.2 (absolute, not divided by sqrt(fan_in)).
NOISYNET_SIGMA = 0.017

INITS = ("keep", "noisynet")


@dataclass(frozen=True)
class LayerNoise:
    """
    How a layer is perturbed; checked when made.

    :param family: A name in ``sb3_flipout.noise.FAMILIES``
    :param sigma_init: Initial sigma, >= 0, in the family's unit: 1/sqrt(fan_in), or relative to the mean weights;
        ``None`` for the default (0.5); not with ``"dropconnect"``, which has no sigma
    :param learn_sigma: Whether sigma is trained; ``"isotropic"`` and ``"dropconnect"`` have nothing to train
    :param noise_sharing: ``"flipout"``, ``"shared"`` or ``"independent"``
    :param init: ``"keep"`` the mean weights, or ``"noisynet"``: means and sigmas of Fortunato et al. 2018, section 3.2
    :raises ValueError: If a value is unknown, out of range, or does not fit the family
    """

    family: str = "gaussian"
    sigma_init: float | None = None
    learn_sigma: bool = True
    noise_sharing: str = "flipout"
    init: str = "keep"

    def __post_init__(self) -> None:
        one_of("family", self.family, FAMILIES)
        one_of("noise_sharing", self.noise_sharing, NOISE_SHARINGS)
        one_of("init", self.init, INITS)
        if self.sigma_init is not None:
            self._check_sigma_init(self.sigma_init)
            object.__setattr__(self, "sigma_init", float(self.sigma_init))
        if self.init == "noisynet" and self.family not in ("gaussian", "factorised"):
            raise ValueError(f'init="noisynet" is defined for "gaussian" and "factorised" noise, got family={self.family!r}.')

    def _check_sigma_init(self, sigma_init: Any) -> None:
        if isinstance(sigma_init, bool) or not isinstance(sigma_init, Real):
            raise TypeError(f"sigma_init must be a number >= 0 or None, got {type(sigma_init).__name__}.")
        if not (math.isfinite(sigma_init) and float(sigma_init) >= 0):
            raise ValueError(f"sigma_init must be finite and >= 0, got {sigma_init}; use 0.0 for no perturbation.")
        if self.spec.sigma == "none":
            raise ValueError(
                f"sigma_init={sigma_init} does not fit family={self.family!r}: each weight a row sees is 0 or twice its mean, "
                "there is no sigma. Leave sigma_init out and set the noise scale instead."
            )
        if self.init == "noisynet" and self.family == "gaussian":
            raise ValueError(
                f'sigma_init={sigma_init} does not fit init="noisynet" with family="gaussian", whose sigma is '
                f"{NOISYNET_SIGMA} by definition. Leave one of the two out."
            )

    @property
    def spec(self) -> Family:
        """The family's row of the table."""
        return FAMILIES[self.family]

    def sigma(self, fan_in: int) -> float:
        """
        Give the initial sigma of a layer.

        :param fan_in: Inputs that one output adds up
        :return: Sigma in weight units, or relative to the mean weights where the family says so
        """
        if self.init == "noisynet" and self.family == "gaussian":
            return NOISYNET_SIGMA
        unit = 1.0 if self.spec.relative else 1.0 / math.sqrt(max(fan_in, 1))
        return (DEFAULT_SIGMA_INIT if self.sigma_init is None else float(self.sigma_init)) * unit


def one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    """
    Refuse a value that is not one of the allowed ones.

    :param name: The argument's name
    :param value: What came
    :param allowed: Collection of what is allowed
    :raises ValueError: If ``value`` is none of them
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def layer_noise(noise: dict[str, Any]) -> LayerNoise:
    """
    Make the settings from the keyword arguments that a user gave.

    :param noise: Settings by name
    :return: The settings, checked
    :raises TypeError: If a name is no setting
    :raises ValueError: If a value is unknown, out of range or unfit
    """
    allowed = [field.name for field in fields(LayerNoise)]
    unknown = [name for name in noise if name not in allowed]
    if unknown:
        raise TypeError(f"unknown noise setting {', '.join(map(repr, unknown))}; allowed are {', '.join(allowed)}.")
    return LayerNoise(**noise)
