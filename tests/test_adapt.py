"""Recovery by a network's own answers: what it brings back, and that it asks nobody else."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressors.adapt import Adapt, unsure
from compressors.errors import Infeasible
from compressors.pipeline import Batch, Compressor, Context, compress
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.prune import Prune
from compressors.sparsify import Sparsify
from tests.context import make_context
from tests.patterns import accuracy, pass_over_patterns, patterns_context, taught
from tests.zoo import CLASSES, build, images

METHOD = Adapt(weight_decay=0.0, warmup=0.1, clip_norm=1.0, epoch_examples=256)
GOOD: dict[str, Scalar] = {"epochs": 8, "learning_rate": 0.005}


def adapt(model: nn.Module, context: Context, seed: int = 0, **changes: Scalar) -> Settings:
    return METHOD.apply(model, Step("adapt", {}, GOOD | changes), context, seed).achieved[""]


class Silent(nn.Module):
    """A teacher that nobody may ask."""

    def forward(self, *_inputs: Tensor) -> Tensor:
        raise AssertionError("the uncompressed model was asked")


def unlabelled() -> Iterator[Batch]:
    return ((inputs, None) for inputs, _ in pass_over_patterns())


def alone() -> Context:
    return Context(Silent(), (images(),), unlabelled, list, None)


@pytest.mark.parametrize("net", ["plain", "residual"])
def test_a_pruned_net_finds_back_by_itself(net: str) -> None:
    model = taught(net)
    owners = Prune().groups(model, (images(),))
    cut = Step("prune", {owner: {"sparsity": 0.5} for owner in owners}, {"align": 4})
    Prune().apply(model, cut, patterns_context(copy.deepcopy(model)), 0)
    lost = accuracy(model)
    adapt(model, alone())
    assert lost < 0.4
    assert accuracy(model) > 0.9


def test_it_recovers_under_masks() -> None:
    teacher = taught("plain")
    steps = (Step("sparsify", {"a.0": {"sparsity": 0.75}, "b.0": {"sparsity": 0.75}}), Step("adapt", {}, GOOD))
    methods: dict[str, Compressor] = {"sparsify": Sparsify(), "adapt": METHOD}
    plans = [CompressionPlan(Target("any", "fp32"), steps[:count]) for count in (1, 2)]
    held, adapted = (compress(teacher, plan, methods, patterns_context(teacher)).model for plan in plans)
    assert accuracy(adapted) > accuracy(held) + 0.05
    assert (adapted.get_parameter("b.0.weight") == 0).float().mean() == pytest.approx(0.75, abs=0.01)


def test_labels_change_nothing() -> None:
    told, untold = build("residual"), build("residual")
    context = make_context(build("plain"))
    adapt(told, context, epochs=1)
    adapt(untold, replace(context, train=lambda: ((x, None) for x, _ in context.train()), loss=None), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(told.parameters(), untold.parameters(), strict=True))


def test_the_seed_decides_the_order_of_the_data() -> None:
    models = [build("plain") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        adapt(model, make_context(build("plain")), seed=seed, epochs=1)
    first, again, other = ([*model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def logits(rows: int, seed: int, size: float) -> Tensor:
    return size * torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)  # the first call of an operation is slow on a busy machine
@given(st.integers(2, 20), st.integers(0, 99), st.floats(0, 1000))
def test_information_is_never_less_than_nothing_nor_more_than_one_of_so_many_classes(
    rows: int, seed: int, size: float
) -> None:
    assert -math.log(CLASSES) - 1e-5 <= float(unsure(logits(rows, seed, size))) <= 1e-5


def test_the_most_is_told_by_sure_answers_of_all_kinds() -> None:
    assert float(unsure(100 * torch.eye(CLASSES))) == pytest.approx(-math.log(CLASSES))
    assert float(unsure(100 * torch.eye(CLASSES)[[2, 2, 2]])) == pytest.approx(0, abs=1e-6)
    assert float(unsure(torch.zeros(4, CLASSES))) == pytest.approx(0, abs=1e-6)


def test_answers_that_are_certain_still_have_a_slope() -> None:
    output = (1e4 * torch.eye(CLASSES)[[0, 1]]).requires_grad_(True)
    (gradient,) = torch.autograd.grad(unsure(output), output)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 1), (3,), (3, 7, 5)])
def test_what_is_no_classifier_cannot_tell(shape: tuple[int, ...]) -> None:
    with pytest.raises(Infeasible, match=r"^adapt needs a classifier: expected outputs \(n, classes\), not \(3"):
        unsure(torch.zeros(shape))


def test_training_leaves_no_trace_but_the_weights() -> None:
    model = build("plain").requires_grad_(False)
    state = torch.get_rng_state()
    achieved = adapt(model, make_context(build("plain")), epochs=1)
    assert achieved["epochs"] == 1
    assert -math.log(CLASSES) <= float(achieved["loss"]) < 0
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("key", "value"), [("epochs", -1), ("epochs", 0.5), ("learning_rate", 0)])
def test_what_cannot_be_done_is_infeasible(key: str, value: Scalar) -> None:
    with pytest.raises(Infeasible, match=f"adapt.{key} is {value}"):
        adapt(build("plain"), make_context(build("plain")), 0, **{key: value})
