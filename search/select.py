"""Which member of the front to deploy, by a rule; computes from records and never measures or stores."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from compressors.errors import ConfigError
from evaluators.measurement import Measurement
from search.pareto import front
from search.trial import TrialRecord


@dataclass(frozen=True)
class Choice:
    """What a rule picked; without `met` nothing met its bar, `record` is the nearest and `reason` says by how much."""

    record: TrialRecord
    met: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Bound:
    """A limit on one metric, from above or below as its direction says: what is beyond it stays off the front."""

    metric: str
    limit: float

    def violation(self, record: TrialRecord) -> float:
        """How far beyond the limit, in the metric's unit; at most 0 where it is kept."""
        return self.beyond(record.value(self.metric))

    def beyond(self, measurement: Measurement) -> float:
        """The same for a measurement of the metric."""
        excess = measurement.value - self.limit
        return excess if measurement.metric.direction == "minimize" else -excess


class Rule(Protocol):
    """One way to choose."""

    @property
    def speed(self) -> str:
        """The metric by which a candidate may be called slower than its input."""

    def needs(self) -> Sequence[str]:
        """The metrics that every record must have."""

    def pick(self, candidates: Sequence[TrialRecord], original: TrialRecord) -> Choice:
        """Choose among at least one candidate; `original` is the uncompressed fp32 model."""


@dataclass(frozen=True)
class Fastest:
    """The fastest among those that lose at most `drop` of quality, in the quality's own unit."""

    quality: str = "accuracy"
    drop: float = 0.01
    speed: str = "latency_ratio"

    def __post_init__(self) -> None:
        """Refuses a negative drop."""
        _check_drop(self.drop)

    def needs(self) -> Sequence[str]:
        """Quality and speed."""
        return (self.quality, self.speed)

    def pick(self, candidates: Sequence[TrialRecord], original: TrialRecord) -> Choice:
        """The least value of `speed` within the drop."""
        return _best_within_drop("fastest", self.speed, candidates, original, self.quality, self.drop)


@dataclass(frozen=True)
class Smallest:
    """The smallest among those that lose at most `drop` of quality, in the quality's own unit."""

    quality: str = "accuracy"
    drop: float = 0.01
    size: str = "size_bytes"
    speed: str = "latency_ratio"

    def __post_init__(self) -> None:
        """Refuses a negative drop."""
        _check_drop(self.drop)

    def needs(self) -> Sequence[str]:
        """Quality, size and speed."""
        return (self.quality, self.size, self.speed)

    def pick(self, candidates: Sequence[TrialRecord], original: TrialRecord) -> Choice:
        """The least value of `size` within the drop."""
        return _best_within_drop("smallest", self.size, candidates, original, self.quality, self.drop)


@dataclass(frozen=True)
class MostAccurate:
    """The best quality among those whose `speed` is at most `bound`."""

    quality: str = "accuracy"
    speed: str = "latency_ratio"
    bound: float = 0.25

    def __post_init__(self) -> None:
        """Refuses a bound that nothing can meet."""
        if self.bound <= 0:
            raise ConfigError("rule.bound", f"is {self.bound}", "give a latency above 0, such as 0.25")

    def needs(self) -> Sequence[str]:
        """Quality and speed."""
        return (self.quality, self.speed)

    def pick(self, candidates: Sequence[TrialRecord], original: TrialRecord) -> Choice:
        """Among equals in quality, the faster one."""
        fast = [r for r in candidates if r.value(self.speed).value <= self.bound]
        if not fast:
            nearest = min(candidates, key=lambda r: r.value(self.speed).value)
            found = nearest.value(self.speed).value
            return Choice(
                nearest,
                False,
                f"no candidate has {self.speed} at most {self.bound:g}: the nearest, trial {nearest.number}, "
                f"has {found:.4g}, {found - self.bound:.2g} too much",
            )
        best = min(fast, key=lambda r: (_cost(r.value(self.quality)), r.value(self.speed).value))
        found = best.value(self.quality).value
        return Choice(best, True, f"most accurate with {self.speed} at most {self.bound:g}: {self.quality} {found:.4g}")


@dataclass(frozen=True)
class Knee:
    """Where the front bends: the least sum of costs, each scaled to 0..1 over the front.

    It is the point farthest from the plane through the front's ends (Das 1999, Structural Optimization 18). One very
    bad end stretches the scale and drags the knee towards it; a rule with a bar does not have that weakness.
    """

    objectives: Sequence[str] = ("accuracy", "latency_ratio")
    speed: str = "latency_ratio"

    def needs(self) -> Sequence[str]:
        """The objectives and speed."""
        return (*self.objectives, self.speed)

    def pick(self, candidates: Sequence[TrialRecord], original: TrialRecord) -> Choice:
        """Every front has a knee, so its bar is always met."""
        ranges = {name: _range(candidates, name) for name in self.objectives}

        def cost(record: TrialRecord) -> float:
            return sum((_cost(record.value(n)) - low) / (high - low or 1.0) for n, (low, high) in ranges.items())

        best = min(candidates, key=cost)
        found = ", ".join(f"{name} {shown(best.value(name))}" for name in self.objectives)
        return Choice(best, True, f"the knee of the front: {found}")


def shown(measurement: Measurement) -> str:
    """The value for a sentence: four digits, or the whole number where that is longer."""
    return f"{measurement.value:,.0f}" if abs(measurement.value) >= 10_000 else f"{measurement.value:.4g}"


