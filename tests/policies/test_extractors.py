"""`OneHotExtractor` is the first layer of an MLP on one-hot vectors, whatever type they have; off policy none are made."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import QRDQN
from stable_baselines3 import DQN, SAC
from stable_baselines3.common import policies
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.dqn.policies import QNetwork
from torch import nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from sb3_flipout.envs import DeepSea
from sb3_flipout.policies.dqn import FlipoutDQNPolicy
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


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_numbers_are_taken_as_they_are(shape: tuple[int, ...]) -> None:
    extractor, numbers = OneHotExtractor(spaces.Discrete(9), features_dim=5), th.tensor([0, 8, 3])
    assert th.equal(extractor(numbers.view(shape)), extractor(nn.functional.one_hot(numbers, 9).float()))


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:Converting a tensor to a Python")
def test_what_is_traced_or_transformed_looks_up_what_it_is_given() -> None:
    extractor, eye = OneHotExtractor(spaces.Discrete(9), features_dim=5), th.eye(9)
    traced = th.jit.trace(extractor, eye[:2])
    wanted = extractor(eye)
    assert th.equal(traced(eye), wanted) and len(wanted.unique(dim=0)) > 5
    th.testing.assert_close(vmap(lambda one: extractor(one[None])[0])(eye), wanted)
    assert th.equal(make_fx(extractor)(eye[[0, 1]])(eye[[4, 5]]), wanted[[4, 5]])


@pytest.mark.parametrize(
    ("space", "features_dim", "kind", "message"),
    [
        (spaces.Box(-1, 1, (3,)), 4, TypeError, "is for Discrete observations, got Box"),
        (spaces.Discrete(5, start=1), 4, ValueError, "from 0 on.*Subtract 1 in a wrapper"),
        (spaces.Discrete(5), 0, ValueError, "features_dim must be .*got 0"),
        (spaces.Discrete(5), 2.5, TypeError, r"features_dim must be an integer.*got 2\.5"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(space: Any, features_dim: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        OneHotExtractor(space, features_dim)


@pytest.mark.parametrize("observations", [th.zeros(4, 8), th.zeros(4, 1), th.zeros(4, 2, dtype=th.int64)])
def test_what_is_neither_numbers_nor_one_hot_is_refused(observations: th.Tensor) -> None:
    with pytest.raises(ValueError, match=r"OneHotExtractor got observations of shape \(4, .*one-hot vectors, shape \(N, 9\)"):
        OneHotExtractor(spaces.Discrete(9))(observations)


@pytest.mark.parametrize("wrong", [9, -1])
def test_numbers_that_are_not_of_the_space_are_told(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"OneHotExtractor got observations from .* to .*, and its space has 9, 0 to 8"):
        OneHotExtractor(spaces.Discrete(9))(th.tensor([0, wrong, 1]))


class ContinuousSea(gym.ActionWrapper[Any, Any, Any]):
    """One whose actions are numbers."""

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(DeepSea(size, **kwargs))
        self.action_space: Any = spaces.Box(-1, 1, (1,))

    def action(self, action: Any) -> int:
        return int(action[0] > 0)


MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DQN": (DQN, DeepSea, {}),
    "DQN, members and priors": (DQN, DeepSea, dict(members=4, prior_scale=0.3, keys_per_transition=4)),
    "QRDQN, members and priors": (QRDQN, DeepSea, dict(members=4, prior_scale=0.3)),
    "SAC": (SAC, ContinuousSea, dict(perturb="all")),
}


def asked_for_one_hot(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    asked: list[Any] = []

    def seen(obs: Any, space: Any, **kwargs: Any) -> Any:
        asked.append(space)
        return preprocess_obs(obs, space, **kwargs)

    monkeypatch.setattr(policies, "preprocess_obs", seen)
    return asked


@pytest.mark.filterwarnings("ignore:.* explores by weight noise and by epsilon-greedy")
@pytest.mark.parametrize("case", MODELS)
def test_no_one_hot_vectors_are_made_where_numbers_do(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the training is the same as with them, bit for bit."""
    algorithm, env, noise = MODELS[case]
    trained = []
    # A class of another name gets what SB3 gives; it passes for one of ours, since where a class is the user's, rows are not
    # sorted by member inside the network, and sums round otherwise.
    for extractor in (OneHotExtractor, type("Derived", (OneHotExtractor,), {"__module__": OneHotExtractor.__module__})):
        model = algorithm(
            "FlipoutMlpPolicy",
            env(4, integer_observations=True),
            learning_starts=20,
            batch_size=16,
            policy_kwargs=dict(features_extractor_class=extractor, net_arch=[8], **noise),
            seed=3,
        )
        asked = asked_for_one_hot(monkeypatch)
        model.learn(60)
        assert bool(asked) == (extractor is not OneHotExtractor)
        trained.append(model.policy.state_dict())
    assert all(th.equal(a, b) for a, b in zip(*(weights.values() for weights in trained), strict=True))


class Mirrored(QNetwork):
    """A network whose observations are numbered from behind."""

    def extract_features(self, obs: Any, features_extractor: Any) -> th.Tensor:
        return super().extract_features(int(self.observation_space.n) - 1 - obs, features_extractor)


class MirroredPolicy(FlipoutDQNPolicy):
    def make_q_net(self) -> QNetwork:
        return Mirrored(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)


def test_a_network_that_extracts_features_itself_is_asked() -> None:
    kwargs = dict(features_extractor_class=OneHotExtractor, members=3, prior_scale=0.5)
    env = DeepSea(4, integer_observations=True)
    plain, mirrored = (DQN(kind, env, seed=1, policy_kwargs=kwargs) for kind in ("FlipoutMlpPolicy", MirroredPolicy))
    obs = np.arange(16)
    values = [model.policy.member_values(obs) for model in (plain, mirrored)]
    assert th.equal(values[0], values[1].flip(1)) and not th.equal(*values)
