"""Bytes that must be shipped for the model to run."""

from collections.abc import Sequence
from dataclasses import dataclass

from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric, exact
from evaluators.runtime import Deployed

SIZE = Metric("size_bytes", "bytes", "minimize")


@dataclass(frozen=True)
class Size:
    """The deployed files as they lie on disk, graph description included."""

    def metrics(self) -> tuple[Metric, ...]:
        """One: `size_bytes`."""
        return (SIZE,)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """An exact count."""
        return (exact(SIZE, deployed.bytes, {"files": len(deployed.files)}),)

    def close(self) -> None:
        """Holds nothing."""
