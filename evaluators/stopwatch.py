"""Times two deployed models in turn in a process of its own, pinned to one core; knows nothing of statistics.

The parent talks to `python -m evaluators.stopwatch` in lines of JSON, so that no script of the user's is imported again
and nothing is pickled.
"""

import importlib
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressors.errors import Infeasible
from evaluators.runtime import Array, Deployed, Session

PATIENCE_S = 300
Call = Callable[[], object]
"""One inference."""
Sessions = tuple[tuple[tuple[float, float], ...], ...]
"""`[session][round]`: seconds per call of `(reference, candidate)`."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How to time; see `Latency` for the meaning of each. `seconds` bounds the timed part of one reading."""

    batch: int
    threads: int
    sessions: int
    rounds: int
    warmup: int
    calls: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What was timed, round by round."""

    sessions: Sessions

    @property
    def ratios(self) -> tuple[tuple[float, ...], ...]:
        """`ratios[session][round]` of candidate to reference."""
        return tuple(tuple(candidate / reference for reference, candidate in session) for session in self.sessions)

    @property
    def reference_ms(self) -> float:
        """The median over all rounds."""
        return 1e3 * statistics.median(reference for session in self.sessions for reference, _ in session)

    @property
    def candidate_ms(self) -> float:
        """The median over all rounds."""
        return 1e3 * statistics.median(candidate for session in self.sessions for _, candidate in session)


class Stopwatch:
    """Owns the timing process, pinned to `core` of those it may use and, for more `threads`, to the ones before it."""

    def __init__(self, core: int, threads: int = 1) -> None:
        self._place = (str(core), str(max(1, threads)))
        self._process: subprocess.Popen[str] | None = None

    def read(
        self,
        candidate: Deployed,
        reference: Deployed,
        inputs: tuple[Sequence[Array], Sequence[Array]],
        timing: Timing,
    ) -> Reading:
        """Time both, each on its own `inputs`; raises `Infeasible` when a file crashes the process or never answers."""
        with tempfile.TemporaryDirectory() as folder:
            answer = self._ask(
                {
                    "candidate": _describe(candidate, inputs[0], Path(folder, "candidate")),
                    "reference": _describe(reference, inputs[1], Path(folder, "reference")),
                    "timing": asdict(timing),
                }
            )
        return Reading(tuple(tuple((r, c) for r, c in session) for session in answer["sessions"]))

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, question: Mapping[str, Any]) -> Any:
        process = self._process = self._process or _start(*self._place)
        assert process.stdin is not None  # noqa: S101  both are pipes
        assert process.stdout is not None  # noqa: S101
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], PATIENCE_S)
            line = process.stdout.readline() if ready else ""
        except BrokenPipeError:
            ready, line = [process.stdin], ""
        if not line:
            how = f"died with exit code {process.wait()}" if ready else f"gave no answer in {PATIENCE_S} s"
            self.close()
            raise Infeasible(f"timing {question['candidate']['folder']}: the process {how}")
        answer = json.loads(line)
        if "error" in answer:
            raise Infeasible(f"timing failed: {answer['error']}")
        return answer


def own_environment() -> dict[str, str]:
    """For another Python: the packages may be on this one's path only (a checkout, not an installation)."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _start(core: str, threads: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "evaluators.stopwatch", core, threads],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=own_environment(),
    )


def _describe(deployed: Deployed, inputs: Sequence[Array], scratch: Path) -> dict[str, Any]:
    """How to load and call it; the arrays are handed over as files."""
    loader: Any = deployed.runtime.loader()
    scratch.mkdir()
    paths = [scratch / f"{i}.npy" for i in range(len(inputs))]
    for path, x in zip(paths, inputs, strict=True):
        np.save(path, x, allow_pickle=False)
    return {
        "inputs": list(map(str, paths)),
        "module": loader.__module__,
        "function": loader.__name__,
        "folder": str(deployed.folder),
        "precision": deployed.precision,
    }


def _serve() -> None:
    """Answer questions until the pipe closes; whatever the runtimes print goes to stderr."""
    # Ctrl-C is for the search.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _pin(int(sys.argv[1]), int(sys.argv[2]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _time(json.loads(line))
        except Exception as error:  # noqa: BLE001  a file that cannot be run must not take the process down
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _time(question: Mapping[str, Any]) -> dict[str, Any]:
    timing = Timing(**question["timing"])
    # Reference and candidate share the time evenly over the sessions.
    bound = timing.seconds / timing.sessions
    return {"sessions": [_session(question, timing, bound) for _ in range(timing.sessions)]}


def _session(question: Mapping[str, Any], timing: Timing, bound: float) -> list[tuple[float, float]]:
    """One fresh load of both files: seconds per call `(reference, candidate)` in each round."""
    reference = _load(question["reference"], timing)
    candidate = _load(question["candidate"], timing)
    once = sum(min(_calls(call, 1 + timing.warmup // 4)) for call in (reference, candidate))
    timing = _within(timing, bound / (timing.rounds * max(once, 1e-9)))
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < timing.rounds and (not pairs or time.perf_counter() - began < bound):
        pairs.append((_median_call(reference, timing), _median_call(candidate, timing)))
    return pairs


def _within(timing: Timing, affordable: float) -> Timing:
    """Fewer calls a round where a model is so slow that the wanted ones would not fit; never less than one."""
    share = min(1.0, affordable / (timing.warmup + timing.calls))
    return replace(timing, warmup=math.ceil(share * timing.warmup), calls=math.ceil(share * timing.calls))


def _median_call(call: Call, timing: Timing) -> float:
    """Seconds; the untimed calls bring weights and code back into the caches after the other model ran."""
    _calls(call, timing.warmup)
    return statistics.median(_calls(call, timing.calls))


def _calls(call: Call, count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


def _load(description: Mapping[str, Any], timing: Timing) -> Call:
    load: Callable[..., Session] = getattr(importlib.import_module(description["module"]), description["function"])
    inputs = [np.load(path, allow_pickle=False) for path in description["inputs"]]
    session = load(description["folder"], description["precision"], timing.batch, timing.threads)
    return lambda: session(*inputs)


def _pin(core: int, threads: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[(core - i) % len(allowed)] for i in range(threads)})


if __name__ == "__main__":
    _serve()
