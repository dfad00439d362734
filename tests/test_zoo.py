"""RL Zoo's own commands work on the configurations in zoo_configs/, and these differ from RL Zoo's only as they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import rl_zoo3.import_envs  # noqa: F401  (registers environments without velocities)
import torch as th
import yaml
from gymnasium import spaces
from rl_zoo3.utils import get_class_by_name, get_wrapper_class
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecEnv

from sb3_flipout import FlipES
from sb3_flipout.envs import minatar
from sb3_flipout.policies import FlipoutPolicyMixin
from sb3_flipout.policies.extractors import MinAtarCNN

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "zoo_configs"

# ---- the table: what each file is about, and what weight noise takes the place of ------------------------------------

NOISE = {"family", "sigma_init", "learn_sigma", "resample", "perturb"}  # what every file writes out
GSDE_POLICY = frozenset({"log_std_init", "use_expln"})
NO_EPSILON = {"exploration_initial_eps": 0.0, "exploration_final_eps": 0.0}
MINATAR = [f"MinAtar/{game}-v1" for game in ("Breakout", "Asterix", "Freeway", "Seaquest", "SpaceInvaders")]

_FALLS = {"update_noise", "schedule", "schedule_fraction"}
#: The recipe for sparse control, which a comment in the file tells of, and the further settings that it has.
SPARSE = {
    ("sac", "MountainCarContinuous-v0"): {*_FALLS, "act_by_mode"},
    ("td3", "MountainCarContinuous-v0"): _FALLS,
}

CLASSIC = {"CartPole-v1", "Acrobot-v1", "Pendulum-v1"}
CONTINUOUS = {"Pendulum-v1", "MountainCarContinuous-v0", "LunarLanderContinuous-v3"}
DISCRETE = {"CartPole-v1", "MountainCar-v0", "LunarLander-v3", "Acrobot-v1", "atari", *MINATAR}


@dataclass(frozen=True)
class Zoo:
    """What one file holds, and what of RL Zoo's file is not in it as it was."""

    algorithm: type[BaseAlgorithm]
    envs: set[str]
    left_out: frozenset[str] = frozenset()  # of the arguments of the algorithm
    left_out_of_policy: frozenset[str] = frozenset()  # of policy_kwargs
    changed: Mapping[str, Any] = field(default_factory=dict)  # whatever RL Zoo has there
    acts: bool = False  # whether the policy has an actor that learns from replayed transitions

    @property
    def replays(self) -> bool:
        return issubclass(self.algorithm, OffPolicyAlgorithm)

    @property
    def stated(self) -> set[str]:
        """Noise settings that each of its policy_kwargs writes out."""
        return (
            NOISE | ({"target_noise"} if self.replays else set()) | (set() if self.acts else {"schedule", "schedule_fraction"})
        )


def actor(algorithm: type[BaseAlgorithm], left_out: set[str], of_policy: frozenset[str] = frozenset()) -> Zoo:
    return Zoo(algorithm, CONTINUOUS, frozenset(left_out), of_policy, acts=True)


ZOO: dict[str, Zoo] = {
    "ppo": Zoo(PPO, CLASSIC | {"atari"}),
    "a2c": Zoo(A2C, CLASSIC | {"atari"}),
    "trpo": Zoo(TRPO, CLASSIC),  # RL Zoo has no settings for Atari
    "ppo_lstm": Zoo(RecurrentPPO, {"CartPoleNoVel-v1", "Acrobot-v1", "PendulumNoVel-v1", "atari"}),
    "sac": actor(SAC, {"use_sde"}, GSDE_POLICY),
    "tqc": actor(TQC, {"use_sde"}, GSDE_POLICY),
    "crossq": actor(CrossQ, {"use_sde"}, GSDE_POLICY),
    "td3": actor(TD3, {"noise_type", "noise_std"}),
    "ddpg": actor(DDPG, {"noise_type", "noise_std"}),
    "dqn": Zoo(DQN, DISCRETE, changed=NO_EPSILON),
    "qrdqn": Zoo(QRDQN, DISCRETE, changed=NO_EPSILON),
}
ACTORS = [name for name, zoo in ZOO.items() if zoo.acts]
VALUES = [name for name, zoo in ZOO.items() if zoo.changed == NO_EPSILON]
CONFIGS = {name: yaml.safe_load((FOLDER / f"{name}.yml").read_text()) for name in ZOO}
CASES = [(name, env) for name, config in CONFIGS.items() for env in config]

