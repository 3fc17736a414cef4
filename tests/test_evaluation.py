"""What evaluators are given: parts of a split, and each answer of a deployed file only once."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from evaluators.accuracy import Accuracy
from evaluators.evaluation import Evaluator, Examples, Gradual
from evaluators.fidelity import Fidelity
from evaluators.latency import Latency
from evaluators.memory import Memory
from evaluators.runtime import CHUNK, Array, Deployed
from evaluators.score import Score
from evaluators.size import Size
from tests.fakes import FakeRuntime, deployed

N = 200


def examples(count: int = N) -> Examples:
    """Targets and outputs are the rows' own numbers, so that what belongs together can be seen."""
    numbers = np.arange(count, dtype=np.float32)
    x = np.stack([numbers, -numbers], axis=1)
    return Examples("validation", (x,), np.arange(count), x)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each run of a file had."""
    counts: list[int] = []
    run = Deployed.run

    def counted(self: Deployed, *inputs: Array) -> NDArray[np.float32]:
        counts.append(len(inputs[0]))
        return run(self, *inputs)

    monkeypatch.setattr(Deployed, "run", counted)
    return counts


def test_a_part_keeps_rows_together_and_holds_every_smaller_part() -> None:
    quarter, half = (examples().part(share) for share in (0.25, 0.5))
    assert (len(quarter), len(half)) == (50, 100)
    for part in (quarter, half):
        assert part.targets is not None
        assert part.targets.tolist() == part.inputs[0][:, 0].tolist() == part.original[:, 0].tolist()
    assert half.inputs[0][:50].tolist() == quarter.inputs[0].tolist()
    assert examples().part(0.25).inputs[0].tolist() == quarter.inputs[0].tolist()


def test_a_part_of_sorted_examples_holds_all_of_them_alike() -> None:
    rows = examples(10_000).part(0.25).inputs[0][:, 0]
    counts, _ = np.histogram(rows, bins=4, range=(0, 10_000))
    assert counts.tolist() == pytest.approx([625] * 4, rel=0.1)


def test_the_smallest_part_has_one_example() -> None:
    assert len(examples().part(1e-9)) == 1


def test_each_example_is_run_once_per_file_whoever_asks(tmp_path: Path, runs: list[int]) -> None:
    file, whole = deployed(FakeRuntime(scale=2.0), tmp_path), examples()
    for share in (0.25, 0.5):
        part = whole.part(share)
        assert part.outputs(file).tolist() == (2 * part.inputs[0]).tolist()
    assert whole.outputs(file).tolist() == (2 * whole.inputs[0]).tolist()
    whole.outputs(file)
    # Whole chunks, so that no answer depends on who asked first.
    assert runs == [CHUNK, CHUNK, CHUNK, N - 3 * CHUNK]


def test_another_file_gets_answers_of_its_own_and_only_the_last_are_kept(tmp_path: Path, runs: list[int]) -> None:
    data = examples(10)
    first, second = (deployed(FakeRuntime(scale=scale), tmp_path) for scale in (1.0, 3.0))
    assert data.outputs(first)[1, 0] == 1.0
    assert data.outputs(second)[1, 0] == 3.0
    assert data.outputs(first)[1, 0] == 1.0
    assert runs == [10, 10, 10]


def right(outputs: Array, targets: Array) -> float:
    return float((outputs.argmax(axis=1) == targets).mean())


@pytest.mark.parametrize("make", [Accuracy, Fidelity, lambda: Fidelity("cosine"), lambda: Score(right)])
def test_a_preview_is_the_measurement_of_a_part_with_a_wider_band(
    make: Callable[[], Evaluator], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2)).astype(np.float32)
    noisy = np.where(rng.random((400, 1)) < 0.2, -x, x).astype(np.float32)
    data = Examples("validation", (noisy,), x.argmax(axis=1), x)
    file, evaluator = deployed(FakeRuntime(), tmp_path), make()
    assert isinstance(evaluator, Gradual)
    (early,) = evaluator.preview(file, file, data, 0.25)
    (late,) = evaluator.measure(file, file, data)
    assert (early.n, late.n) == (100, 400)
    assert early.value == pytest.approx(late.value, abs=0.15)
    assert early.interval[1] - early.interval[0] > 1.5 * (late.interval[1] - late.interval[0])


def test_only_what_can_do_part_of_its_work_is_gradual() -> None:
    assert isinstance(Latency(), Gradual)
    assert not isinstance(Size(), Gradual)
    assert not isinstance(Memory(), Gradual)
