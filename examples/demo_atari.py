"""Atari demo: DQN that explores Pong by weight noise, on real frames; run by `make demo-atari`.

    pip install '.[atari]'
    python examples/demo_atari.py [--minutes 3] [--steps 30000] [--out demo_output/atari]

Trains for a few minutes with "FlipoutCnnPolicy" and without epsilon-greedy: the noise in the linear layers is all the
exploration there is. Then plays with the mean weights (`deterministic=True`) and films it. Leaves the model, TensorBoard
logs and a GIF, and says where each of them lies. It needs less than 2 GB of memory.

A few minutes on a CPU do not make a good player: that takes about ten million steps (zoo_configs/dqn.yml).
"""

import argparse
import time
from pathlib import Path

import torch as th
from PIL import Image
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from sb3_flipout.envs import atari_id  # importing the package gives DQN the policy names "FlipoutCnnPolicy" and so on

try:
    ENV = atari_id("PongNoFrameskip-v4")
except ImportError as error:
    raise SystemExit(f"This demo cannot run. {error}") from None
N_ENVS = 8
FRAMES_PER_SECOND = 15  # the game's 60, of which the agent sees every fourth
MS_PER_FRAME = 70  # GIF knows hundredths of a second only

# rl_zoo3's hyperparameters for Atari, but for a short run: a small buffer and an early start of learning.
DQN_SETTINGS = dict(
    learning_rate=1e-4,
    batch_size=32,
    buffer_size=20_000,  # stacks of four uint8 frames, 28 kB each
    learning_starts=1000,
    target_update_interval=1000,
    train_freq=1,  # of all eight environments,
    gradient_steps=2,  # so one gradient step for four frames
    optimize_memory_usage=True,  # every stack is stored once, not as an observation and again as the next one
    replay_buffer_kwargs=dict(handle_timeout_termination=False),  # which SB3 asks for then
    exploration_initial_eps=0.0,
    exploration_final_eps=0.0,
    device="cpu",
)


class Deadline(BaseCallback):
    """Stop training when the time is over, and write the last logs."""

    def __init__(self, minutes: float) -> None:
        super().__init__()
        self.seconds = 60 * minutes
        self.end = float("inf")

    def _on_training_start(self) -> None:
        self.end = time.perf_counter() + self.seconds

    def _on_step(self) -> bool:
        return time.perf_counter() < self.end

    def _on_training_end(self) -> None:
        self.model.dump_logs()


def pong(n_envs: int, seed: int, **wrapper_kwargs: bool) -> VecEnv:
    return VecFrameStack(make_atari_env(ENV, n_envs=n_envs, seed=seed, wrapper_kwargs=wrapper_kwargs), n_stack=4)


def train(out: Path, minutes: float, steps: int, seed: int) -> DQN:
    """Train until the time is over or the steps are done, and save the model."""
    policy_kwargs = dict(layers="linear")  # convolutions stay without noise, as in NoisyNet
    model = DQN(
        "FlipoutCnnPolicy",
        pong(N_ENVS, seed),
        policy_kwargs=policy_kwargs,
        seed=seed,
        tensorboard_log=str(out / "tensorboard"),
        **DQN_SETTINGS,
    )
    print(f"FlipoutCnnPolicy: training on {ENV} for {minutes:g} minutes, {steps} steps at most")
    start = time.perf_counter()
    model.learn(steps, callback=Deadline(minutes), tb_log_name="flipout", progress_bar=True)
    seconds = time.perf_counter() - start
    print(f"FlipoutCnnPolicy: {model.num_timesteps} steps in {seconds:.0f} s, {model.num_timesteps / seconds:.0f} steps/s")
    model.save(out / "flipout_dqn_pong.zip")
    return model


def film(model: DQN, path: Path, frames: int, seed: int) -> float:
    """Play with the mean weights, write the colour frames as a GIF, and return the points of that stretch."""
    env = pong(1, seed, clip_reward=False)
    pictures, points, observation = [], 0.0, env.reset()
    for _ in range(frames):
        pictures.append(Image.fromarray(env.get_images()[0]))
        action, _ = model.predict(observation, deterministic=True)
        observation, reward, _, _ = env.step(action)
        points += float(reward[0])
    env.close()
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=MS_PER_FRAME, loop=0)
    return points


def main() -> None:
    """Train, play, and say where everything lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0, help="training time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30_000, help="most environment steps (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=600, help="frames of the GIF (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_output/atari"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    th.set_num_threads(1)

    model = train(out, arguments.minutes, arguments.steps, arguments.seed)
    gif = out / "pong.gif"
    points = film(model, gif, arguments.frames, arguments.seed + 1000)
    print(f"""
model           {out / "flipout_dqn_pong.zip"}
film            {gif}
logs            {out / "tensorboard"}

See the logs:   tensorboard --logdir {out / "tensorboard"}

The film shows {arguments.frames / FRAMES_PER_SECOND:.0f} s of the game played by the mean weights: {points:+g} points.
So few steps do not make a good player, and the score says nothing about the method: DQN needs about ten million steps for
Pong. zoo_configs/dqn.yml has the settings, and the command.
""")


if __name__ == "__main__":
    main()
