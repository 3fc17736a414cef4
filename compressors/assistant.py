"""Which plan makes a teacher that stands between the uncompressed model and a much smaller one; it trains nothing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

from compressors.errors import Infeasible
from compressors.plan import CompressionPlan, Step


@runtime_checkable
class Assisted(Protocol):
    """A method of the RECOVER stage that may learn from a model that lost less, instead of the uncompressed one."""

    def assistant(self, step: Step) -> Step | None:
        """How that model is trained before `step`, with the uncompressed one for a teacher; None: it is not wanted."""


@runtime_checkable
class Halving(Protocol):
    """A method of the STRUCTURE stage that can do about half as much."""

    def half(self, step: Step) -> Step | None:
        """The weaker step; None where it would do nothing."""


def assistant_plan(plan: CompressionPlan, step: Step, methods: Mapping[str, object]) -> CompressionPlan | None:
    """What the assistant of one of the plan's steps is the float model of; None where the step wants none.

    All that can be halved is, and the rest of the structure stays whole. Raises `Infeasible` where nothing can be.
    """
    method = methods[step.method]
    trained = method.assistant(step) if isinstance(method, Assisted) else None
    if trained is None:
        return None
    halves = [halving.half(s) for s in plan.steps if isinstance(halving := methods[s.method], Halving)]
    if not any(halves):
        raise Infeasible(f"{step.method}.assistant asks for a model that lost half, but here nothing can be halved")
    return replace(plan, steps=(*filter(None, halves), trained))
