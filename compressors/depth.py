"""Leaves whole residual blocks out; it neither chooses which nor recovers what they knew."""

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.layers import KINDS, hooked, inside, runs_with
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Scalar, Settings, Step


@dataclass(frozen=True)
class Depth:
    """The input of a residual block becomes its output: stochastic depth (Huang 2016, arXiv 1603.09382) made permanent.

    A block is a module with weighted layers whose output equals its input once all of its parameters are zero: whatever
    adds to its input qualifies, and for a module of several such blocks each of them. It is what helps where a runtime
    spends its time on the number of layers, as for one small example; it does not help where most of the time goes into
    the layers between the blocks, which change the shape and have to stay.
    """

    method: ClassVar[str] = "depth"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    off: ClassVar[tuple[str, Scalar]] = ("skip", False)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Each block by itself, by its module's name."""
        return {name: (name,) for name in _blocks(model, example)}

    def removed(self, step: Step) -> Collection[str]:
        """The blocks that are left out."""
        return [name for name, settings in step.per_layer.items() if settings["skip"]]

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`skip` per block: whether it is left out."""
        possible = _blocks(model, context.example)
        for name, settings in step.per_layer.items():
            _check(name, settings, possible)
        for name in self.removed(step):
            model.set_submodule(name, nn.Identity())
        return Applied({name: {"skip": settings["skip"]} for name, settings in step.per_layer.items()})

    def half(self, step: Step) -> Step | None:
        """Every second of the blocks stays, and the only one does."""
        out = list(self.removed(step))[1::2]
        return replace(step, per_layer={name: step.per_layer[name] for name in out}) if out else None

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What all channels that a block adds to its input were worth together, without recovery."""
        blocks = _blocks(model, example)
        effects = []
        for name, settings in questions:
            _check(name, settings, blocks)
            effects.append(_effect(model, name, blocks[name], fisher) if settings["skip"] else Effect(0.0))
        return effects


def _effect(model: nn.Module, name: str, last: Sequence[str], fisher: Fisher) -> Effect:
    layers = [inner for inner, module in model.named_modules() if type(module) in KINDS and inside(inner, name)]
    names = (f"{layer}.{parameter}" for layer in last for parameter in ("weight", "bias"))
    gone = dict.fromkeys(layers, 0.0)
    return Effect(fisher.removal_of_all([name for name in names if name in fisher.gates]), outputs=gone)


def _check(name: str, settings: Settings, blocks: Mapping[str, Sequence[str]]) -> None:
    if name not in blocks:
        raise Infeasible(f"depth has no block {name}: possible are {', '.join(blocks) or 'none'}")
    if not isinstance(settings["skip"], bool):
        raise Infeasible(f"depth.skip of {name} is {settings['skip']}: expected true or false")


def _blocks(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, tuple[str, ...]]:
    """Innermost residual blocks -> the layers by which they add to their input, the last ones of their branches."""
    scratch = copy.deepcopy(model).eval().requires_grad_(False)
    shown = _shown(scratch, example)
    found: dict[str, tuple[str, ...]] = {}
    # From the inside out.
    for name in sorted(shown, key=lambda name: -name.count(".")):
        if name and not any(inside(block, name) for block in found):
            layers = _adding(scratch.get_submodule(name), shown[name])
            if layers is not None:
                found[name] = tuple(f"{name}.{layer}".rstrip(".") for layer in layers)
    return {name: found[name] for name in shown if name in found and runs_with(scratch, {name: nn.Identity()}, example)}


def _shown(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Modules with weighted layers that are called once and keep the shape -> their one input, in order of the end."""
    shown: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()

    def look(name: str, inputs: tuple[Tensor, ...], named: Mapping[str, object], output: Tensor) -> None:
        calls[name] += 1
        alone = len(inputs) == 1 and not named
        tensors = all(isinstance(x, Tensor) and x.is_floating_point() for x in (*inputs, output))
        if alone and tensors and inputs[0].shape == output.shape:
            # A copy, because what comes next may work in place.
            shown[name] = inputs[0].clone()

    handles = (
        module.register_forward_hook(
            lambda _module, inputs, named, output, name=name: look(name, inputs, named, output), with_kwargs=True
        )
        for name, module in model.named_modules()
        if type(module) not in KINDS and any(type(inner) in KINDS for inner in module.modules())
    )
    with hooked(handles), torch.no_grad():
        model(*example)
    return {name: given for name, given in shown.items() if calls[name] == 1}


def _adding(block: nn.Module, given: Tensor) -> list[str] | None:
    """The layers whose silence is enough for the output to equal the input; None if that never happens."""
    layers = [name for name, module in block.named_modules() if any(True for _ in module.parameters(recurse=False))]
    needed = list(layers)
    if not _passes(block, needed, given):
        return None
    # In the order of the network, so that the first ones of a branch are found not to be needed.
    for layer in layers:
        others = [name for name in needed if name != layer]
        if _passes(block, others, given):
            needed = others
    return needed


def _passes(block: nn.Module, silent: Sequence[str], given: Tensor) -> bool:
    """Whether the output equals the input when these layers' own parameters are zero."""
    with torch.no_grad(), _silenced([p for n in silent for p in block.get_submodule(n).parameters(recurse=False)]):
        return bool(torch.allclose(block(given.clone()), given, rtol=0, atol=1e-6))


@contextmanager
def _silenced(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    kept = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.zero_()
    try:
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
