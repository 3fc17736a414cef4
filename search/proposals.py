"""From the facts of a study to its next plan: which stretch of the front to push, and with what; stores nothing."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compressors.plan import Scalar
from search.facts import Aim, Fact, Parsed, Reader, agrees
from search.outlook import Outlook, Rows
from search.solver import Answers, Floats, Guide, Ints
from search.standing import TRIAL_S, Standing

# How many plans of each kind compete for a proposal.
NEW, PER_PREFIX, MUTATIONS = 48, 4, 16
# Plans drawn by chance once all of those were seen.
BY_CHANCE = 500
# This share of the time goes to more growth for the best, whatever is expected of it.
GROWING = 0.3
# How often plans are judged by the possible beliefs that made them, and not by the most likely ones.
BY_DRAW = 0.1


@dataclass(frozen=True)
class Proposal:
    """The answers of a plan, what is expected of it (to be minimized, None before the first trial)."""

    answers: dict[str, Scalar]
    expected: tuple[float, ...] | None


class Proposer:
    """Proposes for one space and one set of objectives: a function of guide, facts, time left and generator alone."""

    def __init__(self, guide: Guide, aim: Aim) -> None:
        self.guide, self.aim, self.reader = guide, aim, Reader(guide)
        self.tables = self.reader.tables
        self._stood: tuple[list[Fact], Standing] | None = None

    def standing(self, facts: Sequence[Fact]) -> Standing:
        """Where a study with these facts stands; the last one is kept, as an ask may want it again."""
        if self._stood is None or self._stood[0] != list(facts):
            self._stood = list(facts), Standing(self.reader, self.aim, facts)
        return self._stood[1]

    def propose(
        self,
        facts: Sequence[Fact],
        fixed: Answers,
        rng: np.random.Generator,
        taken: Iterable[Answers] = (),
        remaining_s: float | None = np.inf,
    ) -> Proposal | None:
        """The unseen plan with the largest expected gain of hypervolume per second; None when all were seen.

        `fixed` answers are kept. Plans that are `taken` by other workers are avoided, and so is what would train the
        same structure as one of them: once that is done, it need not be trained. Where no plan fits into
        `remaining_s`, the quickest ones compete. None counts trials instead of seconds: what is new grows as far
        as it can.
        """
        standing = self.standing(facts)
        likely, possible = Outlook(standing, None), Outlook(standing, rng)
        others = [self.reader.parse(answers) for answers in taken]
        seen = {parsed.identity for parsed in (*standing.parsed, *others)}
        training = {parsed.structure for parsed in others if standing.trains(parsed)}
        if remaining_s is not None and standing.grown < GROWING:
            promoted = self._promoted(likely, fixed, rng, seen, remaining_s)
            if promoted is not None:
                return promoted
        most = len(self.reader.levels)
        growth = most if remaining_s is None else min(1, most)
        rows = self._rows(standing, growth, fixed, rng)
        rows.pick = self._solved(rows, possible, rng)
        rows.growth = np.where(self._untrained(rows), 0, rows.growth)
        # One draw makes plans that are worth a look; the best of many by that same draw would be the luckiest one.
        outlook = possible if rng.random() < BY_DRAW else likely
        gain, expected = self._gain(outlook, rows, remaining_s)
        if gain.max() <= 0:
            # Nothing is expected to gain: that which possibly does.
            gain, _ = self._gain(possible, rows, remaining_s)
        order = np.argsort(-gain, kind="stable")
        for i in order[gain[order] >= 0]:
            answers = {**self._answers(rows, int(i)), **fixed}
            parsed = self.reader.parse(answers)
            if parsed.identity not in seen and not (parsed.structure in training and standing.trains(parsed)):
                return Proposal(answers, tuple(map(float, expected[i])) if standing.known else None)
        return self._any_unseen(growth, fixed, seen, rng)

    def _promoted(
        self,
        outlook: Outlook,
        fixed: Answers,
        rng: np.random.Generator,
        seen: Collection[frozenset[tuple[str, Scalar]]],
        remaining_s: float,
    ) -> Proposal | None:
        """The next step of growth for the most promising member of the front, as in successive halving."""
        standing = outlook.standing
        for parsed in standing.promising():
            rows = self._grown(standing, parsed, parsed.growth + 1, rng)
            answers = self._answers(rows, 0)
            fits = rows.seconds[0] <= remaining_s and all(answers.get(name) == value for name, value in fixed.items())
            if fits and self.reader.identity(answers) not in seen:
                return Proposal(answers, tuple(map(float, outlook.expected(rows)[0][0])))
        return None

    def _any_unseen(
        self, growth: int, fixed: Answers, seen: Collection[frozenset[tuple[str, Scalar]]], rng: np.random.Generator
    ) -> Proposal | None:
        """By chance, with this `growth` or more, once all that compete were seen; None when that finds none either."""
        pick = rng.integers([len(choices) for choices in self.tables.choices], size=(BY_CHANCE, len(self.tables.names)))
        rows = self._fresh(pick, 0, TRIAL_S, np.zeros_like(pick, dtype=bool), rng)
        rows.pick = self._named(rows)
        rows.growth = (
            rng.integers(growth, len(self.reader.levels) + 1, BY_CHANCE) if self.reader.levels else rows.growth
        )
        possible = np.isfinite(self.tables.loss[rows.variant[:, None], np.arange(pick.shape[1]), rows.pick]).all(1)
        for i in np.flatnonzero(possible):
            answers = {**self._answers(rows, int(i)), **fixed}
            if self.reader.identity(answers) not in seen:
                return Proposal(answers, None)
        return None

    # -- Rows

    def _rows(self, standing: Standing, growth: int, fixed: Answers, rng: np.random.Generator) -> Rows:
        """What competes; nothing that trains has less than this `growth`."""
        parts = [self._new(standing, growth, rng), *self._around(standing, growth, rng)]
        parts += self._mutated(standing, growth, rng)
        rows = Rows.joined(parts)
        for k, name in enumerate(self.tables.names):
            if fixed.get(name) in self.tables.choices[k]:
                rows.pick[:, k] = self.tables.choices[k].index(fixed[name])
                rows.free[:, k] = False
        for places, column in (
            ([v.answers for v in self.guide.variants], "variant"),
            (self.guide.targets, "target"),
        ):
            agreeing = [i for i, answers in enumerate(places) if agrees(answers, fixed)]
            if 0 < len(agreeing) < len(places):
                setattr(rows, column, rng.choice(agreeing, len(rows.pick)))
        rows.pick = self._named(rows)
        return rows

    def _named(self, rows: Rows) -> Ints:
        """Picks by the one name that each has in its variant, and off where they are not asked."""
        named: Ints = self.tables.same[rows.variant[:, None], np.arange(rows.pick.shape[1]), rows.pick]
        for k, off in enumerate(self.tables.off):
            named[self.tables.hidden(named, k) | self.tables.outrun(named, k), k] = off
        return named

    def _new(self, standing: Standing, growth: int, rng: np.random.Generator) -> Rows:
        """All knobs free."""
        pick = np.tile(self.tables.off, (NEW, 1))
        return self._fresh(pick, growth, standing.seconds(0, growth), np.ones_like(pick, dtype=bool), rng)

    def _fresh(
        self, pick: Ints, growth: int, seconds: float, free: NDArray[np.bool_], rng: np.random.Generator
    ) -> Rows:
        n = len(pick)
        return Rows(
            pick,
            rng.integers(len(self.guide.variants), size=n),
            rng.integers(len(self.guide.targets), size=n),
            np.full(n, growth),
            np.full(n, seconds),
            free,
            [{}] * n,
        )

    def _around(self, standing: Standing, growth: int, rng: np.random.Generator) -> Iterator[Rows]:
        """Trained prefixes of the front with other numbers, and with the next step of growth; and the original."""
        yield self._kept(self.reader.parse({}), 0, standing.seconds(0, 0), {}, rng)
        for parsed in standing.prefixes():
            if parsed.growth >= growth:
                yield self._kept(parsed, parsed.growth, standing.seconds(0, 0), parsed.carried, rng)
            if self.guide.growth and parsed.growth < len(self.reader.levels):
                yield self._grown(standing, parsed, max(growth, parsed.growth + 1), rng)

    def _grown(self, standing: Standing, parsed: Parsed, growth: int, rng: np.random.Generator) -> Rows:
        """With more growth, up to this; the first of them differs from its parent in nothing else."""
        knob = self.guide.growth[0] if self.guide.growth else ""
        carried = {**parsed.carried, knob: self.reader.levels[growth - 1]}
        grown = self._kept(parsed, growth, standing.seconds(parsed.growth, growth), carried, rng)
        grown.free[0], grown.target[0], grown.variant[0] = False, parsed.target, parsed.variant
        return grown

    def _kept(self, parsed: Parsed, growth: int, seconds: float, carried: Answers, rng: np.random.Generator) -> Rows:
        n = PER_PREFIX
        same = [i for i, variant in enumerate(self.guide.variants) if agrees(variant.answers, carried)]
        return Rows(
            np.tile(np.array(parsed.pick), (n, 1)),
            rng.choice(same or [parsed.variant], n),
            rng.integers(len(self.guide.targets), size=n),
            np.full(n, growth),
            np.full(n, seconds),
            np.tile(~self.reader.structural, (n, 1)),
            [carried] * n,
        )

    def _mutated(self, standing: Standing, growth: int, rng: np.random.Generator) -> Iterator[Rows]:
        """Front members with a few answers moved to their neighbours: what no table foresees."""
        members = standing.members
        if not members:
            return
        pick = np.array([standing.picks[members[i]] for i in rng.integers(len(members), size=MUTATIONS)])
        counts = np.array([len(choices) for choices in self.tables.choices])
        change = rng.random(pick.shape) < 1.5 / pick.shape[1]
        step = rng.choice([-1, 1], pick.shape)
        pick = np.where(change, np.clip(pick + step, 0, counts - 1), pick)
        rows = self._fresh(pick, growth, standing.seconds(0, growth), np.zeros_like(pick, dtype=bool), rng)
        rows.pick = self._named(rows)
        yield rows

    def _solved(self, rows: Rows, outlook: Outlook, rng: np.random.Generator) -> Ints:
        n, costs = len(rows.pick), len(self.aim.costs)
        # From a thousandth of the loss that still matters up to many times that, per unit of what costs.
        weight = outlook.tolerable_loss() * np.exp(rng.uniform(np.log(1e-3), np.log(30.0), n))
        shares = rng.dirichlet(np.full(costs, 0.5), n) if costs else np.zeros((n, 0))
        open_ = np.flatnonzero(rows.free.any(1))
        pick = rows.pick.copy()
        pick[open_] = self.tables.solve(
            rows.pick[open_],
            rows.variant[open_],
            rows.free[open_],
            outlook.losses(rows)[open_],
            outlook.rates(rows.target[open_], (weight[:, None] * shares)[open_]),
        )
        return pick

    def _gain(self, outlook: Outlook, rows: Rows, remaining_s: float | None) -> tuple[Floats, Floats]:
        """Gain of hypervolume, below 0 for what cannot be taken; and what is expected of each row."""
        expected, broken = outlook.expected(rows)
        gain, fits = outlook.gain(expected), np.ones(len(expected), dtype=bool)
        if remaining_s is not None:
            seconds = np.where(self._untrained(rows), outlook.standing.seconds(0, 0), rows.seconds)
            gain = self._per_second(gain, seconds, outlook, rows)
            fits = seconds <= max(remaining_s, float(seconds.min()))
        gain = np.where(broken | ~np.isfinite(expected).all(1), -1.0, gain)
        return np.where(fits, gain, -2.0), expected

    def _per_second(self, gain: Floats, seconds: Floats, outlook: Outlook, rows: Rows) -> Floats:
        """What trains is worth what it is now, or what it may yet grow to in the time that this takes."""
        most, trains = len(self.reader.levels), ~self._untrained(rows)
        worth = gain / seconds
        growing = np.flatnonzero(trains & (rows.growth < most))
        if len(growing):
            grown = replace(rows, growth=np.where(trains, most, rows.growth))
            wait = np.array([outlook.standing.seconds(int(rows.growth[i]), most) for i in growing])
            later = outlook.gain(outlook.expected(grown)[0])[growing] / (seconds[growing] + wait)
            worth[growing] = np.maximum(worth[growing], later)
        return worth

    def _untrained(self, rows: Rows) -> NDArray[np.bool_]:
        """Rows whose structure is left alone."""
        plain: NDArray[np.bool_] = (
            rows.pick[:, self.reader.structural] == self.tables.off[self.reader.structural]
        ).all(1)
        return plain

    def _answers(self, rows: Rows, i: int) -> dict[str, Scalar]:
        tables, guide = self.tables, self.guide
        answers = {name: tables.choices[k][rows.pick[i, k]] for k, name in enumerate(tables.names)}
        answers |= {**guide.variants[rows.variant[i]].answers, **guide.targets[rows.target[i]], **rows.carried[i]}
        if guide.growth:
            answers[guide.growth[0]] = self.reader.levels[max(rows.growth[i], 1) - 1]
        return dict(guide.asked(answers))
