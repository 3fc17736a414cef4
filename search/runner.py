"""Carries out trials in a process of its own, within limits, so that whatever happens there costs one trial.

Started as `python -m search.runner FD`: it reads one `Workbench` from the socket FD, and then plan after plan.
"""

import faulthandler
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import torch

from compressors.errors import ConfigError, Infeasible, at_least
from compressors.plan import CompressionPlan, Target
from evaluators.runtime import Deployed
from evaluators.stopwatch import own_environment
from search.allocation import keep_freed_memory
from search.cache import Cache
from search.liveness import signal_when_parent_ends
from search.trial import Clock, Judge, TrialRecord, Workbench

# How often limits are looked at, and how much of a dead process's last words is kept.
POLL_S, LAST_WORDS = 0.5, 4000


@dataclass(frozen=True)
class Limits:
    """What one trial may take: `minutes`, and `memory_gb` of the process that carries it out; None is no limit."""

    minutes: float | None = None
    memory_gb: float | None = None

    def __post_init__(self) -> None:
        """Refuses limits that no trial could keep."""
        given = {"minutes": self.minutes, "memory_gb": self.memory_gb}
        at_least(0.01, **{f"limits.{name}": value for name, value in given.items() if value is not None})


class Broken(Exception):
    """A trial that ended without a record: in which `stage`, why in one line, and all that is known as `details`."""

    def __init__(self, stage: str, reason: str, details: str) -> None:
        super().__init__(reason)
        self.stage, self.reason, self.details = stage, reason, details

    @classmethod
    def of(cls, error: Exception, stage: str) -> "Broken":
        """Of an exception that is being handled."""
        return cls(stage, f"{type(error).__name__}: {error}", traceback.format_exc())


class Carrier(Protocol):
    """What carries out plans; raises `Broken` for whatever is neither a record nor `Infeasible` for the moment."""

    def run(
        self, number: int, plan: CompressionPlan, folder: Path, clock: Clock, judge: Judge | None
    ) -> tuple[TrialRecord, Deployed | None]:
        """See `Workbench.run`."""

    def complete(self, record: TrialRecord, deployed: Deployed, clock: Clock) -> TrialRecord:
        """See `Workbench.complete`."""

    def close(self) -> None:
        """Give back all that is held."""


class Here:
    """Carries out plans in this process."""

    def __init__(self, bench: Workbench, reference: Target, clock: Clock) -> None:
        """Deploys the reference and tries it out; raises `Infeasible` when that does not work."""
        self.bench = bench
        self.reference = bench.reference(reference, clock)
        self.examples = bench.examples("validation")
        bench.try_out(self.reference, self.examples)

    def run(
        self, number: int, plan: CompressionPlan, folder: Path, clock: Clock, judge: Judge | None
    ) -> tuple[TrialRecord, Deployed | None]:
        """In place."""
        try:
            return self.bench.run(number, plan, self.reference, self.examples, folder, clock, judge)
        except Infeasible:
            raise
        except Exception as error:
            raise Broken.of(error, clock.phase) from error

    def complete(self, record: TrialRecord, deployed: Deployed, clock: Clock) -> TrialRecord:
        """In place."""
        try:
            return self.bench.complete(record, deployed, self.reference, self.examples, clock)
        except Infeasible:
            raise
        except Exception as error:
            raise Broken.of(error, clock.phase) from error

    def close(self) -> None:
        """The evaluators and the cache."""
        self.bench.close()


