"""Gradient steps that the policy's own optimizer has not made: those of a user's optimizers, whoever holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable


class UnseenSteps:
    """
    Finds, in one update, gradient steps that nobody has counted: networks have been asked with gradients since the last look,
    and the number of steps is what it was. It looks before a batch is sampled, not sooner, so that a batch is learned under
    one noise.

    :param steps: Tells how many steps have been counted
    :param count: Counts one
    """

    def __init__(self, steps: Callable[[], int], count: Callable[[], None]) -> None:
        self._steps, self._count = steps, count
        self._known = steps()
        self._asked: Counter[int] = Counter()  # how often each network, with gradients, since the last look
        self.batches = 0  # that have been sampled

    def ask(self, network: object) -> None:
        """
        Note that a network is asked with gradients.

        :param network: The network
        """
        self._asked[id(network)] += 1

    @property
    def may_be_several(self) -> bool:
        """Whether there may have been several steps since the last look. SAC's critic is asked twice in one."""
        return max(self._asked.values(), default=0) > 2

    def look(self) -> bool:
        """
        Count a step that nobody has counted.

        :return: Whether there was one
        """
        unseen = bool(self._asked) and self._steps() == self._known
        if unseen:
            self._count()
        self._asked.clear()
        self._known = self._steps()
        return unseen

    def at_batch(self) -> None:
        """Look, before a batch is sampled."""
        self.look()
        self.batches += 1
