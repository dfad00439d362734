"""Parameter-noise exploration for Stable-Baselines3: importing this package adds flipout policies to its algorithms.

``PPO("FlipoutMlpPolicy", env)`` explores by weight noise: every environment sees its own perturbation of the weights, at
the price of two matrix products (Flipout, Wen et al. 2018), and PPO's update replays that noise exactly.
"""

from sb3_flipout import callbacks
from sb3_flipout.layers import FlipoutConv2d, FlipoutLinear, FlipoutLSTM, perturb, perturbed, redraw, restore
from sb3_flipout.noise import signs
from sb3_flipout.registration import register, unregister

__version__ = "0.1.0"

__all__ = [
    "FlipoutConv2d",
    "FlipoutLSTM",
    "FlipoutLinear",
    "__version__",
    "callbacks",
    "perturb",
    "perturbed",
    "redraw",
    "register",
    "restore",
    "signs",
    "unregister",
]

register()
