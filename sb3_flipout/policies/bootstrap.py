"""Bootstrap samples and perturbed rewards of an ensemble's members, in the gradient step that goes on."""

from __future__ import annotations

import torch as th

from sb3_flipout.noise.transitions import in_bootstrap, reward_draws


class Bootstrap:
    """
    What each member learns from of a batch of transitions, and what it adds to their rewards.

    :param share: Probability that a transition is in a member's bootstrap sample
    :param reward_noise: Standard deviation of what a member adds to a reward
    """

    def __init__(self, share: float = 1.0, reward_noise: float = 0.0) -> None:
        self.share = share
        self.reward_noise = reward_noise
        self.numbers: th.Tensor | None = None  # of the transitions of the present batch, one per row

    @property
    def needs_numbers(self) -> bool:
        """Whether transitions have to be told apart at all."""
        return self.share < 1 or self.reward_noise > 0

    def noise_on(self, rewards: th.Tensor, members: th.Tensor) -> th.Tensor:
        """
        Perturb the rewards of the present batch.

        :param rewards: Rewards, shape (N, 1)
        :param members: Member of each row, shape (N,)
        :return: Perturbed rewards, the same shape
        """
        assert self.numbers is not None, "the batch has been noted"
        if self.reward_noise == 0:
            return rewards
        return rewards + self.reward_noise * reward_draws(self.numbers, members, rewards.dtype)[:, None]

    def only_its_own(self, values: th.Tensor, members: th.Tensor) -> th.Tensor:
        """
        Let gradients through only where a row's transition is in its member's bootstrap sample.

        The loss is SB3's mean over all rows, as in ``boot_dqn`` of bsuite; the loss that it logs counts all of them.

        :param values: What the network says of the present batch, shape (N, ...)
        :param members: Member of each row, shape (N,)
        :return: The same values
        :raises ValueError: If the batch has another number of rows
        """
        if self.share == 1 or self.numbers is None:
            return values
        if len(values) != len(self.numbers):
            raise ValueError(
                f"bootstrap={self.share}: the network got {len(values)} rows with gradients while the batch that was sampled "
                f"has {len(self.numbers)}, so it cannot be told which transitions they are. Ask for other values under "
                "torch.no_grad(), or leave bootstrap out."
            )
        kept = in_bootstrap(self.numbers, members, self.share)
        return th.where(kept.view(-1, *[1] * (values.dim() - 1)), values, values.detach())
