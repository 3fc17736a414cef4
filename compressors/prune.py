"""Removes whole channels from tied groups of layers; it neither chooses how many nor recovers what they knew."""

import copy
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch_pruning as tp
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.layers import KINDS, read_layers
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Scalar, Settings, Step

Remove = Callable[[nn.Module, list[int]], nn.Module]


@dataclass(frozen=True)
class Prune:
    """Structured magnitude pruning (Li 2017, arXiv 1608.08710) of DepGraph's groups (Fang 2023, arXiv 2301.12900).

    The channels whose weights, over all layers of the group, have the smallest L2 norm go first. Unlike in DepGraph, a
    group is offered only after a trial has shown that its channels can go without changing anything else: widths under
    a layer or group norm, attention heads, tied weights and grouped convolutions stay whole. It does not help where
    the runtime pads narrow layers to full vectors: keep `align` at the width of its kernels.
    """

    method: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    off: ClassVar[tuple[str, Scalar]] = ("sparsity", 0.0)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers whose output channels are removed together; the first one called is the owner."""
        found = sorted(_trace(model, example), key=lambda group: group.position)
        return {group.owner: group.members for group in _removable(found, model, example)}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`sparsity` per group is the share of channels to remove, `align` the multiple that widths are rounded to."""
        align = _align(step.shared)
        known = {group.owner: group for group in _trace(model, context.example)}
        kept: dict[str, int] = {}
        cuts: list[_Cut] = []
        for owner, settings in step.per_layer.items():
            sparsity = _sparsity(owner, settings)
            group = _known(known, owner)
            kept[owner] = kept_channels(group.width, sparsity, align)
            cuts.append((group, frozenset(group.weakest[: group.width - kept[owner]])))
        _check([cut for cut in cuts if cut[1]], model, context.example)
        _remove(model, cuts)
        return Applied({o: {"sparsity": 1 - n / known[o].width, "channels": n} for o, n in kept.items()})

    def half(self, step: Step) -> Step | None:
        """Half the sparsity of every group."""
        halves = {owner: {**s, "sparsity": _sparsity(owner, s) / 2} for owner, s in step.per_layer.items()}
        return replace(step, per_layer=halves) if any(s["sparsity"] for s in halves.values()) else None

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What the removed channels were worth, without recovery; and how far every layer around them shrinks."""
        known = {group.owner: group for group in _trace(model, example)}
        return [_effect(_known(known, owner), owner, settings, fisher) for owner, settings in questions]


def kept_channels(width: int, sparsity: float, align: int) -> int:
    """How many of `width` channels stay: the nearest multiple of `align`, never none and never more than `width`."""
    if sparsity == 0:
        return width
    multiples = int(width * (1 - sparsity) / align + 0.5)
    return min(width, align * max(1, multiples))


def _effect(group: "_Group", owner: str, settings: Settings, fisher: Fisher) -> Effect:
    kept = kept_channels(group.width, _sparsity(owner, settings), _align(settings))
    removed = frozenset(group.weakest[: group.width - kept])
    shrunk: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for edit in group.edits:
        share = len(edit.channels(removed)) / edit.width
        shrunk[edit.consumes][edit.layer] = shrunk[edit.consumes].get(edit.layer, 1.0) - share
    return Effect(_gates(group, fisher, sorted(removed)), outputs=shrunk[False], inputs=shrunk[True])


def _gates(group: "_Group", fisher: Fisher, removed: Sequence[int]) -> float:
    """Where norms follow the layers, their scale and shift are the factor on the channel; else the weights are."""
    producers = [edit for edit in group.edits if not edit.consumes]
    norms = [edit for edit in producers if edit.layer not in group.members]
    parts = []
    for edit in norms or producers:
        channels = dict(zip(edit.source, edit.index, strict=True))
        names = (f"{edit.layer}.{name}" for name in ("weight", "bias"))
        parts += [(name, [channels[c] for c in removed]) for name in names if name in fisher.gates]
    return fisher.removal(parts)


def _align(shared: Settings) -> int:
    align = shared.get("align", 1)
    if not isinstance(align, int) or align < 1:
        raise Infeasible(f"prune.align is {align}: expected a whole number of channels, 1 or more")
    return align


def _sparsity(owner: str, settings: Settings) -> float:
    sparsity = settings["sparsity"]
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise Infeasible(f"prune.sparsity of {owner} is {sparsity}: expected a share from 0 up to but not including 1")
    return float(sparsity)


@dataclass(frozen=True)
class _Edit:
    """What happens to one side of one layer: its channel `index[i]` goes when the owner's channel `source[i]` goes."""

    layer: str
    remove: Remove
    consumes: bool
    width: int
    index: tuple[int, ...]
    source: tuple[int, ...]

    def channels(self, removed: Collection[int]) -> list[int]:
        return [index for index, source in zip(self.index, self.source, strict=True) if source in removed]


