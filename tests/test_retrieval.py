"""Neighbours that a candidate still finds, counted by hand and by a slower way; and what cannot be counted."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compressors.errors import ConfigError, Infeasible
from evaluators.accuracy import proportion
from evaluators.evaluation import Examples
from evaluators.retrieval import Retrieval
from tests.fakes import FakeRuntime, deployed

Rows = NDArray[np.float32]


def found(folder: Path, original: Rows, candidate: Rows, *at: int) -> list[float]:
    """The fake file answers what it is asked."""
    file, examples = deployed(FakeRuntime(), folder), Examples("validation", (candidate,), None, original)
    return [m.value for m in Retrieval(at).measure(file, file, examples)]


def embeddings(count: int, seed: int) -> Rows:
    return np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)


def test_points_on_a_circle_counted_by_hand(tmp_path: Path) -> None:
    """Nearest are 1, 0, 3 and 2; the candidate, with the third one between the first two, puts 1, 1, 2 and 1 before."""
    degrees, moved = np.array([0, 10, 90, 105]), np.array([0, 10, 4, 105])
    circle, other = (np.stack([np.cos(a), np.sin(a)], 1).astype(np.float32) for a in np.deg2rad([degrees, moved]))
    assert found(tmp_path, circle, circle, 1, 2) == [1.0, 1.0]
    assert found(tmp_path, circle, 7 * other, 1, 2) == [0.0, 0.75]


def test_it_is_what_sorting_every_row_says(tmp_path: Path) -> None:
    original = embeddings(300, 1)
    candidate = original + np.float32(1 / 8) * embeddings(300, 2)

    def order(rows: Rows) -> NDArray[np.intp]:
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return np.argsort(-(units @ units.T - 3 * np.eye(len(rows))), axis=1)

    nearest, ranked = order(original)[:, 0], order(candidate)
    expected = [float(np.mean([n in row[:k] for n, row in zip(nearest, ranked, strict=True)])) for k in (1, 5, 10)]
    assert found(tmp_path, original, candidate, 1, 5, 10) == expected
    assert 0.2 < expected[0] < expected[1] < expected[2] < 1


def test_ties_count_against_who_makes_them(tmp_path: Path) -> None:
    """The second half repeats the first, which is no tie that the candidate makes."""
    rows = embeddings(20, 4)
    twice = np.concatenate([rows, rows])
    assert found(tmp_path, twice, twice, 1) == [1.0]
    assert found(tmp_path, twice, np.zeros_like(twice), 1) == [0.0]
    assert found(tmp_path, rows, np.ones_like(rows), 1, 5) == [0.0, 0.0]


def test_its_interval_is_wilsons(tmp_path: Path) -> None:
    file, rows = deployed(FakeRuntime(), tmp_path), embeddings(50, 3)
    examples = Examples("validation", (rows[::-1].copy(),), None, rows)
    (measured,) = Retrieval((1,)).measure(file, file, examples)
    assert measured == proportion(Retrieval((1,)).metrics()[0], round(50 * measured.value), 50, "validation")


def test_too_few_examples_to_leave_one_out_are_infeasible(tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match="retrieval_at_5 needs 7 examples; validation has 6"):
        found(tmp_path, embeddings(6, 0), embeddings(6, 0), 1, 5)


@pytest.mark.parametrize("at", [(), (0,), (1, 2.5), (True,)])
def test_ranks_that_are_none_are_refused(at: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"^evaluator\.retrieval\.at: is \[.*give whole numbers above 0"):
        Retrieval(at)
