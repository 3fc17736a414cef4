"""Removes whole channels from tied groups of layers; it neither chooses how many nor recovers what they knew."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.channels import (
    MAGNITUDES,
    Cut,
    Group,
    harmless,
    lost_inputs,
    removable,
    remove_channels,
    trace,
)
from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question, diagonal_fisher
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Scalar, Settings, Step, digest
from compressors.reconstruction import reconstruct
from compressors.replace import one_thread
from compressors.sparsity import asked_sparsity, halved

CRITERIA = ("l2", "l1", "bn_scale", "taylor", "fisher", "random")
ON_DATA = ("taylor", "fisher")
ON_ONE_SCALE = ("bn_scale", *ON_DATA)
"""Scores of these mean the same in every group; of the others, only what they are relative to their group's mean."""
ALLOCATIONS = ("per_group", "global")


@dataclass(frozen=True)
class Prune:
    """Structured pruning (Li 2017, arXiv 1608.08710) of DepGraph's groups (Fang 2023, arXiv 2301.12900).

    Unlike in DepGraph, a group is offered only after a trial has shown that its channels can go without changing
    anything else: widths under a layer or group norm, attention heads, tied weights and grouped convolutions stay
    whole. It does not help where the runtime pads narrow layers to full vectors: keep `align` at the width of its
    kernels.

    Which channels go first, `criterion` says: those whose weights, over all layers of the group, have the smallest L2
    norm (`l2`) or L1 norm (`l1`); whose batch norms scale them least (`bn_scale`, network slimming, Liu 2017, arXiv
    1708.06519, whose penalty in training is a method of its own; groups that no batch norm follows go by `l2` instead,
    which is then told with what they achieved); whose removal changes the loss least, to first order
    (`taylor`, Molchanov 2019, arXiv 1906.10771) or by the Fisher information (`fisher`, Theis 2018, arXiv 1801.05787),
    both on 32 calibration examples; or any (`random`), which shows what a criterion is worth. Without labels `taylor`
    is its own expectation over the model's answers, which is `fisher`. These two do not help a network that is sure of
    nearly every example, as its gradients say little; and recovery evens out most of what a criterion gains.

    With the `allocation` global, the groups that a plan names lose together as many channels as their shares come to,
    but the weakest of all, wherever they are: with 0.5 for the whole model, those below its median.

    With `reconstruct`, the layers that read the channels first take what those that stay say of those that go into
    their weights, see `compressors.reconstruction`. It helps wherever channels say much the same, and most where little
    or no training follows.
    """

    method: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    off: ClassVar[tuple[str, Scalar]] = ("sparsity", 0.0)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers whose output channels are removed together; the first one called is the owner."""
        found = sorted(trace(model, example), key=lambda group: group.position)
        return {group.owner: group.members for group in removable(found, model, example)}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`sparsity` per group is the share of channels to remove, `align` the multiple that widths are rounded to.

        `criterion` is one of `CRITERIA`, `allocation` one of `ALLOCATIONS`; without them, the first. `reconstruct` is
        true or false.
        """
        ask = _Ask.read(step.shared)
        shares = {owner: asked_sparsity("prune", owner, settings) for owner, settings in step.per_layer.items()}
        groups = _named(trace(model, context.example), shares)
        asked = {owner: share for owner, share in shares.items() if share > 0}
        scores = deciding = _judged(model, {owner: groups[owner] for owner in asked}, ask, context, seed)
        if ask.allocation == "global":
            # By the model before any cut: training between two cuts must not change the shape that a plan stands for.
            whole = _named(trace(context.whole, context.example), asked)
            deciding = _judged(context.whole, whole, ask, context, seed)
        used = {owner: _criterion(groups[owner], ask) for owner in asked}
        kept = {owner: group.width for owner, group in groups.items()} | _kept(ask, asked, deciding, used)
        cuts = [(groups[owner], _weakest(scores[owner], kept[owner])) for owner in asked]
        _check([cut for cut in cuts if cut[1]], model, context.example)
        if ask.reconstruct:
            with one_thread():
                reconstruct(model, lost_inputs(cuts), context, seed)
        remove_channels(model, cuts)
        achieved: dict[str, Settings] = {}
        for owner, channels in kept.items():
            other = used.get(owner, ask.criterion)
            told: Settings = {} if other == ask.criterion else {"criterion": other}
            achieved[owner] = {"sparsity": 1 - channels / groups[owner].width, "channels": channels, **told}
        return Applied(achieved)

    def half(self, step: Step) -> Step | None:
        """Half the sparsity of every group."""
        return halved(step)

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What the removed channels were worth, without recovery; and how far every layer around them shrinks.

        `random` is predicted for the seed 0, and the allocation `global` as it turns out when all groups that are asked
        about have the same setting.
        """
        known = trace(model, example)
        alike: dict[_Key, list[str]] = {}
        for owner, settings in questions:
            alike.setdefault(_key(settings), []).append(owner)
        found = {key: _effects(model, _named(known, owners), dict(key), fisher) for key, owners in alike.items()}
        return [found[_key(settings)][owner] for owner, settings in questions]


def kept_channels(width: int, sparsity: float, align: int) -> int:
    """How many of `width` channels stay: the nearest multiple of `align`, never none and never more than `width`."""
    if sparsity == 0:
        return width
    multiples = int(width * (1 - sparsity) / align + 0.5)
    return min(width, align * max(1, multiples))


def weakest_of_all(scores: Mapping[str, Tensor], shares: Mapping[str, float]) -> dict[str, float]:
    """What share each group loses when as many channels go as by `shares`, but the weakest ones, wherever they are.

    `scores` `(width,)` must be comparable; of equal ones those of earlier groups go first.
    """
    widths = [len(scores[owner]) for owner in shares]
    count = round(sum(share * width for share, width in zip(shares.values(), widths, strict=True)))
    home = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths))
    order = torch.cat([scores[owner] for owner in shares]).argsort(stable=True)
    lost = torch.bincount(home[order[:count]], minlength=len(widths)).tolist()
    return {owner: n / width for owner, n, width in zip(shares, lost, widths, strict=True)}


@dataclass(frozen=True)
class _Ask:
    """The settings that all groups share."""

    align: int
    criterion: str
    allocation: str
    reconstruct: bool

    @classmethod
    def read(cls, shared: Settings) -> "_Ask":
        align = shared.get("align", 1)
        if not isinstance(align, int) or align < 1:
            raise Infeasible(f"prune.align is {align}: expected a whole number of channels, 1 or more")
        reconstruct = shared.get("reconstruct", False)
        if not isinstance(reconstruct, bool):
            raise Infeasible(f"prune.reconstruct is {reconstruct}: expected true or false")
        criterion, allocation = _one_of("criterion", CRITERIA, shared), _one_of("allocation", ALLOCATIONS, shared)
        return cls(align, criterion, allocation, reconstruct)


def _one_of(key: str, possible: Sequence[str], shared: Settings) -> str:
    value = shared.get(key, possible[0])
    if value not in possible:
        raise Infeasible(f"prune.{key} is {value}: expected one of {', '.join(possible)}")
    return str(value)


_Key = tuple[tuple[str, Scalar], ...]


def _key(settings: Settings) -> _Key:
    return tuple(sorted(settings.items()))


def _named(groups: Iterable[Group], owners: Iterable[str]) -> dict[str, Group]:
    known = {group.owner: group for group in groups}
    for owner in owners:
        if owner not in known:
            raise Infeasible(f"prune has no group {owner}: possible are {', '.join(known) or 'none'}")
    return {owner: known[owner] for owner in owners}


def _judged(model: nn.Module, groups: Mapping[str, Group], ask: _Ask, context: Context, seed: int) -> dict[str, Tensor]:
    """The scores of each group's channels."""
    with one_thread():
        fisher = diagonal_fisher(model, context.calibration(), loss=context.loss) if ask.criterion in ON_DATA else None
        return {o: _scores(model, group, _criterion(group, ask), fisher, seed) for o, group in groups.items()}


