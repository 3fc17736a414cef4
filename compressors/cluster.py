"""Gives the weights of a layer a few distinct values; it never touches the model, each runtime places the numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.layers import read_layers, weight_groups
from compressors.pipeline import Applied, Context, LayerNumbers, Stage
from compressors.plan import Scalar, Settings, Step

MOST_CLUSTERS = 256
FLOAT_BITS = 32
# Lloyd's rounds after a centre has moved, and once no more do; the second is a bound that is hardly ever met.
ROUNDS, LAST_ROUNDS = 8, 1000


@dataclass(frozen=True)
class Cluster:
    """Weight clustering (Han 2015, arXiv 1510.00149): of every weight only the index of its cluster is stored.

    The centres are the k-means of a layer's own weights; unlike there, they are not trained afterwards and the indices
    are not Huffman coded. No runtime here computes with indices: the file shrinks by about 32 bits over the bits of an
    index, while latency and memory are those of the rest precision. It does not help a layer with few weights, whose
    table of centres weighs more than it saves; such a layer is left as it is.
    """

    method: ClassVar[str] = "cluster"
    stage: ClassVar[Stage] = Stage.NUMERIC
    off: ClassVar[tuple[str, Scalar]] = ("clusters", 0)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers that hold one weight tensor, which is stored once."""
        return weight_groups(read_layers(model, example))

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`clusters` per layer: 0, or from 2 to 256."""
        groups = self.groups(model, context.example)
        achieved: dict[str, Settings] = {}
        numbers: dict[str, LayerNumbers] = {}
        for owner, settings in step.per_layer.items():
            if owner not in groups:
                raise Infeasible(f"cluster has no layer {owner}: possible are {', '.join(groups)}")
            made, achieved[owner] = _layer(model, owner, _asked(owner, settings))
            if made is not None:
                numbers.update(dict.fromkeys(groups[owner], made))
        return Applied(achieved, numbers)

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """What the weights' move to their centres costs, and how much of them is stored."""
        groups = self.groups(model, example)
        return [_effect(model, owner, groups[owner], settings, fisher) for owner, settings in questions]


def kmeans(weight: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Indices (uint8, in the shape of `weight`) and at most `clusters` centres, rising, with the least squared error.

    Lloyd's algorithm on the sorted weights, from centres that lie evenly between the smallest and the largest: without
    training afterwards only the squared error counts, and its best density of centres goes with the cube root of that
    of the weights (Panter 1951), which an even spread is nearer to than as many weights to each. What Lloyd cannot do
    is mended: as long as that helps, the two neighbours that are best merged give a centre to the cluster that is best
    split. Weights with no more than `clusters` values keep them exactly.
    """
    line = _Line(weight.detach().flatten().double().sort().values)
    centres = line.points.unique_consecutive()
    if len(centres) > clusters:
        centres = line.settled(torch.linspace(line.points[0], line.points[-1], clusters, dtype=torch.float64), ROUNDS)
        for _ in range(2 * clusters):
            moved = line.moved(centres, clusters)
            if moved is None:
                break
            centres = line.settled(moved, ROUNDS)
        centres = line.settled(centres, LAST_ROUNDS)
    codebook = centres.float().unique()
    indices = torch.bucketize(weight.detach().double(), _borders(codebook.double()))
    return indices.to(torch.uint8), codebook


class _Line:
    """Sorted numbers with running sums, so that a round of Lloyd's algorithm costs one search for each centre."""

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self._sums = torch.cat([points.new_zeros(1), points.cumsum(0)])

    def settled(self, centres: Tensor, rounds: int) -> Tensor:
        """Every centre at the mean of what it is nearest to, until nothing moves; those of nothing fall away."""
        for _ in range(rounds):
            edges = self._edges(centres)
            counts, means = self._between(edges[:-1], edges[1:])
            means = means[counts > 0]
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
        counts, means = self._between(edges[:-1], edges[1:])
        halves = torch.searchsorted(self.points, means)
        low, high = self._between(edges[:-1], halves), self._between(halves, edges[1:])
        gains = _ward(low, high)
        split = int(gains.argmax())
        parts = torch.stack([low[1][split], high[1][split]])
        if len(centres) < clusters:
            return torch.cat([means[:split], parts, means[split + 1 :]]) if gains[split] > 0 else None
        costs = _ward((counts[:-1], means[:-1]), (counts[1:], means[1:]))
        costs[max(split - 1, 0) : split + 1] = torch.inf  # these would merge what is split
        merged = int(costs.argmin())
        if not gains[split] > costs[merged] * (1 + 1e-9):
            return None
        pair = (counts[merged : merged + 2] * means[merged : merged + 2]).sum() / counts[merged : merged + 2].sum()
        kept = torch.ones(len(centres), dtype=torch.bool)
        kept[[merged, merged + 1, split]] = False
        return torch.cat([means[kept], pair[None], parts]).sort().values

    def _edges(self, centres: Tensor) -> Tensor:
        """Where on the line the points of each centre begin, and the last of them end."""
        inner = torch.searchsorted(self.points, _borders(centres))
        return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(self.points))])

    def _between(self, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """How many points, and their mean."""
        counts = (end - begin).double()
        return counts, (self._sums[end] - self._sums[begin]) / counts.clamp_min(1)


def _borders(centres: Tensor) -> Tensor:
    return (centres[1:] + centres[:-1]) / 2


def _ward(low: tuple[Tensor, Tensor], high: tuple[Tensor, Tensor]) -> Tensor:
    """By how much the squared error differs between two sets of points (counts and means) and both as one."""
    counts = low[0] * high[0] / (low[0] + high[0]).clamp_min(1)
    return counts * (low[1] - high[1]).square()


def _layer(model: nn.Module, owner: str, clusters: int) -> tuple[LayerNumbers | None, Settings]:
    weight = _weight(model, owner)
    indices, codebook = kmeans(weight, clusters) if clusters else (None, weight)
    if indices is None or not _pays(weight, codebook):
        return None, {"clusters": 0}
    error = float((codebook[indices.int()] - weight).norm() / weight.norm().clamp_min(torch.finfo(torch.float32).tiny))
    bits = _bits(codebook)
    return LayerNumbers(bits, indices, codebook=codebook), {
        "clusters": len(codebook),
        "bits": bits,
        "relative_error": error,
    }


def _effect(model: nn.Module, owner: str, members: Sequence[str], settings: Settings, fisher: Fisher) -> Effect:
    made, _ = _layer(model, owner, _asked(owner, settings))
    if made is None or made.values is None or made.codebook is None:
        return Effect(0.0)
    change = made.codebook[made.values.int()] - _weight(model, owner)
    return Effect(fisher.rounding(f"{owner}.weight", change), stored=dict.fromkeys(members, made.bits))


def _weight(model: nn.Module, owner: str) -> Tensor:
    return model.get_parameter(f"{owner}.weight").detach()


def _bits(codebook: Tensor) -> int:
    return max(1, (len(codebook) - 1).bit_length())


def _pays(weight: Tensor, codebook: Tensor) -> bool:
    """Whether indices and centres together take less space than the weights."""
    return _bits(codebook) * weight.numel() + FLOAT_BITS * len(codebook) < FLOAT_BITS * weight.numel()


def _asked(owner: str, settings: Settings) -> int:
    clusters = settings["clusters"]
    if not isinstance(clusters, int) or not (clusters == 0 or 2 <= clusters <= MOST_CLUSTERS):
        raise Infeasible(f"cluster.clusters of {owner} is {clusters}: expected 0, or from 2 to {MOST_CLUSTERS}")
    return clusters
