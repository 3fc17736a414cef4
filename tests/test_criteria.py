"""Which channels go: by criterion within a group, and from which group where all are ranked together."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.fisher import Question, diagonal_fisher
from compressors.plan import Scalar, Settings
from compressors.prune import CRITERIA, Prune, weakest_of_all
from tests.context import make_context
from tests.test_prune import GROUPS, every_net, prune
from tests.zoo import CLASSES, build, images


class Judged(nn.Module):
    """Every criterion has a channel of its own to find least important; all others are alike, but for their signs."""

    WEAKEST: Mapping[str, int] = {"l2": 0, "l1": 1, "bn_scale": 2, "taylor": 3, "fisher": 3}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
        with torch.no_grad():
            for weight, size in ((self.a.weight, 0.3), (self.head.weight, 0.5)):
                weight.copy_(size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).sign())
            self.a.weight[0] *= 0.5
            self.a.weight[1] = 0
            self.a.weight[1, 0, 1, 1] = 1.3
            self.norm.weight[2] = 0.2
            self.norm.bias[3] = -100  # never passes the ReLU
            self.norm.bias[4:] = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.a(x))).mean((2, 3)))  # type: ignore[no-any-return]


def removed(before: nn.Module, after: nn.Module, layer: str) -> set[int]:
    """Which rows of a layer's weight are gone; none of them occurs twice."""
    rows, left = (model.get_parameter(f"{layer}.weight").flatten(1).tolist() for model in (before, after))
    return {channel for channel, row in enumerate(rows) if row not in left}


@pytest.mark.parametrize("criterion", Judged.WEAKEST)
def test_a_criterion_removes_what_matters_least_by_it(criterion: str) -> None:
    model = Judged().eval()
    prune(model, 0.125, criterion=criterion)
    assert removed(Judged(), model, "a") == {Judged.WEAKEST[criterion]}


def test_the_first_criterion_is_the_one_without_a_name() -> None:
    named, unnamed = (build("residual") for _ in range(2))
    prune(named, 0.5, criterion="l2", allocation="per_group")
    prune(unnamed, 0.5)
    assert torch.equal(named(images()), unnamed(images()))


