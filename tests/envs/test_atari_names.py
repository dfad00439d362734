"""Names of Atari games: registered where they exist, with near matches where they do not, and the missing extra by name."""

from __future__ import annotations

import subprocess
import sys

import gymnasium as gym
import pytest
from stable_baselines3.common.env_util import make_atari_env

from sb3_flipout.envs import atari_id


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "name", ["PongNoFrameskip-v4", "ALE/Pong-v5", "BreakoutNoFrameskip-v4", "SpaceInvadersNoFrameskip-v4"]
)
def test_gives_back_a_known_name(name: str) -> None:
    assert atari_id(name) == name
    assert name in gym.registry


def test_registers_the_games_for_make_atari_env() -> None:
    code = """
import sys
from sb3_flipout.envs import atari_id
assert "ale_py" not in sys.modules  # an extra: importing the package does without it
import gymnasium
assert "PongNoFrameskip-v4" not in gymnasium.registry
from stable_baselines3.common.env_util import make_atari_env
print(make_atari_env(atari_id("PongNoFrameskip-v4"), n_envs=2).observation_space)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "Box(0, 255, (84, 84, 1), uint8)" in result.stdout


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("PonNoFrameskip-v4", "PongNoFrameskip-v4"),
        ("pong", "PongNoFrameskip-v4"),
        ("Pong-v5", "PongNoFrameskip-v4"),
        ("PongNoFrameskip-v9", "PongNoFrameskip-v4"),
        ("ALE/Braekout-v5", "BreakoutNoFrameskip-v4"),
        ("spaceinvader", "SpaceInvadersNoFrameskip-v4"),
    ],
)
def test_unknown_name_lists_near_matches(name: str, near: str) -> None:
    with pytest.raises(ValueError, match="name must be that of an Atari game") as caught:
        atari_id(name)
    message = str(caught.value)
    assert f"got {name!r}; near matches: {near!r}" in message  # the nearest one first
    assert message.count("NoFrameskip-v4'") <= 4 + (name.endswith("NoFrameskip-v4"))  # an example, and three at most


@pytest.mark.parametrize("name", ["CartPole-v1", "", "xyzzy", None])
def test_what_is_like_nothing(name: object) -> None:
    with pytest.raises(ValueError, match=r"got .*near matches: "):
        atari_id(name)  # type: ignore[arg-type]
    assert "none" in _message("xyzzy")


def _message(name: str) -> str:
    with pytest.raises(ValueError, match="near matches") as caught:
        atari_id(name)
    return str(caught.value)


@pytest.mark.parametrize("missing", ["ale_py", "cv2"])
def test_missing_extra_is_named_with_its_command(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'sb3_flipout\[atari\]'") as caught:
        atari_id("PongNoFrameskip-v4")
    assert caught.value.name == missing


def test_the_name_plays() -> None:
    env = make_atari_env(atari_id("PongNoFrameskip-v4"))
    assert env.reset().shape == (1, 84, 84, 1)
    env.close()
