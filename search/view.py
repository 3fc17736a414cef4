"""Which metrics people see of a trial, and how it is put in a few words; draws nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressors.plan import Settings
from evaluators.measurement import Measurement
from search.trial import TrialRecord


@dataclass(frozen=True, slots=True)
class View:
    """Which metrics are shown as quality, speed, time, size and parameters; the last only where they were counted."""

    quality: str = "accuracy"
    speed: str = "latency_ratio"
    size: str = "size_bytes"
    parameters: str = "parameters"

    @property
    def time(self) -> str:
        """The same reading as `speed`, in milliseconds."""
        return self.speed.replace("_ratio", "_ms")


def describe(record: TrialRecord) -> str:
    """What was done, in a few words; speaks of any method that reports a key which is known here."""
    steps = [_step(s.method, s.shared, record.achieved.get(s.method, s.per_layer)) for s in record.plan.steps]
    target = f"{record.plan.target.runtime} {record.plan.target.precision}"
    return ", ".join([*(steps or ["uncompressed"]), target])


def _step(method: str, shared: Settings, achieved: Mapping[str, Settings]) -> str:
    for key, words in (("clusters", "{} clusters"), ("bits", "int{}")):
        counts = Counter(s[key] for s in achieved.values() if s.get(key))
        if counts:
            found = sorted(counts.items(), reverse=True)
            return ", ".join(f"{words.format(value)} {n} layer{'s' * (n > 1)}" for value, n in found)
    shares = [100 * float(s["sparsity"]) for s in achieved.values() if "sparsity" in s]
    if shares:
        low, high = round(min(shares)), round(max(shares))
        return f"{method} {low} %" if low == high else f"{method} {low}-{high} %"
    skipped = sum(bool(s["skip"]) for s in achieved.values() if "skip" in s)
    if skipped:
        return f"skip {skipped} block{'s' * (skipped > 1)}"
    replaced = sum("weights" in s for s in achieved.values())
    if replaced:
        return f"{method} {replaced} layer{'s' * (replaced > 1)}"
    return f"{method} {shared['epochs']} epochs" if "epochs" in shared else method


def not_ruined(qualities: Sequence[Measurement]) -> list[Measurement]:
    """Those of a front that are not far below the best, where many lie near it; all, where the front is a wide one."""
    values = sorted(m.value for m in qualities)
    top, middle = values[-1], values[len(values) // 2]
    return [m for m in qualities if m.value >= top - max(0.05, 6 * (top - middle))]


def quality_text(measurement: Measurement) -> str:
    """A share in per cent, anything else as it is, with its band."""
    value, low, high = measurement.value, *measurement.interval
    if measurement.metric.unit in SHARES:
        return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"


SHARES = ("share", "agreement")


def scaled(value: float, unit: str = "") -> str:
    """In thousands or millions of a unit; a count has none."""
    return f"{value / 1e6:.2f} M{unit}" if value >= 1e6 else f"{value / 1e3:.1f} k{unit}"


def optional(record: TrialRecord, metric: str) -> Measurement | None:
    """One of its measurements, if it was made."""
    return next((m for m in record.measurements if m.name == metric), None)
