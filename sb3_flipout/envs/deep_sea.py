"""DeepSea: a grid in which one action sequence out of 2^N finds the treasure."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_flipout.checks import check_flag, check_integer, check_number
from sb3_flipout.envs._checks import checked_action

# np.random.RandomState, which bsuite uses, takes seeds of 32 bits.
_MAX_SEED = 2**32 - 1


class DeepSea(gym.Env[NDArray[np.float32] | np.int64, np.int64]):
    """Grid of ``size`` x ``size`` cells that the agent falls through, one row a step, drifting left or right.

    Source: Osband et al., "Deep Exploration via Randomized Value Functions" (JMLR 2019), and "Behaviour Suite for
    Reinforcement Learning" (ICLR 2020). Transitions, rewards, action mapping and the all-zero observation after the
    last step are those of ``bsuite.environments.deep_sea.DeepSea`` (version 0.3.6).

    The agent starts in the top left cell. In each cell one of the actions means right, the other left
    (:attr:`action_mapping`). Right costs ``unscaled_move_cost / size``; right in the bottom right cell pays 1, the
    treasure, which only the agent that went right in every row can collect. The episode terminates after ``size``
    steps: the row is part of the observation, so this is no time limit.

    The stochastic variant (``deterministic=False``) lets right fail, without moving, with probability ``1 / size``,
    and adds a N(0, 1) draw to the reward of a step taken in the bottom left or bottom right cell. Its draws are
    those of bsuite's ``DeepSea(seed=s)`` when it is reset with ``reset(seed=s)``.

    ``info["reached_goal"]`` of :meth:`reset` and :meth:`step` is ``True`` once the treasure has been collected in the
    current episode.

    :param size: Number of rows and columns N, at least 2.
    :param mapping_seed: Seed, in ``[0, 2**32 - 1]``, of the random action mapping; the same seed gives the mapping
        of bsuite. ``None`` makes action 1 right in every cell, as ``randomize_actions=False`` of bsuite does.
    :param unscaled_move_cost: Cost of going right in every row, finite and not negative.
    :param deterministic: Whether transitions and rewards are free of noise.
    :param flatten: Whether the observation has shape ``(size * size,)``, row by row, instead of ``(size, size)``.
    :param integer_observations: Whether the observation is the number of the cell, row by row from 0, in
        ``Discrete(size * size)``: SB3 makes the one-hot vector of it, and a replay buffer keeps 8 bytes in place of
        ``4 * size * size``. After the last step it is 0: that state is terminal, and no value of it is learned (though it
        is among those that the unit of priors is measured on).
    :raises TypeError: If an argument has the wrong type.
    :raises ValueError: If an argument is out of its range.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium declares it so

    def __init__(
        self,
        size: int = 10,
        mapping_seed: int | None = None,
        unscaled_move_cost: float = 0.01,
        deterministic: bool = True,
        flatten: bool = True,
        integer_observations: bool = False,
    ) -> None:
        self.size = check_integer("size", size, 2, hint="Pass for example size=10.")
        self.unscaled_move_cost = check_number(
            "unscaled_move_cost", unscaled_move_cost, hint="Pass for example unscaled_move_cost=0.01."
        )
        self.deterministic = check_flag("deterministic", deterministic)
        self.flatten = check_flag("flatten", flatten)
        self.integer_observations = check_flag("integer_observations", integer_observations)
        if self.integer_observations and not self.flatten:
            raise ValueError(
                "integer_observations=True does not fit flatten=False: a number has no rows. Leave one of them out."
            )
        self._mapping: NDArray[np.int64] = _action_mapping(self.size, mapping_seed)
        self.action_space = spaces.Discrete(2)
        self.observation_space = self._make_observation_space()
        self._noise: np.random.RandomState | None = None
        # The row below the grid: step() refuses until reset() has started an episode.
        self._row, self._column = self.size, 0
        self._reached_goal = False

    def _make_observation_space(self) -> spaces.Space[Any]:
        if self.integer_observations:
            return spaces.Discrete(self.size * self.size)
        shape = (self.size * self.size,) if self.flatten else (self.size, self.size)
        return spaces.Box(0.0, 1.0, shape=shape, dtype=np.float32)

    @property
    def action_mapping(self) -> NDArray[np.int64]:
        """Copy of the action, 0 or 1, that means right in each cell; int64 of shape ``(size, size)``."""
        return np.array(self._mapping, dtype=np.int64)

    @property
    def goal_return(self) -> float:
        """Expected undiscounted return of always going right, as bsuite computes it.

        Without noise this is ``1 - unscaled_move_cost``, the best possible return for a cost below 1. With noise, the
        ``size - 1`` moves before the treasure succeed together with probability ``(1 - 1 / size) ** (size - 1)``.
        """
        arrival = 1.0 if self.deterministic else (1 - 1 / self.size) ** (self.size - 1)
        return arrival - self.unscaled_move_cost

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32] | np.int64, dict[str, Any]]:
        """Start an episode in the top left cell.

        :param seed: Seed of ``self.np_random`` and of the stochastic variant's noise (there modulo ``2**32``, see
            the class); ``None`` goes on with the present streams. The action mapping never changes.
        :param options: Unused.
        :return: The observation, float32 of shape ``(size * size,)`` or ``(size, size)``, or the number of the cell, and
            ``{"reached_goal": False}``.
        """
        super().reset(seed=seed, options=options)
        if not self.deterministic and (seed is not None or self._noise is None):
            noise_seed = self.np_random.integers(_MAX_SEED) if seed is None else seed % (_MAX_SEED + 1)
            self._noise = np.random.RandomState(int(noise_seed))
        self._row, self._column = 0, 0
        self._reached_goal = False
        return self._observation(), {"reached_goal": False}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32] | np.int64, float, bool, bool, dict[str, Any]]:
        """Fall one row and drift one column.

        :param action: 0 or 1; which of them means right depends on the cell, see :attr:`action_mapping`.
        :return: Observation (one-hot of the cell, float32, or its number; zero at the end of the episode), reward,
            terminated (``True`` at the last of the ``size`` steps), truncated (always ``False``), info with
            ``reached_goal``.
        :raises ValueError: If ``action`` is neither 0 nor 1.
        :raises RuntimeError: If no episode is running.
        """
        checked = checked_action(self.action_space, action, running=self._row < self.size)
        right = checked == int(self._mapping[self._row, self._column])
        treasure = right and self._column == self.size - 1
        # The reward noise is drawn before the slip, the order in which bsuite uses its random stream.
        reward = (1.0 if treasure else 0.0) + self._reward_noise()
        if right:
            reward -= self.unscaled_move_cost / self.size
        self._column = self._next_column(right)
        self._row += 1
        self._reached_goal |= treasure
        return self._observation(), reward, self._row == self.size, False, {"reached_goal": self._reached_goal}

    def _reward_noise(self) -> float:
        """Draw the noise of this step's reward.

        :return: A N(0, 1) draw in the two bottom corners of the stochastic variant, else 0.
        """
        in_corner = self._row == self.size - 1 and self._column in (0, self.size - 1)
        return float(self._noise.randn()) if self._noise is not None and in_corner else 0.0

    def _next_column(self, right: bool) -> int:
        """Column after this step; draws whether a right move slips in the stochastic variant.

        :param right: Whether the action means right in the current cell.
        :return: Column in ``[0, size - 1]``.
        """
        if not right:
            return max(self._column - 1, 0)
        if self._noise is not None and self._noise.rand() <= 1 / self.size:
            return self._column
        return min(self._column + 1, self.size - 1)

    def _observation(self) -> NDArray[np.float32] | np.int64:
        """One-hot or number of the current cell; all zeros, or 0, once the agent has fallen out of the grid.

        :return: float32 of shape ``(size * size,)`` if ``flatten``, else ``(size, size)``; or an integer.
        """
        if self.integer_observations:
            return np.int64(self._row * self.size + self._column if self._row < self.size else 0)
        grid = np.zeros((self.size, self.size), dtype=np.float32)
        if self._row < self.size:
            grid[self._row, self._column] = 1.0
        return grid.reshape(-1) if self.flatten else grid


def _action_mapping(size: int, mapping_seed: int | None) -> NDArray[np.int64]:
    """Action that means right in each cell, the same as bsuite's for the same seed.

    :param size: Number of rows and columns.
    :param mapping_seed: Seed in ``[0, 2**32 - 1]``, or ``None`` for action 1 everywhere.
    :return: int64 of shape ``(size, size)`` with values 0 and 1.
    :raises TypeError: If ``mapping_seed`` is neither an integer nor ``None``.
    :raises ValueError: If ``mapping_seed`` is out of range.
    """
    if mapping_seed is None:
        return np.ones((size, size), dtype=np.int64)
    seed = check_integer("mapping_seed", mapping_seed, 0, _MAX_SEED)
    return np.asarray(np.random.RandomState(seed).binomial(1, 0.5, [size, size]), dtype=np.int64)
