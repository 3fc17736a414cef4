"""What is being compressed: the trained model, its four splits and its task."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressors.pipeline import Batch


@dataclass(frozen=True)
class Split:
    """Examples in memory: inputs `(n, ...)`, and targets `(n,)` or None where nothing is labelled."""

    inputs: tuple[Tensor, ...]
    targets: Tensor | None

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.inputs[0])

    def batches(self, size: int, shuffle: bool = False) -> Iterator[Batch]:
        """One pass; shuffling draws from torch's global generator, and then a last incomplete batch is left out."""
        order = torch.randperm(len(self)) if shuffle else torch.arange(len(self))
        stop = len(self) - size + 1 if shuffle and len(self) >= size else len(self)
        for start in range(0, stop, size):
            rows = order[start : start + size]
            yield tuple(x[rows] for x in self.inputs), None if self.targets is None else self.targets[rows]


@dataclass(frozen=True)
class Splits:
    """Train teaches, calibration sets ranges, validation steers the search, test is opened once, for the champion.

    `augment` varies a batch of training inputs `(n, ...)` without changing what they show.
    """

    train: Split
    calibration: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] = ()
    augment: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Task:
    """How good an output is: a loss `(output, target) -> scalar` for recovery, or None where there are no labels."""

    name: str
    loss: Callable[[Tensor, Tensor], Tensor] | None


@dataclass(frozen=True)
class Workload:
    """A trained model with its data and task; `model` is in eval mode and never changed."""

    name: str
    model: nn.Module
    splits: Splits
    task: Task

    @property
    def example(self) -> tuple[Tensor, ...]:
        """Two calibration inputs, to trace the model with."""
        return tuple(x[:2] for x in self.splits.calibration.inputs)

    def fingerprint(self) -> dict[str, str]:
        """Digests of the weights and of each split: two workloads with equal ones are the same."""
        prints = {"model": _sha256(self.model.state_dict().values())}
        for name in ("train", "calibration", "validation", "test"):
            split: Split = getattr(self.splits, name)
            prints[f"data.{name}"] = _sha256((*split.inputs, *([] if split.targets is None else [split.targets])))
        return prints


def _sha256(tensors: Iterable[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
