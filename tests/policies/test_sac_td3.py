"""SAC, TD3, DDPG, TQC and CrossQ: which noise each network runs under, and what it does to actions and gradients."""

import copy
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import oracle
import pytest
import torch as th
from helpers import vector_env
from sac_td3_cases import ALGORITHMS, DETERMINISTIC, STOCHASTIC, Recorder, build, layers_of, learn, networks
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import DDPG, DQN, SAC, TD3
from stable_baselines3.common.callbacks import EvalCallback

from sb3_flipout import perturbed
from sb3_flipout.layers import effective_weight
from sb3_flipout.noise import FAMILIES, fold, fold_in
from sb3_flipout.policies.learning import LearnsUnderNoise

LEARNING_KEYS, LEARNING_BASE, ONLINE, TARGET = 16, 17, 0, 1


def copied(module):
    """A copy of a policy or an actor, but for the action distribution, which holds tensors that cannot be copied."""
    actor = getattr(module, "actor", module)
    shared = getattr(actor, "action_dist", None)
    return copy.deepcopy(module, {id(shared): shared})


every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


VARIANTS = [
    *(dict(family=family) for family in FAMILIES),
    *(dict(noise_sharing="shared"), dict(noise_sharing="independent"), dict(init="noisynet"), dict(members=5)),
    dict(perturb="all", base_every_steps=3),
]


@pytest.mark.parametrize(
    ("algorithm", "noise"),
    [(algorithm, noise) for algorithm in (SAC, TD3) for noise in VARIANTS]
    + [(algorithm, VARIANTS[-1]) for algorithm in (DDPG, TQC, CrossQ)],
)
def test_runs_and_learns_sigma(algorithm, noise):
    model = build(algorithm, noise=noise)
    layers = layers_of(model.actor) + layers_of(model.critic)
    before = [None if layer.weight_sigma is None else layer.weight_sigma.clone() for layer in layers]
    model.learn(28)
    assert model.policy.learning.step == model._n_updates > 4
    for layer, old in zip(layers, before, strict=True):
        if old is not None and layer.weight_sigma.requires_grad:
            assert not th.equal(layer.weight_sigma, old)


# ---- acting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize("resample", ["step", "episode", "rollout", 5])
@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_acting_keys_are_held_as_resample_says(algorithm, resample, n_envs):
    model = build(algorithm, n_envs, noise=dict(resample=resample), learning_starts=0, gradient_steps=0)
    recorder = learn(model, 80 * n_envs)
    assert len(recorder.acting) == 80
    drawn, expected = np.zeros(n_envs, dtype=int), []
    for step in range(len(recorder.acting)):
        starts = {"step": True, "rollout": step % 2 == 0, 5: step % 5 == 0}  # train_freq is 2
        ended = recorder.dones[step - 1] if step and resample == "episode" else np.full(n_envs, starts.get(resample, False))
        drawn = np.where(ended, step, drawn)
        expected.append([fold(model.policy._keys.seed, int(t), env) for env, t in enumerate(drawn)])
    assert [keys.tolist() for keys in recorder.acting] == expected
    if resample == "episode":
        assert np.stack(recorder.dones[:-1]).any(axis=0).all()


def test_steps_of_warm_up_are_counted():
    model = build(learning_starts=8, noise=dict(resample="step"))
    recorder = learn(model)
    assert recorder.acting[0].tolist() == [fold(model.policy._keys.seed, 4, env) for env in range(2)]


@every_algorithm
def test_acting_base_is_redrawn_every_so_many_steps_and_no_gradient_step_moves_it(algorithm):
    held = learn(build(algorithm, noise=dict(perturb="all"))).acting_bases
    assert len(set(held)) == 1
    bases = learn(build(algorithm, n_envs=1, learning_starts=0, noise=dict(base_every_steps=4)), 24).acting_bases
    assert [a == b for a, b in pairwise(bases)] == [step % 4 != 0 for step in range(1, 24)]


@every_algorithm
def test_actions_are_those_of_each_environments_own_weights(algorithm):
    model = build(algorithm, n_envs=3, learning_starts=0)
    learn(model, 30)
    obs = model._last_obs
    with model.policy.collecting(3):
        noise = model.policy._acting_noise
        actions = model.policy._predict(th.as_tensor(obs), deterministic=True)
    for env in range(3):
        twin = copied(model.policy)
        for layer, own in zip(layers_of(twin.actor), layers_of(model.actor), strict=True):
            weight, bias = effective_weight(own, noise.keys[env])
            layer.weight.data, layer.bias.data = weight, bias
        with perturbed(twin, None):
            expected = twin._predict(th.as_tensor(obs[env : env + 1]), deterministic=True)
        assert th.allclose(actions[env], expected[0], atol=1e-5)
    assert not th.allclose(actions, model.policy._predict(th.as_tensor(obs), deterministic=True), atol=1e-3)


