"""What is being compressed: the trained model, its four splits and its task."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import ConfigError
from compressors.pipeline import Batch
from compressors.plan import digest
from compressors.recovery import embedding_loss

SPLITS = ("train", "calibration", "validation", "test")


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

    `augment` varies a batch of the first of the inputs, `(n, ...)`, without changing what it shows.
    """

    train: Split
    calibration: Split
    validation: Split
    test: Split
    classes: tuple[str, ...] = ()
    augment: Callable[[Tensor], Tensor] | None = None

    def varied(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A batch of training inputs as it is to be learned from: words beside a picture stay."""
        return inputs if self.augment is None else (self.augment(inputs[0]), *inputs[1:])

    def named(self) -> dict[str, Split]:
        """The four splits under the names that people use for them."""
        return {name: getattr(self, name) for name in SPLITS}


def checked(splits: Splits, path: str) -> Splits:
    """The same splits, if every one can be used; `path` is the option they come from, for the message."""
    for name, split in splits.named().items():
        _check(split, len(splits.classes), f"{path}.{name}")
    return splits


def _check(split: Split, classes: int, path: str) -> None:
    lengths = [len(x) for x in (*split.inputs, *([] if split.targets is None else [split.targets]))]
    if not lengths or lengths[0] == 0:
        raise ConfigError(path, "holds no example", "give every split at least one example")
    if len(set(lengths)) > 1:
        raise ConfigError(path, f"inputs and targets have {lengths} rows", "give each example one row in all of them")
    for x in split.inputs:
        if x.is_floating_point() and not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
            raise ConfigError(path, f"example {bad} holds NaN or infinity", "clean the data before the search")
    if classes and split.targets is not None:
        low, high = int(split.targets.min()), int(split.targets.max())
        if low < 0 or high >= classes:
            raise ConfigError(path, f"targets reach from {low} to {high}", f"{classes} classes are 0 to {classes - 1}")


@dataclass(frozen=True)
class Task:
    """How good an output is: a loss `(output, target) -> scalar` for recovery, or None where there are no labels.

    `imitation` is how far a student's output is from its teacher's, at a temperature; None where outputs are logits.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor] | None
    imitation: Callable[[Tensor, Tensor, float], Tensor] | None = None


def classification() -> Task:
    """One right class per example; outputs are logits `(n, classes)`."""
    return Task("classification", F.cross_entropy)


def fidelity() -> Task:
    """No labels: a candidate is good when it says what the uncompressed model says."""
    return Task("fidelity", None)


def embedding() -> Task:
    """No labels, and outputs `(n, width)` whose direction alone counts.

    Where losses are predicted they pass for logits: of entries so small, the divergence is their squared distance.
    """
    return Task("embedding", None, embedding_loss)


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
        """Digests of the network, of what it answers, of the loss and of each split: equal ones, equal workloads.

        Equal weights alone do not make equal networks: a `forward` can use them in another way.
        """
        state = self.model.state_dict()
        prints = {
            "model": tensors_digest(state.values()),
            "network": digest([repr(self.model), *state]),
            "answers": tensors_digest([self._answers()]),
            "loss": "none" if self.task.loss is None else code_digest(self.task.loss),
        }
        return prints | {f"data.{name}": split_digest(split) for name, split in self.splits.named().items()}

    def _answers(self) -> Tensor:
        """On one thread: the last bits depend on the number of threads."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                return cast(Tensor, self.model(*self.example))
        finally:
            torch.set_num_threads(threads)


def code_digest(function: Callable[..., object]) -> str:
    """Sixteen hex digits of a function's source, or of its name where there is no source to read."""
    try:
        return digest(inspect.getsource(function))
    except (OSError, TypeError):
        return digest(
            f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(type(function)))}"
        )


def split_digest(split: Split) -> str:
    """Sixteen hex digits of a split's inputs and targets."""
    return tensors_digest((*split.inputs, *([] if split.targets is None else [split.targets])))


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Sixteen hex digits of the tensors' shapes, types and values, in this order."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
