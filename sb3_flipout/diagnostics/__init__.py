"""The one place that measures: how noisy perturbed networks, and the policies made of them, are.

They draw from keys, leave the network's base and gradients as they were, and never log.

- ``gradients.py``: variance of gradients, its slope over batch sizes, correlation of rows
- ``weights.py``: sigma, and weights against their noise
- ``outputs.py``: variance of outputs, split into that of noise and that of inputs
- ``actions.py``: action distributions under noise: entropies, divergence, disagreement
- ``views.py``: what a policy does with observations, in one form for all algorithms
- ``distances.py``: how far the perturbed policy is from the mean one
- ``statistics.py``, ``figures.py``: the numbers and pictures of ``MonitorNoise``
- ``recent.py``: recent observations of a model, to measure with
- ``lag.py``: whether the mean weights lag behind the sampled ones
"""

from sb3_flipout.diagnostics.actions import EntropySplit, divergence, entropy_split, pairwise_disagreement
from sb3_flipout.diagnostics.distances import MEASURES, Measure, policy_distance
from sb3_flipout.diagnostics.gradients import (
    Batch,
    Estimate,
    base_kept,
    gradient_variance,
    log_log_slope,
    perturbed_outputs,
    row_correlation,
)
from sb3_flipout.diagnostics.outputs import noise_share
from sb3_flipout.diagnostics.views import ActionView, action_view
from sb3_flipout.diagnostics.weights import noise_deviation, sigmas, signal_to_noise

__all__ = [
    "MEASURES",
    "ActionView",
    "Batch",
    "EntropySplit",
    "Estimate",
    "Measure",
    "action_view",
    "base_kept",
    "divergence",
    "entropy_split",
    "gradient_variance",
    "log_log_slope",
    "noise_deviation",
    "noise_share",
    "pairwise_disagreement",
    "perturbed_outputs",
    "policy_distance",
    "row_correlation",
    "sigmas",
    "signal_to_noise",
]
