"""From the facts of a study to its next plan: which stretch of the front to push, and with what; stores nothing."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal

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
    smooth,
)
from search.solver import Answers, Floats, Guide, Ints, Rates, Tables

Role = Literal["quality", "latency", "size"]

# How many of the newest trials beliefs rest on, and how many plans of each kind compete for a proposal.
MEMORY = 256
NEW, PER_PREFIX, PREFIXES, MUTATIONS = 48, 4, 6, 16
# Plans drawn by chance once all of those were seen.
BY_CHANCE = 500
# How often plans are judged by the possible belief that made them, and not by the most likely one.
BY_DRAW = 0.1
# Before anything was timed: seconds of a trial that trains nothing, and of one unit of growth.
TRIAL_S, GROWTH_S = 2.0, 2.0
# What one more step of growth is worth before it was seen: a third of the loss.
GROWTH_GAIN = 0.4
LATENCY_NOISE, SIZE_NOISE = 0.04, 0.005


@dataclass(frozen=True)
class Fact:
    """What one finished trial says. `values` are to be minimized, NaN where unknown; `complete` ones can be on a front.

    `loss` is in the currency of the guide's effects; `violation` is above 0 where a constraint is broken.
    """

    number: int
    answers: Answers
    values: tuple[float, ...]
    complete: bool = True
    loss: float | None = None
    violation: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Proposal:
    """The answers of a plan, what is expected of it (to be minimized, None before the first trial)."""

    answers: dict[str, Scalar]
    expected: tuple[float, ...] | None


@dataclass
class _Rows:
    """Plans in the making: a pick per knob, variant, target and growth (0: none, 1 is the least), cost in seconds.

    `carried` are further answers that belong to a trained prefix.
    """

    pick: Ints
    variant: Ints
    target: Ints
    growth: Ints
    seconds: Floats
    free: NDArray[np.bool_]
    carried: list[Answers]

    @classmethod
    def joined(cls, parts: Sequence["_Rows"]) -> "_Rows":
        return cls(
            pick=np.concatenate([part.pick for part in parts]),
            variant=np.concatenate([part.variant for part in parts]),
            target=np.concatenate([part.target for part in parts]),
            growth=np.concatenate([part.growth for part in parts]),
            seconds=np.concatenate([part.seconds for part in parts]),
            free=np.concatenate([part.free for part in parts]),
            carried=[answers for part in parts for answers in part.carried],
        )


class Proposer:
    """Proposes for one space and one set of objectives, of which exactly one has the role of quality.

    A proposal is a function of the guide, the facts and the generator alone.
    """

    def __init__(self, guide: Guide, roles: Sequence[Role], tolerance: float | None) -> None:
        self.guide, self.roles, self.tolerance = guide, tuple(roles), tolerance
        self.tables = Tables(guide)
        self.quality = self.roles.index("quality")
        kinds = [name.split("@")[0] for name in self.tables.names]
        self.kinds: Ints = np.array([sorted(set(kinds)).index(kind) for kind in kinds])
        self.levels = guide.growth[1] if guide.growth else ()
        self.structural = np.array([name in guide.structural for name in self.tables.names])
        self._ledger = _Ledger(self.tables)

    def propose(
        self,
        facts: Sequence[Fact],
        fixed: Answers,
        rng: np.random.Generator,
        taken: Iterable[Answers] = (),
        remaining_s: float = np.inf,
    ) -> Proposal | None:
        """The unseen plan with the largest expected gain of hypervolume per second; None when all were seen.

        `fixed` answers are kept, plans that are `taken` by other workers avoided. Where no plan fits into
        `remaining_s`, the quickest ones compete.
        """
        drawn = _State(self, facts, rng)
        rows = self._rows(drawn, fixed, rng)
        rows.pick = self._solved(rows, drawn.losses(rows), drawn, rng)
        # One draw makes plans that are worth a look; the best of many by that same draw would be the luckiest one.
        state = drawn if rng.random() < BY_DRAW else _State(self, facts, None)
        expected, broken = state.expected(rows, state.losses(rows))
        gain = self._gain(state, rows, expected, broken, remaining_s)
        if gain.max() <= 0:
            # Nothing is expected to gain: that which possibly does.
            gain = self._gain(drawn, rows, drawn.expected(rows, drawn.losses(rows))[0], broken, remaining_s)
        seen = {parsed.identity for parsed in state.parsed} | set(map(self.identity, taken))
        order = np.argsort(-gain, kind="stable")
        for i in order[gain[order] >= 0]:
            answers = {**self._answers(rows, int(i)), **fixed}
            if self.identity(answers) not in seen:
                return Proposal(answers, tuple(map(float, expected[i])) if state.known else None)
        return self._any_unseen(fixed, seen, rng)

    def _any_unseen(
        self, fixed: Answers, seen: Collection[frozenset[tuple[str, Scalar]]], rng: np.random.Generator
    ) -> Proposal | None:
        """By chance, once all that compete were seen; None when that finds none either."""
        pick = rng.integers([len(choices) for choices in self.tables.choices], size=(BY_CHANCE, len(self.tables.names)))
        rows = self._fresh(pick, rng, TRIAL_S, np.zeros_like(pick, dtype=bool))
        rows.growth = rng.integers(1, len(self.levels) + 1, BY_CHANCE) if self.levels else rows.growth
        possible = np.isfinite(self.tables.loss[rows.variant[:, None], np.arange(pick.shape[1]), pick]).all(1)
        for i in np.flatnonzero(possible):
            answers = {**self._answers(rows, int(i)), **fixed}
            if self.identity(answers) not in seen:
                return Proposal(answers, None)
        return None

    def residuals(self, facts: Sequence[Fact]) -> dict[int, float]:
        """Trial -> logarithm of its measured loss over what was to be expected; below 0 went better."""
        return _State(self, facts, None).residuals

    def read(self, facts: Sequence[Fact]) -> tuple[list["_Parsed"], Ints]:
        """Facts as indices, and where the ledger has them; each fact is read once."""
        for fact in facts:
            if fact.number not in self._ledger:
                self._ledger.enter(fact.number, self.parse(fact.answers))
        return self._ledger.find(fact.number for fact in facts)

    @property
    def ledger(self) -> "_Ledger":
        """All facts that were ever read, as arrays."""
        return self._ledger

    def parse(self, answers: Answers) -> "_Parsed":
        """Answers as indices; what was not asked counts as off."""
        tables = self.tables
        pick = [
            _nearest(choices, answers.get(name), int(off))
            for name, choices, off in zip(tables.names, tables.choices, tables.off, strict=True)
        ]
        level = _nearest((0, *self.levels), answers.get(self.guide.growth[0]), 0) if self.guide.growth else 0
        own = frozenset((k, v) for k, v in answers.items() if k in self.guide.structural)
        bare = frozenset((k, v) for k, v in own if not self.guide.growth or k != self.guide.growth[0])
        return _Parsed(
            tuple(pick),
            _match([v.answers for v in self.guide.variants], answers),
            _match(self.guide.targets, answers),
            level,
            self.identity(answers),
            bare if level else frozenset(),
            dict(own) if level else {},
        )

    # -- Rows

    def _rows(self, state: "_State", fixed: Answers, rng: np.random.Generator) -> _Rows:
        parts = [self._new(state, rng), *self._around(state, rng), *self._mutated(state, rng)]
        rows = _Rows.joined(parts)
        for k, name in enumerate(self.tables.names):
            if fixed.get(name) in self.tables.choices[k]:
                rows.pick[:, k] = self.tables.choices[k].index(fixed[name])
                rows.free[:, k] = False
        for places, column in (([v.answers for v in self.guide.variants], "variant"), (self.guide.targets, "target")):
            agreeing = [i for i, answers in enumerate(places) if _agrees(answers, fixed)]
            if 0 < len(agreeing) < len(places):
                setattr(rows, column, rng.choice(agreeing, len(rows.pick)))
        return rows

    def _new(self, state: "_State", rng: np.random.Generator) -> _Rows:
        """All knobs free, as little growth as there is."""
        pick = np.tile(self.tables.off, (NEW, 1))
        return self._fresh(pick, rng, state.seconds(0, 1), np.ones_like(pick, dtype=bool))

    def _fresh(self, pick: Ints, rng: np.random.Generator, seconds: float, free: NDArray[np.bool_]) -> _Rows:
        n = len(pick)
        return _Rows(
            pick,
            rng.integers(len(self.guide.variants), size=n),
            rng.integers(len(self.guide.targets), size=n),
            np.full(n, min(1, len(self.levels))),
            np.full(n, seconds),
            free,
            [{}] * n,
        )

    def _around(self, state: "_State", rng: np.random.Generator) -> Iterator[_Rows]:
        """Trained prefixes of the front with other numbers, and with the next step of growth; and the original."""
        yield self._kept(self.parse({}), 0, state.seconds(0, 0), {}, rng)
        for parsed in state.prefixes():
            yield self._kept(parsed, parsed.growth, state.seconds(0, 0), parsed.carried, rng)
            if self.guide.growth and parsed.growth < len(self.levels):
                carried = {**parsed.carried, self.guide.growth[0]: self.levels[parsed.growth]}
                wait = state.seconds(parsed.growth, parsed.growth + 1)
                grown = self._kept(parsed, parsed.growth + 1, wait, carried, rng)
                # One of them differs from its parent in nothing else.
                grown.free[0], grown.target[0], grown.variant[0] = False, parsed.target, parsed.variant
                yield grown

    def _kept(
        self, parsed: "_Parsed", growth: int, seconds: float, carried: Answers, rng: np.random.Generator
    ) -> _Rows:
        n = PER_PREFIX
        same = [i for i, variant in enumerate(self.guide.variants) if _agrees(variant.answers, carried)]
        return _Rows(
            np.tile(np.array(parsed.pick), (n, 1)),
            rng.choice(same or [parsed.variant], n),
            rng.integers(len(self.guide.targets), size=n),
            np.full(n, growth),
            np.full(n, seconds),
            np.tile(~self.structural, (n, 1)),
            [carried] * n,
        )

    def _mutated(self, state: "_State", rng: np.random.Generator) -> Iterator[_Rows]:
        """Front members with a few answers moved to their neighbours: what no table foresees."""
        members = state.members
        if not members:
            return
        pick = np.array([state.picks[members[i]] for i in rng.integers(len(members), size=MUTATIONS)])
        counts = np.array([len(choices) for choices in self.tables.choices])
        change = rng.random(pick.shape) < 1.5 / pick.shape[1]
        step = rng.choice([-1, 1], pick.shape)
        pick = np.where(change, np.clip(pick + step, 0, counts - 1), pick)
        yield self._fresh(pick, rng, state.seconds(0, 1), np.zeros_like(pick, dtype=bool))

    def _solved(self, rows: _Rows, losses: Floats, state: "_State", rng: np.random.Generator) -> Ints:
        n, costs = len(rows.pick), [j for j in range(len(self.roles)) if j != self.quality]
        # From a thousandth of the loss that still matters up to many times that, per unit of what costs.
        weight = state.tolerable_loss * np.exp(rng.uniform(np.log(1e-3), np.log(30.0), n))
        shares = rng.dirichlet(np.full(len(costs), 0.5), n) if costs else np.zeros((n, 0))
        open_ = np.flatnonzero(rows.free.any(1))
        pick = rows.pick.copy()
        pick[open_] = self.tables.solve(
            rows.pick[open_],
            rows.variant[open_],
            rows.free[open_],
            losses[open_],
            state.rates(rows.target[open_], (weight[:, None] * shares)[open_]),
        )
        return pick

    def _gain(
        self, state: "_State", rows: _Rows, expected: Floats, broken: NDArray[np.bool_], remaining_s: float
    ) -> Floats:
        """Gain of hypervolume per second, below 0 for what cannot be taken.

        What trains is worth what it is now, or what it may yet grow to in the time that this takes.
        """
        seconds = np.where(self._untrained(rows), state.seconds(0, 0), rows.seconds)
        gain = state.gain(expected) / seconds
        grown, wait = self._full_grown(state, rows, seconds)
        if grown is not None:
            gain = np.maximum(gain, state.gain(state.expected(grown, state.losses(grown))[0]) / wait)
        gain = np.where(broken | ~np.isfinite(expected).all(1), -1.0, gain)
        return np.where(seconds <= max(remaining_s, float(seconds.min())), gain, -2.0)

    def _full_grown(self, state: "_State", rows: _Rows, seconds: Floats) -> tuple[_Rows | None, Floats]:
        """The same rows after all growth, and the seconds until then; none where there is no growth."""
        most = len(self.levels)
        trained = ~self._untrained(rows) & (rows.growth < most)
        if not trained.any():
            return None, seconds
        wait = np.array([state.seconds(int(g), most) if t else 0.0 for g, t in zip(rows.growth, trained, strict=True)])
        return replace(rows, growth=np.where(trained, most, rows.growth)), seconds + wait

    def _untrained(self, rows: _Rows) -> NDArray[np.bool_]:
        """Rows whose structure is left alone."""
        plain: NDArray[np.bool_] = (rows.pick[:, self.structural] == self.tables.off[self.structural]).all(1)
        return plain

    def _answers(self, rows: _Rows, i: int) -> dict[str, Scalar]:
        tables, guide = self.tables, self.guide
        answers = {name: tables.choices[k][rows.pick[i, k]] for k, name in enumerate(tables.names)}
        answers |= {**guide.variants[rows.variant[i]].answers, **guide.targets[rows.target[i]], **rows.carried[i]}
        if guide.growth and rows.growth[i]:
            answers[guide.growth[0]] = self.levels[rows.growth[i] - 1]
        return dict(guide.asked(answers))

    def identity(self, answers: Answers) -> frozenset[tuple[str, Scalar]]:
        """What makes a plan a new one."""
        return frozenset((name, value) for name, value in answers.items() if name in self._own)

    @cached_property
    def _own(self) -> frozenset[str]:
        """The knobs that proposals speak of; a plan is not new because another one differs."""
        guide = self.guide
        places = [*(variant.answers for variant in guide.variants), *guide.targets]
        return frozenset(
            [*self.tables.names, *(n for p in places for n in p), *([guide.growth[0]] if guide.growth else [])]
        )


@dataclass(frozen=True)
class _Parsed:
    """A trial's answers as indices; `structure` names what was trained, growth apart, `carried` its answers."""

    pick: tuple[int, ...]
    variant: int
    target: int
    growth: int
    identity: frozenset[tuple[str, Scalar]]
    structure: frozenset[tuple[str, Scalar]]
    carried: Answers = field(default_factory=dict)


