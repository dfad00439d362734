"""Files that are whole or not there, and folders that one training writes to."""

from __future__ import annotations

import atexit
import errno
import json
import os
import re
import weakref
import zlib
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: other processes in the folder are not noticed there
    fcntl = None  # type: ignore[assignment]

DESCRIPTION = "checkpoint.json"
_NAME = re.compile(r"step-\d{12,}")
_PART = 1 << 20  # bytes read at a time

# The folders that this process holds, and for whom. A file is never opened twice: to close one of the two would free it.
_HELD: dict[tuple[int, int], tuple[IO[str], weakref.ref[Any]]] = {}


def newest_first(folder: Path) -> list[Path]:
    """
    List the checkpoints of a folder.

    :param folder: Folder
    :return: Folders of the checkpoints
    """
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=steps_of, reverse=True)


def steps_of(path: Path) -> int:
    """
    Tell how far the training was at a checkpoint.

    :param path: Folder of the checkpoint
    :return: Environment steps
    """
    return int(path.name.partition("-")[2])


def description(path: Path) -> dict[str, Any]:
    """
    Read what a checkpoint says of itself.

    :param path: Folder of the checkpoint
    :return: Its description; empty if it cannot be read, or is not as it was written
    """
    try:
        told = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        found = told["checkpoint"]
        return found if isinstance(found, dict) and told["crc32"] == zlib.crc32(_text(found)) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def write_description(path: Path, told: dict[str, Any]) -> None:
    """
    Write what a checkpoint says of itself, with its checksum.

    :param path: Folder of the checkpoint
    :param told: What it says, as JSON can hold it
    """
    whole = dict(checkpoint=told, crc32=zlib.crc32(_text(told)))
    (path / DESCRIPTION).write_text(json.dumps(whole, indent=1), encoding="utf-8")


def _text(told: dict[str, Any]) -> bytes:
    return json.dumps(told, sort_keys=True).encode()


def what_is_wrong(path: Path) -> str | None:
    """
    Compare the files of a checkpoint with what was written.

    :param path: Folder of the checkpoint
    :return: What it lacks; ``None`` if it is whole
    """
    known = description(path)
    files = known.get("files")
    if not isinstance(files, dict) or "model.zip" not in files or not isinstance(known.get("algorithm"), str):
        return f"its {DESCRIPTION} is missing or not as it was written"
    for name, was in files.items():
        file = path / Path(name).name
        try:
            if file.stat().st_size != was["bytes"] or checksum(file) != was["crc32"]:
                return f"{name} is not as it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error})"
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
    if os.name == "nt" and path.is_dir():  # there a folder cannot be opened
        return
    number = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def hold(folder: Path, holder: Any) -> None:
    """
    Keep others out of a folder: other processes until this one ends, however it does, and other holders of this process until
    :func:`release`, or until they are gone.

    :param folder: Folder
    :param holder: Whom it is for; its ``holding`` says whether it still needs it
    :raises RuntimeError: If somebody else has it
    """
    refusal = f"another training writes its checkpoints to {folder}; let it end, or give this one a folder of its own."
    path = folder / "lock"
    path.touch()
    name = (path.stat().st_dev, path.stat().st_ino)
    if name in _HELD:
        file, of = _HELD[name]
        other = of()
        if other is not None and other is not holder and other.holding:
            raise RuntimeError(refusal)
        _HELD[name] = (file, weakref.ref(holder))
        return
    file = path.open("a")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: no worker that it has forked holds it on
    except OSError as error:
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise RuntimeError(refusal) from error
    _HELD[name] = (file, weakref.ref(holder))


def release(holder: Any) -> None:
    """
    Let others into the folders of a holder.

    :param holder: Whom they were for
    """
    for name, (file, of) in list(_HELD.items()):
        if of() is holder:
            del _HELD[name]
            file.close()


@atexit.register
def _close() -> None:
    """Close what holders have left open that nobody released: trainings that raised."""
    while _HELD:
        _HELD.popitem()[1][0].close()
