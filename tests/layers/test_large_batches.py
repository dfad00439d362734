"""Large batches, whose rank-one noise is summed in blocks, and transforms of torch.func, where nothing is added in place."""

from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_flipout.layers import effective_weight, flipout_layers, functional, perturb, perturbed


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layer", [nn.Linear(256, 3), nn.Conv2d(2, 3, 2, groups=1)], ids=["linear", "conv"])
def test_rank_one_noise_of_a_large_batch_is_each_rows_own(layer: nn.Module, grad: bool) -> None:
    net = perturb(nn.Sequential(layer).double(), family="lowrank", learn_sigma=False, base_key=3)
    shape = (256,) if isinstance(layer, nn.Linear) else (2, 12, 12)
    rows = 2 * functional._BLOCK // int(th.tensor(shape).prod()) + 7
    x, keys = th.randn(rows, *shape, dtype=th.float64), th.arange(rows)
    with th.set_grad_enabled(grad), perturbed(net, keys):
        y = net(x)
    (one,), op = flipout_layers([net]), functional_op(layer)
    for row in (0, rows // 2 - 1, rows // 2, rows - 1):
        expected = op(x[row : row + 1], *effective_weight(one, keys[row], 1.0))
        assert th.allclose(y[row : row + 1], expected, rtol=0, atol=1e-10)


def functional_op(layer: nn.Module) -> Any:
    return th.nn.functional.linear if isinstance(layer, nn.Linear) else th.nn.functional.conv2d


@pytest.mark.parametrize("family", ["gaussian", "lowrank"])
def test_sigma_alone_can_be_mapped_over(family: Any) -> None:
    net = perturb(nn.Sequential(nn.Linear(4, 3)), family=family, learn_sigma=True, base_key=3)
    x, keys, sigma = th.randn(5, 4), th.arange(5), net[0].weight_sigma.detach()
    stack = th.stack([sigma, 2 * sigma])

    def outputs(weight_sigma: th.Tensor) -> th.Tensor:
        return th.func.functional_call(net, {"0.weight_sigma": weight_sigma}, (x,))  # type: ignore[no-any-return]

    with th.no_grad(), perturbed(net, keys):
        both = th.func.vmap(outputs)(stack)
        assert th.allclose(both, th.stack([outputs(one) for one in stack]), atol=1e-6)
