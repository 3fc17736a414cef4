"""The solver against exhaustive search, and the tables against what compressors really do."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from compressors.fisher import Effect
from compressors.plan import LayerSpec, Scalar
from search.solver import Guide, Rates, Tables, Variant


def chain(layers: int, seed: int) -> Guide:
    """Layers in a row, one knob each for channels and bits; a layer's inputs shrink with its neighbour's outputs."""
    rng = np.random.default_rng(seed)
    specs = tuple(LayerSpec(f"l{i}", "conv", (16, 16, 3, 3), 2304, int(rng.integers(10, 100))) for i in range(layers))
    prune: dict[str, dict[Scalar, Effect]] = {}
    bits: dict[str, dict[Scalar, Effect]] = {}
    for i in range(layers):
        inputs = {f"l{i + 1}": 0.5} if i + 1 < layers else {}
        prune[f"prune@l{i}"] = {0.0: Effect(0.0), 0.5: Effect(rng.uniform(0, 1), {f"l{i}": 0.5}, inputs)}
        bits[f"bits@l{i}"] = {b: Effect(rng.uniform(0, 1) * (b < 32), bits={f"l{i}": b}) for b in (32, 8)}
    return Guide(specs, (Variant({}, {**prune, **bits}),))


def rates(widths: int, rows: int, weight: float) -> Rates:
    macs = np.tile(np.linspace(0.3, 1.0, widths), (rows, 1))
    layers = np.tile(np.linspace(0.2, 0.0, widths), (rows, 1))
    return Rates(weight * macs, weight * layers, np.full(rows, weight * 0.1), np.full(rows, weight * 0.5))


def cost(tables: Tables, pick: np.ndarray, given: Rates) -> np.ndarray:
    """The whole Lagrangian of each row, computed from the features that the surrogate uses."""
    variant = np.zeros(len(pick), dtype=np.intp)
    features, widths = tables.describe(pick, variant), len(tables.widths)
    loss = np.take_along_axis(tables.loss[variant], pick[..., None], 2)[..., 0].sum(1)
    macs = (features[:, 2 : 2 + widths] * given.macs).sum(1)
    layers = (features[:, 2 + widths : 2 + 2 * widths] * given.layers).sum(1)
    return np.asarray(
        loss + macs + layers + features[:, 1] * given.bytes + features[:, 2 + 2 * widths] * given.switches
    )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weight", [0.1, 1.0, 5.0])
def test_coordinate_descent_comes_close_to_the_best_of_all_plans(seed: int, weight: float) -> None:
    tables = Tables(chain(4, seed))
    every = np.array(list(itertools.product(range(2), repeat=8)), dtype=np.intp)
    best = cost(tables, every, rates(2, len(every), weight)).min()
    start, variant = tables.off[None], np.zeros(1, dtype=np.intp)
    free = np.ones_like(start, dtype=bool)
    found = tables.solve(start, variant, free, tables.loss[variant], rates(2, 1, weight), sweeps=3)
    reached = cost(tables, found, rates(2, 1, weight))[0]
    assert reached <= cost(tables, start, rates(2, 1, weight))[0]
    assert reached <= 1.05 * best + 1e-9


def test_each_step_pays_what_the_features_say() -> None:
    """A plan that no single change improves stays as it is."""
    tables = Tables(chain(5, 3))
    given = rates(2, 1, 1.0)
    variant = np.zeros(1, dtype=np.intp)
    free = np.ones((1, 10), dtype=bool)
    settled = tables.solve(tables.off[None], variant, free, tables.loss[variant], given, sweeps=10)
    for k in range(10):
        other = settled.copy()
        other[0, k] = 1 - other[0, k]
        assert cost(tables, other, given)[0] >= cost(tables, settled, given)[0] - 1e-12


def test_knobs_that_are_not_free_stay() -> None:
    tables = Tables(chain(4, 0))
    start = np.array([[1, 0, 1, 0, 1, 0, 1, 0]], dtype=np.intp)
    variant = np.zeros(1, dtype=np.intp)
    free = np.zeros_like(start, dtype=bool)
    free[0, 3] = True
    found = tables.solve(start, variant, free, tables.loss[variant], rates(2, 1, 100.0))
    assert (np.delete(found, 3, 1) == np.delete(start, 3, 1)).all()
    assert found[0, 3] == 1


def test_a_knob_that_another_one_hides_stays_off() -> None:
    guide = chain(4, 2)
    other: dict[str, dict[Scalar, Effect]] = {
        f"other@l{i}": {False: Effect(0.0), True: Effect(0.01, inputs={f"l{i}": 0.1})} for i in range(4)
    }
    effects = {**guide.variants[0].effects, **other}
    guide = replace(guide, variants=(Variant({}, effects),), hidden_by={f"other@l{i}": [f"prune@l{i}"] for i in (0, 1)})
    tables = Tables(guide)
    place = {name: k for k, name in enumerate(tables.names)}
    start, variant = tables.off[None], np.zeros(1, dtype=np.intp)
    free = np.ones_like(start, dtype=bool)
    found = tables.solve(start, variant, free, tables.loss[variant], rates(2, 1, 200.0))
    assert [found[0, place[f"prune@l{i}"]] for i in range(4)] == [1, 1, 1, 1]
    assert [found[0, place[f"other@l{i}"]] for i in range(4)] == [0, 0, 1, 1]
    free[0, place["prune@l0"]] = False
    found = tables.solve(start, variant, free, tables.loss[variant], rates(2, 1, 200.0))
    assert found[0, place["other@l0"]] == 1
    assert tables.hidden(found, place["other@l1"]).tolist() == [True]
    assert tables.hidden(found, place["other@l0"]).tolist() == [False]


def test_features_are_shares_of_the_whole_model() -> None:
    guide = chain(3, 1)
    tables = Tables(guide)
    variant = np.zeros(2, dtype=np.intp)
    whole, cut = tables.describe(np.array([[0] * 6, [1, 0, 0, 0, 1, 0]], dtype=np.intp), variant)
    macs = np.array([layer.macs for layer in guide.layers]) / sum(layer.macs for layer in guide.layers)
    assert tables.widths == (8, 32)
    assert whole == pytest.approx([1, 1, 0, 1, 0, 1, 0, 0, 0])
    # The first layer halves, the second one reads half as much and has 8 bits.
    assert cut[1] == pytest.approx((0.5 + 0.5 / 4 + 1) / 3)
    assert cut[2:4] == pytest.approx([macs[1] / 2, macs[0] / 2 + macs[2]])
    assert cut[4:6] == pytest.approx([1 / 3, 2 / 3])
    assert cut[6] == pytest.approx(1.0), "8 bits between two float layers are two switches of two"
    assert cut[7:] == pytest.approx([0, 1 / 3]), "8 channels are a multiple of 8, not of 16"


def test_a_layer_that_is_left_out_costs_nothing_and_is_asked_nothing() -> None:
    guide = chain(3, 1)
    out: dict[Scalar, Effect] = {False: Effect(0.0), True: Effect(0.01, {"l1": 0.0})}
    tables = Tables(
        replace(guide, variants=tuple(replace(v, effects={"out": out, **v.effects}) for v in guide.variants))
    )
    variant = np.zeros(1, dtype=np.intp)
    given, start = rates(2, 1, 50.0), tables.off[None]
    found = tables.solve(start, variant, np.ones_like(start, dtype=bool), tables.loss[variant], given)[0]
    picked = {name: tables.choices[k][found[k]] for k, name in enumerate(tables.names)}
    assert picked["out"] is True
    assert picked["bits@l1"] == 32
    features = tables.describe(found[None], variant)[0]
    assert features[4:6].sum() == pytest.approx(2 / 3), "layers that are left"
    macs = [layer.macs for layer in guide.layers]
    assert features[2:4].sum() < 1 - macs[1] / sum(macs) + 1e-4


def with_rivals(layers: int, seed: int) -> Guide:
    """Besides 8 bits, layers can be stored in 4: that makes the file smaller and nothing faster."""
    guide, rng = chain(layers, seed), np.random.default_rng(100 + seed)
    stored: dict[str, dict[Scalar, Effect]] = {
        f"store@l{i}": {0: Effect(0.0), 16: Effect(rng.uniform(0, 0.5), stored={f"l{i}": 4})} for i in range(layers)
    }
    return replace(guide, variants=tuple(replace(v, effects={**v.effects, **stored}) for v in guide.variants))


def test_what_is_only_stored_saves_bytes_and_no_time() -> None:
    tables = Tables(with_rivals(3, 1))
    assert tables.widths == (8, 32)
    variant = np.zeros(3, dtype=np.intp)
    pick = np.array([[0] * 9, [0, 0, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]], dtype=np.intp)
    whole, stored, computed = tables.describe(pick, variant)
    assert stored[1] == pytest.approx((2 + 1 / 8) / 3)
    assert stored[2:] == pytest.approx(whole[2:])
    assert computed[1] == pytest.approx((2 + 1 / 4) / 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weight", [0.1, 1.0, 5.0])
def test_of_rivals_one_is_chosen_and_close_to_the_best(seed: int, weight: float) -> None:
    tables = Tables(with_rivals(3, seed))
    every = np.array(list(itertools.product(range(2), repeat=9)), dtype=np.intp)
    every = every[~(every[:, 3:6] & every[:, 6:9]).any(1)]
    best = cost(tables, every, rates(2, len(every), weight)).min()
    variant = np.zeros(1, dtype=np.intp)
    off = tables.off[None]
    for start in (off, every[-1:], every[len(every) // 2][None]):
        free = np.ones_like(start, dtype=bool)
        found = tables.solve(start, variant, free, tables.loss[variant], rates(2, 1, weight), sweeps=3)
        assert not (found[:, 3:6] & found[:, 6:9]).any()
        reached, before = (cost(tables, pick, rates(2, 1, weight))[0] for pick in (found, start))
        assert reached <= before + 1e-9
        # From where all 8 bits are on, one at a time does not lead everywhere: each pays for the switches around it.
        assert reached <= 1.1 * best + 1e-9 or start is not off


def test_of_rivals_that_are_both_on_the_first_one_counts() -> None:
    tables = Tables(with_rivals(3, 1))
    both = np.zeros((1, 9), dtype=np.intp)
    both[0, [4, 7]] = 1
    assert [bool(tables.outrun(both, k)[0]) for k in (3, 4, 6, 7, 8)] == [False, False, False, True, False]


def test_a_rival_that_must_stay_is_not_turned_off() -> None:
    tables = Tables(with_rivals(3, 1))
    start, variant = tables.off[None].copy(), np.zeros(1, dtype=np.intp)
    start[0, 7] = 1
    free = np.ones_like(start, dtype=bool)
    free[0, 7] = False
    found = tables.solve(start, variant, free, tables.loss[variant], rates(2, 1, 100.0))[0]
    assert found[7] == 1
    assert found[4] == tables.off[4]
    assert found[3] + found[6] == found[5] + found[8] == 1
