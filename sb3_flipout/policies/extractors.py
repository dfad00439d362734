"""Features extractors for observations that SB3 has none for."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_flipout.checks import check_integer
from sb3_flipout.layers import OneHotLinear
from sb3_flipout.noise.compiling import recording


class MinAtarCNN(BaseFeaturesExtractor):
    """
    The network of Young and Tian 2019 up to its last layer: 16 filters of 3x3, then 128 units.

    SB3's NatureCNN cannot be used on MinAtar: its filters are larger than the ten by ten pixels. Give ``net_arch=[]`` with it.

    :param observation_space: Observations of shape (channels, height, width), floating-point numbers
    :param features_dim: Units of the last layer
    """

    def __init__(self, observation_space: spaces.Box, features_dim: int = 128) -> None:
        super().__init__(observation_space, features_dim)
        channels, height, width = observation_space.shape
        flat = 16 * (height - 2) * (width - 2)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(flat, features_dim), nn.ReLU()
        )

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        Compute the features.

        :param observations: Observations, shape (N, channels, height, width)
        :return: Features, shape (N, features_dim)
        """
        return self.layers(observations)


class OneHotExtractor(BaseFeaturesExtractor):
    """
    One linear layer on a Discrete observation, then ReLU: what the first layer of an MLP is, by look-up.

    With ten thousand values, as in DeepSea of size 100, matrix products with one-hot vectors would be most of a gradient step.
    Give one layer less as ``net_arch``.

    :param observation_space: Discrete observations
    :param features_dim: Units of the layer
    :raises TypeError: If the observations are not Discrete, or ``features_dim`` is no integer
    :raises ValueError: If the observations do not start at 0, or ``features_dim`` is below 1
    """

    def __init__(self, observation_space: spaces.Discrete, features_dim: int = 64) -> None:
        if not isinstance(observation_space, spaces.Discrete):
            raise TypeError(
                f"OneHotExtractor is for Discrete observations, got {observation_space}. Leave features_extractor_class out."
            )
        if observation_space.start != 0:
            raise ValueError(
                f"OneHotExtractor is for observations from 0 on, as SB3's one-hot vectors are, got {observation_space}. "
                f"Subtract {observation_space.start} in a wrapper of the environment."
            )
        units = check_integer("features_dim", features_dim, 1)
        super().__init__(observation_space, units)
        self.linear = OneHotLinear(int(observation_space.n), units)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        Compute the features.

        :param observations: One-hot observations, as SB3 makes them, shape (N, n) or (N, 1, n); or the numbers,
            shape (N,) or (N, 1)
        :return: Features, shape (N, features_dim)
        :raises ValueError: If they are neither, or, on a processor, a number is not of the space
        """
        numbers = self._numbers(observations)
        try:
            return nn.functional.relu(self.linear(numbers))
        except IndexError as error:
            values = self.linear.num_embeddings
            raise ValueError(
                f"OneHotExtractor got observations from {int(numbers.min())} to {int(numbers.max())}, and its space has "
                f"{values}, 0 to {values - 1}. Mend the environment, or its observation space."
            ) from error

    def _numbers(self, observations: th.Tensor) -> th.Tensor:
        if observations.dim() == 1:
            return observations
        rows, values = observations.flatten(1), self.linear.num_embeddings
        if rows.shape[1] == values:
            return _places(rows)
        if rows.shape[1] == 1 and not rows.is_floating_point():
            return rows[:, 0]
        raise ValueError(
            f"OneHotExtractor got observations of shape {tuple(observations.shape)} and type {observations.dtype}; it takes "
            f"one-hot vectors, shape (N, {values}), or integer numbers, shape (N,) or (N, 1)."
        )


def _places(one_hot: th.Tensor) -> th.Tensor:
    if one_hot.device.type != "cpu" or recording() or one_hot.dtype not in (th.float32, th.float64):
        return one_hot.argmax(dim=1)
    # torch's takes some ten times as long: of ten thousand values, a fifth of a gradient step.
    return th.from_numpy(one_hot.detach().numpy().argmax(axis=1))


class GivesNumbers(BaseModel):
    """
    Mixin of a network that gives :class:`OneHotExtractor` the observations themselves, of which SB3 makes one-hot vectors.

    To make those of ten thousand values, and to find the numbers in them again, is a fifth of a gradient step.
    """

    def extract_features(self, obs: Any, features_extractor: BaseFeaturesExtractor) -> th.Tensor:
        """
        Extract features.

        :param obs: Observations
        :param features_extractor: What extracts them
        :return: Features, shape (N, features_dim)
        """
        theirs: Any = super().extract_features
        if type(features_extractor) is OneHotExtractor and theirs.__func__ is BaseModel.extract_features:
            return features_extractor(obs.long().flatten())
        return theirs(obs, features_extractor)