# What RL Zoo lets policy_kwargs use.
NAMES = {"th": th, "nn": th.nn, "RMSpropTFLike": RMSpropTFLike, "get_class_by_name": get_class_by_name}

# Written out, since LunarLander needs Box2D to be made, and images and games are behind wrappers.
SPACES: dict[str, tuple[spaces.Box, spaces.Space[Any]]] = {
    "LunarLander-v3": (spaces.Box(-1, 1, (8,)), spaces.Discrete(4)),
    "LunarLanderContinuous-v3": (spaces.Box(-1, 1, (8,)), spaces.Box(-1, 1, (2,))),
    "atari": (spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6)),
    # Behind ChannelsFirst; the channels differ.
    "MinAtar/Breakout-v1": (spaces.Box(0, 1, (4, 10, 10)), spaces.Discrete(3)),
    "MinAtar/Asterix-v1": (spaces.Box(0, 1, (4, 10, 10)), spaces.Discrete(5)),
    "MinAtar/Freeway-v1": (spaces.Box(0, 1, (7, 10, 10)), spaces.Discrete(3)),
    "MinAtar/Seaquest-v1": (spaces.Box(0, 1, (10, 10, 10)), spaces.Discrete(6)),
    "MinAtar/SpaceInvaders-v1": (spaces.Box(0, 1, (6, 10, 10)), spaces.Discrete(4)),
}


class SpacesOnly(gym.Env):
    """Has the spaces of an environment, and cannot be played."""

    def __init__(self, env: str) -> None:
        self.observation_space, self.action_space = SPACES[env]


def environment(name: str, env: str) -> VecEnv:
    n_envs = CONFIGS[name][env].get("n_envs", 1)
    return make_vec_env((lambda: SpacesOnly(env)) if env in SPACES else env, n_envs=n_envs)


def read_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    kwargs: dict[str, Any] = eval(config.get("policy_kwargs", "dict()"), dict(NAMES))
    return kwargs


def policy_kwargs(name: str, env: str) -> dict[str, Any]:
    return read_kwargs(CONFIGS[name][env])


def policy_class(name: str, env: str) -> type[Any]:
    return ZOO[name].algorithm.policy_aliases[CONFIGS[name][env]["policy"]]


# ---- the files ------------------------------------------------------------------------------------------------------


def test_every_file_is_in_the_table() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {*ZOO, "flipes"}  # of which RL Zoo has no file
    assert {path.suffix for path in FOLDER.iterdir()} == {".yml"}


@pytest.mark.parametrize("name", ZOO)
def test_environments(name: str) -> None:
    assert set(CONFIGS[name]) == ZOO[name].envs


@pytest.mark.parametrize("name", ZOO)
def test_header_gives_the_commands(name: str) -> None:
    path, first = f"zoo_configs/{name}.yml", next(iter(CONFIGS[name]))
    header = (REPOSITORY / path).read_text()
    assert f"rl_zoo3.train --algo {name} --env {first} --conf-file {path} --gym-packages sb3_flipout\n" in header
    assert f"rl_zoo3.enjoy --algo {name} --env {first} --folder logs --no-render\n" in header


@pytest.mark.parametrize("name", VALUES)
def test_minatar_commands_are_there(name: str) -> None:
    path = f"zoo_configs/{name}.yml"
    text = (REPOSITORY / path).read_text().replace(" \\\n#    ", "")
    packages = "--gym-packages sb3_flipout.envs.minatar\n"
    assert f"rl_zoo3.train --algo {name} --env MinAtar/Breakout-v1 --conf-file {path} {packages}" in text
    assert f"rl_zoo3.enjoy --algo {name} --env MinAtar/Breakout-v1 --folder logs --no-render {packages}" in text


