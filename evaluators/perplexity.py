"""How well the deployed file foresees each next word of a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressors.errors import Infeasible
from evaluators.accuracy import Z95, finite
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Array, Deployed

PERPLEXITY = Metric("perplexity", "words", "minimize")
LIKELIHOOD = Metric("relative_likelihood", "of uncompressed", "maximize")
Losses = NDArray[np.float64]


@dataclass(frozen=True)
class Perplexity:
    """Of outputs `(n, t, vocabulary)` on windows `(n, t)` of text, where each word but the first is foreseen.

    `relative_likelihood` is the uncompressed model's perplexity over this one's: 0.98 is 2 % more perplexity, and above
    1 a candidate foresees better than its teacher. Both read the same windows, so that its band is far narrower than
    those of the two perplexities, which say how much texts differ.
    """

    def metrics(self) -> tuple[Metric, ...]:
        """`perplexity`, 1 or more, and `relative_likelihood`."""
        return (PERPLEXITY, LIKELIHOOD)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """The exponential of the mean over windows, with a normal 95 % interval."""
        words = examples.inputs[0]
        told = surprise(finite(examples.outputs(deployed)), words)
        gained = surprise(examples.original, words) - told
        return (_exponential(PERPLEXITY, told, examples), _exponential(LIKELIHOOD, gained, examples))

    def preview(
        self, deployed: Deployed, reference: Deployed, examples: Examples, share: float
    ) -> Sequence[Measurement]:
        """The measurement on a part of the windows, whose band is as much wider."""
        return self.measure(deployed, reference, examples.part(share))

    def close(self) -> None:
        """Holds nothing."""


def surprise(logits: NDArray[np.float32], words: Array) -> Losses:
    """Mean negative log likelihood, in nats a word, of each window; raises `Infeasible` for another shape."""
    if logits.ndim != 3 or logits.shape[:2] != words.shape or words.shape[1] < 2:
        raise Infeasible(f"perplexity needs logits (n, words, vocabulary) for words {words.shape}, not {logits.shape}")
    return np.array([_of_window(window[:-1], told[1:]) for window, told in zip(logits, words, strict=True)])


def _of_window(logits: NDArray[np.float32], words: Array) -> float:
    # Window by window: in double precision all at once would take as much memory again as twice the outputs.
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    right = np.take_along_axis(shifted, words[:, None].astype(np.intp), axis=1)[:, 0]
    return float((np.log(np.exp(shifted).sum(axis=1)) - right).mean())


def _exponential(metric: Metric, logs: Losses, examples: Examples) -> Measurement:
    n, mean = len(logs), float(logs.mean())
    # Of one window nothing is known but its own value.
    half = Z95 * float(logs.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    interval = (math.exp(mean - half), math.exp(mean + half))
    return Measurement(
        metric, math.exp(mean), interval, n, {"split": examples.split, "words": examples.inputs[0].shape[1]}
    )
