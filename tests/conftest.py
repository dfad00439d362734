"""One torch thread per worker, and what several rings' tests need."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch as th

th.set_num_threads(1)


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Fail if the test moves a global random generator of torch or numpy."""
    torch_before, numpy_before = th.get_rng_state(), np.random.get_state()
    yield
    assert th.equal(th.get_rng_state(), torch_before)
    for before, after in zip(numpy_before, np.random.get_state(), strict=True):
        assert np.array_equal(before, after)
