"""Members under users' own training: batches that carry more, networks that keep, mask or take more, further targets."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from helpers import vector_env
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.dqn.policies import QNetwork
from torch import nn

import sb3_flipout
from sb3_flipout.noise import RowNoise
from sb3_flipout.policies.dqn import FlipoutDQNPolicy
from sb3_flipout.policies.probing import is_seen_by_us_alone
from sb3_flipout.samples import repeat_rows

K, B = 4, 16


class Learner(DQN):
    """Keeps what `look` finds in a batch, and takes no gradient step."""

    found: Any = None

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        self.found = self.look(batch_size)
        self.policy.step_optimizer.step()

    def look(self, size: int) -> Any:
        return self.replay_buffer.sample(size)  # type: ignore[union-attr]


def build(algorithm: Any = Learner, policy: Any = "FlipoutMlpPolicy", times: int = K, noise: Any = None, **kwargs: Any) -> Any:
    settings: dict[str, Any] = dict(learning_starts=20, batch_size=B, buffer_size=50, train_freq=4, seed=0, device="cpu")
    settings |= dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)
    noise = {**dict(net_arch=[8], members=K, keys_per_transition=times), **(noise or {})}
    return algorithm(policy, vector_env("discrete", 1), policy_kwargs=noise, **{**settings, **kwargs})


# ---- batches ----------------------------------------------------------------------------------------------------------


class Prioritised(ReplayBuffer):
    """Gives indices as an array, so that priorities of what was sampled can be set."""

    class Samples(NamedTuple):
        observations: th.Tensor
        actions: th.Tensor
        next_observations: th.Tensor
        dones: th.Tensor
        rewards: th.Tensor
        weights: th.Tensor
        places: np.ndarray
        names: list[str]
        infos: list[dict[str, int]]
        both: tuple[th.Tensor, np.ndarray]
        alpha: np.ndarray

    def sample(self, batch_size: int, env: Any = None) -> Any:
        places = np.random.randint(0, self.size(), batch_size)
        infos = [{"place": int(place)} for place in places]
        more = th.rand(batch_size, 1), places, [str(place) for place in places], infos
        return self.Samples(*self._get_samples(places)[:5], *more, (th.as_tensor(places), places), np.array(0.6))


@pytest.mark.parametrize("times", [2, K])
def test_what_a_batch_tells_of_its_rows_is_repeated_with_them(times: int) -> None:
    model = build(times=times, replay_buffer_class=Prioritised).learn(40)
    found = model.found
    np.testing.assert_array_equal(found.observations.numpy(), model.replay_buffer.observations[found.places, 0])
    assert len(found.places) == B and found.weights.shape == (B, 1) and found.alpha.shape == ()
    assert found.names == [str(place) for place in found.places]
    assert [info["place"] for info in found.infos] == found.places.tolist()
    assert found.both[0].tolist() == found.both[1].tolist() == found.places.tolist()


def test_lists_hold_parts_of_a_batch_or_one_thing_of_each_row() -> None:
    """A dictionary counts by what is in it, and not by how many things these are."""
    infos = [{"a": 1, "b": 2}, {"a": 3, "b": 4}]
    assert repeat_rows(infos, 2, 2) == [infos[0], infos[0], infos[1], infos[1]]
    (part,) = repeat_rows([{"a": th.arange(2)}], 2, 2)
    assert part["a"].tolist() == [0, 0, 1, 1]
    assert [float(number) for number in repeat_rows([th.tensor(1.0), th.tensor(2.0)], 2, 2)] == [1.0, 1.0, 2.0, 2.0]


def test_lists_that_are_of_no_rows_stay() -> None:
    assert repeat_rows([1, 2, 3], 2, 4) == [1, 2, 3]
    assert repeat_rows((1, 2), 2, 2) == (1, 1, 2, 2)
    assert repeat_rows("ab", 2, 2) == "ab"


class Picky(ReplayBuffer):
    """Draws again where it does not like a batch."""

    asked = 0

    def sample(self, batch_size: int, env: Any = None) -> Any:
        self.asked += 1
        return self.sample(batch_size, env) if self.asked % 3 else super().sample(batch_size, env)


@pytest.mark.parametrize("noise", [{}, dict(bootstrap=0.5)])
@pytest.mark.parametrize("times", [1, 2, K])
def test_a_buffer_that_asks_itself_again_repeats_once(times: int, noise: dict[str, Any]) -> None:
    model = build(times=times, noise=noise, replay_buffer_class=Picky).learn(40)
    assert model.replay_buffer.asked and model.replay_buffer.asked % 3 == 0
    obs = model.found.observations
    assert len(obs) == B
    for first in range(0, B, times):
        assert bool((obs[first : first + times] == obs[first]).all())
    assert len(obs.unique(dim=0)) > 0.5 * B / times


class OwnArguments(ReplayBuffer):
    def sample(self, n: int = B, env: Any = None, *, beta: float = 0.4) -> Any:
        return super().sample(n, env)


ASKED: list[Any] = [
    lambda buffer: buffer.sample(),
    lambda buffer: buffer.sample(n=B),
    lambda buffer: buffer.sample(B, None),
    lambda buffer: buffer.sample(np.int64(B), beta=0.1),
    lambda buffer: buffer.sample(n=B, env=None),
]


@pytest.mark.parametrize("noise", [{}, dict(reward_noise=0.5)])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("asked", range(len(ASKED)))
def test_a_batch_can_be_asked_for_in_every_way(asked: int, times: int, noise: dict[str, Any]) -> None:
    class Asks(Learner):
        def look(self, size: int) -> Any:
            return ASKED[asked](self.replay_buffer)

    assert len(build(Asks, times=times, noise=noise, replay_buffer_class=OwnArguments).learn(40).found.observations) == B


@pytest.mark.parametrize("arguments", [{}, dict(batch_size=None)])
def test_a_batch_of_no_size_is_refused(arguments: dict[str, Any]) -> None:
    class Asks(Learner):
        def look(self, size: int) -> Any:
            return self.replay_buffer.sample(**arguments)  # type: ignore[union-attr]

    with pytest.raises(
        TypeError, match=r"keys_per_transition=4 divides the size of the batch.* got [nN]one. Say replay_buffer"
    ):
        build(Asks).learn(40)


class OfAnotherKind(ReplayBuffer):
    given: Any = None

    def sample(self, batch_size: int, env: Any = None) -> Any:
        return self.given(super().sample(batch_size, env))


@pytest.mark.parametrize("given", [lambda samples: (samples, 3), lambda samples: samples._asdict(), lambda samples: [1]])
def test_batches_without_actions_are_refused(given: Any) -> None:
    kind = type("Mine", (OfAnotherKind,), dict(given=staticmethod(given)))
    with pytest.raises(
        TypeError, match=r"a sample of Mine is a (tuple|dict|list) without a tensor `actions`.* leave out boot"
    ):
        build(times=1, noise=dict(bootstrap=0.5), replay_buffer_class=kind).learn(40)


@pytest.mark.parametrize("noise", [{}, dict(bootstrap=0.5)])
@pytest.mark.parametrize("times", [1, K])
def test_no_batch_yet_is_handed_on(times: int, noise: dict[str, Any]) -> None:
    kind = type("Mine", (OfAnotherKind,), dict(given=staticmethod(lambda _: None)))
    assert build(times=times, noise=noise, replay_buffer_class=kind).learn(40).found is None


# ---- networks ---------------------------------------------------------------------------------------------------------


class KeepsLatent(QNetwork):
    def forward(self, obs: th.Tensor) -> th.Tensor:
        self.latent = self.q_net[:2](self.extract_features(obs, self.features_extractor))
        return self.q_net[2:](self.latent)


class Tempered(QNetwork):
    def forward(self, obs: th.Tensor, temperature: Any = 1.0) -> th.Tensor:
        return super().forward(obs) / temperature


class Masked(QNetwork):
    """Bars the last action where the mean of an observation is below 0."""

    below = -1e8

    def forward(self, obs: th.Tensor) -> th.Tensor:
        values = super().forward(obs)
        barred = th.zeros_like(values, dtype=th.bool)
        barred[:, -1] = obs.mean(1) < 0
        return values.masked_fill(barred, self.below)


class MaskedByInfinity(Masked):
    below = -th.inf


def of(net: type[QNetwork]) -> type[FlipoutDQNPolicy]:
    class Policy(FlipoutDQNPolicy):
        def make_q_net(self) -> QNetwork:
            return net(**self._update_features_extractor(self.net_args, features_extractor=None)).to(self.device)

    return Policy


def members_of(model: Any) -> th.Tensor:
    batch = model.policy.learning.batches.of(model.found.observations)
    return model.policy.learning.rows(0, B, th.device("cpu"), batch).keys


class SeesInside(Learner):
    """Looks at what a network keeps of a forward pass, or a hook sees."""

    def look(self, size: int) -> Any:
        self.found = samples = self.replay_buffer.sample(size)  # type: ignore[union-attr]
        self.seen: Any = None
        handle = self.q_net.q_net[1].register_forward_hook(lambda *args: setattr(self, "seen", args[2]))
        if self.kept:
            handle.remove()
        self.q_net(samples.observations)
        handle.remove()
        self.seen = self.q_net.latent if self.kept else self.seen
        self.keys = members_of(self)
        return samples

    kept = False


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("times", [1, 2, K])
def test_rows_inside_the_network_are_in_the_order_of_the_batch(times: int, kept: bool) -> None:
    algorithm = type("Sees", (SeesInside,), dict(kept=kept))
    model = build(algorithm, of(KeepsLatent) if kept else "FlipoutMlpPolicy", times).learn(24)
    with sb3_flipout.perturbed(model.policy, RowNoise(model.keys)):
        slow = model.q_net.q_net[:2](model.found.observations)
    th.testing.assert_close(model.seen, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_rows_are_sorted_where_no_hook_sees_it(kind: str) -> None:
    net = build().q_net
    handle = getattr(net.q_net[1], f"register_{kind}_hook")(lambda *_: None)
    assert not is_seen_by_us_alone(net)
    handle.remove()
    assert is_seen_by_us_alone(net)


def test_rows_are_not_sorted_where_a_forward_is_put_on_a_layer() -> None:
    net = build().q_net
    net.q_net[1].forward = net.q_net[1].forward  # as one that records what it gets
    assert not is_seen_by_us_alone(net)
    del net.q_net[1].forward
    assert is_seen_by_us_alone(net)


@pytest.mark.parametrize("times", [1, 2, K])
def test_gradients_by_observations_are_those_of_each_row(times: int) -> None:
    class Differentiates(Learner):
        def look(self, size: int) -> Any:
            self.found = samples = self.replay_buffer.sample(size)  # type: ignore[union-attr]
            samples.observations.requires_grad_()
            (self.gradient,) = th.autograd.grad(self.q_net(samples.observations)[:, 0].sum(), samples.observations)
            self.keys = members_of(self)
            return samples

    model = build(Differentiates, times=times, noise=dict(prior_scale=3.0)).learn(24)
    obs, step, alike = model.found.observations.detach(), 0.01, []
    with sb3_flipout.perturbed(model.policy, RowNoise(model.keys)), th.no_grad():
        for place in range(obs.shape[1]):
            moved = [obs + sign * step * nn.functional.one_hot(th.tensor(place), obs.shape[1]) for sign in (1, -1)]
            slow = (model.q_net(moved[0]) - model.q_net(moved[1]))[:, 0] / (2 * step)
            alike.append((model.gradient[:, place] - slow).abs() < 1e-3 + 1e-3 * slow.abs())
    assert th.stack(alike).float().mean() > 0.8  # some steps cross the kink of a ReLU


@pytest.mark.parametrize("temperature", [2.0, th.linspace(1, 2, B)[:, None]], ids=["one", "of each row"])
@pytest.mark.parametrize("times", [1, 2, K])
def test_networks_that_take_more_than_observations_get_it(times: int, temperature: Any) -> None:
    class Asks(Learner):
        def look(self, size: int) -> Any:
            self.found = samples = self.replay_buffer.sample(size)  # type: ignore[union-attr]
            self.values = self.q_net(samples.observations, temperature=temperature), self.q_net(samples.observations)
            return samples

    model = build(Asks, of(Tempered), times, dict(prior_scale=1.0)).learn(40)
    th.testing.assert_close(model.values[0], model.values[1] / temperature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", [Masked, MaskedByInfinity])
@pytest.mark.parametrize("times", [1, K])
def test_masked_actions_are_no_part_of_the_unit_of_priors(times: int, net: type[QNetwork]) -> None:
    """Else a prior would be divided by the number that stands for a mask."""
    units = [build(DQN, of(kind), times, dict(prior_scale=1.0)).learn(24).policy.prior.unit for kind in (QNetwork, net)]
    assert units[1] == pytest.approx(float(units[0]), rel=0.5)
    masked = build(DQN, of(net), times, dict(prior_scale=1.0)).learn(24)
    below = th.full((B, 5), -1.0)
    values = masked.policy.member_values(below)
    assert bool((values[..., -1] < -1e7).all()) and float(values[..., :-1].std(0).min()) > 0.1
    masked.policy.noise_scale = 0.0
    assert not bool(masked.policy.member_values(below).isnan().any())


# ---- further targets --------------------------------------------------------------------------------------------------


class Averaged(Learner):
    """Has further targets, copied from the first one before anything is known, in various places."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.older = copy.deepcopy(self.q_net_target)
        self.oldest = {"list": [copy.deepcopy(self.q_net_target)], "module": nn.ModuleList([copy.deepcopy(self.q_net_target)])}

    def look(self, size: int) -> Any:
        samples: Any = self.replay_buffer.sample(size)  # type: ignore[union-attr]
        copies: list[Any] = [self.older, *self.oldest["list"], *self.oldest["module"]]
        with th.no_grad():
            first = self.q_net_target(samples.next_observations)
            # Not at first, so that they would measure the unit of a prior of their own by another batch.
            self.values = [first] if self.found is None else [first, *(net(samples.next_observations) for net in copies)]
        return samples


