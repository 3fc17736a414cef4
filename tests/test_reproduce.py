"""A trial rebuilt from its plan alone, on a real runtime."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from compressors.layers import read_layers
from compressors.quantize import Quantize
from evaluators.accuracy import Accuracy
from evaluators.measurement import exact
from evaluators.onnxruntime import OnnxRuntime
from evaluators.size import Size
from search.loop import run
from search.reproduce import Reproduction, reproduce, show
from search.space import build_space
from search.study import Search
from search.trial import TrialRecord, Workbench
from search.workload import Split, Splits, Workload, classification
from tests.studies import make_search, quiet
from tests.zoo import build, images


def real_search(folder: Path) -> Search:
    """The uncompressed net and its 8-bit form in ONNX Runtime; the net's own answers are the labels."""
    model, inputs = build("residual"), images(64)
    with torch.no_grad():
        part = Split((inputs,), model(inputs).argmax(1))
    workload = Workload("residual-noise", model, Splits(part, part, part, part, tuple("abcde")), classification())
    quantize, runtime = Quantize(), OnnxRuntime(calibration_examples=16)
    accuracy, size = Accuracy(), Size()
    bits = {"bits": {"choices": [8, 32], "granularity": "model"}}
    groups = {"quantize": quantize.groups(model, (inputs,))}
    layers = read_layers(model, (inputs,))
    space = build_space({"quantize": bits}, {"quantize": quantize}, groups, layers, {runtime.name: runtime})
    bench = Workbench(
        workload,
        {"quantize": quantize},
        {runtime.name: runtime},
        {"accuracy": accuracy, "size": size},
        {},
        folder / "cache",
    )
    objectives = (*accuracy.metrics(), *size.metrics())
    return make_search(folder, 2, workbench=bench, space=space, objectives=objectives)


@pytest.fixture(scope="module")
def search(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Search:
    folder = tmp_path_factory.mktemp("reproduced")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    return real_search(folder)


@pytest.fixture(scope="module")
def record(search: Search) -> TrialRecord:
    """The trial with 8 bits; what candidates have in common is thrown away behind it."""
    records = run(search, quiet).records
    shutil.rmtree(search.workbench.cache)
    return records[1]


@pytest.fixture(scope="module")
def found(search: Search, record: TrialRecord) -> Reproduction:
    return reproduce(search, record, lambda _phase: None)


def test_the_same_plan_gives_the_same_predictions_and_sizes(found: Reproduction, record: TrialRecord) -> None:
    assert record.plan.steps
    assert found.holds
    assert found.same_predictions == 1.0
    assert found.largest_difference == 0.0
    assert [recorded.name for recorded, _ in found.pairs] == ["accuracy", "size_bytes"]
    assert all(recorded.value == rebuilt.value for recorded, rebuilt in found.pairs)


def test_rebuilding_uses_and_leaves_no_cache(found: Reproduction, search: Search) -> None:
    assert not search.workbench.cache.exists()


@pytest.mark.parametrize(("metric", "value"), [("accuracy", 1.5), ("accuracy", 0.01), ("size_bytes", 1.0)])
def test_a_record_that_says_something_else_does_not_hold(metric: str, value: float, found: Reproduction) -> None:
    pairs = tuple((exact(a.metric, value), b) if a.name == metric else (a, b) for a, b in found.pairs)
    forged = replace(found, pairs=pairs)
    assert not forged.holds
    said = text_of(forged)
    assert said.count("differs") == 1
    assert said.count("same within bands") == 1


def test_what_is_shown_puts_both_values_side_by_side(found: Reproduction) -> None:
    said = text_of(found)
    assert "trial 1, rebuilt from its plan" in said
    assert said.count("same within bands") == 2
    assert "100.0 % equal predictions" in said


def text_of(found: Reproduction) -> str:
    console = Console(width=140, file=io.StringIO())
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
