"""The diagonal Fisher information of a model: how much its loss would mind a change of its weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compressors.pipeline import Batch
from compressors.plan import Settings


@dataclass(frozen=True)
class Fisher:
    """What single-example gradients of the log likelihood said.

    `squares` has the mean squared gradient of every weight; `gates` has, per parameter, `(examples, out)`: the gradient
    with respect to a factor on each of its output channels.
    """

    squares: Mapping[str, Tensor]
    gates: Mapping[str, Tensor]
    find_slopes: Callable[[], Mapping[str, Tensor]] = dict
    """Called when slopes are first asked for; until then the model must stay as it is."""

    @cached_property
    def slopes(self) -> Mapping[str, Tensor]:
        """Mean gradient of the task's own loss; empty without labels: over drawn targets it is noise around zero."""
        return self.find_slopes()

    def rounding(self, name: str, change: Tensor) -> float:
        """Predicted rise of the loss when independent errors `change` are added to a parameter."""
        return 0.5 * float((self.squares[name] * change.square()).sum())

    def shift(self, name: str, change: Tensor, moment: Tensor) -> float:
        """Predicted rise of the loss when a weight changes by `change` `(out, in, taps)`, of errors that hang together.

        They add up as the layer's inputs do, of which `moment` `(in, in)` is the second moment, up to a factor: the
        Kronecker approximation (Martens 2015, arXiv 1503.05671), with what single gradients said of each output.
        """
        errors = torch.einsum("oit,ij,ojt->o", change.double(), moment, change.double())
        energy = moment.trace().clamp_min(torch.finfo(torch.float64).tiny) * change.shape[2]
        return 0.5 * float((self.squares[name].flatten(1).sum(1) * errors / energy).sum())

    def removal(self, parts: Sequence[tuple[str, Sequence[int]]]) -> float:
        """Predicted rise of the loss when output channels go to zero; `parts` names parameters and channels of each.

        The i-th channels of all parts act as one factor (Theis 2018, arXiv 1801.05787), so their errors do not average
        out as those of rounding do.
        """
        return float(self.removals(parts).sum())

    def removals(self, parts: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
        """The same, channel by channel."""
        gate = sum((self.gates[name][:, list(channels)] for name, channels in parts), torch.zeros(1))
        return 0.5 * gate.square().mean(0)

    def removal_of_all(self, names: Sequence[str]) -> float:
        """Predicted rise of the loss when all output channels of these parameters go to zero at once, as one factor."""
        gate = sum((self.gates[name].sum(1) for name in names), torch.zeros(1))
        return 0.5 * float(gate.square().mean())


@dataclass(frozen=True)
class Effect:
    """What one setting of one group is expected to do, before anything is recovered.

    `loss` is the predicted rise of the loss; `outputs` and `inputs` are the shares of a layer's channels that stay;
    `bits` are the widths in which layers compute, `stored` those of weights that only take less space. Where other
    layers come into the place of one, `inputs` is the share of its weights that these have. Shares from several groups
    multiply, which is a little too much where their channels lie side by side in one layer's input.
    """

    loss: float
    outputs: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, float] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)


Question = tuple[str, Settings]
"""Owner of a group, and its settings together with those shared by the step."""


@runtime_checkable
class Sensitive(Protocol):
    """A compressor that can say beforehand what its settings do; a method without it is searched by trial alone."""

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """One effect per question, on the uncompressed model; its loss is infinite where `apply` would refuse."""


Loss = Callable[[Tensor, Tensor], Tensor]


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Batch], examples: int = 32, seed: int = 0, loss: Loss | None = None
) -> Fisher:
    """One pass over `examples` examples; targets are drawn from the model's own prediction, so labels are not needed.

    Outputs `(n, classes)` and `(n, words, classes)` are taken for logits, and the words of an example as independent;
    all others are the means of normal distributions. Drawn targets,
    unlike the true ones, give the Fisher information itself (Kunstner 2019, arXiv 1905.12558); one example at a time,
    because the square of a mean is not the mean of squares. Where there are labels and a `loss` of `(output, target)`,
    there are slopes too, for another pass.
    """
    generator = torch.Generator().manual_seed(seed)
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    gates: dict[str, list[Tensor]] = {name: [] for name in squares}
    shown = list(_single(batches, examples))
    with _learning(model):
        for inputs, _ in shown:
            for name, parameter, gradient in _gradients(model, _likelihood(model(*inputs), generator)):
                squares[name] += gradient.square()
                gates[name].append((gradient * parameter.detach()).reshape(*parameter.shape[:1], -1).sum(-1))
    _share(model, squares, gates)
    return Fisher(
        {name: total / len(shown) for name, total in squares.items()},
        {name: torch.stack(rows) for name, rows in gates.items()},
        partial(_slopes, model, shown, loss),
    )


def _slopes(model: nn.Module, shown: Sequence[Batch], loss: Loss | None) -> dict[str, Tensor]:
    slopes = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    with _learning(model):
        for inputs, target in shown:
            if loss is None or target is None:
                return {}
            for name, _, gradient in _gradients(model, loss(model(*inputs), target)):
                slopes[name] += gradient / len(shown)
    _share(model, slopes)
    return slopes


@contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
    """Every parameter has a gradient inside."""
    was = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(True)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was[name])


def _share(model: nn.Module, *tables: dict[str, Any]) -> None:
    """Every name of a tied parameter stands for the same."""
    first = {id(p): name for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for table in tables:
            table[name] = table[first[id(parameter)]]


def _single(batches: Iterable[Batch], examples: int) -> Iterator[Batch]:
    for inputs, target in batches:
        for i in range(len(inputs[0])):
            if examples == 0:
                return
            examples -= 1
            yield tuple(x[i : i + 1] for x in inputs), None if target is None else target[i : i + 1]


def _likelihood(output: Tensor, generator: torch.Generator) -> Tensor:
    """The negative log likelihood of a target that is drawn from the output."""
    if output.dim() in (2, 3) and output.shape[-1] > 1:
        logits = output.flatten(0, -2)
        target = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(logits, target, reduction="sum")
    noise = torch.randn(output.shape, generator=generator)
    return 0.5 * (output - (output.detach() + noise)).square().sum()


def _gradients(model: nn.Module, loss: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    named = [(name, p) for name, p in model.named_parameters()]
    gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    for (name, parameter), gradient in zip(named, gradients, strict=True):
        yield name, parameter, torch.zeros_like(parameter) if gradient is None else gradient
