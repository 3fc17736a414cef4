from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from compressors.pipeline import (
    ORIGINAL,
    Achieved,
    Applied,
    Artifact,
    Compressor,
    Context,
    LayerNumbers,
    Stage,
    compress,
)
from compressors.plan import CompressionPlan, Scalar, Step, Target
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


@dataclass
class Shelf:
    """A prefix store in memory."""

    kept: dict[str, tuple[dict[str, Tensor], Mapping[str, Achieved]]] = field(default_factory=dict)

    def load(self, prefix: str, model: nn.Module) -> Mapping[str, Achieved] | None:
        if prefix not in self.kept:
            return None
        state, achieved = self.kept[prefix]
        model.load_state_dict(state)
        return achieved

    def save(self, prefix: str, model: nn.Module, achieved: Mapping[str, Achieved]) -> None:
        self.kept[prefix] = ({k: v.clone() for k, v in model.state_dict().items()}, achieved)


SHAPE, TEACH, EIGHT, FOUR = (
    Step("shape", {}, {"add": 0.5}),
    Step("teach", {}, {"add": 0.25}),
    Step("count", {}, {"bits": 8}),
    Step("count", {}, {"bits": 4}),
)


def run(*steps: Step, seed: int = 0, calls: list[str] | None = None, store: Shelf | None = None) -> Artifact:
    model, calls = build("plain"), [] if calls is None else calls
    methods: dict[str, Compressor] = {m.method: m(calls) for m in (Shape, Teach, Count)}
    return compress(model, CompressionPlan(Target("any", "fp32"), steps, seed), methods, make_context(model), store)


def test_stages_decide_the_order() -> None:
    calls: list[str] = []
    run(EIGHT, TEACH, SHAPE, calls=calls)
    assert calls == ["shape", "teach", "count"]


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
    assert run(EIGHT).prefix == ORIGINAL


@pytest.mark.parametrize("steps", [(SHAPE,), (TEACH,), (Step("shape", {}, {"add": 0.6}), TEACH)])
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
    shelf = Shelf()
    first = run(SHAPE, TEACH, EIGHT, calls=calls, store=shelf)
    second = run(SHAPE, TEACH, FOUR, calls=calls, store=shelf)
    assert calls == ["shape", "teach", "count", "shape", "count"]
    assert torch.equal(first.model(images()), second.model(images()))
    assert second.achieved["teach"] == first.achieved["teach"]
    assert second.numbers == {"head": LayerNumbers(4)}
    assert not any(p.requires_grad for p in second.model.parameters())


def test_what_needs_no_training_is_not_stored() -> None:
    shelf = Shelf()
    run(SHAPE, EIGHT, store=shelf)
    assert not shelf.kept
