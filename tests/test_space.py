from collections.abc import Mapping
from typing import Any, ClassVar

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FixedTrial
from torch import Tensor, nn

from compressors.errors import ConfigError
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import CompressionPlan, LayerSpec, Scalar, Step
from evaluators.runtime import Support
from search.space import Knob, SearchSpace, block_of, build_space


class Fake:
    def __init__(self, method: str, stage: Stage, off: tuple[str, Scalar]) -> None:
        self.method, self.stage, self.off = method, stage, off

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        return {}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        return Applied({})


class FakeRuntime:
    kernels: ClassVar = {("conv", 8), ("linear", 8), ("linear", 4)}

    def __init__(self, name: str, precisions: tuple[str, ...]) -> None:
        self.name, self._precisions = name, precisions

    def precisions(self) -> tuple[str, ...]:
        return self._precisions

    def support(self, kind: str, bits: int) -> Support:
        return Support.KERNEL if bits == 32 or (kind, bits) in self.kernels else Support.REFUSED


LAYERS = tuple(
    LayerSpec(name, kind, (8, 8), 64, 64)
    for name, kind in [
        ("stem", "conv"),
        ("body.0.a", "conv"),
        ("body.0.b", "conv"),
        ("body.1.a", "conv"),
        ("head", "linear"),
    ]
)
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "quantize": {layer.name: (layer.name,) for layer in LAYERS},
    "prune": {"stem": ("stem", "body.0.b"), "body.0.a": ("body.0.a",)},
    "distill": {},
}
SPACES: dict[str, dict[str, Any]] = {
    "prune": {
        "sparsity": {"choices": [0.0, 0.5, 0.75], "granularity": "layer"},
        "align": {"choices": [4, 8]},
    },
    "distill": {
        "when": "structure",
        "epochs": {"choices": [0, 4, 8]},
        "temperature": {"low": 1, "high": 8},
        "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True},
    },
    "quantize": {
        "bits": {"choices": {"conv": [8, 32], "linear": [4, 8, 32]}, "granularity": "layer"},
        "group_size": {"choices": [32, 64], "when": 4},
    },
}


def space(**changes: Any) -> SearchSpace:
    compressors: dict[str, Any] = {
        "quantize": Fake("quantize", Stage.NUMERIC, ("bits", 32)),
        "prune": Fake("prune", Stage.STRUCTURE, ("sparsity", 0.0)),
        "distill": Fake("distill", Stage.RECOVER, ("epochs", 0)),
    }
    runtimes: dict[str, Any] = {
        "one": FakeRuntime("one", ("fp32",)),
        "two": FakeRuntime("two", ("fp32", "bf16")),
    }
    spaces = {name: {**entries, **changes.get(name, {})} for name, entries in SPACES.items()}
    return build_space(spaces, compressors, GROUPS, LAYERS, runtimes, seed=3)


def names(found: SearchSpace) -> list[str]:
    return [knob.name for method in found.methods for knob in method.deciding + method.others]


def test_names_are_readable_and_methods_stand_in_stage_order() -> None:
    assert [m.name for m in space().methods] == ["prune", "distill", "quantize"]
    assert names(space())[:3] == ["prune.sparsity@stem", "prune.sparsity@body.0.a", "prune.align"]
    assert "quantize.bits@body.0.a" in names(space())


def test_block_granularity_asks_once_per_block() -> None:
    bits = {**SPACES["quantize"]["bits"], "granularity": "block"}
    found = space(quantize={"bits": bits})
    asked = [n for n in names(found) if n.startswith("quantize.bits")]
    assert asked == ["quantize.bits@stem", "quantize.bits@body.0", "quantize.bits@body.1", "quantize.bits@head"]


