"""Leaves whole residual blocks out; it neither chooses which nor recovers what they knew."""

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.layers import KINDS, hooked, inside, runs_with
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Scalar, Settings, Step


@dataclass(frozen=True)
class Depth:
    """The input of a residual block becomes its output: stochastic depth (Huang 2016, arXiv 1603.09382) made permanent.

    A block is a module with weighted layers whose output equals its input once all of its parameters are zero: whatever
    adds to its input qualifies, and for a module of several such blocks each of them. So does one that adds and then
    normalises, such as a layer of BERT (Sajjad 2020, arXiv 2004.03844): nothing but the norm of its input is left then,
    which the layer before has normalised already. What a block is given beside its first input, such as a mask, is
    passed over. It is what helps where a runtime spends its time on the number of layers, as for one small example; it
    does not help where most of the time goes into the layers between the blocks, which change the shape and have to
    stay.
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
            model.set_submodule(name, Skipped())
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


class Skipped(nn.Module):
    """Hands on the first of what it is given."""

    def forward(self, hidden: Tensor, *_others: object, **_named: object) -> Tensor:
        """`(n, ...)`, unchanged."""
        return hidden


@dataclass(frozen=True)
class _Call:
    """What a module was called with: `hidden` first, then the rest."""

    hidden: Tensor
    others: tuple[Any, ...]
    named: Mapping[str, Any]

    def of(self, block: nn.Module) -> Tensor:
        # A copy, because the block may work in place.
        output: Tensor = block(self.hidden.clone(), *self.others, **self.named)
        return output


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
    return {name: found[name] for name in shown if name in found and runs_with(scratch, {name: Skipped()}, example)}


def _shown(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, _Call]:
    """Modules with weighted layers that are called once and keep their first input's shape, in order of the end."""
    shown: dict[str, _Call] = {}
    calls: Counter[str] = Counter()

    def look(name: str, inputs: tuple[Any, ...], named: Mapping[str, Any], output: Any) -> None:
        calls[name] += 1
        first = inputs[0] if inputs else None
        if not (isinstance(first, Tensor) and isinstance(output, Tensor) and first.is_floating_point()):
            return
        if first.shape == output.shape and first.dtype == output.dtype:
            # A copy, because what comes next may work in place.
            shown[name] = _Call(first.clone(), inputs[1:], named)

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


def _adding(block: nn.Module, call: _Call) -> list[str] | None:
    """The layers whose silence is enough for the block to pass its input on; None if that never happens."""
    layers = [name for name, module in block.named_modules() if any(True for _ in module.parameters(recurse=False))]
    norms = {name: module.eps for name, module in block.named_modules() if isinstance(module, nn.LayerNorm)}
    ways: list[tuple[Iterable[str], Tensor]] = [((), call.hidden)]
    if norms:
        ways.append((norms, F.layer_norm(call.hidden, call.hidden.shape[-1:], eps=max(norms.values()))))
    for plain, left in ways:
        needed = [name for name in layers if name not in plain]
        if not _passes(block, needed, plain, call, left):
            continue
        # In the order of the network, so that the first ones of a branch are found not to be needed.
        for layer in tuple(needed):
            others = [name for name in needed if name != layer]
            if _passes(block, others, plain, call, left):
                needed = others
        return needed
    return None


def _passes(block: nn.Module, silent: Iterable[str], plain: Iterable[str], call: _Call, left: Tensor) -> bool:
    """Whether the output is `left` once the `silent` layers' own parameters are zero and `plain` norms scale by one."""
    values = {p: 0.0 for name in silent for p in block.get_submodule(name).parameters(recurse=False)}
    values |= {p: float(key == "weight") for name in plain for key, p in block.get_submodule(name).named_parameters()}
    with torch.no_grad(), _filled(values):
        # Each norm in a row adds a little to what it divides by.
        return bool(torch.allclose(call.of(block), left, rtol=0, atol=1e-4 if plain else 1e-6))


@contextmanager
def _filled(values: Mapping[nn.Parameter, float]) -> Iterator[None]:
    kept = {parameter: parameter.detach().clone() for parameter in values}
    for parameter, value in values.items():
        parameter.fill_(value)
    try:
        yield
    finally:
        for parameter, own in kept.items():
            parameter.copy_(own)
