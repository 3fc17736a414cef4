"""Predicted rises of the loss, against formulas on small nets and against measurements on a trained one."""

import copy
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.fisher import Fisher, diagonal_fisher
from compressors.pipeline import Context
from compressors.plan import Step
from compressors.prune import Prune
from compressors.quantize import Quantize
from compressors.rounding import dequantize
from tests.context import quantize_groups


def batches(inputs: Tensor) -> list[tuple[tuple[Tensor, ...], Tensor | None]]:
    return [((part,), None) for part in torch.chunk(inputs, max(1, len(inputs) // 16))]


def test_squares_are_the_fisher_information_of_a_logistic_regression() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, 2, bias=False), torch.randn(4000, 3)
    fisher = diagonal_fisher(model, batches(inputs), examples=4000)
    p = model(inputs).softmax(-1)
    exact = ((p * (1 - p)).unsqueeze(2) * inputs.square().unsqueeze(1)).mean(0)
    torch.testing.assert_close(fisher.squares["weight"], exact, rtol=0.1, atol=0.01)


def test_a_small_change_costs_what_the_divergence_says() -> None:
    torch.manual_seed(1)
    model, inputs = nn.Linear(8, 3), torch.randn(2000, 8)
    fisher = diagonal_fisher(model, batches(inputs), examples=2000)
    costs, predicted = [], []
    for seed in range(200):  # the diagonal is right on average over independent changes
        change = 0.02 * torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.weight += change
        costs.append(divergence(model, moved, inputs))
        predicted.append(fisher.rounding("weight", change))
    assert np.mean(predicted) == pytest.approx(np.mean(costs), rel=0.15)


def test_a_change_that_hangs_together_costs_what_the_divergence_says() -> None:
    """Errors along an input direction that is strong add up; those across it do not."""
    torch.manual_seed(1)
    strong = torch.randn(2000, 1) * torch.ones(8) + 0.1 * torch.randn(2000, 8)
    model = nn.Linear(8, 3)
    fisher = diagonal_fisher(model, batches(strong), examples=2000)
    moment = (strong.T @ strong / len(strong)).double()
    for along in (torch.ones(8), torch.tensor([1.0, -1] * 4)):
        change = 0.02 * torch.tensor([[1.0], [-1.0], [0.5]]) * along
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.weight += change
        predicted = fisher.shift("weight", change[..., None], moment)
        assert predicted == pytest.approx(divergence(model, moved, strong), rel=0.6)
    assert fisher.rounding("weight", change) > 10 * predicted


def test_removed_channels_act_as_one() -> None:
    """Two parts of one channel whose effects cancel are no loss; alone each one is."""
    gates = {"a": torch.tensor([[1.0, 2.0], [3.0, 0.0]]), "b": torch.tensor([[-1.0, 5.0], [-3.0, 5.0]])}
    fisher = Fisher({}, gates)
    assert fisher.removal([("a", [0]), ("b", [0])]) == 0
    assert fisher.removal([("a", [0])]) == pytest.approx(0.5 * (1 + 9) / 2)
    assert fisher.removal([]) == 0


def test_slopes_are_the_gradient_of_the_loss_and_need_labels() -> None:
    torch.manual_seed(0)
    model, inputs, labels = nn.Linear(6, 3), torch.randn(20, 6), torch.randint(3, (20,))
    told = [((inputs,), labels)]
    fisher = diagonal_fisher(model, told, examples=20, loss=F.cross_entropy)
    exact = torch.autograd.grad(F.cross_entropy(model(inputs), labels), model.weight)[0]
    torch.testing.assert_close(fisher.slopes["weight"], exact)
    assert not diagonal_fisher(model, told, examples=20).slopes
    untold = diagonal_fisher(model, batches(inputs), examples=20, loss=F.cross_entropy)
    assert not untold.slopes
    assert torch.equal(untold.squares["weight"], fisher.squares["weight"])


@pytest.mark.parametrize("shape", [(4, 1), (4, 3, 2, 2)])
def test_outputs_that_are_no_logits_are_means_of_normal_distributions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, math.prod(shape[1:])), nn.Unflatten(1, shape[1:]))
    inputs = torch.randn(2000, 6)
    fisher = diagonal_fisher(model, batches(inputs), examples=2000)
    exact = inputs.square().mean(0).expand(math.prod(shape[1:]), 6)
    torch.testing.assert_close(fisher.squares["0.weight"], exact, rtol=0.2, atol=0.05)


