"""How closely the deployed file follows the uncompressed model; needs no labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressors.errors import ConfigError
from evaluators.accuracy import Z95, finite, proportion
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Deployed

KINDS = ("agreement", "cosine")


@dataclass(frozen=True)
class Fidelity:
    """`agreement`: share of examples with the same largest output; `cosine`: mean cosine of the two outputs."""

    kind: str = "agreement"

    def __post_init__(self) -> None:
        """Refuses an unknown kind."""
        if self.kind not in KINDS:
            raise ConfigError("evaluator.fidelity.kind", f"is {self.kind!r}", f"use one of {', '.join(KINDS)}")

    def metrics(self) -> tuple[Metric, ...]:
        """One: `fidelity`, at most 1."""
        return (Metric("fidelity", self.kind, "maximize"),)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Compare with `examples.original`, what the uncompressed torch model answers."""
        outputs, original = finite(examples.outputs(deployed)), examples.original
        if self.kind == "agreement":
            hits = int((outputs.argmax(axis=1) == original.argmax(axis=1)).sum())
            return (proportion(self.metrics()[0], hits, len(examples), examples.split),)
        return (average(self.metrics()[0], cosines(outputs, original), examples.split),)

    def preview(
        self, deployed: Deployed, reference: Deployed, examples: Examples, share: float
    ) -> Sequence[Measurement]:
        """The measurement on a part of the examples, whose band is as much wider."""
        return self.measure(deployed, reference, examples.part(share))

    def close(self) -> None:
        """Holds nothing."""


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row of one with the same row of the other, flattened."""
    a, b = a.reshape(len(a), -1).astype(np.float64), b.reshape(len(b), -1).astype(np.float64)
    norms = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), np.finfo(np.float64).tiny)
    return np.asarray((a * b).sum(axis=1) / norms)


def average(metric: Metric, scores: np.ndarray, split: str) -> Measurement:
    """The mean of scores of at most 1, with a normal 95 % interval."""
    n = len(scores)
    half = Z95 * float(scores.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    value = float(scores.mean())
    return Measurement(metric, value, (value - half, max(value, min(1.0, value + half))), n, {"split": split})
