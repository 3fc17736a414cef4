"""What is proposed, on a space where pruning has to be trained and bits cost nothing."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compressors.fisher import Effect
from compressors.plan import LayerSpec, Scalar
from search.facts import Aim, Fact, Reader
from search.outlook import Outlook, Rows
from search.pareto import hypervolume
from search.proposals import Proposer
from search.solver import Guide, Variant

TRAINED_S, PLAIN_S = 5.0, 1.0
SHARES, BITS, EPOCHS = (0.0, 0.25, 0.5, 0.75), (32, 8), (2, 4, 8)
AIM = Aim(("quality", "latency"), 0.05)
LAYERS = tuple(LayerSpec(f"l{i}", "conv", (64, 64, 3, 3), 36864, 1000 * (i + 1)) for i in range(4))


def asked(answers: Mapping[str, Scalar]) -> dict[str, Scalar]:
    pruned = any(value for name, value in answers.items() if name.startswith("prune"))
    return {name: value for name, value in answers.items() if pruned or name != "train.epochs"}


def make_guide() -> Guide:
    prune: dict[str, dict[Scalar, Effect]] = {
        f"prune.share@{layer.name}": {s: Effect(s**2, {layer.name: 1 - s}) for s in SHARES} for layer in LAYERS
    }
    bits: dict[str, dict[Scalar, Effect]] = {
        f"bits@{layer.name}": {b: Effect(0.001 * (b < 32), bits={layer.name: b}) for b in BITS} for layer in LAYERS
    }
    targets = ({"runtime": "a"}, {"runtime": "b"})
    names = frozenset([*prune, "train.epochs"])
    return Guide(LAYERS, (Variant({}, {**prune, **bits}),), targets, ("train.epochs", EPOCHS), names, asked)


def truth(answers: Mapping[str, Any]) -> tuple[tuple[float, float], float]:
    """Minimized values, quality first, and the loss: pruning loses a hundredth of the guide's, over the epochs."""
    shares = [float(answers[f"prune.share@{layer.name}"]) for layer in LAYERS]
    widths = [int(answers[f"bits@{layer.name}"]) for layer in LAYERS]
    loss = sum(s**2 for s in shares) * 0.05 / float(answers.get("train.epochs", 1)) + 0.0005 * widths.count(8)
    macs = [layer.macs * (1 - s) * (0.5 if b == 8 else 1.0) for layer, s, b in zip(LAYERS, shares, widths, strict=True)]
    latency = (0.1 + 0.9 * sum(macs) / sum(layer.macs for layer in LAYERS)) * (
        1.0 if answers["runtime"] == "a" else 0.6
    )
    return (-math.exp(-loss), latency), loss


def studied(trials: int, remaining_s: float | None = math.inf) -> list[Fact]:
    """A study from nothing, with what each trial takes."""
    proposer, facts = Proposer(make_guide(), AIM), list[Fact]()
    for number in range(trials):
        found = proposer.propose(facts, {}, np.random.default_rng(number), remaining_s=remaining_s)
        assert found is not None
        values, loss = truth(found.answers)
        known = {prefix(fact.answers) for fact in facts}
        seconds = PLAIN_S + (0 if prefix(found.answers) in known else TRAINED_S * bool(trained(found.answers)))
        facts.append(Fact(number, found.answers, values, loss=loss, seconds=seconds))
    return facts


def prefix(answers: Mapping[str, Scalar]) -> frozenset[tuple[str, Scalar]]:
    return frozenset((n, v) for n, v in answers.items() if n.startswith(("prune", "train")))


def trained(answers: Mapping[str, Scalar]) -> bool:
    return "train.epochs" in answers


def test_one_trained_network_gets_many_bit_widths() -> None:
    facts = studied(40)
    prefixes = {prefix(fact.answers) for fact in facts}
    assert 2 <= len(prefixes) <= 0.8 * len(facts)


