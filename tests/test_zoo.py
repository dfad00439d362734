"""RL Zoo's own commands work on the configurations in zoo_configs/, and these differ from RL Zoo's only as they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
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
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from sb3_flipout import FlipES
from sb3_flipout.envs import minatar
from sb3_flipout.policies import FlipoutPolicyMixin
from sb3_flipout.policies.extractors import MinAtarCNN

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "zoo_configs"

# ---- the table: what each file is about, and what weight noise takes the place of ------------------------------------

GSDE_POLICY = frozenset({"log_std_init", "use_expln"})
NO_EPSILON = {"exploration_initial_eps": 0.0, "exploration_final_eps": 0.0}
MINATAR = [f"MinAtar/{game}-v1" for game in ("Breakout", "Asterix", "Freeway", "Seaquest", "SpaceInvaders")]
SEA = "sb3_flipout/DeepSea-v0"
CAR = "MountainCarContinuous-v0"

CLASSIC = {"CartPole-v1", "Acrobot-v1", "MountainCar-v0", "LunarLander-v3"}
MUJOCO = {f"{robot}-v5": size for robot, size in dict(HalfCheetah=17, Hopper=11, Walker2d=17, Ant=105, Swimmer=8).items()}
CONTINUOUS = {"Pendulum-v1", CAR, "LunarLanderContinuous-v3", *MUJOCO}
BOTH = CLASSIC | CONTINUOUS

_FALLS = {"schedule", "schedule_fraction"}
NOISE = {"family", "sigma_init", "learn_sigma", "resample", "perturb"}  # what every file but FlipES's writes out
#: The further settings of recipes, of which comments in the files tell.
RECIPES = {
    ("sac", CAR): {*_FALLS, "update_noise", "act_by_mode"},
    ("td3", CAR): {*_FALLS, "update_noise"},
    **{(name, SEA): {"members", "keys_per_transition", "prior_scale"} for name in ("dqn", "qrdqn")},
}


@dataclass(frozen=True)
class Zoo:
    """What one file holds, and what of RL Zoo's file is not in it as it was."""

    algorithm: type[BaseAlgorithm]
    envs: set[str]
    left_out: frozenset[str] = frozenset()  # of the arguments of the algorithm
    left_out_of_policy: frozenset[str] = frozenset()  # of policy_kwargs
    changed: Mapping[str, Any] = field(default_factory=dict)  # whatever RL Zoo has there
    acts: bool = False  # whether the policy has an actor that learns from replayed transitions
    stock: str | None = ""  # name of RL Zoo's file, where it is not that of ours; None: there is none

    @property
    def replays(self) -> bool:
        return issubclass(self.algorithm, OffPolicyAlgorithm)


def actor(algorithm: type[BaseAlgorithm], left_out: set[str], of_policy: frozenset[str] = frozenset()) -> Zoo:
    return Zoo(algorithm, CONTINUOUS, frozenset(left_out), of_policy, acts=True)


ZOO: dict[str, Zoo] = {
    "ppo": Zoo(PPO, {*BOTH, *MINATAR, "atari"}),
    "a2c": Zoo(A2C, {*BOTH, *MINATAR, "atari"}),
    "trpo": Zoo(TRPO, BOTH),  # RL Zoo has no settings for Atari
    "ppo_lstm": Zoo(RecurrentPPO, {*BOTH, "CartPoleNoVel-v1", "PendulumNoVel-v1", "atari"}),
    "ppo_mask": Zoo(MaskablePPO, CLASSIC, stock="ppo"),
    "sac": actor(SAC, {"use_sde"}, GSDE_POLICY),
    "tqc": actor(TQC, {"use_sde"}, GSDE_POLICY),
    "crossq": actor(CrossQ, {"use_sde"}, GSDE_POLICY),
    "td3": actor(TD3, {"noise_type", "noise_std"}),
    "ddpg": actor(DDPG, {"noise_type", "noise_std"}),
    "dqn": Zoo(DQN, {*CLASSIC, *MINATAR, SEA, "atari"}, changed=NO_EPSILON),
    "qrdqn": Zoo(QRDQN, {*CLASSIC, *MINATAR, SEA, "atari"}, changed=NO_EPSILON),
    "flipes": Zoo(FlipES, BOTH, stock=None),
}
ACTORS = [name for name, zoo in ZOO.items() if zoo.acts]
VALUES = [name for name, zoo in ZOO.items() if zoo.changed == NO_EPSILON]
PLAY_GAMES = [name for name, zoo in ZOO.items() if MINATAR[0] in zoo.envs]
OURS = ("ppo_mask", "flipes")  # RL Zoo does not know these algorithms, our commands do
CONFIGS = {name: yaml.safe_load((FOLDER / f"{name}.yml").read_text()) for name in ZOO}
CASES = [(name, env) for name, config in CONFIGS.items() for env in config]

