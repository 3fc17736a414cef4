"""Trains a changed model to answer as the uncompressed one does; it never touches the shape of anything."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, takewhile
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import ConfigError, Infeasible, at_least
from compressors.pipeline import Applied, Batch, Context, Stage, loss_after
from compressors.plan import Scalar, Settings, Step, digest

PRECISIONS = ("auto", "fp32", "bf16")
PASSES = 4
FULL_RATE = 144


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over examples of KL(teacher / T || student / T) times T squared (Hinton 2015, arXiv 1503.02531).

    Logits are `(..., classes)`. The factor keeps the gradient's size the same at every temperature.
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        log_target=True,
        reduction="none",
    )
    return temperature**2 * divergence.sum(-1).mean()


@dataclass(frozen=True)
class Distill:
    """Knowledge distillation from the uncompressed model's logits; no help to a model that has lost nothing.

    It trains in rounds that end after `first_round` epochs, twice as many, four times as many and so on; the last one
    is cut short. Each begins with a fresh optimizer (SGDR with doubling periods, Loshchilov 2017, arXiv 1608.03983), so
    that more epochs of one plan go on where fewer ended. Unlike in SGDR, the learning rate of a round rises linearly
    over its first `warmup` share of steps before it falls along half a cosine. With `precision` bf16, convolutions and
    matrix products are computed in bfloat16, which `auto` takes where the processor does so natively.

    `parent` has the settings with which a model is trained whose blocks were left out, before its channels go as well:
    cut in two steps it recovers in fewer epochs than cut at once, and all children of one parent share the first ones.
    """

    weight_decay: float
    warmup: float
    clip_norm: float
    epoch_examples: int
    first_round: int
    precision: str = "auto"
    parent: Settings | None = None

    method: ClassVar[str] = "distill"
    stage: ClassVar[Stage] = Stage.RECOVER
    off: ClassVar[tuple[str, Scalar]] = ("epochs", 0)

    def __post_init__(self) -> None:
        """Refuses rounds without an epoch, epochs without an example, and unknown precisions."""
        least = {name: getattr(self, name) for name in ("first_round", "epoch_examples")}
        at_least(1, **{f"compressor.distill.{name}": value for name, value in least.items()})
        if self.precision not in PRECISIONS:
            problem = f"is {self.precision!r}"
            raise ConfigError("compressor.distill.precision", problem, f"use one of {', '.join(PRECISIONS)}")
        if self.parent is not None:
            try:
                _checked(self.parent)
            except Infeasible as infeasible:
                raise ConfigError("compressor.distill.parent", infeasible.reason, "correct it, or null") from None

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """None: the whole model is trained."""
        return {}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`epochs`, `temperature`, `weight` of the teacher's term (the labels get the rest) and `learning_rate`.

        Raises `Infeasible` as soon as the loss is not finite. The model is in eval mode afterwards.
        """
        since: Step | None = None
        for end in self.rounds(step):
            applied = self.advance(model, end, since, context, seed)
            since = end
        return applied

    def rounds(self, step: Step) -> tuple[Step, ...]:
        """The same step with fewer `epochs`, as each round ends, and itself."""
        epochs = _epochs(step.shared)
        ends = takewhile(lambda end: end < epochs, (self.first_round << doublings for doublings in count()))
        return (*(replace(step, shared={**step.shared, "epochs": end}) for end in ends), step)

    def between(self) -> Step | None:
        """The parent's training."""
        return None if self.parent is None else Step(self.method, {}, dict(self.parent))

    def advance(self, model: nn.Module, step: Step, since: Step | None, context: Context, seed: int) -> Applied:
        """One round; its order of the data comes from `seed` and from the epoch in which it begins."""
        done, epochs = 0 if since is None else _epochs(since.shared), _epochs(step.shared)
        if epochs == 0:
            return Applied({"": {"epochs": 0}})
        goal = _Goal.read(step.shared, context, self._half)
        with _training(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(int(digest([seed, done]), 16))
            loss = self._train(model, goal, range(done, epochs), context)
        return Applied({"": {"epochs": epochs, "loss": loss, loss_after(epochs): loss}})

    @property
    def _half(self) -> bool:
        """Without the tile registers bfloat16 is emulated, and slower than float."""
        return self.precision == "bf16" or (self.precision == "auto" and torch.cpu._is_amx_tile_supported())

    def _train(self, model: nn.Module, goal: "_Goal", epochs: range, context: Context) -> float:
        """The mean loss of the last epoch."""
        optimizer = torch.optim.AdamW(_groups(model), weight_decay=self.weight_decay)
        steps = self._steps(context)
        losses: list[float] = []
        for passed, epoch in enumerate(epochs):
            losses.clear()
            for index, batch in enumerate(self._epoch(context)):
                rate = goal.learning_rate * schedule((passed + (index + 1) / steps) / len(epochs), self.warmup)
                losses.append(self._step(model, batch, goal, optimizer, rate))
                if not math.isfinite(losses[-1]):
                    raise Infeasible(f"distill diverged: the loss is {losses[-1]} in epoch {epoch + 1}")
            context.progress(f"distill epoch {epoch + 1} of {epochs.stop}, loss {mean(losses):.3f}")
        return mean(losses)

    def _epoch(self, context: Context) -> Iterator[Batch]:
        """`epoch_examples` examples, or `PASSES` passes over a small training split; each pass is shuffled anew."""
        seen = 0
        for _ in range(PASSES):
            for batch in context.train():
                yield batch
                seen += len(batch[0][0])
                if seen >= self.epoch_examples:
                    return

    def _steps(self, context: Context) -> int:
        """Batches in one epoch; only a pass tells, and without the model it costs next to nothing."""
        steps = sum(1 for _ in self._epoch(context))
        if steps == 0:
            raise Infeasible("distill has no training batches: expected at least one")
        return steps

    def _step(
        self, model: nn.Module, batch: Batch, goal: "_Goal", optimizer: torch.optim.Optimizer, rate: float
    ) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        loss = goal.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves this one untyped
        nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
        optimizer.step()
        return loss.item()


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by their share of the learning rate.

    Adam moves every weight equally far, so an output of many inputs moves further than one of few: above `FULL_RATE`
    inputs the rate falls with their number (Yang 2022, arXiv 2203.03466), and one choice of it suits narrow and wide.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        inputs = parameter[0].numel() if parameter.dim() > 1 else 1
        groups.setdefault(min(1.0, FULL_RATE / inputs), []).append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]


