"""Gradient steps that the policy's own optimizer has not made: those of a user's optimizers, whoever holds them."""

from __future__ import annotations

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
        self.asked = False  # whether a network has been asked with gradients since the last look
        self.batches = 0  # that have been sampled

    def look(self) -> bool:
        """
        Count a step that nobody has counted.

        :return: Whether there was one
        """
        unseen = self.asked and self._steps() == self._known
        if unseen:
            self._count()
        self.asked, self._known = False, self._steps()
        return unseen

    def at_batch(self) -> None:
        """Look, before a batch is sampled."""
        self.look()
        self.batches += 1
