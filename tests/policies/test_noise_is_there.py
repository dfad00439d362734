"""Features extractors of every kind of layer: the noise is there in collection and in the update, and it is the same."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from helpers import RandomEnv, ReplayProbe
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, spectral_norm

from sb3_flipout import perturbed
from sb3_flipout.layers import flipout_layers

RATIO_TOLERANCE = 1e-5
ENTITIES, SIZE, FEATURES = 5, 6, 8
# As many environments as an observation has entities, so that a layer which went by sizes would be wrong.
N_ENVS, N_STEPS = 5, 8


class Extractor(BaseFeaturesExtractor):
    """Takes observations of shape (N, 5, 6)."""

    def __init__(self, observation_space):
        super().__init__(observation_space, FEATURES)
        self.build()


class Transformer(Extractor):
    def build(self):
        layer = nn.TransformerEncoderLayer(SIZE, 2, 12, dropout=0.0, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(SIZE, FEATURES)

    def forward(self, x):
        return self.out(self.encoder(x).mean(1))


class Attention(Extractor):
    def build(self):
        self.attention = nn.MultiheadAttention(SIZE, 2, batch_first=True)
        self.out = nn.Linear(SIZE, FEATURES)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0].mean(1))


class TimeFirstAttention(Attention):
    def build(self):
        self.attention = nn.MultiheadAttention(SIZE, 2)
        self.out = nn.Linear(SIZE, FEATURES)

    def forward(self, x):
        x = x.transpose(0, 1)
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(0))


class Gru(Extractor):
    def build(self):
        self.gru = nn.GRU(SIZE, FEATURES, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0][:, -1]


class TimeFirstGru(Extractor):
    def build(self):
        self.gru = nn.GRU(SIZE, FEATURES)

    def forward(self, x):
        return self.gru(x.transpose(0, 1))[1][0]


class Conv1d(Extractor):
    def build(self):
        self.conv, self.out = nn.Conv1d(ENTITIES, 4, 3), nn.Linear(16, FEATURES)

    def forward(self, x):
        return self.out(self.conv(x).relu().flatten(1))


class Conv3d(Extractor):
    def build(self):
        self.conv, self.out = nn.Conv3d(1, 2, (3, 2, 1)), nn.Linear(30, FEATURES)

    def forward(self, x):
        return self.out(self.conv(x[:, None, :, :, None]).tanh().flatten(1))


class Embedding(Extractor):
    def build(self):
        self.table = nn.Embedding(9, FEATURES)

    def forward(self, x):
        return self.table((4 * (x + 1)).long().flatten(1)).mean(1)


class Entities(Extractor):
    """Folds its entities into the batch: those of the first row, then those of the second."""

    def build(self):
        self.each, self.out = nn.Sequential(nn.Linear(SIZE, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, FEATURES)

    def forward(self, x):
        return self.out(self.each(x.reshape(-1, SIZE)).view(-1, ENTITIES, 4).sum(1))


class EntitiesFirst(Entities):
    """Folds them the other way: the first entity of every row, then the second of every row."""

    def forward(self, x):
        return self.out(self.each(x.transpose(0, 1).reshape(-1, SIZE)).view(ENTITIES, -1, 4).sum(0))


class TimeFirst(Entities):
    """Leaves rows in the second dimension."""

    def forward(self, x):
        return self.out(self.each(x.transpose(0, 1)).sum(0))


class Frames(Extractor):
    """A convolution that sees frames in place of rows."""

    def build(self):
        self.conv, self.out = nn.Conv2d(1, 2, 2), nn.Linear(2 * 2 * ENTITIES, FEATURES)

    def forward(self, x):
        frames = self.conv(x.reshape(-1, 1, 2, 3)).tanh()
        return self.out(frames.reshape(-1, 2 * 2 * ENTITIES))


class WeightNorm(Extractor):
    def build(self):
        self.net = nn.Sequential(
            nn.Flatten(), parametrizations.weight_norm(nn.Linear(30, 8)), nn.Tanh(), nn.Linear(8, FEATURES)
        )

    def forward(self, x):
        return self.net(x)


class Frozen(WeightNorm):
    def build(self):
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, FEATURES)).requires_grad_(False)


class SpectralNorm(WeightNorm):
    def build(self):
        self.net = nn.Sequential(
            nn.Flatten(), parametrizations.spectral_norm(nn.Linear(30, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, FEATURES))
        )


class Lazy(WeightNorm):
    def build(self):
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(FEATURES))


PERTURBED = {
    Transformer: 9,  # in each block: projections in and out, and the two linear layers; and the last one
    Attention: 3,
    TimeFirstAttention: 3,
    Gru: 1,
    TimeFirstGru: 1,
    Conv1d: 2,
    Conv3d: 2,
    Embedding: 1,
    Entities: 3,
    EntitiesFirst: 3,
    TimeFirst: 3,
    Frames: 2,
    WeightNorm: 2,
}
every_extractor = pytest.mark.parametrize("extractor", PERTURBED, ids=lambda extractor: extractor.__name__)


def make_model(extractor, n_steps=N_STEPS, **noise):
    space = spaces.Box(-1, 1, (ENTITIES, SIZE), np.float32)
    env = make_vec_env(lambda: RandomEnv(spaces.Discrete(4), space), n_envs=N_ENVS, seed=0)
    kwargs = dict(features_extractor_class=extractor, schedule="constant", **noise)
    # The whole rollout in one mini-batch: what is logged of its only one stands before any step of the optimizer.
    return PPO("FlipoutMlpPolicy", env, n_steps=n_steps, batch_size=n_steps * N_ENVS, n_epochs=1, seed=1, policy_kwargs=kwargs)


def assert_replayed(model, rollouts=2, batch_size=8):
    probe = ReplayProbe(batch_size)
    for _ in range(rollouts):
        model.learn(model.n_steps * N_ENVS, callback=probe, reset_num_timesteps=False)
        logged = model.logger.name_to_value
        assert abs(logged["train/approx_kl"]) <= 1e-7 and logged["train/clip_fraction"] == 0
    assert probe.rollouts == rollouts
    assert probe.worst_ratio <= RATIO_TOLERANCE and probe.worst_value <= 1e-5
    assert probe.least_effect > 1e-3, "the noise did nothing, so this test shows nothing"


@every_extractor
def test_ratio_is_one_before_the_first_optimiser_step(extractor):
    assert_replayed(make_model(extractor))


def features(model, obs, keys, training):
    """What the extractor says in collection, or in the update."""
    extractor = model.policy.features_extractor
    model.policy.set_training_mode(training)
    with th.set_grad_enabled(training), perturbed(model.policy, keys):
        return extractor(obs).detach()


@every_extractor
def test_every_layer_is_noisy_in_collection_and_in_the_update(extractor):
    """Without the noise of all other layers, equal observations with different keys have different features."""
    model = make_model(extractor)
    layers = flipout_layers([model.policy.features_extractor])
    assert len(layers) == PERTURBED[extractor]
    obs, keys = model.observation_space.sample(), th.arange(N_ENVS)
    obs = th.as_tensor(np.stack([obs] * N_ENVS))
    for layer in layers:
        kept = {other: [sigma.detach().clone() for sigma in sigmas(other)] for other in layers if other is not layer}
        with th.no_grad():
            for other in kept:
                for sigma in sigmas(other):
                    sigma.zero_()
        collected, updated = (features(model, obs, keys, training) for training in (False, True))
        th.testing.assert_close(collected, updated, rtol=1e-5, atol=1e-6)
        for found in (collected, updated):
            assert (found - found[:1]).abs().max() > 1e-4, f"{layer} has no noise"
        with th.no_grad():
            for other, values in kept.items():
                for sigma, value in zip(sigmas(other), values, strict=True):
                    sigma.copy_(value)


def sigmas(layer):
    return [sigma for block in layer.blocks for sigma in block.sigmas(layer) if sigma is not None]


@every_extractor
def test_a_row_sees_the_same_weights_in_any_batch(extractor):
    """One row alone, the whole batch, and the batch in another order."""
    model = make_model(extractor)
    generator = th.Generator().manual_seed(3)
    obs, keys = th.rand(N_ENVS, ENTITIES, SIZE, generator=generator) * 2 - 1, th.arange(N_ENVS) * 7 - 3
    together, order = features(model, obs, keys, False), th.tensor([3, 1, 4, 0, 2])
    th.testing.assert_close(features(model, obs[order], keys[order], False), together[order], rtol=1e-5, atol=1e-6)
    for row in range(N_ENVS):
        alone = features(model, obs[row : row + 1], keys[row : row + 1], True)
        th.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-6)


class Places(Extractor):
    """A layer that sees five places whatever the batch: they are as many as the rows of a step, and are none."""

    def build(self):
        self.places, self.place, self.out = nn.Linear(3, SIZE), th.rand(ENTITIES, 3), nn.Linear(SIZE, FEATURES)

    def forward(self, x):
        return self.out((x + self.places(self.place)).tanh().mean(1))


def test_a_layer_that_sees_no_rows_is_refused_with_the_way_out():
    name = r"features_extractor\.places"
    with pytest.raises(ValueError, match=rf"{name} .* which entry belongs to which row of the batch.*skip=\['{name}'\]"):
        make_model(Places)
    assert_replayed(make_model(Places, skip=["features_extractor.places"]))


def test_frozen_layers_stay_as_they_are_unless_asked_for():
    said = (
        r"features_extractor\.net\.1: Linear is frozen; perturb_frozen=True perturbs it\. features_extractor\.net\.3: .*frozen"
    )
    with pytest.warns(UserWarning, match=said):
        models = {0: make_model(Frozen)}
    models[2] = make_model(Frozen, perturb_frozen=True)
    for perturbed_layers, model in models.items():
        extractor = model.policy.features_extractor
        assert len(flipout_layers([extractor])) == perturbed_layers
        before = {name: value.clone() for name, value in extractor.named_parameters() if "sigma" not in name}
        assert_replayed(model)
        assert all(th.equal(value, before[name]) for name, value in extractor.named_parameters() if name in before)


def test_spectral_norm_stays_plain_with_a_word():
    """Its weights move with each pass in training mode, so a replay of them is beyond what noise could spoil."""
    said = r"net\.1: .* \(spectral norm\)\. features_extractor\.net\.3: .* \(spectral norm\)\. To say"
    with pytest.warns(UserWarning, match=said):
        model = make_model(SpectralNorm)
    model.learn(N_STEPS * N_ENVS)
    assert not flipout_layers([model.policy.features_extractor])


def test_a_lazy_layer_stays_plain_with_a_word():
    """SB3's orthogonal initialisation cannot serve it either."""
    with pytest.warns(UserWarning, match=r"net\.1: LazyLinear has no weights yet; run the network once before"):
        model = make_model(Lazy, ortho_init=False)
    model.learn(N_STEPS * N_ENVS)
    assert not flipout_layers([model.policy.features_extractor])


@pytest.fixture
def fresh_compiler():
    th._dynamo.reset()
    counters.clear()
    yield
    th._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("extractor", [Gru, Entities, pytest.param(Transformer, marks=pytest.mark.slow)])
def test_ratio_is_one_in_a_compiled_policy(extractor, fresh_compiler):
    model = make_model(extractor)
    model.policy = th.compile(model.policy, backend="eager")
    assert_replayed(model, rollouts=1, batch_size=None)


@pytest.mark.parametrize("resample", ["step", "episode"])
def test_a_compiled_policy_keeps_its_graphs_while_it_collects(resample, fresh_compiler):
    """Keys, scales and bases that come and go compile nothing anew."""
    model = make_model(Entities, resample=resample)
    model.policy = th.compile(model.policy, backend="eager")
    graphs = []
    for _ in range(3):
        model.learn(N_STEPS * N_ENVS, reset_num_timesteps=False)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0, "nothing was compiled"
    assert graphs[2] == graphs[0], f"graphs after each rollout: {graphs}"
