"""What is expected of plans that were not tried, by the most likely beliefs or by possible ones; it chooses nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from search.beliefs import Correction, improvement, regress, smooth
from search.solver import Answers, Floats, Ints, Rates
from search.standing import LATENCY_NOISE, MEMORY, Standing


@dataclass
class Rows:
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
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """All of them, in order."""
        return cls(
            pick=np.concatenate([part.pick for part in parts]),
            variant=np.concatenate([part.variant for part in parts]),
            target=np.concatenate([part.target for part in parts]),
            growth=np.concatenate([part.growth for part in parts]),
            seconds=np.concatenate([part.seconds for part in parts]),
            free=np.concatenate([part.free for part in parts]),
            carried=[answers for part in parts for answers in part.carried],
        )


class Outlook:
    """The most likely beliefs about a study; with a generator, possible ones in their place (Thompson sampling)."""

    def __init__(self, standing: Standing, rng: np.random.Generator | None) -> None:
        self.standing, self.rng, self.tables = standing, rng, standing.tables
        self.relation = standing.relate(rng)

    @cached_property
    def corrections(self) -> list[Correction]:
        """One per level."""
        found = self.standing.corrections
        if self.rng is None:
            return found
        none = np.zeros(0, dtype=np.intp)
        levels = self.standing.levels(self.standing.picks[:0], none, none)
        return [
            Correction(c.log + self.rng.normal(0, 0.3 / np.sqrt(level.prior + c.evidence)), c.evidence)
            for c, level in zip(found, levels, strict=True)
        ]

    @cached_property
    def _surrogates(self) -> dict[int, Floats]:
        """Cost -> weights of the features `(targets, features)`."""
        found: dict[int, list[Floats]] = {}
        for (j, _), fitted in self.standing.surrogates.items():
            found.setdefault(j, []).append(fitted.mean if self.rng is None else fitted.drawn(self.rng))
        return {j: np.array(weights) for j, weights in found.items()}

    @cached_property
    def _learned(self) -> float:
        """What each step of growth adds to the quality, beyond the loss."""
        learned = self.standing.learned
        return float(learned.mean[0] if self.rng is None else learned.drawn(self.rng)[0])

    def losses(self, rows: Rows) -> Floats:
        """`(rows, knobs, choices)`: the corrected loss of every choice."""
        reader, most = self.standing.reader, self.tables.loss.shape[2]
        grown, placed, kind_choice, knob_choice = (c.log for c in self.corrections)
        kinds, steps, places = reader.kinds, len(reader.levels) + 1, len(reader.guide.targets)
        by_row = grown[kinds * steps + rows.growth[:, None]] + placed[kinds * places + rows.target[:, None]]
        by_choice = kind_choice.reshape(-1, most)[kinds] + knob_choice.reshape(-1, most)
        factors: Floats = np.exp(np.clip(by_row[:, :, None] + by_choice, -40, 40))
        return self.tables.loss[rows.variant] * factors

    def rates(self, target: Ints, weights: Floats) -> Rates:
        """The surrogates' weights, in shares of the box, times those of the costs `(rows, costs)`."""
        widths, (low, high) = len(self.tables.widths), self.standing.box
        total = np.zeros((len(target), self.tables.features))
        for column, (j, own) in enumerate(self._surrogates.items()):
            total += weights[:, column, None] * np.maximum(own[target], 0) / (high[j] - low[j])
        macs, layers = total[:, 2 : 2 + widths], total[:, 2 + widths : 2 + 2 * widths]
        return Rates(macs, layers, total[:, 2 + 2 * widths], total[:, 1])

    def tolerable_loss(self) -> float:
        """The loss at which quality leaves the box."""
        return self.standing.tolerable_loss(self.relation)

    def expected(self, rows: Rows) -> tuple[Floats, NDArray[np.bool_]]:
        """`(rows, objectives)`; and which rows would break a constraint."""
        standing = self.standing
        loss = np.take_along_axis(self.losses(rows), rows.pick[..., None], 2)[..., 0].sum(1)
        loss = loss * np.exp(smooth(standing.picks[standing.used], standing.errors, rows.pick, self.rng))
        features = self.tables.describe(rows.pick, rows.variant)
        found = np.zeros((len(rows.pick), len(standing.aim.roles)))
        found[:, standing.aim.quality] = standing.zero + self.relation.drop(loss) - self._learned * rows.growth
        for j, own in self._surrogates.items():
            found[:, j] = self._believable(j, (features * own[rows.target]).sum(1))
        return found, self._broken(np.concatenate([features, loss[:, None]], 1))

    def _believable(self, j: int, values: Floats) -> Floats:
        """Straight lines go below nothing: half of the least that was seen is as far as they are believed."""
        seen = self.standing.values[np.isfinite(self.standing.values[:, j]), j]
        positive = len(seen) > 0 and seen.min() > 0
        return np.maximum(values, seen.min() / 2) if positive else values

    def _broken(self, features: Floats) -> NDArray[np.bool_]:
        """Rows that would break a constraint, by a regression on what broke one before."""
        standing = self.standing
        told = np.flatnonzero(standing.done | (standing.violations > 0))[-MEMORY:]
        violations = standing.violations[told]
        if not (violations > 0).any():
            return np.zeros(len(features), dtype=bool)
        worst = float(np.abs(violations).max())
        loss = np.where(np.isfinite(standing.measured), standing.measured, 0)[told, None]
        known = np.concatenate([standing.described[told], loss], 1)
        zeros, noise = np.zeros(features.shape[1]), np.full(len(told), 0.1 * worst)
        found: NDArray[np.bool_] = features @ regress(known, violations, noise, zeros, zeros + 10 * worst).mean > 0
        return found

    def gain(self, expected: Floats) -> Floats:
        """Share of the box that a point would add to the front; a gain within the noise of measuring is none."""
        return improvement(expected + self._margin(expected), self.standing.open)

    def _margin(self, expected: Floats) -> Floats:
        """By how much a point must be better to be told apart."""
        low, high = self.standing.box
        margin = 0.01 * np.tile(high - low, (len(expected), 1))
        for j, role in enumerate(self.standing.aim.roles):
            if role == "latency":
                margin[:, j] = np.maximum(margin[:, j], LATENCY_NOISE * np.abs(expected[:, j]))
        return margin
