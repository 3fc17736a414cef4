"""Compares what a teacher and a smaller student make of one batch inside; it trains nothing, and neither is changed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import Infeasible
from compressors.layers import KINDS, hooked

Features = Mapping[str, Tensor]
"""What modules gave in the latest call of a model, by their names; the model's own name is empty."""

TINY = 1e-12
RIDGE = 1e-3
"""Added to the diagonal when a projection is fitted, as a share of its mean: some channels are always zero."""


@dataclass(frozen=True)
class Match:
    """One way to compare a student with its teacher at `places`; `parameters` learn with the student."""

    places: tuple[str, ...]
    distance: Callable[[Features, Features], Tensor]
    parameters: tuple[nn.Parameter, ...] = ()

    @contextmanager
    def watching(self, student: nn.Module, teacher: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """Gives a function for the distance of the latest calls of both; hooks are gone afterwards."""
        with _features(student, self.places) as ours, _features(teacher, self.places) as theirs:
            yield lambda: self.distance(ours, theirs)


def hint(student: nn.Module, teacher: nn.Module, inputs: tuple[Tensor, ...]) -> Match:
    """FitNets (Romero 2015, arXiv 1412.6550) at every block: the squared error after a learned linear projection.

    The error is a share of the teacher's mean square, so that all blocks count alike, and averaged over blocks. Unlike
    in the paper, blocks learn together with the logits, and the projections, `(teacher width, student width)` along
    the channels, do not start at random but at the least-squares fit on `inputs`, so that nothing depends on chance.
    It does not help a student far too narrow to hold its teacher's features: it then fails at them all.
    """
    ours, theirs = _shown(student, teacher, inputs)
    places = [place for place in theirs if _axis(ours[place], theirs[place]) is not None]
    if not places:
        raise Infeasible("match=hint: no block that is left differs from the teacher's in its width alone")
    fitted = {place: _fit(*_rows(ours[place], theirs[place])) for place in places}
    parameters = tuple(parameter for pair in fitted.values() for parameter in pair)
    return Match(tuple(places), partial(_hint, fitted), parameters)


def attention(student: nn.Module, teacher: nn.Module, inputs: tuple[Tensor, ...]) -> Match:
    """Attention transfer (Zagoruyko 2017, arXiv 1612.03928): where the channels' sum of squares is large, per block.

    Maps are brought to length 1 and compared by their squared distance, averaged over examples and blocks; widths may
    differ. It says nothing where a block has no positions left, and little where they are few.
    """
    ours, theirs = _shown(student, teacher, inputs)
    maps = {place: (_map(ours[place]), _map(theirs[place])) for place in theirs if ours[place].dim() > 2}
    places = tuple(place for place, (a, b) in maps.items() if a.shape == b.shape and a[0].numel() > 1)
    if not places:
        raise Infeasible("match=attention: no block that is left has positions; use hint or relation")
    return Match(places, _attention)


def relation(student: nn.Module, teacher: nn.Module, inputs: tuple[Tensor, ...]) -> Match:
    """Similarity-preserving distillation (Tung 2019, arXiv 1907.09682): which examples of a batch are alike.

    Of the last block before the output, the inner products of all pairs of examples, each row brought to length 1. The
    squared distance is averaged over rows, where the paper averages over pairs: it is larger by the batch size. As in
    relational distillation (Park 2019, arXiv 1904.05068) widths need not fit. It says little in small batches.
    """
    *_, last = _shown(student, teacher, inputs)[1]
    return Match((last,), partial(_relation, last))


def cosine(_student: nn.Module, _teacher: nn.Module, _inputs: tuple[Tensor, ...]) -> Match:
    """One minus the cosine between both models' outputs: for embeddings, whose size says nothing.

    It does not help a classifier, whose logits are compared already.
    """
    return Match(("",), lambda ours, theirs: (1 - F.cosine_similarity(ours[""], theirs[""], dim=-1)).mean())


FORMS: Mapping[str, Callable[[nn.Module, nn.Module, tuple[Tensor, ...]], Match]] = {
    "hint": hint,
    "attention": attention,
    "relation": relation,
    "cosine": cosine,
}


def _hint(fitted: Mapping[str, Sequence[nn.Parameter]], ours: Features, theirs: Features) -> Tensor:
    errors = []
    for place, (weight, bias) in fitted.items():
        given, wanted = _rows(ours[place], theirs[place])
        errors.append(F.mse_loss(F.linear(given, weight, bias), wanted) / wanted.square().mean().clamp_min(TINY))
    return torch.stack(errors).mean()


def _attention(ours: Features, theirs: Features) -> Tensor:
    return torch.stack([(_map(ours[n]) - _map(theirs[n])).square().sum(-1).mean() for n in ours]).mean()


def _relation(last: str, ours: Features, theirs: Features) -> Tensor:
    return (_alike(ours[last]) - _alike(theirs[last])).square().sum(-1).mean()


def _map(feature: Tensor) -> Tensor:
    """`(n, positions)`: the mean square over channels, which lie behind the examples, or last in a sequence."""
    channels = 1 if feature.dim() > 3 else -1
    return F.normalize(feature.square().mean(channels).flatten(1), dim=-1)


def _alike(feature: Tensor) -> Tensor:
    rows = feature.flatten(1)
    return F.normalize(rows @ rows.T, dim=-1)


def _axis(student: Tensor, teacher: Tensor) -> int | None:
    """Where the channels are: the one axis in which the shapes differ, or the usual one; None if several differ."""
    if student.dim() != teacher.dim() or student.dim() < 2:
        return None
    differ = [i for i, (a, b) in enumerate(zip(student.shape, teacher.shape, strict=True)) if a != b]
    usual = 1 if student.dim() > 3 else student.dim() - 1
    return (differ or [usual])[0] if len(differ) < 2 else None


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as `(examples and positions, channels)`."""
    axis = _axis(student, teacher)
    ours, theirs = (feature.movedim(axis or 1, -1).flatten(0, -2) for feature in (student, teacher))
    return ours, theirs


def _fit(given: Tensor, wanted: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight `(wanted, given)` and bias of the ridge regression from one to the other."""
    centre, aim = given.mean(0), wanted.mean(0)
    rows = given - centre
    gram = rows.T @ rows
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(TINY))
    weight = torch.linalg.solve(gram, rows.T @ (wanted - aim)).T.contiguous()
    return nn.Parameter(weight), nn.Parameter(aim - weight @ centre)


