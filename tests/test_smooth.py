"""Smoothing: the float model answers as before, 8 bits and fewer lose less, and the rest of the pipeline goes on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils import parametrize

import conf
from compressors.errors import ConfigError, Infeasible
from compressors.layers import read_layers
from compressors.lowrank import LowRank
from compressors.pipeline import Artifact, Compressor, Context, compress
from compressors.plan import CompressionPlan, Scalar, Step, Target
from compressors.qat import Qat
from compressors.quantize import Quantize
from compressors.scaling import Factors, fronts
from compressors.smooth import Smooth, balanced, searched
from compressors.sparsify import Sparsify
from evaluators.onnxruntime import OnnxRuntime
from evaluators.openvino import OpenVINO
from evaluators.runtime import Runtime
from search.cache import Cache
from search.space import SearchSpace, build_space
from tests.context import make_context
from tests.prenorm import OUTLIERS, Gated, Transformer, made, rough, rough_sums
from tests.zoo import build, images

RUNTIMES: dict[str, Runtime] = {"onnxruntime": OnnxRuntime(), "openvino": OpenVINO()}
COMPRESSORS: dict[str, Compressor] = {
    "sparsify": Sparsify(),
    "smooth": Smooth(group_size=32),
    "qat": Qat(weight_decay=0.0, warmup=0.1, clip_norm=1.0, epoch_examples=32),
    "quantize": Quantize(),
}
EXAMPLE = (images(),)
FORMS = ("smoothquant", "awq")

every_runtime = pytest.mark.parametrize("runtime", RUNTIMES)
every_form = pytest.mark.parametrize("form", FORMS)


EVERYWHERE = {**COMPRESSORS, "smooth": Smooth(group_size=32, everywhere=True)}


def smooth(
    model: nn.Module, migration: float = 0.5, form: str = "smoothquant", methods: Mapping[str, Compressor] = COMPRESSORS
) -> Step:
    owners = methods["smooth"].groups(model, EXAMPLE)
    return Step("smooth", {owner: {"migration": migration} for owner in owners}, {"form": form})


def quantize(model: nn.Module, bits: int, **shared: Scalar) -> Step:
    layers = {layer.name: {"bits": bits} for layer in read_layers(model, EXAMPLE) if layer.name != "embed"}
    return Step("quantize", layers, shared)


def context(model: nn.Module) -> Context:
    """Large batches: NNCF averages their extremes, and what is beyond that average is cut off."""
    return make_context(model, count=256, size=128)


def run(
    model: nn.Module,
    *steps: Step,
    runtime: str = "any",
    methods: Mapping[str, Compressor] = COMPRESSORS,
    store: Cache | None = None,
) -> Artifact:
    return compress(model, CompressionPlan(Target(runtime, "fp32"), steps), methods, context(model), store)


def off(
    model: nn.Module, runtime: str, folder: Path, *steps: Step, methods: Mapping[str, Compressor] = COMPRESSORS
) -> float:
    """The error of a deployed file's output as a share of the uncompressed model's."""
    name = "-".join([step.method for step in steps])
    artifact = run(model, *steps, runtime=runtime, methods=methods)
    deployed = RUNTIMES[runtime].deploy(artifact, context(model), folder / name, folder / "cache")
    with torch.no_grad():
        expected = model(images(64, 9)).numpy()
    return float(np.linalg.norm(deployed.run(images(64, 9).numpy()) - expected) / np.linalg.norm(expected))


@every_form
@pytest.mark.parametrize("net", [rough, lambda: made(Gated), lambda: build("attention")])
def test_the_float_model_answers_as_before(net: Any, form: str) -> None:
    model = net()
    artifact = run(model, smooth(model, 0.75, form))
    with torch.no_grad():
        expected, given = model(images(64, 9)), artifact.model(images(64, 9))
    assert (given - expected).abs().max() < 1e-5 * expected.abs().max()
    changed = [name for name, p in artifact.model.named_parameters() if not torch.equal(p, model.get_parameter(name))]
    assert len(changed) > 1


@every_runtime
def test_deployed_in_float_it_answers_as_before(runtime: str, tmp_path: Path) -> None:
    model = rough()
    assert off(model, runtime, tmp_path, smooth(model)) < 1e-5


@every_runtime
def test_8_bits_lose_less_where_channels_stand_out(runtime: str, tmp_path: Path) -> None:
    model = rough()
    plain = off(model, runtime, tmp_path, quantize(model, 8))
    assert off(model, runtime, tmp_path, smooth(model), quantize(model, 8)) < 0.3 * plain


@every_runtime
def test_4_bits_of_weights_lose_less_where_channels_stand_out(runtime: str, tmp_path: Path) -> None:
    model = rough()
    bits = quantize(model, 4, group_size=32)
    plain = off(model, runtime, tmp_path, bits)
    assert off(model, runtime, tmp_path, smooth(model, 1.0, "awq"), bits) < 0.6 * plain


@every_runtime
@pytest.mark.parametrize(
    ("bits", "shared"),
    [
        (8, {"rounding": "gptq", "bias_correction": True}),
        (8, {"symmetric": True, "calibration": "mse"}),
        (4, {"rounding": "gptq", "group_size": 32}),
        (3, {"rounding": "descent"}),
    ],
)
def test_it_goes_with_other_settings_of_numbers(
    runtime: str, bits: int, shared: dict[str, Scalar], tmp_path: Path
) -> None:
    model = rough()
    rounded = quantize(model, bits, **shared)
    plain = off(model, runtime, tmp_path, rounded)
    assert off(model, runtime, tmp_path, smooth(model), rounded) < 0.7 * plain


def test_a_layer_can_stay_float_beside_8_bits(tmp_path: Path) -> None:
    model = rough()
    step = quantize(model, 8)
    mixed = Step("quantize", {**step.per_layer, "up": {"bits": 32}, "value": {"bits": 4}}, {"group_size": 32})
    assert off(model, "onnxruntime", tmp_path, smooth(model), mixed) < 0.2


def test_readers_of_one_norm_share_its_factors() -> None:
    model = rough()
    scaled = run(model, Step("smooth", {"first": {"migration": 0.5}}, {"form": "smoothquant"})).model
    factors = model.get_parameter("first.weight") / scaled.get_parameter("first.weight")
    for reader in ("query", "key", "value"):
        name = f"{reader}.weight"
        torch.testing.assert_close(scaled.get_parameter(name), model.get_parameter(name) * factors)
    # Inputs and weights now reach equally far in every channel, which is what half the way means.
    columns = torch.cat([scaled.get_parameter(f"{r}.weight") for r in ("query", "key", "value")]).abs().amax(0)
    assert factors[OUTLIERS].min() > 4 * factors.median()
    assert columns.max() / columns.min() < 40


def test_smoothquant_makes_inputs_and_weights_reach_equally_far() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(99, 16, generator=generator), torch.randn(8, 16, generator=generator)
    rows[:, 3] *= 50
    factors = balanced(rows, weight, 0.5)
    reach = (rows / factors).abs().amax(0) / (weight * factors).abs().amax(0)
    torch.testing.assert_close(reach, reach[:1].expand(16))


def test_a_channel_that_calibration_never_shows_gets_a_factor_all_the_same() -> None:
    rows, weight = torch.ones(9, 4), torch.ones(3, 4)
    rows[:, 1], weight[:, 2] = 0, 0
    for factors in (balanced(rows, weight, 0.5), searched(rows, weight, 1.0, 4, 16)[1]):
        assert factors.isfinite().all()
        assert (factors > 0).all()
    assert torch.equal(balanced(0 * rows, weight[:, :1].expand(3, 4), 0.5), torch.ones(4))


def test_awq_finds_the_exponent_that_loses_least_and_none_where_that_is_best() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    flat = torch.randn(256, 64, generator=generator).sign()
    assert searched(flat, weight, 1.0, 4, 32)[0] == 0
    uneven = flat * torch.where(torch.arange(64) % 16 == 0, 20.0, 1.0)
    exponent, factors = searched(uneven, weight, 1.0, 4, 32)
    assert 0 < exponent <= 1
    assert factors[::16].min() > factors[1:16].max()
    assert searched(uneven, weight, 0.1, 4, 32)[0] <= 0.1


def test_what_was_achieved_says_which_exponent_was_taken() -> None:
    model = rough()
    asked = {"first": {"migration": 1.0}, "second": {"migration": 0.0}}
    told = run(model, Step("smooth", asked, {"form": "awq"})).achieved["smooth"]
    assert 0 < float(told["first"]["migration"]) <= 1
    assert float(told["first"]["spread"]) > 1
    assert told["second"] == {"migration": 0.0}


def test_weights_held_at_zero_stay_there() -> None:
    model = rough()
    sparse = Step("sparsify", {"value": {"sparsity": 0.5}, "up": {"sparsity": 0.5}})
    held, scaled = run(model, sparse).model, run(model, sparse, smooth(model)).model
    assert not any(parametrize.is_parametrized(module) for module in scaled.modules())
    for layer in ("value", "up"):
        zeros = held.get_parameter(f"{layer}.weight") == 0
        assert torch.equal(scaled.get_parameter(f"{layer}.weight") == 0, zeros)
        assert zeros.float().mean() == 0.5
    with torch.no_grad():
        torch.testing.assert_close(scaled(images(8)), held(images(8)), rtol=1e-4, atol=1e-5)


@every_form
def test_a_ramp_that_did_not_end_ends_before_weights_are_scaled(form: str) -> None:
    model = rough()
    halves = {"value": {"sparsity": 0.5}, "up": {"sparsity": 0.5}}
    at_once, ramped = (Step("sparsify", halves, {"ramp": ramp}) for ramp in (0, 9))
    expected, given = (run(model, step, smooth(model, form=form)).model for step in (at_once, ramped))
    for name, parameter in expected.named_parameters():
        assert torch.equal(given.get_parameter(name), parameter), name


QAT = Step("qat", {}, {"epochs": 1, "temperature": 2, "weight": 0.5, "learning_rate": 0.001})


def test_qat_comes_afterwards_and_its_grid_stays() -> None:
    model = rough()
    artifact = run(model, smooth(model), QAT, quantize(model, 8, rounding="nearest", bias_correction=True))
    for layer, numbers in artifact.numbers.items():
        weight = artifact.model.get_parameter(f"{layer}.weight")
        assert numbers.values is not None
        assert numbers.scales is not None
        torch.testing.assert_close(numbers.values * numbers.scales, weight, rtol=1e-4, atol=1e-6)


@every_form
def test_behind_qat_it_is_refused(form: str) -> None:
    model = rough()
    with pytest.raises(Infeasible, match="query lies on an 8-bit grid, as qat leaves it"):
        run(model, QAT, smooth(model, form=form), quantize(model, 8))


def test_a_row_of_one_weight_lies_on_every_grid_and_is_scaled_all_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(images()[0].numel(), 1), nn.Linear(1, 4)).eval()
    told = run(model, smooth(model)).achieved["smooth"]
    assert [settings["migration"] for settings in told.values()] == [0.5]


@pytest.mark.parametrize(("field", "value"), [("bits", 1), ("group_size", 0)])
def test_a_grid_that_there_is_not_is_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"compressor.smooth.{field}"):
        Smooth(**{field: value})  # type: ignore[arg-type]


# -- Everywhere


@every_form
@pytest.mark.parametrize("net", [rough_sums, rough, lambda: made(Gated), lambda: build("attention")])
def test_factors_before_every_linear_layer_leave_the_answers(net: Any, form: str) -> None:
    model = net()
    step = smooth(model, 0.75, form, EVERYWHERE)
    linear = [layer.name for layer in read_layers(model, EXAMPLE) if layer.kind == "linear"]
    assert sorted(reader for alike in fronts(model, EXAMPLE).values() for reader in alike) == sorted(linear)
    made_of = run(model, step, methods=EVERYWHERE).model
    with torch.no_grad():
        expected, given = model(images(64, 9)), made_of(images(64, 9))
    assert (given - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(isinstance(made_of.get_submodule(f"{name}.0"), Factors) for name in linear)


@every_runtime
def test_8_bits_lose_less_where_what_stands_out_is_added_too(runtime: str, tmp_path: Path) -> None:
    model = rough_sums()
    plain = off(model, runtime, tmp_path, quantize(model, 8))
    assert off(model, runtime, tmp_path, smooth(model), quantize(model, 8)) > 0.8 * plain
    everywhere = smooth(model, methods=EVERYWHERE), quantize(model, 8)
    assert off(model, runtime, tmp_path / "everywhere", *everywhere, methods=EVERYWHERE) < 0.3 * plain


def test_layers_that_are_given_the_same_share_factors() -> None:
    model = rough_sums()
    assert fronts(model, EXAMPLE)["query"] == ("query", "key", "value")
    assert fronts(model, EXAMPLE)["up"] == ("up",), "the head is given a sum"
    scaled = run(model, smooth(model, methods=EVERYWHERE), methods=EVERYWHERE).model
    assert scaled.get_submodule("query.0") is scaled.get_submodule("value.0")


def test_a_layer_without_migration_stays_as_it_is() -> None:
    model = rough_sums()
    step = Step("smooth", {"query": {"migration": 0.0}, "up": {"migration": 0.5}}, {"form": "smoothquant"})
    scaled = run(model, step, methods=EVERYWHERE).model
    assert isinstance(scaled.get_submodule("query"), nn.Linear)
    assert isinstance(scaled.get_submodule("up.0"), Factors)


def test_it_goes_before_what_stands_in_the_place_of_a_layer() -> None:
    model = rough_sums()
    factored = Step("lowrank", {"up": {"rank": 0.25}}, {"whitened": False})
    methods = {**EVERYWHERE, "lowrank": LowRank()}
    with torch.no_grad():
        before = run(model, factored, methods=methods).model(images(8, 9))
        after = run(model, factored, smooth(model, methods=EVERYWHERE), methods=methods).model
        torch.testing.assert_close(after(images(8, 9)), before)
    assert [type(part) for part in after.get_submodule("up").children()] == [Factors, nn.Linear, nn.Linear]


def test_what_was_stored_behind_it_is_found_again(tmp_path: Path) -> None:
    model = rough_sums()
    learning = Step("qat", {}, {"epochs": 1, "temperature": 1.0, "weight": 1.0, "learning_rate": 1e-3})
    smoothing, rounding = smooth(model, methods=EVERYWHERE), quantize(model, 8)
    made_first = run(model, smoothing, learning, rounding, methods=EVERYWHERE, store=Cache(tmp_path))
    again = run(model, smoothing, learning, rounding, methods=EVERYWHERE, store=Cache(tmp_path))
    assert set(again.seconds) <= {"quantize"}, "nothing is smoothed or trained anew"
    for name, tensor in made_first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
    other = run(model, smoothing, rounding, methods=EVERYWHERE, store=Cache(tmp_path))
    assert set(other.seconds) <= {"quantize"}


def space(model: nn.Module) -> SearchSpace:
    compressors: dict[str, Compressor] = {"smooth": Smooth(), "quantize": Quantize()}
    files = {name: OmegaConf.load(Path(conf.__file__).parent / "compressor" / f"{name}.yaml") for name in compressors}
    spaces: dict[str, Mapping[str, Any]] = {
        name: OmegaConf.to_container(file.space)  # type: ignore[misc]
        for name, file in files.items()
    }
    groups = {name: compressor.groups(model, EXAMPLE) for name, compressor in compressors.items()}
    return build_space(spaces, compressors, groups, read_layers(model, EXAMPLE), RUNTIMES)


def test_a_network_of_convolutions_is_not_asked() -> None:
    assert [method.name for method in space(build("residual")).methods] == ["quantize"]


@pytest.mark.parametrize(("bits", "steps"), [(32, []), (8, ["smooth", "quantize"])])
def test_a_transformer_is_asked_where_something_is_rounded(bits: int, steps: list[str]) -> None:
    found = space(made(Transformer))
    (smoothing,) = (method for method in found.methods if method.name == "smooth")
    assert [knob.name for knob in smoothing.deciding] == ["smooth.migration@model"]
    plan = found.plan(lambda knob: bits if knob.key == "bits" else knob.middle())
    assert [step.method for step in plan.steps] == steps
