"""Trains a model with the rounding of 8-bit graphs simulated; the weights it leaves are float, on the grid they get."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressors.errors import Infeasible
from compressors.layers import hooked, read_layers, weight_path
from compressors.masks import finish, held
from compressors.pipeline import Applied, Context
from compressors.plan import Settings, Step, digest
from compressors.recovery import Goal, Recovery, training, whole_epochs

TOP = 127
"""Weights are rounded to -127..127, as the runtimes do it."""
LEVELS = 255
"""Steps between the smallest and the largest activation."""
PACE = 10.0
"""How many times the learning rate a weight's step changes, as a share of itself."""
TINY = 1e-12


@dataclass(frozen=True)
class Qat(Recovery):
    """Quantization-aware training with learned steps (Esser 2020, arXiv 1902.08153), towards the teacher's answers.

    Every conv and linear layer multiplies rounded inputs with rounded weights, whatever the plan will quantize: so one
    training serves all plans that differ in bits. Gradients pass straight through the rounding (Bengio 2013, arXiv
    1308.3432). A runtime has no room for learned numbers, so only such steps are learned as it will take of itself:

    - Of weights, per output channel, the step is learned in the log domain (Jain 2019, arXiv 1903.08066), where Adam
      changes it by a share of itself, but never exceeds the largest weight's share. Weights beyond 127 steps are
      clipped. What is written back lies on the grid, and its largest weight at 127 steps: a runtime finds that grid,
      and so does every other rounding, but for one scale for all channels.
    - Of a layer's inputs the range is the batch's own, 0 included, as it is in calibration by `minmax`; the gradient of
      the step goes to the extremes. Runtimes also round what is added between layers, which is not simulated.

    Batch norms keep their statistics, as the deployed graph does; their scales and shifts learn. It trains in float32
    only, and all at once, for the steps are nowhere stored. It does not help where 8 bits lose nothing, which is the
    rule, and takes time to find that out. Methods that train must come before it, or they leave its grid.
    """

    method: ClassVar[str] = "qat"

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`epochs`, `temperature`, `weight` of the teacher's term (the labels get the rest) and `learning_rate`.

        `step_share` is what is left of the steps on average, 1 being that of rounding without training. Raises
        `Infeasible` as soon as the loss is not finite. The model is in eval mode afterwards.
        """
        epochs = whole_epochs(self.method, step.shared)
        if epochs == 0:
            return Applied({"": {"epochs": 0}})
        goal = Goal.read(self.method, step.shared, context, half=False)
        rounded = Rounded(model, context.example)
        if not rounded.paces:
            raise Infeasible("qat finds no layer to round: all weights belong to embeddings")
        with training(model), rounded.inputs(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(int(digest([seed, self.method]), 16))
            _freeze(model)
            learning = [*model.parameters(), *rounded.paces.values()]
            loss = self.train(
                learning, lambda batch: goal.loss(rounded, batch), goal.learning_rate, range(epochs), context
            )
        achieved: Settings = {"epochs": epochs, "loss": loss, "step_share": rounded.step_share()}
        finish(model)
        rounded.write()
        return Applied({"": achieved})


class Rounded:
    """A model as a runtime would compute it in 8 bits; called, it gives the model's output.

    Layers whose weight belongs to an embedding stay float, as they do in plans.
    """

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]) -> None:
        self.model = model
        layers = [layer for layer in read_layers(model, example) if layer.kind != "embedding"]
        owners = [layer.name for layer in layers if layer.tied_to is None]
        self._layers = [layer.name for layer in layers if (layer.tied_to or layer.name) in owners]
        self._owners = {weight_path(model, name): name for name in owners}
        self._weights = {path: model.get_parameter(path) for path in self._owners}
        self._began = {path: self._widest(path) for path in self._owners}
        self.paces = {name: nn.Parameter(torch.zeros_like(step)) for name, step in self._began.items()}
        """By weight, `(out, 1, ..)`: what is learned of the steps."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Rounds inputs too while `inputs` is entered."""
        output: Tensor = functional_call(self.model, self._rounded(), inputs)
        return output

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """Inside, every layer rounds its input, whoever calls the model."""
        handles = (
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda _module, given: (round_activation(given[0]), *given[1:])
            )
            for name in self._layers
        )
        with hooked(handles):
            yield

    @torch.no_grad()
    def step_share(self) -> float:
        """How large the steps are on average, as a share of what they were at first."""
        return mean(float((self._step(name) / began).mean()) for name, began in self._began.items())

    @torch.no_grad()
    def write(self) -> None:
        """Put the rounded weights into the model."""
        for name, rounded in self._rounded().items():
            self._weights[name].copy_(rounded)

    def _rounded(self) -> dict[str, Tensor]:
        return {name: round_weight(weight, self._step(name)) for name, weight in self._weights.items()}

    def _step(self, name: str) -> Tensor:
        return _at_most(self._widest(name), self._began[name] * torch.exp(PACE * self.paces[name]))

    def _widest(self, name: str) -> Tensor:
        """A runtime's grid is as wide as the weights that masks leave."""
        return _largest_step(held(self.model, self._owners[name], self._weights[name]))


def round_weight(weight: Tensor, step: Tensor) -> Tensor:
    """The nearest of -127..127 steps; `step` is `(out, 1, ..)`, and the largest weight's share where that is less."""
    step = _at_most(_largest_step(weight), step)
    return _round((weight / step).clamp(-TOP, TOP)) * step


def round_activation(given: Tensor) -> Tensor:
    """The nearest of 256 values from the smallest to the largest, of which one is 0."""
    low, high = given.amin().clamp_max(0), given.amax().clamp_min(0)
    step = ((high - low) / LEVELS).clamp_min(TINY)
    zero = (-low / step).round().detach()
    return (_round(given / step) + zero).clamp(0, LEVELS).sub(zero) * step


def _largest_step(weight: Tensor) -> Tensor:
    """`(out, 1, ..)`: the step at which nothing is clipped."""
    largest = weight.detach().abs().amax(tuple(range(1, weight.dim())), keepdim=True)
    return largest.clamp_min(TINY) / TOP


def _at_most(largest: Tensor, step: Tensor) -> Tensor:
    """The gradient passes to `step` all the same, so that it can come down again."""
    return step + (torch.minimum(step, largest) - step).detach()


def _round(scaled: Tensor) -> Tensor:
    """Rounded forwards, untouched backwards."""
    return scaled + (scaled.round() - scaled).detach()


def _freeze(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