@pytest.mark.parametrize("net", ["plain", "attention"])
def test_taylor_is_the_slope_of_the_loss_along_a_factor_on_the_channel(net: str) -> None:
    """Against differences of the loss, in double precision."""
    layer, factor = {"plain": ("a.0", "a.1"), "attention": ("up", "up")}[net]
    model, context = build(net), make_context(build(net))
    batches = [(inputs[0].double(), target) for inputs, target in context.calibration()]

    def loss(channel: int, scale: float) -> float:
        scaled = copy.deepcopy(model).double()
        for name in ("weight", "bias"):
            scaled.get_parameter(f"{factor}.{name}").data[channel] *= scale
        # Batches of one size: the mean of their means is the mean.
        return sum(F.cross_entropy(scaled(inputs), target).item() for inputs, target in batches if target is not None)

    width = len(model.get_parameter(f"{layer}.weight"))
    slopes = torch.tensor([loss(channel, 1 + 1e-4) - loss(channel, 1 - 1e-4) for channel in range(width)])
    cut = copy.deepcopy(model)
    prune(cut, {layer: 0.25}, criterion="taylor")
    assert removed(model, cut, layer) == set(slopes.abs().argsort()[: width // 4].tolist())


@pytest.mark.parametrize("net", ["residual", "attention"])
def test_without_labels_taylor_is_fisher(net: str) -> None:
    blind = replace(make_context(build(net)), loss=None)
    by = {}
    for criterion in ("taylor", "fisher"):
        by[criterion] = build(net)
        prune(by[criterion], 0.5, context=blind, criterion=criterion)
    told = build(net)
    prune(told, 0.5, criterion="fisher")
    assert torch.equal(by["taylor"](images()), by["fisher"](images()))
    assert torch.equal(told(images()), by["fisher"](images())), "it never looks at labels"


def test_what_is_removed_at_random_is_up_to_the_seed_alone() -> None:
    def gone(net: nn.Module, seed: int) -> frozenset[int]:
        cut = copy.deepcopy(net)
        prune(cut, {"a.0": 0.25}, seed=seed, criterion="random")
        return frozenset(removed(net, cut, "a.0"))

    sets = [gone(build("plain"), seed) for seed in range(6)]
    assert sets == [gone(build("plain", seed=1), seed) for seed in range(6)], "other weights, same channels"
    assert all(len(channels) == 4 for channels in sets)
    assert len(set(sets)) > 1


@pytest.mark.parametrize("allocation", ["per_group", "global"])
@pytest.mark.parametrize("criterion", CRITERIA)
@every_net
def test_every_criterion_works_and_repeats_on_every_net(net: str, criterion: str, allocation: str) -> None:
    first, second = build(net), build(net)
    achieved = prune(first, 0.5, criterion=criterion, allocation=allocation)
    assert achieved == prune(second, 0.5, criterion=criterion, allocation=allocation)
    assert torch.equal(first(images()), second(images()))
    assert first(images()).isfinite().all()
    for owner, done in achieved.items():
        assert len(first.get_parameter(f"{owner}.weight")) == done["channels"]
    assert first.training is False
    assert all(p.grad is None and p.requires_grad for p in first.parameters())


def scores(sizes: list[int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {str(i): torch.rand(width, generator=generator) for i, width in enumerate(sizes)}


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 0.999), st.integers(0, 99))
def test_globally_the_weakest_of_all_go(sizes: list[int], share: float, seed: int) -> None:
    given_scores = scores(sizes, seed)
    lost = weakest_of_all(given_scores, dict.fromkeys(given_scores, share))
    counts = {owner: round(part * len(given_scores[owner])) for owner, part in lost.items()}
    assert sum(counts.values()) == round(share * sum(sizes))
    ordered = {owner: values.sort().values for owner, values in given_scores.items()}
    gone = torch.cat([values[: counts[owner]] for owner, values in ordered.items()])
    left = torch.cat([values[counts[owner] :] for owner, values in ordered.items()])
    assert not len(gone) or not len(left) or gone.max() <= left.min()


def widths(achieved: Mapping[str, Settings]) -> dict[str, Scalar]:
    return {owner: done["channels"] for owner, done in achieved.items()}


def scaled_norms() -> nn.Module:
    """The norm after `a.0` scales by less than any other, in channels 0 to 3 least of all."""
    model = build("plain")
    with torch.no_grad():
        model.get_parameter("a.1.weight").copy_(torch.cat([torch.full((4,), 0.01), torch.full((12,), 0.1)]))
        model.get_parameter("b.1.weight").copy_(torch.cat([torch.full((4,), 0.05), torch.full((28,), 1.0)]))
    return model


@pytest.mark.parametrize(
    ("sparsity", "align", "a", "b"),
    [(4 / 48, 1, 12, 32), (8 / 48, 1, 12, 28), (0.25, 1, 8, 28), (0.5, 1, 1, 24), (0.5, 4, 4, 24), (0.0, 1, 16, 32)],
)
def test_a_global_share_is_given_by_the_groups_that_matter_least(sparsity: float, align: int, a: int, b: int) -> None:
    achieved = prune(scaled_norms(), sparsity, align, criterion="bn_scale", allocation="global")
    assert widths(achieved) == {"a.0": a, "b.0": b}


def test_shares_of_single_groups_add_up_and_groups_without_one_stay_whole() -> None:
    uneven = prune(scaled_norms(), {"a.0": 0.5, "b.0": 0.25}, criterion="bn_scale", allocation="global")
    assert widths(uneven) == {"a.0": 4, "b.0": 28}, "16 channels in all"
    spared = prune(scaled_norms(), {"a.0": 0.0, "b.0": 0.25}, criterion="bn_scale", allocation="global")
    assert widths(spared) == {"a.0": 16, "b.0": 24}


def test_the_uncompressed_model_decides_on_the_shape_of_a_global_cut() -> None:
    """Training between two cuts changes weights, and stored weights must fit all the same."""
    other = build("plain", seed=3)
    context = make_context(scaled_norms())
    achieved = prune(other, 0.25, criterion="bn_scale", allocation="global", context=context)
    assert widths(achieved) == {"a.0": 8, "b.0": 28}


@pytest.mark.parametrize("allocation", ["per_group", "global"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("net", ["plain", "residual", "depthwise"])
def test_effects_are_of_the_channels_that_go(net: str, criterion: str, allocation: str) -> None:
    model, context = build(net), make_context(build(net))
    asked: list[dict[str, Scalar]] = [
        {"sparsity": share, "criterion": criterion, "allocation": allocation} for share in (0.0, 0.5)
    ]
    owners = list(Prune().groups(model, context.example))
    fisher = diagonal_fisher(model, context.calibration(), loss=context.loss)
    questions: list[Question] = [(owner, together) for together in asked for owner in owners]
    found = Prune().effects(model, context.example, questions, fisher)
    cut = copy.deepcopy(model)
    achieved = prune(cut, 0.5, context=context, criterion=criterion, allocation=allocation)
    for owner, whole, half in zip(owners, found, found[len(owners) :], strict=False):
        assert whole.loss == 0
        assert set(whole.outputs.values()) == {1.0}
        assert half.outputs[owner] == pytest.approx(1 - float(achieved[owner]["sparsity"]))
        # In the zoo the norm of `x.0` is `x.1`.
        norms = [f"{layer.removesuffix('0')}1" for layer in GROUPS[net][owner] if layer.endswith(".0")]
        means, left = (m.get_buffer(f"{norms[0]}.running_mean").tolist() for m in (model, cut))
        gone = [channel for channel, mean in enumerate(means) if mean not in left]
        parts = [(f"{norm}.{name}", gone) for norm in norms for name in ("weight", "bias")]
        assert half.loss == pytest.approx(fisher.removal(parts))


def test_effects_rank_criteria() -> None:
    model = Judged().eval()
    context = make_context(model)
    fisher = diagonal_fisher(model, context.calibration(), loss=context.loss)
    questions: list[Question] = [("a", {"sparsity": 0.125, "criterion": criterion}) for criterion in Judged.WEAKEST]
    found = dict(zip(Judged.WEAKEST, Prune().effects(model, context.example, questions, fisher), strict=True))
    assert {criterion for criterion, effect in found.items() if effect.loss == 0} == {"taylor", "fisher"}


def half_normed() -> nn.Module:
    """A group with a batch norm, `0`, and one without, `5`."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)),
    ).eval()


def test_a_group_without_a_norm_is_judged_by_its_weights_and_says_so() -> None:
    model = half_normed()
    told = prune(copy.deepcopy(model), 0.5, criterion="bn_scale")
    assert "criterion" not in told["0"]
    assert told["5"]["criterion"] == "l2"
    asked_for, instead = copy.deepcopy(model), copy.deepcopy(model)
    prune(asked_for, {"5": 0.5}, criterion="l2")
    prune(instead, {"5": 0.5}, criterion="bn_scale")
    assert torch.equal(asked_for.get_parameter("5.weight"), instead.get_parameter("5.weight"))
    fisher = diagonal_fisher(model, make_context(build("plain")).calibration())
    asked: list[Question] = [("5", {"sparsity": 0.5, "criterion": c}) for c in ("bn_scale", "l2")]
    by_norm, by_weights = Prune().effects(model, (images(),), asked, fisher)
    assert by_norm == by_weights


def test_scales_of_norms_and_lengths_of_weights_are_compared_with_their_groups_means() -> None:
    model = half_normed()
    model.get_parameter("5.weight").data *= 1e-3
    achieved = prune(model, 0.25, criterion="bn_scale", allocation="global")
    assert int(achieved["5"]["channels"]) > 4, "small weights alone do not make a group weak"
