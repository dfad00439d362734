"""Networks of other models, shared ones, compiled ones, and what else stock SB3 runs that users put beside a policy."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import vector_env
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.td3.policies import Actor as TD3Actor
from torch import nn

import sb3_flipout
from sb3_flipout.callbacks import StopOnNonFinite
from sb3_flipout.layers import FlipoutLayer
from sb3_flipout.policies import FlipoutDQNPolicy, FlipoutSACPolicy, FlipoutTD3Policy
from sb3_flipout.policies.observations import drawn

K = 4
NOISE = dict(net_arch=[8], members=K, prior_scale=1.0)


def build(algorithm: Any = DQN, policy: Any = "FlipoutMlpPolicy", noise: Any = NOISE, env: Any = None, **kwargs: Any) -> Any:
    settings: dict[str, Any] = dict(learning_starts=8, batch_size=8, buffer_size=100, train_freq=4, seed=0, device="cpu")
    if issubclass(algorithm, DQN):
        settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    env = vector_env("discrete" if issubclass(algorithm, DQN) else "box", 1) if env is None else env
    return algorithm(policy, env, policy_kwargs=dict(noise), **{**settings, **kwargs})


# ---- networks of other models ------------------------------------------------------------------------------------------


class Distils(DQN):
    """Asks a teacher about each batch."""

    teacher: Any = None
    seen: Any = None

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.seen = self.replay_buffer.sample(batch_size).observations  # type: ignore[union-attr]
        with th.no_grad():
            self.said = self.teacher(self.seen)
        super().train(gradient_steps, batch_size)


def experts(tmp_path: Path, noise: Any) -> dict[str, Any]:
    """Models whose networks are handed to a student, who in the last three cases is like them."""
    expert = build(noise=noise, seed=1).learn(24)
    expert.save(tmp_path / "expert")
    return {
        "another": expert,
        "loaded": DQN.load(tmp_path / "expert", vector_env("discrete", 1)),
        "copied": copy.deepcopy(expert),
    }


@pytest.mark.parametrize("noise", [NOISE, dict(net_arch=[8], schedule="constant")], ids=["members", "plain"])
@pytest.mark.parametrize("which", ["another", "loaded", "copied"])
def test_a_teacher_stays_what_it_is(which: str, noise: Any, tmp_path: Path) -> None:
    expert = experts(tmp_path, noise)[which]
    if which == "another":
        student = build(Distils, noise=noise)
    else:
        student = Distils.load(tmp_path / "expert", vector_env("discrete", 1))
    student.teacher = expert.q_net
    probe = th.rand(5, *expert.observation_space.shape)
    with sb3_flipout.perturbed(expert.policy, None):
        before = expert.q_net(probe)
    members = expert.policy.member_values(probe) if "members" in noise else None
    student.learn(32)
    with sb3_flipout.perturbed(expert.policy, None):
        th.testing.assert_close(expert.q_net(probe), before)
        th.testing.assert_close(student.said, expert.q_net(student.seen))
    assert expert.q_net.learning is expert.policy.learning
    if members is not None:
        th.testing.assert_close(expert.policy.member_values(probe), members)
        assert expert.q_net.prior[0] is expert.policy.prior
    expert.learn(8, reset_num_timesteps=False)  # and it learns on


class Follows(DQN):
    """Holds a further target, copied from the network that learns, as is usual."""

    out: Any = None

    def _setup_model(self) -> None:
        super()._setup_model()
        self.further = copy.deepcopy(self.q_net)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.further.load_state_dict(self.q_net.state_dict())
        self.q_net_target.load_state_dict(self.q_net.state_dict())
        obs = self.replay_buffer.sample(batch_size).next_observations  # type: ignore[union-attr]
        with th.no_grad():
            self.out = self.further(obs), self.q_net_target(obs), self.q_net(obs)
        super().train(gradient_steps, batch_size)


@pytest.mark.parametrize("target_noise", ["independent", "same", "mean"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_further_target_has_the_noise_of_targets(target_noise: str, loaded: bool, tmp_path: Path) -> None:
    model = build(Follows, noise=dict(net_arch=[8], schedule="constant", target_noise=target_noise)).learn(12)
    if loaded:  # what it holds comes out of the file as a copy
        model.save(tmp_path / "model")
        model = Follows.load(tmp_path / "model", vector_env("discrete", 1))
        model.learn(12, reset_num_timesteps=False)
    further, target, online = model.out
    th.testing.assert_close(further, target)
    assert th.allclose(further, online) == (target_noise == "same")


class FollowsLater(Follows):
    """Holds a copy that was made once, and comes out of a file with the rest."""

    def _setup_model(self) -> None:
        super(Follows, self)._setup_model()


@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_that_was_saved_with_the_algorithm_is_known_again(trained: bool, tmp_path: Path) -> None:
    model = build(FollowsLater, noise=dict(net_arch=[8], schedule="constant"))
    model.further = copy.deepcopy(model.q_net)
    if trained:
        model.learn(12)
    model.save(tmp_path / "model")
    loaded = FollowsLater.load(tmp_path / "model", vector_env("discrete", 1)).learn(12)
    further, target, online = loaded.out
    th.testing.assert_close(further, target)
    assert not th.allclose(further, online)


@pytest.mark.parametrize("alone", [False, True])
def test_a_teacher_that_was_saved_or_copied_stays_what_it_is(alone: bool, tmp_path: Path) -> None:
    expert, student = build(seed=1).learn(24), build(Distils)
    student.teacher = copy.deepcopy(expert.q_net) if alone else expert.q_net
    if not alone:
        student.save(tmp_path / "student")
        student = Distils.load(tmp_path / "student", vector_env("discrete", 1))
    student.learn(32, reset_num_timesteps=False)
    with sb3_flipout.perturbed(expert.policy, None):
        th.testing.assert_close(student.said, expert.q_net(student.seen))
    assert student.teacher.learning is not student.policy.learning


def test_a_copy_that_is_asked_with_gradients_has_the_noise_of_the_network_it_is_of() -> None:
    class Asks(Follows):
        def train(self, gradient_steps: int, batch_size: int = 100) -> None:
            self.further.load_state_dict(self.q_net.state_dict())
            obs = self.replay_buffer.sample(batch_size).observations  # type: ignore[union-attr]
            self.out = self.further(obs), self.q_net(obs)
            self.policy.optimizer.step()

    model = build(Asks, noise=dict(net_arch=[8], schedule="constant", target_noise="mean")).learn(12)
    th.testing.assert_close(*model.out)


def test_other_models_networks_may_have_the_names_of_ours() -> None:
    other = build(SAC, noise=dict(net_arch=[8]))
    model = build()
    model.actor, model.critic = other.actor, other.critic
    model.learn(16)
    assert other.actor.learning is other.policy.learning


# ---- spaces ------------------------------------------------------------------------------------------------------------

F32, F64 = np.finfo(np.float32).max, np.finfo(np.float64).max


class Wide(gym.Env[Any, Any]):
    """Has observations of ordinary size in a space of any bounds."""

    action_space = spaces.Discrete(2)

    def __init__(self, space: spaces.Box, action_space: Any = None) -> None:
        self.observation_space = space
        self.action_space = action_space or self.action_space

    def _observed(self) -> Any:
        return self.np_random.normal(size=3).astype(self.observation_space.dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._observed(), {}

    def step(self, action: Any) -> Any:
        return self._observed(), 1.0, bool(self.np_random.random() < 0.1), False, {}


class Folds(BaseFeaturesExtractor):
    """Folds rows and features, so that its rows have to be found."""

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 6)
        self.each, self.norm = nn.Linear(1, 2), nn.LayerNorm(2)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        return self.norm(th.relu(self.each(obs.float().reshape(-1, 1)))).view(len(obs), -1)


WIDE = {
    "float32": spaces.Box(-F32, F32, (3,), np.float32),
    "float64": spaces.Box(-F64, F64, (3,), np.float64),
    "half": spaces.Box(-1.0, F32, (3,), np.float32),
    "large": spaces.Box(-1e20, 1e20, (3,), np.float32),
}


@pytest.mark.parametrize("extractor", [None, Folds])
@pytest.mark.parametrize("space", WIDE.values(), ids=WIDE)
def test_bounds_of_the_largest_number_are_none(space: spaces.Box, extractor: Any) -> None:
    own = {} if extractor is None else dict(features_extractor_class=extractor)
    model = build(noise={**NOISE, "keys_per_transition": 2, **own}, env=Wide(space)).learn(16)
    assert model.policy.learning.inputs_once == (extractor is None or model.policy.learning.inputs_once)
    model.policy.to_plain_policy()
    rollout = PPO("FlipoutMlpPolicy", Wide(space), n_steps=8, batch_size=8, policy_kwargs=own, device="cpu").learn(8)
    rollout.policy.to_plain_policy()
    if extractor is Folds:
        for policy in (model.policy, rollout.policy):
            layer = next(module for module in policy.modules() if isinstance(module, Folds)).each
            assert isinstance(layer, FlipoutLayer) and layer.row_layout is not None, "rows are folded, not first"
    actions = spaces.Box(-1.0, 1.0, (1,), np.float32)
    build(SAC, noise=dict(net_arch=[8]), env=Wide(space, actions)).policy.to_plain_policy()


@pytest.mark.parametrize("space", [*WIDE.values(), spaces.Box(-2.0, 3.0, (3,), np.float32)], ids=[*WIDE, "small"])
def test_drawn_observations_are_of_ordinary_size_and_move_nothing(space: spaces.Box) -> None:
    space.seed(5)
    known = copy.deepcopy(space)
    found = np.stack([one for one, _ in zip(drawn(spaces.Dict(a=space)), range(200), strict=False) for one in [one["a"]]])
    assert np.all(np.abs(found) < 100) and found.dtype == space.dtype and np.ptp(found) > 1
    assert np.all(found >= np.where(space.low < -1e6, -np.inf, space.low))
    assert space.np_random.bit_generator.state == known.np_random.bit_generator.state


# ---- compiled, shared and doubled networks --------------------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, 8)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return th.relu(self.inner(x))


class CompiledBody(BaseFeaturesExtractor):
    compiles = True

    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, 8)
        body = Body(space.shape[0])
        self.body = th.compile(body, backend="eager") if self.compiles else body

    def forward(self, x: th.Tensor) -> th.Tensor:
        found: th.Tensor = self.body(x)
        return found


class PlainBody(CompiledBody):
    compiles = False


@pytest.mark.parametrize("algorithm", [PPO, DQN])
def test_an_extractor_may_hold_a_compiled_module(algorithm: Any) -> None:
    def trained(extractor: Any) -> list[th.Tensor]:
        noise = dict(net_arch=[8], features_extractor_class=extractor)
        if algorithm is DQN:
            model = build(noise={**NOISE, **noise})
        else:
            env = vector_env("discrete", 1)
            model = PPO("FlipoutMlpPolicy", env, n_steps=8, batch_size=8, policy_kwargs=noise, seed=0, device="cpu")
        model.learn(16)
        assert any(isinstance(module, FlipoutLayer) and "body" in name for name, module in model.policy.named_modules())
        return list(model.policy.parameters())

    for own, plain in zip(trained(CompiledBody), trained(PlainBody), strict=True):
        th.testing.assert_close(own, plain, rtol=0.0, atol=0.0)


class CompiledNet(FlipoutDQNPolicy):
    def make_q_net(self) -> Any:
        return th.compile(super().make_q_net(), backend="eager")


@pytest.mark.parametrize("noise", [dict(net_arch=[8]), NOISE, {**NOISE, "keys_per_transition": K}])
def test_a_q_network_may_be_made_compiled(noise: Any) -> None:
    compiled, plain = (build(policy=policy, noise=noise).learn(24) for policy in (CompiledNet, "FlipoutMlpPolicy"))
    for own, other in zip(compiled.policy.parameters(), plain.policy.parameters(), strict=True):
        th.testing.assert_close(own, other)


class Shares(FlipoutDQNPolicy):
    """Gives all its networks one encoder."""

    encoder: Any = None

    def make_features_extractor(self) -> Any:
        return type(self).encoder


def sharing(frozen: bool) -> Any:
    encoder = PlainBody(vector_env("discrete", 1).observation_space)  # type: ignore[arg-type]
    encoder.requires_grad_(not frozen)
    return type("Shares", (Shares,), dict(encoder=encoder))


@pytest.mark.parametrize("prior_scale", [0.0, 1.0])
def test_a_frozen_encoder_may_be_shared(prior_scale: float) -> None:
    policy = sharing(frozen=True)
    before = copy.deepcopy(policy.encoder.state_dict())
    noise = dict(members=K, prior_scale=prior_scale, features_extractor_class=PlainBody, skip=["*features_extractor*"])
    model = build(policy=policy, noise=noise).learn(24)
    assert model.q_net.features_extractor is policy.encoder and type(policy.encoder.body.inner) is nn.Linear
    for name, value in policy.encoder.state_dict().items():
        th.testing.assert_close(value, before[name], rtol=0.0, atol=0.0)


def test_a_shared_encoder_that_learns_is_refused() -> None:
    noise = dict(features_extractor_class=PlainBody)
    with pytest.raises(
        ValueError, match=r"q_net and q_net_target share the layers .*body\.inner.*Give each network layers.*skip=\['q_net\."
    ):
        build(policy=sharing(frozen=False), noise=noise)
    build(policy=sharing(frozen=False), noise=dict(noise, skip=["*features_extractor*"])).learn(16)


class ToDouble(BaseFeaturesExtractor):
    def __init__(self, space: spaces.Box) -> None:
        super().__init__(space, space.shape[0])

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x.double()


class DoubledLate(FlipoutDQNPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.q_net.double()
        self.q_net_target.double()
        self.optimizer = th.optim.Adam(self.q_net.parameters(), lr=lr_schedule(1))


def test_priors_have_the_type_of_the_networks() -> None:
    model = build(policy=DoubledLate, noise=dict(NOISE, features_extractor_class=ToDouble)).learn(24)
    assert model.policy.prior.unit.dtype == th.float64 and model.policy.prior.unit.isfinite()


# ---- optimizers ------------------------------------------------------------------------------------------------------------


class Around:
    """An object round an optimizer, which is none of torch's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.steps += 1
        self.optimizer.step()

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()


