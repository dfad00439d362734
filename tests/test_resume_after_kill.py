"""A training that is killed goes on from its last checkpoint, with the noise it would have had.

Run as a script, this file is the training that gets killed: `python test_resume_after_kill.py SETUP FOLDER`.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch as th
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack
from torch.utils.hooks import RemovableHandle

from sb3_flipout import Checkpoints, resume
from sb3_flipout.envs import atari_id
from sb3_flipout.layers import FlipoutLayer

N_ENVS, LONG = 2, 10**6
Records = dict[tuple[str, int], Any]  # (whose noise, step of its counter) -> keys of the rows and base of each layer


@dataclass(frozen=True)
class Setup:
    """A training, and when it is killed. Steps are those of both environments together."""

    env: Callable[[], VecEnv]
    policy: str
    policy_kwargs: dict[str, Any]
    algorithm: dict[str, Any]
    save_every: int
    kill_at: int
    go_on_for: int

    def model(self) -> DQN:
        # Four steps of two environments between updates: no checkpoint comes where an update has just been.
        common = dict(train_freq=4, exploration_initial_eps=0.0, exploration_final_eps=0.0, seed=0, device="cpu")
        return DQN(self.policy, self.env(), policy_kwargs=self.policy_kwargs, **self.algorithm, **common)


SETUPS = {
    "cartpole": Setup(
        lambda: make_vec_env("CartPole-v1", n_envs=N_ENVS, seed=0),
        "FlipoutMlpPolicy",
        dict(net_arch=[16], base_every_steps=7, schedule="constant"),
        dict(batch_size=8, buffer_size=20_000, learning_starts=40, gradient_steps=2),
        save_every=150,
        kill_at=620,
        go_on_for=200,
    ),
    "pong": Setup(  # 2,500 steps of four frames each before it is killed
        lambda: VecFrameStack(make_atari_env(atari_id("PongNoFrameskip-v4"), n_envs=N_ENVS, seed=0), 4),
        "FlipoutCnnPolicy",
        dict(layers="linear", base_every_steps=50, schedule="constant"),
        dict(batch_size=8, buffer_size=600, learning_starts=100, gradient_steps=1),
        save_every=902,
        kill_at=2500,
        go_on_for=900,
    ),
}


@contextmanager
def recorded(model: DQN, path: Path) -> Iterator[None]:
    """Write down, line by line, under which noise the networks run."""
    policy = model.policy

    def attach(net: Any, role: str, out: TextIO) -> RemovableHandle:
        layers = [layer for layer in net.modules() if isinstance(layer, FlipoutLayer)]

        def seen(layer: FlipoutLayer, _: Any) -> None:
            assert layer.row_view() is not None, "nothing here runs by mean weights"
            learning = policy.learning.active
            name, step = (role, policy.learning.step) if learning else ("acting", policy._keys.step - 1)
            bases = [
                (one.bases()[1]["weight_base"].flatten()[:4].tolist(), one.bases()[1]["bias_base"][:2].tolist())
                for one in layers
            ]
            out.write(json.dumps([name, step, layer.row_view().noise.keys.tolist(), bases]) + "\n")
            out.flush()

        return layers[-1].register_forward_pre_hook(seen)

    with path.open("w") as out:
        hooks = [attach(policy.online, "learning", out), attach(policy.target, "target", out)]
        yield
        for hook in hooks:
            hook.remove()


def records(path: Path) -> Records:
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last one may be half a line
    return {(name, step): noise for name, step, *noise in map(json.loads, lines)}


def train(setup: Setup, folder: Path, steps: int) -> DQN:
    model = setup.model()
    callback = Checkpoints(folder / "checkpoints", setup.save_every)
    with recorded(model, folder / "noise.jsonl"):
        return model.learn(steps, callback=callback)


def killed(name: str, folder: Path) -> None:
    """Train in another process and kill it in mid-training, some time after its last checkpoint."""
    acting = SETUPS[name].kill_at // N_ENVS
    with (folder / "errors.txt").open("w") as errors:
        child = subprocess.Popen([sys.executable, __file__, name, str(folder)], stdout=errors, stderr=errors)
        try:
            while child.poll() is None and ("acting", acting) not in records(folder / "noise.jsonl"):
                time.sleep(0.1)
        finally:
            child.kill()
    assert child.wait() == -signal.SIGKILL, (folder / "errors.txt").read_text()


def from_step(noise: Records, starts: dict[str, int]) -> Records:
    return {(name, step): value for (name, step), value in noise.items() if step >= starts[name]}


@pytest.mark.parametrize("name", ["cartpole", pytest.param("pong", marks=pytest.mark.slow)])
def test_killed_training_goes_on(name: str, tmp_path: Path) -> None:
    setup = SETUPS[name]
    first, whole = tmp_path / "first", tmp_path / "whole"
    first.mkdir()
    whole.mkdir()
    killed(name, first)
    before = records(first / "noise.jsonl")
    died_at = N_ENVS * max(step for whose, step in before if whose == "acting")

    # A disk may have lost the end of the newest one.
    checkpoints = first / "checkpoints"
    newest, damaged = max(checkpoints.glob("step-*")), checkpoints / f"step-{LONG:012d}"
    shutil.copytree(newest, damaged)
    (damaged / "model.zip").write_bytes((newest / "model.zip").read_bytes()[:1000])
    with pytest.warns(UserWarning, match="is not whole"):
        model = resume(checkpoints, setup.env())
    assert isinstance(model, DQN)
    loaded, updates = model.num_timesteps, model.policy.learning.step
    assert 0 <= died_at - loaded < 2 * setup.save_every + N_ENVS  # the newest one, or it died while writing that
    assert loaded % setup.save_every == 0
    # SB3 stores a step after the callback that saves it.
    buffer, stored = model.replay_buffer, loaded // N_ENVS - 1
    assert (buffer.pos, buffer.full) == (stored % buffer.buffer_size, stored >= buffer.buffer_size)
    assert abs(buffer.observations[: buffer.size()].astype(float)).sum(axis=tuple(range(1, buffer.observations.ndim))).all()
    assert 0 < updates < model.policy._keys.step

    with recorded(model, tmp_path / "resumed.jsonl"):
        model.learn(died_at + setup.go_on_for - loaded, reset_num_timesteps=False)
    assert model.num_timesteps >= died_at + setup.go_on_for
    assert model.replay_buffer.pos == (stored + (model.num_timesteps - loaded) // N_ENVS) % buffer.buffer_size
    assert model.policy.learning.step > updates + setup.go_on_for // 16

    train(setup, whole, model.num_timesteps)
    uninterrupted, resumed = records(whole / "noise.jsonl"), records(tmp_path / "resumed.jsonl")
    starts = {"acting": loaded // N_ENVS, "learning": updates, "target": updates}
    assert resumed == expected_of(uninterrupted, starts, resumed)
    assert from_step(before, starts).items() <= resumed.items()  # what the killed process did after its checkpoint
    for whose in starts:
        assert len({json.dumps(noise) for (of, _), noise in resumed.items() if of == whose}) > 20  # it is no constant


def expected_of(uninterrupted: Records, starts: dict[str, int], resumed: Records) -> Records:
    """The noise of the same steps, without a gap from the checkpoint on."""
    ends = {whose: max(step for of, step in resumed if of == whose) for whose in starts}
    return {(whose, step): uninterrupted[whose, step] for whose in starts for step in range(starts[whose], ends[whose] + 1)}


if __name__ == "__main__":
    th.set_num_threads(1)
    train(SETUPS[sys.argv[1]], Path(sys.argv[2]), LONG)
