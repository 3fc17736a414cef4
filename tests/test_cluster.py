from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from compressors.cluster import Cluster, kmeans
from compressors.errors import ConfigError, Infeasible
from compressors.fisher import Fisher, diagonal_fisher
from compressors.pipeline import Applied
from compressors.plan import Scalar, Step
from tests.context import make_context
from tests.zoo import build, images


def cluster(model: nn.Module, clusters: Mapping[str, Scalar]) -> Applied:
    step = Step("cluster", {layer: {"clusters": n} for layer, n in clusters.items()})
    return Cluster().apply(model, step, make_context(model), 0)


def squared_error(weight: Tensor, clusters: int) -> float:
    indices, codebook = kmeans(weight, clusters)
    return float((codebook.double()[indices.int()] - weight.double()).square().sum())


def least_error(weight: Tensor, clusters: int) -> float:
    """By dynamic programming over the sorted weights: cluster after cluster, from where to where."""
    points = weight.flatten().double().sort().values
    count = len(points)
    sums, squares = (torch.cat([torch.zeros(1).double(), x.cumsum(0)]) for x in (points, points**2))
    begin, end = torch.arange(count + 1)[:, None], torch.arange(count + 1)[None, :]
    cost = squares[end] - squares[begin] - (sums[end] - sums[begin]).square() / (end - begin).clamp_min(1)
    cost[end <= begin] = torch.inf
    best = cost[0].clone()
    for _ in range(clusters - 1):
        best = torch.minimum(best, (best[:, None] + cost).min(0).values)
    return float(best[count])


def heavy_tailed(seed: int, count: int, power: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) ** power


@pytest.mark.parametrize("clusters", [2, 5, 16])
@pytest.mark.parametrize("seed", range(3))
def test_separate_heaps_are_found(clusters: int, seed: int) -> None:
    """Of very unequal sizes and distances, where a start that is spread evenly is far off."""
    generator = torch.Generator().manual_seed(seed)
    centres = (torch.rand(clusters, generator=generator) + 0.5).cumsum(0) ** 3
    sizes = torch.randint(5, 200, (clusters,), generator=generator)
    noise = [0.01 * torch.randn(int(n), generator=generator) for n in sizes]
    heaps = [centre + x - x.mean() for centre, x in zip(centres, noise, strict=True)]
    indices, codebook = kmeans(torch.cat(heaps), clusters)
    torch.testing.assert_close(codebook, centres)
    assert torch.equal(indices, torch.arange(clusters).repeat_interleave(sizes).to(torch.uint8))


@pytest.mark.parametrize("clusters", [3, 8, 16])
@pytest.mark.parametrize("power", [1, 3])
def test_the_error_is_close_to_the_least_there_is(clusters: int, power: int) -> None:
    ratios = []
    for seed in range(20):
        weight = heavy_tailed(seed, 150, power)
        ratios.append(squared_error(weight, clusters) / least_error(weight, clusters))
    assert min(ratios) > 1 - 1e-6
    assert sum(ratios) / len(ratios) < 1.06
    assert max(ratios) < 1.25


def test_errors_are_weighed() -> None:
    weight, generator = heavy_tailed(0, 4000, 1), torch.Generator().manual_seed(1)
    importance = torch.randn(4000, generator=generator).square() * (weight > 0)

    def error(given: Tensor | None) -> float:
        indices, codebook = kmeans(weight, 8, given)
        return float((importance * (codebook[indices.int()] - weight).square()).sum())

    assert error(importance) < 0.6 * error(None)
    assert error(torch.zeros(4000)) == error(None), "what tells nothing counts for nothing"


@pytest.mark.parametrize("power", [1, 3])
def test_more_clusters_lose_less(power: int) -> None:
    weight = heavy_tailed(0, 5000, power).reshape(50, 100)
    errors = [squared_error(weight, n) for n in (2, 4, 16, 64, 256)]
    assert errors == sorted(errors, reverse=True)
    # Twice the clusters, a quarter of the error, as for any smooth density.
    assert errors[3] < errors[2] / 10


def test_every_weight_goes_to_its_nearest_centre() -> None:
    weight = heavy_tailed(3, 999, 3)
    indices, codebook = kmeans(weight, 16)
    nearest = (weight[:, None] - codebook).abs().argmin(1)
    assert torch.equal((weight - codebook[indices.int()]).abs(), (weight - codebook[nearest]).abs())
    assert torch.equal(codebook, codebook.sort().values)


@pytest.mark.parametrize("values", [[0.0], [-1.0, 2.0], [0.1, 0.2, 0.3, 0.4]])
def test_few_values_are_kept_exactly(values: list[float]) -> None:
    weight = torch.tensor(values).repeat(7).reshape(7, -1)
    indices, codebook = kmeans(weight, 4)
    assert torch.equal(codebook[indices.int()], weight)
    assert len(codebook) == len(values)


