"""Gymnasium's vector environments as SB3's: a thousand environments that step in one call of numpy, or of a simulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sb3_flipout.checks import warn_user

_MODES = ("NextStep", "SameStep", "Disabled")


class GymnasiumVecEnv(VecEnv):
    """A gymnasium ``VectorEnv`` behind SB3's interface, for ``PPO("FlipoutMlpPolicy", GymnasiumVecEnv(env))``.

    ::

        import gymnasium
        import sb3_flipout
        from sb3_flipout.envs.vector import GymnasiumVecEnv
        from stable_baselines3 import PPO
        from stable_baselines3.common.vec_env import VecMonitor

        env = gymnasium.make_vec("CartPole-v1", 1024, vectorization_mode="vector_entry_point")
        model = PPO("FlipoutMlpPolicy", VecMonitor(GymnasiumVecEnv(env)))

    SB3 wants the first observation of the next episode together with the end of an episode. How it gets it depends on how the
    environment resets itself (``env.metadata["autoreset_mode"]``):

    - ``SAME_STEP`` and ``DISABLED``: in the same step, as SB3's own ``DummyVecEnv`` does.
    - ``NEXT_STEP`` (gymnasium's default): the environment resets itself with the step that follows, whose action it does not
      look at. So SB3 sees one step more at the end of each episode: from the last state to itself, with a reward of 0. Returns
      are right, and lengths are one more.

    SB3's ``Monitor`` cannot be inside; put ``VecMonitor`` around it for statistics of episodes.

    :param env: Vector environment, not reset yet or between episodes
    :raises TypeError: If it is no ``VectorEnv``
    :raises ValueError: If it says nothing that is known of how it resets itself
    """

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        if not isinstance(env, gym.vector.VectorEnv):
            raise TypeError(
                f"env must be a gymnasium VectorEnv, got {type(env).__name__}; gymnasium.make_vec(...) makes one. Single "
                "environments go to stable_baselines3's make_vec_env."
            )
        mode = (getattr(env, "metadata", None) or {}).get("autoreset_mode", _MODES[0])
        self.autoreset_mode = str(getattr(mode, "value", mode))
        if self.autoreset_mode not in _MODES:
            known = ", ".join(_MODES)
            raise ValueError(
                f'env.metadata["autoreset_mode"] must be one of gymnasium\'s AutoresetMode ({known}), got {mode!r}.'
            )
        self.env = env
        self._actions: Any = None
        self._for_all: set[str] = set()  # methods of which it has been said that they are called for all
        self._ended: dict[int, tuple[Any, bool]] = {}  # NEXT_STEP: last observation, and whether it was a time limit
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    # ---- the run --------------------------------------------------------------------------------------------------

    def reset(self) -> VecEnvObs:
        """Begin an episode in each environment.

        :return: First observations
        """
        obs, infos = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self.reset_infos = self._listed(infos)
        self._reset_seeds()
        self._reset_options()
        self._ended = {}
        return self._copied(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions of the next step.

        :param actions: One per environment
        """
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Make the step.

        :return: Observations, rewards, ends of episodes, and infos
        """
        obs, rewards, terminated, truncated, vector_infos = self.env.step(self._actions)
        obs, infos = self._copied(obs), self._listed(vector_infos)
        rewards, dones = np.asarray(rewards, dtype=np.float32), np.logical_or(terminated, truncated)
        limits = np.logical_and(truncated, ~np.asarray(terminated))
        if self.autoreset_mode == "NextStep":
            return obs, rewards, self._told_later(obs, dones, limits, infos), infos
        if dones.any():
            if self.autoreset_mode == "Disabled":
                self._mark_ends(infos, dones, limits, [_row(obs, i) for i in range(self.num_envs)])
                obs, reset_infos = self.env.reset(options={"reset_mask": dones})
                obs = self._copied(obs)
                self._note_resets(dones, self._listed(reset_infos))
            else:
                last = vector_infos.get("final_obs", vector_infos.get("final_observation"))
                of_resets = [dict(info) for info in infos]
                for i in np.flatnonzero(dones):
                    infos[i] = infos[i].get("final_info", {})
                self._note_resets(dones, [_without(info, "final_") for info in of_resets])
                self._mark_ends(infos, dones, limits, last)
        return obs, rewards, dones, infos

    def _told_later(self, obs: Any, dones: np.ndarray, limits: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """Tell the ends of the step before, which was the last one, now that their first observations are here."""
        told = np.zeros(self.num_envs, dtype=bool)
        for i, (last, was_limit) in self._ended.items():
            told[i] = True
            self.reset_infos[i] = dict(infos[i])
            infos[i] |= {"terminal_observation": last, "TimeLimit.truncated": was_limit}
        self._ended = {i: (_row(obs, i), bool(limits[i])) for i in np.flatnonzero(dones).tolist()}
        return told

    @staticmethod
    def _mark_ends(infos: list[dict[str, Any]], dones: np.ndarray, limits: np.ndarray, last: Any) -> None:
        for i in np.flatnonzero(dones):
            infos[i] |= {"terminal_observation": last[i], "TimeLimit.truncated": bool(limits[i])}

    def _note_resets(self, dones: np.ndarray, infos: list[dict[str, Any]]) -> None:
        for i in np.flatnonzero(dones):
            self.reset_infos[i] = infos[i]

    @staticmethod
    def _copied(obs: Any) -> Any:
        """Keep nothing that the environment may write into."""
        return {name: np.array(part) for name, part in obs.items()} if isinstance(obs, dict) else np.array(obs)

    def _listed(self, infos: dict[str, Any]) -> list[dict[str, Any]]:
        """Make a dictionary per environment of gymnasium's arrays, whose masks say which environments have an entry."""
        found: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for name, values in infos.items():
            if name.startswith("_") and name[1:] in infos:
                continue
            mask = infos.get(f"_{name}", np.ones(self.num_envs, dtype=bool))
            parts = self._listed(values) if isinstance(values, dict) else values
            for i in np.flatnonzero(mask):
                found[i][name] = parts[i]
        return found

    # ---- what else SB3 asks for -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the environments."""
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Read an attribute of the environments, or of the vector environment where they are one.

        :param attr_name: Name
        :param indices: Which environments
        :return: One value per environment
        """
        several = self._having("get_attr")
        if several is None:
            return [getattr(self._one(attr_name), attr_name) for _ in self._get_indices(indices)]
        values = several.get_attr(attr_name)
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the environments.

        :param attr_name: Name
        :param value: The same for all that are named
        :param indices: Which environments; all of them, where they are one
        :raises ValueError: If some are named of environments that are one
        """
        several, chosen = self._having("get_attr", "set_attr"), list(self._get_indices(indices))
        if several is not None:
            values = list(several.get_attr(attr_name)) if len(chosen) < self.num_envs else [value] * self.num_envs
            several.set_attr(attr_name, [value if i in chosen else values[i] for i in range(self.num_envs)])
        elif len(chosen) == self.num_envs:
            setattr(self._one(attr_name), attr_name, value)
        else:
            raise ValueError(
                f"indices={indices!r} names {len(chosen)} of {self.num_envs} environments, and {type(self.env).__name__} has "
                f"one {attr_name} for all of them. Leave indices out."
            )

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Call a method of the environments, or of the vector environment where they are one.

        :param method_name: Name
        :param args: Arguments
        :param indices: Which environments. Gymnasium's ``AsyncVectorEnv``, and environments that are one, call it for all,
            and this then chooses among the results, which is said once per method
        :param kwargs: Arguments by name
        :return: One result per environment
        """
        several, chosen = self._having("call"), list(self._get_indices(indices))
        each = getattr(several, "envs", None)  # of a SyncVectorEnv
        if each is not None:
            return [each[i].get_wrapper_attr(method_name)(*args, **kwargs) for i in chosen]
        if len(chosen) < self.num_envs and method_name not in self._for_all:
            self._for_all.add(method_name)
            warn_user(
                f"{type(self.env).__name__} calls {method_name} for all {self.num_envs} environments; indices={indices!r} "
                "chooses among the results. If it changes anything, it does so in all of them."
            )
        if several is None:
            results = [getattr(self._one(method_name), method_name)(*args, **kwargs)] * self.num_envs
        else:
            results = several.call(method_name, *args, **kwargs)
        return [results[i] for i in chosen]

    def _one(self, name: str) -> Any:
        """The vector environment that has an attribute; one that nothing has is missed by name, or set, in the outermost."""
        found = self._having(name)
        return self.env if found is None else found

    def _having(self, *names: str) -> Any:
        """Look for the outermost of the vector environment and what it wraps that has these; wrappers pass nothing on."""
        found: Any = self.env
        while not all(hasattr(found, name) for name in names):
            if not isinstance(found, gym.vector.VectorWrapper):
                return None
            found = found.env
        return found

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Say that no wrapper is inside that SB3 could look for.

        :param wrapper_class: Wrapper
        :param indices: Which environments
        :return: False for each
        """
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Render the environments.

        :return: One image per environment, as far as there are any
        """
        images: Any = self.env.render()
        return [None] * self.num_envs if images is None else list(images)


def _row(obs: Any, i: int) -> Any:
    return {name: np.array(part[i]) for name, part in obs.items()} if isinstance(obs, dict) else np.array(obs[i])


def _without(info: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name: value for name, value in info.items() if not name.startswith(prefix)}
