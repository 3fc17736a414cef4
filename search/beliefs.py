"""What a study's measurements say of the predictions: corrections, a latency surrogate, loss against quality."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.solver import Floats, Ints

SWEEPS = 8
# What is left over of logarithms of losses, and over which share of differing knobs it is alike.
RESIDUAL_SPREAD, RESIDUAL_NOISE, REACH = 0.5, 0.1, 0.3
# Losses below this are rounding of the runtime, not of the plan.
LEAST_LOSS = 1e-6


@dataclass(frozen=True)
class Level:
    """One grain of correction: which of its `size` factors every part of every trial has, `index` `(trials, parts)`.

    `prior` is how many trials of evidence it takes to move a factor half of the way.
    """

    index: Ints
    size: int
    prior: float


@dataclass(frozen=True)
class Correction:
    """Logarithms of the factors of one level, and how many trials' worth of evidence stands behind each."""

    log: Floats
    evidence: Floats


def correct(parts: Floats, measured: Floats, weight: Floats, levels: Sequence[Level]) -> list[Correction]:
    """Factors that make the sum over `parts` `(trials, parts)` agree with `measured` `(trials,)`.

    Each trial's logarithmic error, times its `weight`, is laid at the door of its parts in proportion to their share of
    the prediction; every factor is drawn towards 1 by its prior. The order of the trials plays no role, so that any
    worker that reads the same trials believes the same. Losses are compared by ratio: they span orders of magnitude.
    """
    logs = [np.zeros(level.size) for level in levels]
    evidence: list[Floats] = [np.zeros(level.size) for level in levels]
    flat = [level.index.ravel() for level in levels]
    aim = np.log(measured + LEAST_LOSS)[:, None]
    for _ in range(SWEEPS):
        factors = np.exp(sum(log[index] for log, index in zip(logs, flat, strict=True))).reshape(parts.shape)
        predicted = parts * factors + LEAST_LOSS / max(1, parts.shape[1])
        total = predicted.sum(1, keepdims=True)
        blame = weight[:, None] * predicted / total
        pull = (blame * (aim - np.log(total))).ravel()
        for i, level in enumerate(levels):
            evidence[i] = np.bincount(flat[i], blame.ravel(), level.size).astype(np.float64)
            towards = np.bincount(flat[i], pull, level.size) - level.prior * logs[i]
            # All levels move at once, each for its part.
            logs[i] = logs[i] + towards / (level.prior + evidence[i]) / 2
    return [Correction(log, seen) for log, seen in zip(logs, evidence, strict=True)]


@dataclass(frozen=True)
class Linear:
    """A linear model with a normal distribution over its weights."""

    mean: Floats
    covariance: Floats

    def drawn(self, rng: np.random.Generator) -> Floats:
        """One possible set of weights."""
        return rng.multivariate_normal(self.mean, self.covariance, method="cholesky")


def regress(features: Floats, values: Floats, noise: Floats, mean: Floats, spread: Floats) -> Linear:
    """Bayesian ridge regression: `values` `(n,)` with standard deviations `noise` on `features` `(n, f)`.

    The prior of every weight is normal with `mean` and standard deviation `spread`; with no data it is the answer.
    """
    weighted = features / noise[:, None]
    precision = np.diag(1 / spread**2) + weighted.T @ weighted
    covariance = np.linalg.inv(precision)
    centre = covariance @ (mean / spread**2 + weighted.T @ (values / noise))
    return Linear(centre, (covariance + covariance.T) / 2 + 1e-15 * np.eye(len(mean)))


def smooth(known: Ints, residuals: Floats, asked: Ints, rng: np.random.Generator | None = None) -> Floats:
    """What is left over at `asked` `(n, knobs)`, from what was left over at `known` `(trials, knobs)`.

    A Gaussian process whose covariance falls with the share of knobs that two plans answer differently: it knows what
    no sum over knobs can say, near to what was tried. With a generator, one draw for each row.
    """
    own = RESIDUAL_SPREAD**2 * np.exp(-_apart(known, known) / REACH)
    across = RESIDUAL_SPREAD**2 * np.exp(-_apart(asked, known) / REACH)
    gain = np.linalg.solve(own + RESIDUAL_NOISE**2 * np.eye(len(known)), across.T)
    mean: Floats = gain.T @ residuals
    if rng is None:
        return mean
    spread: Floats = np.sqrt(np.maximum(RESIDUAL_SPREAD**2 - (across.T * gain).sum(0), 0.0))
    return mean + rng.standard_normal(len(asked)) * spread


def _apart(a: Ints, b: Ints) -> Floats:
    """`(n, m)`: share of knobs that differ."""
    most = int(max(a.max(initial=0), b.max(initial=0))) + 1
    one_hot = [np.eye(most)[rows].reshape(len(rows), most * a.shape[1]) for rows in (a, b)]
    apart: Floats = 1 - one_hot[0] @ one_hot[1].T / max(1, a.shape[1])
    return apart


@dataclass(frozen=True)
class Relation:
    """How much quality goes when the loss rises: drop = scale * loss ** power."""

    scale: float
    power: float

    def drop(self, loss: Floats) -> Floats:
        """In the quality's own unit, never negative."""
        drop: Floats = self.scale * np.power(loss, self.power)
        return drop

    def loss(self, drop: float) -> float:
        """The inverse of `drop`."""
        return float((drop / self.scale) ** (1 / self.power))


def relate(loss: Floats, drop: Floats, noise: float, rng: np.random.Generator | None) -> Relation:
    """Fit the power law to measured losses and drops of quality; a generator draws one that is possible.

    Weighted least squares for the scale at each of `POWERS`, which have a prior around 1. A drop is known to within
    `noise` and a third of itself: it may be negative, as quality is judged on few examples.
    """
    weight = 1 / (noise**2 + (drop / 3) ** 2)
    fits = []
    for power in POWERS:
        column = np.power(loss + LEAST_LOSS, power)
        precision = float((weight * column**2).sum())
        scale = float((weight * column * drop).sum()) / precision
        misfit = float((weight * (drop - scale * column) ** 2).sum()) + ((power - 1) / 0.3) ** 2
        fits.append((misfit, scale, precision**-0.5, power))
    misfits = np.array([fit[0] for fit in fits])
    odds = np.exp(-(misfits - misfits.min()) / 2)
    chosen = int(misfits.argmin()) if rng is None else int(rng.choice(len(fits), p=odds / odds.sum()))
    _, scale, spread, power = fits[chosen]
    drawn = scale if rng is None else rng.normal(scale, spread)
    return Relation(max(float(drawn), spread / 10), power)


POWERS = (0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.5)


def uncovered(front: Floats, low: Floats, high: Floats) -> Floats:
    """Of `SAMPLES` points spread over the box from `low` to `high`, those that no member of `front` dominates."""
    samples = np.random.default_rng(0).random((SAMPLES, len(low))) * (high - low) + low
    for member in front:
        dominated: NDArray[np.bool_] = np.all(member <= samples, axis=1)
        samples = samples[~dominated]
    return samples


def improvement(points: Floats, samples: Floats) -> Floats:
    """Share of the box that each of `points` `(n, m)` would add to what is covered, from its `uncovered` samples.

    All objectives are to be minimized.
    """
    covered: NDArray[np.bool_] = np.ones((len(points), len(samples)), dtype=bool)
    for j in range(points.shape[1]):
        covered &= points[:, j, None] <= samples[None, :, j]
    share: Floats = covered.sum(1) / SAMPLES
    return share


SAMPLES = 2048
