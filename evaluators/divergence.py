"""How far a candidate's outputs are from the uncompressed model's on calibration data: a proxy, never an objective."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluators.accuracy import Z95, finite
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Deployed

LOSS = Metric("calibration_loss", "nats", "minimize")
Outputs = NDArray[np.float64]


@dataclass(frozen=True)
class Divergence:
    """Mean over examples of KL(original || candidate), or of half the squared error where outputs are no logits.

    Several predictions in one example, as of words, add up. Half the squared error is the same divergence between two
    Gaussians of unit variance. No labels are needed.
    """

    def metrics(self) -> tuple[Metric, ...]:
        """One: `calibration_loss`, 0 or more."""
        return (LOSS,)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Outputs `(n, classes)` and `(n, words, classes)`, two or more, are logits; see `divergences`."""
        losses = divergences(examples.original, finite(examples.outputs(deployed)))
        n, value = len(losses), max(0.0, float(losses.mean()))
        half = Z95 * float(losses.std(ddof=1)) / math.sqrt(n) if n > 1 else value
        interval = (max(0.0, value - half), value + half)
        return (Measurement(LOSS, value, interval, n, {"split": examples.split}),)

    def close(self) -> None:
        """Holds nothing."""


def divergences(original: np.ndarray, candidate: np.ndarray) -> Outputs:
    """One number in nats per example, which is the first axis; what is not logits is summed over all others."""
    if original.ndim == 3 and original.shape[2] > 1:
        # Example by example: of a whole vocabulary for every word, copies in double precision would not fit.
        return np.array([divergences(*pair).sum() for pair in zip(original, candidate, strict=True)])
    wanted, got = original.astype(np.float64), candidate.astype(np.float64)
    if wanted.ndim == 2 and wanted.shape[1] > 1:
        wanted, got = _log_softmax(wanted), _log_softmax(got)
        return np.asarray((np.exp(wanted) * (wanted - got)).sum(axis=1))
    return np.asarray(0.5 * ((wanted - got) ** 2).reshape(len(wanted), -1).sum(axis=1))


def _log_softmax(logits: Outputs) -> Outputs:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
