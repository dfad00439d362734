"""What a model tells of its generations: logs, and warnings of what was not learned from."""

from __future__ import annotations

import sys
import time

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import safe_mean

from sb3_flipout.checks import warn_once
from sb3_flipout.evolution.estimator import Told
from sb3_flipout.evolution.policy import FlipESPolicy


class Tells(BaseAlgorithm):
    """Mixin of an algorithm that learns by generations."""

    policy: FlipESPolicy
    population_size: int

    def _warn_of(self, told: Told) -> None:
        """Say, once per model, what was not learned from."""
        warned = self.policy.marks.warned
        if told.dropped:
            warn_once(
                warned,
                "dropped",
                f"{told.dropped} of {self.population_size} members were left out of the estimate: the returns of some are not "
                "finite, or their worker was lost; an antithetic twin goes with its pair. Look at the rewards of the "
                "environment; train/dropped_members counts them.",
            )
        if not told.stepped:
            warn_once(
                warned,
                "equal",
                "all members of a generation had the same fitness, none had a finite one, or the noise has fallen to 0, so no "
                "step was made. Where this goes on, give the noise a larger sigma_init or schedule_end, or more "
                "episodes_per_member.",
            )

    def dump_logs(self) -> None:
        """Write the logs of a generation."""
        elapsed = max((time.time_ns() - self.start_time) / 1e9, sys.float_info.epsilon)
        if self.ep_info_buffer:
            self.logger.record("rollout/ep_rew_mean", safe_mean([info["r"] for info in self.ep_info_buffer]))
            self.logger.record("rollout/ep_len_mean", safe_mean([info["l"] for info in self.ep_info_buffer]))
        self.logger.record("time/fps", int((self.num_timesteps - self._num_timesteps_at_start) / elapsed))
        self.logger.record("time/time_elapsed", int(elapsed), exclude="tensorboard")
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(step=self.num_timesteps)