@dataclass(frozen=True)
class _Group:
    """Channels that can only go together; `weakest` lists the owner's channels, least important first."""

    members: tuple[str, ...]
    position: int
    width: int
    weakest: tuple[int, ...]
    edits: tuple[_Edit, ...]

    @property
    def owner(self) -> str:
        return self.members[0]


_Cut = tuple[_Group, frozenset[int]]
"""A group and the owner's channels that go."""


def _known(groups: Mapping[str, _Group], owner: str) -> _Group:
    if owner not in groups:
        raise Infeasible(f"prune has no group {owner}: possible are {', '.join(groups) or 'none'}")
    return groups[owner]


def _check(cuts: Sequence[_Cut], model: nn.Module, example: tuple[Tensor, ...]) -> None:
    if _harmless(cuts, model, example):
        return
    guilty = [cut for cut in cuts if not _harmless([cut], model, example)]
    owners = ", ".join(group.owner for group, _ in guilty or cuts)
    raise Infeasible(f"prune.sparsity of {owners} must be 0: the model does not work with fewer channels there")


def _trace(model: nn.Module, example: tuple[Tensor, ...]) -> list[_Group]:
    """All groups of plain layers, including those that turn out to be tied to the model's output shape."""
    order = {layer.name: position for position, layer in enumerate(read_layers(model, example))}
    scratch = copy.deepcopy(model).eval().requires_grad_(True)
    names = {module: name for name, module in scratch.named_modules()}
    graph = _graph(scratch, example)
    groups = [_read(group, graph, names, order) for group in graph.get_all_groups()] if graph else []
    shared = _shared(scratch)
    return [g for g in groups if g is not None and not shared.intersection(edit.layer for edit in g.edits)]


def _graph(model: nn.Module, example: tuple[Tensor, ...]) -> Any | None:
    """The dependency graph, or None where the tracer gives up on a model that runs: nothing can then be pruned."""
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            # It warns of shapes that it cannot infer; the trial of each group covers that.
            warnings.simplefilter("ignore", UserWarning)
            return tp.DependencyGraph().build_dependency(model, example, verbose=False)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None


def _read(group: Any, graph: Any, names: Mapping[nn.Module, str], order: Mapping[str, int]) -> _Group | None:
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
            edits.append(_Edit(names[module], remove, consumes, width, tuple(item.idxs), tuple(item.root_idxs)))
    members = sorted({e.layer for e in edits if e.layer in order and not e.consumes}, key=order.__getitem__)
    widths = {len(e.index) for e in edits if e.layer in members and not e.consumes}
    if len(widths) != 1 or widths == {1}:
        return None
    scores: Tensor = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)(group)
    weakest = tuple(torch.argsort(scores, stable=True).tolist())
    return _Group(tuple(members), order[members[0]], widths.pop(), weakest, tuple(edits))


def _plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1:
        return module.groups == module.in_channels == module.out_channels
    return type(module) in KINDS or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _shared(model: nn.Module) -> set[str]:
    """The modules that own a parameter together with another module."""
    owned = [(name, id(p)) for name, module in model.named_modules() for p in module.parameters(recurse=False)]
    uses = Counter(identity for _, identity in owned)
    return {name for name, identity in owned if uses[identity] > 1}


def _removable(groups: list[_Group], model: nn.Module, example: tuple[Tensor, ...]) -> list[_Group]:
    """The groups that stand a trial; they are tried together first, and halved for as long as a trial fails.

    Every third channel goes, which leaves a width that hardly any head or chunk divides.
    """
    if _harmless([(group, frozenset(range(0, group.width, 3))) for group in groups], model, example):
        return groups
    middle = len(groups) // 2
    halves = (groups[:middle], groups[middle:]) if middle else ()
    return [group for half in halves for group in _removable(half, model, example)]


def _harmless(cuts: Sequence[_Cut], model: nn.Module, example: tuple[Tensor, ...]) -> bool:
    """Whether a copy without the channels answers as a copy in which nobody reads them.

    Shapes alone would let a cut through that mixes attention heads.
    """
    unread, cut = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    _silence(unread, cuts)
    _remove(cut, cuts)
    try:
        with torch.no_grad():
            expected, output = _first(unread(*example)), _first(cut(*example))
    except (RuntimeError, ValueError, AssertionError, IndexError):
        return False
    # Fewer channels are summed in another order: equal to rounding only.
    tolerance = 1e-3 * float(expected.abs().max())
    return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-3, atol=tolerance)


def _first(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


@torch.no_grad()
def _silence(model: nn.Module, cuts: Iterable[_Cut]) -> None:
    """Make every reader of the channels ignore them."""
    for group, removed in cuts:
        for edit in group.edits:
            if edit.consumes:
                model.get_parameter(f"{edit.layer}.weight")[:, edit.channels(removed)] = 0


def _remove(model: nn.Module, cuts: Iterable[_Cut]) -> None:
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