def _criterion(group: Group, ask: _Ask) -> str:
    """By what a group is judged: `l2` where batch norms have no say."""
    known = ask.criterion not in MAGNITUDES or ask.criterion in group.magnitudes
    return ask.criterion if known else "l2"


def _scores(model: nn.Module, group: Group, criterion: str, fisher: Fisher | None, seed: int) -> Tensor:
    """How much each channel matters `(width,)`; `fisher` is there for the criteria that need it."""
    if criterion == "random":
        return torch.rand(group.width, generator=torch.Generator().manual_seed(int(digest([seed, group.owner]), 16)))
    if fisher is not None and criterion in ON_DATA:
        parts = _factors(group, fisher, range(group.width))
        first_order = criterion == "taylor" and fisher.slopes
        return _first_order(model, fisher, parts) if first_order else fisher.removals(parts)
    return group.magnitudes[criterion]


def _factors(group: Group, fisher: Fisher, channels: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Where norms follow the layers, their scale and shift are the factor on the channel; else the weights are."""
    producers = [edit for edit in group.edits if not edit.consumes]
    norms = [edit for edit in producers if edit.layer not in group.members]
    parts = []
    for edit in norms or producers:
        index = dict(zip(edit.source, edit.index, strict=True))
        names = (f"{edit.layer}.{name}" for name in ("weight", "bias"))
        parts += [(name, [index[c] for c in channels]) for name in names if name in fisher.gates]
    return parts


def _first_order(model: nn.Module, fisher: Fisher, parts: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
    """The square of how much the loss changes, were it linear, when a channel goes."""
    pulls = torch.zeros(1)
    for name, channels in parts:
        pull = fisher.slopes[name] * model.get_parameter(name).detach()
        pulls = pulls + pull.reshape(len(pull), -1).sum(1)[list(channels)]
    return pulls.square()


def _kept(
    ask: _Ask, shares: Mapping[str, float], scores: Mapping[str, Tensor], used: Mapping[str, str]
) -> dict[str, int]:
    if ask.allocation == "global" and shares:
        tiny = torch.finfo(torch.float32).tiny
        comparable = set(used.values()) <= set(ON_ONE_SCALE)
        relative = scores if comparable else {o: s / s.mean().clamp_min(tiny) for o, s in scores.items()}
        shares = weakest_of_all(relative, shares)
    return {owner: kept_channels(len(scores[owner]), share, ask.align) for owner, share in shares.items()}


def _weakest(scores: Tensor, kept: int) -> frozenset[int]:
    return frozenset(scores.argsort(stable=True)[: len(scores) - kept].tolist())


def _check(cuts: Sequence[Cut], model: nn.Module, example: tuple[Tensor, ...]) -> None:
    if harmless(cuts, model, example):
        return
    guilty = [cut for cut in cuts if not harmless([cut], model, example)]
    owners = ", ".join(group.owner for group, _ in guilty or cuts)
    raise Infeasible(f"prune.sparsity of {owners} must be 0: the model does not work with fewer channels there")


def _effects(model: nn.Module, groups: Mapping[str, Group], settings: Settings, fisher: Fisher) -> dict[str, Effect]:
    """What comes of it when all these groups have the same settings."""
    ask, shares = _Ask.read(settings), {owner: asked_sparsity("prune", owner, settings) for owner in groups}
    if not any(shares.values()):
        return {owner: _effect(group, frozenset(), fisher) for owner, group in groups.items()}
    used = {owner: _criterion(group, ask) for owner, group in groups.items()}
    scores = {owner: _scores(model, group, used[owner], fisher, 0) for owner, group in groups.items()}
    kept = _kept(ask, shares, scores, used)
    return {o: _effect(group, _weakest(scores[o], kept[o]), fisher) for o, group in groups.items()}


def _effect(group: Group, removed: frozenset[int], fisher: Fisher) -> Effect:
    shrunk: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for edit in group.edits:
        share = len(edit.channels(removed)) / edit.width
        shrunk[edit.consumes][edit.layer] = shrunk[edit.consumes].get(edit.layer, 1.0) - share
    loss = fisher.removal(_factors(group, fisher, sorted(removed)))
    return Effect(loss, outputs=shrunk[False], inputs=shrunk[True])
