import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.distill import Distill
from compressors.errors import ConfigError, Infeasible
from compressors.matching import FORMS, hint
from compressors.pipeline import Batch, Compressor, Context, compress
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.prune import Prune
from compressors.recovery import PASSES
from search.cache import Cache
from tests.context import make_context
from tests.patterns import accuracy, pass_over_patterns, patterns, patterns_context, taught
from tests.zoo import CLASSES, build, images

METHOD = Distill(weight_decay=5e-4, warmup=0.1, clip_norm=1.0, epoch_examples=32, first_round=2)
GOOD: dict[str, Scalar] = {"epochs": 1, "temperature": 4, "weight": 0.5, "learning_rate": 0.01}


def distill(model: nn.Module, context: Context, seed: int = 0, **changes: Scalar) -> Settings:
    return METHOD.apply(model, Step("distill", {}, GOOD | changes), context, seed).achieved[""]


def changed(a: nn.Module, b: nn.Module) -> bool:
    return not all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return taught("plain")


def test_a_pruned_net_regains_what_it_lost(teacher: nn.Module) -> None:
    context = Context(teacher, (images(),), pass_over_patterns, pass_over_patterns, F.cross_entropy)
    cut = Step("prune", {"a.0": {"sparsity": 0.5}, "b.0": {"sparsity": 0.5}}, {"align": 4})
    recover = Step("distill", {}, GOOD | {"epochs": 8})
    methods: dict[str, Compressor] = {"prune": Prune(), "distill": replace(METHOD, epoch_examples=256)}
    plans = [CompressionPlan(Target("any", "fp32"), steps) for steps in ((cut,), (cut, recover))]
    pruned, recovered = (accuracy(compress(teacher, plan, methods, context).model) for plan in plans)
    assert accuracy(teacher) > 0.9
    assert pruned < 0.7
    assert recovered > 0.9


