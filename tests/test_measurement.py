import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressors.errors import ConfigError, Infeasible
from evaluators.accuracy import Accuracy, proportion
from evaluators.evaluation import Examples
from evaluators.fidelity import Fidelity
from evaluators.measurement import Measurement, Metric, exact
from evaluators.size import Size
from tests.fakes import FakeRuntime, deployed

UP, DOWN = Metric("accuracy", "share", "maximize"), Metric("latency_ms", "ms", "minimize")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="recorded with its reason"):
        exact(UP, value)


def test_a_value_outside_its_band_is_refused() -> None:
    with pytest.raises(ValueError, match="outside its band"):
        Measurement(UP, 0.9, (0.91, 0.95), 10)


def test_a_direction_that_no_study_understands_is_refused() -> None:
    with pytest.raises(ValueError, match="'up'"):
        Metric("accuracy", "share", "up")  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", [UP, DOWN])
def test_overlapping_bands_are_a_tie(metric: Metric) -> None:
    a, b = Measurement(metric, 1.0, (0.9, 1.1), 5), Measurement(metric, 1.05, (1.0, 1.2), 5)
    assert not a.clearly_better(b)
    assert not b.clearly_better(a)


def test_disjoint_bands_decide_by_direction() -> None:
    low, high = (0.9, 1.1), (1.2, 1.4)
    assert Measurement(DOWN, 1.0, low, 5).clearly_better(Measurement(DOWN, 1.3, high, 5))
    assert Measurement(UP, 1.3, high, 5).clearly_better(Measurement(UP, 1.0, low, 5))


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_wilson_interval_holds_the_share_and_stays_within_0_and_1(n: int, share: float) -> None:
    hits = round(share * n)
    found = proportion(UP, hits, n, "validation")
    low, high = found.interval
    assert -1e-9 <= low <= hits / n <= high <= 1 + 1e-9


def test_wilson_interval_as_published() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263 gives 0.2553 to 0.3662.
    low, high = proportion(UP, 81, 263, "validation").interval
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def examples(outputs: list[list[float]], targets: list[int] | None) -> Examples:
    x = np.asarray(outputs, np.float32)
    return Examples("validation", (x,), None if targets is None else np.asarray(targets), x)


def test_accuracy_counts_hits_of_the_deployed_file(tmp_path: object) -> None:
    data = examples([[1, 0], [1, 0], [0, 1], [0, 1]], [0, 1, 1, 1])
    (found,) = Accuracy().measure(deployed(FakeRuntime(), tmp_path), deployed(FakeRuntime(), tmp_path), data)
    assert (found.value, found.n) == (0.75, 4)


def test_accuracy_without_labels_is_infeasible(tmp_path: object) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    with pytest.raises(Infeasible, match="needs labels"):
        Accuracy().measure(file, file, examples([[1, 0]], None))


def test_nan_from_the_deployed_file_is_infeasible(tmp_path: object) -> None:
    file = deployed(FakeRuntime(scale=math.nan), tmp_path)
    with pytest.raises(Infeasible, match="NaN or infinity for 2 of 2"):
        Accuracy().measure(file, file, examples([[1, 0], [0, 1]], [0, 1]))


def test_fidelity_is_one_for_the_same_outputs_and_less_for_others(tmp_path: object) -> None:
    rng = np.random.default_rng(0)
    data = examples(rng.normal(size=(50, 4)).tolist(), None)
    same, turned = deployed(FakeRuntime(), tmp_path), deployed(FakeRuntime(scale=-1.0), tmp_path)
    for kind in ("agreement", "cosine"):
        (kept,) = Fidelity(kind).measure(same, same, data)
        (lost,) = Fidelity(kind).measure(turned, same, data)
        assert kept.value == pytest.approx(1.0)
        assert lost.clearly_better(kept) is False
        assert kept.clearly_better(lost)


def test_an_unknown_kind_of_fidelity_is_refused() -> None:
    with pytest.raises(ConfigError, match="agreement, cosine"):
        Fidelity("exact")


def test_size_counts_every_byte(tmp_path: object) -> None:
    file = deployed(FakeRuntime(), tmp_path)
    (found,) = Size().measure(file, file, examples([[1.0]], None))
    assert found.value == sum(path.stat().st_size for path in file.folder.iterdir())
    assert found.interval == (found.value, found.value)
