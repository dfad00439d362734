"""FlipES: every environment plays under its member's weights, and what SB3's users do with a model works."""

import copy
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from generations import Fitness
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from sb3_flipout.callbacks import AdaptNoise, AnnealNoise, MonitorNoise, NoiseEvalCallback
from sb3_flipout.envs.vector import GymnasiumVecEnv
from sb3_flipout.evolution import FlipES
from sb3_flipout.evolution.playing import seed_of_environments
from sb3_flipout.evolution.policy import FlipESPolicy
from sb3_flipout.layers import effective_weight, flipout_layers


def build(env: Any = "CartPole-v1", n_envs: int = 4, policy: str = "FlipoutMlpPolicy", **kwargs: Any) -> FlipES:
    noise = dict(net_arch=[8], **kwargs.pop("noise", {}))
    env = make_vec_env(env, n_envs, seed=3) if isinstance(env, str) else env
    settings: dict[str, Any] = dict(population_size=8, seed=0, device="cpu", policy_kwargs=noise)
    return FlipES(policy, env, **{**settings, **kwargs})


def plays_by_hand(model: FlipES, group: Any, member: int, env: gym.Env[Any, Any], seed: int) -> float:
    """An episode of one member with its whole matrices written down."""
    with group.members():
        pass  # leaves its base drawn
    layers, key, c = flipout_layers([model.policy]), group.noise.keys[member], float(group.noise.scale[member])
    obs, total, over = env.reset(seed=seed)[0], 0.0, False
    while not over:
        h = th.as_tensor(obs)
        for number, layer in enumerate(layers):
            weight, bias = effective_weight(layer, key, c)
            h = weight @ h + bias
            h = h.tanh() if number + 1 < len(layers) else h
        obs, reward, terminated, truncated, _ = env.step(int(h.argmax()))
        total, over = total + float(reward), terminated or truncated
    return total


@pytest.mark.parametrize("sharing", ["flipout", "independent"])
def test_fitness_is_that_of_each_members_own_weights(sharing: str) -> None:
    model = build(n_envs=8, noise=dict(noise_sharing=sharing, sigma_init=1.0))
    twin, fitness = copy.deepcopy(model.policy), Fitness()
    model.learn(1, callback=fitness)
    again = build(n_envs=8, noise=dict(noise_sharing=sharing, sigma_init=1.0))
    assert all(th.equal(a, b) for a, b in zip(again.policy.parameters(), twin.parameters(), strict=True))
    (group,) = again.population.ask()
    seed = seed_of_environments(again.population.seed, 0, 0)
    expected = [plays_by_hand(again, group, member, gym.make("CartPole-v1"), seed + member) for member in range(8)]
    assert fitness.found[0].tolist() == expected and len(set(expected)) > 2


@pytest.mark.parametrize(("n_envs", "episodes", "bases"), [(4, 1, 1), (3, 2, 1), (16, 1, 1), (2, 1, 2), (1, 1, 1)])
def test_every_member_plays_its_episodes_and_no_more(n_envs: int, episodes: int, bases: int) -> None:
    """Rewards that name the member: what came back is its own, however environments are shared out."""

    class Told(gym.Env[np.ndarray, np.int64]):
        observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

        def reset(self, **kwargs: Any) -> Any:
            super().reset(**kwargs)
            self.left = int(self.np_random.integers(1, 5))
            return np.zeros(2, dtype=np.float32), {}

        def step(self, action: Any) -> Any:
            self.left -= 1
            counts["episodes"] += self.left == 0
            return np.zeros(2, dtype=np.float32), 1.0, self.left == 0, False, {}

    counts = {"episodes": 0}
    env = make_vec_env(lambda: Told(), n_envs, seed=1)  # type: ignore[arg-type, return-value]
    model, fitness = build(env, episodes_per_member=episodes, base_perturbations=bases), Fitness()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.learn(1, callback=fitness)
    (found,) = fitness.found
    assert found.shape == (8,) and bool((found >= 1).all()) and bool((found <= 4).all())
    assert counts["episodes"] >= 8 * episodes
    assert model.num_timesteps >= float(found.sum()) * episodes


