"""The 8-bit form of an OpenVINO graph: made by NNCF, with given weights and shifts put into it."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13

from compressors.errors import Infeasible
from compressors.pipeline import LayerNumbers
from evaluators.export import CLIPPED, Recipe
from evaluators.packed import Floats
from evaluators.runtime import Array


def quantize(model: ov.Model, batches: list[dict[str, Array]], recipe: Recipe) -> ov.Model:
    """Calibrate on `batches`; NNCF averages what the batches show, extremes as well as quantiles."""
    # nncf takes a second to import and is needed once per prefix.
    import nncf

    nncf.set_log_level(40)
    products = _products(model)
    with contextlib.redirect_stdout(io.StringIO()):  # progress bars, which the search draws itself
        return nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            # Weights are symmetric in both.
            preset=nncf.QuantizationPreset.PERFORMANCE if recipe.symmetric else nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            model_type=nncf.ModelType.TRANSFORMER if products else None,
            # In bf16 the plugin gave wrong products of two 8-bit activations; rounding them saved no time either.
            ignored_scope=nncf.IgnoredScope(
                names=products, types=["Gather", "LSTMSequence", "GRUSequence"], validate=False
            ),
            advanced_parameters=_parameters(recipe),
        )


def _parameters(recipe: Recipe) -> Any:
    import nncf
    from nncf.quantization import advanced_parameters, range_estimator

    def clipped() -> Any:
        return range_estimator.StatisticsCollectorParameters(
            range_estimator.StatisticsType.QUANTILE,
            range_estimator.AggregatorType.MEAN,
            quantile_outlier_prob=CLIPPED,
        )

    estimators = {
        "minmax": range_estimator.RangeEstimatorParameters(),
        "percentile": range_estimator.RangeEstimatorParameters(clipped(), clipped()),
        "mse": range_estimator.RangeEstimatorParametersSet.HISTOGRAM,
    }
    if recipe.calibration not in estimators:
        raise Infeasible(f"openvino has no {recipe.calibration} calibration: possible are {', '.join(estimators)}")
    per_tensor = advanced_parameters.QuantizationParameters(per_channel=False)
    return nncf.AdvancedQuantizationParameters(
        # Both change the weights of a layer because of its neighbours, so single layers could not go back to float.
        disable_bias_correction=True,
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1),
        activations_range_estimator_params=estimators[recipe.calibration],
        weights_quantization_params=None if recipe.per_channel else per_tensor,
    )


def _products(model: ov.Model) -> list[str]:
    """The multiplications without a constant second factor: of two activations, as in attention."""
    multiplications = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
    return [op.get_friendly_name() for op in multiplications if not _is_constant(op.input_value(1))]


def _is_constant(value: Any) -> bool:
    return bool(value.get_node().get_type_name() == "Constant")


def place_int8(model: ov.Model, weights: Mapping[str, Any], given: Mapping[str, LayerNumbers]) -> None:
    """Put values and scales in place of NNCF's own, by name of the operation; `weights` are those of the float graph.

    Operations that share a weight go on to share it.
    """
    placed: dict[str, Any] = {}
    for op in model.get_ops():
        name = op.get_friendly_name()
        if name in given and name in weights:
            weight = weights[name].get_friendly_name()
            if weight not in placed:
                placed[weight] = _dequantized(op, given[name])
            op.input(1).replace_source_output(placed[weight])


def _dequantized(op: Any, numbers: LayerNumbers) -> Any:
    if numbers.values is None or numbers.scales is None:
        raise Infeasible(f"{op.get_friendly_name()}: no integer values to place")
    values, scales = numbers.values.numpy(), numbers.scales.numpy().astype(np.float32)
    shape = tuple(op.input(1).get_shape())
    if op.get_type_name() == "MatMul":
        transposed = op.get_attributes()["transpose_b"]
        values, scales = (values, scales) if transposed else (values.T, scales.T)
    elif op.get_type_name() == "GroupConvolution":  # (groups, out / groups, in / groups, ...)
        values, scales = values.reshape(shape), scales.reshape(*shape[:2], *[1] * (len(shape) - 2))
    else:
        scales = scales.reshape(-1, *[1] * (len(shape) - 1))
    steps = opset13.convert(opset13.constant(np.ascontiguousarray(values)), "f32")
    return opset13.multiply(steps, opset13.constant(np.ascontiguousarray(scales))).output(0)


def add_to_output(op: Any, shift: Floats) -> None:
    """Add a layer's shift `(out, 1, ..)` to what its operation gives: in the addition behind it, or in a new one."""
    readers = list(op.output(0).get_target_inputs())
    added = _constant_added(readers[0]) if len(readers) == 1 else None
    if added is not None:
        bias = added.get_source_output().get_node().data
        total = bias.reshape(-1) + shift.reshape(-1)
        added.replace_source_output(opset13.constant(total.reshape(bias.shape)).output(0))
        return
    moved = opset13.add(op.output(0), opset13.constant(shift))
    for reader in readers:
        reader.replace_source_output(moved.output(0))


def _constant_added(reader: Any) -> Any | None:
    """The port of an addition at which there is a constant, if `reader` is its other port."""
    op = reader.get_node()
    if op.get_type_name() != "Add":
        return None
    other = op.input(1 - reader.get_index())
    constant = other.get_source_output().get_node().get_type_name() == "Constant"
    return other if constant and other.get_source_output().get_node().data.size > 1 else None