@pytest.mark.filterwarnings("ignore:Training and eval env are not of the same type")
@pytest.mark.parametrize("deterministic", [True, False])
@every_algorithm
def test_evaluation_changes_nothing_in_the_training_noise(algorithm, deterministic):
    evaluation = EvalCallback(vector_env("box", 5, seed=9), eval_freq=7, deterministic=deterministic, verbose=0)
    models, recorders = [], []
    for callback in ([], [evaluation]):
        models.append(build(algorithm, noise=dict(base_every_steps=5)))
        recorders.append(learn(models[-1], callback=callback))
    plain, evaluated = recorders
    assert all(th.equal(a, b) for a, b in zip(plain.acting, evaluated.acting, strict=True))
    assert plain.acting_bases == evaluated.acting_bases
    assert all(a.same(b) for a, b in zip(plain.learning, evaluated.learning, strict=True))
    if deterministic:
        assert models[1].policy._evaluation.calls == 0
    if deterministic or algorithm in DETERMINISTIC:  # else evaluation draws actions from torch's global generator
        for one, other in zip(models[0].policy.parameters(), models[1].policy.parameters(), strict=True):
            assert th.equal(one, other)


# ---- gradient steps -------------------------------------------------------------------------------------------------


def expected_keys(policy, seen, role):
    key = fold(policy._noise_seed, LEARNING_KEYS, seen.step, role)
    return fold_in(key, th.arange(len(seen.keys)))


@every_algorithm
@pytest.mark.parametrize("perturb", ["policy", "all"])
@pytest.mark.parametrize("target_noise", ["independent", "same", "mean"])
def test_each_network_learns_under_the_noise_of_its_role(algorithm, target_noise, perturb):
    model = build(algorithm, gradient_steps=2, noise=dict(target_noise=target_noise, perturb=perturb))
    recorder = learn(model, 28)
    role_of_target = {"independent": TARGET, "same": ONLINE, "mean": None}[target_noise]
    nets = {"actor", "actor_target"} if algorithm in DETERMINISTIC else {"actor"}
    if perturb == "all":
        nets |= {"critic"} if algorithm is CrossQ else {"critic", "critic_target"}
    assert {seen.net for seen in recorder.learning} == nets
    for seen in recorder.learning:
        is_target = seen.net.endswith("_target") or (seen.net == "actor" and not seen.grad)
        role = role_of_target if is_target else ONLINE
        if role is None:
            assert seen.keys is None
        else:
            assert th.equal(seen.keys, expected_keys(model.policy, seen, role))
            assert seen.base_key == fold(model.policy._noise_seed, LEARNING_BASE, seen.step, role)
    assert any(seen.net == "actor_target" or not seen.grad for seen in recorder.learning)


@every_algorithm
def test_each_loss_of_the_actor_sees_fresh_keys_and_a_fresh_base(algorithm):
    recorder = learn(build(algorithm, gradient_steps=4), 28)
    seen = recorder.of("actor", grad=True)
    keys = th.cat([seen.keys for seen in seen])
    assert len(seen) > 5
    assert keys.unique().numel() == keys.numel()
    assert len({seen.base_key for seen in seen}) == len(seen)


@every_algorithm
def test_rows_of_target_and_online_networks_have_no_key_in_common(algorithm):
    recorder = learn(build(algorithm, noise=dict(perturb="all", target_noise="independent")))
    targets = [s for s in recorder.learning if s.net.endswith("_target") or (s.net == "actor" and not s.grad)]
    online = [s for s in recorder.learning if s.grad]
    assert targets and online
    assert np.intersect1d(th.cat([s.keys for s in targets]).numpy(), th.cat([s.keys for s in online]).numpy()).size == 0


