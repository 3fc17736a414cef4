"""8 bits by recipe: what calibration does to ranges, and given weights and shifts that arrive in the deployed files."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from compressors.errors import Infeasible
from compressors.layers import read_layers
from compressors.pipeline import Artifact, Batch, Context, LayerNumbers
from compressors.plan import CompressionPlan, Target
from compressors.rounding import dequantize
from evaluators.onnxruntime import OnnxRuntime
from evaluators.onnxruntime_int8 import closest_range
from evaluators.openvino import OpenVINO
from evaluators.runtime import Deployed, Runtime
from tests.context import quantize_groups
from tests.zoo import NETS, build, images

RUNTIMES: dict[str, Runtime] = {"onnxruntime": OnnxRuntime(), "openvino": OpenVINO()}
every_runtime = pytest.mark.parametrize("runtime", RUNTIMES)
Arrays = list[NDArray[Any]]


def calibration() -> Iterator[Batch]:
    return (((images(16, seed),), None) for seed in range(4))


def deploy(
    runtime: str,
    model: nn.Module,
    numbers: dict[str, LayerNumbers],
    folder: Path,
    batches: Callable[[], Iterator[Batch]] = calibration,
) -> Deployed:
    """Every call finds in the cache what those before it left there."""
    context = Context(model, next(iter(batches()))[0], lambda: iter(()), batches, None)
    artifact = Artifact(model, CompressionPlan(Target(runtime, "fp32")), "original", {}, numbers, {})
    count = len(list(folder.glob("*")))
    return RUNTIMES[runtime].deploy(artifact, context, folder / str(count), folder / "cache")


def everywhere(model: nn.Module, **recipe: Any) -> dict[str, LayerNumbers]:
    layers = read_layers(model, (images(),))
    return {layer.name: LayerNumbers(8, **recipe) for layer in layers if layer.kind != "embedding"}


def given(model: nn.Module, bits: int = 8, shift: float | None = None) -> tuple[dict[str, LayerNumbers], nn.Module]:
    """Numbers of all layers, coarser than the quantizers' own, and the float model that they stand for."""
    rounded, numbers = copy.deepcopy(model), {}
    for layer in read_layers(model, (images(),)):
        weight = model.get_parameter(f"{layer.name}.weight").detach()
        rows = weight.flatten(1)
        values, scales = quantize_groups(rows, 3, rows.shape[1])
        rounded.get_parameter(f"{layer.name}.weight").data.copy_(dequantize(values, scales).reshape(weight.shape))
        added = None if shift is None else shift * torch.linspace(-1, 1, len(weight))
        numbers[layer.name] = LayerNumbers(bits, values.reshape(weight.shape), scales, shift=added)
        if added is not None:
            rounded.get_submodule(layer.name).register_forward_hook(_adding(added))
    return numbers, rounded


