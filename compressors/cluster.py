"""Gives the weights of a layer a few distinct values; it never touches the model, each runtime places the numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import Infeasible, at_least
from compressors.fisher import Effect, Fisher, Question, diagonal_fisher
from compressors.layers import read_layers, weight_groups
from compressors.pipeline import Applied, Context, LayerNumbers, Stage
from compressors.plan import Scalar, Settings, Step
from compressors.replace import one_thread, owners, worst

MOST_CLUSTERS = 256
FLOAT_BITS = 32
LEAST_SHARE = 0.01
TINY = torch.finfo(torch.float32).tiny
# Lloyd's rounds after a centre has moved, and once no more do; the second is a bound that is hardly ever met.
ROUNDS, LAST_ROUNDS = 8, 1000


@dataclass(frozen=True)
class Cluster:
    """Weight clustering (Han 2015, arXiv 1510.00149): of every weight only the index of its cluster is stored.

    The centres are the k-means of a layer's own weights. Unlike there, they are not trained afterwards and the indices
    are not Huffman coded; instead every weight counts by how much the loss minds it, its diagonal Fisher information
    over `examples` calibration examples, as in SqueezeLLM (Kim 2023, arXiv 2306.07629). With 0 all count alike. No
    runtime here computes with indices: the file shrinks by about 32 over the bits of an index, while latency and memory
    are those of the rest precision. It does not help a layer with few weights, whose table of centres weighs more than
    it saves; such a layer is left as it is.
    """

    examples: int = 32

    def __post_init__(self) -> None:
        """Refuses less than nothing."""
        at_least(0, **{"compressor.cluster.examples": self.examples})

    method: ClassVar[str] = "cluster"
    stage: ClassVar[Stage] = Stage.NUMERIC
    off: ClassVar[tuple[str, Scalar]] = ("clusters", 0)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers that hold one weight tensor, which is stored once, or stand in the place of one layer."""
        return owners(model, read_layers(model, example))

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`clusters` per layer: 0, or from 2 to 256."""
        groups = self.groups(model, context.example)
        asked = {owner: _asked(owner, settings, groups) for owner, settings in step.per_layer.items()}
        needed = self.examples and any(asked.values())
        with one_thread():
            fisher = diagonal_fisher(model, context.calibration(), self.examples, seed) if needed else None
        achieved: dict[str, Settings] = {}
        numbers: dict[str, LayerNumbers] = {}
        held = weight_groups(read_layers(model, context.example))
        for owner, clusters in asked.items():
            told: list[Settings] = []
            for first in (name for name in groups[owner] if name in held):
                made, settings = _layer(model, first, clusters, fisher)
                told.append(settings)
                if made is not None:
                    numbers.update(dict.fromkeys(held[first], made))
            achieved[owner] = worst(told)
        return Applied(achieved, numbers)

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What the weights' move to their centres costs, and how much of them is stored."""
        groups = self.groups(model, example)
        known = fisher if self.examples else None
        effects = []
        for owner, settings in questions:
            made, _ = _layer(model, owner, _asked(owner, settings, groups), known)
            effects.append(_effect(model, owner, groups[owner], made, fisher))
        return effects


