"""Attention blocks whose heads can only go whole: finds them and says what a head is; it decides nothing."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from compressors.channels import LINEAR_INPUTS, LINEAR_OUTPUTS, Edit, Group, Remove, sharing
from compressors.layers import hooked, read_layers

COUNTS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"),
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
)
"""Under these names blocks hold how many heads they have; the least is that of keys and values."""
SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
"""And how wide one of them is, which stays."""
WIDTHS = ("all_head_size", "embed_dim", "hidden_size", "inner_dim", "dim")
"""And how wide all of them are together; a value that is no layer's width means something else."""


@dataclass(frozen=True)
class Block:
    """An attention block: `group` counts in heads; it has the layers for queries, keys and values as members.

    A head's answer is a linear function of its rows in the layer `value`; the layer `reader` gets all answers.
    """

    group: Group
    value: str
    reader: str

    @property
    def layers(self) -> tuple[str, ...]:
        """All four, which lose what belongs to a head."""
        return (*self.group.members, self.reader)


@dataclass(frozen=True)
class _Site:
    """A module that may be a block of so many heads, as far as names and widths tell."""

    module: str
    members: tuple[str, ...]
    reader: str
    heads: int


def attention_blocks(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, Block]:
    """What looks like an attention block, by the layer called first, in the order of the calls; no cut was tried yet.

    It is a module with three linear layers of its own and what it says about heads, read by the linear layer that is
    called next; and that layer gets nothing but zeros when one of the three, and no other one, gives zeros.
    """
    order = [layer.name for layer in read_layers(model, example)]
    tied = sharing(model)
    sites = [site for name in dict(model.named_modules()) if (site := _site(name, model, order))]
    sites = [site for site in sites if not tied.intersection((*site.members, site.reader))]
    silent = [_silenced(model, sites, place, example) for place in range(3)] if sites else []
    found = []
    for site in sites:
        values = [layer for layer, readers in zip(site.members, silent, strict=True) if site.reader in readers]
        if len(values) == 1:
            found.append(_block(model, site, values[0], order.index(site.members[0])))
    return {block.group.owner: block for block in sorted(found, key=lambda block: block.group.position)}


def lively(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    """A copy in which these layers have random weights: what can be cut is up to the code and not to the weights.

    Before training, heads hardly tell positions apart, and a cut that mixes them would pass unseen.
    """
    scratch, generator = copy.deepcopy(model).eval().requires_grad_(False), torch.Generator().manual_seed(0)
    for layer in dict.fromkeys(layers):
        module = scratch.get_submodule(layer)
        scale = 2 / math.sqrt(module.get_parameter("weight").shape[1])
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return scratch


def _site(name: str, model: nn.Module, order: Sequence[str]) -> _Site | None:
    module = model.get_submodule(name)
    own = [f"{name}.{child}".lstrip(".") for child, part in module.named_children() if type(part) is nn.Linear]
    members = tuple(layer for layer in order if layer in own)[:3]
    behind = order[order.index(members[2]) + 1 :] if len(members) == 3 else []
    if not behind or type(model.get_submodule(behind[0])) is not nn.Linear:
        return None
    widths = [_width(model, layer, 0) for layer in members]
    heads = _heads(module, min(widths))
    whole = all(width % heads == 0 for width in (*widths, _width(model, behind[0], 1))) if heads > 1 else False
    return _Site(name, members, behind[0], heads) if whole else None


def _width(model: nn.Module, layer: str, axis: int) -> int:
    return model.get_parameter(f"{layer}.weight").shape[axis]


def _block(model: nn.Module, site: _Site, value: str, position: int) -> Block:
    weights = [_edit(layer, LINEAR_OUTPUTS, _width(model, layer, 0), site.heads) for layer in site.members]
    weights.append(_edit(site.reader, LINEAR_INPUTS, _width(model, site.reader, 1), site.heads))
    magnitudes = {name: _magnitudes(model, weights, site.heads, power) for name, power in (("l2", 2), ("l1", 1))}
    edits = (*weights, _told(model, site))
    return Block(Group(site.members, position, site.heads, magnitudes, edits), value, site.reader)


def _held(module: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Those of these whole numbers that the module itself holds; one that it works out is right anyway."""
    values = {name: vars(module).get(name) for name in names}
    return {name: value for name, value in values.items() if type(value) is int and value > 0}


def _heads(module: nn.Module, width: int) -> int:
    """How many key/value heads a module says it has, all of which are so wide; 1 if it says nothing."""
    said = [*_held(module, COUNTS).values(), *(width // size for size in _held(module, SIZES).values())]
    return min(said, default=1)


def _edit(layer: str, remove: Remove, width: int, heads: int) -> Edit:
    source = tuple(channel * heads // width for channel in range(width))
    return Edit(layer, remove, remove is LINEAR_INPUTS, width, tuple(range(width)), source)


def _told(model: nn.Module, site: _Site) -> Edit:
    """What the module says about its heads changes with their number."""
    module, widths = model.get_submodule(site.module), {_width(model, layer, 0) for layer in site.members}
    names = (*_held(module, COUNTS), *(name for name, width in _held(module, WIDTHS).items() if width in widths))
    return _edit(site.module, partial(_tell, names=names, heads=site.heads), site.heads, site.heads)


def _tell(module: nn.Module, gone: list[int], *, names: tuple[str, ...], heads: int) -> nn.Module:
    for name in names:
        setattr(module, name, getattr(module, name) * (heads - len(gone)) // heads)
    return module


def _magnitudes(model: nn.Module, edits: Sequence[Edit], heads: int, power: int) -> Tensor:
    """Of each head's weights in all layers, the sum of their sizes to this power."""
    total = torch.zeros(heads)
    for edit in edits:
        weight = model.get_parameter(f"{edit.layer}.weight").detach()
        total += (weight.T if edit.consumes else weight).abs().pow(power).reshape(heads, -1).sum(1)
    return total


@torch.no_grad()
def _silenced(model: nn.Module, sites: Sequence[_Site], place: int, example: tuple[Tensor, ...]) -> set[str]:
    """The readers that get nothing but zeros when the layer at this place gives zeros, in every site."""
    scratch = lively(model, (layer for site in sites for layer in (*site.members, site.reader)))
    for site in sites:
        for parameter in scratch.get_submodule(site.members[place]).parameters():
            parameter.zero_()
    heard: set[str] = set()

    def listen(reader: str, _module: nn.Module, given: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        if any(x.any() for x in (*given, *named.values())):
            heard.add(reader)

    readers = {site.reader: scratch.get_submodule(site.reader) for site in sites}
    with hooked(m.register_forward_pre_hook(partial(listen, r), with_kwargs=True) for r, m in readers.items()):
        scratch(*example)
    return set(readers) - heard
