"""Where M rows have the same observation, networks get it once: the same values and gradients as with all rows."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import vector_env
from stable_baselines3 import DQN
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.dqn.policies import QNetwork
from torch import nn

import sb3_flipout
from sb3_flipout.envs import DeepSea
from sb3_flipout.noise import RowNoise, RowsByKey
from sb3_flipout.policies.dqn import FlipoutDQNPolicy
from sb3_flipout.policies.extractors import OneHotExtractor

K, M = 5, 3


def build(env: Any, policy: Any = "FlipoutMlpPolicy", times: int = M, **noise: Any) -> DQN:
    noise = dict(members=K, keys_per_transition=times, prior_scale=0.3, net_arch=[8], **noise)
    return DQN(
        policy, env, policy_kwargs=noise, seed=0, batch_size=6 * times, buffer_size=200, learning_starts=20, device="cpu"
    )


class Branches(BaseFeaturesExtractor):
    """Two branches that are joined, of which one may have nothing perturbed."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 16)
        self.a, self.b = nn.Linear(space.shape[0], 8), nn.Linear(space.shape[0], 8)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.cat([self.a(x), self.b(x)], dim=1)


class WithDropout(BaseFeaturesExtractor):
    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, space.shape[0])
        self.drop = nn.Dropout(0.5)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.drop(x)


class Recurrent(BaseFeaturesExtractor):
    """A recurrent layer, which gets all rows from the linear one before it."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 6)
        self.linear, self.gru = nn.Linear(space.shape[0], 8), nn.GRU(4, 6, batch_first=True)

    def forward(self, x: th.Tensor) -> th.Tensor:
        output: th.Tensor = self.gru(self.linear(x).unflatten(1, (2, 4)))[0]
        return output[:, -1]


class MaskedNet(QNetwork):
    """Uses the observation behind the network, where there are more rows than observations."""

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return super().forward(obs) + obs[:, :1]


class Masked(FlipoutDQNPolicy):
    def make_q_net(self) -> QNetwork:
        return MaskedNet(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)


CASES: dict[str, tuple[Any, str, dict[str, Any], bool]] = {
    "mlp": (vector_env, "FlipoutMlpPolicy", {}, True),
    "heads": (vector_env, "FlipoutMlpPolicy", dict(perturb="heads"), True),
    "independent": (vector_env, "FlipoutMlpPolicy", dict(noise_sharing="independent"), True),
    "integers": (lambda *_: DeepSea(4, integer_observations=True), "FlipoutMlpPolicy", {}, True),
    "look-up": (
        lambda *_: DeepSea(4, integer_observations=True),
        "FlipoutMlpPolicy",
        dict(features_extractor_class=OneHotExtractor),
        True,
    ),
    "image": ("image", "FlipoutCnnPolicy", {}, True),
    "image, linear layers": ("image", "FlipoutCnnPolicy", dict(layers="linear"), True),
    "branches": (vector_env, "FlipoutMlpPolicy", dict(features_extractor_class=Branches), True),
    "recurrent": (vector_env, "FlipoutMlpPolicy", dict(features_extractor_class=Recurrent), True),
    "a plain branch": (
        vector_env,
        "FlipoutMlpPolicy",
        dict(features_extractor_class=Branches, skip=["*.features_extractor.a"]),
        False,
    ),
    "dropout": (vector_env, "FlipoutMlpPolicy", dict(features_extractor_class=WithDropout), False),
    "observations behind the network": (vector_env, Masked, {}, False),
}


class Image(gym.Env[np.ndarray, np.int64]):
    observation_space = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), float(action), bool(self.np_random.random() < 0.2), False, {}


def without_kinks(net: nn.Module) -> None:
    """At a ReLU's kink, rounding decides on which side a unit is: one batch of images in a thousand has one, and fails."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())


