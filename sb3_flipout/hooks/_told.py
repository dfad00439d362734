"""What SB3's algorithms tell a flipout policy while they collect and learn, around methods that are called, never copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from sb3_flipout.buffers import KeyedBufferMixin, store_noise
from sb3_flipout.checks import warn_once
from sb3_flipout.hooks import _finite
from sb3_flipout.hooks._batches import batches_of_update, check_batch_size, number_stored
from sb3_flipout.hooks._models import Method, policy_of
from sb3_flipout.policies.base import FlipoutPolicyMixin
from sb3_flipout.policies.learning_noise import learning_of


class _TellsOfOthers(BaseCallback):
    """Tells the policy that callbacks of the user see a rollout start or end: their forward passes are none of its steps."""

    def _on_rollout_start(self) -> None:
        policy_of(self.model).marks.step_due = False

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        policy_of(self.model).marks.step_due = False


class _TellsRolloutStart(BaseCallback):
    """
    Tells the policy when all callbacks of the user have seen a rollout start: its next forward pass is the first step.

    It looks at the parameters too, after those callbacks, which may have mended them.
    """

    def _on_rollout_start(self) -> None:
        _finite.check_parameters(self.model, policy_of(self.model))
        policy_of(self.model).marks.step_due = True

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        _finite.check_parameters(self.model, policy_of(self.model), now=True)


def set_up_learning(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """
    Begin a call of ``learn``: look at what the user has set up, tell the policy that it begins and whether the environments
    were reset, and stand round the user's callbacks.
    """
    policy = policy_of(algorithm)
    _check_set_up(algorithm, policy)
    if getattr(algorithm, "replay_buffer", None) is not None:  # one that was loaded since
        number_stored(algorithm, policy)
    policy.begin_learning()
    before, end_before = algorithm._last_obs, algorithm._total_timesteps
    total, callback = original(algorithm, *args, **kwargs)
    policy.marks.goes_on = algorithm._num_timesteps_at_start > 0 and algorithm._total_timesteps == end_before
    if algorithm._last_obs is not before:  # SB3 binds a new first observation when it resets the environments
        policy.end_episodes(np.ones(algorithm.n_envs, dtype=bool))
    _finite.check_first_observations(algorithm, policy)
    listed = CallbackList([_TellsOfOthers(), callback, _TellsRolloutStart()])
    for one in (listed, listed.callbacks[0], listed.callbacks[-1]):
        one.model = algorithm
    return total, listed


def _check_set_up(algorithm: Any, policy: Any) -> None:
    _warn_of_epsilon(algorithm)
    policy.guard.check_whole(policy, policy.perturbed_network)
    policy.guard.check_own(_networks(algorithm), learning_of(policy))
    check_batch_size(algorithm, policy)


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
    policy = policy_of(algorithm)
    own = [name for name in names if hasattr(policy, name)]  # the algorithm may hold another model's actor
    owners = {"model": algorithm, "model.policy": policy}
    found = {f"{owner}.{name}": getattr(holder, name, None) for owner, holder in owners.items() for name in own}
    return {name: net for name, net in found.items() if net is not None}


def _warn_of_epsilon(algorithm: Any) -> None:
    """Say, once per model, that epsilon-greedy is still on: weight noise is there to replace it."""
    marks = policy_of(algorithm).marks
    epsilon = max(getattr(algorithm, "exploration_initial_eps", 0.0), getattr(algorithm, "exploration_final_eps", 0.0))
    if epsilon > 0:
        warn_once(
            marks.warned,
            "epsilon",
            f"{type(algorithm).__name__} explores by weight noise and by epsilon-greedy at once. To explore by weight noise "
            "alone, pass exploration_initial_eps=0.0 and exploration_final_eps=0.0.",
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
        if policy.noise_settings.falls != "constant" and not policy.marks.steered:
            policy.warn_of_merging_members(f"schedule={policy.noise_settings.falls!r}")
        policy.follow_schedule(algorithm.num_timesteps / total)


def _warn_of_fallen_noise(algorithm: Any) -> None:
    """Say, once per model, that training in small calls of learn() has had its noise in the first of them."""
    policy, began = policy_of(algorithm), algorithm._num_timesteps_at_start
    settings, marks = policy.noise_settings, policy.marks
    if began == 0 or settings.schedule is not None or marks.steered or marks.goes_on:
        return
    if settings.factor_at(began / algorithm._total_timesteps) == 0.0:
        warn_once(
            marks.warned,
            "fallen",
            f"this call of learn() goes on from step {began} to {algorithm._total_timesteps} without weight noise: by default "
            "it falls to 0 over the first part of all steps that SB3 knows of, and those are over. Where training is cut into "
            'calls of learn(reset_num_timesteps=False), use policy_kwargs=dict(schedule="constant"), or AnnealNoise.',
        )


def collect_rollout(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Tell that a rollout starts: only here do base and rollout-long keys change, never between rollout and update."""
    policy = policy_of(algorithm)
    handed_over = [one for one in (*args, *kwargs.values()) if isinstance(one, RolloutBuffer)]
    for buffer in (algorithm.rollout_buffer, *handed_over):  # put there by hand, or another than the algorithm's
        if not isinstance(buffer, KeyedBufferMixin):
            store_noise(buffer)
    _follow_schedule(algorithm)
    policy.meet_observations(algorithm._last_obs)
    policy.begin_rollout()
    with _finite.explained(algorithm, policy), _counted_steps(algorithm), policy.collecting(algorithm.n_envs):
        finished = original(algorithm, *args, **kwargs)
    return _after_collection(algorithm, finished and _finite.check_rollout(algorithm, policy))