class Lookahead(th.optim.Optimizer):
    """Never calls its parent's constructor, as a widespread one does not."""

    def __init__(self, params: Any, lr: float = 1e-3, **_: Any) -> None:
        self.optimizer = th.optim.Adam(params, lr=lr)
        self.param_groups, self.defaults, self.state = self.optimizer.param_groups, self.optimizer.defaults, {}
        self.steps = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        return self.optimizer.step()


def with_optimizer(kind: str) -> Any:
    if kind == "Lookahead":
        return build(noise={**NOISE, "optimizer_class": Lookahead}, gradient_steps=2)
    model = build(gradient_steps=2)
    model.policy.optimizer = Around(model.policy.optimizer)
    return model


@pytest.mark.parametrize("kind", ["Around", "Lookahead"])
def test_steps_of_optimizers_without_hooks_count(kind: str) -> None:
    model = with_optimizer(kind).learn(32)
    assert model.policy.learning.step == model.policy.optimizer.steps > 4


@pytest.mark.parametrize("kind", ["Around", "Lookahead"])
def test_what_cannot_be_watched_for_nan_is_said(kind: str, tmp_path: Path) -> None:
    model = with_optimizer(kind)
    with pytest.raises(TypeError, match=f"StopOnNonFinite looks at parameters .*policy.optimizer.*{kind} has none"):
        model.learn(32, StopOnNonFinite(tmp_path / "good.zip"))
    assert not list(tmp_path.iterdir())


