from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressors.errors import Infeasible
from compressors.pipeline import (
    ORIGINAL,
    Achieved,
    Applied,
    Artifact,
    Compressor,
    Context,
    FloatModel,
    LayerNumbers,
    Stage,
    compress,
    prefix_of,
)
from compressors.plan import CompressionPlan, Scalar, Step, Target, digest
from tests.context import make_context
from tests.zoo import build, images


@dataclass
class Recorder:
    """A method that adds what it is told to every weight, and remembers when it was called."""

    calls: list[str]
    method: ClassVar[str] = ""
    off: ClassVar[tuple[str, Scalar]] = ("add", 0.0)
    stage: ClassVar[Stage]

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        return {}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        self.calls.append(self.method)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(float(step.shared["add"]))
        return Applied({"": {"add": step.shared["add"]}})


class Shape(Recorder):
    method, stage = "shape", Stage.STRUCTURE


class Ready(Recorder):
    method, stage = "ready", Stage.PREPARE


class Swap(Recorder):
    method, stage = "swap", Stage.REPLACE


class Teach(Recorder):
    """Draws noise, as training draws the order of its data."""

    method, stage = "teach", Stage.RECOVER

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        applied = super().apply(model, step, context, seed)
        model.train().requires_grad_(True)
        with torch.no_grad():
            model.get_parameter("head.bias").add_(torch.randn(5))
        return applied


class Count(Recorder):
    method, stage = "count", Stage.NUMERIC

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        self.calls.append(self.method)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        bits = int(step.shared["bits"])
        return Applied({"head": {"bits": bits}}, {"head": LayerNumbers(bits)})


class Climb(Recorder):
    """Adds noise in rounds that end at 2, 4 and 8 `add`; the noise of a round depends on where it begins."""

    method, stage = "climb", Stage.RECOVER

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        since: Step | None = None
        for end in self.rounds(step):
            applied, since = self.advance(model, end, since, context, seed), end
        return applied

    def rounds(self, step: Step) -> tuple[Step, ...]:
        ends = [end for end in (2, 4, 8) if end < int(step.shared["add"])]
        return (*(Step("climb", {}, {"add": end}) for end in ends), step)

    def advance(self, model: nn.Module, step: Step, since: Step | None, context: Context, seed: int) -> Applied:
        begin = int(since.shared["add"]) if since else 0
        self.calls.append(f"climb {begin}-{step.shared['add']}")
        noise = torch.randn(5, generator=torch.Generator().manual_seed(100 * seed + begin))
        with torch.no_grad():
            model.get_parameter("head.bias").add_(noise)
        return Applied({"": {"add": step.shared["add"]}})

    def between(self) -> Step | None:
        return Step("climb", {}, {"add": 3})


class Look(Recorder):
    """Tells what it may look at: the model to learn from, and the one that was whole."""

    method, stage = "look", Stage.STRUCTURE

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        return Applied({"": {"teacher": biases(context.teacher), "whole": biases(context.whole)}})


def biases(model: nn.Module) -> float:
    return float(model.get_parameter("head.bias").detach().sum())


class Hold(Recorder):
    """Holds every weight at one, until it is told to let go."""

    method, stage = "hold", Stage.MASK

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        self.calls.append(self.method)
        for module in (model.get_submodule("head"), model.get_submodule("a.0")):
            parametrize.register_parametrization(module, "weight", Ones())
        return Applied({"": {"add": step.shared["add"]}})

    def release(self, model: nn.Module) -> None:
        self.calls.append("release")
        for module in (model.get_submodule("head"), model.get_submodule("a.0")):
            parametrize.remove_parametrizations(module, "weight")


class Ones(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)


class Out(Recorder):
    """Takes a module out, or would."""

    method, stage = "out", Stage.STRUCTURE

    def removed(self, step: Step) -> list[str]:
        return []


class Weigh(Recorder):
    """Numeric: at 4 bits an owner gets a tensor, at 8 none; `head` stands for itself and for `twin`."""

    method, stage = "weigh", Stage.NUMERIC

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        return {"head": ("head", "twin"), "a.0": ("a.0",), "b.0": ("b.0",)}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        self.calls.append(f"weigh {' '.join(step.per_layer)}".strip())
        numbers: dict[str, LayerNumbers] = {}
        for owner, settings in step.per_layer.items():
            bits = int(settings["bits"])
            values = torch.full((2,), float(model.get_parameter(f"{owner}.weight").sum())) if bits == 4 else None
            members = self.groups(model, context.example)[owner]
            numbers.update(dict.fromkeys(members, LayerNumbers(bits, values)))
        return Applied({owner: {"bits": s["bits"]} for owner, s in step.per_layer.items()}, numbers)


