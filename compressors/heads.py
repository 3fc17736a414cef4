"""Removes whole heads from attention blocks; it neither chooses how many nor recovers what they knew."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.attention import Block, attention_blocks, lively
from compressors.channels import Cut, harmless, removable, remove_channels
from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question, diagonal_fisher
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Scalar, Settings, Step, digest
from compressors.replace import one_thread
from compressors.sparsity import asked_sparsity, halved

CRITERIA = ("fisher", "taylor", "l2", "l1", "random")
ON_DATA = ("fisher", "taylor")


@dataclass(frozen=True)
class Heads:
    """Attention heads leave together with all that only they read and write (Michel 2019, arXiv 1905.10650).

    A block is a module with linear layers for queries, keys and values, read by the linear layer that is called next,
    which tells the number of its heads or their width in one of the usual attributes. A key/value head takes the query
    heads that share it along, and is counted as one head. A block is offered only after a trial, as in structured
    pruning, and the last head of a block stays. Blocks with one layer for queries, keys and values stay whole, and so
    do those with one key/value head for all queries, with heads that other blocks reckon with (the position bias of T5)
    or with a number of heads that is written into the code.

    It does not help where attention is a small part of the work: in short sequences most of it is in the feed-forward
    layers, whose neurons structured pruning removes. With few heads in a block each is a large step.

    Which heads go first, `criterion` says: those whose removal changes the loss least by the Fisher information
    (`fisher`) or to first order (`taylor`, Michel's mask), both on 32 calibration examples; those whose weights in all
    layers of the block have the smallest L2 norm (`l2`) or L1 norm (`l1`); or any (`random`), which shows what a
    criterion is worth. Without labels `taylor` is `fisher`.
    """

    method: ClassVar[str] = "heads"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    off: ClassVar[tuple[str, Scalar]] = ("sparsity", 0.0)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers for queries, keys and values of one block; the first one called is the owner."""
        blocks = attention_blocks(model, example).values()
        offered = removable([block.group for block in blocks], _lively(model, blocks), example) if blocks else []
        return {group.owner: group.members for group in offered}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`sparsity` per block is the share of heads to remove, `criterion` one of `CRITERIA`, or else the first."""
        criterion = _criterion(step.shared)
        shares = {owner: asked_sparsity("heads", owner, settings) for owner, settings in step.per_layer.items()}
        blocks = _named(attention_blocks(model, context.example), shares)
        asked = {owner: block for owner, block in blocks.items() if shares[owner] > 0}
        scores = _judged(model, asked, criterion, context, seed)
        cuts = [(block.group, _weakest(scores[owner], shares[owner])) for owner, block in asked.items()]
        _check([cut for cut in cuts if cut[1]], _lively(model, asked.values()), context.example)
        remove_channels(model, cuts)
        kept = {o: block.group.width for o, block in blocks.items()} | {g.owner: g.width - len(n) for g, n in cuts}
        return Applied({o: {"sparsity": 1 - n / blocks[o].group.width, "heads": n} for o, n in kept.items()})

    def half(self, step: Step) -> Step | None:
        """Half the sparsity of every block."""
        return halved(step)

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What the removed heads were worth, without recovery; and how far the layers of their block shrink.

        `random` is predicted for the seed 0.
        """
        blocks = _named(attention_blocks(model, example), [owner for owner, _ in questions])
        return [_effect(model, blocks[owner], settings, fisher) for owner, settings in questions]


def _criterion(shared: Settings) -> str:
    criterion = shared.get("criterion", CRITERIA[0])
    if criterion not in CRITERIA:
        raise Infeasible(f"heads.criterion is {criterion}: expected one of {', '.join(CRITERIA)}")
    return str(criterion)


def _named(blocks: Mapping[str, Block], owners: Iterable[str]) -> dict[str, Block]:
    for owner in owners:
        if owner not in blocks:
            raise Infeasible(f"heads has no attention block {owner}: possible are {', '.join(blocks) or 'none'}")
    return {owner: blocks[owner] for owner in owners}


def _judged(
    model: nn.Module, blocks: Mapping[str, Block], criterion: str, context: Context, seed: int
) -> dict[str, Tensor]:
    """The scores of each block's heads."""
    with one_thread():
        on_data = criterion in ON_DATA and blocks
        fisher = diagonal_fisher(model, context.calibration(), loss=context.loss) if on_data else None
        return {owner: _scores(model, block, criterion, fisher, seed) for owner, block in blocks.items()}


def _scores(model: nn.Module, block: Block, criterion: str, fisher: Fisher | None, seed: int) -> Tensor:
    """How much each head matters `(heads,)`; `fisher` is there for the criteria that need it."""
    group = block.group
    if criterion == "random":
        return torch.rand(group.width, generator=torch.Generator().manual_seed(int(digest([seed, group.owner]), 16)))
    if fisher is not None and criterion in ON_DATA:
        first_order = criterion == "taylor" and fisher.slopes
        return _first_order(model, block, fisher) if first_order else _removals(block, fisher)
    return group.magnitudes[criterion]


def _factors(block: Block, fisher: Fisher) -> list[str]:
    """The parameters that a factor on a head's answer could as well be applied to."""
    return [name for name in (f"{block.value}.weight", f"{block.value}.bias") if name in fisher.gates]


def _removals(block: Block, fisher: Fisher) -> Tensor:
    """Predicted rise of the loss when a head falls silent."""
    heads = block.group.width
    rows = fisher.gates[f"{block.value}.weight"].shape[1]
    # Of every head the first row, of every head the second one, ...: they all share its factor.
    alike = [range(first, rows, rows // heads) for first in range(rows // heads)]
    return fisher.removals([(name, channels) for name in _factors(block, fisher) for channels in alike])


def _first_order(model: nn.Module, block: Block, fisher: Fisher) -> Tensor:
    """The square of how much the loss changes, were it linear, when a head falls silent."""
    pulls = torch.zeros(block.group.width)
    for name in _factors(block, fisher):
        pulls += (fisher.slopes[name] * model.get_parameter(name).detach()).reshape(len(pulls), -1).sum(1)
    return pulls.square()


def _weakest(scores: Tensor, sparsity: float) -> frozenset[int]:
    """The heads that go: the nearest number of them, and never all."""
    kept = max(1, int(len(scores) * (1 - sparsity) + 0.5))
    return frozenset(scores.argsort(stable=True)[: len(scores) - kept].tolist())


def _lively(model: nn.Module, blocks: Iterable[Block]) -> nn.Module:
    return lively(model, (layer for block in blocks for layer in block.layers))


def _check(cuts: Sequence[Cut], model: nn.Module, example: tuple[Tensor, ...]) -> None:
    if harmless(cuts, model, example):
        return
    guilty = [cut for cut in cuts if not harmless([cut], model, example)]
    owners = ", ".join(group.owner for group, _ in guilty or cuts)
    raise Infeasible(f"heads.sparsity of {owners} must be 0: the model does not work with fewer heads there")


def _effect(model: nn.Module, block: Block, settings: Settings, fisher: Fisher) -> Effect:
    group = block.group
    scores = _scores(model, block, _criterion(settings), fisher, seed=0)
    gone = sorted(_weakest(scores, asked_sparsity("heads", group.owner, settings)))
    left = 1 - len(gone) / group.width
    loss = float(_removals(block, fisher)[gone].sum())
    return Effect(loss, outputs=dict.fromkeys(group.members, left), inputs={block.reader: left})
