"""Trains the whole model until channels that it can do without do next to nothing; it removes none of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from compressors.channels import Edit, Group, removable, trace
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Settings, Step, digest
from compressors.recovery import Goal, Recovery, number, training, whole_epochs

ANSWERS: Settings = {"temperature": 4.0, "weight": 0.5}
"""Of the uncompressed model, from which it learns together with the labels, just as distillation does."""
IDLE = 0.1
"""A channel is idle whose strength is below this share of the largest one of its group."""
TINY = 1e-12


@dataclass(frozen=True)
class Slim(Recovery):
    """Network slimming (Liu 2017, arXiv 1708.06519): training with an L1 penalty on what norms scale channels by.

    Channels that the answers do not depend on fall silent, and `bn_scale` then finds what to prune, more surely than
    `l1` and `l2`. Only channels that can be removed are penalised, those that go together as one. Where no norm follows
    them, each counts with the length of all the weights that make it (group lasso, Wen 2016, arXiv 1608.03665).

    It differs from the paper in three ways. The trained model is trained on, for a few epochs and half towards its own
    first answers. The L1 norm is a share of the L2 norm (as in DeepHoyer, Yang 2020, arXiv 1908.09979), because by
    itself it was seen to let all scales of a layer fall alike, which the next norm undoes. And shifts count like
    scales, because what a silent channel still passes on is lost when it goes.

    All plans with the same settings prune the same slimmed model, which is trained once, in float32. Losses that are
    predicted for pruning know nothing of it. It does not help where recovery after pruning is long enough to even out
    what a choice of channels gains, nor where nothing but blocks are left out; and a large `penalty` takes accuracy.
    """

    method: ClassVar[str] = "slim"
    stage: ClassVar[Stage] = Stage.PREPARE

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`epochs`, the `penalty` on the `spread` of the channels, and `learning_rate`.

        A model none of whose channels can be removed is left as it is, with 0 `channels` in what is achieved; `idle`
        is the share of channels that hardly do anything. Raises `Infeasible` as soon as the loss is not finite.
        """
        epochs = whole_epochs(self.method, step.shared)
        if epochs == 0:
            return Applied({"": {"epochs": 0}})
        penalty = number(self.method, step.shared, "penalty", "more than 0", lambda value: value > 0)
        goal = Goal.read(self.method, {**step.shared, **ANSWERS}, context, half=False)
        groups = removable(trace(model, context.example), model, context.example)
        if not groups:
            return Applied({"": {"epochs": 0, "channels": 0}})
        with training(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(int(digest([seed, self.method]), 16))
            loss = self.train(
                [*model.parameters()],
                lambda batch: goal.loss(model, batch),
                goal.learning_rate,
                range(epochs),
                context,
                pulls=[lambda _batch: penalty * spread(model, groups)],
            )
        return Applied({"": {"epochs": epochs, "loss": loss, **_told(model, groups)}})


def spread(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """L1 by L2 norm of each group's strengths, summed: 1 where one channel does all, up to the root of the width."""
    return torch.stack([s.sum() / s.norm().clamp_min(TINY) for s in (strengths(model, g) for g in groups)]).sum()


def strengths(model: nn.Module, group: Group) -> Tensor:
    """How much each channel is scaled and shifted by all norms behind the group's layers, `(width,)`.

    Without a norm it is the length of the weights that make the channel, of all the layers together.
    """
    norms = [edit for edit in _producers(group) if edit.layer not in group.members and _scales(model, edit)]
    if norms:
        return sum((_summed(group, edit, _affine(model, edit)) for edit in norms), start=torch.zeros(group.width))
    layers = [edit for edit in _producers(group) if edit.layer in group.members]
    squares = sum((_summed(group, edit, _squares(model, edit)) for edit in layers), start=torch.zeros(group.width))
    # The root has no slope at zero.
    return squares.clamp_min(TINY).sqrt()


def _producers(group: Group) -> list[Edit]:
    return [edit for edit in group.edits if not edit.consumes]


def _summed(group: Group, edit: Edit, values: Tensor) -> Tensor:
    """Values of the layer's channels, each for the channel of the group that it goes with."""
    return torch.zeros(group.width).index_add(0, torch.tensor(edit.source), values[list(edit.index)])


def _scales(model: nn.Module, edit: Edit) -> bool:
    return model.get_submodule(edit.layer).weight is not None


def _affine(model: nn.Module, edit: Edit) -> Tensor:
    return sum(
        (p.abs() for p in model.get_submodule(edit.layer).parameters(recurse=False)), start=torch.zeros(edit.width)
    )


def _squares(model: nn.Module, edit: Edit) -> Tensor:
    return cast(Tensor, model.get_submodule(edit.layer).weight).flatten(1).square().sum(1)


def _told(model: nn.Module, groups: Sequence[Group]) -> Settings:
    with torch.no_grad():
        found = [strengths(model, group) for group in groups]
    idle = sum(int((strength < IDLE * strength.max()).sum()) for strength in found)
    channels = sum(map(len, found))
    return {"channels": channels, "idle": idle / channels}