# What RL Zoo lets policy_kwargs use, and what it takes itself.
NAMES = {"th": th, "nn": th.nn, "RMSpropTFLike": RMSpropTFLike, "get_class_by_name": get_class_by_name}
CONSUMED = {"n_timesteps", "n_envs", "normalize", "frame_stack", "env_wrapper", "vec_env_wrapper", "env_kwargs", "callback"}
CONSUMED |= {"monitor_kwargs", "noise_type", "noise_std", "policy", "policy_kwargs"}

# Written out, since some need Box2D or MuJoCo to be made, and images and games are behind wrappers.
SPACES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "LunarLander-v3": (spaces.Box(-1, 1, (8,)), spaces.Discrete(4)),
    "LunarLanderContinuous-v3": (spaces.Box(-1, 1, (8,)), spaces.Box(-1, 1, (2,))),
    **{env: (spaces.Box(-np.inf, np.inf, (size,), np.float64), spaces.Box(-1, 1, (2,))) for env, size in MUJOCO.items()},
    "atari": (spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6)),
    SEA: (spaces.Discrete(400), spaces.Discrete(2)),
    # Behind ChannelsFirst: channels and actions, which differ.
    **{
        env: (spaces.Box(0, 1, (channels, 10, 10)), spaces.Discrete(actions))
        for env, channels, actions in zip(MINATAR, (4, 4, 7, 10, 6), (3, 5, 3, 6, 4), strict=True)
    },
}


class SpacesOnly(gym.Env[Any, Any]):
    """Has the spaces of an environment, and cannot be played."""

    def __init__(self, env: str) -> None:
        self.observation_space, self.action_space = SPACES[env]


def make(env: str) -> gym.Env[Any, Any]:
    return SpacesOnly(env) if env in SPACES else gym.make(env)


def read_kwargs(config: Mapping[str, Any]) -> dict[str, Any]:
    kwargs: dict[str, Any] = eval(config.get("policy_kwargs", "dict()"), dict(NAMES))
    return kwargs


def policy_class(name: str, env: str) -> type[Any]:
    return ZOO[name].algorithm.policy_aliases[CONFIGS[name][env]["policy"]]


def stated(name: str, env: str) -> set[str]:
    """Noise settings that policy_kwargs of an entry writes out."""
    if name == "flipes":
        return {"family", "sigma_init"}
    found = NOISE | ({"target_noise"} if ZOO[name].replays else set()) | (set() if ZOO[name].acts else _FALLS)
    found |= {"layers"} if env == "atari" and name in VALUES else set()
    return (found | RECIPES.get((name, env), set())) - ({"schedule_fraction"} if env == SEA else set())


# ---- what is said of each entry --------------------------------------------------------------------------------------