def _shown(student: nn.Module, teacher: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Features, Features]:
    """What both make of `inputs` in the blocks that they have in common, in the order of the teacher's."""
    # The last one is left out: the models' outputs are compared as it is.
    asked = _places(teacher, list(_blocks(teacher)), inputs)[:-1]
    # What was left out of the student has no parameters any more; what was replaced or is held has them.
    kept = {name: module for name, module in student.named_modules() if any(True for _ in module.parameters())}
    left = set(_places(student, [name for name in asked if name in kept], inputs))
    places = [name for name in asked if name in left]
    if not places:
        raise Infeasible("match: no block is left that the teacher has too; use none or cosine")
    with _features(student, places) as ours, _features(teacher, places) as theirs, torch.no_grad():
        teacher(*inputs)
        student(*inputs)
    return {name: ours[name] for name in places}, {name: theirs[name] for name in places}


def _places(model: nn.Module, names: Sequence[str], inputs: tuple[Tensor, ...]) -> list[str]:
    """Of these modules, those that are called once and give a tensor, in the order of their ends."""
    calls: list[str] = []
    odd: set[str] = set()

    def note(name: str, output: object) -> None:
        if name in calls or not isinstance(output, Tensor):
            odd.add(name)
        calls.append(name)

    handles = (
        model.get_submodule(name).register_forward_hook(lambda _m, _i, output, name=name: note(name, output))
        for name in names
    )
    with hooked(handles), torch.no_grad():
        model(*inputs)
    return [name for name in dict.fromkeys(calls) if name not in odd]


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """From the outside in, the first modules that are a weighted layer or have one as a child; never the model."""
    for name, child in module.named_children():
        if type(child) in KINDS or any(type(inner) in KINDS for inner in child.children()):
            yield prefix + name
        else:
            yield from _blocks(child, f"{prefix}{name}.")


@contextmanager
def _features(model: nn.Module, places: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A mapping that every call of `model` fills anew, in float."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        found[name] = output.float()

    handles = (
        model.get_submodule(name).register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name in places
    )
    with hooked(handles):
        yield found
