"""Where a study stands: its trials as arrays, its front, and what was fitted to them; it proposes nothing."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from compressors.plan import Scalar
from search.beliefs import (
    LEAST_LOSS,
    Correction,
    Level,
    Linear,
    Relation,
    correct,
    improvement,
    regress,
    relate,
    uncovered,
)
from search.facts import Aim, Fact, Parsed, Reader
from search.solver import Floats, Ints

# How many of the newest trials beliefs rest on, and how many trained prefixes are worth another look.
MEMORY, PREFIXES = 256, 6
# Before anything was timed: seconds of a trial that trains nothing, and of one unit of growth.
TRIAL_S, GROWTH_S = 2.0, 2.0
# What one more step of growth is worth before it was seen: a third of the loss.
GROWTH_GAIN = 0.4
# However far out of the box a loss is, this much it tells of its parts.
LEAST_WEIGHT = 0.2
LATENCY_NOISE, SIZE_NOISE = 0.04, 0.005
# Trials of one kind differ in what they take; from so many times the usual on, something else is to blame.
PROPORTION = 3.0


class Standing:
    """What the finished trials of a study say, and the most likely beliefs about it."""

    def __init__(self, reader: Reader, aim: Aim, facts: Sequence[Fact]) -> None:
        self.reader, self.aim, self.tables = reader, aim, reader.tables
        self.facts = sorted(facts, key=lambda fact: fact.number)
        self.parsed, rows = reader.read(self.facts)
        self.picks, self.base, self.described = reader.picks[rows], reader.base[rows], reader.described[rows]
        self.targets: Ints = np.array([p.target for p in self.parsed], dtype=np.intp)
        self.growths: Ints = np.array([p.growth for p in self.parsed], dtype=np.intp)
        self.values: Floats = np.array([f.values for f in self.facts], dtype=np.float64).reshape(-1, len(aim.roles))
        self.done: NDArray[np.bool_] = np.array([f.complete for f in self.facts], dtype=bool)
        self.violations: Floats = np.array([f.violation for f in self.facts], dtype=np.float64)
        self.known = bool(self.done.any())

    # -- The front

    @cached_property
    def members(self) -> list[int]:
        """Positions of the allowed trials that nothing dominates."""
        return self._unbeaten(np.flatnonzero(self._allowed))

    @property
    def _allowed(self) -> NDArray[np.bool_]:
        return self.done & (self.violations <= 0)

    def _unbeaten(self, trials: Ints) -> list[int]:
        alive = sorted(trials, key=lambda i: tuple(self.values[i]))
        left, front = np.array(alive, dtype=np.intp), []
        while len(left):
            front.append(int(left[0]))
            left = left[~(self.values[left[0]] <= self.values[left]).all(1)]
        return front

    @cached_property
    def front(self) -> Floats:
        """`(members, objectives)`."""
        return self.values[self.members]

    @cached_property
    def zero(self) -> float:
        """The quality of a model that has lost nothing."""
        quality = self.values[self.done, self.aim.quality]
        if not len(quality):
            return 0.0
        none = self.base[self.done].sum(1) <= 0
        return float(quality[none].mean() if none.any() else quality.min())

    @cached_property
    def box(self) -> tuple[Floats, Floats]:
        """Where a gain counts: quality down to what is tolerated, costs up to those of the front."""
        m, q = len(self.aim.roles), self.aim.quality
        if not self.known:
            return np.zeros(m), np.ones(m)
        front = self.front if len(self.front) else self.values[self.done]
        high, low = front.max(0), np.minimum(front.min(0), 0.0)
        high[q] = self.zero + self.tolerated if self.tolerated else float(self.values[self.done, q].max())
        low[q] = min(float(front[:, q].min()), self.zero) - 0.1 * (high[q] - self.zero)
        return low, np.maximum(high, low + 1e-9)

    def prefixes(self) -> list[Parsed]:
        """The trained prefixes behind the front, those of the largest share of it first."""
        low, high = self.box
        inside = [i for i in self.members if self.parsed[i].growth and (self.values[i] <= high).all()]
        found: dict[tuple[object, int], Parsed] = {}
        for i in sorted(inside, key=lambda i: -float(np.prod((high - self.values[i]) / (high - low)))):
            found.setdefault((self.parsed[i].structure, self.parsed[i].growth), self.parsed[i])
        return list(found.values())[:PREFIXES]

    def promising(self) -> list[Parsed]:
        """Trained trials that may grow, by what they would add per second if nothing were lost any more.

        Those that nothing of the same growth beats, as in successive halving: against what has grown for longer they
        would have no chance. Those count too that lost up to twice of what is tolerated.
        """
        steps = range(1, len(self.reader.levels))
        rungs = (self._unbeaten(np.flatnonzero(self._allowed & (self.growths == step))) for step in steps)
        lost = self.values[:, self.aim.quality] - self.zero
        limit = 2 * self.tolerated if self.tolerated else np.inf
        ready = [i for rung in rungs for i in rung if lost[i] <= limit]
        trained = [i for i in ready if self._reached[self.parsed[i].structure] == self.growths[i]]
        whole = self.values[trained].reshape(-1, len(self.aim.roles))
        whole[:, self.aim.quality] = np.minimum(whole[:, self.aim.quality], self.zero)
        gain = improvement(whole, self.open)
        rate = {i: g / self.seconds(self.growths[i], self.growths[i] + 1) for i, g in zip(trained, gain, strict=True)}
        return [self.parsed[i] for i in sorted(rate, key=lambda i: -rate[i])]

    def trains(self, parsed: Parsed) -> bool:
        """Whether its structure has not been trained as far before."""
        return parsed.growth > self._reached.get(parsed.structure, 0)

    @cached_property
    def _reached(self) -> dict[frozenset[tuple[str, Scalar]], int]:
        reached: dict[frozenset[tuple[str, Scalar]], int] = {}
        for parsed in self.parsed:
            reached[parsed.structure] = max(reached.get(parsed.structure, 0), parsed.growth)
        return reached

    @cached_property
    def grown(self) -> float:
        """Share of all seconds so far that went into more than the least growth."""
        # What died or could not be done may have a long way from its beginning to its end.
        seconds = np.array([fact.seconds if _tells(fact) else 0.0 for fact in self.facts])
        # What was trained before and only deployed again took no more than a trial without training.
        trained = (self.growths > 1) & (seconds > 1.5 * self._pace[0])
        return float(seconds[trained].sum() / max(seconds.sum(), 1e-9))

    @cached_property
    def open(self) -> Floats:
        """Points of the box that the front leaves uncovered."""
        return uncovered(self.front, *self.box)

    # -- Loss and quality

    @cached_property
    def measured(self) -> Floats:
        """The loss of every trial, NaN where it is unknown; without any, the drop of quality stands for it."""
        losses = np.array([np.nan if f.loss is None else f.loss for f in self.facts], dtype=np.float64)
        if np.isfinite(losses).any() or not self.known:
            return np.maximum(losses, 0)
        return np.maximum(self.values[:, self.aim.quality] - self.zero, 0.0)

    @cached_property
    def used(self) -> Ints:
        """The trials that corrections rest on: something was predicted, and a loss measured."""
        useful = np.isfinite(self.measured) & np.isfinite(self.base).all(1) & (self.base.sum(1) > 0)
        return np.flatnonzero(useful)[-MEMORY:]

    def levels(self, picks: Ints, growths: Ints, targets: Ints) -> list[Level]:
        """The grains of correction: kind with growth, kind with target, kind with choice, knob with choice."""
        kinds, most = self.reader.kinds, self.tables.loss.shape[2]
        many, steps = int(kinds.max()) + 1, len(self.reader.levels) + 1
        places, knobs = len(self.reader.guide.targets), np.arange(len(self.tables.names))
        return [
            Level(kinds * steps + growths[:, None], many * steps, 0.3),
            Level(kinds * places + targets[:, None], many * places, 1.0),
            Level(kinds * most + picks, many * most, 1.0),
            Level(knobs * most + picks, len(knobs) * most, 3.0),
        ]

    @cached_property
    def corrections(self) -> list[Correction]:
        """One per level."""
        used = self.used
        # What is far out of the box says less of what is inside: losses of many parts do not simply add up there.
        share = self.tolerable_loss(self.relate(None)) / np.maximum(self.measured[used], LEAST_LOSS)
        weight = np.clip(share, LEAST_WEIGHT, 1.0)
        found = correct(self.base[used], self.measured[used], weight, self._used_levels(used))
        return [self._grown(found[0]), *found[1:]]

    def _used_levels(self, used: Ints) -> list[Level]:
        return self.levels(self.picks[used], self.growths[used], self.targets[used])

    def _grown(self, correction: Correction) -> Correction:
        """A step of growth that was never seen is expected to do somewhat better than the one below it."""
        steps = len(self.reader.levels) + 1
        log, seen = correction.log.reshape(-1, steps).copy(), correction.evidence.reshape(-1, steps)
        for kind in range(len(log)):
            for below, above in pairwise(range(1, steps)):
                if seen[kind, above] < 0.5:
                    log[kind, above] = log[kind, below] - GROWTH_GAIN
        return Correction(log.ravel(), correction.evidence)

    @cached_property
    def errors(self) -> Floats:
        """Of the trials in use, logarithms of measured over corrected loss."""
        return self._errors(self.used, self.corrections)

    def _errors(self, used: Ints, corrections: Sequence[Correction]) -> Floats:
        levels = self._used_levels(used)[: len(corrections)]
        logs = sum(c.log[level.index] for c, level in zip(corrections, levels, strict=True))
        expected = (self.base[used] * np.exp(logs)).sum(1)
        errors: Floats = np.log((self.measured[used] + LEAST_LOSS) / (expected + LEAST_LOSS))
        return errors

    @cached_property
    def surprises(self) -> dict[int, float]:
        """Trial -> logarithm of measured over expected loss; below 0 went better.

        Of those that trained, or of all where nothing does. Expected without the corrections of single knobs: they
        would take the blame for how a trial was trained.
        """
        trained = [t for t in self.used if self.parsed[t].growth or not self.reader.levels]
        used = np.array(trained, dtype=np.intp)
        grown = correct(self.base[used], self.measured[used], np.ones(len(used)), self._used_levels(used)[:1])
        errors = self._errors(used, grown)
        return {self.facts[t].number: float(e) for t, e in zip(used, errors, strict=True)}

    @cached_property
    def tolled(self) -> dict[int, float]:
        """The same where seconds count: what takes out of proportion long has to be better by as much."""
        places = {fact.number: place for place, fact in enumerate(self.facts)}
        return {number: value + self._toll(places[number]) for number, value in self.surprises.items()}

    def _toll(self, trial: int) -> float:
        """Logarithm of the times it took as long as was to be expected, from `PROPORTION` on."""
        expected = self.seconds(self._before[trial], int(self.growths[trial]))
        return float(np.log(max(self.facts[trial].seconds / (PROPORTION * expected), 1.0)))

    def relate(self, rng: np.random.Generator | None) -> Relation:
        """Loss to drop of quality; the two are one where no loss is measured. Drawn with a generator."""
        both = self.done & np.isfinite(self.measured)
        if not any(f.loss is not None for f in self.facts) or not both.any():
            return Relation(1.0, 1.0)
        drop = self.values[both, self.aim.quality] - self.zero
        return relate(self.measured[both], drop, self._noise, rng)

    @property
    def _noise(self) -> float:
        """How much of a difference in quality is chance."""
        known = self.values[self.done, self.aim.quality]
        return 0.1 * (self.tolerated or (float(np.ptp(known)) if len(known) else 0.0) or 1.0)

    @cached_property
    def learned(self) -> Linear:
        """What each step of growth adds to the quality beyond what the loss tells.

        A loss that compares with the teacher does not see what a student learns from labels that the teacher got wrong.
        """
        trained = np.flatnonzero(self.done & np.isfinite(self.measured) & (self.growths > 0))
        relation = self.relate(None)
        foretold = self.zero + relation.drop(self.measured[trained])
        better = foretold - self.values[trained, self.aim.quality]
        steps, spread = self.growths[trained, None].astype(np.float64), np.array([self._noise / 2])
        return regress(steps, better, np.full(len(trained), self._noise), 0 * spread, spread)

    @cached_property
    def tolerated(self) -> float:
        """The drop of quality beyond which nothing is of interest; 0 if everything is."""
        return (self.aim.tolerance or 0.0) * abs(self.zero)

    def tolerable_loss(self, relation: Relation) -> float:
        """The loss at which quality leaves the box; where that says nothing, what the tables hold."""
        most = float(np.where(np.isfinite(self.tables.loss[0]), self.tables.loss[0], 0).max(1).sum()) or 1.0
        if not self.known:
            return most
        loss = relation.loss(max(self.box[1][self.aim.quality] - self.zero, 1e-9))
        return float(np.clip(loss, 10 * LEAST_LOSS, most))

    # -- Costs

    @cached_property
    def surrogates(self) -> dict[tuple[int, int], Linear]:
        """(objective, target) -> a linear model of the features."""
        targets = range(len(self.reader.guide.targets))
        return {(j, t): self._surrogate(j, t) for j in self.aim.costs for t in targets}

    def _surrogate(self, j: int, target: int) -> Linear:
        known = np.isfinite(self.values[:, j])
        mine = np.flatnonzero(known & (self.targets == target))[-MEMORY:]
        # About that of the uncompressed model; not that of the first trial, as the order must not matter.
        scale = float(np.abs(self.values[known, j]).max(initial=0.0)) or 1.0
        widths, role = len(self.tables.widths), self.aim.roles[j]
        mean, spread = np.zeros(self.tables.features), np.full(self.tables.features, 1e-6)
        if role == "size":
            mean[1], spread[0], spread[1] = 0.95, 0.1, 0.5
        else:
            # Two thirds of the time of the full model go by its arithmetic, of which 8 bits save the most.
            macs, layers = slice(2, 2 + widths), slice(2 + widths, 2 + 2 * widths)
            mean[0], mean[layers], mean[macs] = 0.1, 0.2, [0.7 if bits == 32 else 0.3 for bits in self.tables.widths]
            spread[0], spread[macs], spread[2 + widths :] = 0.3, 0.4, 0.15
            # Large layers with little to compute wait for their weights; how much of the time that is, trials tell.
            spread[1] = 0.3
        noise = (SIZE_NOISE if role == "size" else LATENCY_NOISE) * np.abs(self.values[mine, j]) + 1e-12
        return regress(self.described[mine], self.values[mine, j], noise, scale * mean, abs(scale) * spread + 1e-12)

    # -- Seconds

    @cached_property
    def _before(self) -> list[int]:
        """For each trial, how far its structure had grown by then."""
        reached: dict[frozenset[tuple[str, Scalar]], int] = {}
        found = []
        for fact, parsed in zip(self.facts, self.parsed, strict=True):
            found.append(reached.get(parsed.structure, 0))
            if _tells(fact):
                reached[parsed.structure] = max(found[-1], parsed.growth)
        return found

    @cached_property
    def _pace(self) -> tuple[float, float]:
        """Median seconds of a trial that trained nothing, and of one unit of growth."""
        still, trained = [], []
        for fact, parsed, before in zip(self.facts, self.parsed, self._before, strict=True):
            if not _tells(fact) or fact.seconds <= 0:
                continue
            if parsed.growth <= before:
                still.append(fact.seconds)
            else:
                trained.append((fact.seconds, self._amount(before, parsed.growth)))
        usual = float(np.median(still)) if still else TRIAL_S
        growth = [max(seconds - usual, 0.1) / amount for seconds, amount in trained]
        return usual, float(np.median(growth)) if growth else GROWTH_S

    def _amount(self, before: int, after: int) -> float:
        """Units of growth between two levels."""
        values = (0.0, *(float(v) for v in self.reader.levels))
        return max(values[after] - values[before], 1.0)

    def seconds(self, before: int, after: int) -> float:
        """What a trial is expected to take that trains from one level of growth to another."""
        usual, growth = self._pace
        return usual + (growth * self._amount(before, after) if after > before and self.reader.levels else 0.0)


def _tells(fact: Fact) -> bool:
    """Whether it was carried out, so that its time says how long it takes to do it."""
    return fact.complete or fact.loss is not None