def schedule(done: float, warmup: float) -> float:
    """The learning rate as a share of its peak, `done` of a round being through: up along a line, down a cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@dataclass(frozen=True)
class _Goal:
    """What the student is pulled towards, and how hard."""

    teacher: Callable[..., Tensor]
    label_loss: Callable[[Tensor, Tensor], Tensor] | None
    temperature: float
    weight: float
    learning_rate: float
    half: bool

    @classmethod
    def read(cls, shared: Settings, context: Context, half: bool) -> "_Goal":
        temperature, weight, rate = _checked(shared)
        return cls(context.answers or context.teacher, context.loss, temperature, weight, rate, half)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, target = batch
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.half):
            with torch.no_grad():
                wanted = self.teacher(*inputs).float()
            output = model(*inputs).float()
        imitation = distillation_loss(output, wanted, self.temperature)
        if target is None or self.label_loss is None:
            return imitation
        return self.weight * imitation + (1 - self.weight) * self.label_loss(output, target)


def _checked(shared: Settings) -> tuple[float, float, float]:
    """Temperature, weight and learning rate; `Infeasible` where one of these, or `epochs`, is missing or wrong."""
    _epochs(shared)
    return (
        _number(shared, "temperature", "more than 0", lambda value: value > 0),
        _number(shared, "weight", "a share from 0 to 1", lambda value: 0 <= value <= 1),
        _number(shared, "learning_rate", "more than 0", lambda value: value > 0),
    )


def _epochs(shared: Settings) -> int:
    return int(_number(shared, "epochs", "a whole number, 0 or more", lambda value: value >= 0 and value == int(value)))


def _number(shared: Settings, key: str, expected: str, fits: Callable[[float], bool]) -> float:
    value = shared.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise Infeasible(f"distill.{key} is {value}: expected {expected}")
    return float(value)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Every parameter learns inside; outside they are as they were, and the model is in eval mode.

    Inside, channels come last in memory: convolutions and their gradients are faster so.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    images = [p for p in model.parameters() if p.dim() == 4]
    try:
        model.train().requires_grad_(True)
        for parameter in images:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        model.eval()
        for parameter in images:
            parameter.data = parameter.data.contiguous()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
