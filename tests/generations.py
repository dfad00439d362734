"""What FlipES tells its population, written down generation by generation."""

from typing import Any

import torch as th
from stable_baselines3.common.callbacks import BaseCallback


class Fitness(BaseCallback):
    """Keeps the fitness of each generation, over several calls of ``learn`` too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[th.Tensor] = []

    def _on_training_start(self) -> None:
        model: Any = self.model
        tell = type(model.population).tell.__get__(model.population)
        model.population.tell = lambda fitness: (self.found.append(fitness.clone()), tell(fitness))[1]

    def _on_step(self) -> bool:
        return True
