"""Trials in the terms of a guide, as indices and arrays; it believes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from compressors.plan import Scalar
from search.solver import Answers, Floats, Guide, Ints, Tables

Role = Literal["quality", "latency", "size"]


@dataclass(frozen=True)
class Fact:
    """What one finished trial says. `values` are to be minimized, NaN where unknown; `complete` ones can be on a front.

    `loss` is in the currency of the guide's effects; `violation` is above 0 where a constraint is broken; `seconds` are
    the trial's own, without what went into things that others share.
    """

    number: int
    answers: Answers
    values: tuple[float, ...]
    complete: bool = True
    loss: float | None = None
    violation: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Aim:
    """What each objective is, exactly one of them the quality, and which share of it may go; None is no limit."""

    roles: tuple[Role, ...]
    tolerance: float | None

    @property
    def quality(self) -> int:
        """Its place among the objectives."""
        return self.roles.index("quality")

    @property
    def costs(self) -> list[int]:
        """The places of all others."""
        return [j for j, role in enumerate(self.roles) if role != "quality"]


@dataclass(frozen=True)
class Parsed:
    """A trial's answers as indices.

    `growth` 0 is none, 1 the least; `structure` names what was trained, growth apart, `carried` its answers.
    """

    pick: tuple[int, ...]
    variant: int
    target: int
    growth: int
    identity: frozenset[tuple[str, Scalar]]
    structure: frozenset[tuple[str, Scalar]]
    carried: Answers = field(default_factory=dict)


class Reader:
    """Reads answers in the terms of a guide; what follows from a trial's answers alone is computed once."""

    def __init__(self, guide: Guide) -> None:
        self.guide, self.tables = guide, Tables(guide)
        kinds = [name.split("@")[0] for name in self.tables.names]
        self.kinds: Ints = np.array([sorted(set(kinds)).index(kind) for kind in kinds])
        self.levels = guide.growth[1] if guide.growth else ()
        self.structural = np.array([name in guide.structural for name in self.tables.names])
        self.picks: Ints = np.zeros((0, len(self.tables.names)), dtype=np.intp)
        self.base: Floats = np.zeros((0, len(self.tables.names)))
        self.described: Floats = np.zeros((0, self.tables.features))
        self._at: dict[int, int] = {}
        self._parsed: list[Parsed] = []

    def read(self, facts: Sequence[Fact]) -> tuple[list[Parsed], Ints]:
        """Facts as indices, and their rows in `picks`, `base` (predicted parts of the loss) and `described`."""
        for fact in facts:
            if fact.number not in self._at:
                self._at[fact.number] = len(self._parsed)
                self._parsed.append(self.parse(fact.answers))
        self._grow()
        rows = [self._at[fact.number] for fact in facts]
        return [self._parsed[row] for row in rows], np.array(rows, dtype=np.intp)

    def _grow(self) -> None:
        new = self._parsed[len(self.picks) :]
        if not new:
            return
        picks = np.array([p.pick for p in new], dtype=np.intp)
        variants = np.array([p.variant for p in new], dtype=np.intp)
        base = self.tables.loss[variants[:, None], np.arange(picks.shape[1]), picks]
        self.picks = np.concatenate([self.picks, picks])
        self.base = np.concatenate([self.base, base])
        self.described = np.concatenate([self.described, self.tables.describe(picks, variants)])

    def parse(self, answers: Answers) -> "Parsed":
        """Answers as indices; what was not asked counts as off."""
        variant = _match([v.answers for v in self.guide.variants], answers)
        pick = self._picks(answers, variant)
        level = _nearest((0, *self.levels), answers.get(self.guide.growth[0]), 0) if self.guide.growth else 0
        own = frozenset((k, v) for k, v in answers.items() if k in self.guide.structural)
        bare = frozenset((k, v) for k, v in own if not self.guide.growth or k != self.guide.growth[0])
        return Parsed(
            tuple(pick),
            variant,
            _match(self.guide.targets, answers),
            level,
            self.identity(answers),
            bare if level else frozenset(),
            dict(own) if level else {},
        )

    def _picks(self, answers: Answers, variant: int) -> list[int]:
        tables = self.tables
        asked = [
            _nearest(choices, answers.get(name), int(off))
            for name, choices, off in zip(tables.names, tables.choices, tables.off, strict=True)
        ]
        return [int(tables.same[variant, k, choice]) for k, choice in enumerate(asked)]

    def identity(self, answers: Answers) -> frozenset[tuple[str, Scalar]]:
        """What makes a plan a new one: not another name for the same choice."""
        tables, told = self.tables, {name: value for name, value in answers.items() if name in self.own}
        picks = self._picks(told, _match([v.answers for v in self.guide.variants], told))
        for name, choices, pick in zip(tables.names, tables.choices, picks, strict=True):
            # A number between choices is a choice of its own.
            if told.get(name) in choices:
                told[name] = choices[pick]
        return frozenset(told.items())

    @cached_property
    def own(self) -> frozenset[str]:
        """The knobs that proposals speak of; a plan is not new because another one differs."""
        guide = self.guide
        places = [*(variant.answers for variant in guide.variants), *guide.targets]
        return frozenset(
            [*self.tables.names, *(n for p in places for n in p), *([guide.growth[0]] if guide.growth else [])]
        )


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


def agrees(place: Answers, answers: Mapping[str, Scalar]) -> bool:
    """No answer contradicts the place's."""
    return all(answers[name] == value for name, value in place.items() if name in answers)