def test_tied_parameters_have_all_their_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    told = [((torch.randn(20, 4),), torch.randint(4, (20,)))]
    fisher = diagonal_fisher(model, told, examples=10, loss=F.cross_entropy)
    assert torch.equal(fisher.squares["2.weight"], fisher.squares["0.weight"])
    assert torch.equal(fisher.slopes["2.weight"], fisher.slopes["0.weight"])


def test_the_pass_leaves_the_model_as_it_was_and_repeats() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    model[0].weight.requires_grad_(True)
    before = copy.deepcopy(model.state_dict())
    inputs = torch.randn(20, 4)
    first, again = (diagonal_fisher(model, batches(inputs), examples=10) for _ in range(2))
    assert all(torch.equal(first.squares[name], again.squares[name]) for name in first.squares)
    assert [p.requires_grad for p in model.parameters()] == [True, False, False, False]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_predictions_rank_single_layers_as_measurements_do() -> None:
    model, images = trained()
    fisher = diagonal_fisher(model, batches(images), examples=64)
    method, example = Quantize(), (images[:2],)
    layers = list(method.groups(model, example))
    predicted, measured = [], []
    for name in layers:
        for bits in (2, 3, 4):
            weight = model.get_parameter(f"{name}.weight").detach()
            rows = weight.flatten(1)
            rounded = dequantize(*quantize_groups(rows, bits, rows.shape[1])).reshape(weight.shape)
            moved = copy.deepcopy(model)
            moved.get_parameter(f"{name}.weight").data.copy_(rounded)
            predicted.append(fisher.rounding(f"{name}.weight", rounded - weight))
            measured.append(divergence(model, moved, images))
    assert rank_correlation(predicted, measured) > 0.8


def test_predictions_rank_pruned_groups_as_measurements_do() -> None:
    model, images = trained()
    fisher = diagonal_fisher(model, batches(images), examples=64)
    method, example = Prune(), (images[:2],)
    owners = method.groups(model, example)
    questions = [(owner, {"sparsity": share, "align": 1}) for owner in owners for share in (0.25, 0.5, 0.75)]
    context = Context(model, example, train=list, calibration=list, loss=None)
    measured = []
    for owner, settings in questions:
        moved = copy.deepcopy(model)
        step = Step("prune", {owner: {"sparsity": settings["sparsity"]}}, {"align": 1})
        method.apply(moved, step, context, 0)
        measured.append(divergence(model, moved, images))
    effects = method.effects(model, example, questions, fisher)
    assert rank_correlation([effect.loss for effect in effects], measured) > 0.7


def divergence(model: nn.Module, moved: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        wanted, got = F.log_softmax(model(inputs), -1), F.log_softmax(moved(inputs), -1)
    return F.kl_div(got, wanted, log_target=True, reduction="batchmean").item()


def rank_correlation(a: list[float], b: list[float]) -> float:
    first, second = (np.argsort(np.argsort(x)) for x in (a, b))
    return float(np.corrcoef(first, second)[0, 1])


@cache
def trained() -> tuple[nn.Module, Tensor]:
    """A network that knows the digits about as well as it can in two seconds, and pictures it was not taught."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = [1, 16, 16, 32, 32]
        convs = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in pairwise(widths)
        ]
        model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(6):
            for rows in torch.randperm(1500).reshape(30, 50):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves this one untyped
                optimizer.step()
    return model.eval(), images[1500:]
