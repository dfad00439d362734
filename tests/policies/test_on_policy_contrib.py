"""sb3-contrib's on-policy algorithms: MaskablePPO, whose masks hold under any noise, and TRPO, whose update is one noise."""

import numpy as np
import oracle
import pytest
import torch as th
from gymnasium import spaces
from helpers import ACTION_SPACES, OBSERVATION_SPACES, NoiseRecorder, RandomEnv, ReplayProbe, vector_env
from sb3_contrib import TRPO, MaskablePPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer, MaskableRolloutBuffer
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.utils import flat_grad
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_flipout import perturbed
from sb3_flipout.buffers import KeyedBufferMixin
from sb3_flipout.noise import FAMILIES, noise_of

RATIO_TOLERANCE = 1e-5


class MaskedEnv(RandomEnv):
    """Each observation comes with its own mask, that leaves at least one choice of each part of the action."""

    def _choices(self):
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return [space.n]
        return [2] * space.n if isinstance(space, spaces.MultiBinary) else list(space.nvec)

    def _observation(self):
        parts = [self.np_random.random(n) < 0.5 for n in self._choices()]
        for part in parts:
            part[self.np_random.integers(len(part))] = True
        self.masks = np.concatenate(parts)
        return super()._observation()

    def action_masks(self):
        return self.masks


def masked_env(action="discrete", observation="vector", n_envs=3):
    make = lambda: MaskedEnv(ACTION_SPACES[action], OBSERVATION_SPACES[observation])  # noqa: E731
    return make_vec_env(make, n_envs=n_envs, seed=0)


#: Name -> (kind of policy, actions, observations, arguments of the policy).
MASKED = {
    "discrete": ("Mlp", "discrete", "vector", {}),
    "multidiscrete": ("Mlp", "multidiscrete", "vector", {}),
    "multibinary": ("Mlp", "multibinary", "vector", {}),
    "dict": ("MultiInput", "discrete", "dict", {}),
    "image": ("Cnn", "multidiscrete", "image", {}),
    "separate-extractors": ("Cnn", "discrete", "image", dict(share_features_extractor=False)),
}


def maskable(case="discrete", prefix="Flipout", n_steps=16, **policy_kwargs):
    kind, action, observation, arguments = MASKED[case]
    kwargs = {"schedule": "constant", **arguments, **policy_kwargs} if prefix else {**arguments, **policy_kwargs}
    env = masked_env(action, observation)
    sizes = dict(n_steps=n_steps, batch_size=8, n_epochs=2)
    return MaskablePPO(f"{prefix}{kind}Policy", env, seed=1, policy_kwargs=kwargs, **sizes)


def assert_equal_weights(stock, ours):
    own = ours.policy.state_dict()
    for name, value in stock.policy.state_dict().items():
        assert th.equal(value, own[name]), name


# ---- MaskablePPO ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_masking", [True, False])
@pytest.mark.parametrize("case", MASKED)
def test_maskable_ratio_is_one_before_the_first_optimiser_step(case, use_masking):
    model, probe = maskable(case), ReplayProbe(8)
    stock_class = MaskableDictRolloutBuffer if case == "dict" else MaskableRolloutBuffer
    assert isinstance(model.rollout_buffer, stock_class) and isinstance(model.rollout_buffer, KeyedBufferMixin)
    model.learn(3 * 48, callback=probe, use_masking=use_masking)
    assert probe.rollouts == 3
    assert probe.worst_ratio <= RATIO_TOLERANCE
    assert probe.worst_value <= 1e-5
    assert probe.least_effect > 1e-4  # else the noise, and with it the test, did nothing


@pytest.mark.parametrize("case", MASKED)
def test_maskable_at_sigma_zero_trains_bitwise_as_stock(case):
    stock = maskable(case, "").learn(96)
    ours = maskable(case, sigma_init=0.0, learn_sigma=False).learn(96)
    assert_equal_weights(stock, ours)
    assert ours.rollout_buffer_class is stock.rollout_buffer_class


def taken_and_allowed(model, actions, masks):
    """Per transition and part of the action: whether the mask allows it."""
    choices = MaskedEnv(model.action_space)._choices()
    starts = np.cumsum([0, *choices[:-1]])
    return np.take_along_axis(masks.astype(bool), starts + actions.reshape(len(masks), -1).astype(int), axis=1)


class MasksKept(BaseCallback):
    """At the end of each rollout, every action in the buffer is one that its mask allows."""

    def __init__(self):
        super().__init__()
        self.masked = 0

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        masks = buffer.action_masks.reshape(-1, buffer.mask_dims)
        assert taken_and_allowed(self.model, buffer.actions.reshape(len(masks), -1), masks).all()
        self.masked += int((masks == 0).sum())


