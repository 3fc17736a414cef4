"""The 8-bit form of an ONNX graph: made by ONNX Runtime's quantizer, with given weights and biases put into it."""

import contextlib
import io
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compressors.errors import Infeasible
from compressors.pipeline import LayerNumbers
from evaluators.export import CLIPPED, Recipe, weight_name
from evaluators.packed import Floats
from evaluators.runtime import Array

# What goes to 8 bits beside the layers, and only behind Conv and Gemm: behind a MatMul it costs accuracy (the residual
# stream of a transformer) and gains no time.
BETWEEN_LAYERS = ("Add", "Relu", "Clip", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool")
TYPES = ["Conv", "Gemm", "MatMul", *BETWEEN_LAYERS]
LEVELS = 256
# Of the largest value on each side of zero: where the range is tried to end.
SHARES = np.geomspace(1, 1 / 64, 97)
BINS = {"percentile": 2048, "mse": 2048, "entropy": 512}
Range = tuple[NDArray[np.float32], NDArray[np.float32]]


class _Feed:
    """Hands the quantizer one batch a call."""

    def __init__(self, batches: Iterable[dict[str, Array]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def quantize(
    source: Path, target: Path, leave_float: Iterable[str], batches: list[dict[str, Array]], recipe: Recipe
) -> None:
    """Calibrate on `batches` and write the 8-bit form of `source`, in the one pair of types with fast kernels."""
    from onnxruntime import quantization as q

    # An older quantizer passes over the option without a word.
    if recipe.symmetric and not hasattr(q.quant_utils, "snap_zero_point_to_uint8"):
        raise Infeasible("this onnxruntime cannot put the middle of an activation's grid at zero; 1.31 can")
    ranges = {} if recipe.calibration == "minmax" else _ranges(source, batches, recipe.calibration)
    q.quantize_static(
        str(source),
        str(target),
        _Feed(batches[:1] if ranges else batches),
        quant_format=q.QuantFormat.QDQ,
        # The fast kernels multiply unsigned activations with signed weights; other pairs are slower than float.
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        per_channel=recipe.per_channel,
        calibrate_method=q.CalibrationMethod.MinMax,
        op_types_to_quantize=TYPES,
        nodes_to_exclude=sorted(leave_float),
        extra_options={
            # A MatMul gives float: rounding its output costs accuracy and saves no time. A Gemm needs it, or its
            # activation is fused to a float Gemm.
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
            "ActivationRestrictedAsymmetric": recipe.symmetric,
            "TensorQuantOverrides": {name: [{"rmin": low, "rmax": high}] for name, (low, high) in ranges.items()},
        },
    )


def _ranges(source: Path, batches: list[dict[str, Array]], calibration: str) -> dict[str, Range]:
    """The range of every tensor that may be rounded, from histograms of its values."""
    from onnxruntime import quantization as q

    method = q.CalibrationMethod.Entropy if calibration == "entropy" else q.CalibrationMethod.Percentile
    options = {"num_bins": BINS[calibration], "symmetric": False, "percentile": 100 * (1 - 2 * CLIPPED)}
    # It prints what it is about to do.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        augmented = str(Path(scratch) / "augmented.onnx")
        calibrator = q.create_calibrator(str(source), TYPES, augmented, method, extra_options=options)
        for batch in batches:  # one a call: it keeps all activations of what it is given at once
            calibrator.collect_data(_Feed([batch]))
        if calibration == "mse":
            found = calibrator.collector.get_histogram_dict()
            return {name: closest_range(counts, edges) for name, (counts, edges, *_) in found.items()}
        ranges = calibrator.compute_data()
    return {name: ranges[name].range_value for name in ranges.keys()}  # noqa: SIM118  it is no mapping


def closest_range(counts: NDArray[np.int64], edges: NDArray[np.float32]) -> Range:
    """Where `LEVELS` steps have the least squared error on a histogram; zero lies on every grid and costs nothing.

    First the upper end is chosen, then the lower, and once more: a step grows with both.
    """
    seen = np.flatnonzero(counts)
    ends = np.array([min(edges[seen[0]], 0), max(edges[seen[-1] + 1], 0)], dtype=np.float64)
    centres = (edges[:-1].astype(np.float64) + edges[1:]) / 2
    weight = np.where((edges[:-1] <= 0) & (edges[1:] >= 0), 0, counts)
    chosen = ends.copy()

    def error(low: float, high: float) -> float:
        beyond = centres - np.clip(centres, low, high)
        rounding = ((high - low) / (LEVELS - 1)) ** 2 / 12
        return float((weight * np.where(beyond == 0, rounding, beyond**2)).sum())

    for _ in range(2):
        chosen[1] = min(ends[1] * SHARES, key=lambda high: error(chosen[0], high))
        chosen[0] = min(ends[0] * SHARES, key=lambda low: error(low, chosen[1]))
    low, high = chosen.astype(np.float32)
    return np.array(low), np.array(high)


def place_int8(
    model: onnx.ModelProto, base: onnx.ModelProto, given: Mapping[str, LayerNumbers], shifts: Mapping[str, Floats]
) -> None:
    """Put values and scales in place of the quantizer's own, and shifts into the biases; `base` is the float graph."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    floats = {tensor.name: tensor for tensor in base.graph.initializer}
    biases = {node.name: numpy_helper.to_array(floats[node.input[2]]) for node in _biased(base, given, floats)}
    for node in [node for node in model.graph.node if node.name in given]:
        numbers, weight = given[node.name], makers[weight_name(node)]
        values, scales = _arrays(node.name, numbers)
        shift = shifts.get(node.name)
        _write(tensors[weight.input[0]], values.T if node.op_type == "MatMul" else values)
        _write(tensors[weight.input[1]], scales)
        if node.op_type == "MatMul":
            if shift is not None:
                add_to_output(model, node.name, shift)
            continue
        bias = biases.get(node.name, np.zeros(len(scales), np.float32))
        if shift is not None:
            bias = bias + shift.reshape(-1)
        if len(node.input) < 3 and shift is not None:
            tensors |= _with_bias(model, node, scales)
            makers = {name: maker for maker in model.graph.node for name in maker.output}
        if len(node.input) == 3:
            step = numpy_helper.to_array(tensors[makers[node.input[0]].input[1]]) * scales
            _write(tensors[makers[node.input[2]].input[0]], _whole(node.name, bias / step))
            _write(tensors[makers[node.input[2]].input[1]], step)


def _biased(
    base: onnx.ModelProto, given: Mapping[str, LayerNumbers], floats: Mapping[str, onnx.TensorProto]
) -> list[onnx.NodeProto]:
    return [n for n in base.graph.node if n.name in given and len(n.input) == 3 and n.input[2] in floats]


def _arrays(name: str, numbers: LayerNumbers) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Values in the layer's shape, and one scale for each of its output channels."""
    if numbers.values is None or numbers.scales is None:
        raise Infeasible(f"{name}: no integer values to place")
    return numbers.values.numpy(), numbers.scales.numpy().astype(np.float32).reshape(-1)


def _with_bias(
    model: onnx.ModelProto, node: onnx.NodeProto, scales: NDArray[np.float32]
) -> dict[str, onnx.TensorProto]:
    """Gives a node without a bias one of zeros; returns the new constants by name."""
    names = [f"{node.name}.bias{part}" for part in ("_quantized", "_scale", "_zero_point", "")]
    zeros = np.zeros(len(scales), np.int32)
    for name, array in zip(names, (zeros, scales, zeros), strict=False):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", names[:3], names[3:], names[3], axis=0))
    node.input.append(names[3])
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _whole(name: str, bias: NDArray[np.float32]) -> NDArray[np.int32]:
    if np.abs(bias).max(initial=0) > np.iinfo(np.int32).max:
        raise Infeasible(f"{name}: its bias is more than 32 bits hold at the step of its weights times its inputs'")
    return np.rint(bias).astype(np.int32)


def _write(tensor: onnx.TensorProto, array: Array) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


def add_to_output(model: onnx.ModelProto, name: str, shift: Floats) -> None:
    """Add a layer's shift `(out, 1, ..)` to the float that a node gives: in the Add behind it, or in a new one."""
    node = next(node for node in model.graph.node if node.name == name)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = [reader for reader in model.graph.node if node.output[0] in reader.input]
    adds = [r for r in readers if r.op_type == "Add" and any(x in constants for x in r.input)]
    if len(readers) == len(adds) == 1:
        place = next(i for i, x in enumerate(adds[0].input) if x in constants)
        bias = numpy_helper.to_array(constants[adds[0].input[place]]) + shift
        adds[0].input[place] = f"{name}.shifted"
        model.graph.initializer.append(numpy_helper.from_array(bias, f"{name}.shifted"))
        return
    output = node.output[0]
    node.output[0] = f"{output}.unshifted"
    model.graph.initializer.append(numpy_helper.from_array(shift, f"{name}.shift"))
    add = helper.make_node("Add", [node.output[0], f"{name}.shift"], [output], f"{name}.add")
    model.graph.node.insert([n.name for n in model.graph.node].index(name) + 1, add)
