"""Names on the stock classes: added, refused, taken back."""

import pickle
import re
import subprocess
import sys
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import A2C, DDPG, PPO, SAC, TD3
from stable_baselines3.common.buffers import DictRolloutBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

import sb3_flipout
import sb3_flipout.policies
from sb3_flipout.buffers import KeyedBufferMixin, keyed
from sb3_flipout.policies import FlipoutActorCriticPolicy
from sb3_flipout.registration import ALIASES

METHODS = (
    *("_setup_model", "save", "load", "set_random_seed", "set_parameters"),
    *("collect_rollouts", "train", "_update_info_buffer", "_setup_learn", "_sample_action"),
)


@pytest.fixture(autouse=True)
def registered_afterwards():
    yield
    sb3_flipout.register()


def snapshot(cls):
    return {name: cls.__dict__.get(name) for name in METHODS}, dict(cls.policy_aliases)


def test_names_are_on_the_stock_classes():
    for algorithm, aliases in ALIASES.items():
        for name, policy in aliases.items():
            assert algorithm.policy_aliases[name] is policy


def test_register_is_idempotent():
    before = [snapshot(algorithm) for algorithm in ALIASES]
    sb3_flipout.register()
    assert [snapshot(algorithm) for algorithm in ALIASES] == before


def test_unregister_takes_everything_back():
    code = """
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
bases = (OnPolicyAlgorithm, OffPolicyAlgorithm)
classes = (*bases, PPO, A2C, DDPG, DQN, SAC, TD3, ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO)
def snapshot():
    return [(dict(vars(c)), dict(getattr(c, "policy_aliases", {}))) for c in classes]
before = snapshot()
import sb3_flipout
assert all(after != own for after, own in zip(snapshot()[2:], before[2:], strict=True))
assert snapshot()[:2] == before[:2], "the common base classes must not be touched"
sb3_flipout.unregister()
assert snapshot() == before
sb3_flipout.unregister()
sb3_flipout.register()
sb3_flipout.unregister(PPO)
assert "FlipoutMlpPolicy" not in PPO.policy_aliases and "FlipoutMlpPolicy" in A2C.policy_aliases
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_stock_policies_are_left_alone():
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(16)
    assert type(model.rollout_buffer) is RolloutBuffer


def test_foreign_alias_is_refused_and_nothing_is_changed():
    class Foreign(PPO):
        policy_aliases: ClassVar = {"FlipoutMlpPolicy": PPO.policy_aliases["MlpPolicy"]}

    before = snapshot(Foreign)
    with pytest.raises(ValueError, match="foreign policy of the name 'FlipoutMlpPolicy'"):
        sb3_flipout.register(Foreign)
    assert snapshot(Foreign) == before


def test_subclass_of_a_registered_class_works_without_registration():
    class MyPPO(PPO):
        pass

    model = MyPPO("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(16)
    assert isinstance(model.rollout_buffer, KeyedBufferMixin)


class OwnAlgorithm(OnPolicyAlgorithm):
    policy_aliases: ClassVar = {}

    def __init__(self, policy, env):
        super().__init__(
            policy, env, learning_rate=1e-3, n_steps=8, gamma=0.99, gae_lambda=1.0, ent_coef=0.0, vf_coef=0.5,
            max_grad_norm=0.5, use_sde=False, sde_sample_freq=-1,
        )  # fmt: skip

    def train(self):
        self.policy.set_training_mode(True)
        for batch in self.rollout_buffer.get(8):
            _, log_prob, _ = self.policy.evaluate_actions(batch.observations, batch.actions.long().flatten())
            (-(log_prob * batch.advantages).mean()).backward()


def test_own_algorithm_needs_registration_and_is_told_so():
    with pytest.warns(UserWarning, match=r"now evaluated for learning without it.*register\(YourAlgorithm\)") as told:
        OwnAlgorithm(FlipoutActorCriticPolicy, "CartPole-v1").learn(32)
    assert len(told) == 1
    with pytest.raises(ValueError, match="known are PPO, A2C"):
        sb3_flipout.register(OwnAlgorithm)
    try:
        sb3_flipout.register(OwnAlgorithm, {"FlipoutMlpPolicy": FlipoutActorCriticPolicy})
        OwnAlgorithm("FlipoutMlpPolicy", "CartPole-v1").learn(8)
    finally:
        sb3_flipout.unregister(OwnAlgorithm)
    assert OwnAlgorithm.policy_aliases == {}


def test_names_of_a_subclass_do_not_reach_its_parent():
    class Sub(PPO):
        pass

    sb3_flipout.register(Sub, {"Mine": FlipoutActorCriticPolicy})
    assert "Mine" in Sub.policy_aliases and "MlpPolicy" in Sub.policy_aliases and "Mine" not in PPO.policy_aliases
    sb3_flipout.unregister(Sub)
    assert "policy_aliases" not in vars(Sub) and "Mine" not in Sub.policy_aliases


def test_registered_subclass_that_calls_super_tells_once():
    class Sub(PPO):
        def collect_rollouts(self, *args, **kwargs):
            return super().collect_rollouts(*args, **kwargs)

    sb3_flipout.register(Sub)
    model = Sub("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(16)
    sb3_flipout.unregister(Sub)
    assert model.policy._rollouts == 2


def test_plain_policy_put_in_place_of_a_flipout_one_trains():
    model = PPO("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8)
    model.policy = model.policy.to_plain_policy()
    model.rollout_buffer = RolloutBuffer(8, model.observation_space, model.action_space)
    assert model.learn(16).num_timesteps == 16


def test_keyed_buffer_pickles():
    model = PPO("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(8)
    copy = pickle.loads(pickle.dumps(model.rollout_buffer))
    assert type(copy) is type(model.rollout_buffer)
    np.testing.assert_array_equal(copy.noise_keys, model.rollout_buffer.noise_keys)


@pytest.mark.parametrize("bad", [gym.Env, "PPO", 3])
def test_register_refuses_what_is_no_algorithm(bad):
    with pytest.raises(TypeError, match="SB3 algorithm class"):
        sb3_flipout.register(bad)


def test_unknown_algorithm_names_the_known_ones():
    with pytest.raises(ValueError, match="no flipout policies are known"):
        sb3_flipout.register(type("Other", (OnPolicyAlgorithm,), {}))


class OwnBuffer(RolloutBuffer):
    resets = 0

    def reset(self):
        self.resets += 1
        super().reset()


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_users_buffer_class_is_wrapped(algorithm, tmp_path):
    sizes = dict(batch_size=8) if algorithm is PPO else {}
    model = algorithm("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, rollout_buffer_class=OwnBuffer, **sizes).learn(16)
    assert isinstance(model.rollout_buffer, OwnBuffer) and isinstance(model.rollout_buffer, KeyedBufferMixin)
    assert model.rollout_buffer.resets == 3
    assert model.rollout_buffer_class is OwnBuffer
    model.save(tmp_path / "model")
    assert algorithm.load(tmp_path / "model").rollout_buffer_class is OwnBuffer


def test_keyed_classes_are_made_once_and_keep_keyed_ones():
    assert keyed(RolloutBuffer) is keyed(RolloutBuffer)
    assert keyed(keyed(DictRolloutBuffer)) is keyed(DictRolloutBuffer)


@pytest.mark.parametrize("bad", [ReplayBuffer, lambda *args, **kwargs: None])
def test_unfit_buffer_class_is_refused_with_the_remedy(bad):
    with pytest.raises(TypeError, match="must be a subclass of RolloutBuffer"):
        PPO("FlipoutMlpPolicy", "CartPole-v1", rollout_buffer_class=bad)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (
            dict(family="gausian"),
            ValueError,
            'family must be one of "gaussian", "factorised", "multiplicative", "dropconnect", "isotropic", "lowrank", got '
            "'gausian'. Did you mean 'gaussian'?",
        ),
        (
            dict(noise_sharing="batch"),
            ValueError,
            'noise_sharing must be one of "flipout", "shared", "independent", got \'batch\'.',
        ),
        (
            dict(resample="never"),
            ValueError,
            'resample must be one of "step", "episode", "rollout", got \'never\'. A whole number >= 1 is a number of steps.',
        ),
        (dict(resample=0), ValueError, 'resample must be one of "step", "episode", "rollout", got 0.'),
        (dict(sigma_init=-0.1), ValueError, "sigma_init must be a finite number >= 0, got -0.1. Use 0.0 for no perturbation"),
        (dict(sigma_init=float("nan")), ValueError, "sigma_init must be a finite number >= 0, got nan."),
        (dict(sigma_init="0.1"), TypeError, "sigma_init must be a number >= 0, got '0.1' of type str."),
        (dict(family="dropconnect", sigma_init=0.1), ValueError, "sigma_init=0.1 does not fit family='dropconnect'"),
        (dict(noise_sharing="shared"), ValueError, 'Use resample="rollout"'),
        (dict(perturb="value"), ValueError, 'perturb must be one of "policy", "heads", "all", got \'value\'.'),
        (
            dict(perturb="linear"),
            ValueError,
            'got \'linear\'. Which kinds of layer is a setting of its own: perturb="policy", layers="linear".',
        ),
        (dict(layers="conv"), ValueError, 'layers must be one of "all", "linear", "hidden", got \'conv\'.'),
        (
            dict(learn_sigma="False"),
            TypeError,
            "learn_sigma must be True or False, got 'False' of type str; pass learn_sigma=True or =False.",
        ),
        (dict(base_every_rollouts=0), ValueError, "base_every_rollouts must be an integer >= 1, got 0. Use None for never."),
        (dict(base_every_rollouts=1.5), TypeError, "base_every_rollouts must be an integer >= 1, got 1.5 of type float."),
        (
            dict(base_every_rollouts=2, family="factorised"),
            ValueError,
            "base_every_rollouts=2 has no effect with family='factorised' and noise_sharing='flipout', where rows share no "
            "base draw. Leave base_every_rollouts out.",
        ),
        (dict(init="zeros"), ValueError, 'init must be one of "keep", "noisynet", got \'zeros\'.'),
    ],
)
def test_bad_settings_are_refused(kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        PPO("FlipoutMlpPolicy", "CartPole-v1", policy_kwargs=kwargs)


def test_cnn_policy_on_a_space_without_images_gives_sb3s_own_message():
    with pytest.raises(AssertionError, match="You should use NatureCNN only with images"):
        PPO("FlipoutCnnPolicy", "CartPole-v1")


class DictEnv(gym.Env):
    observation_space = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2,))})
    action_space = gym.spaces.Discrete(2)


@pytest.mark.parametrize("name", ["FlipoutMlpPolicy", "FlipoutCnnPolicy"])
def test_dict_observations_point_to_the_multi_input_policy(name):
    with pytest.raises(ValueError, match="FlipoutMultiInputPolicy"):
        PPO(name, DictEnv())


def test_subclasses_that_override_everything_keep_their_noise():
    class OwnPPO(PPO):
        collect_rollouts, train = PPO.collect_rollouts.__wrapped__, PPO.train.__wrapped__

    class OwnSAC(SAC):
        train, _sample_action = SAC.train.__wrapped__, SAC._sample_action.__wrapped__

    try:
        model = OwnPPO("FlipoutMlpPolicy", "CartPole-v1", n_steps=8, batch_size=8).learn(16)
        assert (model.policy._keys.step, model.policy._rollouts, model.policy._evaluation.calls) == (16, 2, 0)
        model = OwnSAC("FlipoutMlpPolicy", "Pendulum-v1", learning_starts=4, batch_size=4, buffer_size=20).learn(10)
        assert model.policy._keys.step == 10 and model.policy.learning.step == 6
    finally:
        sb3_flipout.unregister(OwnPPO)
        sb3_flipout.unregister(OwnSAC)
    assert "train" in vars(OwnPPO) and not hasattr(vars(OwnPPO)["train"], "wraps_for_flipout")
    assert "policy_aliases" not in vars(OwnSAC)


def test_unregister_concerns_what_subclasses_inherit():
    sb3_flipout.unregister(TD3)
    assert "FlipoutMlpPolicy" not in DDPG.policy_aliases and not hasattr(DDPG.train, "wraps_for_flipout")
    sb3_flipout.register()
    assert "FlipoutMlpPolicy" in DDPG.policy_aliases and hasattr(DDPG.train, "wraps_for_flipout")


def test_all_policy_classes_are_found_in_one_place():
    for aliases in ALIASES.values():
        for policy_class in aliases.values():
            assert getattr(sb3_flipout.policies, policy_class.__name__) is policy_class


def test_without_optional_packages_the_rest_works_and_the_extra_is_named():
    code = """
