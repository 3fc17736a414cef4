"""Channels that can only go together: finds the groups, tries them and removes; it decides nothing."""

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compressors.layers import KINDS, first_output, read_layers

Remove = Callable[[nn.Module, list[int]], nn.Module]
LINEAR_OUTPUTS: Remove = tp.prune_linear_out_channels
LINEAR_INPUTS: Remove = tp.prune_linear_in_channels

MAGNITUDES: Mapping[str, Callable[[Any], Tensor | None]] = {
    "l2": tp.importance.GroupMagnitudeImportance(p=2, normalizer=None),
    "l1": tp.importance.GroupMagnitudeImportance(p=1, normalizer=None),
    "bn_scale": tp.importance.BNScaleImportance(normalizer=None),
}
"""What the weights alone say of a group's channels; None where it has nothing of the kind."""


@dataclass(frozen=True)
class Edit:
    """What happens to one side of one layer: its channel `index[i]` goes when the owner's channel `source[i]` goes."""

    layer: str
    remove: Remove
    consumes: bool
    width: int
    index: tuple[int, ...]
    source: tuple[int, ...]

    def channels(self, removed: Collection[int]) -> list[int]:
        """Which channels of this side go when these of the owner go."""
        return [index for index, source in zip(self.index, self.source, strict=True) if source in removed]


@dataclass(frozen=True)
class Group:
    """Channels that can only go together; `magnitudes` has `(width,)` scores of the owner's channels by criterion.

    A unit of `width` is whatever an edit's `source` counts: several channels of a layer may go with one of the owner.
    """

    members: tuple[str, ...]
    position: int
    width: int
    magnitudes: Mapping[str, Tensor]
    edits: tuple[Edit, ...]

    @property
    def owner(self) -> str:
        """The member that is called first gives the group its name."""
        return self.members[0]


Cut = tuple[Group, frozenset[int]]
"""A group and the owner's channels that go."""


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> list[Group]:
    """All groups of plain layers, including those that turn out to be tied to the model's output shape."""
    order = {layer.name: position for position, layer in enumerate(read_layers(model, example))}
    scratch = copy.deepcopy(model).eval().requires_grad_(True)
    names = {module: name for name, module in scratch.named_modules()}
    graph = _graph(scratch, example)
    groups = [_read(group, graph, names, order) for group in graph.get_all_groups()] if graph else []
    shared = sharing(scratch)
    return [g for g in groups if g is not None and not shared.intersection(edit.layer for edit in g.edits)]


def _graph(model: nn.Module, example: tuple[Tensor, ...]) -> Any | None:
    """The dependency graph, or None where the tracer gives up on a model that runs: nothing can then be pruned."""
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            # It warns of shapes that it cannot infer; the trial of each group covers that.
            warnings.simplefilter("ignore", UserWarning)
            graph = tp.DependencyGraph().build_dependency(model, example, verbose=False)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    _bound(graph, widest=max((size for p in model.parameters() for size in p.shape), default=0))
    return graph


def _bound(graph: Any, widest: int) -> None:
    """Let no index grow beyond the widest layer.

    Where a part of a tensor is concatenated with the rest of it, as in rotary position embeddings, the tracer would
    follow its channels round and round, with larger indices every time.
    """
    for node in graph.module2node.values():
        for dependency in node.dependencies:
            dependency.index_mapping.append(lambda indices: [index for index in indices if index.idx < widest])


def _read(group: Any, graph: Any, names: Mapping[nn.Module, str], order: Mapping[str, int]) -> Group | None:
    """Our own record of a torch-pruning group, or None when it holds anything but plain layers of one width."""
    edits = []
    for item in group:
        module, remove = item.dep.target.module, item.dep.handler
        if isinstance(module, nn.Parameter) or (module in names and not _plain(module)):
            return None
        if module in names:
            consumes = not graph.is_out_channel_pruning_fn(remove)
            # An operation unknown to the tracer passes for one that keeps the width, and indices then point nowhere.
            width = graph.get_in_channels(module) if consumes else graph.get_out_channels(module)
            if max(item.idxs) >= width:
                return None
            edits.append(Edit(names[module], remove, consumes, width, tuple(item.idxs), tuple(item.root_idxs)))
    members = sorted({e.layer for e in edits if e.layer in order and not e.consumes}, key=order.__getitem__)
    widths = {len(e.index) for e in edits if e.layer in members and not e.consumes}
    if len(widths) != 1 or widths == {1}:
        return None
    scores = {name: measure(group) for name, measure in MAGNITUDES.items()}
    magnitudes = {name: found for name, found in scores.items() if found is not None}
    return Group(tuple(members), order[members[0]], widths.pop(), magnitudes, tuple(edits))


def _plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1:
        return module.groups == module.in_channels == module.out_channels
    return type(module) in KINDS or isinstance(module, nn.modules.batchnorm._BatchNorm)


def sharing(model: nn.Module) -> set[str]:
    """The modules that own a parameter together with another module."""
    owned = [(name, id(p)) for name, module in model.named_modules() for p in module.parameters(recurse=False)]
    uses = Counter(identity for _, identity in owned)
    return {name for name, identity in owned if uses[identity] > 1}


def removable(groups: list[Group], model: nn.Module, example: tuple[Tensor, ...]) -> list[Group]:
    """The groups that stand a trial; they are tried together first, and halved for as long as a trial fails.

    Every third channel goes, which leaves a width that hardly any head or chunk divides.
    """
    if harmless([(group, frozenset(range(0, group.width, 3))) for group in groups], model, example):
        return groups
    middle = len(groups) // 2
    halves = (groups[:middle], groups[middle:]) if middle else ()
    return [group for half in halves for group in removable(half, model, example)]


def harmless(cuts: Sequence[Cut], model: nn.Module, example: tuple[Tensor, ...]) -> bool:
    """Whether a copy without the channels answers as a copy in which nobody reads them.

    Shapes alone would let a cut through that mixes attention heads.
    """
    unread, cut = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    _silence(unread, cuts)
    remove_channels(cut, cuts)
    try:
        with torch.no_grad():
            expected, output = first_output(unread(*example)), first_output(cut(*example))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False
    # Fewer channels are summed in another order: equal to rounding only.
    tolerance = 1e-3 * float(expected.abs().max())
    return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-3, atol=tolerance)


@torch.no_grad()
def _silence(model: nn.Module, cuts: Iterable[Cut]) -> None:
    """Make every reader of the channels ignore them."""
    for layer, channels in lost_inputs(cuts).items():
        model.get_parameter(f"{layer}.weight")[:, sorted(channels)] = 0


def lost_inputs(cuts: Iterable[Cut]) -> dict[str, set[int]]:
    """Reader of the channels -> its inputs that go."""
    lost: dict[str, set[int]] = defaultdict(set)
    for group, removed in cuts:
        for edit in group.edits:
            if edit.consumes:
                lost[edit.layer].update(edit.channels(removed))
    return lost


def remove_channels(model: nn.Module, cuts: Iterable[Cut]) -> None:
    """Remove channels from several groups at once, so that every index means what it meant in the uncut model."""
    going: dict[tuple[str, Remove], set[int]] = defaultdict(set)
    for group, removed in cuts:
        for edit in group.edits:
            going[edit.layer, edit.remove].update(edit.channels(removed))
    for (layer, remove), channels in going.items():
        if channels:
            module = model.get_submodule(layer)
            flags = [p.requires_grad for p in module.parameters(recurse=False)]
            remove(module, sorted(channels))
            for parameter, flag in zip(module.parameters(recurse=False), flags, strict=True):
                parameter.requires_grad_(flag)
