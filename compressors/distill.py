"""Trains a changed model to answer as the uncompressed one does; it never touches the shape of anything."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import ConfigError, Infeasible, at_least
from compressors.matching import FORMS, Match
from compressors.mutual import learning_together, peer_of
from compressors.pipeline import Applied, Batch, Context, loss_after
from compressors.plan import Settings, Step, digest
from compressors.precision import check_precision, in_bf16
from compressors.recovery import Goal, Recovery, checked, number, training, whole_epochs

NONE = "none"
ASSISTANTS = (NONE, "half")
PEERS = (NONE, "mutual")
FITTED_EXAMPLES = 64
"""Of the first calibration batch, what student and teacher are compared on before they learn."""


@dataclass(frozen=True)
class Distill(Recovery):
    """Knowledge distillation from the uncompressed model's logits; no help to a model that has lost nothing.

    It trains in rounds that end after `first_round` epochs, twice as many, four times as many and so on; the last one
    is cut short. Each begins with a fresh optimizer (SGDR with doubling periods, Loshchilov 2017, arXiv 1608.03983), so
    that more epochs of one plan go on where fewer ended. Unlike in SGDR, the learning rate of a round rises linearly
    over its first `warmup` share of steps before it falls along half a cosine. With `precision` bf16, convolutions and
    matrix products are computed in bfloat16, which `auto` takes where it is faster (compressors/precision.py).

    With `match`, what the models make of a batch inside is compared too (compressors/matching.py), `match_weight` times
    as much. The teacher's insides are not remembered: it computes every batch anew. What learns with the student
    is fitted anew when a round begins and thrown away when it ends.

    With `assistant` half, the teacher is a model from which about half as much was taken, and which learned from the
    uncompressed one in the same way (Mirzadeh 2020, arXiv 1902.03393). It is trained first, which costs as much again
    unless another plan needed it, and helps only where the uncompressed model is too far away to be followed.

    With `peer` mutual, another student with the same structure and other weights learns beside it, and both learn from
    each other as well (compressors/mutual.py). It begins every round as a disturbed copy of the student, is thrown away
    when the round ends, and costs as much training again. It does not help where both follow a good teacher and have
    little to tell each other: on the small nets of the tests it brought nothing that could be measured.

    With `weight` 0 the labels alone count: plain supervised fine-tuning, for when the uncompressed model is no good
    example.

    `parent` has the settings with which a model is trained whose blocks were left out, before its channels go as well:
    cut in two steps it recovers in fewer epochs than cut at once, and all children of one parent share the first ones.
    """

    first_round: int
    precision: str = "auto"
    parent: Settings | None = None

    method: ClassVar[str] = "distill"

    def __post_init__(self) -> None:
        """Refuses rounds without an epoch as well, unknown precisions, and a parent that cannot be trained."""
        super().__post_init__()
        at_least(1, **{"compressor.distill.first_round": self.first_round})
        check_precision("compressor.distill.precision", self.precision)
        if self.parent is not None:
            try:
                checked(self.method, self.parent)
                _matching(self.parent)
                _has_peer(self.parent)
                if self.parent.get("assistant", NONE) != NONE:
                    # It would be made of whichever child comes first.
                    raise Infeasible("distill.assistant of a parent: expected none")
            except Infeasible as infeasible:
                raise ConfigError("compressor.distill.parent", infeasible.reason, "correct it, or null") from None

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`epochs`, `temperature`, `weight` of the teacher's term (the labels get the rest) and `learning_rate`.

        A `match` and its `match_weight` may be added, a `peer`, and an `assistant`, which `context` then has for a
        teacher. Raises `Infeasible` as soon as the loss is not finite. The model is in eval mode afterwards.
        """
        since: Step | None = None
        for end in self.rounds(step):
            applied = self.advance(model, end, since, context, seed)
            since = end
        return applied

    def rounds(self, step: Step) -> tuple[Step, ...]:
        """The same step with fewer `epochs`, as each round ends, and itself."""
        epochs = whole_epochs(self.method, step.shared)
        ends = takewhile(lambda end: end < epochs, (self.first_round << doublings for doublings in count()))
        return (*(replace(step, shared={**step.shared, "epochs": end}) for end in ends), step)

    def between(self) -> Step | None:
        """The parent's training."""
        return None if self.parent is None else Step(self.method, {}, dict(self.parent))

    def assistant(self, step: Step) -> Step | None:
        """Trained just as the student, so it grows from round to round as well."""
        asked = step.shared.get("assistant", NONE)
        if asked not in ASSISTANTS:
            raise Infeasible(f"distill.assistant is {asked}: expected one of {', '.join(ASSISTANTS)}")
        shared = {key: value for key, value in step.shared.items() if key != "assistant"}
        return None if asked == NONE else replace(step, shared=shared)

    def advance(self, model: nn.Module, step: Step, since: Step | None, context: Context, seed: int) -> Applied:
        """One round; its order of the data comes from `seed` and from the epoch in which it begins."""
        done, epochs = (0 if end is None else whole_epochs(self.method, end.shared) for end in (since, step))
        (form, weight), mutual = _matching(step.shared), _has_peer(step.shared)
        assisted: Settings = {"assistant": "half"} if self.assistant(step) else {}
        if epochs == 0:
            return Applied({"": {"epochs": 0}})
        goal = Goal.read(self.method, step.shared, context, in_bf16(self.precision, model))
        match = FORMS[form](_with_batch_statistics(model), context.teacher, _few(context)) if form != NONE else None
        lesson = int(digest([seed, done]), 16)
        peer = peer_of(model, lesson) if mutual else None
        with training(model), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(lesson)
            loss = self._train(model, goal, match, weight, peer, range(done, epochs), context)
        told: Settings = {"epochs": epochs, "loss": loss, loss_after(epochs): loss}
        matched: Settings = {"match": form, "match_weight": weight, "matched": len(match.places)} if match else {}
        paired: Settings = {"peer": "mutual"} if peer else {}
        return Applied({"": {**told, **matched, **paired, **assisted}})

    def _train(
        self,
        model: nn.Module,
        goal: Goal,
        match: Match | None,
        weight: float,
        peer: nn.Module | None,
        epochs: range,
        context: Context,
    ) -> float:
        """The mean loss of the last epoch, without what is matched or a peer's, so that plans can be compared by it."""
        learning, asking, pulls = [*model.parameters()], goal, list[Callable[[Batch], Tensor]]()
        others = [] if peer is None else [*peer.parameters()]
        with ExitStack() as stack:
            if match is not None:
                # What was remembered of the teacher are its answers, not how it came to them.
                asking = replace(goal, teacher=context.teacher)
                distance = stack.enter_context(match.watching(model, context.teacher))
                pulls.append(lambda _batch: weight * distance())
                learning += match.parameters
            if peer is not None:
                pulls.append(stack.enter_context(learning_together(model, peer, goal)))
            return self.train(
                learning, lambda batch: asking.loss(model, batch), goal.learning_rate, epochs, context, pulls, others
            )


def _with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy whose features are scaled as in training: those that a cut model's norms remember are of no use to it."""
    student = copy.deepcopy(model).eval()
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return student


def _few(context: Context) -> tuple[Tensor, ...]:
    inputs, _ = next(iter(context.calibration()))
    return tuple(x[:FITTED_EXAMPLES] for x in inputs)


def _matching(settings: Settings) -> tuple[str, float]:
    """The form and its weight; without a form, the weight does not count."""
    form = settings.get("match", NONE)
    if form != NONE and form not in FORMS:
        raise Infeasible(f"distill.match is {form}: expected one of {', '.join((NONE, *FORMS))}")
    if form == NONE and "match_weight" not in settings:
        return NONE, 0.0
    return str(form), number("distill", settings, "match_weight", "more than 0", lambda value: value > 0)


def _has_peer(settings: Settings) -> bool:
    asked = settings.get("peer", NONE)
    if asked not in PEERS:
        raise Infeasible(f"distill.peer is {asked}: expected one of {', '.join(PEERS)}")
    return asked != NONE
