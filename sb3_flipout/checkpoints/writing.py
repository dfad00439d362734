"""The callback that writes checkpoints."""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_flipout.checkpoints.files import DESCRIPTION, checksum, description, flush, locked, newest_first
from sb3_flipout.checks import check_integer

_UNFINISHED = ".unfinished-"


class Checkpoints(BaseCallback):
    """
    Save a training every so many steps such that a kill, a full disk or a power cut costs no more than what came since.

    A checkpoint that cannot be written is told by a warning, and training goes on; those before it stay. To go on after a
    kill: :func:`resume`.

    :param folder: Folder of the checkpoints, of one training; made if it is not there
    :param every: Environment steps, of all environments together, from one checkpoint to the next
    :param keep: Number of newest checkpoints that are kept, beside the best: that with the highest mean return of the last
        training episodes (SB3's ``rollout/ep_rew_mean``)
    :param save_replay_buffer: Whether to save the replay buffer too, where there is one: without it an off-policy algorithm
        goes on with an empty one
    :param verbose: 1 tells of each checkpoint
    :raises TypeError: If a number is no integer
    :raises ValueError: If ``every`` or ``keep`` is below 1
    :raises RuntimeError: At the start of training, if the folder cannot be written to, another process trains into it, or it
        holds the checkpoints of another training
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
        self._lock: IO[str] | None = None

    def _on_training_start(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or locked(self.folder)
        except OSError as error:
            raise RuntimeError(
                f"checkpoints cannot be written to {self.folder}: {error}. Give a folder that can be written to."
            ) from error
        for left in self.folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(left, ignore_errors=True)
        run = getattr(self.model, "checkpoint_run", None) if self.num_timesteps else None  # from the start: another training
        others = [path for path in newest_first(self.folder) if description(path).get("run") not in (run, None)]
        if others:
            self._on_training_end()
            raise RuntimeError(
                f"{self.folder} holds checkpoints of another training, up to {others[0].name}. Go on with that by "
                f"sb3_flipout.resume({str(self.folder)!r}, env), or give another folder."
            )
        self.model.checkpoint_run = run or uuid.uuid4().hex  # type: ignore[attr-defined]  # saved with the model
        self._next = (self.num_timesteps // self.every + 1) * self.every

    def _on_step(self) -> bool:
        if self.num_timesteps >= self._next:
            self.save()
            self._next = (self.num_timesteps // self.every + 1) * self.every
        return True

    def _on_training_end(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        """
        Leave the lock to this process.

        :return: Attributes
        """
        return {**self.__dict__, "_lock": None}

    def save(self) -> bool:
        """
        Write a checkpoint now, and remove those that are no longer kept.

        :return: Whether it could be written
        """
        place = self.folder / f"step-{self.num_timesteps:012d}"
        unfinished = self.folder / f"{_UNFINISHED}{place.name}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            self._write(unfinished)
            shutil.rmtree(place, ignore_errors=True)
            unfinished.rename(place)
            flush(self.folder)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            warnings.warn(
                f"the checkpoint at step {self.num_timesteps} could not be written to {self.folder}: {error}. Training goes "
                "on; the checkpoints before it are as they were.",
                stacklevel=2,
            )
            return False
        for path in self._superfluous():
            shutil.rmtree(path, ignore_errors=True)
        if self.verbose:
            print(f"Checkpoint {place}")
        return True

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
        returns = [float(info["r"]) for info in model.ep_info_buffer or ()]
        kind = type(model)
        found = dict(
            steps=self.num_timesteps,
            run=model.checkpoint_run,  # type: ignore[attr-defined]
            algorithm=f"{kind.__module__}:{kind.__qualname__}",
            mean_return=float(np.mean(returns)) if returns else None,
            files=files,
            versions={name: version(name) for name in ("sb3_flipout", "stable_baselines3", "torch")},
        )
        (folder / DESCRIPTION).write_text(json.dumps(found, indent=1))
        flush(folder / DESCRIPTION)
        flush(folder)

    def _superfluous(self) -> list[Path]:
        known = newest_first(self.folder)
        returns = [(description(path).get("mean_return"), path) for path in known]
        best = max((pair for pair in returns if pair[0] is not None), default=(None, None))[1]
        return [path for path in known[self.keep :] if path != best]
