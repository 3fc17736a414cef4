from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressors.assistant import assistant_plan
from compressors.depth import Depth
from compressors.distill import Distill
from compressors.errors import Infeasible
from compressors.pipeline import Artifact, Compressor, Context, compress
from compressors.plan import CompressionPlan, Scalar, Step, Target
from compressors.prune import Prune
from compressors.quantize import Quantize
from search.cache import Cache
from search.trial import Clock
from tests.context import make_context
from tests.zoo import build, images

DISTILL = Distill(weight_decay=5e-4, warmup=0.1, clip_norm=1.0, epoch_examples=32, first_round=2)
METHODS: dict[str, Compressor] = {"depth": Depth(), "prune": Prune(), "distill": DISTILL, "quantize": Quantize()}
GOOD: dict[str, Scalar] = {"epochs": 2, "temperature": 4, "weight": 0.5, "learning_rate": 0.01}
ASSISTED = Step("distill", {}, {**GOOD, "assistant": "half"})
CUT = Step("prune", {"stem.0": {"sparsity": 0.75}, "down.0": {"sparsity": 0.5}}, {"align": 4})
OUT = Step("depth", {"block": {"skip": True}})
INT8 = Step("quantize", {"head": {"bits": 8}}, {"group_size": 32})


def plan(*steps: Step) -> CompressionPlan:
    return CompressionPlan(Target("any", "fp32"), steps, 3)


def made(
    *steps: Step, context: Context | None = None, store: Cache | None = None, model: nn.Module | None = None
) -> Artifact:
    model = model or build("residual")
    return compress(model, plan(*steps), METHODS, context or make_context(model), store)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_the_assistant_is_the_model_of_a_plan_with_half_of_the_structure() -> None:
    found = assistant_plan(plan(CUT, ASSISTED, INT8), ASSISTED, METHODS)
    halves = Step("prune", {"stem.0": {"sparsity": 0.375}, "down.0": {"sparsity": 0.25}}, {"align": 4})
    assert found == plan(halves, Step("distill", {}, GOOD))


def test_every_second_block_stays() -> None:
    out = Step("depth", {f"layer.{i}": {"skip": i != 2} for i in range(6)})
    assert Depth().half(out) == Step("depth", {"layer.1": {"skip": True}, "layer.4": {"skip": True}})
    assert Depth().half(OUT) is None


def test_what_cannot_be_halved_stays_whole() -> None:
    found = assistant_plan(plan(OUT, CUT, ASSISTED), ASSISTED, METHODS)
    assert found is not None
    assert [step.method for step in found.steps] == ["prune", "distill"]


@pytest.mark.parametrize("shared", [GOOD, {**GOOD, "assistant": "none"}])
def test_without_one_the_teacher_is_the_uncompressed_model(shared: dict[str, Scalar]) -> None:
    step = Step("distill", {}, shared)
    assert assistant_plan(plan(CUT, step), step, METHODS) is None
    assert same(made(CUT, step).model, made(CUT, Step("distill", {}, GOOD)).model)


def test_the_student_learns_from_the_assistant() -> None:
    halves = assistant_plan(plan(CUT, ASSISTED), ASSISTED, METHODS)
    assert halves is not None
    teacher = made(*halves.steps).model
    by_hand = made(CUT, Step("distill", {}, GOOD), context=replace(make_context(build("residual")), teacher=teacher))
    assisted = made(CUT, ASSISTED)
    assert same(assisted.model, by_hand.model)
    assert not same(assisted.model, made(CUT, Step("distill", {}, GOOD)).model)
    assert assisted.achieved["distill"][""]["assistant"] == "half"
    assert assisted.seconds.keys() == {"prune", "distill"}


def test_the_seconds_of_an_assistant_are_shared_and_those_of_the_student_are_not() -> None:
    clocks = [Clock(), Clock()]
    for step, clock in zip((ASSISTED, Step("distill", {}, GOOD)), clocks, strict=True):
        assisted = made(CUT, step, context=replace(make_context(build("residual")), shared=clock.shared))
    assert clocks[0].shared_s > 0
    assert clocks[1].shared_s == 0 < assisted.seconds["distill"]


def test_remembered_answers_are_those_of_the_uncompressed_model_and_not_asked_for() -> None:
    asked: list[torch.Tensor] = []

    def answers(*inputs: torch.Tensor) -> Any:
        asked.append(inputs[0])
        return context.teacher(*inputs)

    context = replace(make_context(build("residual")), answers=answers)
    made(CUT, ASSISTED, context=context)
    only_assistant = len(asked)
    asked.clear()
    made(CUT, Step("distill", {}, GOOD), context=context)
    assert only_assistant == len(asked), "the assistant asks for them, the student does not"


def test_rounds_with_an_assistant_go_on_to_the_last_bit(tmp_path: Path) -> None:
    longer = replace(ASSISTED, shared={**ASSISTED.shared, "epochs": 4})
    made(CUT, ASSISTED, store=Cache(tmp_path))
    resumed, whole = made(CUT, longer, store=Cache(tmp_path)), made(CUT, longer)
    assert same(resumed.model, whole.model)


def test_an_assistant_is_trained_once_for_all_students(tmp_path: Path) -> None:
    store, lines = Cache(tmp_path), list[str]()
    context = replace(make_context(build("residual")), progress=lines.append)
    made(CUT, ASSISTED, context=context, store=store)
    assert len(lines) == 4
    lines.clear()
    other = replace(ASSISTED, shared={**ASSISTED.shared, "match": "cosine", "match_weight": 1.0})
    made(CUT, other, context=context, store=store)
    assert len(lines) == 4, "it is trained as its student, so another training needs another one"
    lines.clear()
    made(CUT, Step("distill", {}, GOOD), context=context, store=store)
    made(*_halved(), context=context, store=store)
    assert len(lines) == 2, "the assistant's own plan finds it in the store"


def _halved() -> tuple[Step, ...]:
    found = assistant_plan(plan(CUT, ASSISTED), ASSISTED, METHODS)
    assert found is not None
    return found.steps


def test_what_only_the_student_s_rounds_lead_to_is_told() -> None:
    told: list[tuple[Step, object]] = []
    longer = replace(ASSISTED, shared={**ASSISTED.shared, "epochs": 4})
    context = replace(make_context(build("residual")), between_rounds=lambda step, told_: told.append((step, told_)))
    made(CUT, longer, context=context)
    assert [step for step, _ in told] == [longer]


def test_where_nothing_can_be_halved_it_is_infeasible() -> None:
    with pytest.raises(Infeasible, match=r"^distill.assistant asks for a model that lost half, but here nothing can"):
        made(OUT, ASSISTED)


def test_an_unknown_assistant_is_infeasible() -> None:
    with pytest.raises(Infeasible, match=r"^distill.assistant is third: expected one of none, half$"):
        made(CUT, Step("distill", {}, {**GOOD, "assistant": "third"}))


def test_groups_that_keep_all_their_channels_have_no_half() -> None:
    assert Prune().half(Step("prune", {"stem.0": {"sparsity": 0.0}}, {"align": 4})) is None
    owners = Prune().groups(build("residual"), (images(),))
    assert set(CUT.per_layer) <= set(owners)