def test_training_leaves_no_trace_but_the_weights() -> None:
    model = build("plain").requires_grad_(False)
    model.get_parameter("head.bias").requires_grad_(True)
    state = torch.get_rng_state()
    distill(model, make_context(build("plain")))
    assert not any(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.bias"]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert changed(model, build("plain"))


def test_the_seed_decides_the_order_of_the_data() -> None:
    models = [build("plain") for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        distill(model, make_context(build("plain")), seed=seed, epochs=2)
    assert not changed(models[0], models[1])
    assert changed(models[0], models[2])


def epochs_of(steps: tuple[Step, ...]) -> list[Scalar]:
    return [step.shared["epochs"] for step in steps]


@pytest.mark.parametrize(
    ("epochs", "ends"),
    [(0, [0]), (1, [1]), (2, [2]), (3, [2, 3]), (4, [2, 4]), (12, [2, 4, 8, 12]), (16, [2, 4, 8, 16])],
)
def test_rounds_double(epochs: int, ends: list[int]) -> None:
    step = Step("distill", {}, GOOD | {"epochs": epochs})
    assert epochs_of(METHOD.rounds(step)) == ends
    assert METHOD.rounds(step)[-1] is step
    assert all({**end.shared, "epochs": epochs} == step.shared for end in METHOD.rounds(step))


def test_the_first_round_can_be_longer() -> None:
    assert epochs_of(replace(METHOD, first_round=3).rounds(Step("distill", {}, GOOD | {"epochs": 13}))) == [
        3,
        6,
        12,
        13,
    ]


def test_rounds_without_an_epoch_are_refused() -> None:
    with pytest.raises(ConfigError, match="first_round: is 0"):
        replace(METHOD, first_round=0)


def test_the_rate_rises_and_falls_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = Distill._step

    def noting(self: Distill, *arguments: Any) -> float:
        rates.append(arguments[-1])
        return step(self, *arguments)

    monkeypatch.setattr(Distill, "_step", noting)
    model = build("plain")
    METHOD.apply(model, Step("distill", {}, GOOD | {"epochs": 8}), make_context(model, count=32, size=8), seed=0)
    # Four steps an epoch.
    for begin, end in ((0, 8), (8, 16), (16, 32)):
        peak = rates.index(max(rates[begin:end]), begin)
        assert peak - begin < 0.2 * (end - begin)
        assert rates[peak:end] == sorted(rates[peak:end], reverse=True)
        assert rates[peak] > 0.9 * float(GOOD["learning_rate"])
        assert rates[end - 1] == pytest.approx(0, abs=1e-9)


def test_layers_of_many_inputs_are_moved_less_far() -> None:
    # Three times 12 x 12 pixels are 432 inputs, three times as many as get the whole rate.
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    before = [p.detach().clone() for p in model.parameters()]
    METHOD.apply(model, Step("distill", {}, GOOD), make_context(build("plain"), count=32, size=32), seed=0)
    wide, wide_bias, narrow, _ = (
        float((p.detach() - b).abs().max()) for p, b in zip(model.parameters(), before, strict=True)
    )
    # Adam's first step is as long as its rate, whatever the gradient; weight decay adds a little.
    assert wide == pytest.approx(narrow / 3, rel=0.05)
    assert wide_bias == pytest.approx(narrow, rel=0.05)


@pytest.mark.parametrize("net", ["residual", "tied", "attention"])
@pytest.mark.parametrize(("first", "second"), [(4, 8), (2, 3), (8, 4)])
def test_more_epochs_go_on_where_fewer_ended_to_the_last_bit(net: str, first: int, second: int, tmp_path: Path) -> None:
    """Stored by one process, taken up by another, against trained in one go."""
    model = build(net)
    methods: dict[str, Compressor] = {"prune": Prune(), "distill": METHOD}
    owners = Prune().groups(model, (images(),))
    cut = Step("prune", {owner: {"sparsity": 0.5} for owner in owners}, {"align": 4})

    def recovered(epochs: int, store: Cache | None, lines: list[str]) -> nn.Module:
        steps = (cut, Step("distill", {}, GOOD | {"epochs": epochs}))
        context = replace(make_context(model), progress=lines.append)
        return compress(model, CompressionPlan(Target("any", "fp32"), steps, 5), methods, context, store).model

    recovered(first, Cache(tmp_path), [])
    lines: list[str] = []
    resumed = recovered(second, Cache(tmp_path), lines)
    assert len(lines) == max(0, second - first)
    whole = recovered(second, None, [])
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_rounds_see_the_data_in_other_orders() -> None:
    orders: list[Tensor] = []
    context = make_context(build("plain"))

    def train() -> Iterator[Batch]:
        orders.append(torch.get_rng_state())
        return iter(context.train())

    distill(build("plain"), replace(context, train=train), epochs=4)
    # A round counts its steps in a pass of its own before it trains.
    assert len(orders) == 6
    assert not torch.equal(orders[0], orders[3])


def test_a_small_split_is_passed_over_again_but_not_for_ever() -> None:
    passes: list[int] = []
    context = make_context(build("plain"), count=32, size=8)

    def train() -> Iterator[Batch]:
        passes.append(1)
        return iter(context.train())

    model, step = build("plain"), Step("distill", {}, GOOD | {"epochs": 1})
    for examples, expected in ((64, 2), (1000, PASSES)):
        passes.clear()
        replace(METHOD, epoch_examples=examples).apply(model, step, replace(context, train=train), seed=0)
        # Steps are counted in passes of their own before.
        assert len(passes) == 2 * expected


def test_half_precision_trains_too() -> None:
    step, context = Step("distill", {}, GOOD | {"epochs": 2}), make_context(build("plain"))
    halves, wholes = build("plain"), build("plain")
    replace(METHOD, precision="bf16").apply(halves, step, context, seed=0)
    replace(METHOD, precision="fp32").apply(wholes, step, context, seed=0)
    assert all(p.dtype is torch.float32 for p in halves.parameters())
    close = [torch.allclose(a, b, atol=0.05) for a, b in zip(halves.parameters(), wholes.parameters(), strict=True)]
    equal = [torch.equal(a, b) for a, b in zip(halves.parameters(), wholes.parameters(), strict=True)]
    assert all(close)
    assert not all(equal)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="auto, fp32, bf16"):
        replace(METHOD, precision="half")


def test_every_epoch_is_announced() -> None:
    lines: list[str] = []
    achieved = distill(build("plain"), replace(make_context(build("plain")), progress=lines.append), epochs=2)
    assert [line.split(",")[0] for line in lines] == ["distill epoch 1 of 2", "distill epoch 2 of 2"]
    assert achieved["epochs"] == 2
    assert isinstance(achieved["loss"], float)
    assert math.isfinite(achieved["loss"])


def _unlabelled(context: Context) -> Context:
    return replace(context, train=lambda: ((inputs, None) for inputs, _ in context.train()))


@pytest.mark.parametrize("blind", [lambda context: replace(context, loss=None), _unlabelled])
def test_without_labels_only_the_teacher_counts(blind: Callable[[Context], Context]) -> None:
    context = make_context(build("plain"))
    half, whole = build("residual"), build("residual")
    distill(half, blind(context), weight=0.5)
    distill(whole, context, weight=1.0)
    assert not changed(half, whole)


def test_labels_count_where_there_are_some() -> None:
    context = make_context(build("plain"))
    half, whole = build("residual"), build("residual")
    distill(half, context, weight=0.5)
    distill(whole, context, weight=1.0)
    assert changed(half, whole)


def test_labels_alone_recover_a_pruned_net(teacher: nn.Module) -> None:
    """Plain fine-tuning: whatever the teacher says."""
    cut = Step("prune", {"a.0": {"sparsity": 0.5}, "b.0": {"sparsity": 0.5}}, {"align": 4})
    step = Step("distill", {}, GOOD | {"epochs": 8, "weight": 0.0})
    students = []
    for other in (teacher, build("plain", seed=5)):
        student = copy.deepcopy(teacher)
        Prune().apply(student, cut, patterns_context(teacher), 0)
        assert accuracy(student) < 0.7
        replace(METHOD, epoch_examples=256).apply(student, step, patterns_context(other), 0)
        students.append(student)
    assert accuracy(students[0]) > 0.9
    assert not changed(*students)


@pytest.mark.parametrize("blind", [lambda context: replace(context, loss=None), _unlabelled])
def test_labels_alone_are_infeasible_where_there_are_none(blind: Callable[[Context], Context]) -> None:
    with pytest.raises(Infeasible, match=r"^distill.weight is 0, so that only labels count, and there are none"):
        distill(build("plain"), blind(make_context(build("plain"))), weight=0.0)


def test_divergence_is_infeasible_at_once() -> None:
    context = replace(make_context(build("plain")), loss=lambda output, _target: output.sum() * math.inf)
    model = build("plain")
    with pytest.raises(Infeasible, match=r"loss is (nan|-?inf) in epoch 1$"):
        distill(model, context, epochs=3)
    assert not model.training


def test_no_batches_are_infeasible() -> None:
    with pytest.raises(Infeasible, match="no training batches"):
        distill(build("plain"), replace(make_context(build("plain")), train=list))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", -1),
        ("epochs", 1.5),
        ("epochs", math.inf),
        ("temperature", 0),
        ("temperature", math.nan),
        ("weight", 1.5),
        ("learning_rate", 0),
        ("learning_rate", "fast"),
    ],
)
def test_what_cannot_be_done_is_infeasible(key: str, value: Scalar) -> None:
    with pytest.raises(Infeasible, match=f"distill.{key} is {value}"):
        METHOD.apply(build("plain"), Step("distill", {}, GOOD | {key: value}), make_context(build("plain")), 0)


