"""Whether pictures find their captions and captions their pictures; needs pairs of embeddings, one width for both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressors.errors import Infeasible
from evaluators.accuracy import finite, proportion
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.retrieval import ranks_asked
from evaluators.runtime import Array, Deployed

Rows = NDArray[np.float64]
ROWS = 256
"""Queries that are compared with all examples at once."""


@dataclass(frozen=True)
class CrossRetrieval:
    """The share of queries with a right answer among the nearest `k`, for each `k` of `at`, both ways and in the mean.

    Right are the query's own partner and those with the same target; ties count against the file. The intervals take
    queries for independent, though all search the same examples, and the mean's takes the two ways for one. A part of
    a split has fewer to search and is easier, so there is no preview.
    """

    at: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        """Refuses ranks that are none."""
        object.__setattr__(self, "at", ranks_asked("cross_retrieval", self.at))

    def metrics(self) -> tuple[Metric, ...]:
        """`recall_at_1`, the mean of `image_to_text_at_1` and `text_to_image_at_1`, and so on: shares in 0..1."""
        names = ("recall", "image_to_text", "text_to_image")
        return tuple(Metric(f"{name}_at_{k}", "share", "maximize") for name in names for k in self.at)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Outputs are `(n, 2, width)`: picture and caption."""
        pictures, captions = towers(examples.outputs(deployed))
        targets = np.arange(len(examples)) if examples.targets is None else examples.targets
        found = [
            [float((ranks < k).sum()) for k in self.at]
            for ranks in (_ranks(pictures, captions, targets), _ranks(captions, pictures, targets))
        ]
        both = [(there + back) / 2 for there, back in zip(*found, strict=True)]
        hits = (*both, *found[0], *found[1])
        return [
            proportion(metric, count, len(examples), examples.split)
            for metric, count in zip(self.metrics(), hits, strict=True)
        ]

    def close(self) -> None:
        """Holds nothing."""


def towers(outputs: NDArray[np.float32]) -> tuple[Rows, Rows]:
    """What the two towers say, each `(n, width)` of length 1; `Infeasible` for outputs that are no pairs."""
    if outputs.ndim != 3 or outputs.shape[1] != 2:
        shape = outputs.shape[1:]
        raise Infeasible(f"the outputs are {shape} for an example: expected (2, width), a picture's and a caption's")
    pairs = finite(outputs).astype(np.float64)
    pairs /= np.maximum(np.linalg.norm(pairs, axis=2, keepdims=True), np.finfo(np.float64).tiny)
    return pairs[:, 0], pairs[:, 1]


def _ranks(queries: Rows, answers: Rows, targets: Array) -> NDArray[np.intp]:
    """How many wrong answers come before the best right one, or are as near, per query."""
    ranks = []
    for start in range(0, len(queries), ROWS):
        rows = slice(start, start + ROWS)
        similarities, right = queries[rows] @ answers.T, targets[rows, None] == targets
        best = np.where(right, similarities, -np.inf).max(axis=1, keepdims=True)
        ranks.append(((similarities >= best) & ~right).sum(axis=1))
    return np.concatenate(ranks)
