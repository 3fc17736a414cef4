"""Reads the weighted layers of a model once, before anything is done to it."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from compressors.plan import LayerSpec

KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
}


def inside(name: str, block: str) -> bool:
    """Whether the module of this name is the block, or a part of it."""
    return name == block or name.startswith(f"{block}.")


def read_layers(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[LayerSpec, ...]:
    """The conv, linear and embedding layers that `model(*example)` calls, in the order of their first call.

    The example's batch size is divided out of `macs`.
    """
    model = copy.deepcopy(model).eval()
    names = {module: name for name, module in model.named_modules() if _kind(module)}
    macs: dict[str, int] = {}

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs[names[module]] = macs.get(names[module], 0) + _macs(module, output)

    with hooked(module.register_forward_hook(count) for module in names), torch.no_grad():
        model(*example)
    return tuple(_specs(model, macs, batch=len(example[0])))


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """What was registered is there inside, and gone afterwards."""
    kept = list(handles)
    try:
        yield
    finally:
        for handle in kept:
            handle.remove()


def runs_with(model: nn.Module, others: Mapping[str, nn.Module], example: tuple[Tensor, ...]) -> bool:
    """Whether a copy runs in which these stand in the place of the modules of their names.

    Some models look into their modules, or give them more than they say.
    """
    scratch = copy.deepcopy(model)
    for name, other in others.items():
        scratch.set_submodule(name, other)
    try:
        with torch.no_grad():
            scratch(*example)
    except Exception:  # noqa: BLE001  whatever a model does with what is no longer there
        return False
    return True


def weight_path(model: nn.Module, layer: str) -> str:
    """The name of the parameter that holds a layer's weight, also while a parametrization makes another one of it."""
    return f"{layer}.{_weight(model.get_submodule(layer))}"


def _weight(module: nn.Module) -> str:
    return "parametrizations.weight.original" if parametrize.is_parametrized(module, "weight") else "weight"


def _kind(module: nn.Module) -> str:
    # A parametrization puts a class of its own in front of the layer's.
    own = type(module).__base__ if parametrize.is_parametrized(module) else type(module)
    return KINDS.get(own, "") if own else ""


def weight_groups(layers: Iterable[LayerSpec]) -> dict[str, tuple[str, ...]]:
    """Owner -> the layers that hold its weight tensor, itself first."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.tied_to or layer.name, []).append(layer.name)
    return {owner: tuple(members) for owner, members in groups.items()}


def _macs(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    return output.numel() * module.get_parameter(_weight(module))[0].numel()


def _specs(model: nn.Module, macs: dict[str, int], batch: int) -> Iterator[LayerSpec]:
    owners: dict[int, str] = {}
    for name, count in macs.items():
        module = model.get_submodule(name)
        weight = module.get_parameter(_weight(module))
        owner = owners.setdefault(id(weight), name)
        yield LayerSpec(
            name=name,
            kind=_kind(module),
            weight_shape=tuple(weight.shape),
            params=sum(p.numel() for p in module.parameters()),
            macs=count // batch,
            tied_to=None if owner == name else owner,
        )


def first_output(output: Any) -> Tensor:
    """What a model answers, or the first of several things that it does."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first
