"""What stored transitions mean to the members of an ensemble: a pure function of a transition's number and a member's key.

So a bootstrap sample and its perturbed rewards need one stored number per transition, whatever the number of members.
"""

import torch as th

from sb3_flipout.noise.keys import fold_in
from sb3_flipout.noise.tables import factor_table

# What a draw is for; part of its key, so never renumbered.
_BOOTSTRAP, _REWARD = 0, 1
_BITS = 53  # of a uniform draw: as many as a Python float tells apart


def in_bootstrap(numbers: th.Tensor, members: th.Tensor, share: float) -> th.Tensor:
    """
    Tell whether transitions are in the bootstrap samples of members (Osband et al. 2016): each with probability ``share``,
    independently.

    :param numbers: Numbers of transitions, int64
    :param members: Members, int64, broadcast against the numbers
    :param share: Probability, in (0, 1]
    :return: Booleans of the broadcast shape
    """
    draws = fold_in(fold_in(numbers, _BOOTSTRAP), members)
    return (draws & ((1 << _BITS) - 1)) < int(share * (1 << _BITS))


def reward_draws(numbers: th.Tensor, members: th.Tensor, dtype: th.dtype = th.float32) -> th.Tensor:
    """
    Draw what members add to the rewards of transitions, in standard deviations (Osband et al. 2018, section 3).

    :param numbers: Numbers of transitions, int64
    :param members: Members, int64, broadcast against the numbers
    :param dtype: Floating-point type of the result
    :return: 16-bit quantiles of N(0, 1) of the broadcast shape
    """
    pieces = fold_in(fold_in(numbers, _REWARD), members) & 0xFFFF
    return factor_table("normal", dtype, pieces.device)[0].index_select(0, pieces.flatten()).view(pieces.shape)
