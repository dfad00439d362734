"""What SB3's algorithms tell a flipout policy, around a few of their methods, which are called and never copied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_flipout.buffers import KeyedBufferMixin, keyed, store_noise
from sb3_flipout.hooks._batches import batches_for_members, check_batch_size, number_stored
from sb3_flipout.policies.base import FlipoutPolicyMixin

Method = Callable[..., Any]

#: Where an algorithm's data has the noise state, in a saved model and while it is built from one.
STATE = "flipout_noise"


def policy_of(algorithm: Any) -> Any:
    """
    Find the policy of an algorithm, itself also where the user has compiled it.

    :param algorithm: Algorithm
    :return: Its policy
    """
    return getattr(algorithm.policy, "_orig_mod", algorithm.policy)


def has_flipout_policy(algorithm: Any) -> bool:
    """
    Tell whether an algorithm has a flipout policy; before it is built, whether it will have one.

    :param algorithm: Algorithm
    :return: Whether it has
    """
    policy = getattr(algorithm, "policy", None)
    if policy is None:
        kind = algorithm.policy_class  # which may be a function that makes a policy
        return isinstance(kind, type) and issubclass(kind, FlipoutPolicyMixin)
    return isinstance(getattr(policy, "_orig_mod", policy), FlipoutPolicyMixin)


# ---- building, saving, loading ----------------------------------------------------------------------------------------


def set_up(original: Method, algorithm: Any) -> None:
    """Make the rollout buffer store noise, whatever its class, and continue from the noise state of a loaded model."""
    given = getattr(algorithm, "rollout_buffer_class", None)
    if given is not None:
        keyed(given)  # refuse an unfit one before anything is built
    state = algorithm.__dict__.pop(STATE, None)
    original(algorithm)
    if hasattr(algorithm, "rollout_buffer"):
        store_noise(algorithm.rollout_buffer)
    if getattr(algorithm, "replay_buffer", None) is not None:
        number_stored(algorithm, policy_of(algorithm))
    if state is not None:
        policy_of(algorithm).set_noise_state(state)


def save(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Save the noise state beside the algorithm's own data."""
    algorithm.__dict__[STATE] = policy_of(algorithm).noise_state()
    try:
        return original(algorithm, *args, **kwargs)
    finally:
        algorithm.__dict__.pop(STATE, None)


def load(original: Method, cls: type[BaseAlgorithm], *args: Any, **kwargs: Any) -> Any:
    """Explore by other noise where a seed is given."""
    model = original(*args, **kwargs)
    if kwargs.get("seed") is not None and has_flipout_policy(model):
        policy_of(model).reseed_noise(kwargs["seed"])
    return model


def seed(original: Method, algorithm: Any, seed: int | None = None) -> None:
    """Seed the noise with everything else; while a model is built there is none yet."""
    original(algorithm, seed)
    if seed is not None and getattr(algorithm, "policy", None) is not None:
        policy_of(algorithm).reseed_noise(seed)


