"""The Python API on a network of one's own, with a real runtime."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compareto import ConfigError, Result, compress, select
from compressors.plan import CompressionPlan
from evaluators.latency import Latency
from evaluators.onnxruntime import OnnxRuntime
from evaluators.runtime import Deployed
from evaluators.stopwatch import Reading
from tests.zoo import build, images

Loader = list[Any]


def unlabelled(count: int, seed: int) -> list[Tensor]:
    return [images(count, seed)[start : start + 16] for start in range(0, count, 16)]


def labelled(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The network's own answers are right, so that it starts at 100 %."""
    model = build("residual")
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in unlabelled(count, seed)]


def search(store: Path, train: Loader, validation: Loader, trials: int, *more: str, **changes: Any) -> Result:
    """Uncompressed, 8 bits, then what the sampler says, with as little timing as makes a band."""
    options = [
        f"folder={store}",
        f"cache={store}/cache",
        f"budget.trials={trials}",
        "compressor=[quantize]",
        "compressor.quantize.space.bits.granularity=layer",
        "runtime=[onnxruntime]",
        "evaluator.latency.sessions=2",
        "evaluator.latency.rounds=2",
        "evaluator.latency.drift=10",
        "rule.drop=1",
    ]
    model = changes.pop("model", None) or build("residual")
    return compress(model, train, validation, study="mine", overrides=[*options, *more], **changes)


def test_a_labelled_search_gives_files_to_ship_and_goes_on_where_it_stopped(store: Path) -> None:
    model = build("residual").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train, validation = labelled(64, 1), labelled(64, 2)
    result = search(store, train, validation, 2, model=model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    model.eval()
    assert len(result.conclusion.outcome.records) == 2
    assert result.champion.number in {r.number for r in result.conclusion.outcome.records}
    assert result.front
    original = result.conclusion.outcome.records[0]
    # The highest of the model's five answers is in no label here: they were once refused as too few.
    assert max(int(y.max()) for _, y in validation) < 4
    assert original.value("accuracy").value == 1.0
    # Half of the validation examples were kept back for the test.
    assert original.value("accuracy").n == 32

    folder = result.files(original)
    found = Deployed(OnnxRuntime(), folder, "fp32", ()).run(images(8, 3).numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images(8, 3)).numpy(), atol=1e-4)

    table = str(result)
    assert "the front (★ champion, ○ uncompressed)" in table
    assert "uncompressed, onnxruntime fp32" in table
    assert f"champion: trial {result.champion.number}" in table

    more = search(store, train, validation, 3, model=model)
    assert [r.number for r in more.conclusion.outcome.records] == [0, 1, 2]
    assert more.conclusion.outcome.records[:2] == result.conclusion.outcome.records
    assert len({r.plan.digest for r in more.conclusion.outcome.records}) == 3

    with pytest.raises(ConfigError, match=r"was begun differently: .*data\.train was"):
        search(store, labelled(64, 9), validation, 3, model=model)


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file takes a millisecond."""
    monkeypatch.setattr(Latency, "_steady", lambda *_: Reading((((1.0, 1.0), (1.0, 1.0)),)))


def test_without_labels_the_original_is_what_counts(store: Path, no_timing: None) -> None:
    result = search(store, unlabelled(32, 1), unlabelled(32, 2), 1, test=unlabelled(16, 3))
    measured = {m.name: m for m in result.champion.measurements}
    assert measured["fidelity"].value == 1.0
    assert measured["fidelity"].n == 32
    assert "accuracy" not in measured
    assert result.champion.plan == CompressionPlan(result.champion.plan.target)
    assert result.conclusion.test["champion"].n == 16


def test_a_metric_of_ones_own_takes_the_place_of_accuracy(store: Path, no_timing: None) -> None:
    def error(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        return -float(np.abs(outputs - targets).mean())

    model = build("residual")
    with torch.no_grad():
        pairs = [(x, model(x)) for x in unlabelled(32, 1)]
    result = search(store, pairs, pairs, 1, metric=error)
    assert result.champion.value("score").value == pytest.approx(0, abs=1e-4)
    assert "score" in str(result)


class Forgetful(nn.Module):
    """Its output is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 12 * 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) * torch.nan  # type: ignore[no-any-return]


def once() -> Iterator[Tensor]:
    yield images(32)


BAD: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "a loader that yields nothing": ([], unlabelled(16, 1), {}, "train: yields no batch"),
    "no validation": (unlabelled(16, 1), [], {}, "validation: yields no batch"),
    "one example to validate and test": (unlabelled(16, 1), [images(1)], {}, "test: holds no example"),
    "NaN in the data": ([images(4) * torch.nan], unlabelled(16, 1), {}, "train: example 0 holds NaN"),
    "a model that gives NaN": (once(), unlabelled(16, 1), {"model": Forgetful()}, "its output holds NaN"),
    "a shape the model cannot take": ([torch.zeros(8, 1, 12, 12)], unlabelled(16, 1), {}, "the data has"),
    "a label beyond the outputs": (labelled(16, 1), [(images(8), torch.full((8,), 5))], {}, "5 classes are 0 to 4"),
    "an option that does not exist": (
        once(),
        unlabelled(16, 1),
        {"overrides": ["budget.minuts=1"]},
        "did you mean budget.minutes?",
    ),
    "a name that no store takes": (once(), unlabelled(16, 1), {"study": "a/b"}, "use letters, digits"),
}


@pytest.mark.parametrize("word", BAD)
def test_what_cannot_be_used_is_refused_before_any_work(
    word: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, validation, changes, expected = BAD[word]
    fields = {"model": build("residual"), "study": "mine", **changes}
    fields["overrides"] = [f"folder={store}", f"cache={store}/cache", *fields.get("overrides", [])]
    monkeypatch.setattr("compareto.conclude", lambda *_: None)
    with pytest.raises(ConfigError) as caught:
        compress(train=train, validation=validation, **fields)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_result_can_be_reproduced_and_chosen_from_again(store: Path) -> None:
    result = search(store, labelled(64, 1), labelled(64, 2), 2)
    again = result.reproduce(result.front[0])
    assert again.same_files
    assert again.same_predictions == 1.0
    options = [f"folder={store}", "study=mine", "runtime=[onnxruntime]"]
    chosen = select(*options, "rule=smallest", "rule.drop=1")
    assert chosen.champion.value("size_bytes").value == min(r.value("size_bytes").value for r in result.front)
    assert "nothing was run" in str(chosen)