def test_training_starts_short_and_goes_on_where_it_pays() -> None:
    reached: dict[frozenset[tuple[str, Scalar]], list[int]] = {}
    for fact in studied(40):
        structure = frozenset((n, v) for n, v in fact.answers.items() if n.startswith("prune"))
        reached.setdefault(structure, []).append(int(fact.answers.get("train.epochs", 0)))
    for epochs in reached.values():
        levels = sorted(set(epochs) - {0})
        assert levels == list(EPOCHS[: len(levels)]), "no round is left out"
    assert any(max(epochs) == EPOCHS[-1] for epochs in reached.values())


def test_where_trials_are_counted_each_trains_to_the_end_and_few_of_them_go_further() -> None:
    counted = studied(12, remaining_s=None)
    assert {fact.answers["train.epochs"] for fact in counted if trained(fact.answers)} == {EPOCHS[-1]}
    worth = [hypervolume((fact.values for fact in facts), (-math.exp(-0.05), 1.0)) for facts in (counted, studied(12))]
    assert worth[0] > worth[1]


def test_where_trials_are_counted_what_was_begun_in_minutes_trains_to_the_end_too() -> None:
    proposer, facts = Proposer(make_guide(), AIM), studied(30)
    assert any(trained(f.answers) and f.answers["train.epochs"] != EPOCHS[-1] for f in facts)
    for seed in range(12):
        found = proposer.propose(facts, {}, np.random.default_rng(seed), remaining_s=None)
        assert found is not None
        assert not trained(found.answers) or found.answers["train.epochs"] == EPOCHS[-1]


@pytest.mark.parametrize(("remaining_s", "epochs"), [(None, {EPOCHS[-1]}), (math.inf, {*EPOCHS})])
def test_what_is_drawn_by_chance_trains_to_the_end_where_trials_are_counted(
    remaining_s: float | None, epochs: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Proposer, "_gain", lambda _self, _outlook, rows, _left: (-np.ones(len(rows.pick)), None))
    monkeypatch.setattr("search.proposals.GROWING", 0.0)
    proposer, drawn = Proposer(make_guide(), AIM), set()
    for seed in range(20):
        found = proposer.propose([], {}, np.random.default_rng(seed), remaining_s=remaining_s)
        assert found is not None
        drawn.add(found.answers["train.epochs"])
    assert drawn == epochs


def test_nothing_that_takes_longer_than_is_left() -> None:
    facts = studied(12)
    proposer = Proposer(make_guide(), AIM)
    known = {prefix(fact.answers) for fact in facts}
    for seed in range(8):
        found = proposer.propose(facts, {}, np.random.default_rng(seed), remaining_s=1.5)
        assert found is not None
        assert not trained(found.answers) or prefix(found.answers) in known


def test_the_surrogate_is_right_after_a_dozen_trials() -> None:
    facts = studied(30)
    proposer = Proposer(make_guide(), AIM)
    errors = []
    for seed in range(12):
        found = proposer.propose(facts, {}, np.random.default_rng(seed))
        assert found is not None
        assert found.expected is not None
        errors.append(abs(found.expected[1] / truth(found.answers)[0][1] - 1))
    assert np.median(errors) < 0.05


def test_a_fixed_answer_of_any_kind_is_kept() -> None:
    proposer, facts = Proposer(make_guide(), AIM), studied(6)
    for fixed in ({"runtime": "b"}, {"bits@l0": 8}, {"prune.share@l3": 0.5}):
        found = proposer.propose(facts, fixed, np.random.default_rng(0))
        assert found is not None
        assert fixed.items() <= found.answers.items()


def test_a_number_between_choices_is_read_as_the_one_next_to_it() -> None:
    reader = Reader(make_guide())
    known = reader.parse(
        {"prune.share@l0": 0.3, "prune.share@l1": 0.74, "bits@l0": 8, "train.epochs": 5, "runtime": "b"}
    )
    assert known.pick[:2] == (SHARES.index(0.25), SHARES.index(0.75))
    assert known.pick[4] == BITS.index(8)
    assert (known.growth, known.target) == (2, 1)
    assert reader.parse({"train.epochs": 0}).growth == 0


