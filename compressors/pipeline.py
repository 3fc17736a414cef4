"""Turns a plan into an artifact by running its steps in stage order; knows no method by name and writes no file."""

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from compressors.plan import CompressionPlan, Scalar, Settings, Step, digest

Batch = tuple[tuple[Tensor, ...], Tensor | None]
"""Model inputs and, where there are labels, the target; the first axis of every tensor is the batch."""

Achieved = Mapping[str, Settings]
"""What one method really did, per layer; a method without layers reports under the empty name."""


class Stage(IntEnum):
    """The order in which methods run: change the graph, recover what was lost, then change the numbers."""

    STRUCTURE = 0
    RECOVER = 1
    NUMERIC = 2


@dataclass(frozen=True)
class Context:
    """What a compressor may look at besides the model: never the validation or test split.

    `loss` takes `(output, target)` and gives a scalar; it is None where the data has no labels. `train` yields freshly
    shuffled (and augmented) batches, one pass a call; `calibration` always yields the same batches.
    """

    teacher: nn.Module
    example: tuple[Tensor, ...]
    train: Callable[[], Iterable[Batch]]
    calibration: Callable[[], Iterable[Batch]]
    loss: Callable[[Tensor, Tensor], Tensor] | None
    progress: Callable[[str], None] = lambda _text: None


@dataclass(frozen=True)
class LayerNumbers:
    """What a numeric compressor decided for one layer, to be placed by each runtime in its own graph.

    With `values` (int8 tensor in the weight's shape) and `scales` (`(out, groups)`; weight = value * scale, where group
    g covers `group_size` consecutive inputs of a row) the weights are stored as given and computed in the rest
    precision. Without them weights and activations both go to `bits`, with the runtime's own calibrated quantizer.
    """

    bits: int
    values: Tensor | None = None
    scales: Tensor | None = None
    group_size: int | None = None


@dataclass(frozen=True)
class Applied:
    """What one step really did: per requested layer, and the numbers to place if the step was numeric."""

    achieved: Achieved
    numbers: Mapping[str, LayerNumbers] = field(default_factory=dict)


class Compressor(Protocol):
    """One method. It changes `model` in place, or attaches numbers, and says what it achieved."""

    method: ClassVar[str]
    stage: ClassVar[Stage]
    off: ClassVar[tuple[str, Scalar]]
    """The deciding key and the value with which the method does nothing; its other keys then do not apply."""

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers that must share its setting, itself first; empty for methods without per-layer keys."""

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """Carry out one step; raises `Infeasible` when a setting cannot be realised on this model."""


@dataclass(frozen=True)
class Artifact:
    """A compressed model that is not yet deployed.

    `model` holds the float weights after structure and recovery; `numbers` what each runtime must place in its graph.
    `prefix` is the digest of everything before the numeric stage: equal prefixes have equal float models.
    """

    model: nn.Module
    plan: CompressionPlan
    prefix: str
    achieved: Mapping[str, Achieved]
    numbers: Mapping[str, LayerNumbers]
    seconds: Mapping[str, float]


class PrefixStore(Protocol):
    """Keeps the float weights of a structural prefix, so that plans that differ only in numbers skip the training."""

    def load(self, prefix: str, model: nn.Module) -> Mapping[str, Achieved] | None:
        """Put the stored weights into `model` and return what each recovery method achieved, or None if not stored."""

    def save(self, prefix: str, model: nn.Module, achieved: Mapping[str, Achieved]) -> None:
        """Keep the weights of `model` and what each recovery method achieved."""


def compress(
    model: nn.Module,
    plan: CompressionPlan,
    compressors: Mapping[str, Compressor],
    context: Context,
    store: PrefixStore | None = None,
) -> Artifact:
    """Run the plan's steps on a copy of `model` in stage order; the given model is left untouched."""
    model = copy.deepcopy(model).eval()
    run = _Run(model, plan.seed, compressors, context)
    by_stage = {stage: [s for s in plan.steps if compressors[s.method].stage == stage] for stage in Stage}
    prefix = prefix_digest([*by_stage[Stage.STRUCTURE], *by_stage[Stage.RECOVER]], plan.seed)
    run.steps(by_stage[Stage.STRUCTURE])
    known = store.load(prefix, model) if store and by_stage[Stage.RECOVER] else None
    if known is not None:
        run.achieved.update(known)
    else:
        run.steps(by_stage[Stage.RECOVER])
        if store and by_stage[Stage.RECOVER]:
            store.save(prefix, model, {s.method: run.achieved[s.method] for s in by_stage[Stage.RECOVER]})
    model.eval().requires_grad_(False)
    run.steps(by_stage[Stage.NUMERIC])
    return Artifact(model, plan, prefix, run.achieved, run.numbers, run.seconds)


def prefix_digest(steps: Sequence[Step], seed: int) -> str:
    """The name of a float model: what was done to it before its numbers are touched; no steps means the original."""
    return digest([seed, *map(asdict, steps)]) if steps else ORIGINAL


ORIGINAL = "original"


class _Run:
    """The growing outcome of one `compress` call."""

    def __init__(self, model: nn.Module, seed: int, compressors: Mapping[str, Compressor], context: Context) -> None:
        self.model, self.seed, self.compressors, self.context = model, seed, compressors, context
        self.achieved: dict[str, Achieved] = {}
        self.numbers: dict[str, LayerNumbers] = {}
        self.seconds: dict[str, float] = {}

    def steps(self, steps: Sequence[Step]) -> None:
        for step in steps:
            began = time.perf_counter()
            # The global generator is what dropout and data shuffling draw from; a fork keeps the caller's state.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                applied = self.compressors[step.method].apply(self.model, step, self.context, self.seed)
            self.achieved[step.method] = applied.achieved
            self.numbers.update(applied.numbers)
            self.seconds[step.method] = time.perf_counter() - began