_SCORE, _HASH = r"-?\d+\.\d", r"[0-9a-f]{7,40}\+?"
RUN = re.compile(
    rf"# run: (?P<mean>{_SCORE}) \((?P<worst>{_SCORE})\), mean weights, "
    r"(?P<seeds>\d+) seeds \((?P<first>\d+) to (?P<last>\d+)\), (?P<steps>\d[\d,]*(?: to \d[\d,]*)?) steps, "
    rf"commit (?P<commit>{_HASH}(?:/{_HASH})*); RL Zoo's stock in the same runs: (?P<stock>{_SCORE}|none)"
)
ADDED = "# not run: RL Zoo's settings with noise added"
#: Where it names an entry of RL Zoo, ours is that one with noise added.
SETTINGS_OF = re.compile(r"# not run: settings of (?:RL Zoo's (?P<entry>\S+) \(RL Zoo has no \S+\)|\S.*)")
LINES = {
    (name, env): line
    for name in ZOO
    for line, env in re.findall(r"^(.*)\n([A-Za-z][\w/.-]*):", (FOLDER / f"{name}.yml").read_text(), re.MULTILINE)
}

#: Where the runs are of which `run:` tells: file, task, arm, and the arm of RL Zoo's own settings.
RUNS: dict[tuple[str, str], tuple[str, str, str, str | None]] = {
    **{("ppo", env): ("defaults", f"PPO {env}", "flipout", "stock") for env in ("CartPole-v1", "Pendulum-v1")},
    **{
        ("ppo", env): ("zoo_entries", f"PPO {env}", "flipout", stock)
        for env, stock in (("Acrobot-v1", None), ("MountainCar-v0", "stock"), (CAR, None), ("LunarLander-v3", None))
    },
    ("dqn", "Acrobot-v1"): ("zoo_entries", "DQN Acrobot-v1", "flipout", None),
    ("a2c", "CartPole-v1"): ("defaults", "A2C CartPole-v1", "flipout", "stock"),
    **{("dqn", env): ("defaults", f"DQN {env}", "flipout", "stock") for env in ("CartPole-v1", "LunarLander-v3")},
    ("dqn", "MountainCar-v0"): ("defaults", "DQN MountainCar-v0", "episode linear@.3", "stock"),
    ("sac", CAR): ("sparse_control", "SAC", "flipout", "gsde"),
    ("sac", "Pendulum-v1"): ("defaults", "SAC Pendulum-v1", "flipout", "stock"),
    ("td3", "Pendulum-v1"): ("defaults", "TD3 Pendulum-v1", "flipout", "stock"),
    **{
        ("flipes", env): ("evolution_learning", env, "flipout", None)
        for env in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", CAR, "Swimmer-v5")
    },
}


@pytest.mark.parametrize(("name", "env"), CASES)
def test_each_entry_says_whether_it_was_run(name: str, env: str) -> None:
    line = LINES[name, env]
    run = RUN.fullmatch(line)
    if run is None:
        assert line == ADDED or SETTINGS_OF.fullmatch(line)
        return
    assert int(run["last"]) - int(run["first"]) + 1 == int(run["seeds"])
    assert float(run["worst"]) <= float(run["mean"])


@pytest.mark.parametrize(("name", "env"), RUNS)
def test_figures_are_those_of_the_runs(name: str, env: str) -> None:
    (file, task, arm, stock), told = RUNS[name, env], RUN.fullmatch(LINES[name, env])
    assert told is not None
    rows = map(json.loads, (REPOSITORY / "docs" / "benchmarks" / f"{file}.jsonl").read_text().splitlines())
    runs = {(row["arm"], row["seed"]): row for row in rows if row["task"] == task}
    ours, theirs = (
        [runs[of, seed] for seed in range(int(told["first"]), int(told["last"]) + 1)] for of in (arm, stock or arm)
    )
    scores = [row["score"] for row in ours]
    assert (told["mean"], told["worst"]) == (f"{np.mean(scores):.1f}", f"{min(scores):.1f}")
    assert told["stock"] == (f"{np.mean([row['score'] for row in theirs]):.1f}" if stock else "none")
    assert told["commit"].split("/") == list(dict.fromkeys(row["commit"] for row in ours))
    least, most = min(row["steps"] for row in ours), max(row["steps"] for row in ours)
    assert told["steps"] == (f"{most:,}" if least == most else f"{least:,} to {most:,}")
    stated_noise, noise = read_kwargs(CONFIGS[name][env]), ours[0].get("noise") or {}
    assert all(stated_noise[key] == value for key, value in noise.items() if key in stated_noise and value is not None)


