"""Ring 0, torch only: noise keys, the row factors hashed from them, and the families of perturbations."""

from sb3_flipout.noise.families import FAMILIES, Family
from sb3_flipout.noise.keys import fold, fold_in, mix
from sb3_flipout.noise.rows import RowNoise, noise_of, with_noise
from sb3_flipout.noise.signs import FactorPlan, signs
from sb3_flipout.noise.stream import EvaluationStream, KeyStream

__all__ = [
    "FAMILIES",
    "EvaluationStream",
    "FactorPlan",
    "Family",
    "KeyStream",
    "RowNoise",
    "fold",
    "fold_in",
    "mix",
    "noise_of",
    "signs",
    "with_noise",
]
