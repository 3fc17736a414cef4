"""What stays of a layer's inputs stands in for what goes."""

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

import compressors.reconstruction as subject
from compressors.errors import Infeasible
from compressors.plan import Step
from compressors.prune import Prune
from compressors.reconstruction import reconstruct
from tests.context import make_context
from tests.zoo import NETS, build, images


class Mixed(nn.Module):
    """The last channels of the first layer follow from the others: one is their sum, one is always the same."""

    def __init__(self, kind: str, bias: bool = True) -> None:
        super().__init__()
        self.first: nn.Conv2d | nn.Linear
        self.second: nn.Conv2d | nn.Linear
        if kind == "conv":
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, bias=bias)
        else:
            self.first, self.second = nn.Linear(3 * 12 * 12, 6), nn.Linear(6, 4, bias=bias)
        with torch.no_grad():
            weight, offset = self.first.weight, self.first.bias
            assert offset is not None
            weight[4], offset[4] = weight[:4].sum(0), offset[:4].sum()
            weight[5], offset[5] = 0, 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x if isinstance(self.first, nn.Conv2d) else x.flatten(1)))  # type: ignore[no-any-return]


def off_by(model: nn.Module, lost: Mapping[str, Collection[int]], repaired: bool) -> float:
    """The error of the answers without these inputs, as a share of the answers."""
    other = copy.deepcopy(model)
    if repaired:
        reconstruct(other, lost, make_context(model, count=64), 0)
    with torch.no_grad():
        for layer, channels in lost.items():
            other.get_submodule(layer).get_parameter("weight")[:, list(channels)] = 0
        wanted = model(images(16, 9))
        return float((other(images(16, 9)) - wanted).norm() / wanted.norm())


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "DAMPING", 1e-7)


@pytest.mark.usefixtures("undamped")
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_what_the_others_say_as_well_is_not_missed(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mixed(kind).eval()
    for lost in ({4}, {5}, {4, 5}):
        assert off_by(model, {"second": lost}, repaired=True) < 1e-3
        assert off_by(model, {"second": lost}, repaired=False) > 0.05


@pytest.mark.usefixtures("undamped")
def test_without_a_bias_nothing_takes_what_is_always_there() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mixed("linear", bias=False).eval()
    assert off_by(model, {"second": {4}}, repaired=True) < 1e-3
    assert off_by(model, {"second": {5}}, repaired=True) > 0.05


def test_a_few_enormous_rows_do_not_cost_the_others_much() -> None:
    """A channel that only one row in a hundred hears of is foreseen badly, which must not be heard in the others."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 8, generator=generator)
    rows[:, 7] = 0.05 * rows[:, :7].sum(1)
    rows[::100, 7] += 500
    layer = nn.Sequential(nn.Linear(8, 5)).requires_grad_(False)
    usual, wanted = rows[1::100], layer(rows[1::100])
    context = replace(make_context(build("plain")), calibration=lambda: [((rows[:256],), None)])
    reconstruct(layer, {"0": {7}}, context, 0)
    assert float((layer(usual) - wanted).norm() / wanted.norm()) < 0.1


@pytest.mark.parametrize("net", NETS)
def test_pruned_networks_answer_more_as_before(net: str) -> None:
    model = build(net)
    context = make_context(model, count=64)
    owners = Prune().groups(model, context.example)
    if not owners:
        pytest.skip("nothing can be pruned")
    errors = []
    for repaired in (False, True):
        cut = copy.deepcopy(model)
        shared = {"align": 1, "reconstruct": repaired}
        Prune().apply(cut, Step("prune", {owner: {"sparsity": 0.25} for owner in owners}, shared), context, 0)
        with torch.no_grad():
            errors.append(float(F.mse_loss(cut(images(16, 9)), model(images(16, 9)))))
    assert errors[1] < 0.8 * errors[0]


def test_the_same_plan_gives_the_same_weights() -> None:
    made = []
    for _ in range(2):
        model = build("concat")
        reconstruct(model, {"c.0": {1, 5, 20}}, make_context(model), 0)
        made.append(model.get_parameter("c.0.weight").detach().clone())
    assert torch.equal(*made)
    assert not torch.equal(made[0], build("concat").get_parameter("c.0.weight"))


def test_what_is_too_wide_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "WIDEST", 8)
    model = build("plain")
    before = copy.deepcopy(model.state_dict())
    reconstruct(model, {"b.0": {1}, "head": {2}}, make_context(model), 0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_anything_but_true_and_false_is_refused() -> None:
    model = build("plain")
    with pytest.raises(Infeasible, match=r"^prune\.reconstruct is 1: expected true or false"):
        Prune().apply(model, Step("prune", {"a.0": {"sparsity": 0.5}}, {"reconstruct": 1}), make_context(model), 0)
