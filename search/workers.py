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
from search import build
from search.progress import ProgressView
from search.study import INTERRUPTED, Outcome, Search, Watcher, run

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def run_together(search: Search, watch: Watcher, count: int) -> Outcome:
    """Search with `count` processes, of which this is one; comes back when all have ended.

    The study and the uncompressed network are there by then, so that no two make them at once. The cores that this
    process may use are dealt out evenly. Ctrl-C ends all of them, and each puts its trial back into the queue.
    """
    if count == 1:
        return run(search, watch)
    allowed = sorted(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    shares = [allowed[i::count] for i in range(count)]
    others = [_start(search, number, cores) for number, cores in enumerate(shares[1:], start=2)]
    _confine(shares[0])
    try:
        outcome = run(search, watch)
        if outcome.ended == INTERRUPTED:
            _interrupt(others)
        codes = [process.wait() for process in others]
    except BaseException:
        _interrupt(others)
        raise
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)
    for number, code in enumerate(codes, start=2):
        if code != 0 and outcome.ended != INTERRUPTED:
            log = _log(search, number)
            raise ConfigError(
                "workers", f"number {number} ended with code {code}", f"see {log}; the same command goes on"
            )
    return _all_told(search, outcome)


def _all_told(search: Search, outcome: Outcome) -> Outcome:
    """With what the others recorded after this one had ended."""
    records = tuple(search.tracker.records(outcome.study))
    return replace(outcome, records=records, front=tuple(search.front(records)), others=0)


def _start(search: Search, number: int, cores: Sequence[int]) -> "subprocess.Popen[bytes]":
    log = _log(search, number)
    path = log.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(search.config)
    before = os.sched_getaffinity(0)
    # Of this thread alone, and inherited by the process that it starts.
    os.sched_setaffinity(0, cores)
    try:
        with log.open("a") as out:
            return subprocess.Popen(
                [sys.executable, "-m", "search.workers", str(path)],
                env={**os.environ, **dict.fromkeys(THREADS, str(len(cores)))},
                stdout=out,
                stderr=subprocess.STDOUT,
                # Ctrl-C of the terminal reaches the first process alone, which hands it on once.
                start_new_session=True,
            )
    finally:
        os.sched_setaffinity(0, before)


def _confine(cores: Sequence[int]) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def _interrupt(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for process in processes:
        process.wait()


def _log(search: Search, number: int) -> Path:
    return search.folder / search.name / f"worker-{number}.log"


def main(path: str) -> int:
    """Carry out trials until the budget is spent; the exit code."""
    config = build.from_yaml(Path(path).read_text())
    try:
        with ProgressView(Console(width=130), str(config.quality)) as view:
            run(build.build(config, view.training), view)
    except ConfigError as error:
        print(f"compareto: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