@pytest.mark.parametrize(("name", "env"), CASES)
def test_policy_is_registered_and_takes_its_settings(name: str, env: str) -> None:
    zoo, config, stated = ZOO[name], CONFIGS[name][env], policy_kwargs(name, env)
    assert issubclass(policy_class(name, env), FlipoutPolicyMixin)

    # Of strings RL Zoo makes schedules; of the buffer only a small one is made.
    known = set(signature(zoo.algorithm).parameters) - {"learning_rate", "clip_range", "policy_kwargs"}
    settings = {key: value for key, value in config.items() if key in known} | ({"buffer_size": 100} if zoo.replays else {})
    model: Any = zoo.algorithm(env=environment(name, env), policy_kwargs=stated, device="cpu", **settings)
    assert type(model.policy) is policy_class(name, env)
    noise = {key: value for key, value in stated.items() if hasattr(model.policy.noise_settings, key)}
    assert zoo.stated <= set(noise)
    for key, value in noise.items():
        assert getattr(model.policy.noise_settings, key) == value

    if zoo.acts:
        assert model.action_noise is None
        assert not model.use_sde
        assert noise["resample"] == (32 if (name, env) in SPARSE else "episode")
    if name in VALUES:
        assert model.exploration_initial_eps == model.exploration_final_eps == 0.0
        assert model.exploration_fraction > 0  # SB3 divides by it


@pytest.mark.parametrize(("name", "env"), [case for case in CASES if case[1] not in MINATAR])  # of which RL Zoo has none
def test_differs_from_rl_zoo_only_as_stated(name: str, env: str) -> None:
    spec, zoo, changed = importlib.util.find_spec("rl_zoo3"), ZOO[name], dict(ZOO[name].changed)
    assert spec is not None
    assert spec.origin is not None
    stock = yaml.safe_load((Path(spec.origin).parent / "hyperparams" / f"{name}.yml").read_text())[env]
    ours = dict(CONFIGS[name][env])
    if env == "atari" and not zoo.replays:
        assert stock["ent_coef"] == 0.01
        changed["ent_coef"] = 0.0
    if (name, env) == ("sac", "MountainCarContinuous-v0"):
        assert stock["ent_coef"] == 0.1
        changed["ent_coef"] = "auto"
    assert ours.pop("policy") == "Flipout" + stock.pop("policy")
    kwargs, stock_kwargs = read_kwargs(ours), read_kwargs(stock)
    for config in (ours, stock):
        config.pop("policy_kwargs", None)
    assert ours == {key: value for key, value in stock.items() if key not in zoo.left_out} | changed

    noise = {key for key in kwargs if key not in stock_kwargs}
    assert noise == zoo.stated | ({"layers"} if env == "atari" and name in VALUES else set()) | SPARSE.get((name, env), set())
    assert {key: value for key, value in kwargs.items() if key not in noise} == {
        key: value for key, value in stock_kwargs.items() if key not in zoo.left_out_of_policy
    }


@pytest.mark.parametrize("env", MINATAR)
@pytest.mark.parametrize("name", VALUES)
def test_minatar_games_get_these_spaces(name: str, env: str) -> None:
    config = CONFIGS[name][env]
    assert config == CONFIGS[name][MINATAR[0]]
    wrap = get_wrapper_class(config)
    assert wrap is not None
    game = wrap(gym.spec(env).make(**config["env_kwargs"]))
    assert (game.observation_space, game.action_space.n) == (SPACES[env][0], SPACES[env][1].n)
    assert isinstance(game, minatar.ChannelsFirst)
    assert game.spec.max_episode_steps == 5000


# ---- FlipES, which RL Zoo does not know -----------------------------------------------------------------------------

FLIPES = yaml.safe_load((FOLDER / "flipes.yml").read_text())


@pytest.mark.parametrize("env", FLIPES)
def test_entries_of_flipes_are_arguments_of_it(env: str) -> None:
    config = dict(FLIPES[env])
    for name in ("n_timesteps", "normalize"):
        config.pop(name)
    kwargs, n_envs = read_kwargs(config), config.pop("n_envs")
    space = spaces.Box(-1, 1, (2,)) if env == "Swimmer-v5" else gym.make(env).action_space

    class Like(gym.Env[Any, Any]):
        observation_space, action_space = spaces.Box(-1, 1, (8,)), space

    model = FlipES(env=make_vec_env(Like, n_envs), device="cpu", **{**config, "policy_kwargs": kwargs})  # type: ignore[arg-type]
    assert model.population_size == config["population_size"] == n_envs
    assert model.policy.noise_settings.sigma_init == kwargs["sigma_init"]