# ---- networks that take more ------------------------------------------------------------------------------------------------


class Scaled(ContinuousCritic):
    def forward(self, obs: th.Tensor, actions: th.Tensor, scale: float = 1.0) -> Any:
        return tuple(scale * value for value in super().forward(obs, actions))

    def q1_forward(self, obs: th.Tensor, actions: th.Tensor, scale: float = 1.0) -> th.Tensor:
        return scale * super().q1_forward(obs, actions)


class Tempered(SACActor):
    def get_action_dist_params(self, obs: Any, temperature: float = 1.0) -> Any:
        mean, log_std, kwargs = super().get_action_dist_params(obs)
        return temperature * mean, log_std, kwargs


class Turned(TD3Actor):
    def forward(self, obs: Any, sign: float = 1.0) -> th.Tensor:
        return sign * super().forward(obs)


def own_parts(policy: Any, actor: Any) -> Any:
    def make_critic(self: Any, features_extractor: Any = None) -> Any:
        return Scaled(**self._update_features_extractor(self.critic_kwargs, features_extractor)).to(self.device)

    def make_actor(self: Any, features_extractor: Any = None) -> Any:
        return actor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    return type("Own", (policy,), dict(make_critic=make_critic, make_actor=make_actor))


@pytest.mark.parametrize(
    ("algorithm", "policy", "actor"), [(SAC, FlipoutSACPolicy, Tempered), (TD3, FlipoutTD3Policy, Turned)], ids=["sac", "td3"]
)
def test_critics_and_actors_may_take_more(algorithm: Any, policy: Any, actor: Any) -> None:
    model = build(algorithm, own_parts(policy, actor), dict(net_arch=[8], perturb="all")).learn(16)
    obs, actions = th.rand(3, *model.observation_space.shape), th.rand(3, *model.action_space.shape)
    for twice, once in zip(model.critic(obs, actions, scale=2.0), model.critic(obs, actions), strict=True):
        th.testing.assert_close(twice, 2 * once)
    th.testing.assert_close(model.critic.q1_forward(obs, actions, 2.0), 2 * model.critic.q1_forward(obs, actions))
    if algorithm is SAC:
        found, plain = (model.actor.get_action_dist_params(obs, **more)[0] for more in (dict(temperature=2.0), {}))
    else:
        found, plain = model.actor(obs, sign=2.0), model.actor(obs)
    th.testing.assert_close(found, 2 * plain)


