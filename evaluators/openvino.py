"""OpenVINO on the CPU; its 8-bit graphs are made in `openvino_int8`."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13
from openvino.passes import ConstantFolding, Manager

from compressors.errors import Infeasible, at_least
from compressors.pipeline import KERNELS, Artifact, Context, LayerNumbers
from evaluators.export import Recipe, calibration_arrays, check_parity, export, input_specs, load_graph, once, wanted
from evaluators.openvino_int8 import add_to_output, place_int8, quantize
from evaluators.packed import WIDTHS, Packed
from evaluators.packed_openvino import reshaped, unpacked
from evaluators.runtime import Array, Deployed, Loader, Session, Support

HINT = {"fp32": "f32", "bf16": "bf16"}
DYNAMIC = ["compareto", "dynamic_quantization_group_size"]
"""Where a file says what its loader is to set that option to."""
WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")


@dataclass(frozen=True)
class OpenVINO:
    """Float graphs, 8-bit graphs made by NNCF and edited per candidate, and 4-bit weights for linear layers.

    Weights without a kernel are stored packed and unpacked by the constant folding of compiling.
    `calibration_examples` are looked at to set the ranges of 8-bit activations.
    """

    calibration_examples: int = 256

    def __post_init__(self) -> None:
        """Refuses to set ranges from nothing."""
        at_least(1, **{"runtime.openvino.calibration_examples": self.calibration_examples})

    @property
    def name(self) -> str:
        """How plans, knobs and tables refer to it."""
        return "openvino"

    def precisions(self) -> tuple[str, ...]:
        """`bf16` only where the processor has it; elsewhere OpenVINO would silently compute in float."""
        able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("fp32", "bf16") if "BF16" in able else ("fp32",)

    def support(self, kind: str, bits: int) -> Support:
        """Other widths than those with a kernel are unpacked to float weights when the file is compiled."""
        if bits == 32 or (kind, bits) in KERNELS:
            return Support.KERNEL
        return Support.STORAGE if bits in WIDTHS else Support.REFUSED

    def deploy(self, artifact: Artifact, context: Context, folder: Path, cache: Path) -> Deployed:
        """Write `model.xml` and `model.bin`."""
        precision = artifact.plan.target.precision
        if precision not in self.precisions():
            raise Infeasible(f"{self.name} cannot compute in {precision} here; {' or '.join(self.precisions())} can")
        source = export(artifact, context.example, cache)
        ask = wanted(artifact, load_graph(source), self.name, self.support)
        base = once(source.with_name("openvino-float"), lambda made: _write_float(source, artifact, context, made))
        model = _read(base).clone()
        if ask.int8:
            full = source.with_name(f"openvino-int8-{self.calibration_examples}-{ask.recipe}")
            model = _read(once(full, lambda made: self._write_int8(base, artifact, context, ask.recipe, made))).clone()
            keep_int8(model, _weights(_read(base)), _operations(_read(base), ask.int8))
            given = {_find(model, node).get_friendly_name(): numbers for node, numbers in ask.given.items()}
            place_int8(model, _weights(_read(base)), given)
        for node, numbers in ask.grouped.items():
            _place(model, node, _decompressed(numbers, node))
        if ask.grouped:
            model.set_rt_info(str(_common_group(ask.grouped)), DYNAMIC)
        _place_packed(model, ask.packed)
        for node, shift in ask.shifts.items():
            add_to_output(_find(model, node), shift)
        model.validate_nodes_and_infer_types()
        folder.mkdir(parents=True, exist_ok=True)
        _save(model, folder, half=precision == "bf16")
        return Deployed(self, folder, precision, input_specs(artifact.model, context.example))

    def loader(self) -> Loader:
        """`load_openvino`."""
        return load_openvino

    def requirements(self) -> tuple[str, ...]:
        """The installed OpenVINO."""
        return (f"openvino=={version('openvino')}", f"numpy=={version('numpy')}")

    def kernels(self, deployed: Deployed) -> Mapping[str, str]:
        """Operation -> primitive, such as `brgconv_avx512_amx_I8`, of whatever multiplies with a weight."""
        return _kernels(deployed)

    def _write_int8(self, base: Path, artifact: Artifact, context: Context, recipe: Recipe, made: Path) -> None:
        batches = calibration_arrays(artifact.model, context.calibration, self.calibration_examples)
        # A clone, because NNCF leaves marks in the graph it is given, and later files would tell of them.
        _save(quantize(_read(base).clone(), batches, recipe), made, half=False)


def load_openvino(folder: str, precision: str, batch: int | None, threads: int) -> "Session":
    """Every option that changes what is computed is set, because some defaults quantize or round silently."""
    import numpy as np
    import openvino as ov

    # One for ever, for all of a process: each sets a stack for signals, and sets back the one it found when it goes.
    # Where the first of two goes first, that is memory given back, and the next signal crashes the process (2026.4).
    core = vars(ov).setdefault("compareto_core", ov.Core())
    model = core.read_model(f"{folder}/model.xml")
    if batch is not None:
        model.reshape({port: [batch, *list(port.get_partial_shape())[1:]] for port in model.inputs})
    dynamic = ["compareto", "dynamic_quantization_group_size"]
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        # Of the inputs of weights that are alone in few bits; 0 rounds none.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": model.get_rt_info(dynamic).astype(str)
        if model.has_rt_info(dynamic)
        else "0",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    if threads > 0:
        options["INFERENCE_NUM_THREADS"] = str(threads)
    request = core.compile_model(model, "CPU", options).create_infer_request()
    output = request.model_outputs[0]
    past = [p.get_partial_shape() for p in request.model_inputs if p.get_any_name().startswith("past_")]

    def run(*inputs: "Array") -> "NDArray[np.float32]":
        given = list(inputs)
        if past and len(given) == len(request.model_inputs) - len(past):
            sizes = ([0 if size.is_dynamic else size.get_length() for size in list(shape)[1:]] for shape in past)
            given += [np.zeros((len(inputs[0]), *several), np.float32) for several in sizes]
        request.infer(given, share_inputs=True)
        # A copy: the request writes its next answer into the same memory.
        return np.array(request.get_tensor(output).data, dtype=np.float32)

    return run


def _core() -> ov.Core:
    return vars(ov).setdefault("compareto_core", ov.Core())  # the loader's, see there


@lru_cache(maxsize=4)
def _read(folder: Path) -> ov.Model:
    # Kept in memory because the next candidate usually starts from the same graphs: clone before changing one.
    return _core().read_model(folder / "model.xml")


def _save(model: ov.Model, folder: Path, half: bool) -> None:
    folder.mkdir(exist_ok=True)
    _name_by_position(model)
    ov.save_model(model, folder / "model.xml", compress_to_fp16=half)


def _name_by_position(model: ov.Model) -> None:
    # Unnamed operations are numbered by a counter of the process; files of equal models must be equal. The model's own
    # operations have a path for a name.
    for position, op in enumerate(model.get_ordered_ops()):
        if re.fullmatch(r"[A-Z][A-Za-z]*_\d+", op.get_friendly_name()):
            op.set_friendly_name(f"{op.get_type_name()}_{position}")


def _write_float(source: Path, artifact: Artifact, context: Context, made: Path) -> None:
    model = _core().read_model(source)
    manager = Manager()
    manager.register_pass(ConstantFolding())  # so that every weight is a plain constant
    manager.run_passes(model)
    _save(model, made, half=False)
    check_parity(artifact, context.example, load_openvino(str(made), "fp32", None, 0))


def _is_weighted(op: Any) -> bool:
    return op.get_type_name() in WEIGHTED and op.input_value(1).get_node().get_type_name() == "Constant"


def _weights(model: ov.Model) -> dict[str, Any]:
    """Name of every operation that multiplies with a weight -> that constant; `model` is the float graph."""
    return {op.get_friendly_name(): op.input_value(1).get_node() for op in model.get_ops() if _is_weighted(op)}


def _operations(model: ov.Model, nodes: frozenset[str]) -> set[str]:
    return {_find(model, node).get_friendly_name() for node in nodes}


def _find(model: ov.Model, node: str) -> Any:
    """The operation that does the multiplying of an ONNX node; the one that adds its bias keeps the node's own name."""
    ops = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() in WEIGHTED}
    output = model.outputs[0].get_node().input_value(0).get_node()
    # The last node of a model is named after the output instead.
    for name in (f"{node}/WithoutBiases", node, output.get_friendly_name()):
        if name in ops:
            return ops[name]
    raise Infeasible(f"{node}: OpenVINO has no operation of that name")


