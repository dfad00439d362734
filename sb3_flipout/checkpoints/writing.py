"""The callback that writes checkpoints."""

from __future__ import annotations

import math
import shutil
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_flipout.checkpoints.files import (
    DESCRIPTION,
    checksum,
    description,
    flush,
    hold,
    newest_first,
    release,
    steps_of,
    what_is_wrong,
    write_description,
)
from sb3_flipout.checks import check_integer, warn_user
from sb3_flipout.finite import first_non_finite, not_finite

_UNFINISHED = ".unfinished-"


class Checkpoints(BaseCallback):
    """
    Save a training every so many steps such that a kill, a full disk or a power cut costs no more than what came since.

    A checkpoint that cannot be written is told by a warning, and training goes on; those before it stay. To go on after a
    kill: :func:`resume`.

    Of FlipES a checkpoint is the model at the beginning of a generation, the first that begins after so many steps: who goes
    on plays that generation again, with the same members and the same episodes.

    :param folder: Folder of the checkpoints, of one training; made if it is not there
    :param every: Environment steps, of all environments together, from one checkpoint to the next
    :param keep: Number of newest checkpoints that are kept, beside the best: that with the highest mean return of the last
        training episodes (SB3's ``rollout/ep_rew_mean``)
    :param save_replay_buffer: Whether to save the replay buffer too, where there is one: without it an off-policy algorithm
        goes on with an empty one
    :param verbose: 1 tells of each checkpoint
    :raises TypeError: If a number is no integer
    :raises ValueError: If ``every`` or ``keep`` is below 1
    :raises RuntimeError: At the start of training, if the folder cannot be written to, another training uses it, it holds the
        checkpoints of another one, or later ones than the model
    """

    def __init__(
        self, folder: str | Path, every: int, keep: int = 3, save_replay_buffer: bool = True, verbose: int = 0
    ) -> None:
        super().__init__(verbose)
        self.folder = Path(folder)
        self.every = check_integer("every", every, 1)
        self.keep = check_integer("keep", keep, 1)
        self.save_replay_buffer = save_replay_buffer
        self._next = 0
        self._by_generation = False  # whether the model is saved between two generations
        self.holding = False  # whether the folder is in use by a training of this callback

    def _on_training_start(self) -> None:
        self._by_generation = hasattr(self.model, "population_size")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            hold(self.folder, self)
        except OSError as error:
            raise RuntimeError(
                f"checkpoints cannot be written to {self.folder}: {error}. Give a folder that can be written to."
            ) from error
        self.holding = True
        try:
            run = self._checked_run()
        except RuntimeError:
            self._on_training_end()
            raise
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        self.model.checkpoint_run = run  # type: ignore[attr-defined]  # saved with the model
        self._next = (self.num_timesteps // self.every + 1) * self.every

    def _checked_run(self) -> str:
        """The name of this training, if the folder is its own and holds nothing that is later than it."""
        run = getattr(self.model, "checkpoint_run", None) if self.num_timesteps else None  # from the start: another training
        for path in newest_first(self.folder):
            told, later = description(path), steps_of(path) > self.num_timesteps
            if told.get("run", run) != run or (run is None and told) or (later and what_is_wrong(path) is None):
                raise RuntimeError(
                    f"{self.folder} holds checkpoints of another training, or later ones of this, up to {path.name}. Go on "
                    f"with that by sb3_flipout.resume({str(self.folder)!r}, env), or give another folder."
                )
            if later:
                aside = path.with_name(f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
                path.rename(aside)
                warn_user(f"the damaged checkpoint {path} is now {aside.name}.")
        return run or uuid.uuid4().hex

    def _on_rollout_start(self) -> None:
        if self._by_generation:
            self.num_timesteps = self.model.num_timesteps  # SB3 tells callbacks of steps alone
            self._save_if_due()

    def _on_step(self) -> bool:
        if not self._by_generation:
            self._save_if_due()
        return True

    def _save_if_due(self) -> None:
        if self.num_timesteps >= self._next:
            self.save()
            self._next = (self.num_timesteps // self.every + 1) * self.every

    def _on_training_end(self) -> None:
        self.holding = False
        release(self)

    def __getstate__(self) -> dict[str, Any]:
        """
        Leave the folder to this process.

        :return: Attributes
        """
        return {**self.__dict__, "holding": False}

    def save(self) -> bool:
        """
        Write a checkpoint now, and remove those that are no longer kept.

        :return: Whether it is there
        """
        steps = self._saved_steps()
        place = self.folder / f"step-{steps:012d}"
        if place.exists() and what_is_wrong(place) is None:
            return True  # this step is saved; to write it again would leave a moment in which it is not there
        broken = self._broken()
        if broken is not None:
            warn_user(
                f"no checkpoint is written at step {steps}: {broken} is not finite. Those before it stay as they "
                "are, and are what to go on from.",
            )
            return False
        unfinished = self.folder / f"{_UNFINISHED}{place.name}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            self._write(unfinished)
            if place.exists():  # a damaged one
                place.rename(self.folder / f"{_UNFINISHED}old-{uuid.uuid4().hex}")
            unfinished.rename(place)
            flush(self.folder)
        except Exception as error:  # a training of days does not end because it could not be saved
            shutil.rmtree(unfinished, ignore_errors=True)
            warn_user(
                f"the checkpoint at step {steps} could not be written to {self.folder}: {error!r}. Training goes "
                "on; the checkpoints before it are as they were.",
            )
            return False
        for path in [*self._superfluous(place), *self.folder.glob(f"{_UNFINISHED}*")]:
            shutil.rmtree(path, ignore_errors=True)
        if self.verbose:
            print(f"Checkpoint {place}")
        return True

    def _saved_steps(self) -> int:
        """The steps that the model says when it is saved: in the middle of a generation of FlipES, those before it."""
        began: int | None = getattr(self.model, "_began", None)
        return self.num_timesteps if began is None else began

    def _broken(self) -> str | None:
        """What of the training is not finite: to go on from it would be of no use, and it must push no good one out."""
        name = first_non_finite(dict(self.model.policy.named_parameters()))
        normalised = self.model.get_vec_normalize_env()
        if name is not None or normalised is None:
            return name
        of_observations = getattr(normalised, "obs_rms", None) or {}
        statistics = dict(of_observations) if isinstance(of_observations, dict) else {"observations": of_observations}
        for what, one in {**statistics, "returns": normalised.ret_rms}.items():
            if not_finite(np.asarray(one.mean)) is not None or not_finite(np.asarray(one.var)) is not None:
                return f"VecNormalize's statistic of {what}"
        return None

    def _write(self, folder: Path) -> None:
        model = self.model
        # Into files that are open: of its own, SB3 leaves one open that it cannot write.
        with (folder / "model.zip").open("wb") as file:
            model.save(file)
        if self.save_replay_buffer and isinstance(model, OffPolicyAlgorithm):
            with (folder / "replay_buffer.pkl").open("wb") as file:
                model.save_replay_buffer(file)
        normalised = model.get_vec_normalize_env()
        if normalised is not None:
            normalised.save(str(folder / "vecnormalize.pkl"))
        files = {}
        for path in sorted(folder.iterdir()):
            flush(path)
            files[path.name] = dict(bytes=path.stat().st_size, crc32=checksum(path))
        returns = [float(info["r"]) for info in model.ep_info_buffer or () if math.isfinite(info["r"])]
        kind = type(model)
        found = dict(
            steps=self._saved_steps(),
            run=model.checkpoint_run,  # type: ignore[attr-defined]
            algorithm=f"{kind.__module__}:{kind.__qualname__}",
            mean_return=float(np.mean(returns)) if returns else None,
            files=files,
            versions={name: _version(name) for name in ("sb3_flipout", "stable_baselines3", "torch")},
        )
        write_description(folder, found)
        flush(folder / DESCRIPTION)
        flush(folder)

    def _superfluous(self, newest: Path) -> list[Path]:
        """Checkpoints of this training beside the newest, the best and the one that has just been written."""
        told = {path: description(path) for path in newest_first(self.folder)}
        own = [path for path in told if told[path].get("run") == self.model.checkpoint_run]  # type: ignore[attr-defined]
        returns = [(told[path]["mean_return"], path) for path in own if isinstance(told[path].get("mean_return"), float)]
        best = max(returns, default=(None, None))[1]
        return [path for path in own[self.keep :] if path not in (best, newest)]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # not installed, but on the path
        return None