@pytest.mark.parametrize("clusters", [2, 4, 16])
def test_weights_that_are_held_at_zero_stay_there(clusters: int) -> None:
    weight = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    weight[weight.abs() < 0.7] = 0
    indices, codebook = kmeans(weight, clusters)
    assert len(codebook) <= clusters
    assert torch.equal(codebook, codebook.sort().values)
    assert torch.equal(codebook[indices.int()] == 0, weight == 0)
    nothing = torch.zeros(4, 4)
    assert torch.equal(kmeans(nothing, clusters)[1], torch.zeros(1))


def test_the_result_is_the_same_every_time() -> None:
    weight = heavy_tailed(1, 3000, 3)
    first, second = kmeans(weight, 64), kmeans(weight.clone(), 64)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("clusters", "bits"), [(2, 1), (3, 2), (4, 2), (16, 4), (17, 5), (256, 8)])
def test_a_layer_gets_indices_and_a_codebook(clusters: int, bits: int) -> None:
    model = build("plain")
    applied = cluster(model, {"b.0": clusters})
    numbers, achieved = applied.numbers["b.0"], applied.achieved["b.0"]
    weight = model.get_parameter("b.0.weight").detach()
    assert numbers.values is not None
    assert numbers.codebook is not None
    assert numbers.values.dtype == torch.uint8
    assert numbers.values.shape == weight.shape
    assert len(numbers.codebook) == achieved["clusters"] == clusters
    assert numbers.bits == achieved["bits"] == bits
    error = (numbers.codebook[numbers.values.int()] - weight).norm() / weight.norm()
    assert achieved["relative_error"] == pytest.approx(error.item())
    assert 0 < error < 1


def test_what_a_codebook_would_make_larger_is_left_as_it_is() -> None:
    model = build("plain")
    applied = cluster(model, {"head": 256, "b.0": 256})
    assert applied.achieved["head"] == {"clusters": 0}
    assert applied.numbers.keys() == {"b.0"}
    assert cluster(model, {"head": 16}).achieved["head"]["clusters"] == 16


def test_layers_with_one_weight_tensor_share_their_numbers() -> None:
    model = build("tied")
    assert Cluster().groups(model, (images(),))["first"] == ("first", "second")
    numbers = cluster(model, {"first": 16}).numbers
    assert numbers["first"].values is numbers["second"].values


def test_embeddings_are_clustered_with_what_is_tied_to_them() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)).eval()
    model[2].weight = model[0].weight
    assert dict(Cluster().groups(model, (torch.zeros(2, 2).long(),))) == {"0": ("0", "2"), "1": ("1",)}


@pytest.mark.parametrize("clusters", [-1, 1, 257, 4.0, "many"])
def test_what_cannot_be_done_is_infeasible(clusters: Scalar) -> None:
    with pytest.raises(Infeasible, match=rf"^cluster\.clusters of b\.0 is {clusters}: expected 0, or from 2 to 256$"):
        cluster(build("plain"), {"b.0": clusters})


def test_an_unknown_layer_is_infeasible() -> None:
    with pytest.raises(Infeasible, match=r"no layer a\.1: possible are a\.0, b\.0, head"):
        cluster(build("plain"), {"a.1": 4})


def test_effects_are_the_rounding_and_the_bits_that_are_stored() -> None:
    model = build("tied")
    squares = {name: torch.full_like(p, 2.0) for name, p in model.named_parameters(remove_duplicate=False)}
    questions = [("first", {"clusters": n}) for n in (0, 256, 16, 4)]
    off, most, some, few = Cluster().effects(model, (images(),), questions, Fisher(squares, {}))
    assert (off.loss, dict(off.stored), dict(off.bits)) == (0.0, {}, {})
    assert dict(some.stored) == {"first": 4, "second": 4}
    assert not some.bits, "nothing computes in fewer bits"
    assert 0 < most.loss < some.loss < few.loss
    weight = model.get_parameter("first.weight").detach()
    assert some.loss == pytest.approx(squared_error(weight, 16), rel=1e-4)


def test_calibration_tells_which_weights_count() -> None:
    model = build("attention")
    context, step = make_context(model), Step("cluster", {"up": {"clusters": 8}})
    fisher = diagonal_fisher(model, context.calibration(), 32)

    def loss(examples: int) -> float:
        numbers = Cluster(examples).apply(model, step, context, 0).numbers["up"]
        assert numbers.values is not None
        assert numbers.codebook is not None
        change = numbers.codebook[numbers.values.int()] - model.get_parameter("up.weight").detach()
        return fisher.rounding("up.weight", change)

    assert loss(32) < loss(0)
    (effect,) = Cluster().effects(model, (images(),), [("up", {"clusters": 8})], fisher)
    assert effect.loss == pytest.approx(loss(32))
    with pytest.raises(ConfigError, match=r"compressor\.cluster\.examples: is -1"):
        Cluster(-1)