def zoo_of_ours(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sb3_flipout.zoo", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)


def test_flipes_is_trained_and_enjoyed_by_rl_zoos_commands(tmp_path: Path) -> None:
    header = (FOLDER / "flipes.yml").read_text()
    for command in ("train --algo flipes --env CartPole-v1 --conf-file zoo_configs/flipes.yml", "enjoy --algo flipes"):
        assert f"#   python -m sb3_flipout.zoo {command}" in header
    chosen = ["--algo", "flipes", "--env", "CartPole-v1"]
    conf = ["--conf-file", str(FOLDER / "flipes.yml"), "-n", "3000", "--seed", "1", "--num-threads", "1", "--device", "cpu"]
    done = zoo_of_ours("train", *chosen, *conf, "--eval-freq", "-1", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = tmp_path / "logs" / "flipes" / "CartPole-v1_1" / "CartPole-v1.zip"
    assert FlipES.load(saved, device="cpu").num_timesteps >= 3000
    done = zoo_of_ours("enjoy", *chosen, "--folder", "logs", "--no-render", "-n", "200", folder=tmp_path)
    assert done.returncode == 0 and "Mean reward" in done.stdout, done.stdout + done.stderr


def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    done = zoo_of_ours("trian", folder=tmp_path)
    assert done.returncode == 1 and "usage: python -m sb3_flipout.zoo {train,enjoy," in done.stderr


# ---- the commands ---------------------------------------------------------------------------------------------------


def zoo_command(module: str, *arguments: str) -> str:
    """Run one of RL Zoo's commands in the repository and give what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", f"rl_zoo3.{module}", *arguments, "--num-threads", "1", "--device", "cpu"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def package(env: str) -> str:
    return "sb3_flipout.envs.minatar" if env in MINATAR else "sb3_flipout"


def train(name: str, env: str, steps: int, folder: Path, *arguments: str) -> BaseAlgorithm:
    """Train by the command of the header, shortened, and load what it saved."""
    command = ["--algo", name, "--env", env, "--conf-file", f"zoo_configs/{name}.yml", "--gym-packages", package(env)]
    zoo_command("train", *command, "-n", str(steps), "-f", str(folder), "--seed", "1", *arguments)
    file, zoo = env.replace("/", "-"), ZOO[name]
    # The buffer is not in the zip, and would be made anew.
    small = {"custom_objects": {"buffer_size": 1}} if zoo.replays else {}
    model: Any = zoo.algorithm.load(folder / name / f"{file}_1" / f"{file}.zip", device="cpu", **small)
    assert isinstance(model.policy, FlipoutPolicyMixin)
    assert model.num_timesteps >= steps
    if zoo.replays:
        assert model.policy.learning.step > 0  # gradient steps were taken
    return model


def assert_stated_noise(model: Any, name: str, env: str) -> None:
    """Look for what the file says in a model that RL Zoo has saved."""
    assert type(model.policy) is policy_class(name, env)
    stated = policy_kwargs(name, env)
    for key in ZOO[name].stated | (stated.keys() & {"layers"}):
        assert getattr(model.policy.noise_settings, key) == stated[key]
    if name in VALUES:
        assert model.exploration_rate == 0.0


def play(name: str, env: str, steps: int, folder: Path, *arguments: str) -> str:
    command = ["--algo", name, "--env", env, "--folder", str(folder), "--no-render", "-n", str(steps)]
    return zoo_command("enjoy", *command, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "env", "steps"),
    [
        ("ppo", "CartPole-v1", 1024),
        ("a2c", "CartPole-v1", 800),
        ("trpo", "CartPole-v1", 4096),
        ("ppo", "Pendulum-v1", 4096),
        ("a2c", "Pendulum-v1", 640),
        ("trpo", "Pendulum-v1", 4096),
        ("trpo", "Acrobot-v1", 4096),
        ("ppo_lstm", "CartPoleNoVel-v1", 512),
        ("ppo_lstm", "PendulumNoVel-v1", 4096),
        # Gradient steps in the last 300 of them; CrossQ's critics are wide.
        ("sac", "Pendulum-v1", 2000),
        ("td3", "Pendulum-v1", 2000),
        ("ddpg", "Pendulum-v1", 2000),
        ("tqc", "Pendulum-v1", 2000),
        ("crossq", "Pendulum-v1", 400),
        ("dqn", "CartPole-v1", 1536),
        ("qrdqn", "CartPole-v1", 1536),
    ],
)
def test_train_then_enjoy(name: str, env: str, steps: int, tmp_path: Path) -> None:
    late = ["--hyperparams", f"learning_starts:{steps - 300}"] if ZOO[name].acts else []
    model = train(name, env, steps, tmp_path, *late)
    assert_stated_noise(model, name, env)
    if name == "qrdqn":
        assert model.policy.n_quantiles == policy_kwargs(name, env)["n_quantiles"]

    rewards = [
        [line for line in play(name, env, 600, tmp_path, *packages).splitlines() if line.startswith("Mean reward")]
        for packages in ([], ["--gym-packages", "sb3_flipout"])  # the saved policy imports the plugin by itself
    ]
    assert len(rewards[0]) == 1
    assert rewards[0] == rewards[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTORS)
def test_mountain_car(name: str, tmp_path: Path) -> None:
    env = "MountainCarContinuous-v0"
    assert_stated_noise(train(name, env, 256, tmp_path), name, env)


ENSEMBLE = {"members": 5, "prior_scale": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "env", "steps", "others", "noise", "arguments"),
    [
        ("ppo", "CartPole-v1", 256, "", {"family": "factorised", "sigma_init": 0.3}, []),
        (
            "ddpg",
            "Pendulum-v1",
            400,
            "net_arch=[16]",
            {"family": "isotropic", "sigma_init": 0.2, "resample": "episode"},
            ["learning_starts:100"],
        ),
        ("dqn", "CartPole-v1", 1280, "net_arch=[16], resample='episode'", ENSEMBLE, []),
        ("qrdqn", "CartPole-v1", 1280, "net_arch=[16], resample='episode'", ENSEMBLE, []),
    ],
)
def test_noise_from_the_command_line(
    name: str, env: str, steps: int, others: str, noise: dict[str, Any], arguments: list[str], tmp_path: Path
) -> None:
    written = ", ".join(filter(None, [others, *(f"{key}={value!r}" for key, value in noise.items())]))
    model = train(name, env, steps, tmp_path, "--hyperparams", f"policy_kwargs:dict({written})", *arguments)
    assert {key: getattr(model.policy.noise_settings, key) for key in noise} == noise


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, env in CASES if env == "atari"])
def test_atari(name: str, tmp_path: Path) -> None:
    of_ppo = ["batch_size:64", "n_epochs:1"] if name.startswith("ppo") else []
    small, steps = ["n_envs:2", "n_steps:64", *of_ppo], 256
    if ZOO[name].replays:
        small, steps = ["learning_starts:100", "buffer_size:1000"], 200
    model = train(name, "PongNoFrameskip-v4", steps, tmp_path, "--hyperparams", *small)
    assert_stated_noise(model, name, "atari")
    assert model.observation_space.shape == (4, 84, 84)


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUES)
def test_minatar(name: str, tmp_path: Path) -> None:
    env = "MinAtar/Breakout-v1"
    small = ["--hyperparams", "learning_starts:100", "buffer_size:1000"]
    limit = ["--eval-env-kwargs", "max_episode_steps:50", "disable_env_checker:True"]
    model = train(name, env, 400, tmp_path, *small, "--eval-freq", "200", "--eval-episodes", "2", *limit)
    assert_stated_noise(model, name, env)
    assert isinstance(model.policy.online.features_extractor, MinAtarCNN)
    assert model.observation_space.shape == (4, 10, 10)
    assert "Mean reward" in play(name, env, 300, tmp_path, "--gym-packages", package(env))
