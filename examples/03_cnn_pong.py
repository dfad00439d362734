"""Weight noise in convolutions: PPO with "FlipoutCnnPolicy" on real frames of Atari Pong.

    pip install '.[atari]'
    python examples/03_cnn_pong.py [--steps 512]

You should see how much of the network is perturbed, that environments which look at the same frame act by different
probabilities (all convolution and linear layers differ by the row's key), and a short training run that moves sigma.
A few hundred steps do not teach Pong; that takes millions. zoo_configs/ppo.yml has the settings for it.
"""

import argparse
import time

try:
    import ale_py
    import gymnasium as gym

    gym.register_envs(ale_py)
except ImportError:
    raise SystemExit("This example needs the Atari games: pip install 'sb3_flipout[atari]'") from None

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

import sb3_flipout
from sb3_flipout.layers import FlipoutConv2d, FlipoutLinear

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=512, help="environment steps (default: %(default)s)")
steps = parser.parse_args().steps
th.set_num_threads(1)

env = VecFrameStack(make_atari_env("PongNoFrameskip-v4", n_envs=4, seed=0), n_stack=4)
learned = dict(learn_sigma=True, schedule="constant")  # with PPO sigma is fixed by default, and the noise falls
sizes = dict(n_steps=64, batch_size=64, n_epochs=2)
model = PPO("FlipoutCnnPolicy", env, learning_rate=2.5e-4, policy_kwargs=learned, seed=0, device="cpu", **sizes)
policy = model.policy

# A perturbed network is the plain one with other layer classes: print(policy) shows all of it.
layers = [module for module in policy.modules() if isinstance(module, (FlipoutConv2d, FlipoutLinear))]
print(f"PongNoFrameskip-v4, observations {model.observation_space.shape}, {model.n_envs} environments")
print(f"perturbed layers: {', '.join(type(layer).__name__ for layer in layers)}")

# One frame, shown to four rows with their own keys.
frame = th.as_tensor(model.get_env().reset()[:1]).repeat(4, 1, 1, 1)
with th.no_grad(), sb3_flipout.perturbed(policy, th.arange(4)):
    noisy = policy.get_distribution(frame).distribution.probs
with th.no_grad(), sb3_flipout.perturbed(policy, None):
    mean = policy.get_distribution(frame).distribution.probs
for name, probabilities in [("own keys", noisy), ("mean weights", mean)]:
    print(f"probability of action 0 on the same frame, {name:13s}", [round(p, 4) for p in probabilities[:, 0].tolist()])

before = {layer: layer.weight_sigma.detach().clone() for layer in layers}
start = time.perf_counter()
model.learn(steps)
seconds = time.perf_counter() - start
print(f"{model.num_timesteps} steps in {seconds:.1f} s, {model.num_timesteps / seconds:.0f} steps/s")
for layer in layers:
    name, sigma = type(layer).__name__, layer.weight_sigma.detach()
    change = (sigma - before[layer]).abs().mean() / before[layer].abs().mean()
    print(f"  {name:14s} {tuple(layer.weight.shape)!s:18s} mean sigma {sigma.mean():.4f}, changed by {change:.2%}")
