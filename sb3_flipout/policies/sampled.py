"""What the replay buffer has given, and what an ensemble's members make of it."""

from __future__ import annotations

import weakref
from typing import Any

import torch as th

from sb3_flipout.noise.transitions import in_bootstrap, reward_draws
from sb3_flipout.policies.observations import n_rows


class SampledBatch:
    """
    A batch that the replay buffer has given: known again by its very tensors, since nothing else tells of which transitions
    observations are. They are held weakly: a batch that nobody learns from any more is gone.

    :param samples: What the buffer gave, each transition repeated for its members
    :param step: Gradient step in which it was given; it says which member each row is learned under, whenever that happens
    :param numbers: Number of the transition of each row, shape (N,); ``None`` where nobody needs them
    """

    def __init__(self, samples: Any, step: int, numbers: th.Tensor | None = None) -> None:
        self.step = step
        self.numbers = numbers
        self.rows = n_rows(samples.observations)
        of_both = [_parts(obs) for obs in (samples.observations, samples.next_observations)]
        self._given = [{name: weakref.ref(part) for name, part in parts.items()} for parts in of_both]
        self._versions = {id(part): part._version for parts in of_both for part in parts.values()}

    @staticmethod
    def is_knowable(samples: Any) -> bool:
        """
        Tell whether a batch can be known again. A user's may have arrays, or other names.

        :param samples: What a buffer gave
        :return: Whether its observations, and next ones, are tensors
        """
        of_both = [_parts(getattr(samples, name, None)) for name in ("observations", "next_observations")]
        return all(isinstance(part, th.Tensor) for parts in of_both for part in parts.values())

    @property
    def is_gone(self) -> bool:
        """Whether nobody holds its observations any more, so that no network will be asked about them."""
        return all(part() is None for parts in self._given for part in parts.values())

    def is_of(self, obs: Any) -> bool:
        """
        Tell whether observations, or next ones, are this batch's.

        :param obs: Observations
        :return: Whether they are
        """
        parts = _parts(obs)
        return any(
            parts.keys() == given.keys() and all(given[name]() is part for name, part in parts.items())
            for given in self._given
        )

    def is_joined_in(self, obs: Any) -> bool:
        """
        Tell whether observations are this batch's with its next ones behind them.

        :param obs: Observations
        :return: Whether they are
        """
        if not isinstance(obs, th.Tensor) or None not in self._given[0]:
            return False
        both = [given[None]() for given in self._given]
        return all(part is not None for part in both) and th.equal(th.cat(both).to(obs.dtype), obs)  # type: ignore[arg-type]

    def is_repeated(self, obs: Any) -> bool:
        """
        Tell whether observations are this batch's as they were given, copy next to copy, and may stand for one another: nobody
        has written into them since, and nobody asks for the gradient of each of them.

        :param obs: Observations
        :return: Whether they are
        """
        parts = _parts(obs).values()
        return self.is_of(obs) and all(self._versions[id(part)] == part._version and not part.requires_grad for part in parts)


def _parts(obs: Any) -> dict[Any, th.Tensor]:
    return obs if isinstance(obs, dict) else {None: obs}


