"""What a number must be before it counts: value, unit, direction, sample size, band; standard library only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from compressors.plan import Scalar


@dataclass(frozen=True, slots=True)
class Metric:
    """What an evaluator promises to measure: the name carries the unit; `direction` says what is better."""

    name: str
    unit: str
    direction: Literal["minimize", "maximize"]

    def __post_init__(self) -> None:
        """Refuses a direction that no study understands."""
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"{self.name} has direction {self.direction!r}: expected 'minimize' or 'maximize'")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured value with its 95 % band `(low, high)`; an exact count has a band of no width.

    `n` is how many independent readings or examples stand behind it; `conditions` is what else must be equal for two
    values to be comparable (batch size, threads, split, reference).
    """

    metric: Metric
    value: float
    interval: tuple[float, float]
    n: int
    conditions: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses values that would poison a front: not finite, or outside their own band."""
        low, high = self.interval
        if not all(map(math.isfinite, (self.value, low, high))):
            raise ValueError(
                f"{self.name} is {self.value} [{low}, {high}]: a failure is recorded with its reason, not as a number"
            )
        if not low <= self.value <= high:
            raise ValueError(f"{self.metric.name} is {self.value}, outside its band [{low}, {high}]")

    @property
    def name(self) -> str:
        """The metric's name, by which objectives and bounds refer to it."""
        return self.metric.name

    def clearly_better(self, other: "Measurement") -> bool:
        """True when the two bands do not even touch; anything closer is a tie."""
        if self.metric.direction == "minimize":
            return self.interval[1] < other.interval[0]
        return self.interval[0] > other.interval[1]

    def no_worse(self, other: "Measurement") -> bool:
        """True when the value itself is as good or better, whatever the bands."""
        if self.metric.direction == "minimize":
            return self.value <= other.value
        return self.value >= other.value


def exact(metric: Metric, value: float, conditions: Mapping[str, Scalar] | None = None) -> Measurement:
    """A count that cannot vary, such as the bytes of a file."""
    return Measurement(metric, value, (value, value), 1, conditions or {})
