"""What a study's measurements say of the predictions: corrections, a latency surrogate, loss against quality."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.solver import Floats, Ints

SWEEPS = 8
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


def correct(parts: Floats, measured: Floats, levels: Sequence[Level]) -> list[Correction]:
    """Factors that make the sum over `parts` `(trials, parts)` agree with `measured` `(trials,)`.

    Each trial's logarithmic error is laid at the door of its parts in proportion to their share of the prediction;
    every factor is drawn towards 1 by its prior. The order of the trials plays no role, so that any worker that
    reads the same trials believes the same. Losses are compared by ratio: they span orders of magnitude.
    """
    logs = [np.zeros(level.size) for level in levels]
    evidence: list[Floats] = [np.zeros(level.size) for level in levels]
    flat = [level.index.ravel() for level in levels]
    aim = np.log(measured + LEAST_LOSS)[:, None]
    for _ in range(SWEEPS):
        factors = np.exp(sum(log[index] for log, index in zip(logs, flat, strict=True))).reshape(parts.shape)
        predicted = parts * factors + LEAST_LOSS / max(1, parts.shape[1])
        total = predicted.sum(1, keepdims=True)
        blame = predicted / total
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


@dataclass(frozen=True)
class Relation:
    """How much quality goes when the loss rises: drop = exp(weights[0]) * loss ** weights[1]."""

    weights: Floats

    def drop(self, loss: Floats) -> Floats:
        """In the quality's own unit, never negative."""
        drop: Floats = np.exp(np.clip(self.weights[0] + self.weights[1] * np.log(loss + LEAST_LOSS), -50, 50))
        return drop


def relate(loss: Floats, drop: Floats, rng: np.random.Generator | None) -> Relation:
    """Fit the power law to measured losses and drops of quality; a generator draws one that is possible.

    Drops too small to be seen count as half of the least that was seen.
    """
    seen = drop[drop > 0]
    if len(seen) == 0 or len(loss) < 2:
        return Relation(np.array([0.0, 1.0]))
    least = float(seen.min()) / 2
    logs = np.log(loss + LEAST_LOSS)
    features = np.stack([np.ones(len(loss)), logs], 1)
    target = np.log(np.maximum(drop, least))
    start = np.array([float(np.median(target - logs)), 1.0])
    fitted = regress(features, target, np.full(len(loss), 0.7), start, np.array([3.0, 0.4]))
    weights = fitted.mean if rng is None else fitted.drawn(rng)
    return Relation(np.array([weights[0], max(weights[1], 0.1)]))


def improvement(points: Floats, front: Floats, low: Floats, high: Floats, rng: np.random.Generator) -> Floats:
    """Share of the box from `low` to `high` that each of `points` `(n, m)` would add to what `front` dominates.

    All objectives are to be minimized. Monte Carlo over `SAMPLES` points of the box.
    """
    samples = rng.random((SAMPLES, len(low))) * (high - low) + low
    for member in front:
        dominated: NDArray[np.bool_] = np.all(member <= samples, axis=1)
        samples = samples[~dominated]
    covered: Floats = np.all(points[:, None, :] <= samples[None, :, :], axis=2).sum(1) / SAMPLES
    return covered


SAMPLES = 2048