@dataclass
class Shelf:
    """A store in memory."""

    kept: dict[str, tuple[dict[str, Tensor], Mapping[str, Achieved]]] = field(default_factory=dict)
    models: dict[str, FloatModel] = field(default_factory=dict)
    numbers: dict[tuple[str, str], Applied] = field(default_factory=dict)

    def recall(self, prefix: str) -> FloatModel | None:
        return self.models.get(prefix)

    def remember(self, prefix: str, made: FloatModel) -> None:
        self.models[prefix] = made

    def load(self, prefix: str, model: nn.Module) -> Mapping[str, Achieved] | None:
        if prefix not in self.kept:
            return None
        state, achieved = self.kept[prefix]
        model.load_state_dict(state)
        return achieved

    def save(self, prefix: str, model: nn.Module, achieved: Mapping[str, Achieved]) -> None:
        self.kept[prefix] = ({k: v.clone() for k, v in model.state_dict().items()}, dict(achieved))

    def keep(self, prefix: str) -> None: ...

    def load_numbers(self, prefix: str, key: str) -> Applied | None:
        return self.numbers.get((prefix, key))

    def save_numbers(self, prefix: str, key: str, applied: Applied) -> None:
        self.numbers[prefix, key] = applied


class Disk(Shelf):
    """What another process finds: nothing in memory."""

    def recall(self, prefix: str) -> FloatModel | None:
        return None


HOLD, OUT, READY, SHAPE, SWAP, TEACH, EIGHT, FOUR = (
    Step("hold", {}, {"add": 0.0625}),
    Step("out", {}, {"add": 0.125}),
    Step("ready", {}, {"add": 0.375}),
    Step("shape", {}, {"add": 0.5}),
    Step("swap", {}, {"add": 0.75}),
    Step("teach", {}, {"add": 0.25}),
    Step("count", {}, {"bits": 8}),
    Step("count", {}, {"bits": 4}),
)


class Rival(Weigh):
    """Another method that decides about the same layers."""

    method = "rival"


METHODS: tuple[type[Recorder], ...] = (Ready, Out, Look, Shape, Swap, Hold, Teach, Climb, Count, Weigh, Rival)


def climb(epochs: int) -> Step:
    return Step("climb", {}, {"add": epochs})


def weigh(group_size: int = 32, **bits: int) -> Step:
    """Owners are named with `_` for the dot."""
    return Step("weigh", {o.replace("_", "."): {"bits": b} for o, b in bits.items()}, {"group_size": group_size})


def plan_of(*steps: Step, seed: int = 0) -> CompressionPlan:
    return CompressionPlan(Target("any", "fp32"), steps, seed)


def run(
    *steps: Step,
    seed: int = 0,
    calls: list[str] | None = None,
    store: Shelf | None = None,
) -> Artifact:
    model, calls = build("plain"), [] if calls is None else calls
    methods: dict[str, Compressor] = {m.method: m(calls) for m in METHODS}
    return compress(model, plan_of(*steps, seed=seed), methods, make_context(model), store)


def prefix(*steps: Step, seed: int = 0) -> str:
    return prefix_of(plan_of(*steps, seed=seed), {m.method: m([]) for m in METHODS})


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_stages_decide_the_order() -> None:
    calls: list[str] = []
    run(EIGHT, TEACH, SWAP, SHAPE, calls=calls)
    assert calls == ["shape", "swap", "teach", "count"]


def test_the_given_model_is_untouched() -> None:
    model = build("plain")
    plan = CompressionPlan(Target("any", "fp32"), (SHAPE,))
    artifact = compress(model, plan, {"shape": Shape([])}, make_context(model))
    assert torch.equal(model(images()), build("plain")(images()))
    assert not torch.equal(artifact.model(images()), model(images()))
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_to_do_gives_the_original() -> None:
    artifact = run()
    assert artifact.prefix == ORIGINAL
    assert torch.equal(artifact.model(images()), build("plain")(images()))


def test_the_artifact_is_ready_to_deploy() -> None:
    artifact = run(TEACH)
    assert not artifact.model.training
    assert not any(p.requires_grad for p in artifact.model.parameters())


