"""How a layer is perturbed: the settings, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, TypedDict, get_args

from sb3_flipout.checks import check_choice, check_flag, check_names, check_number
from sb3_flipout.noise.families import DEFAULT_SIGMA_INIT, FAMILIES, NOISE_SHARINGS, Family, FamilyName, NoiseSharing

#: Sigma of independent Gaussian noise in Fortunato et al. 2018, section 3.2 (absolute, not divided by sqrt(fan_in)).
NOISYNET_SIGMA = 0.017

Init = Literal["keep", "noisynet"]
INITS: tuple[str, ...] = get_args(Init)


class NoiseKwargs(TypedDict, total=False):
    """The keyword arguments of a perturbed layer, for type checkers; what they mean is said in :class:`LayerNoise`."""

    family: FamilyName
    sigma_init: float | None
    learn_sigma: bool
    noise_sharing: NoiseSharing
    init: Init


@dataclass(frozen=True)
class LayerNoise:
    """
    How a layer is perturbed; checked when made.

    :param family: A name in ``sb3_flipout.noise.FAMILIES``
    :param sigma_init: Initial sigma, >= 0, in the family's unit: 1/sqrt(fan_in), or relative to the mean weights;
        ``None`` for the default (0.5); not with ``"dropconnect"``, which has no sigma
    :param learn_sigma: Whether sigma is trained; ``"isotropic"``, ``"lowrank"`` and ``"dropconnect"`` have none to train
    :param noise_sharing: ``"flipout"``, ``"shared"`` or ``"independent"``
    :param init: ``"keep"`` the mean weights, or ``"noisynet"``: means and sigmas of Fortunato et al. 2018, section 3.2
    :raises TypeError: If a value has a wrong type
    :raises ValueError: If a value is unknown, out of range, or does not fit the family
    """

    family: str = "gaussian"
    sigma_init: float | None = None
    learn_sigma: bool = True
    noise_sharing: str = "flipout"
    init: str = "keep"

    def __post_init__(self) -> None:
        # Plain Python values, whatever they came as: they are saved with the model.
        checked = {
            "family": check_choice("family", self.family, FAMILIES),
            "learn_sigma": check_flag("learn_sigma", self.learn_sigma),
            "noise_sharing": check_choice("noise_sharing", self.noise_sharing, NOISE_SHARINGS),
            "init": check_choice("init", self.init, INITS),
        }
        if self.sigma_init is not None:
            hint = "Use 0.0 for no perturbation, None for the default."
            checked["sigma_init"] = check_number("sigma_init", self.sigma_init, hint=hint)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_fit()

    def _check_fit(self) -> None:
        if self.sigma_init is not None and self.spec.sigma == "none":
            raise ValueError(
                f"sigma_init={self.sigma_init} does not fit family={self.family!r}: each weight a row sees is 0 or twice its "
                "mean, there is no sigma. Leave sigma_init out and set the noise scale instead."
            )
        if self.init == "noisynet" and self.family not in ("gaussian", "factorised"):
            raise ValueError(f'init="noisynet" is defined for "gaussian" and "factorised" noise, got family={self.family!r}.')
        if self.sigma_init is not None and self.init == "noisynet" and self.family == "gaussian":
            raise ValueError(
                f'sigma_init={self.sigma_init} does not fit init="noisynet" with family="gaussian", whose sigma is '
                f"{NOISYNET_SIGMA} by definition. Leave one of the two out."
            )

    @cached_property
    def spec(self) -> Family:
        """The family's row of the table."""
        return FAMILIES[self.family]

    @property
    def learns(self) -> bool:
        """Whether there is a sigma that is trained."""
        return self.learn_sigma and self.spec.sigma == "per_weight"

    @property
    def draws_base(self) -> bool:
        """Whether there is a base draw that can be redrawn: not where row factors alone are the noise, or each row's own."""
        return self.noise_sharing == "shared" or (self.spec.base is not None and self.noise_sharing == "flipout")

    def sigma(self, fan_in: int) -> float:
        """
        Compute the initial sigma of a layer.

        :param fan_in: Inputs that one output adds up
        :return: Sigma in weight units, or relative to the mean weights where the family says so
        """
        if self.init == "noisynet" and self.family == "gaussian":
            return NOISYNET_SIGMA
        unit = 1.0 if self.spec.relative else 1.0 / math.sqrt(max(fan_in, 1))
        return (DEFAULT_SIGMA_INIT if self.sigma_init is None else float(self.sigma_init)) * unit


def layer_noise(noise: Any) -> LayerNoise:
    """
    Make the settings from the keyword arguments that a user gave.

    :param noise: Settings by name
    :return: The settings, checked
    :raises TypeError: If a name is no setting, or a value has a wrong type
    :raises ValueError: If a value is unknown, out of range or unfit
    """
    check_names(noise, [field.name for field in fields(LayerNoise)], "noise setting")
    return LayerNoise(**noise)
