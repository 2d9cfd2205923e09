"""Writing files so that a full disk or a kill leaves the old ones whole."""

import os
import sys
from contextlib import suppress
from pathlib import Path


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
    except OSError as error:
        raise ValueError(disk_message(path, error)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Asks the disk to keep a file, or every file of a folder and the folder itself."""
    if sys.platform == "win32":
        return  # Windows opens no folder, and flushes no file that is open for reading only
    for item in [*path.rglob("*"), path] if path.is_dir() else [path]:
        handle = os.open(item, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def disk_message(path: Path, error: Exception) -> str:
    """What could not be written, why, and what helps."""
    remedy = "free some space there, see that it may be written to, or choose another --out"
    return f"cannot write {path} ({error}); {remedy}"
