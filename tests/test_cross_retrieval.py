"""What pairs of embeddings are worth, counted by hand and by slower ways; and what cannot be counted."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from compressors.errors import ConfigError, Infeasible
from evaluators.cross_retrieval import CrossRetrieval
from evaluators.evaluation import Evaluator, Examples
from evaluators.similarity import Similarity
from evaluators.zero_shot import ZeroShot
from tests.fakes import FakeRuntime, deployed

Pairs = NDArray[np.float32]


def measured(
    evaluator: Evaluator, folder: Path, pairs: Pairs, targets: list[int] | None = None, original: Pairs | None = None
) -> dict[str, float]:
    """The fake file answers what it is asked."""
    labels = None if targets is None else np.array(targets)
    file, examples = deployed(FakeRuntime(), folder), Examples("validation", (pairs,), labels, pairs)
    if original is not None:
        examples = Examples("validation", (pairs,), labels, original)
    return {m.metric.name: m.value for m in evaluator.measure(file, file, examples)}


def on_circle(*degrees: tuple[float, float]) -> Pairs:
    angles = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


def random_pairs(count: int, seed: int, noise: float = 1.0) -> Pairs:
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=(count, 1, 6))
    return (shared + noise * generator.normal(size=(count, 2, 6))).astype(np.float32)


def test_points_on_a_circle_counted_by_hand(tmp_path: Path) -> None:
    """Only the third picture finds its own caption first, and all captions but the second find their pictures."""
    pairs = on_circle((0, 30), (80, 10), (180, 170))
    found = measured(CrossRetrieval((1, 2)), tmp_path, 5 * pairs)
    assert found == pytest.approx(
        {
            "recall_at_1": 1 / 2,
            "recall_at_2": 1,
            "image_to_text_at_1": 1 / 3,
            "image_to_text_at_2": 1,
            "text_to_image_at_1": 2 / 3,
            "text_to_image_at_2": 1,
        }
    )


def test_what_has_the_same_target_is_as_right(tmp_path: Path) -> None:
    pairs = on_circle((0, 30), (80, 10), (180, 170))
    assert measured(CrossRetrieval((1,)), tmp_path, pairs, [0, 0, 1])["image_to_text_at_1"] == 1.0


def test_it_is_what_sorting_every_row_says(tmp_path: Path) -> None:
    pairs = random_pairs(600, 1)
    units = pairs / np.linalg.norm(pairs, axis=2, keepdims=True)
    order = np.argsort(-units[:, 0] @ units[:, 1].T, axis=1)
    found = measured(CrossRetrieval(), tmp_path, pairs)
    for k in (1, 5, 10):
        assert found[f"image_to_text_at_{k}"] == np.mean([i in row[:k] for i, row in enumerate(order)])
    assert 0 < found["recall_at_1"] < found["recall_at_5"] < found["recall_at_10"] < 1


@pytest.mark.parametrize("evaluator", [CrossRetrieval((1,)), ZeroShot()], ids=["recall", "zero shot"])
def test_who_always_says_the_same_finds_nothing(evaluator: Evaluator, tmp_path: Path) -> None:
    found = measured(evaluator, tmp_path, np.ones((4, 2, 3), np.float32), [0, 0, 1, 1])
    assert set(found.values()) == {0.0}


def test_a_class_is_the_mean_of_its_captions(tmp_path: Path) -> None:
    """The captions of class 0 point to 0 and 60 degrees, so it lies at 30; class 1 at 120."""
    pairs = on_circle((70, 0), (80, 60), (110, 120))
    assert measured(ZeroShot(), tmp_path, pairs, [0, 0, 1])["zero_shot_accuracy"] == pytest.approx(2 / 3)


def test_similarities_agree_with_themselves_and_less_with_others(tmp_path: Path) -> None:
    pairs = random_pairs(50, 2)
    turned = (pairs @ np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]).astype(np.float32)
    assert measured(Similarity(), tmp_path, turned, original=pairs)["similarity_agreement"] == pytest.approx(
        1, abs=1e-6
    )
    near = measured(Similarity(), tmp_path, pairs + np.float32(0.2) * random_pairs(50, 3), original=pairs)
    far = measured(Similarity(), tmp_path, random_pairs(50, 3), original=pairs)
    assert 0.9 < near["similarity_agreement"] < 1
    assert abs(far["similarity_agreement"]) < 0.2


def test_correlation_is_that_of_the_rows_of_both_matrices(tmp_path: Path) -> None:
    one, other = random_pairs(20, 4), random_pairs(20, 5)
    matrices = []
    for pairs in (one, other):
        units = pairs.astype(np.float64) / np.linalg.norm(pairs.astype(np.float64), axis=2, keepdims=True)
        matrices.append(units[:, 0] @ units[:, 1].T)
    wanted = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*matrices, strict=True)])
    assert measured(Similarity(), tmp_path, one, original=other)["similarity_agreement"] == pytest.approx(wanted)


@pytest.mark.parametrize("evaluator", [CrossRetrieval(), ZeroShot(), Similarity()], ids=["recall", "zero", "similar"])
def test_outputs_that_are_no_pairs_are_infeasible(evaluator: Evaluator, tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match=r"are \(3,\) for an example: expected \(2, width\)"):
        measured(evaluator, tmp_path, np.ones((4, 3), np.float32), [0, 0, 1, 1])


def test_zero_shot_needs_targets(tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match="needs targets and the validation split has none"):
        measured(ZeroShot(), tmp_path, random_pairs(4, 0))


@pytest.mark.parametrize("at", [(), (0,), (True,), (1.5,)])
def test_ranks_that_are_none_are_refused(at: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"cross_retrieval\.at: is .*; give whole numbers above 0"):
        CrossRetrieval(at)
