"""Noise keys by hand: how one integer per row gives every row its own weights, and how PPO's update finds them again.

    python examples/02_keys_and_replay.py [--steps 256]

Flipout (Wen et al. 2018, eq. (3)): row n of a batch sees the weights  W + delta * outer(r_n, s_n), where the base
perturbation delta is shared and the sign vectors r_n and s_n are hashed from the row's key. So a key is all that has to
be stored to see the same weights again: PPO's rollout buffer keeps one for each transition.

You should see the weights of two rows, that equal keys give equal outputs, the keys of a rollout, and the ratios of PPO's
update before its first optimiser step: 1 with the stored keys, far from it with other ones or with the mean weights.
"""

import argparse

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from torch import nn

from sb3_flipout import perturb, perturbed, signs
from sb3_flipout.layers import effective_weight


def one_layer() -> None:
    """What two rows see in one layer."""
    th.manual_seed(0)
    layer = perturb(nn.Linear(3, 2), sigma_init=0.5)
    keys = th.tensor([11, 22, 11])
    s, r = signs(keys, layer.noise_index, 3, vector=0), signs(keys, layer.noise_index, 2, vector=1)
    delta = layer.deltas()[0]  # sigma * base draw

    print("1. One layer, three rows with the keys 11, 22, 11")
    print(f"   mean weights W            {rounded(layer.weight)}")
    print(f"   base perturbation delta   {rounded(delta)}")
    for row in range(2):
        weight, _ = effective_weight(layer, int(keys[row]))
        assert th.allclose(weight, layer.weight + delta * th.outer(r[row], s[row]))
        print(f"   key {keys[row]}: r = {signed(r[row])}, s = {signed(s[row])}, weights {rounded(weight)}")

    x = th.ones(3, 3)
    with perturbed(layer, keys):
        y = layer(x)
    with perturbed(layer, keys[:1]):
        alone = layer(x[:1])
    print(f"   outputs for equal inputs  {rounded(y)}")
    print(f"   rows 0 and 2 equal: {th.equal(y[0], y[2])}; row 1 another: {not th.equal(y[0], y[1])}")
    print(f"   row 0 in a batch of its own, difference: {difference(alone[0], y[0]):.1e}")


class FirstRatios(BaseCallback):
    """Compute PPO's ratios on its own buffer, after the rollout and before the update."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer, policy = self.model.rollout_buffer, self.model.policy
        print(f"\n2. The rollout buffer ({type(buffer).__name__}): one key per transition, shape {buffer.noise_keys.shape}")
        for step in range(3):
            print(f"   step {step}: {'  '.join(f'{key:20d}' for key in buffer.noise_keys[step])}")
        print(f"   {len(set(buffer.noise_keys.ravel()))} different keys in {buffer.noise_keys.size} transitions")

        batch = next(buffer.get(batch_size=None))  # all transitions, shuffled, as PPO gets them

        def ratios() -> th.Tensor:
            with th.no_grad():
                log_prob = policy.evaluate_actions(batch.observations, batch.actions.flatten())[1]
            return th.exp(log_prob - batch.old_log_prob)

        print("\n3. PPO's ratios before the first optimiser step, largest difference from 1")
        print(f"   stored keys   {difference(ratios(), 1.0):.1e}")
        with perturbed(policy, batch.observations.row_noise.keys.flip(0)):
            print(f"   other keys    {difference(ratios(), 1.0):.1e}")
        with perturbed(policy, None):
            print(f"   mean weights  {difference(ratios(), 1.0):.1e}")


def rounded(values: th.Tensor) -> list[float]:
    return [[round(value, 2) for value in row] for row in values.tolist()]


def signed(values: th.Tensor) -> str:
    return "".join("+" if value > 0 else "-" for value in values)


def difference(values: th.Tensor, others: th.Tensor | float) -> float:
    return (values - others).abs().max().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256, help="length of the rollout (default: %(default)s)")
    steps = parser.parse_args().steps
    th.set_num_threads(1)

    one_layer()
    env = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    model = PPO("FlipoutMlpPolicy", env, n_steps=steps // 4, batch_size=64, seed=0, device="cpu")
    model.learn(steps, callback=FirstRatios())
