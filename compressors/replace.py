"""Puts several layers in the place of one and says where that can be done; what they compute is each method's own."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.layers import KINDS, hooked, runs_with, weight_groups
from compressors.plan import LayerSpec, Settings


class InPlaceOf(nn.Sequential):
    """What stands in the place of one layer; a setting for that layer is meant for all of these."""


def stands_for(model: nn.Module, name: str) -> str:
    """The layer of the uncompressed model in whose place this one is: itself, unless something was put there."""
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((path for path in above if isinstance(model.get_submodule(path), InPlaceOf)), name)


def owners(model: nn.Module, layers: Iterable[LayerSpec]) -> dict[str, tuple[str, ...]]:
    """Layer of the uncompressed model -> the layers that hold its weight tensor, or stand in its place."""
    found: dict[str, tuple[str, ...]] = {}
    for owner, members in weight_groups(layers).items():
        name = stands_for(model, owner)
        found[name] = (*found.get(name, ()), *members)
    return found


def worst(told: Sequence[Settings]) -> Settings:
    """Of what layers with one setting came to, the largest by key."""
    keys = dict.fromkeys(key for settings in told for key in settings)
    return {key: max((settings[key] for settings in told if key in settings), key=float) for key in keys}


@dataclass(frozen=True)
class Site:
    """A dense layer that others can stand for; `read` and `written` count the positions of the example, over all calls.

    Positions are pixels or tokens.
    """

    layer: nn.Module
    read: int
    written: int

    @property
    def weight(self) -> Tensor:
        """`(out, in, taps)`; a linear layer has one tap."""
        weight = self.layer.get_parameter("weight").detach()
        return weight.reshape(*weight.shape[:2], -1)


def sites(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, Site]:
    """The linear and ungrouped convolution layers that can be replaced, in the order of their first call.

    Layers that share a parameter stay, those with two names too, and those of which a model wants more than their
    output, such as their weight.
    """
    read: Counter[str] = Counter()
    written: Counter[str] = Counter()

    def count(name: str, given: Tensor, made: Tensor) -> None:
        out, inputs = candidates[name].get_parameter("weight").shape[:2]
        read[name] += given.numel() // inputs
        written[name] += made.numel() // out

    candidates = _candidates(model)
    handles = [
        layer.register_forward_hook(
            lambda _layer, given, named, made, name=name: count(name, _input(given, named), made), with_kwargs=True
        )
        for name, layer in candidates.items()
    ]
    with hooked(handles), torch.no_grad():
        model(*example)
    wrapped = {name: InPlaceOf(candidates[name]) for name in written}
    names = list(written)
    if not runs_with(model, wrapped, example):
        names = [name for name in names if runs_with(model, {name: wrapped[name]}, example)]
    return {name: Site(candidates[name], read[name], written[name]) for name in names}


def _input(given: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Tensor:
    """The one that such a layer takes, whether it was called by its name or not."""
    return next(iter((*given, *named.values())))


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    every = [*model.named_modules(remove_duplicate=False)]
    uses = Counter(id(p) for _, module in every for p in module.parameters(recurse=False))
    return {
        name: module
        for name, module in every
        if name
        and KINDS.get(type(module)) in ("conv", "linear")
        and getattr(module, "groups", 1) == 1
        and all(uses[id(p)] == 1 for p in module.parameters(recurse=False))
        and stands_for(model, name) == name
    }


def put(model: nn.Module, name: str, layers: Sequence[nn.Module]) -> None:
    """Let `layers`, one behind the other, stand in the place of the layer `name`; they learn only if it did."""
    old = model.get_submodule(name)
    learns = old.get_parameter("weight").requires_grad
    model.set_submodule(name, InPlaceOf(*layers).train(old.training).requires_grad_(learns))


def put_before(model: nn.Module, name: str, first: nn.Module) -> None:
    """Let `first` stand before the layer `name`, or before all that stands in the place of it."""
    old = model.get_submodule(name)
    stand_ins = list(old) if isinstance(old, InPlaceOf) else [old]
    model.set_submodule(name, InPlaceOf(first.train(old.training), *stand_ins).train(old.training))


def layer_like(
    old: nn.Module, weight: Tensor, bias: Tensor | None = None, spatial: bool = False, groups: int = 1
) -> nn.Module:
    """A layer of the kind of `old` with this weight `(out, in / groups, taps)`.

    A `spatial` convolution has the kernel, stride, padding and dilation of `old`; any other one has a kernel of 1.
    """
    out, inputs = weight.shape[0], weight.shape[1] * groups
    if isinstance(old, nn.Linear):
        return _filled(nn.Linear(inputs, out, bias is not None), weight, bias)
    kind: Any = type(old)
    place = {name: getattr(old, name) for name in ("stride", "padding", "dilation", "padding_mode")} if spatial else {}
    size = getattr(old, "kernel_size", ()) if spatial else (1,) * (old.get_parameter("weight").dim() - 2)
    return _filled(kind(inputs, out, size, groups=groups, bias=bias is not None, **place), weight, bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    shape = layer.get_parameter("weight").shape
    layer.register_parameter("weight", nn.Parameter(weight.reshape(shape).float().contiguous()))
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias.detach().clone()))
    return layer


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin singular value decomposition of `(..., rows, columns)` in double precision.

    Of the two signs that each pair of vectors can have, the largest entry of the left one is positive.
    """
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    sign = _signs(left)
    return left * sign, values, right * sign.mT


def directions(matrix: Tensor) -> Tensor:
    """The left singular vectors of `(rows, columns)`, as those of `svd`; faster where there are many columns."""
    if len(matrix) > matrix.shape[1]:
        return svd(matrix)[0]
    # What squaring loses is far below the directions that anybody keeps.
    left: Tensor = torch.linalg.eigh(matrix.double() @ matrix.double().T).eigenvectors.flip(1)
    return left * _signs(left)


def _signs(left: Tensor) -> Tensor:
    largest = left.gather(-2, left.abs().argmax(-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(left.dtype)


def input_moments(
    model: nn.Module, names: Iterable[str], batches: Iterable[tuple[Tensor, ...]]
) -> Mapping[str, Tensor]:
    """Layer -> mean over its input positions of the product of every two channels `(in, in)`, in double precision."""
    totals: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def add(name: str, layer: nn.Module, given: Tensor) -> None:
        rows = given if isinstance(layer, nn.Linear) else given.movedim(1, -1)
        rows = rows.reshape(-1, rows.shape[-1]).double()
        totals[name] = totals.get(name, 0) + rows.T @ rows
        counts[name] += len(rows)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda layer, given, named, name=name: add(name, layer, _input(given, named)), with_kwargs=True
        )
        for name in names
    ]
    with hooked(handles), torch.no_grad():
        for inputs in batches:
            model(*inputs)
    return {name: total / counts[name] for name, total in totals.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """The last bits of a product depend on the number of threads.

    Weights that are computed here are computed again by other processes, which share what runtimes made of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