def test_an_epoch_ends_after_so_many_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("plain")
    context = make_context(model, count=32, size=8)
    taken: list[int] = []
    step = Distill._step

    def counting(self: Distill, *arguments: Any) -> float:
        taken.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(Distill, "_step", counting)
    short = replace(METHOD, epoch_examples=16)
    short.apply(model, Step("distill", {}, GOOD | {"epochs": 3}), context, seed=0)
    # 16 of 32 examples are two batches of 8, three times.
    assert len(taken) == 6


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"temperature": 0}, {"weight": None}, {"learning_rate": "fast"}])
def test_a_parent_that_cannot_be_trained_is_refused_beforehand(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"compressor.distill.parent: distill.{next(iter(wrong))} is"):
        Distill(0.0, 0.1, 1.0, epoch_examples=8, first_round=2, parent={**GOOD, **wrong})


def test_a_parent_has_no_assistant() -> None:
    with pytest.raises(ConfigError, match=r"compressor.distill.parent: distill.assistant of a parent: expected none"):
        Distill(0.0, 0.1, 1.0, 8, 2, parent={**GOOD, "assistant": "half"})


def test_the_parent_is_trained_as_it_is_told() -> None:
    assert Distill(0.0, 0.1, 1.0, 8, 2).between() is None
    assert Distill(0.0, 0.1, 1.0, 8, 2, parent=GOOD).between() == Step("distill", {}, GOOD)