@pytest.mark.parametrize("case", ["discrete", "multidiscrete", "multibinary"])
def test_masked_actions_are_never_taken_under_noise(case):
    model, kept = maskable(case, sigma_init=50.0), MasksKept()
    model.learn(3 * 48, callback=kept)
    assert kept.masked > 100
    env = masked_env(MASKED[case][1], n_envs=200)
    obs, masks = env.reset(), np.stack(env.env_method("action_masks"))
    for deterministic in (False, True):
        actions, _ = model.predict(obs, deterministic=deterministic, action_masks=masks)
        assert taken_and_allowed(model, actions, masks).all()
    unmasked, _ = model.predict(obs, deterministic=False)
    assert not taken_and_allowed(model, unmasked, masks).all()  # the noise would take them


def test_maskable_deterministic_prediction_is_the_mean_weights(untouched_rng):
    with th.random.fork_rng():
        state = np.random.get_state()
        model = maskable(sigma_init=5.0)
        np.random.set_state(state)
    policy, env = model.policy, masked_env(n_envs=50)
    obs, masks = th.as_tensor(env.reset()), np.stack(env.env_method("action_masks"))
    before = policy.noise_state()
    with perturbed(policy, None), th.no_grad():
        expected = policy.get_distribution(obs, masks).mode()
    assert th.equal(policy._predict(obs, True, masks), expected)
    assert th.equal(policy._predict(obs, deterministic=True, action_masks=masks), expected)
    np.testing.assert_array_equal(model.predict(obs.numpy(), deterministic=True, action_masks=masks)[0], expected)
    with th.no_grad():
        assert th.equal(policy(obs, True, masks)[0], expected)
        assert th.equal(policy(obs, action_masks=masks, deterministic=True)[0], expected)
    assert policy.noise_state() == before


def test_maskable_positional_arguments_of_a_stochastic_step():
    policy = maskable(sigma_init=5.0).policy
    obs, masks = th.rand(3, 5), np.eye(4, dtype=bool)[:3]
    with th.no_grad(), policy.collecting(3):
        actions, _, log_prob = policy(obs, False, masks)
    assert policy._keys.step == 1 and noise_of(log_prob).keys.unique().numel() == 3
    assert actions.tolist() == [0, 1, 2]
    assert log_prob.tolist() == [0, 0, 0]


@pytest.mark.parametrize("deterministic", [True, False])
def test_maskable_evaluation_changes_nothing_in_the_training_noise(deterministic):
    class Evaluate(BaseCallback):
        def _on_step(self):
            if self.n_calls % 5 == 0:
                env = masked_env(n_envs=2)
                evaluate_policy(self.model, env, n_eval_episodes=2, deterministic=deterministic)
            return True

    without, with_evaluation, probe = NoiseRecorder(), NoiseRecorder(), ReplayProbe(8)
    maskable().learn(96, callback=[without, ReplayProbe(8)])
    maskable().learn(96, callback=[Evaluate(), with_evaluation, probe])
    np.testing.assert_array_equal(without.all_keys(), with_evaluation.all_keys())
    assert probe.worst_ratio <= RATIO_TOLERANCE


def test_maskable_batch_without_noise_is_refused():
    policy = maskable().policy
    policy.set_training_mode(True)
    message = "in an update without its noise keys, .*: it never had any"
    with policy.updating(), pytest.raises(ValueError, match=message):
        policy.evaluate_actions(th.rand(4, 5), th.zeros(4), action_masks=th.ones(4, 4))


def test_maskable_to_plain_policy_has_the_mean_weights():
    model = maskable().learn(48)
    plain = model.policy.to_plain_policy()
    assert type(plain) is MaskableActorCriticPolicy
    obs = np.random.default_rng(0).uniform(-1, 1, (9, 5)).astype(np.float32)
    masks = np.tile([True, False, True, True], (9, 1))
    ours, _ = model.predict(obs, deterministic=True, action_masks=masks)
    np.testing.assert_array_equal(plain.predict(obs, deterministic=True, action_masks=masks)[0], ours)


# ---- TRPO -----------------------------------------------------------------------------------------------------------


def trpo(action="discrete", n_steps=16, policy_kwargs=None, **arguments):
    sizes = dict(n_steps=n_steps, batch_size=8, n_critic_updates=2)
    kwargs = dict(schedule="constant") | (policy_kwargs or {})  # noise in all rollouts, to the last
    return TRPO("FlipoutMlpPolicy", vector_env(action, n_envs=2), seed=1, policy_kwargs=kwargs, **sizes, **arguments)


