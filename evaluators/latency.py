"""Latency as the median of paired ratios to the uncompressed reference, with a band; the timing is `stopwatch.py`'s."""

import fcntl
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from compressors.errors import ConfigError, Infeasible, at_least
from compressors.plan import Scalar
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Array, Deployed
from evaluators.stopwatch import Reading, Sessions, Stopwatch, Timing


@dataclass
class Latency:
    """Time per call, candidate against reference in turn, in a process of its own, pinned to one core.

    `sessions` times both files are loaded afresh, because the same file runs a few per cent faster or slower from one
    load to the next; each session has `rounds` rounds of `warmup` untimed and `calls` timed calls of each. A reading
    is thrown away when the reference takes longer than its calibrated time by more than `drift`, at most `retries`
    times; one that takes less time by as much is the new standard.
    `floor` is the least half-width of a band: a ratio was seen to move so far from one process to another.
    `core` -1 is the last core of this process. One reading runs at a time on a host, whatever the number of searches.
    `name` is the evaluator's in the configuration, which may hold several, such as one for each size of batch that is
    served: what is fastest for one example need not be for eight.
    Sessions of a preview count towards the full measurement of the same file, which times only those still missing.
    """

    name: str = "latency"
    batch: int = 1
    threads: int = 1
    core: int = -1
    sessions: int = 4
    rounds: int = 6
    warmup: int = 5
    calls: int = 10
    seconds: float = 12.0
    drift: float = 0.10
    floor: float = 0.06
    retries: int = 6
    of_machine: ClassVar[bool] = True
    _stopwatch: Stopwatch | None = field(default=None, init=False, repr=False)
    _calibrated: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _kept: "_Kept | None" = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuses counts that would time nothing; a band needs two sessions."""
        self._at_least(1, "batch", "rounds", "calls", "retries")
        self._at_least(2, "sessions")
        self._at_least(0, "threads", "warmup", "seconds", "floor")
        if not isinstance(self.core, int):
            problem = f"is {self.core!r}"
            raise ConfigError(f"evaluator.{self.name}.core", problem, "give a whole number, -1 for the last")

    def _at_least(self, low: int, *options: str) -> None:
        at_least(low, **{f"evaluator.{self.name}.{option}": getattr(self, option) for option in options})

    def metrics(self) -> tuple[Metric, ...]:
        """The ratio to the reference, and the same reading in milliseconds per call of the whole batch."""
        return (
            Metric(f"{self.name}_ratio", "of reference", "minimize"),
            Metric(f"{self.name}_ms", "ms", "minimize"),
        )

    def fed(self, deployed: Deployed, examples: Examples) -> Sequence[Array]:
        """What a timed call is given: the first `batch` examples."""
        return [np.resize(x[: self.batch], (self.batch, *x.shape[1:])) for x in examples.inputs]

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Time both on what they are `fed`; raises `Infeasible` when the machine does not hold still."""
        reading = self._read(deployed, reference, examples, self.sessions)
        self._kept = None
        return self._measurements(reading, reference, band(reading.ratios, self.floor))

    def preview(
        self, deployed: Deployed, reference: Deployed, examples: Examples, share: float
    ) -> Sequence[Measurement]:
        """`share` of the sessions, at least one; they are too few to say how far they differ, see `early_band`."""
        reading = self._read(deployed, reference, examples, math.ceil(share * self.sessions))
        self._kept = _Kept(deployed, reference, reading)
        return self._measurements(reading, reference, early_band(reading.ratios, self.floor))

    def close(self) -> None:
        """End the timing process."""
        if self._stopwatch is not None:
            self._stopwatch.close()
            self._stopwatch = None

    def _read(self, deployed: Deployed, reference: Deployed, examples: Examples, sessions: int) -> Reading:
        """So many sessions, of which those kept from a preview of the same file are not timed again."""
        kept = self._kept.sessions_of(deployed, reference) if self._kept else ()
        missing = sessions - len(kept)
        if missing <= 0:
            return Reading(kept)
        inputs = self.fed(deployed, examples), self.fed(reference, examples)
        seconds = self.seconds * missing / self.sessions
        timing = Timing(self.batch, self.threads, missing, self.rounds, self.warmup, self.calls, seconds)
        return Reading(kept + self._steady(deployed, reference, inputs, timing).sessions)

    def _measurements(
        self, reading: Reading, reference: Deployed, ends: tuple[float, float, float]
    ) -> Sequence[Measurement]:
        conditions: dict[str, Scalar] = {
            "batch": self.batch,
            "threads": self.threads,
            "reference": f"{reference.runtime.name} {reference.precision}",
            "reference_ms": round(reading.reference_ms, 6),
            "sessions": len(reading.sessions),
        }
        low, value, high = ends
        n = sum(map(len, reading.sessions))
        ratio, milliseconds = self.metrics()
        return (
            Measurement(ratio, value, (low, high), n, conditions),
            Measurement(milliseconds, *_in_ms(reading, low, value, high), n, conditions),
        )

    def _steady(
        self, deployed: Deployed, reference: Deployed, inputs: tuple[Sequence[Array], Sequence[Array]], timing: Timing
    ) -> Reading:
        """Repeat until the reference is at its calibrated speed, or has clearly settled at a new one."""
        self._stopwatch = self._stopwatch or Stopwatch(self.core, self.threads)
        seen: list[float] = []
        for attempt in range(self.retries):
            with _host_lock():
                reading = self._stopwatch.read(deployed, reference, inputs, timing)
            now = reading.reference_ms
            usual = self._calibrated.setdefault(reference.sha256, now)
            # Whoever shares the core makes it slower: where it is this much faster, the calibrated time was disturbed.
            if now / usual - 1 < -self.drift:
                self._calibrated[reference.sha256] = now
            if now / usual - 1 <= self.drift:
                return reading
            # A processor that changed its clock for good would otherwise lose every later trial.
            if len(seen) >= 2 and max(*seen[-2:], now) / min(*seen[-2:], now) - 1 <= self.drift / 2:
                self._calibrated[reference.sha256] = now
                return reading
            seen.append(now)
            if attempt < self.retries - 1:
                time.sleep(0.5 * 2**attempt)
        raise Infeasible(
            f"the reference took {', '.join(f'{ms:.3g}' for ms in seen)} ms instead of {usual:.3g} ms in "
            f"{self.retries} readings: the machine is too busy to time anything",
            transient=True,
        )