def test_it_learns() -> None:
    env = VecMonitor(GymnasiumVecEnv(gym.make_vec("CartPole-v1", 64, vectorization_mode="vector_entry_point")))
    model = FlipES("FlipoutMlpPolicy", env, population_size=64, learning_rate=0.1, seed=0, device="cpu").learn(300_000)
    assert evaluate_policy(model, gym.make("CartPole-v1"), 10, warn=False)[0] > 200
    assert model.logger.name_to_value == {} and model.num_timesteps >= 300_000


@pytest.mark.parametrize("kind", ["box", "image", "dict"])
def test_continuous_actions_images_and_dictionaries(kind: str) -> None:
    class Any_(gym.Env[Any, Any]):
        action_space = spaces.Box(np.array([-1, 0], np.float32), np.array([3, 5], np.float32))
        observation_space: Any = {
            "box": spaces.Box(-1, 1, (3,)),
            "image": spaces.Box(0, 255, (36, 36, 1), np.uint8),
            "dict": spaces.Dict(a=spaces.Box(-1, 1, (3,)), b=spaces.Discrete(3)),
        }[kind]

        def reset(self, **kwargs: Any) -> Any:
            super().reset(**kwargs)
            self.steps = 0
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            self.steps += 1
            return self.observation_space.sample(), float(action[0] - action[1]), self.steps == 5, False, {}

    policy = {"box": "FlipoutMlpPolicy", "image": "FlipoutCnnPolicy", "dict": "FlipoutMultiInputPolicy"}[kind]
    model = build(make_vec_env(lambda: Any_(), 4, seed=0), policy=policy)  # type: ignore[arg-type, return-value]
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(60)
    moved = [not th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True) if b.requires_grad]
    assert any(moved)
    obs = model.env.reset()
    low, high = model.action_space.low, model.action_space.high
    actions = model.predict(obs, deterministic=True)[0]
    assert np.all(actions >= low) and np.all(actions <= high)


def test_a_saved_model_goes_on_with_the_same_generation(tmp_path: Path) -> None:
    model = build(noise=dict(sigma_init=0.7), base_perturbations=2).learn(300)
    model.save(tmp_path / "model")
    loaded = FlipES.load(tmp_path / "model", env=model.get_env(), device="cpu")
    assert loaded._n_updates == model._n_updates >= 2
    fitness = th.randn(8, generator=th.Generator().manual_seed(1))
    for one in (model, loaded):
        one.population.generation = one._n_updates
        one.population.scale = 1.0
    for a, b in zip(model.population.ask(), loaded.population.ask(), strict=True):
        assert th.equal(a.noise.keys, b.noise.keys) and a.base_key == b.base_key
    loaded.set_logger(model.logger)
    for one in (model, loaded):
        one._learn_from(fitness)
    for (name, a), b in zip(model.policy.named_parameters(), loaded.policy.parameters(), strict=True):
        assert th.equal(a, b), name
    assert np.array_equal(*(m.predict(np.ones(4, np.float32), deterministic=True)[0] for m in (model, loaded)))


def test_the_state_of_the_noise_is_saved_and_a_seed_changes_it(tmp_path: Path) -> None:
    model = build().learn(100)
    model.policy.noise_scale = 0.5
    model.save(tmp_path / "model")
    loaded, other = (FlipES.load(tmp_path / "model", env=model.get_env(), device="cpu", **kw) for kw in ({}, dict(seed=7)))
    assert loaded.policy.noise_scale == other.policy.noise_scale == 0.5
    assert not hasattr(model, "flipout_noise") and not hasattr(loaded, "flipout_noise")
    seeds = []
    for one in (model, loaded, other):
        one.learn(1, callback=(scales := Scale()))
        assert scales.scale == 0.5
        seeds.append(one.population.seed)
    assert seeds[0] == seeds[1] != seeds[2]
    model.set_random_seed(7)
    assert model.policy._noise_seed == other.policy._noise_seed