def collect_transitions(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """The same for replayed transitions, whose collection steps are marked one by one."""
    policy = policy_of(algorithm)
    policy.meet_observations(algorithm._last_obs)
    policy.begin_rollout()
    with _finite.explained(algorithm, policy), _counted_steps(algorithm):
        finished = original(algorithm, *args, **kwargs)
    return _after_collection(algorithm, finished)


@contextmanager
def _counted_steps(algorithm: Any) -> Iterator[None]:
    """Say, once per model, that a collection of the user's own leaves out what tells steps: `resample` counts them."""
    policy = policy_of(algorithm)
    steps, before = policy._keys.step, algorithm.num_timesteps
    yield
    made = (algorithm.num_timesteps - before) // algorithm.n_envs
    if made > policy._keys.step - steps:
        warn_once(
            policy.marks.warned,
            "collection steps",
            f"{type(algorithm).__name__} has made {made} collection steps, and the noise has been told of "
            f"{policy._keys.step - steps}, so resample={policy.noise_settings.resample!r} is not kept: the other steps drew "
            "fresh noise, or none. In a collect_rollouts of your own, call self._update_info_buffer(infos, dones) after each "
            "step of the environments, and off-policy choose actions by self._sample_action(learning_starts, action_noise, "
            "n_envs), as SB3's do.",
        )


def _after_collection(algorithm: Any, finished: Any) -> Any:
    """Where a callback broke off, SB3 has not told the ends of episodes of the last step, so all count as ended."""
    if not getattr(finished, "continue_training", finished):
        policy_of(algorithm).end_episodes(np.ones(algorithm.n_envs, dtype=bool))
    return finished


def sample_action(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Mark the collection step: its prediction acts in the training environments, every other one is evaluation."""
    policy = policy_of(algorithm)
    _follow_schedule(algorithm)
    # SB3's arguments are learning_starts, action_noise=None, n_envs=1; a class of the user's own may add some.
    with policy.collecting(kwargs.get("n_envs", args[2] if len(args) > 2 else 1)):
        return original(algorithm, *args, **kwargs)


def train(original: Method, algorithm: Any, *args: Any, **kwargs: Any) -> Any:
    """Mark the update."""
    policy = policy_of(algorithm)
    policy.marks.differentiates_all = hasattr(algorithm, "_compute_actor_grad")
    policy.lead_copies(vars(algorithm).values())
    _meet_stored(algorithm, policy)
    with _finite.explained(algorithm, policy), policy.updating(), batches_of_update(algorithm, policy):
        found = original(algorithm, *args, **kwargs)
    if algorithm.num_timesteps == policy.marks.trained_at:  # nothing is collected, so no start of a rollout will look
        _finite.check_parameters(algorithm, policy)
    policy.marks.trained_at = algorithm.num_timesteps
    return found


def _meet_stored(algorithm: Any, policy: FlipoutPolicyMixin) -> None:
    """Where nothing has been collected, as in training from demonstrations, the first observations are the buffer's."""
    buffer = getattr(algorithm, "replay_buffer", None)
    stored = getattr(buffer, "observations", None)
    if buffer is None or stored is None or policy.knows_its_inputs or not buffer.size():
        return
    first = {name: part[0] for name, part in stored.items()} if isinstance(stored, dict) else stored[0]
    normalises = algorithm.get_vec_normalize_env()
    policy.meet_observations(first if normalises is None else normalises.normalize_obs(first))


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
