"""Which process works on a trial, and whether it is still there; knows nothing of trials."""

import ctypes
import os
import socket
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1


def this_process() -> str:
    """Names this process among all that ever ran on any host: `host:pid:start`."""
    return f"{_host()}:{os.getpid()}:{_started(os.getpid())}"


def is_gone(process: str) -> bool:
    """Whether a process named so has ended; only one of this host can be looked up, any other counts as alive."""
    return _is_here(process) and not _is_there(process)


def is_alive_here(process: str) -> bool:
    """Whether a process named so is known to run, which only one of this host can be."""
    return _is_here(process) and _is_there(process)


def _is_here(process: str) -> bool:
    return process.rsplit(":", 2)[0] == _host()


def _is_there(process: str) -> bool:
    _, pid, started = process.rsplit(":", 2)
    return _started(int(pid)) == started


def _host() -> str:
    """Two containers may share a host's name, but do not see each other's processes."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}-{space.stat().st_ino}" if space.exists() else socket.gethostname()


def _started(pid: int) -> str:
    """When a process started, in kernel ticks, so that a reused number is not taken for it; empty if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    # A zombie has ended, and only waits for its parent to hear of it.
    return "" if fields[0] in "ZX" else fields[19]


def signal_when_parent_ends(number: int) -> None:
    """Have the kernel send this process a signal when the one that started it ends, however that comes; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