def test_other_than_flat_images_can_be_learned_from() -> None:
    """Channels come last in memory where there are pictures; a volume has no such order."""
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 8, 3)).eval()
    batch = ((torch.randn(6, 1, 4, 4, 4),), None)
    context = Context(model, batch[0], lambda: [batch], lambda: [batch], None)
    Distill(0.0, 0.1, 1.0, epoch_examples=8, first_round=2).apply(model, Step("distill", {}, GOOD), context, 0)
    assert all(p.is_contiguous() for p in model.parameters())


MATCHED: list[dict[str, Scalar]] = [{"match": form, "match_weight": 1.0} for form in FORMS]


def strayed(student: nn.Module, teacher: nn.Module) -> float:
    """What a linear map of the student's features leaves unexplained of the teacher's, on pictures of their own."""
    fitted = hint(student, teacher, (patterns(200, seed=5)[0],))
    with torch.no_grad(), fitted.watching(student, teacher) as distance:
        inputs, _ = patterns(200, seed=6)
        teacher(inputs)
        student(inputs)
        return float(distance())


def test_hints_bring_features_closer(teacher: nn.Module) -> None:
    context = patterns_context(teacher)
    owners = Prune().groups(teacher, context.example)
    cut = Step("prune", {owner: {"sparsity": 0.5} for owner in owners}, {"align": 4})
    ends: list[float] = []
    forms: list[dict[str, Scalar]] = [{}, {"match": "hint", "match_weight": 5.0}]
    for matched in forms:
        student = copy.deepcopy(teacher)
        Prune().apply(student, cut, context, 0)
        step = Step("distill", {}, {**GOOD, "epochs": 8, **matched})
        replace(METHOD, epoch_examples=256).apply(student, step, context, 0)
        ends.append(strayed(student, teacher))
    assert ends[1] < 0.9 * ends[0]


@pytest.mark.parametrize("matched", MATCHED, ids=str)
def test_what_is_matched_leaves_no_trace_in_the_model(matched: dict[str, Scalar]) -> None:
    model, context = build("residual"), make_context(build("residual", seed=1))
    names, state = list(model.state_dict()), copy.deepcopy(context.teacher.state_dict())
    plain = distill(build("residual"), context)
    achieved = distill(model, context, 0, **matched)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in build("residual").named_parameters()]
    assert not any(m._forward_hooks for net in (model, context.teacher) for m in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in context.teacher.state_dict().items())
    assert {key: achieved[key] for key in matched} == matched
    assert achieved["matched"] in (1, 5)
    assert not plain.keys() & {"match", "match_weight", "matched"}


