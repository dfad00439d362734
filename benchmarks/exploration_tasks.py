"""Tables of the exploration benchmark: which arms, on which tasks, under which settings. `exploration.py` runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import gymnasium as gym
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_flipout.envs import Chain, DeepSea
from sb3_flipout.envs.wrappers import ChannelsFirst
from sb3_flipout.policies.extractors import MinAtarCNN

ANNEAL_EPISODES = 100  # over which epsilon falls: the same number whatever the cap, so that the cap changes no run's course


class Run(NamedTuple):
    """One training run; with its settings, all that it depends on."""

    task: str
    arm: str
    n_envs: int
    seed: int
    cap: int | None  # episodes; None: the task's number of steps alone decides


# ---- arms -----------------------------------------------------------------------------------------------------------

_EPSILON = dict(exploration_initial_eps=1.0, exploration_final_eps=0.1)
_NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
_NOISYNET = dict(family="factorised", noise_sharing="shared")
_MEMBERS = dict(members=10, prior_scale=0.35, resample="episode", target_noise="same")
_FALLING = dict(resample="step", learn_sigma=False, schedule="linear", schedule_fraction=0.3)  # the defaults


#: The defaults when these arms were run first; members have them still.
_LEARNED = dict(learn_sigma=True, schedule="constant")


def _weight_noise(**policy_kwargs: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    return "FlipoutMlpPolicy", _NO_EPSILON, policy_kwargs if "members" in policy_kwargs else {**_LEARNED, **policy_kwargs}


#: Name -> (policy, arguments of DQN, policy_kwargs).
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "epsilon": ("MlpPolicy", _EPSILON, {}),
    "noisynet-step": _weight_noise(**_NOISYNET, resample="step"),
    "noisynet-episode": _weight_noise(**_NOISYNET, resample="episode"),
    "flipout-step": _weight_noise(resample="step"),
    "flipout-episode": _weight_noise(resample="episode"),
    "members": _weight_noise(**_MEMBERS),
    "flipout-annealed": _weight_noise(resample="step"),
    "flipout-falling": _weight_noise(**_FALLING),
    # On MinAtar: every transition under all members, as many transitions per step as in the other arms; and epsilon-greedy
    # beside weight noise, both falling, as in BTR (Clark et al. 2024).
    "members-all": ("FlipoutMlpPolicy", dict(_NO_EPSILON, batch_size=320), dict(_MEMBERS, keys_per_transition=10)),
    "falling-and-epsilon": ("FlipoutMlpPolicy", dict(_EPSILON, exploration_final_eps=0.0), _FALLING),
    # Ablations: `members` with one thing changed.
    "members-no-prior": _weight_noise(**{**_MEMBERS, "prior_scale": 0.0}),
    "members-mean-target": _weight_noise(**{**_MEMBERS, "target_noise": "mean"}),
    "members-independent-target": _weight_noise(**{**_MEMBERS, "target_noise": "independent"}),
    "members-fixed-sigma": _weight_noise(**_MEMBERS, learn_sigma=False),
    # No end of keys, and so no prior. The target noise stays that of `members`: with the default one, this would be
    # flipout-episode again, whose base_every_steps is None too.
    "unbounded": _weight_noise(resample="episode", base_every_steps=None, target_noise="same"),
}

#: Arms whose noise scale a callback moves over the whole training: the arguments of AnnealNoise.
ANNEALED: dict[str, dict[str, float]] = {"flipout-annealed": dict(start=1.0, end=0.1)}

BASELINES = ("epsilon", "noisynet-step", "noisynet-episode")  # what others do
OURS = (
    "flipout-step",
    "flipout-annealed",
    "flipout-falling",
    "flipout-episode",
    "members",
)  # what is held against them; the ablations are not


# ---- environments ---------------------------------------------------------------------------------------------------


class GoalIsTermination(gym.Wrapper[Any, Any, Any, Any]):
    """Say `reached_goal` as our environments do, where an episode terminates at the goal and nowhere else."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {**info, "reached_goal": terminated}


#: Settings are written to JSON, so they name the extractor.
EXTRACTORS: dict[str, type[BaseFeaturesExtractor]] = {"MinAtarCNN": MinAtarCNN}


def mountain_car(seed: int) -> gym.Env[Any, Any]:
    return GoalIsTermination(gym.make("MountainCar-v0"))


def minatar(seed: int, game: str, longest: int) -> gym.Env[Any, Any]:
    import sb3_flipout.envs.minatar  # noqa: F401  (registers the games; the other tasks do without the package)

    # MinAtar has no time limit: a policy that never loses the ball would be evaluated for ever.
    # The checker would warn of observations that reset to bool, and cost time in every step.
    return ChannelsFirst(gym.make(f"MinAtar/{game}-v1", max_episode_steps=longest, disable_env_checker=True))