class UpdateRecorder(BaseCallback):
    """What the policy is asked for in each real update: the noise, the base, and how far the ratio is from one."""

    def __init__(self):
        super().__init__()
        self.updates, self.current = [], None

    def _on_training_start(self):
        policy, recorder = self.model.policy, self
        get_distribution, predict_values = policy.get_distribution, policy.predict_values

        def distribution(obs):
            result = get_distribution(obs)
            if policy.marks.updates:
                recorder.current["actor"].append((noise_of(obs).keys.clone(), recorder.bases()))
                recorder.current["log_prob"].append(result.log_prob(recorder.actions(obs)).detach())
            return result

        def values(obs):
            if policy.marks.updates:
                recorder.current["critic"].append((obs.clone(), noise_of(obs).keys.clone(), recorder.bases()))
            return predict_values(obs)

        policy.get_distribution, policy.predict_values = distribution, values

    def bases(self):
        return [layer.base_key for layer in self.model.policy.perturbed_network.layers]

    def actions(self, obs):
        """The actions of these transitions, found by their observations, which are all different."""
        return self.flat_actions[[self.index[row.tobytes()] for row in obs.numpy()]]

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        flat = buffer.swap_and_flatten(buffer.observations)
        self.index = {row.tobytes(): i for i, row in enumerate(flat)}
        assert len(self.index) == len(flat)
        actions = th.as_tensor(buffer.swap_and_flatten(buffer.actions)).float()
        self.flat_actions = actions.flatten().long() if isinstance(self.model.action_space, spaces.Discrete) else actions
        stored = buffer.swap_and_flatten(buffer.log_probs)[:, 0]
        keys = buffer.swap_and_flatten(buffer.noise_keys)[:, 0]
        self.current = dict(actor=[], critic=[], log_prob=[], stored=stored, keys=keys, index=self.index)
        self.updates.append(self.current)


@pytest.mark.parametrize("action", ["box", "discrete", "multidiscrete", "multibinary"])
@pytest.mark.parametrize("sub_sampling_factor", [1, 4])
def test_one_noise_in_the_whole_update_of_trpo(sub_sampling_factor, action):
    model, recorder = trpo(action, sub_sampling_factor=sub_sampling_factor), UpdateRecorder()
    model.learn(4 * 32, callback=recorder)
    assert len(recorder.updates) == 4
    for update in recorder.updates:
        (first, bases), *others = update["actor"]
        assert len(others) >= 2  # the gradient's, and at least one of the line search
        assert len(first) == 32 // sub_sampling_factor
        assert len(first.unique()) == len(first)
        for keys, others_bases in others:
            assert th.equal(keys, first) and others_bases == bases
        # The keys are those of the transitions, so the ratio is one before the first step.
        rows = [int(np.flatnonzero(update["keys"] == key)[0]) for key in first.tolist()]
        for log_prob in update["log_prob"][:2]:
            ratio = np.exp(log_prob.numpy() - update["stored"][rows])
            assert np.abs(ratio - 1).max() <= RATIO_TOLERANCE
        assert len(update["critic"]) == 2 * 4
        for obs, keys, critics_bases in update["critic"]:
            assert critics_bases == bases
            assert keys.tolist() == [update["keys"][update["index"][row.tobytes()]] for row in obs.numpy()]
    drawn = {tuple(update["actor"][0][1]) for update in recorder.updates}
    assert len(drawn) == 4  # a new base for each rollout


@pytest.mark.parametrize("sub_sampling_factor", [1, 4])
def test_trpo_at_sigma_zero_trains_bitwise_as_stock_with_sub_sampling(sub_sampling_factor):
    sizes = dict(n_steps=16, batch_size=8, sub_sampling_factor=sub_sampling_factor, seed=3)
    stock = TRPO("MlpPolicy", vector_env(), **sizes).learn(144)
    frozen = dict(sigma_init=0.0, learn_sigma=False)
    assert_equal_weights(stock, TRPO("FlipoutMlpPolicy", vector_env(), policy_kwargs=frozen, **sizes).learn(144))


