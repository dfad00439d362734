"""Numbers that are not finite are told where they come in, before anything learns from them.

A policy that has learned from one NaN is lost, and some algorithms do not notice: the largest of action values that are NaN is
an action like another. Rewards and observations are looked at as they are stored, parameters every thousand steps and at the
end; where torch or SB3 stumbles over such a number first, its error gets the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from sb3_flipout.finite import NonFiniteError, first_non_finite, is_finite, not_finite, parts
from sb3_flipout.hooks._models import policy_of
from sb3_flipout.policies.learning_noise import learning_of

#: Steps of all environments together, or gradient steps, between two looks at the parameters.
LOOK_EVERY = 1_000

_STOCK = ("stable_baselines3.", "sb3_contrib.", "sb3_flipout.")


def check_parameters(algorithm: Any, policy: Any, now: bool = False) -> None:
    """
    Look whether all parameters are finite.

    :param algorithm: Algorithm
    :param policy: Its policy
    :param now: Whether to look even if that was a short while ago
    :raises NonFiniteError: If one is not
    """
    marks = policy.marks
    # Where nothing is collected, as in learning from a given buffer, gradient steps alone go on.
    steps = (algorithm.num_timesteps, getattr(learning_of(policy), "step", 0))
    due = any(not look - LOOK_EVERY <= step < look for step, look in zip(steps, marks.next_looks, strict=True))
    if marks.numbers_guarded or not (now or due):
        return
    marks.next_looks = (steps[0] + LOOK_EVERY, steps[1] + LOOK_EVERY)
    name = first_non_finite(dict(policy.named_parameters()))
    if name is not None:
        raise _broken(algorithm, name)


_ADVICE = " The callback StopOnNonFinite stops at that gradient step and goes back to a model that is good."


def _broken(algorithm: Any, name: str, guarded: bool = False) -> NonFiniteError:
    return NonFiniteError(
        f"{name} of the policy of {type(algorithm).__name__} is not finite at step {algorithm.num_timesteps}: a gradient step "
        f"has broken it, at most some {LOOK_EVERY} steps ago. Try a lower learning rate, a smaller sigma, or rewards of a "
        f"smaller scale.{'' if guarded else _ADVICE}",
        name,
    )


def check_first_observations(algorithm: Any, policy: Any) -> None:
    """
    Look at the observations that a training starts from.

    :param algorithm: Algorithm
    :param policy: Its policy
    :raises NonFiniteError: If some are not finite
    """
    error = _found(algorithm, policy, algorithm._last_obs, None)
    if error is not None:
        raise error


def check_rollout(algorithm: Any, policy: Any) -> bool:
    """
    Look at what a rollout has collected, before the update.

    :param algorithm: Algorithm
    :param policy: Its policy
    :return: Whether all is finite; if not, a callback has asked for training to end quietly
    :raises NonFiniteError: If something is not finite, and there is no such callback
    """
    buffer = algorithm.rollout_buffer
    collected = [getattr(buffer, name, None) for name in ("observations", "rewards", "values", "log_probs", "actions")]
    if all(map(is_finite, collected)):
        return True
    error = _found(algorithm, policy, getattr(buffer, "observations", None), getattr(buffer, "rewards", None), 1)
    outputs = [name for name in ("values", "log_probs", "actions") if not_finite(getattr(buffer, name, None)) is not None]
    if error is None and outputs:
        error = NonFiniteError(
            f"{outputs[0]} of the rollout of {type(algorithm).__name__} that ended at step {algorithm.num_timesteps} are not "
            "finite, though its observations are: the numbers are too large for the network. Bring observations to a scale of "
            "about 1 (VecNormalize does that), or use a smaller sigma.",
            outputs[0],
        )
    return error is None or _ends_quietly(policy, error)


def _ends_quietly(policy: Any, error: NonFiniteError) -> bool:
    """Leave it to the callback that has asked for it to end training, else raise; never True."""
    if not policy.marks.numbers_guarded:
        raise error
    policy.marks.non_finite = error
    return False


def store_transition(
    original: Callable[..., Any],
    algorithm: Any,
    replay_buffer: Any,
    buffer_action: np.ndarray,
    new_obs: Any,
    reward: np.ndarray,
    dones: np.ndarray,
    infos: list[dict[str, Any]],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Look at a step of the environments before it goes into the replay buffer."""
    if dones.any() or not (is_finite(reward) and is_finite(new_obs)):
        policy = policy_of(algorithm)
        error = _found(algorithm, policy, new_obs, reward)
        for place in np.flatnonzero(dones):
            error = error or _found(algorithm, policy, infos[place].get("terminal_observation"), None, of=int(place))
        if error is not None and not _ends_quietly(policy, error):
            return
    original(algorithm, replay_buffer, buffer_action, new_obs, reward, dones, infos, *args, **kwargs)