import importlib.util, sys
missing = ("sb3_contrib", "matplotlib", "tensorboard", "rl_zoo3", "ale_py", "minatar")
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name.split(".")[0] in missing else found(name, *args)
for name in missing:
    sys.modules[name] = None
import sb3_flipout
from sb3_flipout import policies
from stable_baselines3 import DDPG, SAC
for algorithm in (SAC, DDPG):
    model = algorithm("FlipoutMlpPolicy", "Pendulum-v1", learning_starts=4, batch_size=4, buffer_size=20)
    model.learn(8, sb3_flipout.callbacks.AnnealNoise(1.0, 0.1))
for name in ("FlipoutTQCPolicy", "FlipoutRecurrentPolicy"):
    try:
        getattr(policies, name)
        raise AssertionError("it cannot be there")
    except ImportError as error:
        assert f"{name} needs sb3-contrib" in str(error) and "pip install 'sb3_flipout[contrib]'" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("flipout", [False, True])
def test_a_function_may_make_the_policy(flipout):
    """SB3 takes any callable for a policy class, and importing this package changes nothing in that."""
    kind = FlipoutActorCriticPolicy if flipout else ActorCriticPolicy

    def make(*args, **kwargs):
        return kind(*args, **kwargs)

    model = PPO(make, "CartPole-v1", n_steps=16, batch_size=16, n_epochs=1, seed=0).learn(32)
    assert type(model.policy) is kind
    assert isinstance(model.rollout_buffer, KeyedBufferMixin) == flipout