# ---- the files ------------------------------------------------------------------------------------------------------


def test_every_file_is_in_the_table() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yml" for name in ZOO}
    assert set(LINES) == set(CASES)


@pytest.mark.parametrize("name", ZOO)
def test_environments_and_commands(name: str) -> None:
    assert set(CONFIGS[name]) == ZOO[name].envs
    path, first = f"zoo_configs/{name}.yml", next(iter(CONFIGS[name]))
    header, packages = (REPOSITORY / path).read_text(), "" if name in OURS else " --gym-packages sb3_flipout"
    assert f"#   python -m {program(name, 'train')} --algo {name} --env {first} --conf-file {path}{packages}\n" in header
    assert f"#   python -m {program(name, 'enjoy')} --algo {name} --env {first} --folder logs --no-render\n" in header


@pytest.mark.parametrize(("name", "env"), [case for case in CASES if case[1] in (MINATAR[0], SEA)])
def test_commands_of_games_are_there(name: str, env: str) -> None:
    text = (FOLDER / f"{name}.yml").read_text().replace(" \\\n#    ", "")
    train = f"--algo {name} --env {env} --conf-file zoo_configs/{name}.yml --gym-packages {package(env)}"
    assert f"rl_zoo3.train {train}\n" in text
    assert f"rl_zoo3.enjoy --algo {name} --env {env} --folder logs --no-render --gym-packages {package(env)}\n" in text


def parameters(kind: type[Any]) -> set[str]:
    """Names of the arguments of a class and of those that it hands arguments on to."""
    return {name for base in kind.__mro__ if "__init__" in vars(base) for name in signature(base.__init__).parameters}


@pytest.mark.parametrize(("name", "env"), CASES)
def test_policy_is_registered_and_takes_its_settings(name: str, env: str) -> None:
    zoo, config, kwargs = ZOO[name], CONFIGS[name][env], read_kwargs(CONFIGS[name][env])
    assert issubclass(policy_class(name, env), FlipoutPolicyMixin)
    known = set(signature(zoo.algorithm).parameters)
    assert set(config) <= known | CONSUMED
    assert set(kwargs) <= parameters(policy_class(name, env))

    # Of strings RL Zoo makes schedules; of the buffer only a small one is made.
    settings = {key: config[key] for key in config.keys() & known - {"learning_rate", "clip_range", "policy_kwargs"}}
    settings |= {"buffer_size": 100} if zoo.replays else {}
    vec_env = make_vec_env(lambda: make(env), config.get("n_envs", 1))
    model: Any = zoo.algorithm(env=vec_env, policy_kwargs=kwargs, device="cpu", **settings)
    assert type(model.policy) is policy_class(name, env)
    noise = {key: value for key, value in kwargs.items() if hasattr(model.policy.noise_settings, key)}
    assert set(noise) == stated(name, env)
    assert all(getattr(model.policy.noise_settings, key) == value for key, value in noise.items())
    if zoo.acts:
        assert model.action_noise is None and not model.use_sde
        assert noise["resample"] == (32 if (name, env) in RECIPES else "episode")
    if name in VALUES:
        assert model.exploration_initial_eps == model.exploration_final_eps == 0.0
        assert model.exploration_fraction > 0  # SB3 divides by it
    if "use_sde" in config:
        assert noise["perturb"] == ("policy" if name == "ppo" else "heads")
    if name == "flipes":
        assert model.population_size == config["n_envs"]


# ---- against RL Zoo's ------------------------------------------------------------------------------------------------


@cache
def stock_file(name: str) -> dict[str, Any]:
    spec, file = find_spec("rl_zoo3"), ZOO[name].stock
    assert spec is not None and spec.origin is not None
    text = "{}" if file is None else (Path(spec.origin).parent / "hyperparams" / f"{file or name}.yml").read_text()
    return dict(yaml.safe_load(text))


