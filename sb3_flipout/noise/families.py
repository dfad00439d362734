"""The families of perturbations, in one table. A new family is one row.

Every family gives row n the weights ``W + c_n * delta * outer(r_n, s_n)``. It says which of sigma, base draw and mean
weights are multiplied to give ``delta``, and what the row factors r and s are.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sb3_flipout.noise.bases import BaseLaw
from sb3_flipout.noise.tables import FactorKind


@dataclass(frozen=True)
class Family:
    """
    One way of drawing weight perturbations: the base perturbation is the product of the parts that the family has.

    :param name: Its name in ``family=``
    :param factor: The law of the row factors
    :param base: Law of the base draw; ``None`` where the factors alone are the noise
    :param row_draw: Law of the elements of a row's own draw under ``noise_sharing="independent"``; ``None`` where rows
        that differ by their factors are independent already
    :param sigma: ``"per_weight"``, ``"per_layer"`` (one number, not learned) or ``"none"``
    :param relative: The perturbation is relative to the mean weights; otherwise sigma is in units of 1/sqrt(fan_in)
    :param source: Where it was published
    """

    name: str
    factor: FactorKind
    base: BaseLaw | None
    row_draw: Literal["normal", "sign"] | None
    sigma: Literal["per_weight", "per_layer", "none"]
    relative: bool
    source: str

    @property
    def factor_power(self) -> float:
        """Mean square of a row factor: a weight's noise has one over inputs and one over outputs, a bias's only the latter."""
        return math.sqrt(2 / math.pi) if self.factor == "sqrt_normal" else 1.0

    @property
    def rank_one(self) -> bool:
        """Whether what a row sees of the noise is sigma times the outer product of its factors, so that dot products do."""
        return self.base is None and self.sigma == "per_layer"


_TABLE = (
    Family(
        "gaussian",
        "sign",
        "normal",
        "normal",
        "per_weight",
        False,
        "Blundell et al. 2015; Fortunato et al. 2018, section 3",
    ),
    Family("factorised", "sqrt_normal", None, None, "per_weight", False, "Fortunato et al. 2018, eq. (10)"),
    Family("multiplicative", "sign", "normal", "normal", "per_weight", True, "Wen et al. 2018, section 4.1"),
    Family("dropconnect", "sign", "sign", "sign", "none", True, "Wan et al. 2013, p = 1/2"),
    Family("isotropic", "sign", "normal", "normal", "per_layer", False, "Plappert et al. 2018"),
    Family("lowrank", "normal", None, None, "per_layer", False, "Sarkar et al. 2025 (EGGROLL), rank 1"),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}

FamilyName = Literal["gaussian", "factorised", "multiplicative", "dropconnect", "isotropic", "lowrank"]
NoiseSharing = Literal["flipout", "shared", "independent"]

#: Who shares a draw: every row its own signs on one base; one draw for the batch; a full draw for each row.
NOISE_SHARINGS: tuple[str, ...] = get_args(NoiseSharing)

#: ``sigma_init`` where none is given (Fortunato et al. 2018, section 3.2, for the factorised family; see docs/settings.md).
DEFAULT_SIGMA_INIT = 0.5