def test_an_objective_below_nothing_is_not_held_back() -> None:
    """One that is to be maximized has negative values here; the best may yet be surpassed."""
    facts: list[Fact] = []
    for number, fact in enumerate(studied(20)):
        quality, latency = fact.values
        facts.append(Fact(number, fact.answers, (quality, latency - 2.0), loss=fact.loss, seconds=fact.seconds))
    found = [Proposer(make_guide(), AIM).propose(facts, {}, np.random.default_rng(seed)) for seed in range(6)]
    best = min(fact.values[1] for fact in facts)
    below = [p for p in found if p is not None and p.expected is not None and p.expected[1] < 0.6 * best]
    assert len(below) >= 3


def test_growth_may_teach_what_the_uncompressed_model_did_not_know() -> None:
    """Labels improve on the teacher with every round, which the loss, a comparison with the teacher, does not show."""
    facts = studied(24)
    taught = [
        replace(f, values=(f.values[0] - 0.004 * Reader(make_guide()).parse(f.answers).growth, f.values[1]))
        for f in facts
    ]
    as_told, better = (Proposer(make_guide(), AIM).standing(told).learned.mean[0] for told in (facts, taught))
    assert better > as_told + 0.0002
    outlook = Outlook(Proposer(make_guide(), AIM).standing(taught), None)
    trained_at = next(p for p in outlook.standing.parsed if p.growth)
    rows = Rows(
        pick=np.tile(np.array(trained_at.pick), (2, 1)),
        variant=np.zeros(2, dtype=np.intp),
        target=np.zeros(2, dtype=np.intp),
        growth=np.array([1, 3]),
        seconds=np.ones(2),
        free=np.zeros((2, 8), dtype=bool),
        carried=[{}, {}],
    )
    less, more = outlook.expected(rows)[0][:, 0]
    assert more < less - 2 * better


def test_two_names_of_one_choice_are_one() -> None:
    """As where 16 channels are cut to multiples of 8: a half and three quarters are the same."""
    layer = LayerSpec("a", "conv", (16, 16, 3, 3), 2304, 10_000)
    cut: dict[Scalar, Effect] = {
        0.0: Effect(0.0),
        0.25: Effect(0.0),
        0.5: Effect(0.1, {"a": 0.5}),
        0.75: Effect(0.1, {"a": 0.5}),
    }
    effects: dict[str, dict[Scalar, Effect]] = {"share@a": cut}
    guide = Guide((layer,), (Variant({}, effects),), structural=frozenset(["share@a"]), off={"share@a": 0.0})
    proposer = Proposer(guide, Aim(("quality", "latency"), None))
    facts = [Fact(0, {"share@a": 0.0}, (-1.0, 1.0), loss=0.0), Fact(1, {"share@a": 0.75}, (-0.9, 0.5), loss=0.1)]
    assert proposer.propose(facts, {}, np.random.default_rng(0)) is None, "both are known by then"
    assert proposer.propose(facts[:1], {}, np.random.default_rng(0)).answers == {"share@a": 0.5}  # type: ignore[union-attr]
    fixed = proposer.propose(facts[:1], {"share@a": 0.75}, np.random.default_rng(0))
    assert fixed is not None
    assert fixed.answers == {"share@a": 0.75}, "what somebody asked for keeps its name"


def test_what_another_knob_hides_is_never_proposed() -> None:
    hidden_by = {f"bits@{layer.name}": [f"prune.share@{layer.name}"] for layer in LAYERS}
    proposer, facts = Proposer(replace(make_guide(), hidden_by=hidden_by), AIM), list[Fact]()
    for number in range(20):
        found = proposer.propose(facts, {}, np.random.default_rng(number))
        assert found is not None
        assert not any(found.answers[b] == 8 and found.answers[p] for b, (p,) in hidden_by.items())
        values, loss = truth(found.answers)
        facts.append(Fact(number, found.answers, values, loss=loss, seconds=1.0))
    assert any(fact.answers["bits@l0"] == 8 for fact in facts)
    assert any(fact.answers["prune.share@l0"] for fact in facts)