def _found(
    algorithm: Any, policy: Any, obs: Any, rewards: Any, env_axis: int = 0, of: int | None = None
) -> NonFiniteError | None:
    """Tell of the first number that is not finite; ``of``: the one environment that all are of."""
    looked_at = [("reward", rewards)]
    if policy.features_extractor_class.__module__.startswith(_STOCK):  # others may be made for such numbers
        looked_at += parts(obs)
    for what, array in looked_at:
        wrong = not_finite(array)
        if wrong is not None:
            places = np.unique(np.argwhere(wrong)[:, env_axis]).tolist() if of is None else [of]
            return _wrong(algorithm, what, places, array[wrong][0])
    return None


def _wrong(algorithm: Any, what: str, places: list[int], value: float) -> NonFiniteError:
    several = f"environments {places}" if len(places) > 1 else f"environment {places[0]}"
    return NonFiniteError(
        f"the {what} of {several} was {value} at step {algorithm.num_timesteps} or shortly before: a policy that learned from "
        "it would be lost, so training stops; nothing has learned from it. Mend the environment (SB3's VecCheckNan tells the "
        "very step), or replace the number by np.nan_to_num in a wrapper. A features extractor of your own may get such "
        "observations: they are not looked at then.",
        f"{what} of {several}",
    )


@contextmanager
def explained(algorithm: Any, policy: Any) -> Iterator[None]:
    """
    Give the cause of an error of torch's or SB3's: numbers that are not finite, or observations of another shape.

    :param algorithm: Algorithm
    :param policy: Its policy
    :return: Context manager
    :raises NonFiniteError: If it raised one of their errors, and a number is not finite
    :raises ValueError: If it did, and observations have not the shape of their space
    """
    try:
        yield
    except NonFiniteError:
        raise
    except (ValueError, RuntimeError) as error:
        _check_shapes(algorithm, error)
        for what, array in parts(algorithm._last_obs):
            wrong = not_finite(array)
            if wrong is not None:
                places = np.unique(np.argwhere(wrong)[:, 0]).tolist()
                raise _wrong(algorithm, what, places, array[wrong][0]) from error
        name = first_non_finite(dict(policy.named_parameters()))
        if name is not None:
            raise _broken(algorithm, name, policy.marks.numbers_guarded) from error
        raise


def _check_shapes(algorithm: Any, error: Exception) -> None:
    space = algorithm.observation_space
    spaces = getattr(space, "spaces", {})
    observed = algorithm._last_obs
    for name, array in observed.items() if isinstance(observed, Mapping) else ((None, observed),):
        expected = getattr(space if name is None else spaces.get(name), "shape", None)
        if isinstance(array, np.ndarray) and expected is not None and array.shape[1:] != expected:
            what = "observation" if name is None else f"observation {name!r}"
            raise ValueError(
                f"the environments gave the {what} in shape {array.shape[1:]}, and their space says {expected}. Mend the "
                "environment: gymnasium.utils.env_checker.check_env finds such things."
            ) from error
