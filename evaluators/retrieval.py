"""Whether the deployed file finds the neighbours that the uncompressed model finds; needs embeddings, and no labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressors.errors import ConfigError, Infeasible
from evaluators.accuracy import finite, proportion
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Deployed

ROWS = 256
"""Queries that are compared with all examples at once."""


@dataclass(frozen=True)
class Retrieval:
    """The share of examples whose nearest other one, by cosine, stays among the nearest `k`, for each `k` of `at`.

    Nearest is what the uncompressed model says; the candidate embeds queries and all that is searched, as it would in
    use. The intervals take queries for independent, though all search the same examples. A part of a split has fewer to
    search and is easier, so there is no preview.
    """

    at: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        """Refuses ranks that are none."""
        object.__setattr__(self, "at", ranks_asked("retrieval", self.at))

    def metrics(self) -> tuple[Metric, ...]:
        """`retrieval_at_1` and so on, shares in 0..1."""
        return tuple(Metric(f"retrieval_at_{k}", "share", "maximize") for k in self.at)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Outputs are `(n, width)`; `Infeasible` where there are too few examples to leave one out."""
        if len(examples) <= max(self.at) + 1:
            needed = max(self.at) + 2
            raise Infeasible(
                f"retrieval_at_{max(self.at)} needs {needed} examples; {examples.split} has {len(examples)}"
            )
        ranks = _ranks(examples.original, finite(examples.outputs(deployed)))
        return [
            proportion(metric, int((ranks < k).sum()), len(examples), examples.split)
            for metric, k in zip(self.metrics(), self.at, strict=True)
        ]

    def close(self) -> None:
        """Holds nothing."""


def ranks_asked(evaluator: str, at: Sequence[int]) -> tuple[int, ...]:
    """Those that an evaluator's option asks for; refuses what is none."""
    if not at or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in at):
        problem = f"is {list(at)}"
        raise ConfigError(f"evaluator.{evaluator}.at", problem, "give whole numbers above 0, such as [1,5,10]")
    return tuple(at)


def _ranks(original: NDArray[np.float32], candidate: NDArray[np.float32]) -> NDArray[np.intp]:
    """How many examples the candidate puts before the one that is nearest by the original, per example."""
    wanted, got = _unit(original), _unit(candidate)
    ranks = [_ranks_of(range(i, min(i + ROWS, len(got))), wanted, got) for i in range(0, len(got), ROWS)]
    return np.concatenate(ranks)


def _ranks_of(rows: range, wanted: NDArray[np.float64], got: NDArray[np.float64]) -> NDArray[np.intp]:
    queries = np.arange(len(rows))
    original = _without_itself(wanted[rows] @ wanted.T, rows)
    found = _without_itself(got[rows] @ got.T, rows)
    nearest = original.argmax(axis=1)
    best, still = original[queries, nearest][:, None], found[queries, nearest][:, None]
    # What only the candidate takes for the same counts against it: one that always says the same finds none.
    return np.asarray(((found > still) | ((found == still) & (original < best))).sum(axis=1))


def _without_itself(similarities: NDArray[np.float64], rows: range) -> NDArray[np.float64]:
    similarities[np.arange(len(rows)), rows] = -np.inf
    return similarities


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    flat = embeddings.reshape(len(embeddings), -1).astype(np.float64)
    return np.asarray(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), np.finfo(np.float64).tiny))
