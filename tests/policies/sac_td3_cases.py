"""Small off-policy actor-critics, and a recorder of the noise under which their networks run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch as th
from helpers import vector_env
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.callbacks import BaseCallback

from sb3_flipout.layers import Ask, FlipoutLayer
from sb3_flipout.noise import RowNoise
from sb3_flipout.policies.learning import LearnsUnderNoise

ALGORITHMS = [SAC, TD3, DDPG, TQC, CrossQ]
#: Those whose actor gives a distribution, and which ask the online actor for the actions of the target.
STOCHASTIC = [SAC, TQC, CrossQ]
DETERMINISTIC = [TD3, DDPG]


def build(
    algorithm: Any = SAC,
    n_envs: int = 2,
    observation: str = "vector",
    policy: str = "FlipoutMlpPolicy",
    noise: dict[str, Any] | None = None,
    env: Any = None,
    **kwargs: Any,
) -> Any:
    """A model with networks of eight units."""
    arguments = dict(learning_starts=8, batch_size=8, buffer_size=200, train_freq=2, gradient_steps=1, seed=1)
    env = vector_env("box", n_envs, observation=observation) if env is None else env
    net_arch = dict(pi=[8, 8], qf=[8, 8])
    return algorithm(policy, env, **{**arguments, **kwargs}, policy_kwargs={"net_arch": net_arch, **(noise or {})})


def layers_of(module: Any) -> list[FlipoutLayer]:
    return [layer for layer in module.modules() if isinstance(layer, FlipoutLayer)]


def networks(policy: Any) -> dict[str, Any]:
    """The networks of a policy by name; CrossQ has no targets."""
    names = ("actor", "actor_target", "critic", "critic_target")
    return {name: net for name in names if isinstance(net := getattr(policy, name, None), th.nn.Module)}


class Seen(NamedTuple):
    """One pass through a network while SB3 trains."""

    net: str
    step: int
    grad: bool
    keys: th.Tensor | None
    scale: float | None
    base_key: int

    def same(self, other: Seen) -> bool:
        if self.keys is None or other.keys is None:  # mean weights, which have no base
            return self._replace(base_key=0) == other._replace(base_key=0)
        return th.equal(self.keys, other.keys) and self._replace(keys=None) == other._replace(keys=None)


class Recorder(BaseCallback):
    """Keys, scales and bases of every acting step, of every pass in a gradient step, and the ends of episodes."""

    def __init__(self) -> None:
        super().__init__()
        self.acting: list[th.Tensor] = []
        self.scales: list[th.Tensor] = []
        self.acting_bases: list[tuple[float, ...]] = []
        self.learning: list[Seen] = []
        self.dones: list[np.ndarray] = []

    def _init_callback(self) -> None:
        policy = self.model.policy
        policy.perturbed_network.activate = self._acting(policy, policy.perturbed_network.activate)
        for name, net in networks(policy).items():
            if isinstance(net, LearnsUnderNoise):
                net.step_noise = self.learning_of(name, net, policy.learning)

    def _acting(self, policy: Any, activate: Any) -> Any:
        def record(noise: Any, *args: Any) -> Any:
            if policy._acting_noise is not None:
                self.acting.append(noise.keys.clone())
                self.scales.append(noise.scale.clone())
                base = policy.perturbed_network.layers[0].bases()[1].get("weight_base")
                self.acting_bases.append(() if base is None else tuple(base.flatten().tolist()))
            return activate(noise, *args)

        return record

    def learning_of(self, name: str, net: Any, learning: Any) -> Any:
        """Record what the layers of a network see inside each of its passes; several networks can share them."""
        step_noise = net.step_noise

        @contextmanager
        def record(*args: Any, **kwargs: Any) -> Iterator[None]:
            network = net.perturbed_network
            asks = learning.active and network.active is None
            with step_noise(*args, **kwargs):
                if asks:
                    noise, base_key = network.active, network.layers[0].base_key
                    keys, scale = (noise.keys.clone(), float(noise.scale[0])) if isinstance(noise, RowNoise) else (None, None)
                    assert keys is not None or noise is Ask.MEAN_WEIGHTS
                    self.learning.append(Seen(name, learning.step, th.is_grad_enabled(), keys, scale, base_key))
                yield

        return record

    def _on_step(self) -> bool:
        self.dones.append(self.locals["dones"].copy())
        return True

    def of(self, net: str, grad: bool | None = None) -> list[Seen]:
        return [seen for seen in self.learning if seen.net == net and grad in (None, seen.grad)]


def interrupted(model: Any, folder: Any) -> tuple[Recorder, Recorder, Any]:
    """Learn for 32 steps, save, load, and learn for 32 more: what was seen before and after, and the loaded model."""
    first = learn(model, 32)
    model.save(folder / "model")
    model.save_replay_buffer(folder / "buffer")
    loaded = type(model).load(folder / "model", env=vector_env("box", 2))
    loaded.load_replay_buffer(folder / "buffer")
    return first, learn(loaded, 32, reset_num_timesteps=False), loaded


def learn(model: Any, steps: int = 40, **kwargs: Any) -> Recorder:
    recorder = Recorder()
    model.learn(steps, callback=[recorder, *kwargs.pop("callback", [])], **kwargs)
    return recorder