@dataclass(frozen=True)
class _Kept:
    """What a preview read of one file."""

    deployed: Deployed
    reference: Deployed
    reading: Reading

    def sessions_of(self, deployed: Deployed, reference: Deployed) -> Sessions:
        same = deployed is self.deployed and reference is self.reference
        return self.reading.sessions if same else ()


def band(sessions: Sequence[Sequence[float]], floor: float = 0.0) -> tuple[float, float, float]:
    """The median over all rounds with a 95 % band: what one more session would read.

    Rounds within a session agree closer than sessions do, so the band rests on the session medians alone: a t interval
    for the next one, in logarithms because ratios multiply. The spread of the rounds is its least width,
    and so is `floor` each way: what no session of one process can see.
    """
    rounds = sorted(ratio for session in sessions for ratio in session)
    value = statistics.median(rounds)
    logs = [math.log(statistics.median(session)) for session in sessions]
    half = max(floor, _order_statistic_half_width(rounds, value))
    if len(logs) > 1:
        t = _T95[min(len(logs) - 1, len(_T95)) - 1]
        half = max(half, t * statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs)))
    return value * math.exp(-half), value, value * math.exp(half)


def early_band(sessions: Sequence[Sequence[float]], floor: float) -> tuple[float, float, float]:
    """The median over all rounds of one session or a few, with a 95 % band for what all sessions will say.

    One session tells nothing of how far sessions differ, and two next to nothing (a t interval would be 13 deviations
    wide), so the spread is taken from what was seen before: `floor` stands for less than two deviations between
    processes, and for one session the half-width is 2.5 times that, over the root of their number for more. It is never
    less than what the sessions at hand differ by.
    """
    rounds = sorted(ratio for session in sessions for ratio in session)
    value = statistics.median(rounds)
    logs = [math.log(statistics.median(session)) for session in sessions]
    half = max(2.5 * floor / math.sqrt(len(logs)), max(logs) - min(logs), _order_statistic_half_width(rounds, value))
    return value * math.exp(-half), value, value * math.exp(half)


# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def _order_statistic_half_width(rounds: Sequence[float], median: float) -> float:
    """Half of the distribution-free 95 % interval of a median, in logarithms."""
    n = len(rounds)
    depth = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return max(math.log(median / rounds[depth]), math.log(rounds[n - 1 - depth] / median))


def _in_ms(reading: Reading, low: float, value: float, high: float) -> tuple[float, tuple[float, float]]:
    ms = reading.candidate_ms
    return ms, (ms * low / value, ms * high / value)


@contextmanager
def _host_lock() -> Iterator[None]:
    """One reading at a time on this host; the system frees the lock of a process that died."""
    path = Path(tempfile.gettempdir()) / "compareto-latency.lock"
    # Readable is enough for a lock: the file may belong to another user of this host.
    if not path.exists():
        path.touch(mode=0o644)
    with path.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
