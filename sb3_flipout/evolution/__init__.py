"""Evolution strategies: the pure estimator; environments and SB3 are no part of it."""

from sb3_flipout.evolution.estimator import Group, Population, Told
from sb3_flipout.evolution.shaping import SHAPINGS

__all__ = ["SHAPINGS", "Group", "Population", "Told"]