def test_model_granularity_asks_once_per_kind_with_other_choices() -> None:
    bits = {**SPACES["quantize"]["bits"], "granularity": "model"}
    asked = [n for n in names(space(quantize={"bits": bits})) if n.startswith("quantize.bits")]
    assert asked == ["quantize.bits@model:conv", "quantize.bits@model:linear"]


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("conv1", "conv1"),
        ("layer2.0.downsample.0", "layer2.0"),
        ("encoder.layer.5.attention.query", "encoder.layer.5"),
        ("features.3", "features.3"),
        ("stem.conv", "stem"),
    ],
)
def test_block_is_the_repeated_part_of_a_name(layer: str, block: str) -> None:
    assert block_of(layer) == block


def test_knobs_that_do_not_apply_are_never_asked() -> None:
    off = {"prune.sparsity@stem": 0.0, "prune.sparsity@body.0.a": 0.0}
    bits = {f"quantize.bits@{layer.name}": 32 for layer in LAYERS}
    # FixedTrial raises for anything it has no value for: no align, epochs, temperature, group size, precision.
    plan = space().sample(FixedTrial({**off, **bits, "deploy.runtime": "one"}))
    assert plan == CompressionPlan(plan.target, (), seed=3)
    assert (plan.target.runtime, plan.target.precision) == ("one", "fp32")


def test_a_conditional_knob_is_asked_when_its_value_was_given() -> None:
    off = {"prune.sparsity@stem": 0.0, "prune.sparsity@body.0.a": 0.0}
    bits: dict[str, Any] = {f"quantize.bits@{layer.name}": 32 for layer in LAYERS} | {"quantize.bits@head": 4}
    answers = {**off, **bits, "deploy.runtime": "two", "deploy.precision@two": "bf16", "quantize.group_size": 64}
    (step,) = space().sample(FixedTrial(answers)).steps
    assert step == Step("quantize", {"head": {"bits": 4}}, {"group_size": 64})


MATCH = {
    "match": {"choices": ["none", "hint", "relation"]},
    "match_weight": {"choices": [0.5, 1.0], "when": ["hint", "relation"]},
}
PRUNED: dict[str, Scalar] = {
    "prune.sparsity@stem": 0.5,
    "prune.sparsity@body.0.a": 0.0,
    "prune.align": 4,
    "distill.epochs": 4,
    "distill.temperature": 2,
    "distill.learning_rate": 0.01,
    "deploy.runtime": "one",
    **{f"quantize.bits@{layer.name}": 32 for layer in LAYERS},
}


def test_a_knob_can_depend_on_any_of_several_answers_of_the_method() -> None:
    found = space(distill=MATCH)
    for answer in ("hint", "relation"):
        trial = FixedTrial({**PRUNED, "distill.match": answer, "distill.match_weight": 0.5})
        shared = found.sample(trial).steps[1].shared
        assert (shared["match"], shared["match_weight"]) == (answer, 0.5)


def test_the_answer_none_leaves_a_plan_as_if_it_had_not_been_asked() -> None:
    # There is no answer for the weight: it must not be asked.
    unasked = space(distill=MATCH).sample(FixedTrial({**PRUNED, "distill.match": "none"}))
    assert unasked.digest == space().sample(FixedTrial(PRUNED)).digest


def test_a_knob_that_can_only_be_none_is_no_knob() -> None:
    found = space(distill={**MATCH, "match": {"choices": ["none"]}})
    assert "distill.match" not in names(found)
    assert found.sample(FixedTrial(PRUNED)).digest == space().sample(FixedTrial(PRUNED)).digest


def with_qat() -> SearchSpace:
    compressors: dict[str, Any] = {
        "quantize": Fake("quantize", Stage.NUMERIC, ("bits", 32)),
        "prune": Fake("prune", Stage.STRUCTURE, ("sparsity", 0.0)),
        "distill": Fake("distill", Stage.RECOVER, ("epochs", 0)),
        "qat": Fake("qat", Stage.RECOVER, ("epochs", 0)),
    }
    spaces = {**SPACES, "qat": {"when": "numbers", "epochs": {"choices": [0, 2, 4]}}}
    runtimes: dict[str, Any] = {"one": FakeRuntime("one", ("fp32",))}
    return build_space(spaces, compressors, {**GROUPS, "qat": {}}, LAYERS, runtimes)


