"""How many parameters the deployed model was made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from compressors.errors import Infeasible
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement, Metric, exact
from evaluators.runtime import Deployed


@dataclass(frozen=True)
class Parameters:
    """All that training could change and that pruning, factors and left-out blocks leave; a shared one counts once.

    Zeros count as any other value, and so do weights of few bits or clusters: what these save, the size says.
    """

    def metrics(self) -> tuple[Metric, ...]:
        """One: `parameters`."""
        return (Metric("parameters", "count", "minimize"),)

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """An exact count; it is known where the files were made, and cannot be read from them."""
        if deployed.parameters is None:
            raise Infeasible("parameters: the deployed files alone do not tell how many the torch model had")
        return (exact(self.metrics()[0], deployed.parameters),)

    def close(self) -> None:
        """Holds nothing."""
