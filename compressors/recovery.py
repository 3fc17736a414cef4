"""How a changed model is trained: its epochs, the rate and arithmetic of its steps, and a teacher to answer alike."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import Infeasible, at_least
from compressors.pipeline import Batch, Context, Stage
from compressors.plan import Scalar, Settings

PASSES = 4
LEAST_MOMENTUM = 0.1
"""Of batch norms that learn: at MobileNetV3's 0.01, 60 % of a statistic is still the old one after 50 steps."""
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


def embedding_loss(student: Tensor, teacher: Tensor, _temperature: float) -> Tensor:
    """Mean over examples of one minus the cosine of embeddings `(..., width)`, which have no doubts to be heated up."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def schedule(done: float, warmup: float) -> float:
    """The learning rate as a share of its peak, `done` of a round being through: up along a line, down a cosine."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def checked(method: str, settings: Settings) -> tuple[float, float, float]:
    """Temperature, weight and learning rate; `Infeasible` where one of these, or `epochs`, is missing or wrong."""
    whole_epochs(method, settings)
    return (
        number(method, settings, "temperature", "more than 0", lambda value: value > 0),
        number(method, settings, "weight", "a share from 0 to 1", lambda value: 0 <= value <= 1),
        number(method, settings, "learning_rate", "more than 0", lambda value: value > 0),
    )


def whole_epochs(method: str, settings: Settings) -> int:
    """How many are asked for; `Infeasible` where that is no whole number, 0 or more."""
    expected = "a whole number, 0 or more"
    return int(number(method, settings, "epochs", expected, lambda value: value >= 0 and value == int(value)))


def number(method: str, settings: Settings, key: str, expected: str, fits: Callable[[float], bool]) -> float:
    """A setting of a method; `Infeasible` where it is missing, no finite number, or does not fit."""
    value = settings.get(key)
    if not isinstance(value, int | float) or not math.isfinite(value) or not fits(value):
        raise Infeasible(f"{method}.{key} is {value}: expected {expected}")
    return float(value)


@dataclass(frozen=True)
class Goal:
    """What the student is pulled towards, and how hard."""

    method: str
    teacher: Callable[..., Tensor]
    label_loss: Callable[[Tensor, Tensor], Tensor] | None
    imitation: Callable[[Tensor, Tensor, float], Tensor]
    temperature: float
    weight: float
    learning_rate: float
    half: bool

    @classmethod
    def read(cls, method: str, settings: Settings, context: Context, half: bool) -> "Goal":
        """From `temperature`, `weight` of the teacher's term (the labels get the rest) and `learning_rate`."""
        temperature, weight, rate = checked(method, settings)
        teacher, imitation = context.answers or context.teacher, context.imitation or distillation_loss
        return cls(method, teacher, context.loss, imitation, temperature, weight, rate, half)

    def loss(self, student: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Without labels only the teacher counts, who is not asked where only labels do; `Infeasible` without both."""
        inputs, target = batch
        with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.half):
            output = student(*inputs).float()
        if target is None or self.label_loss is None:
            if self.weight == 0:
                problem = "weight is 0, so that only labels count, and there are none"
                raise Infeasible(f"{self.method}.{problem}: expected more than 0")
            return self._imitation(inputs, output)
        labelled = self.label_loss(output, target)
        if self.weight == 0:
            return labelled
        return self.weight * self._imitation(inputs, output) + (1 - self.weight) * labelled

    def _imitation(self, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=self.half):
            wanted = self.teacher(*inputs).float()
        return self.imitation(output, wanted, self.temperature)


@dataclass(frozen=True)
class Recovery:
    """A method that trains the whole model with AdamW; its fields are what a plan does not hold.

    An epoch is `epoch_examples` examples, or `PASSES` passes over a small training split. The learning rate rises
    over the first `warmup` share of the steps and falls over the rest.
    """

    weight_decay: float
    warmup: float
    clip_norm: float
    epoch_examples: int

    method: ClassVar[str]
    stage: ClassVar[Stage] = Stage.RECOVER
    off: ClassVar[tuple[str, Scalar]] = ("epochs", 0)

    def __post_init__(self) -> None:
        """Refuses epochs without an example."""
        at_least(1, **{f"compressor.{self.method}.epoch_examples": self.epoch_examples})

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """None: the whole model is trained."""
        return {}

    def train(
        self,
        parameters: Sequence[nn.Parameter],
        loss: Callable[[Batch], Tensor],
        peak: float,
        epochs: range,
        context: Context,
        pulls: Sequence[Callable[[Batch], Tensor]] = (),
        others: Sequence[nn.Parameter] = (),
    ) -> float:
        """The mean `loss` of the last of `epochs`; `pulls` are minimised with it, computed after it, and not told.

        The parameters of `others` learn too; their gradient is clipped apart, so that it does not shorten the model's.
        Raises `Infeasible` as soon as the loss is not finite.
        """
        optimizer = torch.optim.AdamW(_groups([*parameters, *others]), weight_decay=self.weight_decay)
        steps = self._steps(context)
        losses: list[float] = []
        for passed, epoch in enumerate(epochs):
            losses.clear()
            for index, batch in enumerate(self._epoch(context)):
                rate = peak * schedule((passed + (index + 1) / steps) / len(epochs), self.warmup)
                losses.append(self._step(optimizer, (parameters, others), batch, loss, pulls, rate))
                if not math.isfinite(losses[-1]):
                    raise Infeasible(f"{self.method} diverged: the loss is {losses[-1]} in epoch {epoch + 1}")
            context.progress(f"{self.method} epoch {epoch + 1} of {epochs.stop}, loss {mean(losses):.3f}")
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
            raise Infeasible(f"{self.method} has no training batches: expected at least one")
        return steps

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        clipped: Sequence[Sequence[nn.Parameter]],
        batch: Batch,
        loss: Callable[[Batch], Tensor],
        pulls: Sequence[Callable[[Batch], Tensor]],
        rate: float,
    ) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        told = loss(batch)
        optimizer.zero_grad()
        sum((pull(batch) for pull in pulls), start=told).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for together in clipped:
            nn.utils.clip_grad_norm_(together, self.clip_norm)
        optimizer.step()
        return told.item()


def _groups(parameters: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """By their share of the learning rate.

    Adam moves every weight equally far, so an output of many inputs moves further than one of few: above `FULL_RATE`
    inputs the rate falls with their number (Yang 2022, arXiv 2203.03466), and one choice of it suits narrow and wide.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        inputs = parameter[0].numel() if parameter.dim() > 1 else 1
        groups.setdefault(min(1.0, FULL_RATE / inputs), []).append(parameter)
    return [{"params": together, "share": share} for share, together in groups.items()]


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Every parameter learns inside; outside they are as they were, and the model is in eval mode.

    Inside, channels come last in memory: convolutions and their gradients are faster so. Batch norms that follow their
    inputs more slowly than `LEAST_MOMENTUM` are as fast as that, because few steps must do.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    images = [p for p in model.parameters() if p.dim() == 4]
    slow = [(m, m.momentum) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and _is_slow(m)]
    try:
        model.train().requires_grad_(True)
        for norm, _ in slow:
            norm.momentum = LEAST_MOMENTUM
        for parameter in images:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        model.eval()
        for norm, momentum in slow:
            norm.momentum = momentum
        for parameter in images:
            parameter.data = parameter.data.contiguous()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _is_slow(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Without a momentum it averages over all batches; with 0 it was told to keep its statistics."""
    return norm.momentum is not None and 0 < norm.momentum < LEAST_MOMENTUM
