"""MonitorNoise: shows what the noise is and does, in the numbers and pictures of docs/logged_values.md."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from stable_baselines3.common.logger import Figure, TensorBoardOutputFormat

from sb3_flipout.callbacks.common import NoiseCallback
from sb3_flipout.checks import check_integer
from sb3_flipout.diagnostics.figures import layout, sigma_figure
from sb3_flipout.diagnostics.recent import recent_replayed, recent_rollout
from sb3_flipout.diagnostics.statistics import (
    action_statistics,
    draw,
    has_members,
    histograms,
    member_statistics,
    noisy_layers,
    weight_statistics,
)
from sb3_flipout.noise import Stream, fold

_FIGURE_EVERY = 10  # measurements: drawing takes longer than all numbers together

# What writes for people: values of single layers, and all quantiles but the median, would flood it.
_PEOPLE = ("stdout", "log")
_ALL_BUT_TENSORBOARD = (*_PEOPLE, "json", "csv")


class MonitorNoise(NoiseCallback):
    """
    Log what the noise is and what it does; ``docs/logged_values.md`` defines each value.

    It measures at the end of a rollout, with recent observations from the buffer, under keys of its own; training is bit for
    bit what it is without. SB3 writes the values whenever it writes its own. At the default period it takes less than 2 % of
    training (docs/benchmarks/monitor_cost.md).

    :param every: Environment steps between two measurements, at least; they wait for the end of a rollout
    :param histograms: Whether histograms of sigma and signal-to-noise of each layer go to tensorboard
    :param figures: Whether a figure of sigma of each layer goes to tensorboard, at every tenth measurement
    :param observations: Number of observations to measure with, 2 or more
    :param draws: Number of draws of the noise to measure with, 2 or more
    :param verbose: Verbosity level of SB3's callbacks
    :raises TypeError: If a number is no integer, or a flag no boolean
    :raises ValueError: If a number is out of range; at the start of training, if the policy is no flipout policy
    """

    def __init__(
        self,
        every: int = 10_000,
        histograms: bool = True,
        figures: bool = True,
        observations: int = 32,
        draws: int = 16,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.every = check_integer("every", every, 1)
        self.histograms, self.figures = bool(histograms), bool(figures)
        self.observations, self.draws = _checked_sample("observations", observations), _checked_sample("draws", draws)
        self._measurements = 0
        self._laid_out: Any = None  # the tensorboard writer that has the layout

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._start_period()
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat) and output.writer is not self._laid_out:
                output.writer.add_custom_scalars(layout(has_members(self.policy)))
                self._laid_out = output.writer

    def _start_period(self) -> None:
        self._since, self._clock, self._resamples = self.model.num_timesteps, time.monotonic(), 0

    def _on_rollout_start(self) -> None:
        if self.policy.noise_settings.resample == "rollout":
            self._resamples += self.model.n_envs

    def _on_step(self) -> bool:
        if self.policy.noise_settings.resample == "episode":
            self._resamples += int(np.sum(self.locals["dones"]))
        return True

    def _on_rollout_end(self) -> None:
        if self.model.num_timesteps - self._since >= self.every:
            self._measure()
            self._start_period()

    def _measure(self) -> None:
        step, policy = self.model.num_timesteps, self.policy
        recent = recent_replayed if self.off_policy else recent_rollout
        obs = recent(self.model, self.observations, np.random.default_rng(step))
        layers, scale = noisy_layers(policy), policy.effective_scale
        numbers = {"noise/scale": scale, "noise/resamples_per_second": self._resample_rate()}
        numbers |= weight_statistics(layers, scale)
        numbers |= action_statistics(draw(policy, obs, self.draws, fold(Stream.MONITOR, step)))
        numbers |= member_statistics(policy, obs)
        for tag, number in numbers.items():
            detail = tag.count("/") > 1 or ("/snr_q" in tag and not tag.endswith("q50"))
            self.logger.record(tag, number, exclude=_PEOPLE if detail else None)
        if self.histograms:
            for tag, values in histograms(layers, scale).items():
                self.logger.record(tag, values, exclude=_ALL_BUT_TENSORBOARD)
        figure = sigma_figure(layers) if self.figures and self._measurements % _FIGURE_EVERY == 0 else None
        if figure is not None:
            self.logger.record("noise/sigma_figure", Figure(figure, close=False), exclude=_ALL_BUT_TENSORBOARD)
        self._measurements += 1

    def _resample_rate(self) -> float:
        """How many environments drew a new key, per second since the last measurement."""
        resample = self.policy.noise_settings.resample
        steps = self.model.num_timesteps - self._since
        count = steps / resample if isinstance(resample, int) else steps if resample == "step" else self._resamples
        return count / max(time.monotonic() - self._clock, 1e-9)


def _checked_sample(name: str, value: Any) -> int:
    return check_integer(name, value, 2, hint="Fewer do not tell noise from inputs.")
