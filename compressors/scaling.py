"""Channels that can be scaled while the model answers as before: finds, makes and scales them; it decides nothing."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.layers import first_output, hooked, read_layers, weight_path
from compressors.replace import put_before, sites, stands_for

REACH = 10
"""A trial scales by up to two to this power, up and down: what is cut off at six, as by ReLU6, then shows."""


@dataclass(frozen=True)
class Place:
    """Channels that a norm or a linear layer, the `feeder`, gives and only linear layers, the `readers`, take.

    Between them they are at most mixed among positions, gated, or cut off at zero. A feeder may also be `Factors`.
    """

    feeder: str
    readers: tuple[str, ...]


class Factors(nn.Module):
    """Multiplies the last axis by a factor for each channel; training leaves them as they are."""

    weight: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., channels)`."""
        return x * self.weight


@torch.no_grad()
def rescale(model: nn.Module, place: Place, factors: Tensor) -> None:
    """Divide what the feeder gives by `factors` `(channels,)`, all above 0, and multiply the readers' columns."""
    _divide(model.get_submodule(place.feeder), factors)
    for reader in place.readers:
        model.get_parameter(weight_path(model, reader)).mul_(factors)


def places(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, Place]:
    """By the name that the feeder, or what it stands in the place of, has in the uncompressed model.

    Each is found by a trial: with the feeder's channels scaled, some layers must see just that in every call, all
    others what they saw before, and once the former undo it, the model must answer as before. So the input of a
    residual addition is left alone, and what shares its parameters too. A reader has one feeder, the first.
    """
    scratch = copy.deepcopy(model).eval().requires_grad_(False)
    feeders, readers = _candidates(scratch, example)
    found: dict[str, Place] = {}
    if not feeders:
        return found
    seen = _seen(scratch, readers, example)
    taken: set[str] = set()
    for feeder in feeders:
        took = _takers(scratch, feeder, seen, example)
        name = stands_for(scratch, feeder)
        inside = any(stands_for(scratch, reader) == name for reader in took)
        if took and not inside and taken.isdisjoint(took):
            found[name] = Place(feeder, took)
            taken.update(took)
    return found


def fronts(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, tuple[str, ...]]:
    """Linear layers before which `Factors` can stand, or what stands in their places: by the first, those given alike.

    So queries, keys and values, which are given the same tensor, can share theirs.
    """
    first: dict[str, str] = {}
    for spec in read_layers(model, example):
        first.setdefault(stands_for(model, spec.name), spec.name if spec.kind == "linear" else "")
    alone = {name for name, site in sites(model, example).items() if isinstance(site.layer, nn.Linear)}
    names = {layer: name for name, layer in first.items() if layer and (name in alone or name != layer)}
    given: dict[str, list[Tensor]] = {layer: [] for layer in names}
    with torch.no_grad(), _listening(model, names, lambda layer, x: given[layer].append(x)):
        model(*example)
    groups: dict[tuple[int, ...], tuple[str, ...]] = {}
    for layer, inputs in given.items():
        # Nothing that was given is gone yet, so each has an identity of its own.
        key = tuple(map(id, inputs))
        groups[key] = (*groups.get(key, ()), names[layer])
    return {members[0]: members for members in groups.values()}


def insert(model: nn.Module, names: Sequence[str]) -> Place:
    """Put `Factors` that are 1 before these layers, which are given the same; where they can be scaled from then on."""
    module = model.get_submodule(names[0])
    layer = next(m for m in module.modules() if isinstance(m, nn.Linear))
    shared = Factors(layer.in_features)
    for name in names:
        put_before(model, name, shared)
    return Place(f"{names[0]}.0", tuple(f"{name}.1" for name in names))


@dataclass(frozen=True)
class _Seen:
    """What linear layers were given, call by call, and what the model answered."""

    inputs: Mapping[str, Sequence[Tensor]]
    output: Tensor


