"""Stops a candidate that can no longer join the front, with a stated error; it measures nothing itself."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from compressors.errors import ConfigError
from compressors.pipeline import loss_after
from compressors.plan import CompressionPlan
from evaluators.accuracy import Z95
from evaluators.divergence import LOSS
from evaluators.measurement import Measurement
from search.pareto import dominates
from search.select import Bound, shown, useful, within
from search.trial import Look, Midway, Stop, TrialRecord


@dataclass(frozen=True)
class Ladder:
    """When to give a candidate up: `error` bounds the chance that it would have been on the final front.

    The error is shared out evenly (Bonferroni) over all looks, which are one during training, the proxy's and one per
    entry of `shares`, and at each preview over the metrics that are not yet certain. `quality` is the objective that
    the proxy speaks of, `speed` the metric by which a candidate may be called slower than its own input.
    """

    objectives: tuple[str, ...]
    quality: str
    speed: str
    bounds: tuple[Bound, ...] = ()
    shares: tuple[float, ...] = (0.25, 0.5)
    error: float = 0.05

    def __post_init__(self) -> None:
        """Refuses an error that is no rate, and shares that do not grow towards the whole."""
        if not 0 < self.error < 0.5:
            raise ConfigError("ladder.error", f"is {self.error}", "give a rate above 0 and below 0.5, such as 0.05")
        numbers = all(isinstance(share, float) and 0 < share < 1 for share in self.shares)
        if not numbers or list(self.shares) != sorted(set(self.shares)):
            raise ConfigError("ladder.shares", f"is {list(self.shares)}", "give growing shares between 0 and 1")

    @property
    def error_per_look(self) -> float:
        """What one look may spend."""
        return self.error / (2 + len(self.shares))

    @property
    def witnesses(self) -> int:
        """So many others bring the chance that one more outdoes them all down to what one look may spend."""
        return math.ceil(1 / self.error_per_look - 1e-9) - 1

    def judge(
        self, plan: CompressionPlan, records: Sequence[TrialRecord], expected: Mapping[str, float] | None = None
    ) -> "Judge | None":
        """For one candidate, against what is known of the others now; the uncompressed model is never judged.

        `expected` is what the sampler predicts of its objectives; without it no training is stopped, but for a bound.
        """
        if not plan.steps:
            return None
        measured = [record for record in records if record.measured]
        return Judge(self, tuple(within(useful(measured, self.speed), self.bounds)), tuple(measured), expected or {})


@dataclass(frozen=True)
class Judge:
    """Holds one candidate's best case at each rung against the `rivals`; `measured` records teach what a loss means.

    A rival keeps all bounds and is of use to every rule, so whatever it dominates would be on no front. The best case
    is better than what the full measurement will say, with the error stated.
    """

    ladder: Ladder
    rivals: tuple[TrialRecord, ...]
    measured: tuple[TrialRecord, ...]
    expected: Mapping[str, float]

    @property
    def wanted(self) -> frozenset[str]:
        """Objectives and bounds."""
        return frozenset((*self.ladder.objectives, *(bound.metric for bound in self.ladder.bounds)))

    @property
    def shares(self) -> tuple[float, ...]:
        """As configured."""
        return self.ladder.shares

    def verdict(self, look: Look) -> Stop | None:
        """None too while nothing is within the bounds, as the nearest then counts, and once all that decides is known.

        What is known by then is compared with the rest as it is, on the front or off it.
        """
        if self.wanted <= look.final.keys() or not self.rivals:
            return None
        best = self._best_case(look)
        return self._out_of_bounds(look.rung, best) or self._dominated(look.rung, best)

    def midway(self, at: Midway) -> Stop | None:
        """When others that were no worse at this point of the same training would all be worth nothing in its place.

        In its place means: with their quality, and with costs as far from what was expected of the candidate as theirs
        came out from what was expected of them. Conformal as in `promise`, over quality and costs jointly: of n + 1
        that may be exchanged, one alone is worth something with a chance of at most 1 / (n + 1), and this one is no
        better than any. Only the last break counts; where fewer than `witnesses` were trained for as long, nothing
        is stopped.
        """
        if not self.rivals or not _last_look(at):
            return None
        lost = [(loss, record) for record in self.measured if (loss := _loss_at(record, at)) is not None]
        known = sorted((pair for pair in lost if pair[0] <= at.loss), key=lambda pair: pair[0])
        nearest = [record for _, record in known[-self.ladder.witnesses :]]
        if len(nearest) < self.ladder.witnesses or not all(map(self._worthless, map(self._in_its_place, nearest))):
            return None
        qualities = [record.value(self.ladder.quality).value for record in nearest]
        return Stop(
            f"training {at.done} of {at.wanted}",
            self.ladder.quality,
            (min(qualities), max(qualities)),
            f"none of {len(nearest)} that did no worse by then would join the front in its place",
        )

    def _in_its_place(self, record: TrialRecord) -> dict[str, Measurement]:
        """What the candidate would be if it turned out as this one did."""
        outcome = {self.ladder.quality: record.value(self.ladder.quality)}
        for name in self.ladder.objectives:
            if name != self.ladder.quality and record.expected.get(name, 0) > 0 and name in self.expected:
                factor, found = self.expected[name] / record.expected[name], record.value(name)
                low, high = found.interval
                outcome[name] = replace(found, value=factor * found.value, interval=(factor * low, factor * high))
        return outcome

    def _worthless(self, outcome: Mapping[str, Measurement]) -> bool:
        """Beyond a bound, or dominated."""
        return bool(self._out_of_bounds("", outcome) or self._dominated("", outcome))

    def promise(self, loss: float) -> Measurement | None:
        """The best quality that a candidate with this calibration loss may still have; None with too short a history.

        Conformal (Vovk 2005), without an assumption on distributions: of n + 1 candidates whose quality does not grow
        with their loss, the one with the largest loss is the best with a chance of at most 1 / (n + 1). The n are those
        measured in full with the nearest smaller losses; fewer than it takes to bring that chance down to what one
        look may spend (79 at the defaults) promise nothing, and so stop nothing. Candidates that were stopped are
        missing among the n, which only makes the best of them better.
        """
        count = self.ladder.witnesses
        nearest = sorted((pair for pair in self._lessons() if pair[0] <= loss), key=lambda pair: pair[0])[-count:]
        if len(nearest) < count:
            return None
        qualities = [quality for _, quality in nearest]
        best = max(qualities, key=_merit)
        ends = (*(q.value for q in qualities), *best.interval)
        low, high = (min(ends), best.interval[1]) if _grows(best) else (best.interval[0], max(ends))
        return Measurement(best.metric, best.value, (low, high), best.n, best.conditions)

    def _lessons(self) -> Iterator[tuple[float, Measurement]]:
        """Calibration loss and quality of every record that has both."""
        for record in self.measured:
            known = {m.name: m for m in record.measurements}
            if {LOSS.name, self.ladder.quality} <= known.keys():
                yield known[LOSS.name].value, known[self.ladder.quality]

    def _best_case(self, look: Look) -> dict[str, Measurement]:
        """Per metric of which anything is known, the most favourable that its full measurement may come out."""
        uncertain = self.wanted & (look.previews.keys() - look.final.keys())
        error = self.ladder.error_per_look / max(1, len(uncertain))
        best = {name: best_case(look.previews[name], look.share, error) for name in uncertain} | dict(look.final)
        quality = self.ladder.quality
        if quality in self.wanted - look.final.keys() and LOSS.name in look.final:
            cases = [*filter(None, (best.get(quality), self.promise(look.final[LOSS.name].value)))]
            best |= {case.name: case for case in sorted(cases, key=_merit, reverse=True)}  # the tighter one stays
        return best

    def _out_of_bounds(self, rung: str, best: Mapping[str, Measurement]) -> Stop | None:
        for bound in self.ladder.bounds:
            case = best.get(bound.metric)
            if case is not None and bound.beyond(case) > 0:
                reason = f"{bound.metric} can be {shown(case)} at best, which misses the bound {bound.limit:g}"
                return Stop(rung, bound.metric, case.interval, reason)
        return None

    def _dominated(self, rung: str, best: Mapping[str, Measurement]) -> Stop | None:
        if not best.keys() >= set(self.ladder.objectives):
            return None
        row = [best[name] for name in self.ladder.objectives]
        rival = next((r for r in self.rivals if dominates(r.values(self.ladder.objectives), row)), None)
        if rival is None:
            return None
        decisive = next(case for case in row if rival.value(case.name).clearly_better(case))
        cases = ", ".join(f"{case.name} {shown(case)}" for case in row)
        return Stop(rung, decisive.name, decisive.interval, f"trial {rival.number} dominates its best case ({cases})")


def best_case(preview: Measurement, share: float, error: float) -> Measurement:
    """The most favourable full measurement that a preview of `share` allows, but for a chance of `error`.

    The value is the end of the preview's band, widened from two-sided 95 % to one-sided `error` as for a normal
    distribution. A full measurement has a band too, which reaches further by about the preview's times the root of
    `share`; the interval's favourable end is where that band may end.
    """
    widen = NormalDist().inv_cdf(1 - error) / Z95
    value, (low, high) = preview.value, preview.interval
    worst, best = value - widen * (value - low), value + widen * (high - value)
    if _grows(preview):
        interval = (worst, best + math.sqrt(share) * (high - value))
        return replace(preview, value=best, interval=interval)
    interval = (worst - math.sqrt(share) * (value - low), best)
    return replace(preview, value=worst, interval=interval)


def _last_look(at: Midway) -> bool:
    """Rounds double, so the last one begins at half or later."""
    return 2 * float(at.done) >= float(at.wanted)


def _loss_at(record: TrialRecord, at: Midway) -> float | None:
    """The loss that an equally long training had at the same point; None where it is not known."""
    reported = record.achieved.get(at.method, {}).get("", {})
    key = loss_after(at.done)
    return float(reported[key]) if reported.get(at.key) == at.wanted and key in reported else None


def _grows(measurement: Measurement) -> bool:
    return measurement.metric.direction == "maximize"


def _merit(measurement: Measurement) -> float:
    return measurement.value if _grows(measurement) else -measurement.value
