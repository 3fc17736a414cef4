"""Which process works on a trial, and whether it is still there; knows nothing of trials."""

import os
import socket
from pathlib import Path


def this_process() -> str:
    """Names this process among all that ever ran on any host: `host:pid:start`."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_gone(process: str) -> bool:
    """Whether a process named so has ended; only one of this host can be looked up, any other counts as alive."""
    host, pid, started = process.rsplit(":", 2)
    return host == socket.gethostname() and _started(int(pid)) != started


def _started(pid: int) -> str:
    """When a process started, in kernel ticks, so that a reused number is not taken for it; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return ""
