"""Writing files so that a full disk or a kill leaves the old ones whole; one process at a time."""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":  # which has no flock: there, nothing keeps two runs apart
    import fcntl

_HELD: dict[Path, object] = {}  # the open lock files of this process


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file whole or not at all.

    Raises ValueError with the remedy if the disk is full or read-only; an older file stays then.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
        sync(path.parent, below=False)
    except OSError as error:
        raise ValueError(disk_message(path, error)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sync(path: Path, below: bool = True) -> None:
    """Asks the disk to keep a file, or a folder: the names in it, and with `below` every file."""
    if sys.platform == "win32":
        return  # Windows opens no folder, and flushes no file that is open for reading only
    for item in [*path.rglob("*"), path] if below and path.is_dir() else [path]:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(folder: Path) -> None:
    """Keeps other processes out of a folder until `unlock`, or until this process ends.

    The kernel holds the lock (flock) and lets it go when the process dies, however it dies.
    Raises ValueError with the number of the process that has it.
    """
    path = folder / ".lock"
    if sys.platform == "win32" or _is_file(_HELD.get(path.absolute()), path):
        return
    try:
        file = path.open("ab+", buffering=0)
    except OSError as error:
        raise ValueError(disk_message(path, error)) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_file(file, path):  # its holder has removed it between our two calls
            file.close()
            return lock(folder)
        file.truncate(0)
        file.write(str(os.getpid()).encode())
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().decode() or "of an unknown number"
        file.close()
        message = f"{folder} is in use by process {holder}; wait until it ends"
        raise ValueError(f"{message}, or choose another --name") from error
    except OSError as error:
        file.close()  # an open file would keep the lock for as long as the error is held
        raise ValueError(disk_message(path, error)) from error
    _HELD[path.absolute()] = file


def unlock(folder: Path) -> None:
    """Lets other processes into a folder that this one has locked, if it has."""
    path = folder / ".lock"
    file = _HELD.pop(path.absolute(), None)
    if _is_file(file, path):
        path.unlink()
    if file is not None:
        file.close()


def _is_file(file, path: Path) -> bool:
    """Whether an open file is the one that stands there now."""
    if file is None or not path.exists():
        return False
    return os.path.samestat(os.fstat(file.fileno()), path.stat())


def disk_message(path: Path, error: Exception) -> str:
    """What could not be written, why, and what helps."""
    remedy = "free some space there, see that it may be written to, or choose another --out"
    return f"cannot write {path} ({error}); {remedy}"
