"""Which candidates nobody beats, bands respected; NumPy and measurements only."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from evaluators.measurement import Measurement

IntArray = npt.NDArray[np.intp]
Row = Sequence[Measurement]
"""One candidate's measurements, one per objective, in the same order for every candidate."""


def dominates(a: Row, b: Row) -> bool:
    """True when `a` is no worse in every value and better beyond the bands in at least one.

    Whatever is dominated here is also dominated in the ordinary sense, by values alone, and that relation has no
    cycles; so this one has none either, and a front of at least one candidate always remains. It is not transitive:
    a wide band may protect from one rival and not from another.
    """
    pairs = list(zip(a, b, strict=True))
    return all(x.no_worse(y) for x, y in pairs) and any(x.clearly_better(y) for x, y in pairs)


def front(rows: Sequence[Row]) -> list[int]:
    """The positions, in order, of the rows that no other row dominates; equal rows all stay."""
    if not rows:
        return []
    # Less is better from here on.
    signs = np.array([1 if m.metric.direction == "minimize" else -1 for m in rows[0]])
    values = (signs * np.array([[m.value for m in row] for row in rows])).T
    bands = signs[:, None] * np.array([[m.interval for m in row] for row in rows])
    best, worst = bands.min(axis=2).T, bands.max(axis=2).T

    def stay(among: IntArray, by: IntArray) -> IntArray:
        no_worse = np.logical_and.reduce([value[by] <= value[among, None] for value in values])
        better = np.logical_or.reduce([high[by] < low[among, None] for low, high in zip(best, worst, strict=True)])
        dominated: npt.NDArray[np.bool_] = (no_worse & better).any(axis=1)
        return among[~dominated]

    # A worker of a sweep does this after every trial, over thousands. A few good ones dominate nearly all others, and
    # what those leave over one another; only what is left then has to stand against every row.
    ranks = worst.argsort(axis=1).argsort(axis=1)
    ways = np.random.default_rng(0).dirichlet(np.ones(len(ranks)), size=64)
    everyone = np.arange(len(rows))
    left = stay(everyone, by=np.unique((ways @ ranks).argmin(axis=1)))
    return [int(i) for i in stay(stay(left, by=left), by=everyone)]


def distinct(rows: Sequence[Row]) -> list[int]:
    """Front members, picked in order, of which every two differ beyond their bands in at least one objective."""
    kept: list[int] = []
    for i in front(rows):
        if all(differ(rows[i], rows[j]) for j in kept):
            kept.append(i)
    return kept


def differ(a: Row, b: Row) -> bool:
    """True when one of them is better beyond the bands in at least one objective."""
    return any(x.clearly_better(y) or y.clearly_better(x) for x, y in zip(a, b, strict=True))


def hypervolume(points: Iterable[Sequence[float]], reference: Sequence[float]) -> float:
    """The volume, exact, that points with less-is-better coordinates dominate up to `reference` (Zitzler 1998).

    Slice by slice along the last axis: meant for a few hundred points in two or three dimensions.
    """
    inside = sorted((p for p in points if all(x < r for x, r in zip(p, reference, strict=True))), key=lambda p: p[-1])
    *rest, end = reference
    if not rest or not inside:
        return end - inside[0][0] if inside else 0.0
    ends = [*(p[-1] for p in inside[1:]), end]
    return sum(
        (after - p[-1]) * hypervolume([q[:-1] for q in inside[: i + 1]], rest)
        for i, (p, after) in enumerate(zip(inside, ends, strict=True))
        if after > p[-1]
    )