def keep_int8(model: ov.Model, weights: Mapping[str, Any], int8: set[str]) -> None:
    """Of a graph that is 8-bit everywhere, put back to float what is not named in `int8`.

    An operation without weights stays in 8 bits only between layers that do.
    """
    for op in model.get_ops():
        if op.get_friendly_name() in weights and op.get_type_name() in WEIGHTED:
            if op.get_friendly_name() in int8:
                _check_quantized(op)
            else:
                _past_quantizer(op.input(0))
                op.input(1).replace_source_output(_copy(weights[op.get_friendly_name()]).output(0))
    for op in model.get_ops():
        if op.get_type_name() == "FakeQuantize" and not _is_between(op, weights, int8):
            for target in op.output(0).get_target_inputs():
                _past_quantizer(target)
    model.validate_nodes_and_infer_types()


def _check_quantized(op: Any) -> None:
    if op.input_value(1).get_node().get_type_name() == "Constant":
        raise Infeasible(f"{op.get_friendly_name()}: NNCF does not quantize this operation")


def _past_quantizer(port: Any) -> None:
    source = port.get_source_output().get_node()
    if source.get_type_name() == "FakeQuantize":
        port.replace_source_output(source.input_value(0))


def _copy(constant: Any) -> Any:
    copy = opset13.constant(constant.data.astype(np.float32))
    copy.set_friendly_name(constant.get_friendly_name())
    return copy


