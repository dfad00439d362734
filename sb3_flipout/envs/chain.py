"""The chain: a toy problem that random actions cannot explore once it is long."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from sb3_flipout.checks import check_integer
from sb3_flipout.envs._checks import checked_action


class Chain(gym.Env[NDArray[np.float32], np.int64]):
    r"""Chain of ``length`` states :math:`s_1, \dots, s_N` with a small reward at one end and a large one at the other.

    Source: Osband et al., "Deep Exploration via Bootstrapped DQN" (NeurIPS 2016); used by Plappert et al., "Parameter
    Space Noise for Exploration" (ICLR 2018), section 4.2 and appendix A.3.

    What this class takes from them, and how it reads what they leave open:

    * The agent starts in :math:`s_2`. Action 0 moves one state left, action 1 one state right; at an end, the outward
      action stays there.
    * "In state :math:`s_1`, the agent receives a small reward of r = 0.001 and a larger reward r = 1 in state
      :math:`s_N`" is read as a reward for each step *spent* at that end: action 0 taken in :math:`s_1` pays 0.001,
      action 1 taken in :math:`s_N` pays 1, everything else (arriving at an end included) pays 0. The public
      implementation of the chain in facebookresearch/RandomizedValueFunctions reads it the same way.
    * An episode lasts N + 9 steps, here N + 9 calls of :meth:`step`. Going right always takes N - 2 steps to arrive
      and is paid in the 11 that remain, so the best return is 11 (:attr:`goal_return`). The implementation above
      stops after N + 8 calls instead, for a best return of 10; whether :math:`s_N` is reached hardly depends on it.
    * The observation is the thermometer feature of the state, :math:`\phi_i(s_t) = 1\{i \le t\}` for
      :math:`i = 1, \dots, N` when the agent is in the t-th state: as many leading ones as the agent's position.
    * The end of an episode is a truncation, not a termination: the observation does not tell the time, so a learner
      should bootstrap from the last state. Reaching :math:`s_N` does not end the episode.

    ``info["reached_goal"]`` of :meth:`reset` and :meth:`step` is ``True`` once :math:`s_N` has been entered in the
    current episode; an episode counts as solved in our benchmarks when it ends with ``True``.

    :param length: Number of states N, at least 3 (with 2 the agent would start at the goal).
    :raises TypeError: If ``length`` is not an integer.
    :raises ValueError: If ``length`` is below 3.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium declares it so

    #: Reward of pressing left in :math:`s_1`.
    left_reward = 0.001
    #: Reward of pressing right in :math:`s_N`.
    right_reward = 1.0

    def __init__(self, length: int = 10) -> None:
        self.length = check_integer("length", length, 3, hint="Pass for example length=20.")
        self.episode_steps = self.length + 9
        self.action_space = spaces.Discrete(2)
        self.observation_space = spaces.Box(0.0, 1.0, shape=(self.length,), dtype=np.float32)
        self._position = 2
        # No steps left: step() refuses until reset() has started an episode.
        self._steps_left = 0
        self._reached_goal = False

    @property
    def goal_return(self) -> float:
        """Undiscounted return of always going right: 11, the best possible for every ``length`` below 10 000."""
        return self.right_reward * (self.episode_steps - (self.length - 2))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode in :math:`s_2`.

        :param seed: Seed of ``self.np_random``; the chain itself draws nothing.
        :param options: Unused.
        :return: The observation, float32 of shape ``(length,)``, and ``{"reached_goal": False}``.
        """
        super().reset(seed=seed, options=options)
        self._position = 2
        self._steps_left = self.episode_steps
        self._reached_goal = False
        return self._observation(), {"reached_goal": False}

    def step(self, action: np.int64 | int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move one state and pay the reward of the state that the step was taken in.

        :param action: 0 for left, 1 for right.
        :return: Observation (float32, shape ``(length,)``), reward (0, 0.001 or 1), terminated (always ``False``),
            truncated (``True`` at the last of the ``length + 9`` steps), info with ``reached_goal``.
        :raises ValueError: If ``action`` is neither 0 nor 1.
        :raises RuntimeError: If no episode is running.
        """
        right = checked_action(self.action_space, action, running=self._steps_left > 0) == 1
        reward = self._reward(right)
        self._position = min(max(self._position + (1 if right else -1), 1), self.length)
        self._steps_left -= 1
        self._reached_goal |= self._position == self.length
        return self._observation(), reward, False, self._steps_left == 0, {"reached_goal": self._reached_goal}

    def _reward(self, right: bool) -> float:
        """Reward of an action taken in the current state.

        :param right: Whether the action is right.
        :return: 1 for right in the last state, 0.001 for left in the first, else 0.
        """
        if right:
            return self.right_reward if self._position == self.length else 0.0
        return self.left_reward if self._position == 1 else 0.0

    def _observation(self) -> NDArray[np.float32]:
        """Thermometer feature of the current state.

        :return: float32 of shape ``(length,)``: ones up to and including the agent's position, then zeros.
        """
        return (np.arange(1, self.length + 1) <= self._position).astype(np.float32)
