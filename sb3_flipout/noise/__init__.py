"""Ring 0, torch only: noise keys, the row factors hashed from them, and the families of perturbations."""

from sb3_flipout.noise.carried import noise_of, with_noise
from sb3_flipout.noise.families import FAMILIES, Family
from sb3_flipout.noise.keys import fold, fold_in, mix
from sb3_flipout.noise.rows import NoiseOwner, RowNoise, RowsByKey
from sb3_flipout.noise.signs import FactorPlan, signs
from sb3_flipout.noise.stream import EvaluationStream, KeyStream, Scales
from sb3_flipout.noise.streams import Stream

__all__ = [
    "FAMILIES",
    "EvaluationStream",
    "FactorPlan",
    "Family",
    "KeyStream",
    "NoiseOwner",
    "RowNoise",
    "RowsByKey",
    "Scales",
    "Stream",
    "fold",
    "fold_in",
    "mix",
    "noise_of",
    "signs",
    "with_noise",
]
