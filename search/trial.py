"""One trial from plan to record; the only place where a failure of a candidate is caught."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressors.plan import CompressionPlan, Scalar, Settings
from evaluators.measurement import Measurement


@dataclass(frozen=True)
class TrialRecord:
    """What is known of one trial after it ended: measurements, or the reason why there are none.

    `achieved` is method -> layer -> what was really done. `artifact_uri` is where the deployed files lie, filled in by
    the tracker. Whether it is on the front is computed, never stored.
    """

    number: int
    plan: CompressionPlan
    measurements: tuple[Measurement, ...]
    infeasible: str | None
    seconds: Mapping[str, float]
    achieved: Mapping[str, Mapping[str, Settings]]
    environment: Mapping[str, Scalar]
    artifact_uri: str | None = None

    def value(self, metric: str) -> Measurement:
        """The measurement of that name; KeyError when it was not measured."""
        for measurement in self.measurements:
            if measurement.name == metric:
                return measurement
        raise KeyError(metric)

    def values(self, metrics: Sequence[str]) -> tuple[Measurement, ...]:
        """The measurements of these names, in this order."""
        return tuple(map(self.value, metrics))