def test_what_was_done_is_told_per_method() -> None:
    artifact = run(SHAPE, EIGHT)
    assert artifact.achieved == {"shape": {"": {"add": 0.5}}, "count": {"head": {"bits": 8}}}
    assert artifact.numbers == {"head": LayerNumbers(8)}
    assert artifact.seconds.keys() == {"shape", "count"}


def test_numbers_do_not_change_the_prefix() -> None:
    assert run(SHAPE, TEACH, EIGHT).prefix == run(SHAPE, TEACH, FOUR).prefix == run(FOUR, TEACH, SHAPE).prefix
    assert run(SHAPE, SWAP, FOUR).prefix == run(EIGHT, SWAP, SHAPE).prefix
    assert run(EIGHT).prefix == ORIGINAL


@pytest.mark.parametrize(
    "steps", [(SHAPE,), (TEACH,), (SHAPE, SWAP, TEACH), (SWAP, TEACH), (Step("shape", {}, {"add": 0.6}), TEACH)]
)
def test_other_weights_have_another_prefix(steps: tuple[Step, ...]) -> None:
    assert run(*steps).prefix != run(SHAPE, TEACH).prefix


def test_another_seed_has_another_prefix_and_other_weights() -> None:
    first, second = run(TEACH, seed=1), run(TEACH, seed=2)
    assert first.prefix != second.prefix
    assert not torch.equal(first.model(images()), second.model(images()))


def test_the_callers_random_state_neither_counts_nor_changes() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = run(TEACH)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(run(TEACH).model(images()), first.model(images()))


def test_a_stored_prefix_is_not_trained_again() -> None:
    calls: list[str] = []
    disk = Disk()
    first = run(SHAPE, TEACH, EIGHT, calls=calls, store=disk)
    second = run(SHAPE, TEACH, FOUR, calls=calls, store=disk)
    assert calls == ["shape", "teach", "count", "shape", "count"]
    assert torch.equal(first.model(images()), second.model(images()))
    assert second.achieved["teach"] == first.achieved["teach"]
    assert second.numbers == {"head": LayerNumbers(4)}
    assert not any(p.requires_grad for p in second.model.parameters())


def test_a_float_model_in_memory_is_taken_as_it_is() -> None:
    calls: list[str] = []
    shelf = Shelf()
    first = run(SHAPE, TEACH, EIGHT, calls=calls, store=shelf)
    second = run(SHAPE, TEACH, FOUR, calls=calls, store=shelf)
    assert calls == ["shape", "teach", "count", "count"]
    assert second.model is first.model
    assert second.achieved == {**first.achieved, "count": {"head": {"bits": 4}}}
    assert run(SHAPE, EIGHT, calls=calls, store=shelf).model is not first.model


def test_what_needs_no_training_is_not_stored() -> None:
    shelf = Shelf()
    run(SHAPE, EIGHT, store=shelf)
    assert not shelf.kept


def test_recovery_passes_through_shorter_ones() -> None:
    disk, calls = Disk(), list[str]()
    run(SHAPE, climb(8), calls=calls, store=disk)
    assert calls == ["shape", "climb 0-2", "climb 2-4", "climb 4-8"]
    assert set(disk.kept) == {prefix(SHAPE, climb(epochs)) for epochs in (2, 4, 8)}
    for epochs in (2, 4, 8):
        state, achieved = disk.kept[prefix(SHAPE, climb(epochs))]
        alone = run(SHAPE, climb(epochs))
        assert all(torch.equal(state[name], value) for name, value in alone.model.state_dict().items())
        assert achieved == {"climb": {"": {"add": epochs}}} == {"climb": alone.achieved["climb"]}


@pytest.mark.parametrize(
    ("before", "after", "trained"),
    [(8, 4, []), (8, 2, []), (4, 8, ["climb 4-8"]), (2, 8, ["climb 2-4", "climb 4-8"]), (4, 3, ["climb 2-3"])],
)
def test_only_what_is_missing_is_trained(before: int, after: int, trained: list[str]) -> None:
    disk, calls = Disk(), list[str]()
    run(climb(before), store=disk)
    artifact = run(climb(after), calls=calls, store=disk)
    assert calls == trained
    assert same(artifact.model, run(climb(after)).model)
    assert artifact.achieved == {"climb": {"": {"add": after}}}


def test_all_rounds_together_are_what_apply_does() -> None:
    model = build("plain")
    Climb([]).apply(model, climb(8), make_context(model), 3)
    assert same(run(climb(8), seed=3).model, model)