@pytest.mark.parametrize("algorithm", [SAC, TD3, DDPG, TQC])
@pytest.mark.parametrize("share", [False, True])
def test_targets_have_the_numbers_of_the_networks_that_they_follow(algorithm, share):
    noise = dict(perturb="all", target_noise="same", share_features_extractor=share)
    model = build(algorithm, observation="image", policy="FlipoutCnnPolicy", noise=noise)
    policy = model.policy
    for name, followed in policy.targets:
        numbers = [[layer.noise_index for layer in layers_of(getattr(policy, net))] for net in (name, followed)]
        assert numbers[0] == numbers[1]
    once = {id(layer): layer.noise_index for net in (policy.actor, policy.critic) for layer in layers_of(net)}
    assert sorted(once.values()) == list(range(len(once)))  # of two networks' layers, no two have the same number
    shared = {id(layer) for layer in layers_of(policy.actor)} & {id(layer) for layer in layers_of(policy.critic)}
    assert len(shared) == (4 if share else 0)  # NatureCNN: three convolutions and a linear layer


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_same_target_noise_is_the_same_perturbation(algorithm):
    model = build(algorithm, noise=dict(perturb="all", target_noise="same"))
    model.learn(20)
    policy, obs, actions = model.policy, th.rand(4, 5), th.rand(4, 3)
    policy.critic_target.load_state_dict(policy.critic.state_dict())
    with policy.updating():
        one, other = policy.critic(obs, actions), policy.critic_target(obs, actions)
    assert all(th.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not th.equal(one[0], policy.critic(obs, actions)[0])


@pytest.mark.parametrize("algorithm", [SAC, TD3, TQC])
def test_a_member_is_the_same_in_a_target(algorithm):
    model = build(algorithm, noise=dict(perturb="all", members=5))
    recorder = learn(model)
    assert all(seen.keys.min() >= 0 and seen.keys.max() < 5 for seen in recorder.learning)
    for name, followed in model.policy.targets:
        pairs = zip(layers_of(getattr(model.policy, name)), layers_of(getattr(model.policy, followed)), strict=True)
        assert all(th.equal(one.bases()[1]["weight_base"], other.bases()[1]["weight_base"]) for one, other in pairs)


@every_algorithm
@pytest.mark.parametrize("share", [False, True])
def test_critics_see_mean_weights_unless_asked_for(algorithm, share):
    mlp = algorithm is CrossQ  # which has no policy for images
    case = {} if mlp else dict(observation="image", policy="FlipoutCnnPolicy")
    active = []
    for perturb in ("policy", "all"):
        model = build(algorithm, **case, noise=dict(perturb=perturb, share_features_extractor=share, target_noise="same"))
        for name, net in networks(model.policy).items():
            if name.startswith("critic"):
                layers = layers_of(net)
                assert (isinstance(net, LearnsUnderNoise) and net.is_perturbed) == (perturb == "all")
                assert bool(layers) == (perturb == "all" or (share and not mlp))
                # q1_forward does not go through the critic's own call, so the hook is on a network inside it.
                net.q_networks[0].register_forward_pre_hook(
                    lambda *_, perturb=perturb, layers=layers: active.append(
                        (perturb, [layer.row_view() is not None for layer in layers])
                    )
                )
        model.learn(20)
    assert {perturb for perturb, _ in active} == {"policy", "all"}
    for perturb, flags in active:
        assert all(flags) if perturb == "all" else not any(flags)


# ---- against the oracle ---------------------------------------------------------------------------------------------


def row_by_row(layer, keys):
    return lambda x: oracle.forward(layer, x.double(), keys, [1.0] * len(keys))


@every_algorithm
def test_each_row_of_a_gradient_step_sees_its_own_weights(algorithm):
    model = build(algorithm, batch_size=3, noise=dict(resample="episode", target_noise="independent"))
    model.learn(16)
    actor, compared = model.actor, []
    name = "forward" if algorithm in DETERMINISTIC else "get_action_dist_params"
    original = getattr(actor, name)

    recorder = Recorder()  # of the noise that each pass finds by itself
    actor.step_noise = recorder.learning_of("actor", actor, model.policy.learning)

    def compare(obs):
        twin = copied(actor).double()  # with batch normalisation in the same state
        outputs = original(obs)
        seen = recorder.learning[-1]
        twin.perturbed_network.redraw(seen.base_key)
        with th.no_grad(), twin.perturbed_network.activate(None):
            for layer in twin.perturbed_network.layers:
                layer.forward = row_by_row(layer, seen.keys)
            for own in (name, "step_noise"):
                del twin.__dict__[own]
            expected = getattr(twin, name)(obs)
        pairs = [(outputs, expected)] if name == "forward" else zip(outputs[:2], expected[:2], strict=True)
        compared.extend((th.is_grad_enabled(), float((a - b).detach().abs().max())) for a, b in pairs)
        return outputs

    setattr(actor, name, compare)
    model.train(gradient_steps=2, batch_size=3)
    assert len(compared) == len(recorder.learning) * (1 if name == "forward" else 2) > 0
    assert {grad for grad, _ in compared} == ({True} if algorithm in DETERMINISTIC else {True, False})
    assert max(difference for _, difference in compared) <= 1e-5


# ---- sigma ----------------------------------------------------------------------------------------------------------


def parameters_of(optimizer):
    return [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]


@every_algorithm
@pytest.mark.parametrize("perturb", ["policy", "all"])
@pytest.mark.parametrize("share", [False, True])
def test_optimizers_have_stocks_parameters_and_sigma_once(algorithm, perturb, share):
    kind = ("vector", "Mlp") if algorithm is CrossQ else ("image", "Cnn")
    noise = dict(share_features_extractor=share)
    case = dict(observation=kind[0], policy=f"Flipout{kind[1]}Policy")
    model = build(algorithm, **case, noise=dict(perturb=perturb, **noise))
    stock = build(algorithm, observation=kind[0], policy=f"{kind[1]}Policy", noise=noise)
    for name in ("actor", "critic"):
        net, plain = getattr(model.policy, name), getattr(stock.policy, name)
        names = {id(parameter): parameter_name for parameter_name, parameter in net.named_parameters()}
        stock_names = {id(parameter): parameter_name for parameter_name, parameter in plain.named_parameters()}
        own = [names[identity] for identity in parameters_of(net.optimizer)]
        expected = [stock_names[identity] for identity in parameters_of(plain.optimizer)]
        assert [n for n in own if not n.endswith("_sigma")] == expected
        sigmas = {n for n in own if n.endswith("_sigma")}
        perturbs = name == "actor" or perturb == "all"
        assert sigmas == {f"{n}_sigma" for n in expected if perturbs and f"{n}_sigma" in names.values()}
        assert bool(sigmas) == perturbs and len(own) == len(set(own))


@every_algorithm
def test_the_actors_loss_gives_sigma_its_gradient(algorithm):
    model = build(algorithm, noise=dict(perturb="all"))
    model.learn(40)
    for net in (model.actor, model.critic):
        for layer in layers_of(net):
            assert layer.weight_sigma.grad.abs().max() > 0 and layer.bias_sigma.grad.abs().max() > 0


@pytest.mark.parametrize("algorithm", [SAC, TD3, DDPG, TQC])
def test_sigma_of_targets_follows_by_polyak_averaging(algorithm):
    kwargs = dict(policy_delay=1) if algorithm is TD3 else {}
    model = build(algorithm, tau=0.3, learning_rate=1e-2, noise=dict(perturb="all"), **kwargs)
    model.learn(20)
    before = copied(model.policy)
    model.train(gradient_steps=1, batch_size=8)
    for name, followed in model.policy.targets:
        parts = [getattr(before, name), getattr(model.policy, followed), getattr(model.policy, name)]
        for old, online, target in zip(*(net.parameters() for net in parts), strict=True):
            assert th.allclose(target, 0.7 * old + 0.3 * online, atol=1e-6)
        for layer, old in zip(layers_of(parts[2]), layers_of(parts[0]), strict=True):
            assert not th.equal(layer.weight_sigma, old.weight_sigma)


@pytest.mark.parametrize("algorithm", [SAC, TD3, TQC, DQN])
def test_targets_begin_as_the_networks_that_they_follow(algorithm):
    noise = dict(init="noisynet", perturb="all")
    if algorithm is DQN:
        policy = DQN("FlipoutMlpPolicy", vector_env("discrete"), policy_kwargs=noise).policy
        pairs = [(policy.q_net, policy.q_net_target)]
    else:
        policy = build(algorithm, noise=noise).policy
        pairs = [(getattr(policy, followed), getattr(policy, name)) for name, followed in policy.targets]
    for one, other in pairs:
        assert all(th.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@every_algorithm
def test_noise_scale_reaches_acting_and_learning(algorithm):
    model = build(algorithm, noise=dict(target_noise="independent"))
    model.policy.noise_scale = 0.25
    recorder = learn(model)
    assert {float(scale) for scales in recorder.scales for scale in scales} == {0.25}
    assert {seen.scale for seen in recorder.learning} == {0.25}
    model.policy.noise_scale = 0.0
    obs = model.env.reset()
    if algorithm in STOCHASTIC:
        return  # their actions are drawn
    np.testing.assert_array_equal(model.predict(obs, deterministic=False)[0], model.predict(obs, deterministic=True)[0])


@every_algorithm
def test_mean_weights_learn_where_they_are_asked_for_by_name(algorithm):
    learned = []
    for by_name in (True, False):
        model = build(algorithm, noise=dict(perturb="all", target_noise="same"))
        model.learn(20)
        if not by_name:
            model.policy.noise_scale = 0.0
        np.random.seed(0)
        th.manual_seed(0)
        with perturbed(model.policy, None) if by_name else nullcontext():
            model.train(gradient_steps=1, batch_size=8)
        learned.append([mean for net in networks(model.policy).values() for layer in layers_of(net) for mean in layer.means()])
    for ours, expected in zip(*learned, strict=True):
        th.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_noise_activated_by_name_goes_before_that_of_gradient_steps():
    model = build(TD3)
    model.learn(20)
    obs = th.rand(3, 5)
    with perturbed(model.actor, th.arange(3)):
        outside = model.actor(obs)
        with model.policy.updating():
            assert th.equal(model.actor(obs), outside)
    with model.policy.updating():
        assert not th.equal(model.actor(obs), outside)
