"""A metric of the user's own on the deployed file's outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compressors.errors import Infeasible
from evaluators.accuracy import finite
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Array, Deployed

RESAMPLES = 200


@dataclass(frozen=True)
class Score:
    """`function(outputs, targets)` gives one number, more is better; its band is a bootstrap over the examples.

    Outputs and targets are arrays with the examples first. The percentile bootstrap (Efron 1979) always draws the same
    resamples, so two candidates with equal outputs get equal bands.
    """

    function: Callable[[Array, Array], float]

    def metrics(self) -> tuple[Metric, ...]:
        """One: `score`."""
        return (Metric("score", "user's", "maximize"),)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Needs labels."""
        if examples.targets is None:
            raise Infeasible(f"the metric needs labels and the {examples.split} split has none")
        outputs, targets, n = finite(examples.outputs(deployed)), examples.targets, len(examples)
        value = float(self.function(outputs, targets))
        rows = np.random.default_rng(0).integers(0, n, size=(RESAMPLES, n))
        low, high = _percentiles([float(self.function(outputs[r], targets[r])) for r in rows])
        interval = (min(low, value), max(high, value))
        return (Measurement(self.metrics()[0], value, interval, n, {"split": examples.split}),)

    def preview(
        self, deployed: Deployed, reference: Deployed, examples: Examples, share: float
    ) -> Sequence[Measurement]:
        """The measurement on a part of the examples, whose band is as much wider."""
        return self.measure(deployed, reference, examples.part(share))

    def close(self) -> None:
        """Holds nothing."""


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    ends: NDArray[np.float64] = np.percentile(values, [2.5, 97.5])
    return float(ends[0]), float(ends[1])