def test_what_needs_numbers_is_asked_after_them_and_runs_before_them() -> None:
    found = with_qat()
    bits = {**PRUNED, "quantize.bits@stem": 8, "qat.epochs": 2}
    assert [step.method for step in found.sample(FixedTrial(bits)).steps] == ["prune", "distill", "qat", "quantize"]
    # There is no answer for its epochs: it must not be asked.
    assert [step.method for step in found.sample(FixedTrial(PRUNED)).steps] == ["prune", "distill"]


def test_what_needs_numbers_is_left_to_the_sampler() -> None:
    for sparing in (False, True):
        plans = [with_qat().sample(FixedTrial(answers)) for answers in with_qat().uniform(sparing)]
        assert any(step.method == "quantize" for plan in plans for step in plan.steps)
        assert not any(step.method == "qat" for plan in plans for step in plan.steps)


def test_layers_left_alone_do_not_appear_in_the_plan() -> None:
    answers = next(a for a in space().uniform() if a.get("prune.sparsity@stem") == 0.5)
    plan = space().sample(FixedTrial(answers))
    assert plan.steps[0].per_layer == {"stem": {"sparsity": 0.5}, "body.0.a": {"sparsity": 0.5}}
    assert [step.method for step in plan.steps] == ["prune", "distill"]
    assert plan.steps[1].shared["epochs"] == 8


def test_baselines_are_the_uncompressed_model_on_every_target() -> None:
    plans = [space().sample(FixedTrial(answers)) for answers in space().baselines()]
    assert [(p.target.runtime, p.target.precision) for p in plans] == [
        ("one", "fp32"),
        ("two", "fp32"),
        ("two", "bf16"),
    ]
    assert not any(p.steps for p in plans)


def test_uniform_plans_use_one_method_at_one_strength() -> None:
    plans = [space().sample(FixedTrial(answers)) for answers in space().uniform()]
    numeric = [p for p in plans if p.steps[0].method == "quantize"]
    assert {frozenset(s["bits"] for s in p.steps[0].per_layer.values()) for p in numeric} == {
        frozenset({8}),
        frozenset({4}),
    }
    assert len({p.digest for p in plans}) == len(plans)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_sampled_plan_is_the_same_when_its_trial_is_replayed(seed: int) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    plan = space().sample(trial)
    frozen = study.tell(trial, 0.0)
    assert space().sample(FixedTrial(frozen.params)).digest == plan.digest
    assert CompressionPlan.from_json(plan.to_json()).digest == plan.digest


def test_the_digest_follows_the_space() -> None:
    other = {"choices": [4, 8, 16]}
    assert space().digest == space().digest
    assert space(prune={"align": other}).digest != space().digest