def set_parameters(original: Method, algorithm: Any, load_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse the optimizer of a policy without noise before anything is changed."""
    bound = signature(original).bind(algorithm, load_path_or_dict, *args, **kwargs)
    given = {**bound.arguments, **kwargs}
    if not isinstance(load_path_or_dict, Mapping):  # a path: read here, as SB3 would
        device = given.get("device", "auto")
        load_path_or_dict = load_from_zip_file(load_path_or_dict, device=device, load_data=False)[1]
    weights = load_path_or_dict.get("policy")
    learned = any(name.endswith("_sigma") for name in policy_of(algorithm).state_dict())
    if isinstance(weights, Mapping) and learned and not any(name.endswith("_sigma") for name in weights):
        others = [name for name in load_path_or_dict if name != "policy"]
        if others or given.get("exact_match", True):
            raise ValueError(
                "these are the parameters of a policy without noise: it has no sigma, and its optimizer none for it. "
                "To take its "
                'weights as mean weights and keep the sigma that is here: model.set_parameters({"policy": params["policy"]}, '
                "exact_match=False)."
            )
    return original(algorithm, load_path_or_dict, *args, **kwargs)


# ---- collecting and learning ------------------------------------------------------------------------------------------


class _TellsOfOthers(BaseCallback):
    """Tells the policy that callbacks of the user see a rollout start or end: their forward passes are none of its steps."""

    def _on_rollout_start(self) -> None:
        policy_of(self.model).marks.step_due = False

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        policy_of(self.model).marks.step_due = False


class _TellsRolloutStart(BaseCallback):
    """Tells the policy when all callbacks of the user have seen a rollout start: its next forward pass is the first step."""

    def _on_rollout_start(self) -> None:
        policy_of(self.model).marks.step_due = True

    def _on_step(self) -> bool:
        return True


def set_up_learning(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell that the environments were reset: SB3 binds a new first observation when it does so."""
    _warn_of_epsilon(algorithm)
    policy = policy_of(algorithm)
    policy.guard.check_whole(policy, policy.perturbed_network)
    policy.guard.check_own(_networks(algorithm), getattr(policy, "learning", None))
    check_batch_size(algorithm, policy)
    if getattr(algorithm, "replay_buffer", None) is not None:  # one that was loaded since
        number_stored(algorithm, policy)
    policy.marks.steered = False
    before = algorithm._last_obs
    total, callback = original(algorithm, *args, **kwargs)
    if algorithm._last_obs is not before:
        policy_of(algorithm).end_episodes(np.ones(algorithm.n_envs, dtype=bool))
    listed = CallbackList([_TellsOfOthers(), callback, _TellsRolloutStart()])
    for one in (listed, listed.callbacks[0], listed.callbacks[-1]):
        one.model = algorithm
    return total, listed


def _networks(algorithm: Any) -> dict[str, Any]:
    """Networks that learn, and those of the target, as the algorithm and its policy know them."""
    names = (
        "q_net",
        "q_net_target",
        "quantile_net",
        "quantile_net_target",
        "actor",
        "actor_target",
        "critic",
        "critic_target",
    )
    owners = {"model": algorithm, "model.policy": policy_of(algorithm)}
    found = {f"{owner}.{name}": getattr(holder, name, None) for owner, holder in owners.items() for name in names}
    return {name: net for name, net in found.items() if net is not None}


def _warn_of_epsilon(algorithm: Any) -> None:
    """Say, once per model, that epsilon-greedy is still on: weight noise is there to replace it."""
    marks = policy_of(algorithm).marks
    epsilon = max(getattr(algorithm, "exploration_initial_eps", 0.0), getattr(algorithm, "exploration_final_eps", 0.0))
    if epsilon > 0 and "epsilon" not in marks.warned:
        marks.warned.add("epsilon")
        warnings.warn(
            f"{type(algorithm).__name__} explores by weight noise and by epsilon-greedy at once. To explore by weight noise "
            "alone, pass exploration_initial_eps=0.0 and exploration_final_eps=0.0.",
            stacklevel=6,
        )


def _follow_schedule(algorithm: Any) -> None:
    """Tell the share of training that is done; SB3's own number is stale at the start of a rollout."""
    policy, total = policy_of(algorithm), algorithm._total_timesteps
    if total <= 0 and policy.noise_settings.insists_on_schedule:
        raise ValueError(
            f"schedule={policy.noise_settings.schedule!r} needs the number of timesteps of the whole training, and "
            f"{type(algorithm).__name__} has not been told: it is not in a call of learn(total_timesteps). Use "
            'schedule="constant", and set policy.noise_scale where you collect by hand.'
        )
    if total > 0:
        _warn_of_fallen_noise(algorithm)
        policy.follow_schedule(algorithm.num_timesteps / total)


def _warn_of_fallen_noise(algorithm: Any) -> None:
    """Say, once per model, that training in small calls of learn() has had its noise in the first of them."""
    policy, began = policy_of(algorithm), algorithm._num_timesteps_at_start
    settings, marks = policy.noise_settings, policy.marks
    if began == 0 or settings.schedule is not None or marks.steered or "fallen" in marks.warned:
        return
    if settings.factor_at(began / algorithm._total_timesteps) == 0.0:
        marks.warned.add("fallen")
        warnings.warn(
            f"this call of learn() goes on from step {began} to {algorithm._total_timesteps} without weight noise: by default "
            "it falls to 0 over the first part of all steps that SB3 knows of, and those are over. Where training is cut into "
            'calls of learn(reset_num_timesteps=False), use policy_kwargs=dict(schedule="constant"), or AnnealNoise.',
            stacklevel=6,
        )


def collect_rollout(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell that a rollout starts: only here do base and rollout-long keys change, never between rollout and update."""
    policy = policy_of(algorithm)
    if not isinstance(algorithm.rollout_buffer, KeyedBufferMixin):  # one that was put there by hand
        store_noise(algorithm.rollout_buffer)
    _follow_schedule(algorithm)
    policy.meet_observations(algorithm._last_obs)
    policy.begin_rollout()
    with _counted_steps(algorithm), policy.collecting(algorithm.n_envs):
        finished = original(algorithm, *args, **kwargs)
    return _after_collection(algorithm, finished)


def collect_transitions(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for replayed transitions, whose collection steps are marked one by one."""
    policy_of(algorithm).meet_observations(algorithm._last_obs)
    policy_of(algorithm).begin_rollout()
    with _counted_steps(algorithm):
        finished = original(algorithm, *args, **kwargs)
    return _after_collection(algorithm, finished)


@contextmanager
def _counted_steps(algorithm: Any) -> Iterator[None]:
    """Say, once per model, that a collection of the user's own leaves out what tells steps: `resample` counts them."""
    policy = policy_of(algorithm)
    steps, before = policy._keys.step, algorithm.num_timesteps
    yield
    made = (algorithm.num_timesteps - before) // algorithm.n_envs
    if made > policy._keys.step - steps and "steps" not in policy.marks.warned:
        policy.marks.warned.add("steps")
        warnings.warn(
            f"{type(algorithm).__name__} has made {made} collection steps, and the noise has been told of "
            f"{policy._keys.step - steps}, so resample={policy.noise_settings.resample!r} is not kept: the other steps drew "
            "fresh noise, or none. In a collect_rollouts of your own, call self._update_info_buffer(infos, dones) after each "
            "step of the environments, and off-policy choose actions by self._sample_action(learning_starts, action_noise, "
            "n_envs), as SB3's do.",
            stacklevel=5,
        )


def _after_collection(algorithm: Any, finished: Any) -> Any:
    """Where a callback broke off, SB3 has not told the ends of episodes of the last step, so all count as ended."""
    if not getattr(finished, "continue_training", finished):
        policy_of(algorithm).end_episodes(np.ones(algorithm.n_envs, dtype=bool))
    return finished


def sample_action(original: Method, algorithm: Any, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> Any:
    """Mark the collection step: its prediction acts in the training environments, every other one is evaluation."""
    policy = policy_of(algorithm)
    _follow_schedule(algorithm)
    with policy.collecting(n_envs):
        return original(algorithm, learning_starts, action_noise, n_envs)


def train(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Mark the update."""
    policy = policy_of(algorithm)
    with policy.updating(), batches_for_members(algorithm, policy):
        return original(algorithm, *args, **kwargs)


def train_on_rollout(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """The same, and leave the model where its schedule has come to: no rollout may follow that would tell it."""
    found = train(original, algorithm, *args, **kwargs)
    if algorithm._total_timesteps > 0:
        _follow_schedule(algorithm)
    return found


def end_step(original: Method, algorithm: Any, infos: Any, dones: np.ndarray | None = None) -> None:
    """Tell ends of episodes: SB3 calls this once per environment step, with the flags of all environments."""
    original(algorithm, infos, dones)
    if dones is not None:
        policy_of(algorithm).end_step(dones)
