"""`OneHotExtractor` is the first layer of an MLP on one-hot vectors, whatever type they have."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_flipout.policies.extractors import OneHotExtractor


@pytest.mark.parametrize("dtype", [th.float32, th.float64, th.bfloat16])
@pytest.mark.parametrize("shape", [(4, 9), (4, 1, 9)])
def test_it_is_a_linear_layer_on_one_hot_vectors(dtype: th.dtype, shape: tuple[int, ...]) -> None:
    extractor = OneHotExtractor(spaces.Discrete(9), features_dim=5)
    one_hot = nn.functional.one_hot(th.tensor([0, 8, 3, 3]), 9)
    table, bias = extractor.linear.weight, extractor.linear.bias
    wanted = nn.functional.relu(one_hot.float() @ table + bias)
    th.testing.assert_close(extractor(one_hot.to(dtype).view(shape)), wanted)
    assert len(np.unique(wanted.detach().numpy(), axis=0)) == 3


def test_other_observations_are_refused() -> None:
    with pytest.raises(TypeError, match="is for Discrete observations"):
        OneHotExtractor(spaces.Box(-1, 1, (3,)))  # type: ignore[arg-type]
