"""Checkpoints are whole or not there; training goes on from the newest that is whole, and loses no more than came since.

Run as a script, this file is the training that gets killed: `python test_checkpoints.py ALGORITHM FOLDER`.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

import sb3_flipout
from sb3_flipout import Checkpoints, resume
from sb3_flipout.checkpoints.files import description, write_description

EVERY = 64


def build(algorithm: Any = DQN, env: Any = "CartPole-v1", **kwargs: Any) -> Any:
    off_policy = dict(buffer_size=2000, learning_starts=40, batch_size=16, train_freq=4)
    settings: dict[str, Any] = dict(n_steps=32, batch_size=32, n_epochs=2) if algorithm is PPO else off_policy
    greedy = dict(exploration_initial_eps=0.0, exploration_final_eps=0.0) if algorithm is DQN else {}
    made = dict(policy_kwargs=dict(net_arch=[8], schedule="constant"), seed=0, device="cpu", **settings, **greedy)
    return algorithm("FlipoutMlpPolicy", env, **{**made, **kwargs})


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))


def damage(path: Path, how: str) -> None:
    """Do to a file what disks and people do."""
    data = path.read_bytes()
    generator = random.Random(how)
    if how == "truncated":
        path.write_bytes(data[: generator.randrange(len(data))])
    elif how == "flipped bit":
        at = generator.randrange(len(data))
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << generator.randrange(8))]) + data[at + 1 :])
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "foreign":
        path.write_bytes(b"something else")
    elif how == "missing":
        path.unlink()


class Kept(Checkpoints):
    """Remembers what the model was at its last checkpoint."""

    def save(self) -> bool:
        self.weights = {name: value.clone() for name, value in self.model.policy.state_dict().items()}
        self.keys = sb3_flipout.flipout_policy(self.model)._keys.step
        return super().save()


@pytest.mark.parametrize("algorithm", [DQN, PPO])
def test_training_goes_on_where_the_newest_checkpoint_was(algorithm: Any, tmp_path: Path) -> None:
    callback = Kept(tmp_path, EVERY, keep=2)
    model = build(algorithm).learn(5 * EVERY, callback=callback)
    again: Any = resume(tmp_path, "CartPole-v1")
    assert type(again) is algorithm and again.num_timesteps == 5 * EVERY
    assert steps_in(tmp_path)[-2:] == [4 * EVERY, 5 * EVERY]
    for name, value in again.policy.state_dict().items():
        assert th.equal(value, callback.weights[name]), name
    assert sb3_flipout.flipout_policy(again)._keys.step == callback.keys > 0
    if algorithm is DQN:
        stored = again.replay_buffer.pos
        assert 4 * EVERY <= stored <= 5 * EVERY
        assert np.array_equal(model.replay_buffer.observations[:stored], again.replay_buffer.observations[:stored])
    again.learn(2 * EVERY, reset_num_timesteps=False, callback=Checkpoints(tmp_path, EVERY, keep=2))
    assert steps_in(tmp_path)[-1] == 7 * EVERY


def test_the_best_and_the_newest_are_kept(tmp_path: Path) -> None:
    model, callback = build(), Checkpoints(tmp_path, 10, keep=2)
    model.learn(1, callback=callback)
    callback.init_callback(model)
    for step, value in ((10, 1.0), (20, 9.0), (30, 2.0), (40, 3.0), (50, 4.0)):
        callback.num_timesteps = step
        model.ep_info_buffer.clear()
        model.ep_info_buffer.append({"r": value, "l": 1, "t": 0.0})
        assert callback.save()
    assert steps_in(tmp_path) == [20, 40, 50]


@pytest.mark.parametrize("name", ["model.zip", "replay_buffer.pkl", "checkpoint.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped bit", "zeros", "foreign", "missing"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(name: str, how: str, tmp_path: Path) -> None:
    build().learn(2 * EVERY, callback=Checkpoints(tmp_path, EVERY))
    newest = tmp_path / f"step-{2 * EVERY:012d}"
    before = json.loads((newest / "checkpoint.json").read_text())
    damage(newest / name, how)
    if name == "checkpoint.json" and how == "flipped bit" and description(newest) == before["checkpoint"]:
        return  # it has hit a space between the words
    with pytest.warns(UserWarning, match=rf"{newest.name} is not whole, .*: going back"):
        assert resume(tmp_path, "CartPole-v1").num_timesteps == EVERY


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [DQN, PPO])
def test_a_hundred_damaged_checkpoints(algorithm: Any, tmp_path: Path) -> None:
    """Whatever has happened to a file: it is told, and the checkpoint before it is taken."""
    whole = tmp_path / "whole"
    build(algorithm).learn(2 * EVERY, callback=Checkpoints(whole, EVERY))
    newest, generator = f"step-{2 * EVERY:012d}", random.Random(0)
    for number in range(100):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        path = generator.choice(sorted((folder / newest).iterdir()))
        data = bytearray(path.read_bytes())
        at, length = generator.randrange(len(data)), generator.randrange(1, 50)
        change = number % 4
        if change == 0:
            data = data[:at]
        elif change == 1:
            data[at] ^= 1 << generator.randrange(8)
        elif change == 2:
            data[at:at] = generator.randbytes(length)
        else:
            data[at : at + length] = bytes(length)
        before, unchanged = description(folder / newest), bytes(data) == path.read_bytes()
        path.write_bytes(bytes(data))
        if unchanged or (path.suffix == ".json" and description(folder / newest) == before):
            continue  # zeros that were some before, or a space between the words
        with pytest.warns(UserWarning, match=rf"{newest} is not whole, .*: going back"):
            assert resume(folder, "CartPole-v1").num_timesteps == EVERY
        shutil.rmtree(folder)


def test_nothing_whole_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no checkpoint that is whole"):
        resume(tmp_path, "CartPole-v1")


def test_statistics_of_the_normalisation_come_back(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("Pendulum-v1", 2), norm_obs=True)
    build(SAC, env).learn(2 * EVERY, callback=Checkpoints(tmp_path, EVERY))
    plain = resume(tmp_path, make_vec_env("Pendulum-v1", 2))
    wrapped = resume(tmp_path, VecNormalize(make_vec_env("Pendulum-v1", 2), norm_obs=True))
    for model in (plain, wrapped):
        found = model.get_vec_normalize_env()
        assert found is not None and np.array_equal(found.obs_rms.mean, env.obs_rms.mean)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # SB3 leaves the file open that it could not write
def test_a_disk_that_is_full_costs_a_checkpoint_and_not_the_training(tmp_path: Path) -> None:
    model, callback = build(), Checkpoints(tmp_path, EVERY)
    model.learn(EVERY, callback=callback)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.warns(UserWarning, match=rf"step {2 * EVERY} could not be written .*{os.strerror(errno.EFBIG)}"):
            model.learn(EVERY, callback=callback, reset_num_timesteps=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert model.num_timesteps == 2 * EVERY and steps_in(tmp_path) == [EVERY]
    assert {path.name for path in tmp_path.iterdir()} == {"lock", f"step-{EVERY:012d}"}
    assert resume(tmp_path, "CartPole-v1").num_timesteps == EVERY


def test_a_folder_that_cannot_be_written_to_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="checkpoints cannot be written to"):
        build().learn(10, callback=Checkpoints(tmp_path / "file", EVERY))


def test_another_training_is_refused_the_folder(tmp_path: Path) -> None:
    model = build()
    model.learn(EVERY, callback=Checkpoints(tmp_path, EVERY))
    for other in (build(seed=1), model):  # and the same one from the start
        with pytest.raises(RuntimeError, match=r"holds checkpoints of another training, .* up to step-0+64"):
            other.learn(EVERY, callback=Checkpoints(tmp_path, EVERY))
    assert steps_in(tmp_path) == [EVERY]


#: A process that takes a folder, and keeps it until its input ends.
HOLD = """
import sys
from pathlib import Path
from sb3_flipout.checkpoints.files import hold

