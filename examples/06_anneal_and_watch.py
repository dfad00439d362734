"""Steer the noise and watch it: PPO finds the goal of MountainCarContinuous-v0, and the mean weights learn it.

    python examples/06_anneal_and_watch.py [--steps 40000] [--seed 0] [--constant] [--logs logs]

The reward is +100 at the goal and minus the squared action on the way: an agent that never gets there learns to stand still.
Noise that is held for an episode pushes the car the same way for many steps, so the goal is reached within the first few
episodes. But under noise that stays, perturbed policies alone succeed, and nothing asks the mean weights to; --constant
shows it. `AnnealNoise` takes the noise away over the first five eighths of the training, and the mean weights have to learn.

You should see the step of the first success (stock PPO: after 3,000 to 11,000), and the return of the mean weights beside
that of sampled ones, evaluation by evaluation. `tensorboard --logdir logs` shows how the noise shrinks, and what it does.
"""

import argparse

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_flipout.callbacks import AnnealNoise, MonitorNoise, NoiseEvalCallback

ENV = "MountainCarContinuous-v0"
SETTINGS = dict(
    n_steps=256,
    batch_size=256,
    gamma=0.9999,
    gae_lambda=0.9,
    clip_range=0.1,
    ent_coef=0.004,
    vf_coef=0.19,
    max_grad_norm=5,
    device="cpu",
)
NOISE = dict(sigma_init=1.0, resample="episode")  # docs/choosing.md has what does best: sigma 2, falling over 60 %


class FirstSuccess(BaseCallback):
    """Note the step of the first success."""

    step: int | None = None

    def _on_step(self) -> bool:
        for done, info in zip(self.locals["dones"], self.locals["infos"], strict=True):
            if done and not info["TimeLimit.truncated"] and self.step is None:
                self.step = self.num_timesteps
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000, help="environment steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--constant", action="store_true", help="leave the noise as it is")
    parser.add_argument("--logs", default="logs", help="folder for tensorboard (default: %(default)s)")
    arguments = parser.parse_args()
    th.set_num_threads(1)  # the nets are small

    env = VecNormalize(make_vec_env(ENV, n_envs=4, seed=arguments.seed))
    noise = {**NOISE, "schedule": "constant"} if arguments.constant else NOISE
    model = PPO("FlipoutMlpPolicy", env, seed=arguments.seed, policy_kwargs=noise, tensorboard_log=arguments.logs, **SETTINGS)
    test_env = VecNormalize(make_vec_env(ENV, n_envs=4, seed=1000 + arguments.seed), training=False, norm_reward=False)
    every = max(arguments.steps // 8 // env.num_envs, 1)
    judge = NoiseEvalCallback(test_env, n_eval_episodes=8, eval_freq=every, verbose=0)
    success, anneal = FirstSuccess(), AnnealNoise(1.0, 0.02, fraction=0.625)
    model.learn(arguments.steps, callback=[success, MonitorNoise(), judge, *([] if arguments.constant else [anneal])])

    print(f"first success: {'none' if success.step is None else f'step {success.step}'} of {model.num_timesteps}")
    print("evaluation   mean weights   sampled weights")
    for number, (mean, sampled) in enumerate(zip(judge.returns["mean"], judge.returns["sampled"], strict=True), start=1):
        print(f"{number:10d}   {mean:12.1f}   {sampled:15.1f}")
    print(f"noise scale at the end: {model.policy.noise_scale:g}")


if __name__ == "__main__":
    main()
