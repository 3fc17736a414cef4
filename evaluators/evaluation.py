"""What an evaluator must offer and what it is given; every metric is one file that implements it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from evaluators.measurement import Measurement, Metric
from evaluators.runtime import CHUNK, Array, Deployed


@dataclass(frozen=True)
class Examples:
    """One split as arrays: inputs, the labels where there are any, and what the uncompressed torch model says.

    `whole` is the split that a part was taken from.
    """

    split: str
    inputs: tuple[Array, ...]
    targets: Array | None
    original: NDArray[np.float32]
    whole: "Examples | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.inputs[0])

    def part(self, share: float) -> "Examples":
        """The first `share` of the examples, at least one, in an order that is random but always the same.

        A larger part holds every smaller one. The order of the split itself would not do: it may go class by class.
        """
        rows = self._order[: max(1, math.ceil(share * len(self)))]
        targets = None if self.targets is None else self.targets[rows]
        return Examples(self.split, tuple(x[rows] for x in self.inputs), targets, self.original[rows], whole=self)

    def outputs(self, deployed: Deployed) -> NDArray[np.float32]:
        """What the file answers, one row per example; the last file's answers are kept, for its parts too."""
        if self.whole is not None:
            return self.whole._answers.first(len(self), deployed)
        answers = self._answers.first(len(self), deployed)
        outputs = np.empty_like(answers)
        outputs[self._order] = answers
        return outputs

    @cached_property
    def _order(self) -> NDArray[np.intp]:
        return np.random.default_rng(0).permutation(len(self))

    @cached_property
    def _answers(self) -> "_Answers":
        return _Answers(self.inputs, self._order)


class _Answers:
    """The outputs of the file that was asked last, for as many examples as anybody wanted so far.

    Examples are run in whole chunks: what an example's output is to the last bit must not depend on who asked first.
    """

    def __init__(self, inputs: tuple[Array, ...], order: NDArray[np.intp]) -> None:
        self._inputs, self._order = inputs, order
        self._deployed: Deployed | None = None
        self._outputs: list[NDArray[np.float32]] = []

    def first(self, count: int, deployed: Deployed) -> NDArray[np.float32]:
        """Of the first `count` examples in the fixed order."""
        if deployed is not self._deployed:
            self._deployed, self._outputs = deployed, []
        for start in range(CHUNK * len(self._outputs), count, CHUNK):
            rows = self._order[start : start + CHUNK]
            self._outputs.append(deployed.run(*(x[rows] for x in self._inputs)))
        return np.concatenate(self._outputs)[:count]


class Evaluator(Protocol):
    """Measures a deployed file; it never sees a torch model."""

    def metrics(self) -> tuple[Metric, ...]:
        """What `measure` will return, known before anything has run."""

    def measure(self, deployed: Deployed, reference: Deployed, examples: Examples) -> Sequence[Measurement]:
        """One measurement per promised metric; `reference` is the uncompressed model in the study's first runtime."""

    def close(self) -> None:
        """Give back what it holds, such as a process of its own; it may be used again afterwards."""


@runtime_checkable
class OfMachine(Protocol):
    """An evaluator whose readings hold for the machine that they were taken on; being one is optional."""

    of_machine: ClassVar[bool]


@runtime_checkable
class Feeding(Protocol):
    """An evaluator that calls a file with inputs of its own making; being one is optional."""

    def fed(self, deployed: Deployed, examples: Examples) -> Sequence[Array]:
        """What a call is given, an array per input; raises `Infeasible` for a file that takes no such inputs."""


@runtime_checkable
class Gradual(Protocol):
    """An evaluator that can say something before it has done all of its work; being one is optional."""

    def preview(
        self, deployed: Deployed, reference: Deployed, examples: Examples, share: float
    ) -> Sequence[Measurement]:
        """What `measure` promises, from `share` (more than 0, less than 1) of the work, with bands as much wider.

        The 95 % band must be one for what `measure` will say of the same file; what was done is not done again by it.
        """
