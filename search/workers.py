"""Further processes of the same search on this machine, each with cores of its own; they choose and register nothing.

Started as `python -m search.workers CONFIG.yaml`, with the whole configuration in a file.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from compressors.errors import ConfigError
from evaluators.stopwatch import own_environment
from search import build
from search.liveness import signal_when_parent_ends
from search.loop import INTERRUPTED, run
from search.progress import ProgressView
from search.storage import busy
from search.study import Outcome, Search, Watcher

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_together(search: Search, watch: Watcher, count: int) -> Outcome:
    """Search with `count` processes, of which this is one; comes back when all have ended.

    The uncompressed network is there by then, so that no two train it at once. The cores that this process may use are
    dealt out evenly. Ctrl-C ends all of them, and each puts its trial back into the queue.
    """
    if count == 1:
        return run(search, watch)
    allowed = sorted(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    shares = [allowed[i::count] for i in range(count)]
    others: list[subprocess.Popen[bytes]] = []
    try:
        for number, cores in enumerate(shares[1:], start=2):
            others.append(_start(search, number, cores))
        _confine(shares[0])
        outcome = _with_the_others(search, run(search, watch), others)
    finally:
        _end(others)
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)
    return outcome


def _with_the_others(search: Search, own: Outcome, others: "Sequence[subprocess.Popen[bytes]]") -> Outcome:
    """Once they have ended, with what they recorded; one that broke is told of, and costs no more than its trial."""
    ended = own.ended
    try:
        if ended == INTERRUPTED:
            _end(others)
        codes = [process.wait() for process in others]
    except KeyboardInterrupt:
        _end(others)
        ended = INTERRUPTED
    if ended != INTERRUPTED:
        for number, code in enumerate(codes, start=2):
            ended += f"; worker {number} ended with code {code}, see {_log(search, number)}" if code else ""
    records = tuple(search.tracker.records(own.study))
    left = busy(search.storage, search.name)
    return replace(own, records=records, front=tuple(search.front(records)), ended=ended, others=left)


def _start(search: Search, number: int, cores: Sequence[int]) -> "subprocess.Popen[bytes]":
    log = _log(search, number)
    path = log.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build.for_worker(search.config))
    threads = dict.fromkeys(THREADS, str(len(cores)))
    before = os.sched_getaffinity(0)
    # Of this thread alone, and inherited by the process that it starts.
    os.sched_setaffinity(0, cores)
    try:
        with log.open("a") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "search.workers", str(path)],
                env={**own_environment(), **threads},
                stdout=out,
                stderr=subprocess.STDOUT,
                # Ctrl-C of the terminal reaches the first process alone, which ends the others.
                start_new_session=True,
            )
    finally:
        os.sched_setaffinity(0, before)


def _confine(cores: Sequence[int]) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def _end(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Each puts its trial back into the queue first."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


def _log(search: Search, number: int) -> Path:
    return search.folder / search.name / f"worker-{number}.log"


def main(path: str) -> int:
    """Carry out trials until the budget is spent; the exit code. Ends as by Ctrl-C when the first process does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal_when_parent_ends(signal.SIGTERM)
    config = build.from_yaml(Path(path).read_text())
    try:
        with ProgressView(Console(width=130), build.view(config)) as view:
            run(build.build(config, view.training), view)
    except ConfigError as error:
        print(f"compareto: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