@pytest.mark.parametrize(
    ("method", "entry", "words"),
    [
        ("quantize", {"bits": {"choices": [3, 32], "granularity": "layer"}}, "3 bits for conv layers"),
        (
            "quantize",
            {"bits": {"choices": [8], "granularity": "layer", "include": ["stm*"]}},
            "'stm*' matches no layer",
        ),
        ("prune", {"sparsity": {"choices": [0.5], "granularity": "layer", "exclude": ["x"]}}, "'x' matches no layer"),
        ("prune", {"sparsity": {"choices": [0.5], "granularity": "channel"}}, "'channel'"),
        ("prune", {"sparsity": {"choices": [], "granularity": "layer"}}, "is empty"),
        ("prune", {"align": {"chioces": [4]}}, "'chioces'"),
        ("prune", {"align": {"low": 8, "high": 4}}, "low <= high"),
        ("prune", {"align": 4}, "is 4"),
        ("distill", {"when": "sometimes"}, "'sometimes'"),
        ("quantize", {"bits": {"choices": {"conv": [8]}, "granularity": "layer"}}, "no entry for linear layers"),
    ],
)
def test_bad_spaces_are_refused_in_one_line(method: str, entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        space(**{method: entry})
    assert words in str(caught.value)
    assert f"compressor.{method}.space" in str(caught.value)
    assert "\n" not in str(caught.value)


class Remover(Fake):
    """Takes modules out."""

    def removed(self, step: Step) -> list[str]:
        return list(step.per_layer)


def with_remover(blocks: tuple[str, ...]) -> SearchSpace:
    compressors: dict[str, Any] = {
        "depth": Remover("depth", Stage.STRUCTURE, ("skip", False)),
        "prune": Fake("prune", Stage.STRUCTURE, ("sparsity", 0.0)),
        "quantize": Fake("quantize", Stage.NUMERIC, ("bits", 32)),
    }
    bits = {**SPACES["quantize"]["bits"], "granularity": "block"}
    entries = {
        "depth": {"skip": {"choices": [False, True], "granularity": "layer"}},
        "prune": SPACES["prune"],
        "quantize": {"bits": bits, "group_size": SPACES["quantize"]["group_size"]},
    }
    groups: dict[str, Any] = {**GROUPS, "depth": {name: (name,) for name in blocks}}
    runtimes: dict[str, Any] = {"one": FakeRuntime("one", ("fp32",))}
    return build_space(entries, compressors, groups, LAYERS, runtimes)


def test_of_a_module_that_is_out_nothing_is_asked_and_it_goes_first_of_its_stage() -> None:
    found = with_remover(("body.0",))
    assert [m.name for m in found.methods] == ["depth", "prune", "quantize"]
    answers: dict[str, Scalar] = {"depth.skip@body.0": True, "prune.sparsity@stem": 0.5, "prune.align": 4}
    answers |= {f"quantize.bits@{name}": 8 for name in ("stem", "body.0", "body.1", "head")}
    trial = FixedTrial(answers)
    plan = found.sample(trial)
    assert not [name for name in trial.params if name.endswith(("@body.0", "@body.0.a")) and "skip" not in name]
    assert [step.method for step in plan.steps] == ["depth", "prune", "quantize"]
    assert list(plan.steps[2].per_layer) == ["stem", "body.1.a", "head"]
    kept = found.sample(FixedTrial({**answers, "depth.skip@body.0": False, "prune.sparsity@body.0.a": 0.5}))
    assert [step.method for step in kept.steps] == ["prune", "quantize"]
    assert "body.0.a" in kept.steps[1].per_layer


def with_replacers() -> SearchSpace:
    compressors: dict[str, Any] = {
        "separable": Fake("separable", Stage.REPLACE, ("replace", False)),
        "distill": Fake("distill", Stage.RECOVER, ("epochs", 0)),
        "lowrank": Fake("lowrank", Stage.REPLACE, ("rank", 1.0)),
        "prune": Fake("prune", Stage.STRUCTURE, ("sparsity", 0.0)),
        "quantize": Fake("quantize", Stage.NUMERIC, ("bits", 32)),
    }
    entries = {
        "lowrank": {"rank": {"choices": [1.0, 0.5], "granularity": "block"}},
        "separable": {"replace": {"choices": [False, True], "granularity": "layer"}},
        **SPACES,
    }
    own = {name: (name,) for name in ("stem", "body.0.a", "body.0.b")}
    groups: dict[str, Any] = {**GROUPS, "lowrank": own, "separable": own}
    runtimes: dict[str, Any] = {"one": FakeRuntime("one", ("fp32",))}
    return build_space(entries, compressors, groups, LAYERS, runtimes)


def test_a_layer_that_was_replaced_is_not_replaced_again_but_gets_its_bits() -> None:
    found = with_replacers()
    assert [m.name for m in found.methods] == ["prune", "separable", "lowrank", "distill", "quantize"]
    answers: dict[str, Scalar] = {f"prune.sparsity@{name}": 0.0 for name in ("stem", "body.0.a")}
    answers |= {"separable.replace@stem": True, "separable.replace@body.0.a": True, "separable.replace@body.0.b": False}
    answers |= {"lowrank.rank@body.0": 0.5, "distill.epochs": 0}
    answers |= {f"quantize.bits@{layer.name}": 8 for layer in LAYERS}
    # FixedTrial raises for lowrank.rank@stem if it is asked.
    plan = found.sample(FixedTrial(answers))
    assert [step.method for step in plan.steps] == ["separable", "lowrank", "quantize"]
    assert plan.steps[1].per_layer == {"body.0.b": {"rank": 0.5}}
    assert list(plan.steps[2].per_layer) == [layer.name for layer in LAYERS]


def test_recovery_comes_with_whatever_replaces_layers() -> None:
    plans = [with_replacers().sample(FixedTrial(answers)) for answers in with_replacers().uniform()]
    methods = {tuple(step.method for step in plan.steps) for plan in plans}
    assert methods == {("quantize",), ("lowrank", "distill"), ("separable", "distill"), ("prune", "distill")}


def with_preparation() -> SearchSpace:
    compressors: dict[str, Any] = {
        "prune": Fake("prune", Stage.STRUCTURE, ("sparsity", 0.0)),
        "distill": Fake("distill", Stage.RECOVER, ("epochs", 0)),
        "slim": Fake("slim", Stage.PREPARE, ("epochs", 0)),
        "quantize": Fake("quantize", Stage.NUMERIC, ("bits", 32)),
    }
    spaces = {**SPACES, "slim": {"when": "structure", "epochs": {"choices": [0, 4]}}}
    runtimes: dict[str, Any] = {"one": FakeRuntime("one", ("fp32",))}
    return build_space(spaces, compressors, {**GROUPS, "slim": {}}, LAYERS, runtimes)


def test_what_prepares_for_structure_is_asked_after_it_and_runs_before_it() -> None:
    found = with_preparation()
    slimmed = found.sample(FixedTrial({**PRUNED, "slim.epochs": 4}))
    assert [step.method for step in slimmed.steps] == ["slim", "prune", "distill"]
    whole = {f"prune.sparsity@{owner}": 0.0 for owner in GROUPS["prune"]}
    # There is no answer for its epochs: it must not be asked.
    numbers = {f"quantize.bits@{layer.name}": 8 for layer in LAYERS}
    assert [step.method for step in found.sample(FixedTrial({**whole, **numbers})).steps] == ["quantize"]


def test_what_prepares_is_left_to_the_sampler() -> None:
    for sparing in (False, True):
        plans = [with_preparation().sample(FixedTrial(answers)) for answers in with_preparation().uniform(sparing)]
        assert any([step.method for step in plan.steps] == ["prune", "distill"] for plan in plans)
        assert not any(step.method == "slim" for plan in plans for step in plan.steps)


def test_what_is_masked_is_recovered_too() -> None:
    compressors: dict[str, Any] = {
        "distill": Fake("distill", Stage.RECOVER, ("epochs", 0)),
        "mask": Fake("mask", Stage.MASK, ("sparsity", 0.0)),
    }
    entries: dict[str, Any] = {
        "distill": {"when": "structure", "epochs": {"choices": [0, 4]}},
        "mask": {"sparsity": {"choices": [0.0, 0.5]}},
    }
    groups: dict[str, Any] = {"distill": {}, "mask": {}}
    runtimes: dict[str, Any] = {"one": FakeRuntime("one", ("fp32",))}
    found = build_space(entries, compressors, groups, LAYERS, runtimes)
    plan = found.sample(FixedTrial({"mask.sparsity": 0.5, "distill.epochs": 4}))
    assert [step.method for step in plan.steps] == ["mask", "distill"]
    assert not found.sample(FixedTrial({"mask.sparsity": 0.0})).steps


def test_a_method_with_nothing_to_do_in_this_network_is_left_out() -> None:
    assert [m.name for m in with_remover(()).methods] == ["prune", "quantize"]
    nothing: dict[str, Any] = {"depth": Remover("depth", Stage.STRUCTURE, ("skip", False))}
    entries = {"depth": {"skip": {"choices": [False, True], "granularity": "layer"}}}
    with pytest.raises(ConfigError, match="depth find nothing to do"):
        build_space(entries, nothing, {"depth": {}}, LAYERS, {})


def test_what_is_no_layer_has_no_choices_by_kind() -> None:
    fake: dict[str, Any] = {"smooth": Fake("smooth", Stage.RECOVER, ("migration", 0.0))}
    entries = {"smooth": {"migration": {"choices": {"linear": [0.0, 0.5]}, "granularity": "layer"}}}
    with pytest.raises(ConfigError, match="given by kind, and norm is no layer of one"):
        build_space(entries, fake, {"smooth": {"norm": ("norm",)}}, LAYERS, {})


def test_where_a_key_can_be_left_out_that_is_what_is_taken_when_nothing_is_known() -> None:
    assert Knob("distill.assistant", "distill", "assistant", choices=("none", "half")).middle() == "none"


def test_sparing_uniform_plans_have_one_middle_value_a_method_and_the_least_recovery() -> None:
    plans = [space().sample(FixedTrial(answers)) for answers in space().uniform(sparing=True)]
    assert len(plans) == 4, "two methods on two runtimes"
    assert [{s["bits"] for s in plan.steps[-1].per_layer.values()} for plan in plans[:2]] == [{8}, {8}]
    for plan in plans[2:]:
        assert [step.method for step in plan.steps] == ["prune", "distill"]
        assert {s["sparsity"] for s in plan.steps[0].per_layer.values()} == {0.5}
        assert plan.steps[1].shared["epochs"] == 4
    trained = [space().sample(FixedTrial(answers)) for answers in space().uniform(sparing=True, trained=True)]
    assert [plan.steps[0] for plan in trained] == [plan.steps[0] for plan in plans]
    assert [plan.steps[1].shared["epochs"] for plan in trained[2:]] == [8, 8]


def with_two_numeric_methods(clusters: list[Scalar], order: tuple[str, str] = ("quantize", "cluster")) -> SearchSpace:
    compressors: dict[str, Any] = {
        "quantize": Fake("quantize", Stage.NUMERIC, ("bits", 32)),
        "cluster": Fake("cluster", Stage.NUMERIC, ("clusters", 0)),
    }
    entries = {
        "quantize": {**SPACES["quantize"], "bits": {**SPACES["quantize"]["bits"], "granularity": "layer"}},
        "cluster": {"clusters": {"choices": clusters, "granularity": "block"}},
    }
    groups = {"quantize": GROUPS["quantize"], "cluster": GROUPS["quantize"]}
    runtime: dict[str, Any] = {"one": FakeRuntime("one", ("fp32",))}
    return build_space(entries, {name: compressors[name] for name in order}, groups, LAYERS, runtime)


def test_of_two_numeric_methods_the_first_that_takes_a_layer_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRuntime, "kernels", FakeRuntime.kernels | {("codebook", 8), ("codebook", 4)})
    bits: dict[str, Any] = {f"quantize.bits@{layer.name}": 32 for layer in LAYERS}
    clusters = {f"cluster.clusters@{block}": 16 for block in ("stem", "body.0", "body.1", "head")}
    trial = FixedTrial({**bits, **clusters, "quantize.bits@stem": 8, "quantize.bits@body.0.a": 8})
    first, second = with_two_numeric_methods([0, 256, 16]).sample(trial).steps
    assert list(first.per_layer) == ["stem", "body.0.a"]
    assert list(second.per_layer) == ["body.0.b", "body.1.a", "head"]
    assert "cluster.clusters@stem" not in trial.params, "nothing is left of it to ask"
    (only,) = with_two_numeric_methods([0, 256, 16], ("cluster", "quantize")).sample(trial).steps
    assert only.method == "cluster"
    assert len(only.per_layer) == len(LAYERS)


def test_clusters_need_a_runtime_that_takes_their_bits() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.space\.clusters: 4 bits for codebook layers"):
        with_two_numeric_methods([0, 9, 16])