class SampledBatches:
    """The batches that somebody may still learn from."""

    def __init__(self) -> None:
        self.noted: list[SampledBatch] = []
        self._learned_as_given = False

    def note(self, samples: Any, step: int, numbers: th.Tensor | None) -> None:
        """
        Note a batch that the replay buffer gives, if it can be known again, and let go of those that are gone.

        :param samples: The batch, as networks will be asked about it
        :param step: Gradient step
        :param numbers: Number of the transition of each row, shape (N,); ``None`` where nobody needs them
        """
        if SampledBatch.is_knowable(samples):
            # Of the same tensors, which a buffer has filled anew, the last batch is the one that can be found.
            self.noted = [batch for batch in self.noted if not (batch.is_gone or batch.is_of(samples.observations))]
            self.noted.append(SampledBatch(samples, step, numbers))

    def let_go(self) -> None:
        """Let go of batches that nobody holds any more; others can be learned from whenever that happens."""
        self.noted = [batch for batch in self.noted if not batch.is_gone]

    def of(self, obs: Any) -> SampledBatch | None:
        """
        Find the batch whose observations, or next observations, a network is asked about.

        :param obs: Observations
        :return: The batch; ``None`` if they are those of none
        """
        return next((batch for batch in reversed(self.noted) if batch.is_of(obs)), None)

    def joined_in(self, obs: Any) -> SampledBatch | None:
        """
        Find the batch whose observations, and next ones behind them, a network is asked about.

        :param obs: Observations
        :return: The batch; ``None`` if there is none
        """
        return next((batch for batch in reversed(self.noted) if batch.is_joined_in(obs)), None)

    def learn_as_given(self) -> None:
        """Note that a network has been asked, with gradients, about the observations of a batch themselves."""
        self._learned_as_given = True

    def may_be_changed(self, rows: int) -> bool:
        """
        Tell whether observations of no batch may be those of the last one, changed (images that are shifted at random): they
        are as many, and sampled ones are never asked about themselves.

        :param rows: How many they are
        :return: Whether they may be
        """
        return bool(self.noted) and rows == self.noted[-1].rows and not self._learned_as_given


class MemberData:
    """
    What each member learns from, and what it adds to rewards.

    :param share: Probability that a transition is in a member's bootstrap sample
    :param reward_noise: Standard deviation of what a member adds to a reward
    """

    def __init__(self, share: float = 1.0, reward_noise: float = 0.0) -> None:
        self.share = share
        self.reward_noise = reward_noise

    @property
    def needs_numbers(self) -> bool:
        """Whether transitions have to be told apart at all."""
        return self.share < 1 or self.reward_noise > 0

    def perturbed_rewards(self, rewards: th.Tensor, numbers: th.Tensor, members: th.Tensor) -> th.Tensor:
        """
        Perturb rewards.

        :param rewards: Rewards, shape (N, 1), or of a buffer of the user's (N,); floating-point or integer numbers
        :param numbers: Numbers of the transitions, shape (N,)
        :param members: Member of each row, shape (N,)
        :return: Perturbed rewards, floating-point numbers of the same shape
        """
        if self.reward_noise == 0:
            return rewards
        dtype = rewards.dtype if rewards.is_floating_point() else th.float32
        draws = reward_draws(numbers, members, dtype).view(-1, *[1] * (rewards.dim() - 1))
        return rewards + self.reward_noise * draws

    def masked(self, values: th.Tensor, batch: SampledBatch | None, members: th.Tensor) -> th.Tensor:
        """
        Let gradients through only where a row's transition is in its member's bootstrap sample.

        The loss is SB3's mean over all rows, as in ``boot_dqn`` of bsuite; the loss that it logs counts all of them.

        :param values: What the network says of a batch, shape (N, ...)
        :param batch: The batch that it was asked about; ``None`` if it is none of the buffer's
        :param members: Member of each row, shape (N,)
        :return: The same values
        :raises ValueError: If it cannot be told which transitions they are
        :raises TypeError: If it does not give a tensor
        """
        if self.share == 1:
            return values
        if not isinstance(values, th.Tensor):
            raise TypeError(
                f"bootstrap={self.share} masks the values of a network, which gives a {type(values).__name__}. Let its "
                "forward give one tensor of values, or leave bootstrap out."
            )
        if batch is None or batch.numbers is None:
            raise ValueError(
                f"bootstrap={self.share}: the network was asked, with gradients, about observations that are not those of a "
                "batch of the replay buffer, so it cannot be told which members learn from them. Hand it "
                "samples.observations themselves, ask under torch.no_grad(), or leave bootstrap out."
            )
        kept = in_bootstrap(batch.numbers, members, self.share)
        return th.where(kept.view(-1, *[1] * (values.dim() - 1)), values, values.detach())