@pytest.mark.parametrize("matched", MATCHED, ids=str)
def test_what_is_matched_is_trained_for(matched: dict[str, Scalar]) -> None:
    context = make_context(build("residual", seed=1))
    alone, both = build("residual"), build("residual")
    distill(alone, context)
    distill(both, context, 0, **matched)
    assert changed(alone, both)


def test_matching_nothing_is_as_if_it_were_not_asked_for() -> None:
    context = make_context(build("residual"))
    absent, none = build("plain"), build("plain")
    assert distill(absent, context) == distill(none, context, match="none")
    assert not changed(absent, none)


@pytest.mark.parametrize("matched", MATCHED, ids=str)
@pytest.mark.parametrize("net", ["residual", "attention"])
def test_matched_rounds_go_on_to_the_last_bit(net: str, matched: dict[str, Scalar], tmp_path: Path) -> None:
    model = build(net)
    methods: dict[str, Compressor] = {"prune": Prune(), "distill": METHOD}
    owners = Prune().groups(model, (images(),))
    cut = Step("prune", {owner: {"sparsity": 0.5} for owner in owners}, {"align": 4})

    def recovered(epochs: int, store: Cache | None) -> nn.Module:
        steps = (cut, Step("distill", {}, {**GOOD, **matched, "epochs": epochs}))
        plan = CompressionPlan(Target("any", "fp32"), steps, 5)
        return compress(model, plan, methods, make_context(model), store).model

    recovered(2, Cache(tmp_path))
    resumed, whole = recovered(4, Cache(tmp_path)), recovered(4, None)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_the_loss_that_is_told_is_that_of_the_answers() -> None:
    context = make_context(build("residual", seed=1))
    losses = [distill(build("residual"), context, match="hint", match_weight=weight)["loss"] for weight in (1e-9, 1e-8)]
    assert losses[0] == pytest.approx(float(distill(build("residual"), context)["loss"]), rel=1e-3)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_projections_fit_what_norms_make_of_a_batch_and_not_what_they_remember(teacher: nn.Module) -> None:
    """Fitted to features a thousand times too small, they once drowned the teacher's answers."""
    losses = []
    for weight in (1e-9, 1.0):
        student = copy.deepcopy(teacher)
        for name in ("a.1", "b.1"):
            student.get_buffer(f"{name}.running_var").mul_(1e6)
        step = Step("distill", {}, {**GOOD, "epochs": 2, "match": "hint", "match_weight": weight})
        applied = replace(METHOD, epoch_examples=256).apply(student, step, patterns_context(teacher), 0)
        losses.append(float(applied.achieved[""]["loss"]))
    assert losses[1] < 1.5 * losses[0] + 0.05


def test_what_was_remembered_of_the_teacher_is_no_help_for_its_insides() -> None:
    asked: list[int] = []

    def answers(*inputs: Tensor) -> Tensor:
        asked.append(1)
        return cast(Tensor, context.teacher(*inputs))

    context = make_context(build("residual"))
    distill(build("residual", seed=1), replace(context, answers=answers))
    assert asked
    asked.clear()
    distill(build("residual", seed=1), replace(context, answers=answers), match="relation", match_weight=1)
    assert not asked


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"match": "hnit"}, "distill.match is hnit: expected one of none, hint, attention, relation, cosine"),
        ({"match": "hint"}, "distill.match_weight is None: expected more than 0"),
        ({"match": "hint", "match_weight": 0}, "distill.match_weight is 0: expected more than 0"),
    ],
)
def test_a_match_that_cannot_be_is_infeasible(settings: dict[str, Scalar], words: str) -> None:
    with pytest.raises(Infeasible, match=f"^{words}$"):
        distill(build("plain"), make_context(build("plain")), 0, **settings)