class _Ledger:
    """What follows from a trial's answers alone, computed once: picks, predicted parts of the loss, features."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._at: dict[int, int] = {}
        self._parsed: list[_Parsed] = []
        self.picks: Ints = np.zeros((0, len(tables.names)), dtype=np.intp)
        self.base: Floats = np.zeros((0, len(tables.names)))
        self.described: Floats = np.zeros((0, tables.features))

    def __contains__(self, number: int) -> bool:
        return number in self._at

    def enter(self, number: int, parsed: _Parsed) -> None:
        self._at[number] = len(self._parsed)
        self._parsed.append(parsed)

    def find(self, numbers: Iterable[int]) -> tuple[list[_Parsed], Ints]:
        """The trials of these numbers, and their rows in the arrays."""
        self._grow()
        rows = [self._at[number] for number in numbers]
        return [self._parsed[row] for row in rows], np.array(rows, dtype=np.intp)

    def _grow(self) -> None:
        new = self._parsed[len(self.picks) :]
        if not new:
            return
        picks = np.array([p.pick for p in new], dtype=np.intp)
        variants = np.array([p.variant for p in new], dtype=np.intp)
        base = self._tables.loss[variants[:, None], np.arange(picks.shape[1]), picks]
        self.picks = np.concatenate([self.picks, picks])
        self.base = np.concatenate([self.base, base])
        self.described = np.concatenate([self.described, self._tables.describe(picks, variants)])


class _State:
    """What is believed at one moment; with a generator, one of the possible beliefs (Thompson sampling)."""

    def __init__(self, proposer: Proposer, facts: Sequence[Fact], rng: np.random.Generator | None) -> None:
        self.proposer, self.tables, self.rng = proposer, proposer.tables, rng
        self.facts = sorted(facts, key=lambda fact: fact.number)
        self.parsed, rows = proposer.read(self.facts)
        ledger = proposer.ledger
        self.picks, self.base, self.described = ledger.picks[rows], ledger.base[rows], ledger.described[rows]
        self.targets: Ints = np.array([p.target for p in self.parsed], dtype=np.intp)
        self.growths: Ints = np.array([p.growth for p in self.parsed], dtype=np.intp)
        m = len(proposer.roles)
        self.values: Floats = np.array([f.values for f in self.facts], dtype=np.float64).reshape(-1, m)
        self.done: NDArray[np.bool_] = np.array([f.complete for f in self.facts], dtype=bool)
        self.allowed = self.done & np.array([f.violation <= 0 for f in self.facts], dtype=bool)
        self.known = bool(self.done.any())

    # -- The front

    @cached_property
    def members(self) -> list[int]:
        """Positions of the allowed trials that nothing dominates."""
        alive = list(np.flatnonzero(self.allowed))
        alive.sort(key=lambda i: tuple(self.values[i]))
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
        quality = self.values[self.done, self.proposer.quality]
        if not len(quality):
            return 0.0
        none = self.base[self.done].sum(1) <= 0
        return float(quality[none].mean() if none.any() else quality.min())

    @cached_property
    def box(self) -> tuple[Floats, Floats]:
        """Where a gain counts: quality down to what is tolerated, costs up to those of the front."""
        m, q = len(self.proposer.roles), self.proposer.quality
        if not self.known:
            return np.zeros(m), np.ones(m)
        front = self.front if len(self.front) else self.values[self.done]
        high, low = front.max(0), np.minimum(front.min(0), 0.0)
        high[q] = self.zero + self.tolerated if self.tolerated else float(self.values[self.done, q].max())
        low[q] = min(float(front[:, q].min()), self.zero) - 0.1 * (high[q] - self.zero)
        return low, np.maximum(high, low + 1e-9)

    def prefixes(self) -> list[_Parsed]:
        """The trained prefixes behind the front, those of the largest share of it first."""
        low, high = self.box
        inside = [i for i in self.members if self.parsed[i].growth and (self.values[i] <= high).all()]
        found: dict[tuple[object, int], _Parsed] = {}
        for i in sorted(inside, key=lambda i: -float(np.prod((high - self.values[i]) / (high - low)))):
            found.setdefault((self.parsed[i].structure, self.parsed[i].growth), self.parsed[i])
        return list(found.values())[:PREFIXES]

    # -- Loss and quality

    @cached_property
    def measured(self) -> Floats:
        """The loss of every trial, NaN where it is unknown; without any, the drop of quality stands for it."""
        losses = np.array([np.nan if f.loss is None else f.loss for f in self.facts], dtype=np.float64)
        if np.isfinite(losses).any() or not self.known:
            return np.maximum(losses, 0)
        return np.maximum(self.values[:, self.proposer.quality] - self.zero, 0.0)

    @cached_property
    def _used(self) -> Ints:
        """The trials that corrections rest on: something was predicted, and a loss measured."""
        useful = np.isfinite(self.measured) & np.isfinite(self.base).all(1) & (self.base.sum(1) > 0)
        return np.flatnonzero(useful)[-MEMORY:]

    def _levels(self, picks: Ints, growths: Ints, targets: Ints) -> list[tuple[Ints, int, float]]:
        """Of every part: kind with growth, kind with target, kind with choice, knob with choice."""
        kinds, most = self.proposer.kinds, self.tables.loss.shape[2]
        many, steps = int(kinds.max()) + 1, len(self.proposer.levels) + 1
        places = len(self.proposer.guide.targets)
        knobs = np.arange(len(self.tables.names))
        return [
            (kinds * steps + growths[:, None], many * steps, 0.3),
            (kinds * places + targets[:, None], many * places, 1.0),
            (kinds * most + picks, many * most, 1.0),
            (knobs * most + picks, len(knobs) * most, 3.0),
        ]

    @cached_property
    def corrections(self) -> list[Correction]:
        """One per level, drawn if there is a generator."""
        used = self._used
        levels = [Level(*level) for level in self._levels(self.picks[used], self.growths[used], self.targets[used])]
        # What is far out of the box says little of what is inside: losses of many parts do not simply add up there.
        weight = np.minimum(1.0, self.tolerable_loss / np.maximum(self.measured[used], LEAST_LOSS))
        found = correct(self.base[used], self.measured[used], weight, levels)
        found[0] = self._grown(found[0])
        if self.rng is None:
            return found
        return [
            Correction(c.log + self.rng.normal(0, 0.3 / np.sqrt(level.prior + c.evidence)), c.evidence)
            for c, level in zip(found, levels, strict=True)
        ]

    def _grown(self, correction: Correction) -> Correction:
        """A step of growth that was never seen is expected to do somewhat better than the one below it."""
        steps = len(self.proposer.levels) + 1
        log, seen = correction.log.reshape(-1, steps).copy(), correction.evidence.reshape(-1, steps)
        for kind in range(len(log)):
            for below, above in pairwise(range(1, steps)):
                if seen[kind, above] < 0.5:
                    log[kind, above] = log[kind, below] - GROWTH_GAIN
        return Correction(log.ravel(), correction.evidence)

    def losses(self, rows: _Rows) -> Floats:
        """`(rows, knobs, choices)`: the corrected loss of every choice."""
        kinds, most = self.proposer.kinds, self.tables.loss.shape[2]
        grown, placed, kind_choice, knob_choice = (c.log for c in self.corrections)
        steps, places = len(self.proposer.levels) + 1, len(self.proposer.guide.targets)
        by_row = grown[kinds * steps + rows.growth[:, None]] + placed[kinds * places + rows.target[:, None]]
        by_choice = kind_choice.reshape(-1, most)[kinds] + knob_choice.reshape(-1, most)
        factors: Floats = np.exp(np.clip(by_row[:, :, None] + by_choice, -40, 40))
        return self.tables.loss[rows.variant] * factors

    @cached_property
    def relation(self) -> Relation:
        """Loss to drop of quality; the two are one where no loss is measured."""
        both = self.done & np.isfinite(self.measured)
        if not any(f.loss is not None for f in self.facts) or not both.any():
            return Relation(1.0, 1.0)
        drop = self.values[both, self.proposer.quality] - self.zero
        noise = 0.1 * (self.tolerated or float(np.ptp(drop)) or 1.0)
        return relate(self.measured[both], drop, noise, self.rng)

    @cached_property
    def tolerated(self) -> float:
        """The drop of quality beyond which nothing is of interest; 0 if everything is."""
        return (self.proposer.tolerance or 0.0) * abs(self.zero)

    @cached_property
    def tolerable_loss(self) -> float:
        """The loss at which quality leaves the box; where that says nothing, what the tables hold."""
        most = float(np.where(np.isfinite(self.tables.loss[0]), self.tables.loss[0], 0).max(1).sum()) or 1.0
        if not self.known:
            return most
        loss = self.relation.loss(max(self.box[1][self.proposer.quality] - self.zero, 1e-9))
        return float(np.clip(loss, 10 * LEAST_LOSS, most))

    def _left_over(self, pick: Ints) -> Floats:
        """Logarithms of what neither guide nor corrections explain."""
        used = self._used
        return smooth(self.picks[used], self._errors, pick, self.rng)

    @cached_property
    def residuals(self) -> dict[int, float]:
        """Trial that trained -> logarithm of measured over expected loss.

        Expected without the corrections of single knobs: they would take the blame for how a trial was trained.
        """
        used = np.array([t for t in self._used if self.parsed[t].growth], dtype=np.intp)
        levels = [Level(*level) for level in self._levels(self.picks[used], self.growths[used], self.targets[used])[:1]]
        (grown,) = correct(self.base[used], self.measured[used], np.ones(len(used)), levels)
        expected = (self.base[used] * np.exp(grown.log[levels[0].index])).sum(1)
        errors = np.log((self.measured[used] + LEAST_LOSS) / (expected + LEAST_LOSS))
        return {self.facts[t].number: float(e) for t, e in zip(used, errors, strict=True)}

    @cached_property
    def _errors(self) -> Floats:
        used = self._used
        levels = self._levels(self.picks[used], self.growths[used], self.targets[used])
        logs = sum(c.log[index] for c, (index, _, _) in zip(self.corrections, levels, strict=True))
        expected = (self.base[used] * np.exp(logs)).sum(1)
        errors: Floats = np.log((self.measured[used] + LEAST_LOSS) / (expected + LEAST_LOSS))
        return errors

    # -- Costs

    @cached_property
    def surrogates(self) -> dict[tuple[int, int], Floats]:
        """(objective, target) -> weights of the features."""
        drawn = {}
        for j, role in enumerate(self.proposer.roles):
            for t in range(len(self.proposer.guide.targets)):
                if role != "quality":
                    fitted = self._surrogate(j, t, role)
                    drawn[j, t] = fitted.mean if self.rng is None else fitted.drawn(self.rng)
        return drawn

    def _surrogate(self, j: int, target: int, role: Role) -> Linear:
        known = np.isfinite(self.values[:, j])
        mine = np.flatnonzero(known & (self.targets == target))[-MEMORY:]
        elsewhere = self.values[known, j]
        scale = float(elsewhere[0]) if len(elsewhere) else 1.0
        widths = len(self.tables.widths)
        mean, spread = np.zeros(self.tables.features), np.full(self.tables.features, 1e-6)
        if role == "size":
            mean[1], spread[0], spread[1] = 0.95, 0.1, 0.5
        else:
            # Half of the time of the full model goes by its arithmetic, of which 8 bits save the most.
            macs = slice(2, 2 + widths)
            mean[0], mean[macs] = 0.3, [0.7 if bits == 32 else 0.3 for bits in self.tables.widths]
            spread[0], spread[macs], spread[2 + widths :] = 0.3, 0.4, 0.15
        noise = (SIZE_NOISE if role == "size" else LATENCY_NOISE) * np.abs(self.values[mine, j]) + 1e-12
        return regress(self.described[mine], self.values[mine, j], noise, scale * mean, abs(scale) * spread + 1e-12)

    def rates(self, target: Ints, weights: Floats) -> Rates:
        """The surrogates' weights, in shares of the box, times `weights` `(rows, costs)`."""
        widths, low, high = len(self.tables.widths), *self.box
        total = np.zeros((len(target), self.tables.features))
        costs = [j for j in range(len(self.proposer.roles)) if j != self.proposer.quality]
        for column, j in enumerate(costs):
            own = np.array([self.surrogates[j, t] for t in range(len(self.proposer.guide.targets))])
            total += weights[:, column, None] * np.maximum(own[target], 0) / (high[j] - low[j])
        layers = np.zeros((len(target), widths))
        layers[:, :-1] = total[:, 2 + widths : 1 + 2 * widths]
        return Rates(total[:, 2 : 2 + widths], layers, total[:, 1 + 2 * widths], total[:, 1])

    def expected(self, rows: _Rows, losses: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """`(rows, objectives)`, as this belief has it; and which rows would break a constraint."""
        loss = np.take_along_axis(losses, rows.pick[..., None], 2)[..., 0].sum(1)
        loss = loss * np.exp(self._left_over(rows.pick))
        features = self.tables.describe(rows.pick, rows.variant)
        found = np.zeros((len(rows.pick), len(self.proposer.roles)))
        for j, role in enumerate(self.proposer.roles):
            if role == "quality":
                found[:, j] = self.zero + self.relation.drop(loss)
            else:
                own = np.array([self.surrogates[j, t] for t in range(len(self.proposer.guide.targets))])
                # Straight lines go below nothing: half of the least that was seen is as far as they are believed.
                least = (
                    self.values[np.isfinite(self.values[:, j]), j].min(initial=np.inf) / 2 if self.known else -np.inf
                )
                found[:, j] = np.maximum((features * own[rows.target]).sum(1), least)
        return found, self._broken(np.concatenate([features, loss[:, None]], 1))

    def gain(self, expected: Floats) -> Floats:
        """Share of the box that a point would add to the front; a gain within the noise of measuring is none."""
        return improvement(expected + self._margin(expected), self.front, *self.box, np.random.default_rng(0))

    def _margin(self, expected: Floats) -> Floats:
        """By how much a point must be better to be told apart."""
        low, high = self.box
        margin = 0.01 * np.tile(high - low, (len(expected), 1))
        for j, role in enumerate(self.proposer.roles):
            if role == "latency":
                margin[:, j] = np.maximum(margin[:, j], LATENCY_NOISE * np.abs(expected[:, j]))
        return margin

    def _broken(self, features: Floats) -> NDArray[np.bool_]:
        """Rows that would break a constraint, by a regression on what broke one before."""
        told = np.flatnonzero(self.done)[-MEMORY:]
        violations = np.array([self.facts[t].violation for t in told])
        if not (violations > 0).any():
            return np.zeros(len(features), dtype=bool)
        worst = float(np.abs(violations).max())
        loss = np.where(np.isfinite(self.measured), self.measured, 0)[told, None]
        known = np.concatenate([self.described[told], loss], 1)
        zeros, noise = np.zeros(features.shape[1]), np.full(len(told), 0.1 * worst)
        found: NDArray[np.bool_] = features @ regress(known, violations, noise, zeros, zeros + 10 * worst).mean > 0
        return found

    # -- Seconds

    @cached_property
    def _pace(self) -> tuple[float, float]:
        """Median seconds of a trial that trained nothing, and of one unit of growth."""
        reached: dict[frozenset[tuple[str, Scalar]], int] = {}
        still, trained = [], []
        for fact, parsed in zip(self.facts, self.parsed, strict=True):
            # What died or could not be done tells nothing of how long it takes to do it.
            if not fact.complete and fact.loss is None:
                continue
            before = reached.get(parsed.structure, 0)
            if fact.seconds > 0 and parsed.growth <= before:
                still.append(fact.seconds)
            elif fact.seconds > 0:
                trained.append((fact.seconds, self._amount(before, parsed.growth)))
            reached[parsed.structure] = max(before, parsed.growth)
        usual = float(np.median(still)) if still else TRIAL_S
        growth = [max(seconds - usual, 0.1) / amount for seconds, amount in trained]
        return usual, float(np.median(growth)) if growth else GROWTH_S

    def _amount(self, before: int, after: int) -> float:
        """Units of growth between two levels."""
        values = (0.0, *(float(v) for v in self.proposer.levels))
        return max(values[after] - values[before], 1.0)

    def seconds(self, before: int, after: int) -> float:
        """What a trial is expected to take that trains from one level of growth to another."""
        usual, growth = self._pace
        return usual + (growth * self._amount(before, after) if after > before and self.proposer.levels else 0.0)


def _nearest(choices: Sequence[Scalar], value: Scalar | None, off: int) -> int:
    """The choice itself; of a number between choices, as a range has them, the one next to it."""
    if value is None:
        return off
    if value in choices:
        return list(choices).index(value)
    numbers = [c for c in choices if isinstance(c, int | float)]
    if not isinstance(value, int | float) or len(numbers) < len(choices):
        return off
    return min(range(len(numbers)), key=lambda i: abs(numbers[i] - value))


def _match(places: Sequence[Answers], answers: Answers) -> int:
    """The place with the most answers in common."""
    agreeing = [sum(answers.get(name) == value for name, value in place.items()) for place in places]
    return int(np.argmax(agreeing))


def _agrees(place: Answers, answers: Mapping[str, Scalar]) -> bool:
    return all(answers[name] == value for name, value in place.items() if name in answers)
