"""Evolution strategies: a pure estimator on any network and fitness, and FlipES, an SB3 algorithm that stands on it."""

from sb3_flipout.evolution.estimator import Group, Population, Told
from sb3_flipout.evolution.flipes import FlipES
from sb3_flipout.evolution.policy import EvolutionSettings, FlipESCnnPolicy, FlipESMultiInputPolicy, FlipESPolicy
from sb3_flipout.evolution.ray_workers import RayWorkers
from sb3_flipout.evolution.shaping import SHAPINGS
from sb3_flipout.evolution.workers import Generation, Job, Worker, Workers

__all__ = [
    "SHAPINGS",
    "EvolutionSettings",
    "FlipES",
    "FlipESCnnPolicy",
    "FlipESMultiInputPolicy",
    "FlipESPolicy",
    "Generation",
    "Group",
    "Job",
    "Population",
    "RayWorkers",
    "Told",
    "Worker",
    "Workers",
]