def stock_name(name: str, env: str) -> str | None:
    """Name of RL Zoo's entry that ours is made of, if there is one; its MuJoCo environments are of version 4."""
    told = SETTINGS_OF.fullmatch(LINES[name, env])
    own = env.replace("-v5", "-v4") if env in MUJOCO else env
    found = own if told is None or told["entry"] == "PPO" else told["entry"]
    return None if name == "flipes" or (name, env) == RECIPE else found


#: An entry with settings of its own, and not RL Zoo's with noise added; its comment says so.
RECIPE = ("ppo", CAR)
COMPARED = [case for case in CASES if stock_name(*case) is not None]


def test_every_entry_that_rl_zoo_has_is_compared_but_one_recipe() -> None:
    has = {(name, env) for name, env in CASES if {env, env.replace("-v5", "-v4")} & set(stock_file(name))}
    assert has - set(COMPARED) == {RECIPE}


@pytest.mark.parametrize(("name", "env"), COMPARED)
def test_differs_from_rl_zoo_only_as_stated(name: str, env: str) -> None:
    zoo, changed, ours = ZOO[name], dict(ZOO[name].changed), dict(CONFIGS[name][env])
    stock = dict(stock_file(name)[stock_name(name, env)])
    if env == "atari" and not zoo.replays:
        assert stock["ent_coef"] == 0.01
        changed["ent_coef"] = 0.0
    if (name, env) == ("sac", CAR):
        assert stock["ent_coef"] == 0.1
        changed["ent_coef"] = "auto"
    if name == "ppo_mask":
        changed["env_wrapper"] = ["sb3_flipout.envs.wrappers.AllowAllActions"]
    assert ours.pop("policy") == "Flipout" + stock.pop("policy")
    kwargs, stock_kwargs = read_kwargs(ours), read_kwargs(stock)
    for config in (ours, stock):
        config.pop("policy_kwargs", None)
    assert ours == {key: value for key, value in stock.items() if key not in zoo.left_out} | changed

    noise = {key for key in kwargs if key not in stock_kwargs}
    assert noise == stated(name, env)
    assert {key: value for key, value in kwargs.items() if key not in noise} == {
        key: value for key, value in stock_kwargs.items() if key not in zoo.left_out_of_policy
    }


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_minatar_has_the_settings_of_atari(name: str) -> None:
    games, atari = CONFIGS[name][MINATAR[0]], CONFIGS[name]["atari"]
    differ = {key for key in games | atari if games.get(key) != atari.get(key)}
    assert differ == {"env_wrapper", "env_kwargs", "frame_stack", "n_timesteps", "policy", "policy_kwargs"}


# ---- wrappers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", MINATAR)
@pytest.mark.parametrize("name", PLAY_GAMES)
def test_minatar_games_get_these_spaces(name: str, env: str) -> None:
    config = CONFIGS[name][env]
    assert config == CONFIGS[name][MINATAR[0]]
    wrap = get_wrapper_class(config)
    assert wrap is not None
    game: Any = wrap(gym.spec(env).make(**config["env_kwargs"]))
    assert (game.observation_space, game.action_space.n) == (SPACES[env][0], SPACES[env][1].n)
    assert isinstance(game, minatar.ChannelsFirst)
    assert game.spec.max_episode_steps == 5000


@pytest.mark.parametrize("name", VALUES)
def test_the_sea_gets_these_spaces(name: str) -> None:
    sea = gym.make(SEA, **CONFIGS[name][SEA]["env_kwargs"])
    assert (sea.observation_space, sea.action_space) == SPACES[SEA]


@pytest.mark.parametrize("env", CONFIGS["ppo_mask"])
def test_masked_environments_allow_all_actions(env: str) -> None:
    wrap = get_wrapper_class(CONFIGS["ppo_mask"][env])
    assert wrap is not None
    masked: Any = wrap(make(env))
    assert masked.action_masks().tolist() == [True] * masked.action_space.n


