"""Trains the baseline when there is no checkpoint, and keeps it; takes any model, any splits and any loss."""

import fnmatch
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from compressors.errors import ConfigError
from compressors.pipeline import Batch
from compressors.plan import digest
from compressors.precision import check_precision, in_bf16
from search.liveness import this_process
from search.models import load_checkpoint
from search.workload import Split, Splits, Task, split_digest, tensors_digest

Loss = Callable[[Tensor, Tensor], Tensor]
Varied = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum on a one-cycle schedule (Smith 2017, arXiv 1708.07120).

    `precision` is that of the arithmetic: fp32, bf16, or auto for the faster one (compressors/precision.py).
    """

    epochs: int = 10
    learning_rate: float = 0.1
    batch: int = 32
    weight_decay: float = 5e-4
    seed: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.training.{name}", f"is {getattr(self, name)}", "must be above zero")
        check_precision("model.training.precision", self.precision)

    def learning(self, model: nn.Module) -> list[nn.Parameter]:
        """What is trained: everything."""
        return list(model.parameters())

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """At the peak of the schedule."""
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=0.9, nesterov=True, weight_decay=self.weight_decay
        )


@dataclass(frozen=True)
class FineTuning(Recipe):
    """AdamW (Loshchilov 2019, arXiv 1711.05101) on the same schedule: for transformers, which SGD hardly moves."""

    epochs: int = 3
    learning_rate: float = 1e-4
    weight_decay: float = 0.01

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """At the peak of the schedule."""
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Probing(FineTuning):
    """Only the parameters whose names match `learn` are trained; all else stays as it came, norms' statistics too."""

    epochs: int = 20
    learning_rate: float = 3e-3
    learn: Sequence[str] = ("head.*",)

    def learning(self, model: nn.Module) -> list[nn.Parameter]:
        """Raises `ConfigError` for a pattern that matches nothing."""
        named = dict(model.named_parameters())
        for pattern in self.learn:
            if not fnmatch.filter(named, pattern):
                problem, near = f"{pattern!r} matches no parameter", ", ".join(list(named)[-2:])
                raise ConfigError("model.training.learn", problem, f"the last ones are {near}")
        return [p for name, p in named.items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.learn)]


@dataclass(frozen=True)
class TrainingProgress:
    """Where a training is: steps made and whole epochs done, with the calibration split's accuracy after the last."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float | None


Watch = Callable[[TrainingProgress], None]


def trained(
    model: nn.Module,
    splits: Splits,
    task: Task,
    recipe: Recipe,
    folder: Path,
    watch: Watch = lambda _: None,
) -> nn.Module:
    """The given model, trained in place, in eval mode; or its weights from `folder`, if the same was trained before.

    The same are: initial weights, network, recipe, loss, train split and torch version. Splits other than train and
    calibration are not touched.
    """
    if task.loss is None or splits.train.targets is None:
        raise ConfigError("model.training", f"task {task.name!r} has no labels to train on", "give model.checkpoint")
    path = folder / f"{_key(model, splits, task.loss, recipe)}.safetensors"
    if not _loaded(model, path):
        _check_writable(folder)
        _train(model, splits, task.loss, recipe, watch)
        _save(model, path)
    return model.eval()


def _key(model: nn.Module, splits: Splits, loss: Loss, recipe: Recipe) -> str:
    return digest(
        {
            "network": repr(model),
            "start": tensors_digest(model.state_dict().values()),
            "recipe": {
                "kind": type(recipe).__name__,
                **asdict(replace(recipe, precision="bf16" if in_bf16(recipe.precision, model) else "fp32")),
            },
            "loss": getattr(loss, "__qualname__", repr(loss)),
            "augment": repr(getattr(splits.augment, "keywords", splits.augment is not None)),
            "data": split_digest(splits.train),
            "torch": torch.__version__,
        }
    )


def _loaded(model: nn.Module, path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        load_checkpoint(model, path)
    except ConfigError as error:
        warnings.warn(f"{error.problem}; training again", stacklevel=2)
        return False
    return True


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = f"{folder} cannot be written ({error.strerror})"
        raise ConfigError("cache folder", problem, "choose a folder that you may write to") from error


def _save(model: nn.Module, path: Path) -> None:
    part = path.with_suffix(f".{this_process()}.part")
    # Copies, because tied weights share memory, which safetensors refuses.
    safetensors.torch.save_file({name: x.clone().contiguous() for name, x in model.state_dict().items()}, part)
    part.replace(path)  # another worker sees all of it or nothing


def _train(model: nn.Module, splits: Splits, loss: Loss, recipe: Recipe, watch: Watch) -> None:
    batch = min(recipe.batch, len(splits.train))
    per_epoch = len(splits.train) // batch
    at = TrainingProgress(0, recipe.epochs * per_epoch, 0, recipe.epochs, math.nan, None)
    learning = recipe.learning(model)
    whole = len(learning) == len(list(model.parameters()))
    model.requires_grad_(whole)
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer, schedule = _scheduled(learning, recipe, at.steps)
    half = in_bf16(recipe.precision, model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a tenth faster on a CPU
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for epoch in range(1, recipe.epochs + 1):
            model.train(whole)
            for data in splits.train.batches(batch, shuffle=True):
                value = _step(model, data, loss, optimizer, splits.varied, half)
                schedule.step()
                at = replace(at, step=at.step + 1, loss=value)
                watch(at)
            at = replace(at, epoch=epoch, accuracy=_accuracy(model.eval(), splits.calibration))
            watch(at)
    model.requires_grad_(True).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _scheduled(
    learning: Sequence[nn.Parameter], recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, OneCycleLR]:
    optimizer = recipe.optimizer(learning)
    # One step more than is made: with a single one the schedule would divide by zero.
    return optimizer, OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=0.25)


def _step(
    model: nn.Module, data: Batch, loss: Loss, optimizer: torch.optim.Optimizer, varied: Varied, half: bool
) -> float:
    inputs, targets = data
    assert targets is not None  # noqa: S101  `trained` refuses data without labels
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=half):
        outputs = model(*varied(inputs)).float()
    value = loss(outputs, targets)
    if not torch.isfinite(value):
        raise ConfigError("model.training", f"the loss became {value.item()}", "lower model.training.learning_rate")
    optimizer.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return value.item()


def _accuracy(model: nn.Module, split: Split) -> float | None:
    if split.targets is None or split.targets.is_floating_point():
        return None
    with torch.no_grad():
        outputs = torch.cat([model(*inputs) for inputs, _ in split.batches(256)])
    if outputs.dim() != 2:
        return None  # no logits, one for each class
    return float((outputs.argmax(-1) == split.targets).float().mean())
