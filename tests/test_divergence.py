import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.errors import Infeasible
from evaluators.divergence import Divergence, divergences
from evaluators.evaluation import Examples
from tests.fakes import FakeRuntime, deployed

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 5)).astype(np.float32)


def test_logits_are_compared_by_their_divergence() -> None:
    other = RNG.normal(size=(40, 5)).astype(np.float32)
    a, b = (F.log_softmax(torch.from_numpy(x), dim=-1) for x in (LOGITS, other))
    expected = F.kl_div(b, a, log_target=True, reduction="none").sum(-1).numpy()
    np.testing.assert_allclose(divergences(LOGITS, other), expected, rtol=1e-4)


def test_words_of_a_text_add_up() -> None:
    other = RNG.normal(size=(40, 5)).astype(np.float32)
    words = divergences(LOGITS.reshape(8, 5, 5), other.reshape(8, 5, 5))
    np.testing.assert_allclose(words, divergences(LOGITS, other).reshape(8, 5).sum(1))


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    assert divergences(LOGITS, LOGITS + 100) == pytest.approx(np.zeros(40), abs=1e-5)


@pytest.mark.parametrize("shape", [(4,), (4, 2, 1), (4, 2, 3, 3)])
def test_anything_else_is_compared_by_half_the_squared_error(shape: tuple[int, ...]) -> None:
    a = np.zeros(shape, np.float32)
    per_example = math.prod(shape[1:])
    assert divergences(a, a + 2).tolist() == [2.0 * per_example] * 4


def test_the_mean_comes_with_its_normal_band(tmp_path: Path) -> None:
    data = Examples("calibration", (LOGITS,), None, LOGITS)
    (found,) = Divergence().measure(deployed(FakeRuntime(scale=0.5), tmp_path), deployed(FakeRuntime(), tmp_path), data)
    each = divergences(LOGITS, 0.5 * LOGITS)
    assert (found.name, found.metric.unit, found.n) == ("calibration_loss", "nats", 40)
    assert found.value == pytest.approx(each.mean())
    assert found.interval[1] - found.value == pytest.approx(1.96 * each.std(ddof=1) / math.sqrt(40), rel=1e-3)


def test_the_same_outputs_have_no_loss(tmp_path: Path) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    (found,) = Divergence().measure(file, file, Examples("calibration", (LOGITS,), None, LOGITS))
    assert found.value == pytest.approx(0.0, abs=1e-9)
    assert found.interval[0] == 0.0


def test_outputs_that_are_not_finite_are_no_candidate(tmp_path: Path) -> None:
    file = deployed(FakeRuntime(scale=math.nan), tmp_path)
    with pytest.raises(Infeasible, match="NaN"):
        Divergence().measure(file, file, Examples("calibration", (LOGITS,), None, LOGITS))
