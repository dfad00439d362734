"""Files that are whole or not there, and folders that one process writes to."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

DESCRIPTION = "checkpoint.json"
_PART = 1 << 20  # bytes read at a time


def newest_first(folder: Path) -> list[Path]:
    """
    List the checkpoints of a folder.

    :param folder: Folder
    :return: Folders of the checkpoints
    """
    return sorted(folder.glob("step-*"), reverse=True)


def description(path: Path) -> dict[str, Any]:
    """
    Read what a checkpoint says of itself.

    :param path: Folder of the checkpoint
    :return: Its description; empty if it cannot be read
    """
    try:
        found = json.loads((path / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def what_is_wrong(path: Path) -> str | None:
    """
    Compare the files of a checkpoint with what was written.

    :param path: Folder of the checkpoint
    :return: What it lacks; ``None`` if it is whole
    """
    known = description(path)
    files = known.get("files")
    if not isinstance(files, dict) or "model.zip" not in files or not isinstance(known.get("algorithm"), str):
        return f"its {DESCRIPTION} cannot be read"
    for name, was in files.items():
        file = path / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if not isinstance(was, dict) or file.stat().st_size != was.get("bytes") or checksum(file) != was.get("crc32"):
            return f"{name} is not as it was written"
    return None


def checksum(path: Path) -> int:
    """
    Compute the CRC-32 of a file, which no single wrong bit leaves as it was.

    :param path: File
    :return: Checksum
    """
    found = 0
    with path.open("rb") as file:
        while part := file.read(_PART):
            found = zlib.crc32(part, found)
    return found


def flush(path: Path) -> None:
    """
    Wait until a file, or the names in a folder, are on the disk.

    :param path: File or folder
    """
    with _descriptor(path) as number:
        os.fsync(number)


@contextmanager
def _descriptor(path: Path) -> Iterator[int]:
    number = os.open(path, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


def locked(folder: Path) -> IO[str]:
    """
    Keep other processes out of a folder until the file is closed, or this process ends, however it does.

    :param folder: Folder
    :return: Open file
    :raises RuntimeError: If another process keeps this one out
    """
    file = (folder / "lock").open("a")
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: no worker that it has forked holds it on
    except OSError as error:
        file.close()
        raise RuntimeError(
            f"another process trains into {folder}; let it end, or give this one a folder of its own."
        ) from error
    return file