def _candidates(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[list[str], list[str]]:
    """Feeders, and the linear layers that one of them could feed by its width."""
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    alone = {name: m for name, m in model.named_modules() if name and all(uses[id(p)] == 1 for p in m.parameters())}
    linear = [layer.name for layer in read_layers(model, example) if layer.kind == "linear" and layer.name in alone]
    read = {name: _shape(model, name)[1] for name in linear}
    given = {name: _shape(model, name)[0] for name in alone if name in read or _is_norm(alone[name])}
    feeders = [name for name, width in given.items() if width in read.values()]
    return feeders, [name for name, width in read.items() if width in given.values()]


def _is_norm(module: nn.Module) -> bool:
    """Whatever has a factor, and perhaps a shift, for each channel, and nothing else.

    Not a batch norm: that becomes a part of the convolution before it.
    """
    own = dict(module.named_parameters())
    fits = "weight" in own and own.keys() <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values())
    return fits and not isinstance(module, nn.modules.batchnorm._BatchNorm)


def _shape(model: nn.Module, name: str) -> torch.Size:
    return model.get_parameter(weight_path(model, name)).shape


@torch.no_grad()
def _seen(model: nn.Module, readers: Sequence[str], example: tuple[Tensor, ...]) -> _Seen:
    inputs: dict[str, list[Tensor]] = {name: [] for name in readers}
    # A copy, because what comes next may work in place.
    with _listening(model, readers, lambda name, given: inputs[name].append(given.clone())):
        output = first_output(model(*example))
    return _Seen(inputs, output)


@torch.no_grad()
def _takers(model: nn.Module, feeder: str, seen: _Seen, example: tuple[Tensor, ...]) -> tuple[str, ...]:
    """The readers of a feeder; none if scaling it changes anything that they cannot undo."""
    width = _shape(model, feeder)[0]
    factors = _powers(width)
    calls = {name: iter(inputs) for name, inputs in seen.inputs.items() if _shape(model, name)[1] == width}
    told: dict[str, set[bool]] = {name: set() for name in calls}

    def look(name: str, given: Tensor) -> Tensor | None:
        before = next(calls[name], given.new_zeros(()))
        undone = given * factors
        reads = _alike(undone, before)
        # Where it is neither scaled nor as before, or both, which only zeros can be, the answers contradict each other.
        told[name] |= {reads, not _alike(given, before)}
        return undone if reads else None

    with _divided(model.get_submodule(feeder), factors), _listening(model, calls, look):
        output = first_output(model(*example))
    clear = all(len(answers) < 2 for answers in told.values()) and _alike(output, seen.output)
    return tuple(name for name, answers in told.items() if answers == {True}) if clear else ()


@contextmanager
def _listening(model: nn.Module, layers: Iterable[str], hear: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """`hear` is told the input of every call of these layers, and may give another one."""

    def look(
        name: str, given: tuple[Tensor, ...], named: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor], dict[str, Any]] | None:
        # It has one input, which may be called by its name.
        other = hear(name, next(iter((*given, *named.values()))))
        return None if other is None else ((other,), {})

    handles = (
        model.get_submodule(name).register_forward_pre_hook(
            lambda _layer, given, named, name=name: look(name, given, named), with_kwargs=True
        )
        for name in layers
    )
    with hooked(handles):
        yield


def _powers(width: int) -> Tensor:
    """None of them 1. Powers of two are exact: what comes back comes back to the last bit."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.randint(1, REACH + 1, (width,), generator=generator)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return 2.0 ** (powers * signs)


@contextmanager
def _divided(module: nn.Module, factors: Tensor) -> Iterator[None]:
    kept = [parameter.clone() for parameter in module.parameters()]
    _divide(module, factors)
    try:
        yield
    finally:
        for parameter, value in zip(module.parameters(), kept, strict=True):
            parameter.copy_(value)


def _divide(module: nn.Module, factors: Tensor) -> None:
    """Its rows, where it has a matrix; of a norm the factor and the shift."""
    for tensor in (module.weight,) if isinstance(module, Factors) else module.parameters():
        tensor.div_(factors.reshape(-1, *[1] * (tensor.dim() - 1)))


def _alike(one: Tensor, other: Tensor) -> bool:
    tolerance = 1e-6 * float(other.abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=tolerance)