# ---- batches ----------------------------------------------------------------------------------------------------------------


class FetchesAhead(DQN):
    """Samples in threads of its own, as one that hides the time of a slow buffer."""

    different: list[int]

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        with ThreadPoolExecutor(2) as pool:
            fetched = [pool.submit(self.replay_buffer.sample, batch_size) for _ in range(gradient_steps)]  # type: ignore[union-attr]
            samples = [one.result() for one in fetched]
        self.different += [len(one.observations[:, 0].unique()) for one in samples]
        for _ in samples:
            self.policy.optimizer.step()


def test_batches_that_threads_fetch_are_repeated_each() -> None:
    class Slow(ReplayBuffer):
        def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> Any:
            found = super()._get_samples(batch_inds, env)
            for _ in range(20):  # lets the other thread in
                th.rand(10).sort()
            return found

    noise = dict(net_arch=[8], members=K, keys_per_transition=K)
    model = build(FetchesAhead, noise=noise, replay_buffer_class=Slow, batch_size=32, gradient_steps=40, train_freq=40)
    model.different = []
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        model.learn(120)
    finally:
        sys.setswitchinterval(interval)
    assert len(model.different) >= 80 and max(model.different) <= 32 // K


class Renamed(NamedTuple):
    observations: Any
    next_observations: Any
    actions: Any
    rewards: Any
    terminated: Any


