"""What somebody notes of the passes through a network, to see whether its noise reaches its layers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Visits:
    """
    What has been noted of a network.

    :param called: Slots of the layers that were called under noise, heard or not
    :param given_noise: Whether rows were given noise
    :param unsaid: Whether layers were called of which nobody had said what their rows see
    """

    called: set[int] = field(default_factory=set)
    given_noise: bool = False
    unsaid: bool = False
