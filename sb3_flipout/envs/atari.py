"""The names of Atari games, checked before SB3's ``make_atari_env`` meets them."""

import difflib
import importlib.util

import gymnasium as gym

_REMEDY = "install the extra with: pip install 'sb3_flipout[atari]'"


def atari_id(name: str) -> str:
    """
    Check the name of an Atari game, and see to it that gymnasium knows it: ale_py's games are not there until registered.

    ``make_atari_env(atari_id("PongNoFrameskip-v4"), n_envs=8)``

    SB3's wrappers skip frames themselves, so ``"...NoFrameskip-v4"`` is what they are made for.

    :param name: Name of the environment, such as ``"PongNoFrameskip-v4"``
    :return: The same name
    :raises ImportError: If the emulator (ale_py) or what scales its frames (OpenCV) is not installed
    :raises ValueError: If no Atari game has this name
    """
    for module in ("ale_py", "cv2"):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"Atari games need {module}, which is not installed; {_REMEDY}", name=module)
    _register()
    if not isinstance(name, str) or name not in _atari_ids():
        near = ", ".join(repr(known) for known in _near(str(name))) or "none; ale_py's documentation lists the games"
        raise ValueError(
            f"name must be that of an Atari game such as 'PongNoFrameskip-v4', got {name!r}; near matches: {near}."
        )
    return name


def _register() -> None:
    import ale_py

    gym.register_envs(ale_py)


def _atari_ids() -> list[str]:
    return [name for name, spec in gym.registry.items() if "AtariEnv" in str(spec.entry_point)]


def _near(name: str) -> list[str]:
    """Ids of the games whose names are like this one, those for SB3's wrappers first."""
    by_game: dict[str, list[str]] = {}
    for known in sorted(_atari_ids(), key=lambda known: (not known.endswith("NoFrameskip-v4"), known)):
        by_game.setdefault(_game(known), []).append(known)
    return [by_game[game][0] for game in difflib.get_close_matches(_game(name), by_game, n=3)]


def _game(name: str) -> str:
    """Name of the game alone, in small letters: "pong" for "ALE/Pong-v5" and for "PongNoFrameskip-v4"."""
    return name.lower().removeprefix("ale/").partition("-")[0].removesuffix("noframeskip")
