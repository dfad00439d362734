"""Parameter-noise exploration for Stable-Baselines3: importing this package adds flipout policies to its algorithms.

``PPO("FlipoutMlpPolicy", env)`` explores by weight noise: every environment sees its own perturbation of the weights, at
the price of two matrix products (Flipout, Wen et al. 2018), and PPO's update replays that noise exactly.
"""

import sys

from sb3_flipout import callbacks, diagnostics, envs
from sb3_flipout.callbacks import flipout_policy
from sb3_flipout.checkpoints import Checkpoints, resume
from sb3_flipout.evolution import FlipES
from sb3_flipout.export import export_onnx, export_policy, import_policy
from sb3_flipout.layers import (
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutConv3d,
    FlipoutConvTranspose1d,
    FlipoutConvTranspose2d,
    FlipoutConvTranspose3d,
    FlipoutEmbedding,
    FlipoutGRU,
    FlipoutGRUCell,
    FlipoutLinear,
    FlipoutLSTM,
    FlipoutMultiheadAttention,
    kl_divergence,
    perturb,
    perturbed,
    redraw,
    restore,
)
from sb3_flipout.noise import signs
from sb3_flipout.registration import register, unregister

__version__ = "0.2.0"

__all__ = [
    "Checkpoints",
    "FlipES",
    "FlipoutConv1d",
    "FlipoutConv2d",
    "FlipoutConv3d",
    "FlipoutConvTranspose1d",
    "FlipoutConvTranspose2d",
    "FlipoutConvTranspose3d",
    "FlipoutEmbedding",
    "FlipoutGRU",
    "FlipoutGRUCell",
    "FlipoutLSTM",
    "FlipoutLinear",
    "FlipoutMultiheadAttention",
    "__version__",
    "callbacks",
    "diagnostics",
    "envs",
    "export_onnx",
    "export_policy",
    "flipout_policy",
    "import_policy",
    "kl_divergence",
    "perturb",
    "perturbed",
    "redraw",
    "register",
    "restore",
    "resume",
    "signs",
    "unregister",
]

register()
if "rl_zoo3.exp_manager" in sys.modules:  # as with --gym-packages sb3_flipout: the search space, too
    from sb3_flipout import zoo

    zoo.register()
