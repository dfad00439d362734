"""Every layer in every floating-point type, and under autocast: the noise is the same, up to the rounding of the type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_flipout.layers import perturb, perturbed

KEYS = th.arange(5) * 77 - 100
NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], th.Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), lambda: th.randn(5, 6)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)),
        lambda: th.randn(5, 2, 5, 5),
    ),
    "lstm": (lambda: nn.LSTM(6, 8), lambda: th.randn(1, 5, 6)),
    "gru": (lambda: nn.GRU(6, 8), lambda: th.randn(1, 5, 6)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), lambda: th.randn(5, 4, 8)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 3)), lambda: th.randint(0, 7, (5,))),
}


def output(net: Any, x: th.Tensor, keys: th.Tensor | None = KEYS) -> th.Tensor:
    with perturbed(net, keys):
        out = net(x, x, x) if isinstance(net, nn.MultiheadAttention) else net(x)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def cast(x: th.Tensor, dtype: th.dtype) -> th.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def close(found: th.Tensor, exact: th.Tensor, eps: float) -> None:
    """Each of some ten operations rounds once, and numbers on the way are at most a few times as large as the result."""
    assert float((found.detach().double() - exact.detach()).abs().max()) <= 30 * eps * float(exact.detach().abs().max())


@pytest.mark.parametrize("family", ["gaussian", "factorised", "multiplicative"])
@pytest.mark.parametrize("dtype", [th.float64, th.float32, th.bfloat16, th.float16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_types_of_weights(name: str, dtype: th.dtype, family: Any) -> None:
    build, draw = NETS[name]
    th.manual_seed(0)
    plain, x = build(), draw()
    exact = perturb(copy.deepcopy(plain).double(), family=family, base_key=3)
    net = perturb(copy.deepcopy(plain).to(dtype), family=family, base_key=3)
    wanted, found = output(exact, cast(x, th.float64)), output(net, cast(x, dtype))
    assert found.dtype == dtype
    close(found, wanted, th.finfo(dtype).eps)
    assert not th.equal(found, output(net, cast(x, dtype), None))
    found.double().square().sum().backward()
    wanted.square().sum().backward()
    for one, other in zip(net.parameters(), exact.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            assert one.grad.dtype == dtype
            close(one.grad, other.grad, 10 * th.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_autocast(name: str, dtype: th.dtype) -> None:
    build, draw = NETS[name]
    th.manual_seed(0)
    plain, x = build(), draw()
    exact = output(perturb(copy.deepcopy(plain).double(), base_key=3), cast(x, th.float64))
    net = perturb(copy.deepcopy(plain), base_key=3)
    with th.autocast("cpu", dtype=dtype):
        found = output(net, x)
        if name != "lstm":  # oneDNN has one of its own, in bfloat16 alone
            of_stock = plain(x, x, x) if isinstance(plain, nn.MultiheadAttention) else plain(x)
            assert found.dtype == (of_stock[0] if isinstance(of_stock, tuple) else of_stock).dtype
    close(found, exact, th.finfo(dtype).eps)
    found.float().sum().backward()
    assert all(parameter.dtype == th.float32 for parameter in net.parameters())
    assert any(p.grad is not None and p.grad.dtype == th.float32 for p in net.parameters())


#: Torch 2.8 takes no loss of two types, and its autocast keeps weights that were cast without gradients: stock SB3 fails too.
OF_OLD_TORCH = pytest.mark.skipif(tuple(map(int, th.__version__.split(".")[:2])) < (2, 13), reason="torch is too old for it")


class Doubling(BaseFeaturesExtractor):
    """Hands observations on in the type of the weights: SB3 itself makes them float32 and casts nothing."""

    def __init__(self, observation_space: Any, dtype: th.dtype, back: bool) -> None:
        super().__init__(observation_space, 8)
        self.linear = nn.Linear(4, 8).to(dtype)
        self.dtype, self.back = dtype, back

    def forward(self, observations: th.Tensor) -> th.Tensor:
        features: th.Tensor = self.linear(observations.to(self.dtype)).tanh()
        return features.float() if self.back else features


def policy_of(algorithm: type[BaseAlgorithm], dtype: th.dtype, back: bool) -> Any:
    off = dict(learning_starts=16, batch_size=8, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    # Steps large enough for bfloat16, which has 8 bits; and SB3's orthogonal initialisation needs more.
    settings: dict[str, Any] = dict(learning_rate=0.05, **(off if algorithm is DQN else dict(n_steps=16)))
    kwargs = dict(
        **({} if algorithm is DQN else dict(ortho_init=False)),
        net_arch=[8],
        schedule="constant",
        learn_sigma=True,
        features_extractor_class=Doubling,
        features_extractor_kwargs=dict(dtype=dtype, back=back),
    )
    return algorithm("FlipoutMlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs=kwargs, **settings)


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", [A2C, DQN])
def test_a_policy_of_two_types_trains(algorithm: type[BaseAlgorithm], dtype: th.dtype) -> None:
    model = policy_of(algorithm, dtype, back=True)
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(96)
    after = model.policy.state_dict()
    learned = [name for name in after if "linear" in name and "target" not in name and "base" not in name]
    assert learned and all(after[name].dtype == dtype and not th.equal(after[name], before[name]) for name in learned)


@OF_OLD_TORCH
def test_a_policy_in_float64_trains_and_replays_exactly() -> None:
    model = PPO(
        "FlipoutMlpPolicy",
        "CartPole-v1",
        n_steps=32,
        batch_size=32,
        n_epochs=1,
        device="cpu",
        policy_kwargs=dict(
            net_arch=[8],
            schedule="constant",
            features_extractor_class=Doubling,
            features_extractor_kwargs=dict(dtype=th.float64, back=False),
        ),
    )
    model.policy.double()
    model.learn(64)
    # The first ratio of each update is 1 up to float32, in which the buffer stores log-probabilities.
    assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-9
    assert model.logger.name_to_value["train/clip_fraction"] == 0.0


@OF_OLD_TORCH
def test_dqn_trains_under_autocast() -> None:
    """As stock DQN does; PPO and SAC do not, stock or not: SB3 turns their actions into numpy, which has no bfloat16."""
    off = dict(learning_starts=16, batch_size=8, exploration_initial_eps=0.0, exploration_final_eps=0.0)
    model = DQN("FlipoutMlpPolicy", "CartPole-v1", seed=0, device="cpu", policy_kwargs=dict(net_arch=[8]), **off)  # type: ignore[arg-type]
    with th.autocast("cpu", dtype=th.bfloat16):
        model.learn(96)
    assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
