"""Locks on files that others may remove; a lock ends with its process."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import IO


def locked(path: Path, how: int) -> IO[str]:
    """The file, made with its folder if need be, under this lock of `fcntl`; waits for it.

    Whoever removes it in the moment before leaves a lock on a file that nobody else finds: then it tries again.
    """
    while True:
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("a+")
            fcntl.flock(handle, how)
            if is_at(handle, path):
                return handle
            handle.close()


def is_at(handle: IO[str], path: Path) -> bool:
    """Whether the open file is the one that has this path now."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    return False
