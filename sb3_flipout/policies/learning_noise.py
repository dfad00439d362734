"""The noise of gradient steps: keys and base as pure functions of the number of the step and of the role of the network.

So nothing has to be threaded through SB3's ``train``.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Any
from uuid import uuid4

import torch as th

from sb3_flipout.checks import warn_once
from sb3_flipout.noise import RowNoise, RowsByKey, Stream, fold, fold_in
from sb3_flipout.noise.keys import restrict
from sb3_flipout.policies.learning_settings import LearningSettings
from sb3_flipout.policies.sampled import MemberData, SampledBatch, SampledBatches
from sb3_flipout.policies.unseen_steps import UnseenSteps


class Role(IntEnum):
    """What a network is for in a gradient step; part of its keys, so never renumbered."""

    ONLINE = 0
    TARGET = 1


class LearningNoise:
    """
    The noise of gradient steps, shared by a policy and its networks; and what these see in the collection step that goes on.

    :param seed: Seed of the policy's noise
    :param settings: Settings of the policy
    """

    #: What the environments' rows see in the collection step that goes on.
    acting: RowNoise | None = None
    #: Gradient steps of the update that goes on that the policy's optimizer does not make; ``None`` outside of updates.
    unseen: UnseenSteps | None = None
    #: Whether it is a policy's, and not that of a copy of one of its networks.
    of_policy = False
    #: By what copies are known, also those in files: which policy it is of, and from which that was loaded. Nothing in copies
    #: that older files hold.
    origins: tuple[str, ...] = ()

    def __init__(self, seed: int, settings: LearningSettings) -> None:
        self.of_policy, self.origins = True, (uuid4().hex,)
        self.seed = seed
        self.settings = settings
        self.step = 0  # gradient steps so far
        self.active = False  # whether SB3's `train` is running, and not for the mean weights
        self.scale = 1.0
        self.keys_per_transition: int = getattr(settings, "keys_per_transition", 1)  # a setting of value-based policies
        self.member_data = MemberData(getattr(settings, "bootstrap", 1.0), getattr(settings, "reward_noise", 0.0))
        self.batches = SampledBatches()
        self.warned: set[str] = set()  # of what
        self._target_pass = (-1, 0)  # gradient step, and rows, of the last pass of a target network
        self.inputs_once = False  # whether networks may get a repeated observation once; found out when they are built
        # Whether gradient steps need bases of their own: not with members, whose base is frozen, and not where the factors
        # alone are the noise.
        self.base_moves = settings.layer_noise().draws_base and settings.members is None

    def count(self, *_: Any) -> None:
        """
        Count a gradient step; hung on the optimizer.

        :param _: What torch hands to hooks
        """
        self.step += 1

    def is_copy_of(self, own: LearningNoise) -> bool:
        """
        Tell whether it came with a copy of a network of the policy that another noise is of. That of another model's network,
        a teacher say, stays what it is.

        :param own: The noise of a policy
        :return: Whether it did
        """
        return not self.of_policy and (not self.origins or not set(self.origins).isdisjoint(own.origins))

    def comes_from(self, origins: Iterable[str]) -> None:
        """
        Know copies again that were made before the policy was loaded.

        :param origins: Those of the policy that was saved
        """
        self.origins = tuple(dict.fromkeys([*self.origins, *origins]))

    def begin_update(self, scale: float, by_mean_weights: bool) -> None:
        """
        Let networks learn under noise, and look for gradient steps that nobody counts, from now on.

        :param scale: Noise scale
        :param by_mean_weights: Whether somebody has said that the mean weights learn
        """
        self.active, self.scale = not by_mean_weights, scale
        self.unseen = UnseenSteps(lambda: self.step, self.count)

    def leave_update(self) -> None:
        """An update is over, or has failed."""
        self.active, self.unseen = False, None

    def end_update(self) -> None:
        """Count a last step that nobody has, and say once if all of an update may have learned under the noise of one."""
        assert self.unseen is not None, "an update goes on"
        several = self.unseen.may_be_several and not self.unseen.batches
        if self.unseen.look() and several:
            warn_once(
                self.warned,
                "gradient steps",
                "an update has learned without a step of the policy's own optimizer, and without a batch of "
                "replay_buffer.sample, so all of it was under the noise of one gradient step. If it made several of them, "
                "call model.policy.learning.count() after each.",
            )

    def noise_of(self, role: Role) -> str:
        """
        Look up which noise a network has in gradient steps.

        :param role: Online or target network
        :return: ``"independent"``, ``"same"`` or ``"mean"``
        """
        if role == Role.TARGET:
            return str(self.settings.target_noise)
        return "mean" if self.settings.learns_by_mean else "independent"

    def _role(self, role: Role) -> Role:
        return Role.ONLINE if self.settings.target_noise == "same" else role

    def rows(self, role: Role, n: int, device: th.device, batch: SampledBatch | None = None) -> RowNoise | None:
        """
        Draw the noise of a batch: that of the gradient step in which it was sampled, so that its members stay the same.

        :param role: Online or target network
        :param n: Rows of the batch
        :param device: Device of the network
        :param batch: The batch; ``None`` if it is none that was noted: then the present gradient step counts
        :return: Row noise; ``None`` for mean weights
        """
        if self.noise_of(role) == "mean":
            return None
        if self.keys_per_transition > 1:
            return RowNoise(self._stratified(role, n, device, batch), self.scale)
        rows = th.arange(n, device=device)
        keys = fold_in(fold(self.seed, Stream.LEARNING_KEYS, self._step_of(batch), self._role(role)), rows)
        return RowNoise(restrict(keys, self.settings.members), self.scale)

    def rows_by_member(self, role: Role, n: int, device: th.device, batch: SampledBatch | None) -> RowsByKey | None:
        """
        Sort the noise of :meth:`rows` by member, where every transition is learned under all of them.

        :param role: Online or target network
        :param n: Rows of the batch
        :param device: Device of the network
        :param batch: The batch, as for :meth:`rows`
        :return: Row noise; ``None`` for mean weights
        """
        if self.noise_of(role) == "mean":
            return None
        k = self.keys_per_transition
        assert k == self.settings.members, "every member learns from each transition"
        transitions = n // k
        transition = th.arange(transitions, device=device).repeat_interleave(k)
        order = self._stratified(role, n, device, batch) * transitions + transition
        return RowsByKey(th.arange(k, device=device), self.scale, order)

    def _step_of(self, batch: SampledBatch | None) -> int:
        return self.step if batch is None else batch.step

    def _stratified(self, role: Role, n: int, device: th.device, batch: SampledBatch | None) -> th.Tensor:
        """Members of repeated transitions: of transition i the M that follow a hashed first one, in a circle of all K."""
        m, k = self.keys_per_transition, self.settings.members
        transition = th.arange(-(-n // m), device=device)
        first = fold_in(fold(self.seed, Stream.FIRST_MEMBERS, self._step_of(batch), self._role(role)), transition)
        return restrict(restrict(first, k)[:, None] + th.arange(m, device=device), k).flatten()[:n]

    def perturbed_rewards(self, rewards: th.Tensor, numbers: th.Tensor) -> th.Tensor:
        """
        Perturb the rewards of a batch of the present gradient step, each by its row's member.

        :param rewards: Rewards, shape (N, 1), or of a buffer of the user's (N,)
        :param numbers: Numbers of the transitions, shape (N,)
        :return: What each row's member learns from, of the same shape
        """
        noise = self.rows(Role.ONLINE, len(numbers), numbers.device)
        assert noise is not None, "value networks learn under noise"
        return self.member_data.perturbed_rewards(rewards, numbers, noise.keys)

    def rows_per_input(self, obs: Any, batch: SampledBatch | None) -> int:
        """
        Count the neighbouring rows that have the same observation, as far as networks may get it once.

        :param obs: Observations
        :param batch: The batch that they are of
        :return: Number of rows
        """
        once = self.inputs_once and batch is not None and batch.is_repeated(obs)
        return self.keys_per_transition if once else 1

    def note_target(self, rows: int) -> None:
        """
        Note that a target network is asked.

        :param rows: About how many rows
        """
        self._target_pass = (self.step, rows)

    def note_learned(self, batch: SampledBatch | None, rows: int) -> None:
        """
        Note what members learn from; warn once if it is no batch of the replay buffer's ``sample``.

        It is silent where they may be the last batch, changed (images that are shifted at random); and where nothing but
        members is asked for and the target was asked about as many rows in this step: each row has its own member's target.

        :param batch: The batch that the online network is asked about with gradients; ``None`` if it is none that was noted
        :param rows: Its rows
        """
        if batch is not None:
            self.batches.learn_as_given()
        if batch is not None or "elsewhere" in self.warned or self.batches.may_be_changed(rows):
            return
        given = [f"keys_per_transition={self.keys_per_transition}"] if self.keys_per_transition > 1 else []
        given += [f"reward_noise={self.member_data.reward_noise}"] if self.member_data.reward_noise > 0 else []
        if given or self._may_differ(rows):
            settings = ", ".join(given) or f"members={self.settings.members}"
            warn_once(
                self.warned,
                "elsewhere",
                f"{settings}: the network is asked, with gradients, about {rows} observations that are not a batch of "
                "replay_buffer.sample. If they are of transitions from elsewhere (another buffer, another method of this "
                "one), these are neither repeated for their members nor do their rewards get noise; if they are joined with "
                "others, or parts of a batch, rows may learn from another member's target. Ask about samples.observations "
                "themselves, and look at others under torch.no_grad(); or leave these settings out.",
            )

    def _may_differ(self, rows: int) -> bool:
        """Whether rows of no noted batch may be under other members than their target, which is that of each member."""
        own_target = self.settings.members is not None and self.settings.target_noise == "same"
        return own_target and bool(self.batches.noted) and self._target_pass != (self.step, rows)

    def warn_of_unannounced(self, network: str) -> None:
        """
        Say once that somebody learns whom no update has announced: by the mean weights, and without priors.

        :param network: Class of the network that is learned
        """
        warn_once(
            self.warned,
            "unannounced",
            f"{network} gets gradients outside of an update that its policy knows of, so it learns by the mean weights, "
            "and settings of members, priors and noise in updates have no effect. If this is an algorithm of your own, "
            "call sb3_flipout.register(YourAlgorithm, aliases={'FlipoutMlpPolicy': ...}) before you make the model: "
            "its `train` then learns under noise. Other gradient steps belong in the `train` of a subclass, or in `with "
            "model.policy.updating():`. `with sb3_flipout.perturbed(model.policy, None):` says that mean weights are "
            "meant; where gradients are only looked at, call policy.set_training_mode(False) first.",
        )

    def base_key(self, role: Role) -> int:
        """
        Derive the key of the learning base in the present gradient step.

        :param role: Online or target network
        :return: Base key
        """
        return fold(self.seed, Stream.LEARNING_BASE, self.step, self._role(role))

    def __getstate__(self) -> dict[str, Any]:
        """
        Keep in copies what is saved of it: a copy is not in the middle of an update or of a collection step.

        :return: Attributes
        """
        return {
            **self.__dict__,
            "of_policy": False,
            "active": False,
            "acting": None,
            "unseen": None,
            "batches": SampledBatches(),
        }


def learning_of(policy: Any) -> LearningNoise | None:
    """
    Find the noise of a policy's gradient steps.

    :param policy: Policy
    :return: The noise; ``None`` for policies that learn from rollouts, in which the name is free for the user's own
    """
    found = getattr(policy, "learning", None)
    return found if isinstance(found, LearningNoise) else None
