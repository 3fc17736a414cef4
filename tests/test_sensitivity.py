"""From a workload and a space to a guide: what is in it, and that it agrees with what compressors then do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compressors.cluster import Cluster
from compressors.distill import Distill
from compressors.layers import KINDS, read_layers
from compressors.lowrank import LowRank
from compressors.pipeline import Compressor
from compressors.plan import Step
from compressors.prune import Prune
from compressors.quantize import Quantize
from compressors.separable import Separable
from compressors.sparsify import Sparsify
from evaluators.runtime import Support
from search.facts import Reader
from search.sensitivity import MOST_VARIANTS, guide
from search.solver import Guide, Tables
from search.space import SearchSpace, build_space
from search.workload import Workload, classification
from tests.context import make_context
from tests.studies import CountingRuntime, splits
from tests.zoo import build, images

RECOVERY = {
    "when": "structure",
    "epochs": {"choices": [0, 2, 4]},
    "temperature": {"low": 1, "high": 4},
}
PRUNING = {"sparsity": {"choices": [0.0, 0.25, 0.5], "granularity": "layer"}, "align": {"choices": [1, 4]}}


class Able(CountingRuntime):
    """Has a kernel for everything."""

    def support(self, kind: str, bits: int) -> Support:
        return Support.KERNEL


def make(
    net: str, spaces: Mapping[str, Mapping[str, Any]], folder: Path, more: Mapping[str, Compressor] | None = None
) -> tuple[nn.Module, SearchSpace, Guide | None]:
    model, example = build(net), (images(),)
    known: dict[str, Compressor] = {
        "prune": Prune(),
        "distill": Distill(weight_decay=0.0, warmup=0.1, clip_norm=1.0, epoch_examples=8, first_round=2),
        "quantize": Quantize(),
        **(more or {}),
    }
    compressors = {name: known[name] for name in spaces}
    groups = {name: c.groups(model, example) for name, c in compressors.items()}
    layers = read_layers(model, example)
    runtimes = {name: Able() for name in ("one", "two")}
    space = build_space(spaces, compressors, groups, layers, runtimes)
    workload = Workload(f"{net}-noise", model, splits(), classification())
    return model, space, guide(workload, layers, compressors, space, folder)


def test_every_deciding_knob_and_choice_has_an_effect_in_every_variant(tmp_path: Path) -> None:
    bits = {"bits": {"choices": [8, 32], "granularity": "layer"}}
    pruning = {**PRUNING, "align": {"choices": [1, 8]}}
    _, space, found = make("residual", {"prune": pruning, "distill": RECOVERY, "quantize": bits}, tmp_path)
    assert found is not None
    assert [variant.answers for variant in found.variants] == [{"prune.align": 1}, {"prune.align": 8}]
    for variant in found.variants:
        for method in space.methods:
            for knob in method.deciding if method.name != "distill" else ():
                effects = variant.effects[knob.name]
                assert tuple(effects) == knob.choices
                assert effects[method.off[1]].loss == 0
                assert all(effect.loss >= 0 for effect in effects.values())
    assert found.targets == ({"deploy.runtime": "one"}, {"deploy.runtime": "two"})
    assert found.growth == ("distill.epochs", (2, 4))
    assert found.structural >= {"prune.align", "distill.epochs", "distill.temperature"}
    assert not any(name.startswith("quantize") for name in found.structural)


def test_what_only_costs_has_its_place_in_the_tables(tmp_path: Path) -> None:
    """Zeros make nothing smaller: all that is predicted is a loss, which grows with their share."""
    masks = {"sparsity": {"choices": [0.0, 0.5, 0.9], "granularity": "layer"}}
    more = {"sparsify": Sparsify()}
    _, space, found = make("plain", {"prune": PRUNING, "sparsify": masks}, tmp_path, more)
    assert [method.name for method in space.methods] == ["prune", "sparsify"]
    assert found is not None
    tables = Tables(found)
    masked = [k for k, name in enumerate(tables.names) if name.startswith("sparsify")]
    assert len(masked) == 3
    for k in masked:
        assert tables.choices[k][tables.off[k]] == 0.0
        assert (np.diff(tables.loss[0, k, :3]) > 0).all()
    pick = tables.off[None].copy()
    pick[0, masked] = 2
    assert (tables.log_shares(pick, np.zeros(1, dtype=np.intp)) == 0).all()


def test_it_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = {"prune": PRUNING}
    _, _, first = make("plain", spaces, tmp_path)
    monkeypatch.setattr("search.sensitivity.diagonal_fisher", lambda *_: pytest.fail("computed again"))
    _, _, again = make("plain", spaces, tmp_path)
    assert first is not None
    assert again is not None
    assert again.variants == first.variants


def test_without_a_sensitive_method_there_is_no_guide(tmp_path: Path) -> None:
    recovery = {key: value for key, value in RECOVERY.items() if key != "when"}
    assert make("plain", {"distill": recovery}, tmp_path)[2] is None


@pytest.mark.parametrize("net", ["plain", "residual", "concat", "depthwise"])
def test_predicted_shares_are_those_of_the_pruned_model(net: str, tmp_path: Path) -> None:
    """All groups cut at once: the shares of outputs and inputs multiply to the weights that are left."""
    model, _, found = make(net, {"prune": PRUNING}, tmp_path)
    assert found is not None
    tables = Tables(found)
    pick = np.array([[choices.index(0.5) for choices in tables.choices]], dtype=np.intp)
    shares = np.exp(tables.log_shares(pick, np.zeros(1, dtype=np.intp)))[0]
    before = {layer.name: layer.params for layer in read_layers(model, (images(),))}
    owners = Prune().groups(model, (images(),))
    step = Step("prune", {owner: {"sparsity": 0.5} for owner in owners}, {"align": 1})
    Prune().apply(model, step, make_context(model), 0)
    for layer, share in zip(found.layers, shares, strict=True):
        weight = model.get_parameter(f"{layer.name}.weight")
        whole = int(np.prod(layer.weight_shape))
        assert before[layer.name] >= whole
        # Where the channels of two groups lie side by side, each counts as if it were alone.
        assert weight.numel() == pytest.approx(share * whole, rel=0.15 if net == "concat" else 1e-6), layer.name


def test_only_what_a_plan_asks_is_part_of_it(tmp_path: Path) -> None:
    bits = {"bits": {"choices": [8, 32], "granularity": "model"}}
    _, space, found = make("plain", {"prune": PRUNING, "distill": RECOVERY, "quantize": bits}, tmp_path)
    assert found is not None
    knobs = [knob for method in space.methods for knob in (*method.deciding, *method.others)]
    answers = {knob.name: knob.middle() for knob in knobs} | {"deploy.runtime": "one"}
    assert set(found.asked(answers)) == {*(knob.name for knob in knobs), "deploy.runtime"}
    whole = answers | {knob.name: 0.0 for knob in knobs if knob.key == "sparsity"}
    assert not any(name.startswith("distill") or name == "prune.align" for name in found.asked(whole))


def test_what_replaces_a_layer_hides_what_would_replace_it_later(tmp_path: Path) -> None:
    spaces = {
        "lowrank": {"rank": {"choices": [1.0, 0.25], "granularity": "layer"}},
        "separable": {"replace": {"choices": [False, True], "granularity": "layer"}},
    }
    more: dict[str, Compressor] = {"lowrank": LowRank(), "separable": Separable()}
    _, space, found = make("plain", spaces, tmp_path, more)
    assert found is not None
    assert {name: others for name, others in found.hidden_by.items() if others} == {
        f"separable.replace@{name}": [f"lowrank.rank@{name}"] for name in ("a.0", "b.0")
    }
    assert found.structural >= {"lowrank.rank@a.0", "separable.replace@a.0"}
    both = {knob.name: knob.last() for method in space.methods for knob in method.deciding}
    reader = Reader(found)
    names, choices = reader.tables.names, reader.tables.choices
    pick = np.array([[c.index(both[name]) for name, c in zip(names, choices, strict=True)]])
    hidden = [k for k in range(len(names)) if reader.tables.hidden(pick, k)]
    assert {names[k] for k in hidden} == {"separable.replace@a.0", "separable.replace@b.0"}
    asked = reader.parse(found.asked({**both, "deploy.runtime": "one"})).pick
    assert [asked[k] for k in hidden] == [reader.tables.off[k] for k in hidden], "as the space sees it"


def test_predicted_shares_are_those_of_the_factored_model(tmp_path: Path) -> None:
    """What the tables say of weights is exact as long as nothing is pruned before."""
    shares = {"rank": {"choices": [1.0, 0.25], "granularity": "layer"}, "align": {"choices": [8]}}
    model, _, found = make("residual", {"lowrank": shares}, tmp_path, {"lowrank": LowRank()})
    assert found is not None
    tables = Tables(found)
    pick = np.ones((1, len(tables.names)), dtype=np.intp)
    left = np.exp(tables.log_shares(pick, np.zeros(1, dtype=np.intp)))[0]
    step = Step("lowrank", {name.split("@")[1]: {"rank": 0.25} for name in tables.names}, {"align": 8})
    LowRank().apply(model, step, make_context(model), 0)
    for layer, share in zip(found.layers, left, strict=True):
        parts = model.get_submodule(layer.name).modules()
        weights = sum(part.get_parameter("weight").numel() for part in parts if type(part) in KINDS)
        assert weights == pytest.approx(share * int(np.prod(layer.weight_shape)))


def test_settings_that_no_prediction_tells_apart_are_left_to_trials(tmp_path: Path) -> None:
    """They would only crowd out those that matter."""
    quantizing = {
        "bits": {"choices": {"conv": [8, 32], "linear": [4, 8, 32]}, "granularity": "layer"},
        "group_size": {"choices": [16, 32], "when": 4},
        "rounding": {"choices": ["nearest", "mse"]},
        "calibration": {"choices": ["minmax", "percentile", "mse"], "when": 8},
        "bias_correction": {"choices": [False, True]},
    }
    _, _, found = make("plain", {"quantize": quantizing}, tmp_path)
    assert found is not None
    answers = [variant.answers for variant in found.variants]
    assert answers == [
        {"quantize.group_size": size, "quantize.rounding": rounding}
        for size in (16, 32)
        for rounding in ("nearest", "mse")
    ]


def test_of_what_a_plan_leaves_out_no_effect_is_asked(tmp_path: Path) -> None:
    quantizing = {
        "bits": {"choices": {"conv": [8, 32], "linear": [4, 8, 32]}, "granularity": "layer"},
        "group_size": {"choices": [16], "when": 4},
        "rounding": {"choices": ["none", "nearest", "mse"]},
    }
    _, _, found = make("plain", {"quantize": quantizing}, tmp_path)
    assert found is not None
    none, nearest, mse = (variant.effects["quantize.bits@head"] for variant in found.variants)
    assert (none[4], none[8]) == (mse[4], nearest[8])
    assert mse[4].loss < nearest[4].loss < float("inf")


def test_a_setting_that_changes_no_prediction_is_no_variant(tmp_path: Path) -> None:
    spaces = {
        "lowrank": {
            "rank": {"choices": [1.0, 0.25], "granularity": "layer"},
            "align": {"choices": [1, 4]},
            "whiten": {"choices": [False, True]},
        }
    }
    _, _, found = make("residual", spaces, tmp_path, {"lowrank": LowRank()})
    assert found is not None
    assert [variant.answers for variant in found.variants] == [{"lowrank.align": 1}, {"lowrank.align": 4}]


def test_a_setting_that_is_not_asked_is_not_predicted_with(tmp_path: Path) -> None:
    sizes = {"choices": [16, 32], "when": 4}
    bits = {"choices": {"conv": [32], "linear": [3, 32]}, "granularity": "layer"}
    _, _, found = make("attention", {"quantize": {"bits": bits, "group_size": sizes}}, tmp_path)
    assert found is not None
    assert [variant.answers for variant in found.variants] == [{}]


def test_where_there_are_too_many_settings_all_values_stay(tmp_path: Path) -> None:
    align = {"choices": [1, 2, 4, 8]}
    pruning = {**PRUNING, "align": align}
    quantizing = {
        "bits": {"choices": {"conv": [8, 32], "linear": [4, 8, 32]}, "granularity": "model"},
        "group_size": {"choices": [16, 32, 64, 128], "when": 4},
        "rounding": {"choices": ["nearest", "mse", "gptq", "descent"]},
    }
    _, _, found = make("plain", {"prune": pruning, "quantize": quantizing}, tmp_path)
    assert found is not None
    assert len(found.variants) == 4 * MOST_VARIANTS
    for key, values in (("group_size", {16, 32, 64, 128}), ("rounding", {"nearest", "mse", "gptq", "descent"})):
        assert {variant.answers[f"quantize.{key}"] for variant in found.variants} == values


def test_a_range_is_predicted_at_some_of_its_values(tmp_path: Path) -> None:
    ranged = {"sparsity": {"low": 0.0, "high": 0.75, "granularity": "model"}}
    _, _, found = make("plain", {"prune": ranged}, tmp_path)
    assert found is not None
    (effects,) = found.variants[0].effects.values()
    assert list(effects) == pytest.approx([0.0, 0.15, 0.3, 0.45, 0.6, 0.75])
    losses = [effect.loss for effect in effects.values()]
    assert losses == sorted(losses)


def test_the_networks_gradients_are_left_alone(tmp_path: Path) -> None:
    model, _, _ = make("plain", {"prune": PRUNING}, tmp_path)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model(images()), build("plain")(images()))


def test_clusters_are_predicted_as_bytes_that_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountingRuntime, "support", lambda *_: Support.STORAGE)
    few = {"clusters": {"choices": [0, 256, 16, 4], "granularity": "model"}}
    model, _, found = make("plain", {"cluster": few}, tmp_path, {"cluster": Cluster()})
    assert found is not None
    tables = Tables(found)
    assert tables.widths == (32,)
    pick = np.arange(4)[:, None]
    bytes_left = tables.describe(pick, np.zeros(4, dtype=np.intp))[:, 1]
    layers = read_layers(model, (images(),))
    total, head = sum(layer.params for layer in layers), layers[-1].params
    # 256 centres would weigh more than the weights of the head.
    assert bytes_left == pytest.approx([1, ((total - head) / 4 + head) / total, 1 / 8, 1 / 16], rel=1e-3)
    assert (np.diff(tables.loss[0, 0]) > 0).all()