def test_another_seed_or_structure_shares_no_round() -> None:
    disk, calls = Disk(), list[str]()
    run(climb(4), store=disk)
    run(climb(4), calls=calls, store=disk, seed=1)
    run(SHAPE, climb(4), calls=calls, store=disk)
    assert calls == ["climb 0-2", "climb 2-4", "shape", "climb 0-2", "climb 2-4"]


def test_what_lost_modules_is_trained_before_more_is_cut() -> None:
    calls: list[str] = []
    run(OUT, SHAPE, climb(2), calls=calls)
    assert calls == ["out", "shape", "out", "climb 0-2", "climb 2-3", "shape", "climb 0-2"]
    calls.clear()
    run(OUT, SWAP, climb(2), calls=calls)
    assert calls == ["out", "swap", "out", "climb 0-2", "climb 2-3", "swap", "climb 0-2"]
    for steps in ((OUT, climb(2)), (SHAPE, SWAP, climb(2)), (OUT, SHAPE), (OUT, SWAP, TEACH)):
        calls.clear()
        run(*steps, calls=calls)
        assert "climb 2-3" not in calls, "nothing else is cut, or nothing is out, or nothing grows"


def test_children_share_their_parent() -> None:
    disk, calls = Disk(), list[str]()
    other = Step("shape", {}, {"add": 0.75})
    run(OUT, SHAPE, climb(2), store=disk)
    child = run(OUT, other, climb(2), calls=calls, store=disk)
    assert [call for call in calls if call.startswith("climb")] == ["climb 0-2"], "its own round, none of the parent's"
    assert same(child.model, run(OUT, other, climb(2)).model)
    calls.clear()
    more = run(OUT, other, climb(4), calls=calls, store=disk)
    assert [call for call in calls if call.startswith("climb")] == ["climb 2-4"]
    assert same(more.model, run(OUT, other, climb(4)).model)
    calls.clear()
    run(OUT, climb(4), calls=calls, store=disk)
    assert calls == ["out", "climb 2-4"], "what the parent began with, other plans begin with"


def test_what_prepares_runs_first_and_is_all_that_others_begin_with() -> None:
    disk, calls = Disk(), list[str]()
    first = run(SHAPE, READY, TEACH, calls=calls, store=disk)
    assert calls == ["ready", "shape", "teach"]
    assert first.achieved.keys() == {"ready", "shape", "teach"}
    assert set(disk.kept) == {prefix(READY), prefix(READY, SHAPE, TEACH)}
    calls.clear()
    second = run(READY, SWAP, calls=calls, store=disk)
    assert calls == ["swap"], "what was prepared is found"
    assert second.achieved["ready"] == {"": {"add": 0.375}}
    assert same(second.model, run(READY, SWAP).model)
    assert prefix(SHAPE, TEACH) not in {prefix(READY, SHAPE, TEACH), prefix(READY)}


def test_preparing_alone_is_a_plan_too() -> None:
    disk, calls = Disk(), list[str]()
    alone = run(READY, store=disk)
    assert alone.prefix == prefix(READY)
    assert same(run(READY, calls=calls, store=disk).model, alone.model)
    assert not calls


def test_the_parent_of_many_is_made_of_what_was_prepared() -> None:
    disk, calls = Disk(), list[str]()
    run(READY, OUT, SHAPE, climb(2), calls=calls, store=disk)
    assert calls == ["ready", "out", "shape", "out", "climb 0-2", "climb 2-3", "shape", "climb 0-2"]
    assert {prefix(READY, OUT, climb(3)), prefix(READY, OUT, SHAPE, climb(2))} <= set(disk.kept)
    assert not set(disk.kept) & {prefix(OUT, climb(3)), prefix(OUT, climb(2))}


def test_the_whole_model_is_the_one_that_was_prepared_and_the_teacher_the_uncompressed_one() -> None:
    look = Step("look", {}, {})
    original = biases(build("plain"))
    assert run(look).achieved["look"][""] == {"teacher": original, "whole": original}
    told = run(READY, look).achieved["look"][""]
    assert told["teacher"] == original
    assert told["whole"] == pytest.approx(original + 5 * 0.375)


def test_without_anything_to_prepare_prefixes_are_what_they_were() -> None:
    """Stored weights of earlier versions are found by them."""
    assert prefix(SHAPE, TEACH, seed=2) == digest([2, asdict(SHAPE), asdict(TEACH)])


