"""Top-1 accuracy of the deployed file on labelled examples, with Wilson's interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compressors.errors import Infeasible
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric
from evaluators.runtime import Deployed

Z95 = 1.959964


@dataclass(frozen=True)
class Accuracy:
    """Share of examples whose largest output is the label."""

    def metrics(self) -> tuple[Metric, ...]:
        """One: `accuracy`, a share in 0..1."""
        return (Metric("accuracy", "share", "maximize"),)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """Needs labels; outputs are `(n, classes)`. Raises `Infeasible` when an output is not finite."""
        if examples.targets is None:
            raise Infeasible(f"accuracy needs labels and the {examples.split} split has none")
        outputs = finite(examples.outputs(deployed))
        hits = int((outputs.argmax(axis=1) == examples.targets).sum())
        return (proportion(self.metrics()[0], hits, len(examples), examples.split),)

    def preview(
        self, deployed: Deployed, reference: Deployed, examples: Examples, share: float
    ) -> Sequence[Measurement]:
        """The measurement on a part of the examples, whose band is as much wider."""
        return self.measure(deployed, reference, examples.part(share))

    def close(self) -> None:
        """Holds nothing."""


def proportion(metric: Metric, hits: float, n: int, split: str) -> Measurement:
    """A share of `n` examples with Wilson's 95 % interval (Wilson 1927); too wide where examples can be half right."""
    share = hits / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n * n)) / (1 + Z95**2 / n)
    # At 0 and n hits the interval ends on the share itself, but for rounding.
    low, high = min(centre - half, share), max(centre + half, share)
    return Measurement(metric, share, (low, high), n, {"split": split})


def finite(outputs: np.ndarray) -> np.ndarray:
    """The outputs themselves; a deployed file that answers NaN or infinity is not a candidate."""
    if not np.isfinite(outputs).all():
        bad = int((~np.isfinite(outputs)).reshape(len(outputs), -1).any(axis=1).sum())
        raise Infeasible(f"the deployed file gives NaN or infinity for {bad} of {len(outputs)} examples")
    return outputs