def rollout_of(model):
    """Collect one rollout and give all of it, without an update."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model.policy.set_training_mode(True)
    return next(iter(model.rollout_buffer.get(batch_size=None)))


def oracle_logits(policy, obs, noise):
    """The actor row by row, each with its own materialised weights; differentiable in means and sigmas."""
    first, _, last, _ = policy.mlp_extractor.policy_net
    rows = []
    for row, key, scale in zip(obs.double(), noise.keys.tolist(), noise.scale.tolist(), strict=True):
        for layer, activate in ((first, th.tanh), (last, th.tanh), (policy.action_net, lambda y: y)):
            weight, bias = oracle.row_weights(layer, key, scale)
            row = activate(weight.double() @ row + bias.double())
        rows.append(row)
    return th.stack(rows)


@pytest.mark.parametrize("family", ["gaussian", "multiplicative", "factorised"])
def test_fisher_vector_product_is_that_of_the_materialised_weights(family):
    kwargs = dict(net_arch=[4, 3], family=family, sigma_init=0.7, learn_sigma=True)
    model = trpo(n_steps=8, policy_kwargs=kwargs, cg_damping=0.0)
    policy = model.policy
    with th.no_grad():
        policy.action_net.weight.mul_(100)  # SB3 starts with nearly uniform actions, where the Fisher matrix says little
    batch = rollout_of(model)
    noise, actions = noise_of(batch.observations), batch.actions.long().flatten()
    obs = batch.observations.as_subclass(th.Tensor)

    with policy.updating():
        with th.no_grad():
            old = policy.get_distribution(batch.observations).distribution
        new = policy.get_distribution(batch.observations)
        divergence = th.distributions.kl_divergence(new.distribution, old).mean()
        objective = (batch.advantages * th.exp(new.log_prob(actions) - batch.old_log_prob)).mean()
        parameters, gradient, divergence_gradient, _ = model._compute_actor_grad(divergence, objective)
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    expected_names = {f"{layer}.{kind}{sigma}" for layer in ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2")
                      for kind in ("weight", "bias") for sigma in ("", "_sigma")}  # fmt: skip
    expected_names |= {f"action_net.{kind}{sigma}" for kind in ("weight", "bias") for sigma in ("", "_sigma")}
    assert {names[id(parameter)] for parameter in parameters} == expected_names

    slow = th.distributions.Categorical(logits=oracle_logits(policy, obs, noise))
    slow_old = th.distributions.Categorical(logits=slow.logits.detach())
    slow_divergence = th.distributions.kl_divergence(slow, slow_old).mean()
    slow_objective = (batch.advantages * th.exp(slow.log_prob(actions) - batch.old_log_prob)).mean()
    slow_divergence_gradient = flat_grad(slow_divergence, parameters, create_graph=True, retain_graph=True)
    slow_gradient = flat_grad(slow_objective, parameters, retain_graph=True)
    assert slow_gradient.abs().max() > 1e-2
    assert th.allclose(gradient, slow_gradient, rtol=1e-4, atol=1e-4 * float(slow_gradient.abs().max()))
    for seed in range(3):
        vector = th.randn(len(gradient), generator=th.Generator().manual_seed(seed))
        fast = model.hessian_vector_product(parameters, divergence_gradient, vector)
        product = flat_grad((slow_divergence_gradient * vector).sum(), parameters, retain_graph=True)
        assert product.abs().max() > 1e-2
        assert th.allclose(fast, product, rtol=1e-4, atol=1e-4 * float(product.abs().max()))


@pytest.mark.parametrize(
    ("family", "learn_sigma"),
    [(name, learn) for name, family in FAMILIES.items() for learn in (True, False) if learn or family.sigma != "none"],
)
def test_trpo_trains_every_family_and_moves_only_what_learns(family, learn_sigma):
    settings = dict(family=family, learn_sigma=learn_sigma, perturb="all")
    model, probe = trpo(policy_kwargs=settings), ReplayProbe(8)
    before = {name: value.detach().clone() for name, value in model.policy.named_parameters()}
    model.learn(4 * 32, callback=probe)
    assert probe.worst_ratio <= RATIO_TOLERANCE
    for name, value in model.policy.named_parameters():
        learns = not name.endswith("_sigma") or (learn_sigma and family not in ("isotropic", "lowrank"))
        assert th.equal(value, before[name]) == (not learns), name


def test_actor_of_trpo_moves_without_leaving_the_trust_region():
    """The Kullback-Leibler divergence under the rollout's noise, recomputed after the update, is what TRPO bounds."""
    model = trpo(target_kl=0.01)
    policy = model.policy
    batch = rollout_of(model)
    with th.no_grad(), policy.updating():
        old = policy.get_distribution(batch.observations).distribution
    model.train()
    with th.no_grad(), policy.updating():
        new = policy.get_distribution(batch.observations).distribution
    divergence = float(th.distributions.kl_divergence(new, old).mean())
    logged = model.logger.name_to_value
    assert logged["train/is_line_search_success"] == 1.0
    assert divergence == pytest.approx(logged["train/kl_divergence_loss"], rel=1e-3)
    assert 0.001 < divergence < 0.01


def test_trpo_refuses_a_batch_without_noise_in_its_update():
    policy = trpo().policy
    with policy.updating():
        for ask in (policy.get_distribution, policy.predict_values):
            with pytest.raises(ValueError, match=r"in an update without its noise keys, .*: it never had any"):
                ask(th.rand(4, 5))
