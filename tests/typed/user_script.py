"""A user's script with the README's lines, for mypy --strict and pyright: no error, and each wrong word is one.

Lines that must be errors carry an ignore, and an ignore that nothing needs is an error itself.
"""

from __future__ import annotations

import numpy as np
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

import sb3_flipout
from sb3_flipout.callbacks import AdaptNoise, AnnealNoise, MonitorNoise, NoiseEvalCallback, StopOnNonFinite
from sb3_flipout.policies import FlipoutActorCriticPolicy, FlipoutDQNPolicy


def main() -> None:
    env = make_vec_env("CartPole-v1", n_envs=4)
    model = PPO("FlipoutMlpPolicy", env, policy_kwargs=dict(sigma_init=0.5, resample="step", layers="all"))
    policy = sb3_flipout.flipout_policy(model)
    policy.noise_scale = 0.5
    policy.noise_ladder = (0.5, 1.0, 1.0, 2.0)
    policy.reseed_noise(3)
    plain = policy.to_plain_policy()
    plain.predict(np.zeros(4, np.float32))
    model.learn(1_000, [AnnealNoise(1.0, 0.02, fraction=0.5), MonitorNoise(), StopOnNonFinite("last_good.zip")])
    model.learn(1_000, [AdaptNoise(target=0.1, measure="kl"), NoiseEvalCallback(env, best_by="mean")])

    dqn = DQN("FlipoutMlpPolicy", env, policy_kwargs=dict(members=10, prior_scale=0.35))
    members = sb3_flipout.flipout_policy(dqn)
    assert isinstance(members, FlipoutDQNPolicy)
    values: torch.Tensor = members.member_values(np.zeros((1, 4), np.float32))
    print(values.shape, members.members)

    net = sb3_flipout.perturb(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2)), family="gaussian", sigma_init=0.1)
    keys = torch.arange(3)
    with sb3_flipout.perturbed(net, keys):
        print(net(torch.rand(3, 4)))
    sb3_flipout.redraw(net, 5)
    sb3_flipout.restore(net)
    print(sb3_flipout.FlipoutLinear(4, 2, noise_sharing="independent"))


def wrong() -> None:
    env = make_vec_env("CartPole-v1")
    spaces = env.observation_space, env.action_space
    FlipoutActorCriticPolicy(*spaces, lambda _: 1e-3, resample="steps")  # type: ignore[arg-type]
    FlipoutActorCriticPolicy(*spaces, lambda _: 1e-3, family="gausian")  # type: ignore[arg-type]
    FlipoutActorCriticPolicy(*spaces, lambda _: 1e-3, perturb="linear")  # type: ignore[arg-type]
    FlipoutActorCriticPolicy(*spaces, lambda _: 1e-3, layers="conv")  # type: ignore[arg-type]
    FlipoutActorCriticPolicy(*spaces, lambda _: 1e-3, schedule="linaer")  # type: ignore[arg-type]
    FlipoutDQNPolicy(*spaces, lambda _: 1e-3, target_noise="none")  # type: ignore[arg-type]
    sb3_flipout.perturb(nn.Linear(2, 2), family="gausian")  # type: ignore[arg-type]
    sb3_flipout.perturb(nn.Linear(2, 2), layers="conv")  # type: ignore[arg-type]
    sb3_flipout.FlipoutLinear(2, 2, noise_sharing="both")  # type: ignore[arg-type]
    AnnealNoise(1.0, 0.0, shape="sine")  # type: ignore[arg-type]
    AdaptNoise(target=0.1, measure="KL")  # type: ignore[arg-type]
    NoiseEvalCallback(env, best_by="best")  # type: ignore[arg-type]
    model = PPO("FlipoutMlpPolicy", env)
    sb3_flipout.flipout_policy(model).noise_scale = "1"  # type: ignore[assignment]


if __name__ == "__main__":
    main()