class Scale(BaseCallback):
    """Keeps the scale of the last generation."""

    scale = -1.0

    def _on_rollout_start(self) -> None:
        self.scale = self.model.population.scale  # type: ignore[attr-defined]

    def _on_step(self) -> bool:
        return True


def test_the_noise_falls_as_the_schedule_says() -> None:
    scales: list[float] = []

    class Scales(BaseCallback):
        def _on_rollout_start(self) -> None:
            scales.append(self.model.population.scale)  # type: ignore[attr-defined]

        def _on_step(self) -> bool:
            return True

    build(noise=dict(schedule="linear", schedule_fraction=1.0)).learn(600, callback=Scales())
    assert scales[0] == 1.0 and all(a > b for a, b in pairwise(scales)) and scales[-1] < 0.5


def test_rewards_of_normalised_environments_count_as_they_are() -> None:
    plain, normalised = Fitness(), Fitness()
    build(n_envs=8).learn(1, callback=plain)
    env = VecNormalize(make_vec_env("CartPole-v1", 8, seed=3), norm_obs=False, norm_reward=True)
    build(env).learn(1, callback=normalised)
    assert plain.found[0].tolist() == normalised.found[0].tolist()


def test_callbacks_of_sb3_work_and_can_stop_it(tmp_path: Path) -> None:
    evaluation = EvalCallback(make_vec_env("CartPole-v1"), eval_freq=20, n_eval_episodes=2, warn=False, verbose=0)
    checkpoints = CheckpointCallback(50, str(tmp_path))
    model = build().learn(400, callback=[evaluation, checkpoints])
    assert evaluation.last_mean_reward > 5 and list(tmp_path.glob("*.zip"))

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps < 40

    updates = model._n_updates
    stopped = model.learn(400, callback=Stop())
    assert stopped.num_timesteps == 40 and model._n_updates == updates
    model.learn(40)  # goes on with the generation that was broken off
    assert model._n_updates > updates


class Broken(gym.RewardWrapper[Any, Any]):
    """Has no reward in every third episode."""

    def reset(self, **kwargs: Any) -> Any:
        self.episode = getattr(self, "episode", 0) + 1
        return self.env.reset(**kwargs)

    def reward(self, reward: Any) -> Any:
        return float("nan") if self.episode % 3 == 0 else reward


def test_members_without_a_finite_fitness_are_dropped_and_it_is_said() -> None:
    model = build(make_vec_env(lambda: Broken(gym.make("CartPole-v1")), 2, seed=0))
    with pytest.warns(UserWarning, match=r"of 8 members were left out of the estimate: the returns of some are not finite"):
        model.learn(400)
    assert all(bool(th.isfinite(parameter).all()) for parameter in model.policy.parameters())


def test_where_all_are_equal_no_step_is_made_and_it_is_said() -> None:
    model = build(noise=dict(sigma_init=0.0))
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.env.seed(1)
    env = make_vec_env(lambda: gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda _: 0.0), 4, seed=0)
    model.set_env(env)
    with pytest.warns(UserWarning, match=r"all members of a generation had the same fitness"):
        model.learn(100)
    assert all(th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))


def test_callbacks_about_noise_work_or_say_why_not() -> None:
    evaluation = NoiseEvalCallback(make_vec_env("CartPole-v1", 2), eval_freq=20, n_eval_episodes=2, warn=False, verbose=0)
    model = build().learn(300, callback=[MonitorNoise(), AnnealNoise(1.0, 0.5), evaluation])
    assert model.policy.effective_scale == 0.5 and set(evaluation.returns) == {"mean", "sampled"}
    with pytest.raises(ValueError, match=r"AdaptNoise measures on observations of a .* buffer, and FlipES has none"):
        build().learn(100, callback=AdaptNoise(target=0.1))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(noise=dict(learn_sigma=True)), ValueError, "learn_sigma=True does not fit FlipES"),
        (dict(noise=dict(noise_sharing="shared")), ValueError, 'noise_sharing="shared" does not fit FlipES'),
        (dict(noise=dict(family="dropconnect", sigma_init=None)), ValueError, 'family="dropconnect" does not fit FlipES'),
        (dict(noise=dict(members=3)), TypeError, "members is for algorithms with a replay buffer"),
        (dict(noise=dict(nonsense=3)), TypeError, "nonsense"),
        (dict(population_size=7), ValueError, "size=7 must be a multiple of 2"),
        (dict(episodes_per_member=0), ValueError, "episodes_per_member must be an integer >= 1, got 0"),
        (dict(shaping="best"), ValueError, "shaping must be one of"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**kwargs)


