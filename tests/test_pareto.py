from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.measurement import Measurement, Metric
from search.pareto import distinct, dominates, front, hypervolume

METRICS = (Metric("accuracy", "share", "maximize"), Metric("latency_ratio", "ratio", "minimize"))


def row(*values: float, band: float = 0.0) -> tuple[Measurement, ...]:
    return tuple(Measurement(m, v, (v - band, v + band), 10) for m, v in zip(METRICS, values, strict=True))


@st.composite
def measured(draw: st.DrawFn, metric: Metric) -> Measurement:
    value = draw(st.integers(-4, 4))
    return Measurement(metric, value, (value - draw(st.integers(0, 3)), value + draw(st.integers(0, 3))), 1)


rows_strategy = st.lists(st.tuples(*map(measured, METRICS)), min_size=1, max_size=12)


@given(rows_strategy)
def test_front_is_exactly_what_nothing_dominates(rows: list[tuple[Measurement, ...]]) -> None:
    kept = front(rows)
    for i, candidate in enumerate(rows):
        assert (i in kept) == (not any(dominates(other, candidate) for other in rows))


@given(rows_strategy)
def test_front_is_never_empty_and_in_order(rows: list[tuple[Measurement, ...]]) -> None:
    kept = front(rows)
    assert kept
    assert kept == sorted(kept)


@given(rows_strategy)
def test_doubling_every_row_doubles_the_front(rows: list[tuple[Measurement, ...]]) -> None:
    assert len(front([*rows, *rows])) == 2 * len(front(rows))


@given(rows_strategy)
def test_what_values_alone_leave_undominated_is_always_kept(rows: list[tuple[Measurement, ...]]) -> None:
    bare = [tuple(Measurement(m.metric, m.value, (m.value, m.value), 1) for m in r) for r in rows]
    assert set(front(bare)) <= set(front(rows))


@given(rows_strategy)
def test_distinct_is_a_maximal_part_of_the_front(rows: list[tuple[Measurement, ...]]) -> None:
    def differ(i: int, j: int) -> bool:
        return any(a.clearly_better(b) or b.clearly_better(a) for a, b in zip(rows[i], rows[j], strict=True))

    kept = distinct(rows)
    assert set(kept) <= set(front(rows))
    assert all(differ(i, j) for i in kept for j in kept if i != j)
    assert all(i in kept or not all(differ(i, j) for j in kept) for i in front(rows))


def test_touching_bands_are_a_tie() -> None:
    near, far = row(0.9, 0.50, band=0.01), row(0.9, 0.52, band=0.01)
    assert not dominates(near, far)
    assert dominates(near, row(0.9, 0.53, band=0.005))


def test_a_clear_gain_does_not_excuse_a_worse_value() -> None:
    assert not dominates(row(0.899, 0.1, band=0.01), row(0.9, 0.9, band=0.01))


def test_rows_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        dominates(row(0.9, 0.5)[:1], row(0.9, 0.5))


def test_nothing_in_nothing_out() -> None:
    assert front([]) == distinct([]) == []


@pytest.mark.parametrize("axes", [2, 3])
@given(data=st.data())
def test_hypervolume_counts_the_cells_that_some_point_dominates(axes: int, data: st.DataObject) -> None:
    points = data.draw(st.lists(st.tuples(*[st.integers(0, 6)] * axes), max_size=8))
    reference = data.draw(st.tuples(*[st.integers(0, 5)] * axes))
    cells = product(*(range(r) for r in reference))
    expected = sum(any(all(x <= c for x, c in zip(p, cell, strict=True)) for p in points) for cell in cells)
    assert hypervolume(points, reference) == expected


def test_hypervolume_of_two_steps_of_a_staircase() -> None:
    assert hypervolume([(0.2, 0.5), (0.6, 0.1)], (1.0, 1.0)) == pytest.approx(0.4 * 0.5 + 0.4 * 0.9)


def test_a_point_of_another_length_than_the_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="longer"):
        hypervolume([(0.1, 0.2)], (1.0, 1.0, 1.0))
