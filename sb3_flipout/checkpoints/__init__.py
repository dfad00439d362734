"""Checkpoints that survive a kill: each is there as a whole, or not at all, and :func:`resume` takes the newest that is whole.

A checkpoint is a folder: model, replay buffer, statistics of ``VecNormalize``, and ``checkpoint.json``, which says how long
each file is and what its checksum is. It is written beside its place, flushed to the disk, and renamed.
"""

from sb3_flipout.checkpoints.reading import resume
from sb3_flipout.checkpoints.writing import Checkpoints

__all__ = ["Checkpoints", "resume"]