@pytest.mark.filterwarnings("ignore:DQN explores by weight noise and by epsilon-greedy")
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_all_rows(case: str) -> None:
    env, policy, noise, once = CASES[case]
    env = Image() if env == "image" else env("discrete", 1) if env is vector_env else env()
    model = build(env, policy, **noise)
    assert model.policy.learning.inputs_once is once
    without_kinks(model.policy)
    space = model.observation_space
    obs = np.stack([space.sample() for _ in range(4)])
    model.policy.set_training_mode(True)
    found = []
    repeated = model.policy.obs_to_tensor(np.repeat(obs, K, axis=0))[0]
    order = th.arange(4 * K).view(K, 4).T.flatten()
    in_batch, once_each = (RowNoise(th.arange(4 * K) % K, 0.7) for _ in range(2))
    once_each.rows_per_input = K
    by_key = RowsByKey(th.arange(K), 0.7, order)
    for rows in (in_batch, once_each, by_key) if once else (in_batch, in_batch):
        th.manual_seed(0)
        with sb3_flipout.perturbed(model.policy, rows):
            values = model.q_net(repeated)
        assert values.shape == (4 * K, model.action_space.n)
        weights = [p for p in model.q_net.parameters() if p.requires_grad]
        gradients = th.autograd.grad(values.square().sum(), weights, allow_unused=True)
        found.append([values.detach(), *(g for g in gradients if g is not None)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            th.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:DQN explores by weight noise and by epsilon-greedy")
@pytest.mark.parametrize("times", [M, K])
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_all_rows(case: str, times: int) -> None:
    env, policy, noise, once = CASES[case]
    trained = []
    for given in (True, False):
        made = Image() if env == "image" else env("discrete", 1) if env is vector_env else env()
        model = build(made, policy, times, **noise)
        model.policy.learning.inputs_once = given and once
        without_kinks(model.policy)
        for space in (made.observation_space, made.action_space):
            space.seed(1)
        trained.append(model.learn(60).policy.state_dict())
    for name, value in trained[0].items():
        th.testing.assert_close(value, trained[1][name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.filterwarnings("ignore:DQN explores by weight noise and by epsilon-greedy")
@pytest.mark.parametrize("times", [M, K])
def test_bootstrap_samples_are_those_of_all_rows(times: int) -> None:
    """Each row's member learns from its own sample, in whatever order the network has the rows."""
    trained = []
    for given in (True, False):
        model = build(vector_env("discrete", 1), "FlipoutMlpPolicy", times, bootstrap=0.5)
        model.policy.learning.inputs_once = given
        without_kinks(model.policy)
        trained.append(model.learn(60).policy.state_dict())
    for name, value in trained[0].items():
        th.testing.assert_close(value, trained[1][name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("times", [1, 2, M])
def test_the_mean_product_of_the_first_layer_is_computed_once(times: int) -> None:
    """Counted by the rows that the product with the mean weights gets."""
    net = sb3_flipout.perturb(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)))
    rows, sizes = RowNoise(th.arange(6)), []
    rows.rows_per_input = times
    plain = net[0]._op

    def counted(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
        sizes.append((len(x), weight is net[0].weight))
        return plain(x, weight, bias)

    net[0]._op = counted
    with sb3_flipout.perturbed(net, rows):
        net(th.randn(6 // times, 4))
    assert sorted(sizes) == sorted([(6 // times, True), (6, False)])


@pytest.mark.parametrize(("units", "paid"), [(4, True), (5, False)])
def test_weights_of_keys_are_made_where_they_are_no_more_than_the_inputs(units: int, paid: bool) -> None:
    """Four inputs under three keys: three matrices of 6 by `units` against twelve rows of 6."""
    net = sb3_flipout.perturb(nn.Sequential(nn.Linear(6, units)))
    rows, x, sizes = RowsByKey(th.tensor([5, 3, 8]), 0.6, th.arange(12)), th.randn(4, 6), []
    plain = net[0]._op_per_key
    net[0]._op_per_key = lambda x, weight, bias: (sizes.append(weight.shape), plain(x, weight, bias))[1]
    with sb3_flipout.perturbed(net, rows):
        found = net(x), net(x.repeat(3, 1))
    assert sizes == ([(3, units, 6)] * 2 if paid else [])
    weights, biases = net[0].row_weights(th.tensor([5, 3, 8]), th.full((3,), 0.6))
    for values in found:
        th.testing.assert_close(values.view(3, 4, units), x @ weights.transpose(1, 2) + biases[:, None])


def test_a_wrong_number_of_inputs_is_refused() -> None:
    net = sb3_flipout.perturb(nn.Sequential(nn.Linear(4, 6)))
    rows = RowNoise(th.arange(6))
    rows.rows_per_input = 3
    with sb3_flipout.perturbed(net, rows), pytest.raises(ValueError, match="keys for 6 rows"):
        net(th.randn(3, 4))


@pytest.mark.filterwarnings("ignore:DQN explores by weight noise and by epsilon-greedy")
@pytest.mark.filterwarnings("ignore:.*the network is asked, with gradients, about")
@pytest.mark.parametrize("given", ["others", "another number", "augmented", "augmented in place", "joined"])
def test_observations_that_are_no_copies_are_all_seen(given: str) -> None:
    """Only what the replay buffer has repeated is given once: a `train` of the user's may ask about anything."""

    class Own(DQN):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            samples, learning = self.replay_buffer.sample(batch_size), self.policy.learning
            obs = samples.observations
            if given == "augmented in place":
                obs += th.randn_like(obs)
            asked = {
                "others": th.randn(8 * M, obs.shape[1]),
                "another number": th.randn(10, obs.shape[1]),
                "augmented": obs + th.randn_like(obs),
                "joined": th.cat([obs, samples.next_observations]),
            }.get(given, obs)
            found = self.q_net(asked)
            learning.inputs_once = False
            compared.append(th.allclose(found, self.q_net(asked), rtol=1e-4, atol=1e-5))
            learning.inputs_once = True

    compared: list[bool] = []
    noise = dict(members=K, keys_per_transition=M, net_arch=[8])
    env = vector_env("discrete", 1)
    greedy = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    Own("FlipoutMlpPolicy", env, policy_kwargs=noise, batch_size=6 * M, learning_starts=8, **greedy, device="cpu").learn(20)
    assert len(compared) > 1 and all(compared)


def test_batch_normalisation_of_a_single_observation_is_not_asked_for() -> None:
    class Normalised(BaseFeaturesExtractor):
        def __init__(self, space: spaces.Box) -> None:
            super().__init__(space, space.shape[0])
            self.norm = nn.BatchNorm1d(space.shape[0])

        def forward(self, x: th.Tensor) -> th.Tensor:
            return self.norm(x)

    model = build(vector_env("discrete", 1), features_extractor_class=Normalised)
    assert model.policy.learning.inputs_once is False


def test_rows_by_key_are_rows_like_others_when_they_are_taken_apart() -> None:
    net = sb3_flipout.perturb(nn.Sequential(nn.Linear(4, 3)))
    rows, x = RowsByKey(th.tensor([5, 3, 8]), 0.6, th.arange(12)), th.randn(4, 4)
    with sb3_flipout.perturbed(net, rows):
        whole = net(x)
    for index in (slice(0, 6), th.tensor([11, 2, 2]), th.arange(12) % 2 == 0):
        with sb3_flipout.perturbed(net, rows[index]):
            th.testing.assert_close(net(x.repeat(3, 1)[index]), whole[index])


@pytest.mark.parametrize(("keys", "rows"), [(3, 10), (0, 3), (3, 0)])
def test_rows_by_key_that_do_not_fit_are_refused(keys: int, rows: int) -> None:
    with pytest.raises(ValueError, match=f"order must have a multiple of {keys} rows, got {rows}"):
        RowsByKey(th.arange(keys), 1.0, th.arange(rows))
