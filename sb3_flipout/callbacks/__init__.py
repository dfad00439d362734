"""Ring 3: callbacks that steer the noise during training, and watch it."""

from sb3_flipout.callbacks.adapt import AdaptNoise
from sb3_flipout.callbacks.anneal import AnnealNoise
from sb3_flipout.callbacks.common import flipout_policy
from sb3_flipout.callbacks.evaluate import NoiseEvalCallback
from sb3_flipout.callbacks.guard import StopOnNonFinite
from sb3_flipout.callbacks.monitor import MonitorNoise

__all__ = ["AdaptNoise", "AnnealNoise", "MonitorNoise", "NoiseEvalCallback", "StopOnNonFinite", "flipout_policy"]