def kmeans(weight: Tensor, clusters: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices (uint8, in the shape of `weight`) and at most `clusters` centres, rising, with the least squared error.

    Errors count times `importance`, of the same shape; with `LEAST_SHARE` of the mean at least, so that none is free.

    Lloyd's algorithm on the sorted weights, twice: from centres that lie evenly between the smallest and the largest
    weight, as is best before training (Han 2015), and from as many weights to each. Without training afterwards only
    the squared error counts, whose best density of centres lies between the two (Panter 1951), so the smaller error is
    taken. What Lloyd cannot do is mended: as long as that helps, the two neighbours that are best merged give a centre
    to the cluster that is best split. Weights with no more than `clusters` values keep them exactly.
    """
    zero = weight.detach() == 0
    if LEAST_SHARE < zero.float().mean() < 1:
        # Held at zero: an average with small weights would let go of them.
        indices, codebook = kmeans(weight[~zero], clusters - 1, None if importance is None else importance[~zero])
        return _with_zero(zero, indices, codebook)
    points, order = weight.detach().flatten().double().sort()
    line = _Line(points, _masses(weight, importance)[order])
    centres = torch.unique_consecutive(line.points)
    if len(centres) > clusters:
        centres = min((line.best(start, clusters) for start in line.starts(clusters)), key=line.error)
    codebook = torch.unique(centres.float())
    indices = torch.bucketize(weight.detach().double(), _borders(codebook.double()))
    return indices.to(torch.uint8), codebook


def _with_zero(zero: Tensor, indices: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """A centre of their own for the weights that are `zero`, besides those of the others."""
    at = int((codebook < 0).sum())
    every = torch.full(zero.shape, at, dtype=torch.uint8)
    every[~zero] = indices + (indices >= at).to(torch.uint8)
    return every, torch.cat([codebook[:at], codebook.new_zeros(1), codebook[at:]])


class _Line:
    """Sorted numbers with running sums, so that a round of Lloyd's algorithm costs one search for each centre."""

    def __init__(self, points: Tensor, masses: Tensor) -> None:
        self.points = points
        self._masses, self._sums = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (masses, masses * points))

    def starts(self, clusters: int) -> tuple[Tensor, Tensor]:
        """Centres that are evenly far apart, and such that have equally many points."""
        shares = (torch.arange(clusters, dtype=torch.float64) + 0.5) / clusters
        low, high = self.points[0], self.points[-1]
        return low + (high - low) * shares, self.points[(shares * len(self.points)).long()]

    def best(self, start: Tensor, clusters: int) -> Tensor:
        """Where centres come to rest, with moves from one place to another in between."""
        centres = self.settled(start, ROUNDS)
        for _ in range(2 * clusters):
            moved = self.moved(centres, clusters)
            if moved is None:
                break
            centres = self.settled(moved, ROUNDS)
        return self.settled(centres, LAST_ROUNDS)

    def error(self, centres: Tensor) -> float:
        """The squared error, less that of centres at 0."""
        edges = self._edges(centres)
        masses, means = self._between(edges[:-1], edges[1:])
        return float((masses * centres * (centres - 2 * means)).sum())

    def settled(self, centres: Tensor, rounds: int) -> Tensor:
        """Every centre at the mean of what it is nearest to, until nothing moves; those of nothing fall away."""
        for _ in range(rounds):
            edges = self._edges(centres)
            masses, means = self._between(edges[:-1], edges[1:])
            # Sorted, because sums know means of next to nothing only to some digits.
            means = means[masses > 0].sort().values
            if torch.equal(means, centres):
                break
            centres = means
        return centres

    def moved(self, centres: Tensor, clusters: int) -> Tensor | None:
        """One centre taken to where it lowers the squared error most, or None if that helps nowhere.

        It comes from the two neighbours that are merged at the least cost, or is new where there are fewer than
        `clusters`.
        """
        edges = self._edges(centres)
        masses, means = self._between(edges[:-1], edges[1:])
        halves = torch.searchsorted(self.points, means)
        low, high = self._between(edges[:-1], halves), self._between(halves, edges[1:])
        gains = _ward(low, high)
        split = int(gains.argmax())
        parts = torch.stack([low[1][split], high[1][split]])
        if len(centres) < clusters:
            return torch.cat([means[:split], parts, means[split + 1 :]]) if gains[split] > 0 else None
        if len(centres) == 1:
            return None
        costs = _ward((masses[:-1], means[:-1]), (masses[1:], means[1:]))
        costs[max(split - 1, 0) : split + 1] = torch.inf  # these would merge what is split
        first = int(costs.argmin())
        if not gains[split] > costs[first] * (1 + 1e-9):
            return None
        pair = slice(first, first + 2)
        merged = (masses[pair] * means[pair]).sum() / masses[pair].sum()
        kept = torch.ones(len(centres), dtype=torch.bool)
        kept[[first, first + 1, split]] = False
        return torch.cat([means[kept], merged[None], parts]).sort().values

    def _edges(self, centres: Tensor) -> Tensor:
        """Where on the line the points of each centre begin, and the last of them end."""
        inner = torch.searchsorted(self.points, _borders(centres))
        return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(self.points))])

    def _between(self, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The mass of the points, and their mean."""
        masses = self._masses[end] - self._masses[begin]
        return masses, (self._sums[end] - self._sums[begin]) / masses.clamp_min(TINY)


def _masses(weight: Tensor, importance: Tensor | None) -> Tensor:
    given = torch.ones_like(weight) if importance is None else importance
    masses = given.detach().flatten().double()
    mean = masses.mean()
    return masses / mean + LEAST_SHARE if mean > 0 else torch.ones_like(masses)


def _borders(centres: Tensor) -> Tensor:
    return (centres[1:] + centres[:-1]) / 2


def _ward(low: tuple[Tensor, Tensor], high: tuple[Tensor, Tensor]) -> Tensor:
    """By how much the squared error differs between two sets of points (masses and means) and both as one."""
    masses = low[0] * high[0] / (low[0] + high[0]).clamp_min(TINY)
    return masses * (low[1] - high[1]).square()


def _layer(model: nn.Module, owner: str, clusters: int, fisher: Fisher | None) -> tuple[LayerNumbers | None, Settings]:
    weight = _weight(model, owner)
    if clusters == 0:
        return None, {"clusters": 0}
    indices, codebook = kmeans(weight, clusters, fisher.squares[f"{owner}.weight"] if fisher else None)
    bits = max(1, (len(codebook) - 1).bit_length())
    if bits * weight.numel() + FLOAT_BITS * len(codebook) >= FLOAT_BITS * weight.numel():
        return None, {"clusters": 0}
    error = float((codebook[indices.int()] - weight).norm() / weight.norm().clamp_min(TINY))
    achieved = {"clusters": len(codebook), "bits": bits, "relative_error": error}
    return LayerNumbers(bits, indices, codebook=codebook), achieved


def _effect(model: nn.Module, owner: str, members: Sequence[str], made: LayerNumbers | None, fisher: Fisher) -> Effect:
    if made is None or made.values is None or made.codebook is None:
        return Effect(0.0)
    change = made.codebook[made.values.int()] - _weight(model, owner)
    return Effect(fisher.rounding(f"{owner}.weight", change), stored=dict.fromkeys(members, made.bits))


def _weight(model: nn.Module, owner: str) -> Tensor:
    return model.get_parameter(f"{owner}.weight").detach()


def _asked(owner: str, settings: Settings, groups: Mapping[str, object]) -> int:
    if owner not in groups:
        raise Infeasible(f"cluster has no layer {owner}: possible are {', '.join(groups)}")
    clusters = settings["clusters"]
    if not isinstance(clusters, int) or not (clusters == 0 or 2 <= clusters <= MOST_CLUSTERS):
        raise Infeasible(f"cluster.clusters of {owner} is {clusters}: expected 0, or from 2 to {MOST_CLUSTERS}")
    return clusters
