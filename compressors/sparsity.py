"""The share that a plan asks a method to take away from an owner; which parts those are, the method says."""

from dataclasses import replace

from compressors.errors import Infeasible
from compressors.plan import Settings, Step


def asked_sparsity(method: str, owner: str, settings: Settings) -> float:
    """From 0 up to but not including 1; `Infeasible` for anything else."""
    share = settings["sparsity"]
    if not isinstance(share, int | float) or not 0 <= share < 1:
        raise Infeasible(f"{method}.sparsity of {owner} is {share}: expected a share from 0 up to but not including 1")
    return float(share)


def halved(step: Step) -> Step | None:
    """The same step with half the sparsity of every owner; None where nothing is taken away."""
    halves = {o: {**s, "sparsity": asked_sparsity(step.method, o, s) / 2} for o, s in step.per_layer.items()}
    return replace(step, per_layer=halves) if any(s["sparsity"] for s in halves.values()) else None