def baselines(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The uncompressed model wherever it was measured, in the order of the trials."""
    measured = (r for r in records if not r.plan.steps and r.measured)
    return sorted(measured, key=lambda r: r.number)


def within(records: Iterable[TrialRecord], bounds: Sequence[Bound]) -> list[TrialRecord]:
    """The measured records that keep every bound."""
    return [r for r in records if r.measured and all(b.violation(r) <= 0 for b in bounds)]


def useful(records: Sequence[TrialRecord], speed: str) -> list[TrialRecord]:
    """The measured records that are not clearly slower than their own input.

    Their own input is the uncompressed model in the same runtime, at that runtime's fastest precision; uncompressed
    models always stay.
    """
    inputs = baselines(records)
    return [r for r in records if r.measured and not (r.plan.steps and inputs and _slower(r, inputs, speed))]


def front_of(
    records: Iterable[TrialRecord], objectives: Sequence[str], bounds: Sequence[Bound] = ()
) -> list[TrialRecord]:
    """The measured records within all bounds that no other such one dominates."""
    kept = within(records, bounds)
    return [kept[i] for i in front([r.values(objectives) for r in kept])]


def choose(
    records: Sequence[TrialRecord], rule: Rule, objectives: Sequence[str], bounds: Sequence[Bound] = ()
) -> Choice:
    """Apply the rule to the front of what is not clearly slower than its own input.

    Uncompressed models may be chosen themselves. The slow go before the front is drawn: one that is small but slow must
    not push the model it came from off it. Where nothing is within the bounds, they are left aside. Raises
    `ConfigError` when nothing was measured or a metric is missing.
    """
    measured = _measured(records, [*objectives, *rule.needs(), *(bound.metric for bound in bounds)])
    inputs = baselines(measured)
    original = next((r for r in inputs if r.plan.target.precision == "fp32"), next(iter(inputs), None))
    if original is None:
        raise ConfigError("study", "holds no measured uncompressed model", "run its first trials to the end")
    quick = useful(measured, rule.speed)
    kept = front_of(quick, objectives, bounds)
    if kept:
        return rule.pick(kept, original)
    choice = rule.pick(front_of(quick, objectives), original)
    limits = ", ".join(f"{bound.metric} {bound.limit:g}" for bound in bounds)
    return replace(choice, met=False, reason=f"nothing is within the bounds ({limits}); without them, {choice.reason}")


def _measured(records: Iterable[TrialRecord], metrics: Sequence[str]) -> list[TrialRecord]:
    measured = [r for r in records if r.measured]
    if not measured:
        raise ConfigError("study", "has no measured trial", "give it a larger budget and run it again")
    for record in measured:
        names = {m.name for m in record.measurements}
        for metric in metrics:
            if metric not in names:
                raise ConfigError(
                    f"metric {metric}", f"was not measured in trial {record.number}", f"use one of {sorted(names)}"
                )
    return measured


def _slower(record: TrialRecord, inputs: Sequence[TrialRecord], speed: str) -> bool:
    own = [r for r in inputs if r.plan.target.runtime == record.plan.target.runtime] or inputs
    best = min((r.value(speed) for r in own), key=_cost)
    return best.clearly_better(record.value(speed))


def _best_within_drop(
    word: str, metric: str, candidates: Sequence[TrialRecord], original: TrialRecord, quality: str, drop: float
) -> Choice:
    def loss(record: TrialRecord) -> float:
        # Rounded, so that a drop of exactly one point is not missed by the last bit of a subtraction.
        return round(_cost(record.value(quality)) - _cost(original.value(quality)), 9)

    within = [r for r in candidates if loss(r) <= drop]
    if not within:
        nearest = min(candidates, key=lambda r: (loss(r), _cost(r.value(metric))))
        return Choice(
            nearest,
            False,
            f"no candidate keeps {quality} within {drop:g} of the uncompressed {shown(original.value(quality))}: "
            f"the nearest, trial {nearest.number}, loses {loss(nearest):.4g}, {loss(nearest) - drop:.2g} too much",
        )
    # Within the bands of all others is a tie: no quality is given away for it. By the value, as its own band may be
    # so wide that it touches anything; and of all, as that of the fastest may be as wide.
    bar = min(_worst(r.value(metric)) for r in within)
    tied = [r for r in within if _cost(r.value(metric)) <= bar]
    # But nothing is recommended for what its own value says that it does not do.
    tied = [r for r in tied if _cost(r.value(metric)) <= _cost(original.value(metric))] or tied
    best = min(tied, key=lambda r: (loss(r), _cost(r.value(metric))))
    lost = (
        f"{loss(best):.4g} lost" if loss(best) > 0 else f"{-loss(best):.4g} gained" if loss(best) < 0 else "none lost"
    )
    return Choice(
        best, True, f"{word} with at most {drop:g} of {quality} lost: {metric} {shown(best.value(metric))}, {lost}"
    )


def _cost(measurement: Measurement) -> float:
    """The value with its sign turned where more is better."""
    return measurement.value if measurement.metric.direction == "minimize" else -measurement.value


def _worst(measurement: Measurement) -> float:
    """The worse end of the band as a cost."""
    low, high = measurement.interval
    return high if measurement.metric.direction == "minimize" else -low


def _range(records: Sequence[TrialRecord], metric: str) -> tuple[float, float]:
    costs = [_cost(r.value(metric)) for r in records]
    return min(costs), max(costs)


def _check_drop(drop: float) -> None:
    if drop < 0:
        raise ConfigError("rule.drop", f"is {drop}", "give the largest loss you accept, 0 or more")
