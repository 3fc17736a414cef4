"""What is learnt from measurements, on data whose truth is known."""

import numpy as np
import pytest

from search.beliefs import Level, correct, improvement, regress, relate, smooth, uncovered
from search.pareto import hypervolume


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_corrections_find_the_true_factors() -> None:
    random = rng()
    parts = random.uniform(0.1, 1.0, (400, 4)) * (random.random((400, 4)) < 0.5)
    parts = parts[parts.sum(1) > 0]
    index = np.tile(np.arange(4), (len(parts), 1))
    (found,) = correct(parts, (parts * [1, 2, 4, 8]).sum(1), np.ones(len(parts)), [Level(index, 4, 0.5)])
    assert np.exp(found.log) == pytest.approx([1, 2, 4, 8], rel=0.25)


def test_corrections_do_not_depend_on_the_order_of_trials() -> None:
    shuffled = rng(1).permutation(60)
    plain = rng().uniform(0.1, 1.0, (60, 3))
    index = np.tile(np.arange(3), (60, 1))
    measured = plain.sum(1) * rng(2).uniform(1, 3, 60)
    one = correct(plain, measured, np.ones(60), [Level(index, 3, 1.0)])
    other = correct(plain[shuffled], measured[shuffled], np.ones(60), [Level(index, 3, 1.0)])
    assert one[0].log == pytest.approx(other[0].log)


def test_without_trials_nothing_is_corrected() -> None:
    (found,) = correct(np.zeros((0, 3)), np.zeros(0), np.zeros(0), [Level(np.zeros((0, 3), dtype=np.intp), 3, 1.0)])
    assert (found.log == 0).all()
    assert (found.evidence == 0).all()


def test_a_common_error_goes_to_the_common_level() -> None:
    parts = rng().uniform(0.1, 1.0, (40, 5))
    common, own = np.zeros((40, 5), dtype=np.intp), np.tile(np.arange(5), (40, 1))
    shared, single = correct(parts, 10 * parts.sum(1), np.ones(40), [Level(common, 1, 0.3), Level(own, 5, 3.0)])
    assert np.exp(shared.log[0] + single.log) == pytest.approx(np.full(5, 10.0), rel=0.2)
    assert shared.log[0] > 2 * np.abs(single.log).max()


def test_regression_keeps_the_prior_without_data_and_forgets_it_with_much() -> None:
    mean, spread = np.array([1.0, 2.0]), np.array([0.5, 0.5])
    nothing = regress(np.zeros((0, 2)), np.zeros(0), np.zeros(0), mean, spread)
    assert nothing.mean == pytest.approx(mean)
    features = np.stack([np.ones(200), rng().uniform(0, 1, 200)], 1)
    much = regress(features, features @ [0.3, 0.9], np.full(200, 0.01), mean, spread)
    assert much.mean == pytest.approx([0.3, 0.9], abs=0.01)
    draws = np.array([much.drawn(rng(i)) for i in range(300)])
    assert draws.std(0) == pytest.approx(np.sqrt(np.diag(much.covariance)), rel=0.2)


@pytest.mark.parametrize("power", [0.55, 1.0, 1.2])
def test_the_power_law_is_found_through_noise_that_hides_small_drops(power: float) -> None:
    loss = 10 ** rng().uniform(-6, 0, 80)
    drop = 0.3 * loss**power + rng(1).normal(0, 0.003, 80)
    relation = relate(loss, drop, 0.005, None)
    asked = np.array([0.03, 0.1, 0.5])
    assert relation.drop(asked) == pytest.approx(0.3 * asked**power, rel=0.2)
    assert relation.drop(np.array([1e-5]))[0] < 0.003
    assert relation.loss(float(relation.drop(np.array([0.2]))[0])) == pytest.approx(0.2)


def test_what_is_left_over_is_known_near_what_was_tried_only() -> None:
    known = np.array([[0, 0, 0, 0], [1, 1, 1, 1]], dtype=np.intp)
    asked = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [2, 2, 2, 2]], dtype=np.intp)
    same, near, far = smooth(known, np.array([1.0, 0.0]), asked)
    assert same == pytest.approx(1.0, abs=0.1)
    assert far < near < same
    draws = np.array([smooth(known, np.array([1.0, 0.0]), asked, rng(i)) for i in range(300)])
    assert draws.std(0)[0] < 0.5 * draws.std(0)[2]


def test_without_trials_nothing_is_left_over() -> None:
    nothing = np.zeros((0, 3), dtype=np.intp)
    assert (smooth(nothing, np.zeros(0), np.zeros((2, 3), dtype=np.intp)) == 0).all()


@pytest.mark.parametrize("objectives", [2, 3])
def test_improvement_is_the_gain_of_hypervolume(objectives: int) -> None:
    front, points = rng().uniform(0.2, 1, (5, objectives)), rng(1).uniform(0.1, 1, (8, objectives))
    low, high = np.zeros(objectives), np.ones(objectives)
    before = hypervolume([tuple(row) for row in front], tuple(high))
    exact = [hypervolume([*map(tuple, front), tuple(p)], tuple(high)) - before for p in points]
    assert improvement(points, uncovered(front, low, high)) == pytest.approx(exact, abs=0.03)