def _adding(shift: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        places = 2 if isinstance(module, nn.Conv2d) else 0
        return output + shift.reshape(-1, *[1] * places)

    return hook


def integers(deployed: Deployed) -> tuple[Arrays, Arrays]:
    """Of a file, all 8-bit constants, and all float ones."""
    if deployed.runtime.name == "onnxruntime":
        graph = onnx.load(deployed.folder / "model.onnx").graph
        arrays = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    else:
        model = ov.Core().read_model(deployed.folder / "model.xml")
        arrays = [np.array(op.data) for op in model.get_ops() if op.get_type_name() == "Constant"]
    return [x for x in arrays if x.dtype == np.int8], [x for x in arrays if x.dtype == np.float32]


def holds(found: Arrays, wanted: NDArray[Any]) -> bool:
    """Whichever way round a matrix is stored."""
    ways = (wanted, wanted.T) if wanted.ndim == 2 else (wanted,)
    return any(x.size == way.size and np.array_equal(x.reshape(way.shape), way) for x in found for way in ways)


def int8_kernels(deployed: Deployed) -> int:
    kernels = deployed.runtime.kernels(deployed).values()
    return sum(bool(re.search(r"_[iI]8$|^QLinear|^QGemm|Integer", kernel)) for kernel in kernels)


def off(deployed: Deployed, model: nn.Module) -> float:
    """The error of the output as a share of its spread."""
    with torch.no_grad():
        expected = model(images(32, 9)).numpy()
    return float(np.linalg.norm(deployed.run(images(32, 9).numpy()) - expected) / np.linalg.norm(expected))


@every_runtime
@pytest.mark.parametrize("net", NETS)
def test_given_weights_are_what_is_computed_with(runtime: str, net: str, tmp_path: Path) -> None:
    """Much nearer to the float model of these weights than to the original one."""
    model = build(net)
    numbers, rounded = given(model)
    deployed = deploy(runtime, model, numbers, tmp_path)
    assert off(deployed, rounded) < 0.3 * off(deployed, model)
    assert int8_kernels(deployed) >= len(numbers)


@every_runtime
def test_given_values_and_scales_come_back_bit_by_bit(runtime: str, tmp_path: Path) -> None:
    model = build("tied")
    numbers, _ = given(model)
    found, floats = integers(deploy(runtime, model, numbers, tmp_path))
    for layer in numbers.values():
        assert layer.values is not None
        assert layer.scales is not None
        assert holds(found, layer.values.numpy())
        assert holds(floats, layer.scales.numpy())
    assert len(found) - len([x for x in found if not x.any()]) == 3, "layers with one weight store it once"


@every_runtime
def test_values_survive_the_folding_of_batch_norms(runtime: str, tmp_path: Path) -> None:
    model = build("depthwise")
    numbers, _ = given(model)
    found, _ = integers(deploy(runtime, model, numbers, tmp_path))
    for layer in numbers.values():
        assert layer.values is not None
        assert holds(found, layer.values.numpy())


@every_runtime
@pytest.mark.parametrize("net", NETS)
def test_shifts_arrive_in_the_output(runtime: str, net: str, tmp_path: Path) -> None:
    model = build(net)
    numbers, shifted = given(model, shift=0.3)
    deployed = deploy(runtime, model, numbers, tmp_path)
    _, unshifted = given(model)
    assert off(deployed, shifted) < 0.4 * off(deployed, unshifted)
    assert int8_kernels(deployed) >= len(numbers)


@every_runtime
@pytest.mark.parametrize("net", ["tied", "attention"])
def test_shifts_of_4_bit_layers_arrive_too(runtime: str, net: str, tmp_path: Path) -> None:
    model = build(net)
    names = [layer.name for layer in read_layers(model, (images(),))]
    numbers, shifted = given(model, bits=4, shift=0.3)
    deployed = deploy(runtime, model, {name: numbers[name] for name in names}, tmp_path)
    assert off(deployed, shifted) < 0.03


@every_runtime
@pytest.mark.parametrize("net", NETS)
def test_shifts_of_layers_that_are_only_stored_smaller_arrive_too(runtime: str, net: str, tmp_path: Path) -> None:
    model = build(net)
    numbers, shifted = given(model, bits=3, shift=0.3)
    assert off(deploy(runtime, model, numbers, tmp_path), shifted) < 1e-4


class _Bare(nn.Module):
    """Layers without a bias, the last of them at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.up, self.out = nn.Linear(16, 32, bias=False), nn.Linear(32, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).relu().flatten(2).transpose(1, 2)
        return self.out(self.up(x).relu())  # type: ignore[no-any-return]


@every_runtime
@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_without_a_bias_gets_one(runtime: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Bare().eval()
    numbers, shifted = given(model, shift=0.3)
    if bits == 4:
        numbers = {name: replace(numbers[name], bits=4) for name in ("up", "out")}
        shifted.get_parameter("conv.weight").data.copy_(model.conv.weight.data)
        shifted.get_submodule("conv")._forward_hooks.clear()
    deployed = deploy(runtime, model, numbers, tmp_path)
    assert off(deployed, shifted) < 0.03
    assert off(deployed, model) > 0.1


@every_runtime
def test_layers_with_and_without_given_weights_share_a_file(runtime: str, tmp_path: Path) -> None:
    model = build("residual")
    numbers, _ = given(model)
    rounded = copy.deepcopy(model)
    some = {"block.a.0", "head"}
    for name in some:
        values, scales = numbers[name].values, numbers[name].scales
        assert values is not None
        assert scales is not None
        weight = rounded.get_parameter(f"{name}.weight")
        weight.data.copy_(dequantize(values.flatten(1), scales).reshape(weight.shape))
    mixed = {**everywhere(model), **{name: numbers[name] for name in some}}
    mixed["down.0"] = LayerNumbers(32)
    deployed = deploy(runtime, model, mixed, tmp_path)
    assert off(deployed, rounded) < 0.5 * off(deployed, model)


RECIPES = ({"calibration": "percentile"}, {"calibration": "mse"}, {"per_channel": False}, {"symmetric": True})


@every_runtime
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("net", ["residual", "attention"])
def test_another_recipe_is_another_file_with_the_same_kernels(
    runtime: str, net: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    model = build(net)
    usual = deploy(runtime, model, everywhere(model), tmp_path)
    other = deploy(runtime, model, everywhere(model, **recipe), tmp_path)
    assert usual.sha256 != other.sha256
    assert int8_kernels(other) == int8_kernels(usual)
    assert off(other, model) < 0.1
    assert deploy(runtime, model, everywhere(model), tmp_path).sha256 == usual.sha256


def test_entropy_is_only_for_the_runtime_that_has_it(tmp_path: Path) -> None:
    model = build("plain")
    numbers = everywhere(model, calibration="entropy")
    deployed = deploy("onnxruntime", model, numbers, tmp_path / "a")
    assert int8_kernels(deployed) >= len(numbers)
    with pytest.raises(Infeasible, match="openvino has no entropy calibration: possible are minmax, percentile, mse"):
        deploy("openvino", model, numbers, tmp_path / "b")


def with_an_outlier() -> Iterator[Batch]:
    """One value in half a million is far out."""
    for seed in range(2):
        batch = torch.randn(64, 3, 48, 48, generator=torch.Generator().manual_seed(seed))
        batch[0, 0, 0, 0] = 40.0
        yield (batch,), None


def input_range(deployed: Deployed) -> float:
    """How far the input's grid reaches."""
    if deployed.runtime.name == "onnxruntime":
        graph = onnx.load(deployed.folder / "model.onnx").graph
        first = next(node for node in graph.node if "input_0" in node.input)
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        return float(arrays[first.input[1]] * (255 - arrays[first.input[2]].astype(int)))
    model = ov.Core().read_model(deployed.folder / "model.xml")
    (first,) = (port.get_node() for port in model.inputs[0].get_target_inputs())
    return float(first.input_value(2).get_node().data)


@every_runtime
def test_what_lies_far_out_is_clipped_by_every_method_but_minmax(runtime: str, tmp_path: Path) -> None:
    model = build("plain")
    methods = ["minmax", "percentile", "mse", *(["entropy"] if runtime == "onnxruntime" else [])]
    reach = {}
    for method in methods:
        numbers = {"a.0": LayerNumbers(8, calibration=method)}
        reach[method] = input_range(deploy(runtime, model, numbers, tmp_path, with_an_outlier))
    assert reach["minmax"] == pytest.approx(40, rel=0.02), "the grid is moved until zero lies on it"
    assert 3 < reach["percentile"] < 5
    assert reach["percentile"] < reach["mse"] < 30
    assert reach.get("entropy", 4.0) < 30


@every_runtime
def test_symmetric_grids_have_their_middle_or_their_end_at_zero(runtime: str, tmp_path: Path) -> None:
    model = build("residual")
    deployed = deploy(runtime, model, everywhere(model, symmetric=True), tmp_path)
    if runtime == "onnxruntime":
        graph = onnx.load(deployed.folder / "model.onnx").graph
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        points = {int(arrays[n.input[2]]) for n in graph.node if n.op_type == "QuantizeLinear"}
        assert points == {0, 128}
        return
    graph = ov.Core().read_model(deployed.folder / "model.xml")
    for op in (op for op in graph.get_ops() if op.get_type_name() == "FakeQuantize"):
        low, high = (op.input_value(i).get_node().data for i in (1, 2))
        assert ((low == 0) | np.isclose(low, -high * 128 / 127, rtol=1e-5)).all()


def test_a_quantizer_without_symmetric_grids_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("onnxruntime.quantization.quant_utils.snap_zero_point_to_uint8")
    model = build("plain")
    with pytest.raises(Infeasible, match="cannot put the middle"):
        deploy("onnxruntime", model, everywhere(model, symmetric=True), tmp_path)


def test_the_range_with_the_least_error_gives_up_what_is_rare() -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    values[0] = 30.0
    counts, edges = np.histogram(values, 4096, range=(-30, 30))
    low, high = closest_range(counts, edges.astype(np.float32))

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        rounded = np.clip(np.rint(values / step), np.rint(low / step), np.rint(high / step)) * step
        return float(((rounded - values) ** 2).sum())

    assert -5 < low < -3
    assert 20 < high < 26
    best = error(float(low), float(high))
    assert best < 0.8 * error(float(values.min()), 30.0)
    assert all(best < 1.02 * error(float(low) * a, float(high) * b) for a in (0.8, 1.25) for b in (0.8, 1.25))


def test_what_is_never_negative_has_a_range_from_zero() -> None:
    values = np.abs(np.random.default_rng(0).standard_normal(10_000)).astype(np.float32)
    counts, edges = np.histogram(values, 2048, range=(-5, 5))
    low, high = closest_range(counts, edges.astype(np.float32))
    assert abs(low) < 0.01
    assert 2.5 < high <= 5


@every_runtime
def test_the_same_numbers_give_the_same_file(runtime: str, tmp_path: Path) -> None:
    """Also when layers with one weight have equal numbers, and not the same ones: as those from a store."""
    model = build("tied")
    numbers, _ = given(model, shift=0.1)
    copies = copy.deepcopy(numbers)
    first = deploy(runtime, model, numbers, tmp_path / "a")
    assert deploy(runtime, model, copies, tmp_path / "b").sha256 == first.sha256


def test_a_bias_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = build("plain")
    numbers, _ = given(model)
    model.get_parameter("head.bias").data.fill_(1e6)
    assert numbers["head"].scales is not None
    tiny = replace(numbers["head"], scales=numbers["head"].scales * 1e-6)
    with pytest.raises(Infeasible, match=r"head.*its bias is more than 32 bits hold"):
        deploy("onnxruntime", model, {"head": tiny}, tmp_path)
