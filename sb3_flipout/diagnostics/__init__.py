"""How noisy perturbed networks and the policies made of them are, as numbers.

Pure functions: they draw from keys, leave the network's base and gradients as they were, and never log.

- ``gradients.py``: variance of gradients, its slope over batch sizes, correlation of rows
- ``weights.py``: sigma, and weights against their noise
- ``outputs.py``: variance of outputs, split into that of noise and that of inputs
- ``actions.py``: action distributions under noise: entropies, divergence, disagreement
"""

from sb3_flipout.diagnostics.actions import EntropySplit, divergence, entropy_split, pairwise_disagreement
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
from sb3_flipout.diagnostics.weights import noise_deviation, sigmas, signal_to_noise

__all__ = [
    "Batch",
    "EntropySplit",
    "Estimate",
    "base_kept",
    "divergence",
    "entropy_split",
    "gradient_variance",
    "log_log_slope",
    "noise_deviation",
    "noise_share",
    "pairwise_disagreement",
    "perturbed_outputs",
    "row_correlation",
    "sigmas",
    "signal_to_noise",
]
