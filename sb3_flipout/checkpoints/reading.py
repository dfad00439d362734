"""From the newest checkpoint that is whole to a model that goes on."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize, unwrap_vec_normalize

from sb3_flipout.checkpoints.files import description, newest_first, what_is_wrong
from sb3_flipout.checks import warn_user


def resume(folder: str | Path, env: Any, algorithm: type[BaseAlgorithm] | None = None, **kwargs: Any) -> BaseAlgorithm:
    """
    Load the newest checkpoint that is whole, with its replay buffer and the statistics of ``VecNormalize``.

    Then ``model.learn(total - model.num_timesteps, reset_num_timesteps=False, callback=Checkpoints(folder, ...))`` goes on.
    What goes on as it would have: weights, optimizers, the noise (each key, the bases, the scale and the position of its
    schedule), the replay buffer but for the last step before the checkpoint. What does not, and SB3 does not save it: the
    environments begin new episodes, and the generators of actions, of the replay buffer and of epsilon-greedy are where they
    are.

    :param folder: Folder that :class:`Checkpoints` wrote
    :param env: Environment, as the algorithm takes it; where there are statistics of ``VecNormalize``, it is wrapped so, if it
        is not yet
    :param algorithm: Algorithm class; ``None`` for that which wrote it, as far as it can be imported
    :param kwargs: As of ``algorithm.load``: ``device``, ``custom_objects``, ...
    :return: The model; its environments are ``model.get_env()``
    :raises FileNotFoundError: If the folder has no checkpoint that is whole
    :raises TypeError: If the checkpoint is another algorithm's
    """
    folder = Path(folder)
    for path in newest_first(folder):
        wrong = what_is_wrong(path)
        if wrong is None:
            return _loaded(path, env, algorithm, kwargs)
        warn_user(f"the checkpoint {path} is not whole, {wrong}: going back to the one before it.")
    raise FileNotFoundError(f"{folder} has no checkpoint that is whole. Checkpoints(folder, every=...) writes them.")


def _loaded(path: Path, env: Any, algorithm: type[BaseAlgorithm] | None, kwargs: dict[str, Any]) -> BaseAlgorithm:
    known = description(path)
    kind = _class(known["algorithm"], algorithm)
    env = maybe_make_env(env, verbose=0)
    if "vecnormalize.pkl" in known["files"]:
        env = _normalised(path / "vecnormalize.pkl", env)
    model = kind.load(path / "model.zip", env=env, **kwargs)
    if "replay_buffer.pkl" in known["files"]:
        model.load_replay_buffer(path / "replay_buffer.pkl")
        if model.replay_buffer.n_envs != model.n_envs:
            raise ValueError(
                f"the replay buffer of {path} is for {model.replay_buffer.n_envs} environments, env has {model.n_envs}; give "
                "as many as it was trained with."
            )
    return model


def _class(written: str, given: type[BaseAlgorithm] | None) -> Any:
    if given is not None:
        if written.split(":")[-1] not in {kind.__qualname__ for kind in given.__mro__}:
            raise TypeError(f"the checkpoint was written by {written.split(':')[-1]}, got algorithm={given.__name__}.")
        return given
    module, _, name = written.partition(":")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise TypeError(f"the checkpoint was written by {written}, which cannot be imported; give algorithm=.") from error
    return found


def _normalised(path: Path, env: Any) -> VecEnv:
    known = unwrap_vec_normalize(env) if isinstance(env, VecEnv) else None
    if known is not None:
        statistics = VecNormalize.load(str(path), known.venv)
        for name in (
            "obs_rms",
            "ret_rms",
            "clip_obs",
            "clip_reward",
            "gamma",
            "epsilon",
            "norm_obs",
            "norm_reward",
            "training",
        ):
            setattr(known, name, getattr(statistics, name))
        return env
    # SB3 turns images outside of the statistics, when the model gets the environments.
    return VecNormalize.load(str(path), env if isinstance(env, VecEnv) else DummyVecEnv([lambda: Monitor(env)]))