def test_a_policy_of_another_kind_is_refused() -> None:
    from stable_baselines3.ppo import MlpPolicy

    with pytest.raises(TypeError, match="policy must be a FlipESPolicy, got ActorCriticPolicy"):
        FlipES(MlpPolicy, "CartPole-v1")  # type: ignore[arg-type]


def test_what_makes_no_sense_of_it_is_refused() -> None:
    policy = build().policy
    with pytest.raises(RuntimeError, match="FlipES estimates its gradient from returns"):
        policy.updating()
    with pytest.raises(ValueError, match="SB3 has no policy of this kind without noise"):
        policy.to_plain_policy()


def test_where_the_noise_has_fallen_no_step_is_made_and_it_is_said() -> None:
    model = build()
    model.policy.noise_scale = 0.0
    with pytest.warns(UserWarning, match="or the noise has fallen to 0, so no step was made"):
        model.learn(50)


def test_copies_of_the_policy_say_the_same() -> None:
    model = build().learn(100)
    obs = th.randn(5, 4)
    copied = copy.deepcopy(model.policy)
    assert isinstance(copied, FlipESPolicy) and th.equal(copied(obs), model.policy(obs))


def test_a_checkpoint_in_mid_generation_goes_on_with_it(tmp_path: Path) -> None:
    """With noise that falls, and statistics of observations: both are those of the generation's start."""

    def env(statistics: Path | None = None) -> Any:
        plain = make_vec_env("CartPole-v1", 4)
        return VecNormalize(plain, norm_reward=False) if statistics is None else VecNormalize.load(str(statistics), plain)

    noise = dict(sigma_init=1.0, schedule="linear", schedule_fraction=1.0)
    unbroken, resumed = Fitness(), Fitness()
    checkpoints = CheckpointCallback(23, str(tmp_path), "model", save_vecnormalize=True)
    whole = build(env(), noise=noise).learn(6000, callback=[unbroken, checkpoints])
    steps = sorted(int(path.stem.split("_")[1]) for path in tmp_path.glob("model_*_steps.zip"))
    for step in (steps[1], steps[len(steps) // 2]):
        statistics = tmp_path / f"model_vecnormalize_{step}_steps.pkl"
        loaded = FlipES.load(tmp_path / f"model_{step}_steps", env=env(statistics), device="cpu")
        assert loaded.env.training and loaded.num_timesteps < step
        resumed.found.clear()
        loaded.learn(6000 - loaded.num_timesteps, callback=resumed, reset_num_timesteps=False)
        expected = unbroken.found[-len(resumed.found) :]
        assert all(th.equal(a, b) for a, b in zip(resumed.found, expected, strict=True))
        pairs = zip(loaded.policy.parameters(), whole.policy.parameters(), strict=True)
        assert all(th.equal(a, b) for a, b in pairs) and len(resumed.found) > 1


def test_discrete_actions_start_where_the_space_does() -> None:
    class Shifted(gym.Env[Any, Any]):
        observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(3, start=5)

        def reset(self, **kwargs: Any) -> Any:
            return np.zeros(2, dtype=np.float32), {}

        def step(self, action: Any) -> Any:
            assert self.action_space.contains(action)
            return np.zeros(2, dtype=np.float32), float(action), True, False, {}

    build(make_vec_env(lambda: Shifted(), 4), noise=dict(sigma_init=5.0)).learn(1)  # type: ignore[arg-type, return-value]


def test_only_episodes_of_members_are_logged() -> None:
    model = build(n_envs=16, population_size=2)
    model.learn(1)
    assert len(model.ep_info_buffer) == 2  # type: ignore[arg-type]