def test_what_is_held_is_let_go_once_nothing_trains_any_more() -> None:
    calls: list[str] = []
    artifact = run(HOLD, SHAPE, TEACH, EIGHT, calls=calls)
    assert calls == ["shape", "hold", "teach", "release", "count"]
    assert (artifact.model.get_parameter("head.weight") == 1).all()
    assert artifact.model.state_dict().keys() == build("plain").state_dict().keys()
    calls.clear()
    assert (run(HOLD, calls=calls).model.get_parameter("a.0.weight") == 1).all()
    assert calls == ["hold", "release"]


def test_what_is_stored_is_still_held() -> None:
    """More training goes on from it."""
    disk, calls = Disk(), list[str]()
    run(HOLD, climb(2), store=disk)
    state, _ = disk.kept[prefix(HOLD, climb(2))]
    assert not (state["head.parametrizations.weight.original"] == 1).any()
    artifact = run(HOLD, climb(4), calls=calls, store=disk)
    assert calls == ["hold", "climb 2-4", "release"]
    assert same(artifact.model, run(HOLD, climb(4)).model)
    assert prefix(HOLD, climb(2)) != prefix(climb(2))


def test_every_recovery_method_is_stored_by_itself() -> None:
    disk, calls = Disk(), list[str]()
    run(TEACH, climb(2), store=disk)
    artifact = run(TEACH, climb(4), calls=calls, store=disk)
    assert calls == ["climb 2-4"]
    assert artifact.achieved == {"teach": {"": {"add": 0.25}}, "climb": {"": {"add": 4}}}
    assert run(TEACH, calls=calls, store=disk).achieved == {"teach": {"": {"add": 0.25}}}
    assert calls == ["climb 2-4"]


def test_numbers_that_are_stored_are_not_asked_for_again() -> None:
    disk, calls = Disk(), list[str]()
    first = run(SHAPE, weigh(a_0=4, b_0=4), calls=calls, store=disk)
    second = run(SHAPE, weigh(b_0=4, head=4, a_0=8), calls=calls, store=disk)
    again = run(SHAPE, weigh(b_0=4, head=4), calls=calls, store=disk)
    assert calls == ["shape", "weigh a.0 b.0", "shape", "weigh head a.0", "shape"]
    assert list(second.achieved["weigh"].items()) == [
        (o, {"bits": b}) for o, b in (("b.0", 4), ("head", 4), ("a.0", 8))
    ]
    assert second.numbers["b.0"] == first.numbers["b.0"]
    assert again.numbers == {name: second.numbers[name] for name in ("b.0", "head", "twin")}
    assert again.achieved["weigh"] == {"b.0": {"bits": 4}, "head": {"bits": 4}}


def test_the_order_of_numbers_does_not_tell_what_was_stored() -> None:
    disk = Disk()
    run(weigh(head=4), store=disk)
    assert list(run(weigh(b_0=4, head=4, a_0=4), store=disk).numbers) == list(run(weigh(b_0=4, head=4, a_0=4)).numbers)


def test_numbers_without_tensors_are_not_stored() -> None:
    disk = Disk()
    run(weigh(a_0=8, b_0=8), EIGHT, store=disk)
    assert not disk.numbers


@pytest.mark.parametrize(
    ("steps", "seed"), [((SHAPE, weigh(a_0=4)), 0), ((weigh(group_size=64, a_0=4),), 0), ((weigh(a_0=4),), 1)]
)
def test_numbers_belong_to_their_prefix_settings_and_seed(steps: tuple[Step, ...], seed: int) -> None:
    disk, calls = Disk(), list[str]()
    run(weigh(a_0=4), store=disk)
    run(*steps, seed=seed, calls=calls, store=disk)
    assert calls[-1:] == ["weigh a.0"]
    assert len(disk.numbers) == 2


def test_a_numeric_method_without_layers_is_always_asked() -> None:
    disk, calls = Disk(), list[str]()
    for _ in range(2):
        assert run(EIGHT, calls=calls, store=disk).numbers == {"head": LayerNumbers(8)}
    assert calls == ["count", "count"]


def test_two_methods_may_decide_about_other_layers_but_not_about_one() -> None:
    other = Step("rival", {"b.0": {"bits": 4}})
    assert run(weigh(a_0=4), other).numbers.keys() == {"a.0", "b.0"}
    with pytest.raises(Infeasible, match=r"^head: both weigh and rival decide about its weight; turn one of them off"):
        run(weigh(a_0=4, head=4), Step("rival", {"head": {"bits": 8}}))