def _is_between(quantizer: Any, weights: Mapping[str, Any], int8: set[str]) -> bool:
    before = _nearest([quantizer.input_value(0).get_node()], _inputs, weights)
    after = _nearest([port.get_node() for port in quantizer.output(0).get_target_inputs()], _consumers, weights)
    return (bool(before) and before <= int8) or bool(after & int8)


def _inputs(op: Any) -> Iterator[Any]:
    return (value.get_node() for value in op.input_values())


def _consumers(op: Any) -> Iterator[Any]:
    # Behind the next quantizer begins another region.
    if op.get_type_name() == "FakeQuantize":
        return iter(())
    return (port.get_node() for output in op.outputs() for port in output.get_target_inputs())


def _nearest(starts: list[Any], step: Callable[[Any], Iterator[Any]], weights: Mapping[str, Any]) -> set[str]:
    """The first weighted operations on every way from `starts`; sizes and constants lead nowhere."""
    found: set[str] = set()
    seen: set[str] = set()
    while starts:
        op = starts.pop()
        name = op.get_friendly_name()
        if name in seen or op.get_type_name() in ("ShapeOf", "Constant"):
            continue
        seen.add(name)
        if name in weights:
            found.add(name)
        else:
            starts.extend(step(op))
    return found


def _place(model: ov.Model, node: str, weight: Any) -> None:
    """Let a MatMul multiply with a weight `(out, in)`, as which the plugin knows compressed ones."""
    op = _find(model, node)
    _past_quantizer(op.input(0))
    name = op.get_friendly_name()
    replacement = opset13.matmul(op.input_value(0), weight, False, True)
    op.output(0).replace(replacement.output(0))
    replacement.set_friendly_name(name)
    model.validate_nodes_and_infer_types()


def _place_packed(model: ov.Model, stored: Mapping[str, Packed]) -> None:
    weights = {name: unpacked(weight) for name, weight in {w.name: w for w in stored.values()}.items()}
    lookups = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Gather"}
    for node, weight in stored.items():
        op = lookups.get(node) or _find(model, node)
        if op.get_type_name() == "MatMul":
            _place(model, node, weights[weight.name])
            continue
        port = op.input(0 if op.get_type_name() == "Gather" else 1)
        # A convolution in groups has an axis more.
        port.replace_source_output(reshaped(weights[weight.name], tuple(port.get_shape())).output(0))
    model.validate_nodes_and_infer_types()


def _common_group(grouped: Mapping[str, LayerNumbers]) -> int:
    """Inputs are rounded in groups that fit into those of every weight; 0 where there are none."""
    sizes = [n.group_size or n.values.shape[1] for n in grouped.values() if n.values is not None]
    return math.gcd(*sizes)


def _decompressed(numbers: LayerNumbers, name: str) -> Any:
    if numbers.values is None or numbers.scales is None:
        raise Infeasible(f"{name}: {numbers.bits} bits without integer values")
    rows, groups = numbers.scales.shape
    values = numbers.values.numpy().reshape(rows, groups, -1)
    kind = ov.Type.i4 if numbers.bits == 4 else ov.Type.i8
    tensor = ov.Tensor(kind, ov.Shape(values.shape))  # owns its memory: one made from an array would borrow it
    tensor.data[:] = _pack(values) if numbers.bits == 4 else values
    weight = opset13.convert(opset13.constant(tensor), "f32")
    scales = numbers.scales.numpy().astype(np.float32)[..., None]
    if numbers.offsets is not None:
        # As a zero point, because the plugin does not know compressed weights by anything else.
        zeros = -numbers.offsets.numpy().astype(np.float32)[..., None] / scales
        weight = opset13.subtract(weight, opset13.constant(zeros))
    weight = opset13.multiply(weight, opset13.constant(scales))
    flat = opset13.constant(np.array([rows, values[0].size], np.int64))
    return opset13.reshape(weight, flat, special_zero=False)


def _pack(values: NDArray[np.int8]) -> NDArray[np.int8]:
    """Two's-complement nibbles, two to a byte, the first one low."""
    nibbles = np.pad(values.reshape(-1), (0, values.size % 2)).astype(np.uint8) % np.uint8(16)
    return (nibbles[0::2] + nibbles[1::2] * np.uint8(16)).view(np.int8)


def _kernels(deployed: Deployed) -> dict[str, str]:
    core = _core()
    model = core.read_model(deployed.folder / "model.xml")
    # With an open batch size the plugin chooses only when it runs.
    # A past of no word would leave products without anything to multiply.
    shapes = {port: [1, *(n or 1 for n in s.shape[1:])] for port, s in zip(model.inputs, deployed.inputs, strict=True)}
    model.reshape(shapes)
    options = {"INFERENCE_PRECISION_HINT": HINT[deployed.precision], "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = core.compile_model(model, "CPU", options)
    found = {}
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        if info["layerType"].value in ("Convolution", "GroupConvolution", "FullyConnected", "MatMul"):
            found[op.get_friendly_name()] = str(info["primitiveType"].value)
    return found
