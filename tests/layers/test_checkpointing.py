"""Activation checkpointing: what autograd computes again sees the noise that it was computed with first."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.utils.checkpoint import checkpoint

from sb3_flipout.layers import perturb, perturbed
from sb3_flipout.noise import FAMILIES
from sb3_flipout.noise.families import NOISE_SHARINGS

KEYS, OTHERS = th.arange(6) * 5 - 9, th.arange(6) * 3 + 1000
SCALE = th.tensor([1.0, 0.0, -1.0, 0.25, 2.0, -0.5])


class Recurrent(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.net(x)[0]


class Attending(Recurrent):
    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.net(x, x, x, need_weights=False)[0]


#: What stands in a checkpoint; each takes and gives (6, 4, 4).
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "activated": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    "two": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)),
    "conv": lambda: nn.Conv1d(4, 4, 3, padding=1),
    "gru": lambda: Recurrent(nn.GRU(4, 4, batch_first=True)),
    "lstm": lambda: Recurrent(nn.LSTM(4, 4, batch_first=True)),
    "attention": lambda: Attending(nn.MultiheadAttention(4, 2, batch_first=True)),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
}
every_block = pytest.mark.parametrize("block", BLOCKS)


class Net(nn.Module):
    """Three blocks, each of which may be computed again in the backward pass."""

    def __init__(self, block: str = "two", recomputed: bool = True, reentrant: bool = False) -> None:
        super().__init__()
        th.manual_seed(1)
        self.blocks = nn.ModuleList([BLOCKS[block]() for _ in range(3)]).double()
        self.recomputed, self.reentrant = recomputed, reentrant

    def forward(self, x: th.Tensor) -> th.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.recomputed else block(x)
        return x


def pair(block: str = "two", **noise: Any) -> list[Net]:
    """The same network without and with checkpoints."""
    return [perturb(Net(block, recomputed), base_key=3, **noise) for recomputed in (False, True)]


def inputs() -> th.Tensor:
    return th.randn(6, 4, 4, dtype=th.float64, generator=th.Generator().manual_seed(2))


def gradients(net: nn.Module) -> dict[str, th.Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same_gradients(plain: nn.Module, recomputed: nn.Module) -> None:
    expected, found = gradients(plain), gradients(recomputed)
    assert expected.keys() == found.keys() and any(name.endswith("sigma") for name in expected)
    for name in expected:
        th.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


def no_block() -> Any:
    return th.enable_grad()


#: Where the backward pass runs, given the network.
PLACES: dict[str, Callable[[nn.Module], Any]] = {
    "after": lambda net: no_block(),
    "other_noise": lambda net: perturbed(net, OTHERS),
    "other_number_of_rows": lambda net: perturbed(net, OTHERS[:2]),
    "mean_weights": lambda net: perturbed(net, None),
}


@every_block
def test_gradients_inside_the_block(block: str) -> None:
    nets = pair(block)
    for net in nets:
        with perturbed(net, KEYS, SCALE):
            net(inputs()).square().sum().backward()
    assert_same_gradients(*nets)


@pytest.mark.parametrize("place", PLACES)
@every_block
def test_gradients_later(block: str, place: str) -> None:
    nets = pair(block)
    for net in nets:
        with perturbed(net, KEYS, SCALE):
            loss = net(inputs()).square().sum()
        with PLACES[place](net):
            loss.backward()
    assert_same_gradients(*nets)


@pytest.mark.parametrize("sharing", NOISE_SHARINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_every_noise(family: str, sharing: str) -> None:
    nets = pair("linear", family=family, noise_sharing=sharing)
    for net in nets:
        with perturbed(net, KEYS, SCALE):
            loss = net(inputs()).square().sum()
        with perturbed(net, OTHERS):
            loss.backward()
    expected, found = map(gradients, nets)
    assert expected.keys() == found.keys()
    for name in expected:
        th.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


@every_block
def test_two_passes_under_two_noises_and_one_backward(block: str) -> None:
    """Side by side, as an old and a new policy in one loss."""
    nets = pair(block)
    for net in nets:
        losses = []
        for keys in (KEYS, None, OTHERS):
            with perturbed(net, keys):
                losses.append(net(inputs()).square().sum())
        (losses[0] - 2 * losses[1] + 3 * losses[2]).backward()
    assert_same_gradients(*nets)


@every_block
@pytest.mark.parametrize("second", [OTHERS, None], ids=["noise", "mean_weights"])
def test_two_passes_one_after_the_other(block: str, second: th.Tensor | None) -> None:
    """What one pass gives the other takes, so both stand on one graph."""
    nets = pair(block)
    for net in nets:
        with perturbed(net, KEYS):
            x = net(inputs())
        with perturbed(net, second):
            x = net(x)
        with perturbed(net, KEYS + 1):
            x = net(x)
        x.square().sum().backward()
    assert_same_gradients(*nets)


def test_mean_weights_stay_so_where_the_backward_runs_under_noise() -> None:
    nets = pair()
    for net in nets:
        with perturbed(net, KEYS):
            net(inputs())
        loss = net(inputs()).square().sum()
        with perturbed(net, OTHERS):
            loss.backward()
    expected, found = map(gradients, nets)
    for name in expected:
        th.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_noise_that_the_block_itself_asks_for() -> None:
    """The checkpoint holds the ``with``, so what runs again says itself what its rows see."""
    nets = pair()
    for net in nets:

        def forward(x: th.Tensor, net: Net = net) -> th.Tensor:
            with perturbed(net, KEYS):
                return net.blocks[1](x)

        h = checkpoint(forward, inputs().requires_grad_(), use_reentrant=False) if net.recomputed else forward(inputs())
        with perturbed(net, OTHERS):
            h.square().sum().backward()
    assert_same_gradients(*nets)


def test_two_noises_that_the_block_itself_asks_for() -> None:
    """Each ``with`` says it again, and what stands outside them sees what it saw outside."""
    nets = pair()
    for net in nets:

        def forward(x: th.Tensor, net: Net = net) -> th.Tensor:
            with perturbed(net, KEYS):
                x = net.blocks[0](x)
            with perturbed(net, OTHERS):
                x = net.blocks[1](x)
            return net.blocks[2](x)

        with perturbed(net, KEYS + 7):
            h = checkpoint(forward, inputs(), use_reentrant=False) if net.recomputed else forward(inputs())
        with perturbed(net, KEYS + 1):
            h.square().sum().backward()
    assert_same_gradients(*nets)


def test_checkpoints_in_checkpoints() -> None:
    nets = pair()
    for net in nets:
        with perturbed(net, KEYS):
            x = checkpoint(net, inputs(), use_reentrant=False) if net.recomputed else net(inputs())
            x.square().sum().backward()
    assert_same_gradients(*nets)


def test_the_noise_of_other_networks_is_left_alone() -> None:
    """An actor in front of a critic, each under a noise of its own."""
    for_both: list[list[Net]] = [pair(), pair("linear")]
    for actor, critic in zip(*for_both, strict=True):
        with perturbed(actor, KEYS), perturbed(critic, OTHERS, 0.3):
            loss = critic(actor(inputs())).square().sum()
        loss.backward()
    for nets in for_both:
        assert_same_gradients(*nets)


def test_a_reentrant_checkpoint_raises() -> None:
    net = perturb(Net(reentrant=True))
    with perturbed(net, KEYS):
        loss = net(inputs().requires_grad_()).square().sum()
    with pytest.raises(RuntimeError) as told:
        loss.backward()
    assert str(told.value) == (
        "a perturbed layer runs again in the backward pass of torch.utils.checkpoint(..., use_reentrant=True), or of another "
        "function that computes a forward pass again, where it cannot be told which noise it had. Use use_reentrant=False, or "
        "leave the module out with skip=."
    )


def test_two_networks_in_one_checkpoint() -> None:
    """Each sees again what it saw."""
    first, second = (perturb(Net(recomputed=False), base_key=base) for base in (3, 4))
    twins = [perturb(Net(recomputed=False), base_key=base) for base in (3, 4)]
    with perturbed(first, KEYS), perturbed(second, OTHERS):
        loss = checkpoint(lambda x: second(first(x)), inputs().requires_grad_(), use_reentrant=False).square().sum()
    loss.backward()
    with perturbed(twins[0], KEYS), perturbed(twins[1], OTHERS):
        twins[1](twins[0](inputs().requires_grad_())).square().sum().backward()
    assert_same_gradients(twins[0], first)
    assert_same_gradients(twins[1], second)


@pytest.mark.parametrize("place", PLACES)
def test_a_part_that_the_block_itself_perturbs(place: str) -> None:
    """The other parts see again what they saw, whatever is said of the rows when the backward pass runs."""
    net, twin = (perturb(Net(recomputed=False), base_key=3) for _ in range(2))

    def forward(of: Net, x: th.Tensor) -> th.Tensor:
        with perturbed(of.blocks[1], OTHERS):
            return of(x)

    with perturbed(net, KEYS):
        loss = checkpoint(lambda x: forward(net, x), inputs().requires_grad_(), use_reentrant=False).square().sum()
    with PLACES[place](net):
        loss.backward()
    with perturbed(twin, KEYS):
        forward(twin, inputs().requires_grad_()).square().sum().backward()
    assert_same_gradients(twin, net)


class Again(th.autograd.Function):
    """Computes a network again in its backward pass, and says itself what the rows see there."""

    @staticmethod
    def forward(ctx: Any, net: nn.Module, x: th.Tensor) -> th.Tensor:  # type: ignore[override]
        ctx.net = net
        ctx.save_for_backward(x)
        with perturbed(net, KEYS):
            return net(x)

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with th.enable_grad(), perturbed(ctx.net, KEYS):
            x = x.detach().requires_grad_()
            th.autograd.backward(ctx.net(x), gradient)
        return None, x.grad


def test_a_function_that_says_in_its_backward_pass_what_rows_see() -> None:
    net, twin = (perturb(Net(recomputed=False), base_key=3) for _ in range(2))
    x, other = inputs().requires_grad_(), inputs().requires_grad_()
    Again.apply(net, x).square().sum().backward()
    with perturbed(twin, KEYS):
        twin(other).square().sum().backward()
    assert_same_gradients(twin, net)
    th.testing.assert_close(x.grad, other.grad)


def of_nothing() -> Any:
    return lambda tensor: tensor


def of_something_called_frame() -> Any:
    frame = object()

    def pack(tensor: th.Tensor) -> th.Tensor:
        assert frame is not None
        return tensor

    return pack


class Keeps:
    """A hook that is no function, but an object that is called, or has a method."""

    def __call__(self, tensor: th.Tensor) -> th.Tensor:
        return tensor

    def pack(self, tensor: th.Tensor) -> th.Tensor:
        return tensor


HOOKS: list[Callable[[], Any]] = [
    of_nothing,
    of_something_called_frame,
    lambda: partial(th.mul, other=1),
    lambda: th.detach,
    Keeps,
    lambda: Keeps().pack,
]


@pytest.mark.parametrize("packs", HOOKS, ids=["function", "closure", "partial", "builtin", "object", "method"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_hooks_of_others_are_left_alone(packs: Callable[[], Any], recomputed: bool) -> None:
    """Those that move what is saved to another place, as ``save_on_cpu`` does."""
    net, twin = (perturb(Net(recomputed=again), base_key=3) for again in (recomputed, False))
    with perturbed(twin, KEYS):
        twin(inputs().requires_grad_()).square().sum().backward()
    with th.autograd.graph.saved_tensors_hooks(packs(), lambda tensor: tensor):
        with perturbed(net, KEYS):
            loss = net(inputs().requires_grad_()).square().sum()
    loss.backward()
    assert_same_gradients(twin, net)


def test_a_closure_that_runs_later_sees_mean_weights_and_changes_nothing() -> None:
    net = perturb(Net(recomputed=False))
    mean = net(inputs())
    with perturbed(net, KEYS):

        def closure() -> th.Tensor:
            return net(inputs())

        noisy = closure()
    assert th.equal(closure(), mean) and not th.allclose(noisy, mean)