class Renames(ReplayBuffer):
    def sample(self, batch_size: int, env: Any = None) -> Any:
        found: Any = super().sample(batch_size, env)
        return Renamed(found.observations, found.next_observations, found.actions, found.rewards, found.dones)


class LearnsRenamed(DQN):
    found: Any = None

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.found = self.replay_buffer.sample(batch_size)  # type: ignore[union-attr]
        self.policy.optimizer.step()


def test_parts_of_a_batch_may_have_other_names() -> None:
    noise = dict(net_arch=[8], members=K, keys_per_transition=2)
    found = build(LearnsRenamed, noise=noise, replay_buffer_class=Renames).learn(16).found
    for part in found:
        assert len(part) == 8
        th.testing.assert_close(part[::2], part[1::2])


# ---- actions beside which numbers stand -----------------------------------------------------------------------------------


class Penalised(ReplayBuffer):
    def sample(self, batch_size: int, env: Any = None) -> Any:
        found = super().sample(batch_size, env)
        return found._replace(rewards=found.rewards - 0.1 * found.actions)


class OneHot(ReplayBuffer):
    def sample(self, batch_size: int, env: Any = None) -> Any:
        found = super().sample(batch_size, env)
        nn.functional.one_hot(found.actions, 4)
        return found


class OfTheFirst(ReplayBuffer):
    """Does as the message says."""

    def sample(self, batch_size: int, env: Any = None) -> Any:
        found = super().sample(batch_size, env)
        return found._replace(rewards=found.rewards - 0.1 * found.actions[:, :1])


def test_rewards_that_are_made_of_actions_and_numbers_are_refused() -> None:
    model = build(noise=dict(NOISE, bootstrap=0.5), replay_buffer_class=Penalised)
    with pytest.raises(TypeError, match=r"8 actions and rewards of shape \(8, 2\).*compute with samples.actions\[:, :1\]"):
        model.learn(16)
    build(noise=dict(NOISE, bootstrap=0.5), replay_buffer_class=OfTheFirst).learn(16)


def test_an_error_of_torch_in_a_sample_says_that_there_is_a_second_column() -> None:
    with pytest.raises(RuntimeError, match=r"Class values.*If that is about actions.*second column"):
        build(noise=dict(NOISE, reward_noise=0.1), replay_buffer_class=OneHot).learn(16)