def test_the_best_of_each_growth_may_grow_though_what_grew_before_is_better() -> None:
    guide = make_guide()

    def fact(number: int, share: float, epochs: int, quality: float, latency: float) -> Fact:
        answers: dict[str, Scalar] = {f"prune.share@{layer.name}": share for layer in LAYERS}
        answers |= {f"bits@{layer.name}": 32 for layer in LAYERS} | {"runtime": "a", "train.epochs": epochs}
        return Fact(number, answers, (-quality, latency), loss=1 - quality, seconds=1.0)

    grown, young = fact(0, SHARES[1], EPOCHS[-1], 0.99, 0.4), fact(1, SHARES[2], EPOCHS[0], 0.97, 0.5)
    plain = Fact(2, {"runtime": "a"}, (-1.0, 1.0), loss=0.0, seconds=1.0)
    standing = Proposer(guide, AIM).standing([grown, young, plain])
    assert 1 not in [standing.facts[i].number for i in standing.members]
    assert [dict(p.carried)["train.epochs"] for p in standing.promising()] == [EPOCHS[0]]


def test_a_trial_that_died_says_nothing_of_where_the_time_went() -> None:
    facts = studied(20)
    died = Fact(99, facts[-1].answers, (math.nan, math.nan), complete=False, seconds=50_000.0)
    proposer = Proposer(make_guide(), AIM)
    assert proposer.standing([*facts, died]).grown == proposer.standing(facts).grown > 0


def test_the_best_of_the_front_grow_for_a_share_of_the_time() -> None:
    proposer = Proposer(make_guide(), AIM)
    facts = studied(40)
    assert 0.15 < proposer.standing(facts).grown < 0.6
    young = [f for f in facts if int(f.answers.get("train.epochs", 0)) <= 2]
    standing = proposer.standing(young)
    assert standing.grown == 0
    best = standing.promising()[0]
    found = proposer.propose(young, {}, np.random.default_rng(0))
    assert found is not None
    assert prefix(found.answers) - {("train.epochs", 4)} == best.structure
    assert found.answers["train.epochs"] == 4
    kept = proposer.propose(young, {"train.epochs": 2}, np.random.default_rng(0))
    assert kept is not None
    assert kept.answers.get("train.epochs", 2) == 2, "not against what is fixed"
    hurried = proposer.propose(young, {}, np.random.default_rng(0), remaining_s=1.5)
    assert hurried is not None
    assert hurried.answers.get("train.epochs") != 4, "nor when there is no time for it"


def test_what_takes_out_of_proportion_long_has_to_be_better_by_as_much() -> None:
    proposer, facts = Proposer(make_guide(), AIM), studied(24)
    usual = proposer.standing(facts).tolled
    slow = list(usual)[::5]
    slower = [replace(f, seconds=30 * f.seconds) if f.number in slow else f for f in facts]
    found = proposer.standing(slower).tolled
    assert proposer.standing(slower).surprises == pytest.approx(proposer.standing(facts).surprises), (
        "where trials count"
    )
    risen = {number: value - usual[number] for number, value in found.items()}
    assert len(slow) >= 2
    assert all(risen[number] > math.log(5) for number in slow)
    assert all(abs(risen[number]) < 1e-9 for number in usual if number not in slow)


def test_no_two_workers_train_the_same_structure_at_once() -> None:
    facts, reader = studied(40), Reader(make_guide())
    begun = 0
    for number, fact in enumerate(facts):
        proposer, parsed = Proposer(make_guide(), AIM), reader.parse(fact.answers)
        if not proposer.standing(facts[:number]).trains(parsed):
            continue
        # The same network in the other runtime would be as good a proposal for a second worker.
        elsewhere = {"runtime": "b" if fact.answers["runtime"] == "a" else "a"}
        beside = proposer.propose(facts[:number], elsewhere, np.random.default_rng(number), taken=[fact.answers])
        assert beside is not None
        other = reader.parse(beside.answers)
        # With less training, what was done before is deployed in another way.
        assert other.structure != parsed.structure or other.growth < parsed.growth
        begun += 1
    assert begun > 3