@pytest.mark.parametrize(
    ("times", "noise"),
    [(1, {}), (K, {}), (1, dict(prior_scale=0.5)), (K, dict(prior_scale=0.5)), (1, dict(members=None, schedule="constant"))],
)
def test_further_targets_say_what_the_first_one_says(times: int, noise: dict[str, Any]) -> None:
    model = build(Averaged, times=times, noise=noise).learn(40)
    first, *others = model.values
    assert len(others) == 3
    for values in others:
        th.testing.assert_close(values, first, rtol=1e-4, atol=1e-5)
    with th.no_grad():
        means = model.q_net_target(model.found.next_observations)
    assert not th.allclose(means, first)


@pytest.mark.parametrize(("more", "depth", "found"), [(99, 3, True), (100, 3, False), (0, 4, False)])
def test_copies_are_not_looked_for_in_long_records_nor_far_down(more: int, depth: int, found: bool) -> None:
    model = build(DQN)
    copied = copy.deepcopy(model.q_net)
    model.kept = [copied, *range(more)]
    for _ in range(depth - 1):
        model.kept = (model.kept,)
    model.learn(24)
    assert (copied.learning is model.policy.learning) is found


def test_a_copied_policy_is_another_policy() -> None:
    model = build(DQN)
    model.other = copy.deepcopy(model.policy)
    learning = model.other.learning
    model.learn(40)
    assert model.other.q_net.learning is model.other.q_net_target.learning is learning is not model.policy.learning


def test_further_critics_follow_theirs() -> None:
    class Ensemble(SAC):
        def train(self, gradient_steps: int, batch_size: int = 64) -> None:
            self.known = [net.learning is self.policy.learning for net in (self.third, self.other)]
            super().train(gradient_steps, batch_size)

    settings: dict[str, Any] = dict(learning_starts=8, batch_size=8, device="cpu", policy_kwargs=dict(perturb="all"))
    model = Ensemble("FlipoutMlpPolicy", vector_env("box", 1), **settings)
    model.third, model.other = copy.deepcopy(model.critic), copy.deepcopy(model.actor)
    model.learn(20)
    assert model.known == [True, True]
