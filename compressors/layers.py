"""Reads the weighted layers of a model once, before anything is done to it."""

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

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
    names = {module: name for name, module in model.named_modules() if type(module) in KINDS}
    macs: dict[str, int] = {}

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        macs[names[module]] = macs.get(names[module], 0) + _macs(module, output)

    handles = [module.register_forward_hook(count) for module in names]
    with torch.no_grad():
        model(*example)
    for handle in handles:
        handle.remove()
    return tuple(_specs(model, macs, batch=len(example[0])))


def weight_groups(layers: Iterable[LayerSpec]) -> dict[str, tuple[str, ...]]:
    """Owner -> the layers that hold its weight tensor, itself first."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault(layer.tied_to or layer.name, []).append(layer.name)
    return {owner: tuple(members) for owner, members in groups.items()}


def _macs(module: nn.Module, output: Tensor) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    weight = module.get_parameter("weight")
    return output.numel() * weight[0].numel()


def _specs(model: nn.Module, macs: dict[str, int], batch: int) -> Iterator[LayerSpec]:
    owners: dict[int, str] = {}
    for name, count in macs.items():
        module = model.get_submodule(name)
        weight = module.get_parameter("weight")
        owner = owners.setdefault(id(weight), name)
        yield LayerSpec(
            name=name,
            kind=KINDS[type(module)],
            weight_shape=tuple(weight.shape),
            params=sum(p.numel() for p in module.parameters()),
            macs=count // batch,
            tied_to=None if owner == name else owner,
        )
