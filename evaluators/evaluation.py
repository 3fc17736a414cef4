"""What an evaluator must offer and what it is given; every metric is one file that implements it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Array, Deployed


@dataclass(frozen=True)
class Examples:
    """One split as arrays: inputs, the labels where there are any, and what the uncompressed torch model says."""

    split: str
    inputs: tuple[Array, ...]
    targets: Array | None
    original: NDArray[np.float32]

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.inputs[0])


class Evaluator(Protocol):
    """Measures a deployed file; it never sees a torch model."""

    def metrics(self) -> tuple[Metric, ...]:
        """What `measure` will return, known before anything has run."""

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """One measurement per promised metric; `reference` is the uncompressed model in the study's first runtime."""

    def close(self) -> None:
        """Give back what it holds, such as a process of its own; it may be used again afterwards."""