class Runner:
    """Carries out plans in a child process; a child that dies, hangs or takes too much is replaced by another one."""

    def __init__(self, bench: Workbench, reference: Target, clock: Clock, limits: Limits) -> None:
        """Starts the child; raises `Infeasible` when the reference cannot be deployed."""
        self.bench, self.reference, self.limits = bench, reference, limits
        self._child: _Child | None = None
        self._ready(clock)

    def run(
        self, number: int, plan: CompressionPlan, folder: Path, clock: Clock, judge: Judge | None
    ) -> tuple[TrialRecord, Deployed | None]:
        """In the child."""

        def work(here: Here, clock: Clock) -> tuple[TrialRecord, tuple[Any, ...] | None]:
            record, deployed = here.run(number, plan, folder, clock, judge)
            # Of the files, precision and inputs: their runtime stays there, with all that it loaded.
            return record, (deployed.precision, deployed.inputs) if deployed else None

        record, made = self._in_child(work, clock)
        return record, made and Deployed(self.bench.runtimes[plan.target.runtime], folder, *made)

    def complete(self, record: TrialRecord, deployed: Deployed, clock: Clock) -> TrialRecord:
        """In the child."""
        name, place = record.plan.target.runtime, (deployed.folder, deployed.precision, deployed.inputs)

        def work(here: Here, clock: Clock) -> TrialRecord:
            return here.complete(record, Deployed(here.bench.runtimes[name], *place), clock)

        made: TrialRecord = self._in_child(work, clock)
        return made

    def _in_child(self, work: "Callable[[Here, Clock], Any]", clock: Clock) -> Any:
        child = self._ready(clock)
        try:
            child.send(work)
            return child.answer(clock, self.limits)
        except BaseException:
            if not child.answered:
                self.close()
            raise

    def close(self) -> None:
        """End the child and all that it started."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _ready(self, clock: Clock) -> "_Child":
        """The child that is there, or a new one that has all it needs."""
        if self._child is None:
            self._child = _Child()
            store = self.bench.store and Cache(self.bench.store.folder, self.bench.store.limit_bytes)
            try:
                self._child.send((replace(self.bench, store=store), self.reference, torch.get_num_threads()))
                self._child.answer(clock, Limits())
            except BaseException:
                self.close()
                raise
        return self._child


class _Child:
    """The process, its socket, and what it wrote before it died."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115  closed by kill
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "search.runner", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._words,
                stderr=subprocess.STDOUT,
                env=own_environment(),
                # Ctrl-C is for the search, which ends this process and all that it started as one group.
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self.answered = True

    def send(self, message: object) -> None:
        """Our own objects, to our own process, over a socket that no other one has."""
        try:
            data = cloudpickle.dumps(message)
        except Exception as error:
            problem = f"cannot be kept: model, data or metric do not go to another process ({error})"
            raise ConfigError("limits", problem, "define them in a module, or set limits=null") from error
        self.answered = False
        try:
            self._connection.send_bytes(data)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died("") from None

    def answer(self, clock: Clock, limits: Limits) -> Any:
        """What it says in the end; phases are handed on to the clock's watch."""
        began = time.monotonic()
        while True:
            try:
                if self._connection.poll(POLL_S):
                    kind, content = self._connection.recv()
                    if kind == "phase":
                        clock.phase = content.partition(":")[0]
                        clock.watch(content)
                    elif kind == "done":
                        self.answered = True
                        return content
                    else:
                        self.answered = True
                        raise (Infeasible if kind == "infeasible" else Broken)(*content)
            except (EOFError, ConnectionResetError):
                raise self._died(clock.phase) from None
            self._check(limits, time.monotonic() - began, clock.phase)

    def kill(self) -> None:
        """With all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._words.close()

    def _check(self, limits: Limits, seconds: float, stage: str) -> None:
        if limits.minutes is not None and seconds > 60 * limits.minutes:
            reason = f"it took more than limits.minutes={limits.minutes:g}"
            raise Broken(stage, reason, self._said())
        if limits.memory_gb is not None:
            used = _memory(self._process.pid) / 1e9
            if used > limits.memory_gb:
                reason = f"it took {used:.2f} GB of memory, more than limits.memory_gb={limits.memory_gb:g}"
                raise Broken(stage, reason, self._said())

    def _died(self, stage: str) -> Broken:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return Broken(stage, "its process closed its end and did not end", self._said())
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Broken(stage, f"its process died: {how}", self._said())

    def _said(self) -> str:
        self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, self._words.tell() - LAST_WORDS))
        return self._words.read().decode(errors="replace")


def _memory(pid: int) -> int:
    """Bytes that a process holds in memory; none once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")), 0)


def _serve(connection: Connection) -> None:
    """In the child: make ready, then carry out plan after plan until the socket closes."""

    def watched(work: Callable[[Clock], object]) -> None:
        clock = Clock(watch=lambda phase: connection.send(("phase", phase)))
        try:
            connection.send(("done", work(clock)))
        except Infeasible as infeasible:
            connection.send(("infeasible", (infeasible.reason, infeasible.transient)))
        except Broken as broken:
            connection.send(("broken", (broken.stage, broken.reason, broken.details)))

    bench, reference, threads = _receive(connection)
    torch.set_num_threads(threads)
    carriers: list[Here] = []
    watched(lambda clock: carriers.append(Here(bench, reference, clock)))
    while carriers:
        work = _receive(connection)
        watched(lambda clock: work(carriers[0], clock))  # noqa: B023  run at once


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())  # noqa: S301  from our own parent, over a socket of its own


def main(descriptor: int) -> None:
    """Serve until the other end closes."""
    faulthandler.enable()
    # What is sent may hold a network or a transformation of torchvision, which would be imported as it is.
    importlib.import_module("search.torchvision_compat")
    signal_when_parent_ends(signal.SIGKILL)
    keep_freed_memory()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        # With these a scheduler tells a job that its time is nearly up: that is for the search to hear.
        signal.signal(number, signal.SIG_IGN)
    with Connection(descriptor) as connection, suppress(EOFError, ConnectionResetError, BrokenPipeError):
        _serve(connection)


if __name__ == "__main__":
    # By its own name, under which the other end knows these classes.
    from search import runner

    runner.main(int(sys.argv[1]))