class Holder:
    holding = True

me = Holder()
hold(Path(sys.argv[1]), me)
print("held", flush=True)
sys.stdin.read()
"""


def test_two_processes_in_one_folder_are_refused(tmp_path: Path) -> None:
    pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], **pipes) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another training writes its checkpoints to"):
            build().learn(EVERY, callback=Checkpoints(tmp_path, EVERY))
        other.kill()
    build().learn(EVERY, callback=Checkpoints(tmp_path, EVERY))


def test_two_trainings_of_one_process_are_refused(tmp_path: Path) -> None:
    """And what the inner one lets go stays the outer one's."""

    class Inner(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 3:
                with pytest.raises(RuntimeError, match="another training writes"):
                    build(seed=1).learn(EVERY, callback=Checkpoints(tmp_path, EVERY))
                found = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
                assert "another training writes" in found.stderr
            return True

    build().learn(EVERY, callback=[Checkpoints(tmp_path, EVERY), Inner()])


def test_a_training_that_ended_by_an_error_can_be_gone_on_with(tmp_path: Path) -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == EVERY + 1:
                raise KeyboardInterrupt
            return True

    first = Checkpoints(tmp_path, EVERY)
    with pytest.raises(KeyboardInterrupt):
        build().learn(3 * EVERY, callback=[first, Stop()])
    first._on_training_end()  # rl_zoo3 calls it; without, the callback is in use until it is gone
    again = resume(tmp_path, "CartPole-v1")
    again.learn(EVERY, callback=Checkpoints(tmp_path, EVERY), reset_num_timesteps=False)
    assert steps_in(tmp_path) == [EVERY, 2 * EVERY]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    for name in ("step-000", "step-old", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    build().learn(5 * EVERY, callback=Checkpoints(tmp_path, EVERY, keep=1))
    assert all((tmp_path / name / "file").read_text() == "mine" for name in ("step-000", "step-old", "notes"))
    assert resume(tmp_path, "CartPole-v1").num_timesteps == 5 * EVERY


def test_damaged_ones_do_not_push_the_others_out(tmp_path: Path) -> None:
    build().learn(3 * EVERY, callback=Checkpoints(tmp_path, EVERY))
    for steps in (2 * EVERY, 3 * EVERY):
        damage(tmp_path / f"step-{steps:012d}" / "model.zip", "truncated")
    with pytest.warns(UserWarning, match="is not whole"):
        model = resume(tmp_path, "CartPole-v1")
    with pytest.warns(UserWarning, match=r"the damaged checkpoint .* is now damaged-step"):
        model.learn(EVERY // 2, callback=Checkpoints(tmp_path, 10, keep=2), reset_num_timesteps=False)
    assert steps_in(tmp_path)[-1] == 90 and len(list(tmp_path.glob("damaged-step-*"))) == 2


def test_an_earlier_model_does_not_go_on_beside_later_checkpoints(tmp_path: Path) -> None:
    build().learn(2 * EVERY, callback=Checkpoints(tmp_path, EVERY))
    model = DQN.load(tmp_path / f"step-{EVERY:012d}" / "model.zip", env=make_vec_env("CartPole-v1"))
    with pytest.raises(RuntimeError, match="or later ones of this, up to step-"):
        model.learn(EVERY, callback=Checkpoints(tmp_path, EVERY), reset_num_timesteps=False)


def test_a_step_that_is_saved_is_not_written_again_unless_it_is_damaged(tmp_path: Path) -> None:
    """So there is no moment in which it is not there."""
    callback = Checkpoints(tmp_path, EVERY, keep=1)
    build().learn(EVERY, callback=callback)
    model = tmp_path / f"step-{EVERY:012d}" / "model.zip"
    before = model.stat().st_ino, model.stat().st_mtime_ns
    assert callback.save() and steps_in(tmp_path) == [EVERY]
    assert (model.stat().st_ino, model.stat().st_mtime_ns) == before
    damage(model, "truncated")
    assert callback.save() and resume(tmp_path, "CartPole-v1").num_timesteps == EVERY
    assert {path.name for path in tmp_path.iterdir()} == {"lock", f"step-{EVERY:012d}"}


def test_no_error_of_saving_ends_the_training(tmp_path: Path) -> None:
    model = build()
    model.replay_buffer.extra = lambda: None  # type: ignore[union-attr]  # which no pickle takes
    with pytest.warns(UserWarning, match="step 64 could not be written .*lambda"):
        model.learn(EVERY, callback=Checkpoints(tmp_path, EVERY))
    assert model.num_timesteps == EVERY and steps_in(tmp_path) == []


def test_returns_that_are_no_numbers_are_not_the_best(tmp_path: Path) -> None:
    model, callback = build(), Checkpoints(tmp_path, 10, keep=1)
    model.learn(1, callback=callback)
    for step, value in ((10, 5.0), (20, 9.0), (30, float("nan")), (40, 1.0)):
        callback.num_timesteps = step
        model.ep_info_buffer.clear()
        model.ep_info_buffer.append({"r": value, "l": 1, "t": 0.0})
        assert callback.save()
    assert steps_in(tmp_path) == [20, 40]


def test_another_number_of_environments_is_told(tmp_path: Path) -> None:
    build(env=make_vec_env("CartPole-v1", 2)).learn(2 * EVERY, callback=Checkpoints(tmp_path, EVERY))
    with pytest.raises(ValueError, match="is for 2 environments, env has 1"):
        resume(tmp_path, "CartPole-v1")


class Generations(BaseCallback):
    """Notes steps and weights at the beginning of each generation."""

    def __init__(self) -> None:
        super().__init__()
        self.began: dict[int, list[th.Tensor]] = {}

    def _on_rollout_start(self) -> None:
        self.began[self.model.num_timesteps] = [weight.detach().clone() for weight in self.model.policy.parameters()]

    def _on_step(self) -> bool:
        return True


def test_flipes_goes_on_with_the_same_generations(tmp_path: Path) -> None:
    def env() -> Any:
        return make_vec_env("CartPole-v1", 4, seed=3)

    model = sb3_flipout.FlipES("FlipoutMlpPolicy", VecNormalize(env()), 0.002, 8, device="cpu", seed=1)
    checkpoints, generations = Checkpoints(tmp_path, 200, keep=100), Generations()
    model.learn(3000, callback=[generations, checkpoints])
    saved, began = steps_in(tmp_path), sorted(generations.began)
    # Each is the first generation that begins after a multiple of 200 steps.
    assert saved == sorted({next(at for at in began if at >= due) for due in range(200, max(began) + 1, 200)})
    for path in sorted(tmp_path.glob("step-*"))[len(saved) // 2 :]:
        shutil.rmtree(path)
    gone_on, again = resume(tmp_path, env()), Generations()
    assert gone_on.num_timesteps in saved and gone_on.num_timesteps < max(saved)
    gone_on.learn(3000 - gone_on.num_timesteps, callback=again, reset_num_timesteps=False)
    assert len(again.began) > 2
    for at, weights in again.began.items():
        assert all(th.equal(a, b) for a, b in zip(weights, generations.began[at], strict=True)), at


def test_in_the_middle_of_a_generation_flipes_says_where_it_began(tmp_path: Path) -> None:
    class InTheMiddle(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 30:
                assert checkpoints.save()
            return True

    model = sb3_flipout.FlipES("FlipoutMlpPolicy", "CartPole-v1", population_size=8, device="cpu", seed=1)
    checkpoints = Checkpoints(tmp_path, 10**6)
    model.learn(400, callback=[checkpoints, InTheMiddle()])
    assert steps_in(tmp_path) == [0] and resume(tmp_path, "CartPole-v1").num_timesteps == 0


def test_another_algorithms_checkpoint_is_refused(tmp_path: Path) -> None:
    build().learn(EVERY, callback=Checkpoints(tmp_path, EVERY))
    with pytest.raises(TypeError, match="was written by DQN, got algorithm=PPO"):
        resume(tmp_path, "CartPole-v1", PPO)

    class Own(DQN):
        pass

    assert type(resume(tmp_path, "CartPole-v1", Own)) is Own


def test_a_class_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    build().learn(EVERY, callback=Checkpoints(tmp_path, EVERY))
    path = tmp_path / f"step-{EVERY:012d}"
    write_description(path, {**description(path), "algorithm": "no_such_module:Own"})
    with pytest.raises(TypeError, match="no_such_module:Own, which cannot be imported; give algorithm="):
        resume(tmp_path, "CartPole-v1")


@pytest.mark.parametrize(
    ("kwargs", "error"), [(dict(every=0), ValueError), (dict(every=1.5), TypeError), (dict(keep=0), ValueError)]
)
def test_bad_numbers_are_refused(kwargs: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match=next(iter(kwargs))):
        Checkpoints(tmp_path, **{"every": 10, **kwargs})


# ---- killed at random -----------------------------------------------------------------------------------------------


class Told(BaseCallback):
    """Writes down how far the training is."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_step(self) -> bool:
        self.path.write_text(str(self.num_timesteps))
        return True


def main(name: str, folder: Path) -> None:
    th.set_num_threads(1)
    kind = {"DQN": DQN, "PPO": PPO}[name]
    model = resume(folder, "CartPole-v1") if steps_in(folder) else build(kind)
    (folder.parent / "begun").write_text(str(model.num_timesteps))
    callbacks = [Checkpoints(folder, EVERY), Told(folder.parent / "at")]
    model.learn(10**9, callback=callbacks, reset_num_timesteps=model.num_timesteps == 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["DQN", "PPO"])
def test_no_kill_costs_more_than_one_interval(name: str, tmp_path: Path) -> None:
    """Fifty kills at random moments, of which many fall into the writing of a checkpoint: there is one every 64 steps."""
    folder, generator, at = tmp_path / "run", random.Random(name), 0
    folder.mkdir()
    for _ in range(50):
        for told in ("begun", "at"):
            (tmp_path / told).unlink(missing_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, __file__, name, str(folder)], env=env, stderr=subprocess.PIPE)
        until = time.monotonic() + 120
        while not (tmp_path / "at").exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        begun = int((tmp_path / "begun").read_text())
        assert begun >= at - EVERY, "more than one interval was lost"
        time.sleep(generator.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        at = int((tmp_path / "at").read_text() or at)
    assert at > 50 * EVERY
    shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))


def test_what_nobody_released_is_closed_when_the_process_ends(tmp_path: Path) -> None:
    """After a training that raised the lock is held on; Python would complain of the open file."""
    code = (
        "from pathlib import Path; from sb3_flipout.checkpoints.files import hold\n"
        "class Holder: holding = True\n"
        f"hold(Path({str(tmp_path)!r}), Holder())"
    )
    ended = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and "ResourceWarning" not in ended.stderr, ended.stderr