# ---- the commands ---------------------------------------------------------------------------------------------------


def program(name: str, verb: str) -> str:
    return f"sb3_flipout.zoo {verb}" if name in OURS else f"rl_zoo3.{verb}"


def package(env: str) -> str:
    return "sb3_flipout.envs.minatar" if env in MINATAR else "sb3_flipout"


def zoo_command(name: str, verb: str, *arguments: str) -> str:
    """Run one of the commands in the repository and give what it printed."""
    result = subprocess.run(
        [sys.executable, "-m", *program(name, verb).split(), *arguments, "--num-threads", "1", "--device", "cpu"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def train(name: str, env: str, steps: int, folder: Path, *arguments: str) -> BaseAlgorithm:
    """Train by the command of the header, shortened, and load what it saved."""
    command = ["--algo", name, "--env", env, "--conf-file", f"zoo_configs/{name}.yml", "--gym-packages", package(env)]
    zoo_command(name, "train", *command, "-n", str(steps), "-f", str(folder), "--seed", "1", *arguments)
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
    kwargs = read_kwargs(CONFIGS[name][env])
    for key in stated(name, env):
        assert getattr(model.policy.noise_settings, key) == kwargs[key]
    if name in VALUES:
        assert model.exploration_rate == 0.0


def play(name: str, env: str, steps: int, folder: Path, *arguments: str) -> str:
    command = ["--algo", name, "--env", env, "--folder", str(folder), "--no-render", "-n", str(steps)]
    return zoo_command(name, "enjoy", *command, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "env", "steps"),
    [
        ("ppo", "CartPole-v1", 1024),
        ("a2c", "CartPole-v1", 800),
        ("trpo", "CartPole-v1", 4096),
        ("ppo_mask", "CartPole-v1", 1024),
        ("flipes", "CartPole-v1", 3000),
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
    model: Any = train(name, env, steps, tmp_path, *late)
    assert_stated_noise(model, name, env)
    if name == "qrdqn":
        assert model.policy.n_quantiles == read_kwargs(CONFIGS[name][env])["n_quantiles"]

    rewards = [
        [line for line in play(name, env, 600, tmp_path, *packages).splitlines() if line.startswith("Mean reward")]
        for packages in ([], ["--gym-packages", "sb3_flipout"])  # the saved policy imports the plugin by itself
    ]
    assert len(rewards[0]) == 1
    assert rewards[0] == rewards[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", *ACTORS])
def test_mountain_car(name: str, tmp_path: Path) -> None:
    assert_stated_noise(train(name, CAR, 256, tmp_path), name, CAR)


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
    model: Any = train(name, env, steps, tmp_path, "--hyperparams", f"policy_kwargs:dict({written})", *arguments)
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
@pytest.mark.parametrize("name", PLAY_GAMES)
def test_minatar(name: str, tmp_path: Path) -> None:
    env = MINATAR[0]
    small = ["--hyperparams", "learning_starts:100", "buffer_size:1000"] if ZOO[name].replays else []
    limit = ["--eval-env-kwargs", "max_episode_steps:50", "disable_env_checker:True"]
    model: Any = train(name, env, 400, tmp_path, *small, "--eval-freq", "200", "--eval-episodes", "2", *limit)
    assert_stated_noise(model, name, env)
    network = model.policy.online if ZOO[name].replays else model.policy
    assert isinstance(network.features_extractor, MinAtarCNN)
    assert model.observation_space.shape == (4, 10, 10)
    assert "Mean reward" in play(name, env, 300, tmp_path, "--gym-packages", package(env))


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUES)
def test_deep_sea(name: str, tmp_path: Path) -> None:
    """Evaluated in the sea that it is trained in: the env_kwargs of the entry go to both."""
    model = train(name, SEA, 140, tmp_path, "--eval-freq", "70", "--eval-episodes", "2")
    assert_stated_noise(model, name, SEA)
    assert "Mean reward" in play(name, SEA, 60, tmp_path, "--gym-packages", package(SEA))
