"""Layers whose weights are used behind their backs: told by what the first collection and the first update called."""

import copy

import pytest
import torch as th
from helpers import ReplayProbe, vector_env
from sb3_contrib import QRDQN, TQC, TRPO, CrossQ, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn
from torch.nn import functional as F

from sb3_flipout.layers import FlipoutLayer


class Extractor(BaseFeaturesExtractor):
    """A layer that it calls, and one whose weights it reads."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 8)
        self.first, self.read = nn.Linear(5, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x).tanh()).tanh()


class Always(Extractor):
    def second(self, x):
        return F.linear(x, self.read.weight, self.read.bias)


class InEvaluation(Always):
    def second(self, x):
        return self.read(x) if self.training else super().second(x)


class InTraining(Always):
    def second(self, x):
        return super().second(x) if self.training else self.read(x)


class WithoutGradients(Always):
    def second(self, x):
        return self.read(x) if th.is_grad_enabled() else super().second(x)


class Tied(Extractor):
    """A decoder by the transposed weights of its encoder, which is called too."""

    def second(self, x):
        return self.read(F.linear(self.read(x).tanh(), self.read.weight.T))


class Unused(Extractor):
    def second(self, x):
        return x


NAME = "features_extractor.read"
READERS = {
    Always: rf"the perturbed layers {NAME} learn, and were never called\. .*skip=\['{NAME}'\]\); or call the layers",
    **dict.fromkeys(
        [InEvaluation, InTraining, WithoutGradients],
        rf"the perturbed layers {NAME} were called in the first collection or in the first update, and not in both.*"
        rf"skip=\['{NAME}'\]\); or call the layers",
    ),
}
every_reader = pytest.mark.parametrize("extractor", READERS, ids=lambda extractor: extractor.__name__)


def make_model(extractor, algorithm=PPO, **noise):
    kwargs = dict(features_extractor_class=extractor, schedule="constant", **noise)
    return algorithm("FlipoutMlpPolicy", vector_env("discrete"), n_steps=8, seed=1, policy_kwargs=kwargs)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("algorithm", [PPO, A2C])
@every_reader
def test_layers_whose_weights_are_read_are_named_with_the_way_out(algorithm, extractor):
    with pytest.raises(ValueError, match=READERS[extractor]):
        make_model(extractor, algorithm).learn(24)


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@every_reader
def test_left_out_they_train_exactly(extractor):
    model, probe = make_model(extractor, skip=NAME), ReplayProbe(8)
    model.learn(48, callback=probe)
    assert type(model.policy.features_extractor.read) is nn.Linear and model.policy.guard.done
    assert probe.rollouts == 2 and probe.worst_ratio <= 1e-5 and probe.least_effect > 1e-3


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_a_tied_decoder_trains_exactly():
    model, probe = make_model(Tied), ReplayProbe(8)
    model.learn(48, callback=probe)
    assert isinstance(model.policy.features_extractor.read, FlipoutLayer) and model.policy.guard.done
    assert probe.rollouts == 2 and probe.worst_ratio <= 1e-5 and probe.least_effect > 1e-3


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_layers_that_nobody_calls_are_named_in_a_warning():
    model = make_model(Unused)
    with pytest.warns(
        UserWarning, match=rf"layers {NAME} are never called: .*policy_kwargs=dict\(skip=\['{NAME}'\]\)"
    ) as said:
        model.learn(48)
    assert len(said) == 1, "once, not at every update"
    make_model(Unused, skip=NAME).learn(24)


OFF_POLICY = {
    DQN: ("q_net", "discrete"),
    QRDQN: ("quantile_net", "discrete"),
    SAC: ("actor", "box"),
    TD3: ("actor", "box"),
    TQC: ("actor", "box"),
}
SIZES = dict(learning_starts=8, batch_size=8, buffer_size=100, seed=1)
NO_EPSILON = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0)


@pytest.mark.parametrize("algorithm", OFF_POLICY)
def test_off_policy_too(algorithm):
    net, action = OFF_POLICY[algorithm]
    kwargs, arguments = dict(features_extractor_class=InEvaluation), SIZES | (NO_EPSILON if action == "discrete" else {})
    model = algorithm("FlipoutMlpPolicy", vector_env(action), policy_kwargs=kwargs, **arguments)
    with pytest.raises(ValueError, match=rf"layers {net}\.{NAME} were called in the first collection or in the .*not in both"):
        model.learn(60)
    kwargs["skip"] = f"*{NAME}"
    model = algorithm("FlipoutMlpPolicy", vector_env(action), policy_kwargs=kwargs, **arguments).learn(60)
    assert model.policy.guard.done


ON_POLICY = dict(n_steps=8, seed=1)
NOTHING_WRONG = {
    "ppo-separate": (PPO, "discrete", dict(batch_size=8, **ON_POLICY), dict(share_features_extractor=False)),
    "ppo-values-too": (PPO, "box", dict(batch_size=8, **ON_POLICY), dict(perturb="all")),
    "ppo-heads": (PPO, "box", dict(batch_size=8, **ON_POLICY), dict(perturb="heads")),
    "a2c": (A2C, "box", ON_POLICY, dict(perturb="all", share_features_extractor=False)),
    "trpo": (TRPO, "box", dict(batch_size=8, **ON_POLICY), {}),
    "trpo-all": (TRPO, "box", dict(batch_size=8, **ON_POLICY), dict(perturb="all")),
    "recurrent-ppo": (RecurrentPPO, "box", dict(batch_size=8, **ON_POLICY), {}),
    "recurrent-ppo-all": (RecurrentPPO, "discrete", dict(batch_size=8, **ON_POLICY), dict(perturb="all")),
    "dqn": (DQN, "discrete", SIZES | NO_EPSILON, {}),
    "qrdqn": (QRDQN, "discrete", SIZES | NO_EPSILON, {}),
    **{f"{kind.__name__.lower()}-all": (kind, "box", SIZES, dict(perturb="all")) for kind in (SAC, TD3, DDPG, TQC, CrossQ)},
    **{
        f"{kind.__name__.lower()}-shared": (kind, "box", SIZES, dict(perturb="all", share_features_extractor=True))
        for kind in (SAC, TD3, TQC)
    },
    **{
        f"{kind.__name__.lower()}-shared-layers": (
            kind,
            "box",
            SIZES,
            dict(perturb="policy", share_features_extractor=True, features_extractor_class=Tied),
        )
        for kind in (SAC, TD3)
    },
    "td3-random-at-first": (TD3, "box", SIZES | dict(learning_starts=30), {}),
}


@pytest.mark.parametrize("case", NOTHING_WRONG)
def test_nothing_is_said_where_nothing_is_wrong(case):
    """Critics are not called in collection, delayed actors not in every update, random warm-up calls nobody."""
    algorithm, action, arguments, noise = NOTHING_WRONG[case]
    name = "FlipoutMlpLstmPolicy" if algorithm is RecurrentPPO else "FlipoutMlpPolicy"
    kwargs = dict(net_arch=[8], **noise) | (dict(lstm_hidden_size=8) if algorithm is RecurrentPPO else {})
    model = algorithm(name, vector_env(action), policy_kwargs=kwargs, **arguments).learn(60)
    assert model.policy.guard.done, "nothing was compared, so this test shows nothing"


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_a_copy_compares_anew():
    """What has been compared concerns the network that it was compared for."""
    model = make_model(Tied).learn(24)
    model.predict(model.observation_space.sample())  # or SB3's distribution holds a graph, which has no copies
    assert model.policy.guard.done and not copy.deepcopy(model.policy).guard.done
