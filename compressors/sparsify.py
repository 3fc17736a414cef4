"""Holds single weights at zero; it changes no shape, and nothing in it trains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question, diagonal_fisher
from compressors.layers import inside, read_layers
from compressors.masks import Mask, hold, release, strongest
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import LayerSpec, Scalar, Settings, Step
from compressors.replace import one_thread
from compressors.sparsity import asked_sparsity

KINDS = ("conv", "linear")
CRITERIA = ("magnitude", "fisher", "movement")


@dataclass(frozen=True)
class Sparsify:
    """Zeros among the weights of single layers, anywhere or N of every M inputs (N:M, Zhou 2021, arXiv 2102.04010).

    No gain by itself: neither runtime computes faster with zeros, up to nine in ten of them, and the files keep their
    size. It helps where files are compressed to be sent or kept, or as a step towards a device that skips zeros.

    The weights that go first are, by `criterion`, the smallest (`magnitude`, Han 2015, arXiv 1506.02626), those that
    the loss would miss least by the Fisher information (`fisher`, optimal brain damage, LeCun 1990, with that for the
    curvature), or those that the loss's gradient pulls towards zero (`movement`, Sanh 2020, arXiv 2005.07683). Sanh
    sums the pull up while the model trains; here it is taken once, on 32 labelled calibration examples, so that it
    is far weaker than theirs.

    Recovery trains under the masks, which are let go at its end: weights that were held are only decayed until then.
    With a `ramp`, the share of zeros rises with training as in Zhu 2017 (arXiv 1710.01878), one of its steps being a
    call of the layer in training mode; if training ends before, the rest goes at once. That does not help where
    training is short, because what is left needs time to take over.
    """

    method: ClassVar[str] = "sparsify"
    stage: ClassVar[Stage] = Stage.MASK
    off: ClassVar[tuple[str, Scalar]] = ("sparsity", 0.0)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the conv and linear layers that hold one weight tensor."""
        layers = _layers(model, example)
        return {name: (name, *_tied(layers, name)) for name, layer in layers.items() if layer.tied_to is None}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`sparsity` per layer is the share of zeros, in the whole layer or in every `group` inputs in a row.

        A layer that was replaced by several has all of these held. `criterion` is one of `CRITERIA`, `ramp` a number of
        steps; without them, the first and 0.
        """
        ask = _Ask.read(step.shared)
        layers = _layers(model, context.example)
        needs_data = ask.criterion != "magnitude" and step.per_layer
        with one_thread():
            fisher = diagonal_fisher(model, context.calibration(), loss=context.loss) if needs_data else None
            achieved: dict[str, Settings] = {}
            for owner, settings in step.per_layer.items():
                sparsity = asked_sparsity("sparsify", owner, settings)
                names = _inside(layers, owner)
                zeros = sum(_hold(model, name, _tied(layers, name), sparsity, ask, fisher) for name in names)
                achieved[owner] = {"sparsity": zeros / sum(math.prod(layers[name].weight_shape) for name in names)}
        return Applied(achieved)

    def release(self, model: nn.Module) -> None:
        """What is held becomes zero."""
        release(model)

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What the removed weights were worth, without recovery; nothing gets smaller or faster."""
        return [_effect(model, owner, settings, fisher) for owner, settings in questions]


@dataclass(frozen=True)
class _Ask:
    """The settings that all layers share."""

    group: int
    criterion: str
    ramp: int

    @classmethod
    def read(cls, shared: Settings) -> "_Ask":
        group, ramp = (shared.get(key, 0) for key in ("group", "ramp"))
        if not isinstance(group, int) or group < 0 or group == 1:
            raise Infeasible(f"sparsify.group is {group}: expected a number of inputs, 2 or more, or 0 for all of them")
        if not isinstance(ramp, int) or ramp < 0:
            raise Infeasible(f"sparsify.ramp is {ramp}: expected a whole number of steps, 0 or more")
        criterion = shared.get("criterion", CRITERIA[0])
        if criterion not in CRITERIA:
            raise Infeasible(f"sparsify.criterion is {criterion}: expected one of {', '.join(CRITERIA)}")
        return cls(group, str(criterion), ramp)


def _layers(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, LayerSpec]:
    return {layer.name: layer for layer in read_layers(model, example) if layer.kind in KINDS}


def _tied(layers: Mapping[str, LayerSpec], owner: str) -> list[str]:
    return [name for name, layer in layers.items() if layer.tied_to == owner]


def _inside(layers: Mapping[str, LayerSpec], owner: str) -> list[str]:
    """The layer itself, or those that have taken its place."""
    names = [name for name, layer in layers.items() if inside(name, owner) and layer.tied_to is None]
    if not names:
        raise Infeasible(f"sparsify has no layer {owner}: possible are {', '.join(layers)}")
    return names


def _hold(model: nn.Module, name: str, tied: Sequence[str], sparsity: float, ask: _Ask, fisher: Fisher | None) -> int:
    """Put the mask of one weight on all layers that hold it; how many zeros there will be."""
    if sparsity == 0:
        return 0
    scores = _scores(model, name, ask.criterion, fisher)
    kept = strongest(scores, sparsity, ask.group)
    mask = Mask(kept, sparsity, ask.group, ask.ramp, None if ask.criterion == "magnitude" else scores)
    hold(model, (name, *tied), mask)
    return int((~kept).sum())


def _scores(model: nn.Module, name: str, criterion: str, fisher: Fisher | None) -> Tensor:
    """How much each weight matters; `fisher` is there for the criteria that need it."""
    weight = model.get_parameter(f"{name}.weight").detach()
    if criterion == "fisher" and fisher is not None:
        return fisher.squares[f"{name}.weight"] * weight.square()
    if criterion == "movement" and fisher is not None:
        if not fisher.slopes:
            raise Infeasible("sparsify.criterion is movement: expected magnitude or fisher, which need no labels")
        return -weight * fisher.slopes[f"{name}.weight"]
    return weight.abs()


def _effect(model: nn.Module, owner: str, settings: Settings, fisher: Fisher) -> Effect:
    ask, sparsity = _Ask.read(settings), asked_sparsity("sparsify", owner, settings)
    if sparsity == 0:
        return Effect(0.0)
    try:
        scores = _scores(model, owner, ask.criterion, fisher)
    except Infeasible:
        return Effect(math.inf)
    weight = model.get_parameter(f"{owner}.weight").detach()
    return Effect(fisher.rounding(f"{owner}.weight", weight.masked_fill(strongest(scores, sparsity, ask.group), 0.0)))