# ---- tasks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task and what DQN is given on it, in all arms the same."""

    make: Callable[[int], gym.Env[Any, Any]]  # given the seed of the run, which is also that of DeepSea's mapping
    episode_steps: int  # of the longest episode
    algorithm: dict[str, Any]
    policy_kwargs: dict[str, Any]
    cap: int | None = 2000  # episodes
    steps: int | None = None  # given: the score is the mean return after so many steps, and there is no goal to reach
    n_envs: tuple[int, ...] = (1, 8)
    evaluation_episodes: int = 1  # one is enough where nothing is random
    seconds_per_step: float = 0.004  # a guess for `--list`, until runs have been timed

    def total_steps(self, run: Run) -> int:
        if self.steps is not None or run.cap is None:
            return self.steps or 0
        # Whole rounds of episodes: the environments end theirs together, so the cap is only reached with the last round.
        return ceil(run.cap / run.n_envs) * run.n_envs * self.episode_steps


def _dqn(batch_size: int = 64) -> dict[str, Any]:
    return dict(
        learning_rate=1e-3,
        batch_size=batch_size,
        buffer_size=200_000,
        learning_starts=100,
        train_freq=1,
        gradient_steps=1,
        target_update_interval=100,
        gamma=0.99,
    )


def _chain(length: int) -> Task:
    return Task(lambda seed: Chain(length), length + 9, _dqn(), dict(net_arch=[50, 50]))


def _deep_sea(size: int, **kwargs: Any) -> Task:
    batch_size = 256 if size >= 30 else 64
    return Task(lambda seed: DeepSea(size, mapping_seed=seed), size, _dqn(batch_size), dict(net_arch=[50, 50]), **kwargs)


def _minatar(game: str) -> Task:
    # Settings of Young and Tian 2019, appendix, but for Adam and for a gradient step every fourth step, SB3's default.
    algorithm = dict(
        learning_rate=2.5e-4,
        batch_size=32,
        buffer_size=100_000,
        learning_starts=5000,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=1000,
        gamma=0.99,
    )
    policy_kwargs = dict(net_arch=[], features_extractor_class="MinAtarCNN")
    make = partial(minatar, game=game, longest=5000)
    return Task(make, 5000, algorithm, policy_kwargs, None, 300_000, (1,), 30, 0.0025)


# rl_zoo3's hyperparams/dqn.yml.
_MOUNTAIN_CAR = dict(
    learning_rate=4e-3,
    batch_size=128,
    buffer_size=10_000,
    learning_starts=1000,
    train_freq=16,
    gradient_steps=8,
    target_update_interval=600,
    gamma=0.98,
)

TASKS: dict[str, Task] = {
    **{f"chain-{length}": _chain(length) for length in (20, 30, 50)},
    **{f"deep-sea-{size}": _deep_sea(size) for size in (6, 10, 14, 20)},
    "deep-sea-30": _deep_sea(30, cap=3000, seconds_per_step=0.008),
    "deep-sea-50": _deep_sea(50, cap=3000, seconds_per_step=0.014),
    "mountain-car": Task(
        mountain_car, 200, _MOUNTAIN_CAR, dict(net_arch=[256, 256]), 600, None, (1,), 30, seconds_per_step=0.004
    ),
    **{f"minatar-{game.lower()}": _minatar(game) for game in ("Breakout", "Freeway", "Asterix", "Seaquest", "SpaceInvaders")},
}


def settings(run: Run) -> dict[str, Any]:
    """
    Give what DQN is built with, as JSON can say it: a run counts as done only while these are the same.

    :param run: Which run
    :return: Policy, arguments of DQN and policy_kwargs, and those of AnnealNoise, where it anneals
    """
    task, (policy, of_arm, policy_of_arm) = TASKS[run.task], ARMS[run.arm]
    steps = task.total_steps(run)
    algorithm = {**task.algorithm, **of_arm}
    # A larger buffer would never be filled: with DeepSea 50, it would ask for 4 GB.
    algorithm["buffer_size"] = min(algorithm["buffer_size"], steps)
    if run.n_envs > 1:
        algorithm["gradient_steps"] = -1  # as many as steps, as with one environment
    if algorithm["exploration_initial_eps"] > 0:
        anneal = steps / 10 if task.steps is not None else ANNEAL_EPISODES * task.episode_steps
        algorithm["exploration_fraction"] = min(1.0, anneal / steps)
    chosen = dict(policy=policy, total_steps=steps, algorithm=algorithm, policy_kwargs={**task.policy_kwargs, **policy_of_arm})
    return {**chosen, "anneal": ANNEALED[run.arm]} if run.arm in ANNEALED else chosen
