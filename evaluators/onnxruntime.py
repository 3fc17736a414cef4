"""ONNX Runtime on the CPU; its 8-bit graphs are made in `onnxruntime_int8`."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compressors.errors import Infeasible, at_least
from compressors.pipeline import KERNELS, Artifact, Context, LayerNumbers
from evaluators.export import (
    Recipe,
    calibration_arrays,
    check_parity,
    export,
    input_specs,
    load_graph,
    once,
    wanted,
    weight_name,
)
from evaluators.onnxruntime_int8 import add_to_output, place_int8, quantize
from evaluators.packed import WIDTHS
from evaluators.packed_onnx import with_packed
from evaluators.runtime import Array, Deployed, Loader, Session, Support

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class OnnxRuntime:
    """Float graphs, 8-bit graphs made by its own quantizer and edited per candidate, 4-bit weights for linear layers.

    Weights without a kernel are stored packed and unpacked by the constant folding of loading.
    `calibration_examples` are looked at to set the ranges of 8-bit activations.
    """

    calibration_examples: int = 256

    def __post_init__(self) -> None:
        """Refuses to set ranges from nothing."""
        at_least(1, **{"runtime.onnxruntime.calibration_examples": self.calibration_examples})

    @property
    def name(self) -> str:
        """How plans, knobs and tables refer to it."""
        return "onnxruntime"

    def precisions(self) -> tuple[str, ...]:
        """Its CPU kernels for other precisions are slower than these."""
        return ("fp32",)

    def support(self, kind: str, bits: int) -> Support:
        """Other widths than those with a kernel are unpacked to float weights when the file is loaded."""
        if bits == 32 or (kind, bits) in KERNELS:
            return Support.KERNEL
        return Support.STORAGE if bits in WIDTHS else Support.REFUSED

    def deploy(self, artifact: Artifact, context: Context, folder: Path, cache: Path) -> Deployed:
        """Write `model.onnx`."""
        precision = artifact.plan.target.precision
        if precision not in self.precisions():
            raise Infeasible(f"{self.name} cannot compute in {precision}; fp32 can")
        source = export(artifact, context.example, cache)
        ask = wanted(artifact, load_graph(source), self.name, self.support)
        base = once(source.with_name("onnxruntime-float"), lambda made: _write_float(source, artifact, context, made))
        model = load_graph(base / "model.onnx")
        if ask.int8:
            full = source.with_name(f"onnxruntime-int8-{self.calibration_examples}-{ask.recipe}")
            once(full, lambda made: _write_int8(base, artifact, context, self.calibration_examples, ask.recipe, made))
            model = keep_int8(model, load_graph(full / "model.onnx"), ask.int8)
            place_int8(model, load_graph(base / "model.onnx"), ask.given, ask.shifts)
        if ask.grouped:
            model = _place_grouped(model, ask.grouped)
        if ask.packed:
            model = _assemble(model, *with_packed(model.graph, ask.packed))
        for node, shift in ask.shifts.items():
            if node not in ask.given:
                add_to_output(model, node, shift)
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(model, folder / "model.onnx")
        return Deployed(self, folder, precision, input_specs(artifact.model, context.example))

    def loader(self) -> Loader:
        """`load_onnxruntime`."""
        return load_onnxruntime

    def requirements(self) -> tuple[str, ...]:
        """The installed ONNX Runtime."""
        return (f"onnxruntime=={version('onnxruntime')}", f"numpy=={version('numpy')}")

    def kernels(self, deployed: Deployed) -> Mapping[str, str]:
        """Node -> operator, such as `QLinearConv`, that is left after ONNX Runtime's own optimization."""
        return _kernels(deployed.folder / "model.onnx")


def load_onnxruntime(folder: str, precision: str, batch: int | None, threads: int) -> "Session":  # noqa: ARG001
    """One session on the CPU, nodes one after the other; `precision` is always fp32.

    It takes any batch size: told of one, ONNX Runtime makes a float Gemm of every 8-bit MatMul, which then is slower
    than the uncompressed one, and gains nothing elsewhere.
    """
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        f"{folder}/model.onnx",
        options,
        providers=["CPUExecutionProvider"],
        # It would round the weights of a float layer that happens to stand between 8-bit ones.
        disabled_optimizers=["WeightBiasQuantization"],
    )
    names = [value.name for value in session.get_inputs()]
    past = {value.name: value.shape[1:] for value in session.get_inputs() if value.name.startswith("past_")}
    needed = [name for name in names if name not in past]
    outputs = [session.get_outputs()[0].name]

    def run(*inputs: "Array") -> "NDArray[np.float32]":
        given = dict(zip(names if len(inputs) == len(names) else needed, inputs, strict=True))
        for name in past.keys() - given.keys():
            sizes = (size if isinstance(size, int) else 0 for size in past[name])
            given[name] = np.zeros((len(inputs[0]), *sizes), np.float32)
        return np.asarray(session.run(outputs, given)[0], dtype=np.float32)

    return run


def _write_float(source: Path, artifact: Artifact, context: Context, made: Path) -> None:
    from onnxruntime.quantization import shape_inference

    made.mkdir()
    # The quantizer reads the shapes; the symbolic pass and the optimizer would change the graph and are left out.
    shape_inference.quant_pre_process(
        str(source), str(made / "model.onnx"), skip_optimization=True, skip_symbolic_shape=True
    )
    check_parity(artifact, context.example, load_onnxruntime(str(made), "fp32", None, 0))


def _write_int8(base: Path, artifact: Artifact, context: Context, examples: int, recipe: Recipe, made: Path) -> None:
    made.mkdir()
    graph = load_graph(base / "model.onnx")
    layers = weighted_nodes(graph)
    quantize(
        base / "model.onnx",
        made / "model.onnx",
        float_nodes(graph, layers),
        calibration_arrays(artifact.model, context.calibration, examples),
        recipe,
    )


def weighted_nodes(graph: onnx.ModelProto) -> frozenset[str]:
    """The nodes that multiply with a weight of the model."""
    constants = {tensor.name for tensor in graph.graph.initializer}
    multiplying = [node for node in graph.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return frozenset(node.name for node in multiplying if weight_name(node) in constants)


def float_nodes(graph: onnx.ModelProto, int8: frozenset[str]) -> set[str]:
    """What must stay float when only the layers' nodes `int8` go to 8 bits.

    An operation without weights is 8-bit only when every layer that feeds it is an 8-bit Conv or Gemm.
    """
    layers = weighted_nodes(graph)
    types = {node.name: node.op_type for node in graph.graph.node}
    rounded = {name for name in int8 if types[name] in ("Conv", "Gemm")}
    feeding = _feeding_layers(graph, layers)
    stay = {name for name in types if name in layers and name not in int8}
    return stay | {name for name in types if name not in layers and not (feeding[name] and feeding[name] <= rounded)}


def _feeding_layers(graph: onnx.ModelProto, layers: frozenset[str]) -> dict[str, set[str]]:
    """Node -> the nearest layers before it on every way; an exported graph lists its nodes in order."""
    before: dict[str, set[str]] = {}
    carried: dict[str, set[str]] = {}
    for node in graph.graph.node:
        before[node.name] = set().union(*(carried.get(name, set()) for name in node.input))
        ahead = {node.name} if node.name in layers else before[node.name]
        # A tensor's size carries nothing of its values.
        carried.update(dict.fromkeys(node.output, set() if node.op_type == "Shape" else ahead))
    return before


def keep_int8(base: onnx.ModelProto, full: onnx.ModelProto, int8: frozenset[str]) -> onnx.ModelProto:
    """Of `full`, which is 8-bit everywhere, only the nodes `int8` and what lies between them; the rest from `base`.

    Raises `Infeasible` when the quantizer has left one of them float.
    """
    stay = float_nodes(base, int8)
    parts = _Parts(base, full)
    for name in int8:
        parts.check_quantized(name)
    nodes = [*parts.converters(), *parts.kept(stay), *parts.restored(stay)]
    weights = [*full.graph.initializer, *parts.float_weights({name for node in nodes for name in node.input})]
    return _assemble(base, nodes, weights)


class _Parts:
    """The nodes of a float graph and of its 8-bit form, from which candidates are put together."""

    def __init__(self, base: onnx.ModelProto, full: onnx.ModelProto) -> None:
        self.base, self.full = base, full
        self.constants = {tensor.name for tensor in base.graph.initializer}
        self.makers = {name: node for node in full.graph.node for name in node.output}

    def converters(self) -> Iterator[onnx.NodeProto]:
        """All that quantize or dequantize; those that nobody reads fall away later."""
        return (node for node in self.full.graph.node if _is_converter(node))

    def kept(self, stay: set[str]) -> Iterator[onnx.NodeProto]:
        finals = self._finals()
        for node in self.full.graph.node:
            if not _is_converter(node) and node.name not in stay:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.output[:] = [finals.get(name, name) for name in node.output]
                yield copy

    def restored(self, stay: set[str]) -> Iterator[onnx.NodeProto]:
        dequantized = self._dequantized(stay)
        for node in self.base.graph.node:
            if node.name in stay:
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                copy.input[:] = [_float_name(x) if x in self.constants else dequantized.get(x, x) for x in node.input]
                yield copy

    def float_weights(self, read: set[str]) -> Iterator[onnx.TensorProto]:
        # Renamed, because in the 8-bit graph a bias keeps its name behind its dequantizer.
        for tensor in self.base.graph.initializer:
            if _float_name(tensor.name) in read:
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = _float_name(tensor.name)
                yield copy

    def check_quantized(self, name: str) -> None:
        node = next(node for node in self.full.graph.node if node.name == name)
        maker = self.makers.get(weight_name(node))
        if maker is None or not _is_converter(maker):
            raise Infeasible(f"{name}: ONNX Runtime does not quantize this {node.op_type}")

    def _finals(self) -> dict[str, str]:
        """What is rounded only to be the model's output -> that output; it is handed out as it is."""
        finals = {}
        for value in self.full.graph.output:
            maker = self.makers[value.name]
            if maker.op_type == "DequantizeLinear":
                finals[self.makers[maker.input[0]].input[0]] = value.name
        return finals

    def _dequantized(self, stay: set[str]) -> dict[str, str]:
        """What an 8-bit node makes -> the name under which a float node reads it."""
        made = {name for node in self.full.graph.node if node.name not in stay for name in node.output}
        pairs = {}
        for node in self.full.graph.node:
            if node.op_type == "DequantizeLinear" and node.input[0] in self.makers:
                raw = self.makers[node.input[0]].input[0]
                if raw in made:
                    pairs[raw] = node.output[0]
        return pairs


def _is_converter(node: onnx.NodeProto) -> bool:
    return node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _float_name(name: str) -> str:
    return f"{name}.float"


def _assemble(
    like: onnx.ModelProto, nodes: list[onnx.NodeProto], weights: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """A model with the signature of `like`; a later node wins over an earlier one with the same output."""
    makers = {name: node for node in nodes for name in node.output}
    used = _needed([value.name for value in like.graph.output], makers)
    ordered = [makers[name] for name in _in_order(used, makers)]
    read = {name for node in ordered for name in node.input}
    graph = helper.make_graph(
        list({id(node): node for node in ordered}.values()),
        like.graph.name,
        like.graph.input,
        like.graph.output,
        [tensor for tensor in weights if tensor.name in read],
    )
    opsets = [*like.opset_import, *([helper.make_opsetid(MICROSOFT, 1)] if _needs_microsoft(like, ordered) else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=like.ir_version, producer_name="compareto")


def _needs_microsoft(like: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> bool:
    known = any(opset.domain == MICROSOFT for opset in like.opset_import)
    return not known and any(node.domain == MICROSOFT for node in nodes)


def _needed(outputs: list[str], makers: Mapping[str, onnx.NodeProto]) -> dict[str, None]:
    """Every made tensor that the outputs depend on, as an ordered set."""
    needed: dict[str, None] = {}
    ahead = list(outputs)
    while ahead:
        name = ahead.pop()
        if name in makers and name not in needed:
            needed[name] = None
            ahead.extend(makers[name].input)
    return needed


def _in_order(needed: Iterable[str], makers: Mapping[str, onnx.NodeProto]) -> Iterable[str]:
    return TopologicalSorter({n: [x for x in makers[n].input if x in makers] for n in needed}).static_order()


def _place_grouped(model: onnx.ModelProto, numbers: Mapping[str, LayerNumbers]) -> onnx.ModelProto:
    constants = {tensor.name for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.name not in numbers:
            nodes.append(node)
            continue
        given = numbers[node.name]
        multiply, tensors = _packed(node, given)
        shifted, of_offsets = _offset(node, given)
        weights |= {tensor.name: tensor for tensor in (*tensors, *of_offsets)}
        terms = [*(made.output[0] for made in shifted[-1:]), *(name for name in node.input[2:] if name in constants)]
        sums = [*(f"{node.name}.sum_{i}" for i in range(len(terms))), node.output[0]]
        multiply.output[0] = sums[0]
        nodes += [multiply, *shifted]
        for i, term in enumerate(terms):
            nodes.append(helper.make_node("Add", [sums[i], term], [sums[i + 1]], f"{node.name}.add_{i}"))
    return _assemble(model, nodes, weights.values())


def _offset(node: onnx.NodeProto, numbers: LayerNumbers) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """What a weight's offsets add, for which the operator takes whole numbers only, or is ten times slower.

    Inputs are summed by groups, once for all layers that are given the same.
    """
    if numbers.offsets is None or numbers.values is None:
        return [], []
    width, groups = numbers.values.shape[1], numbers.offsets.shape[1]
    sums = f"{node.input[0]}.sums_of_{groups}"
    ones = np.repeat(np.eye(groups, dtype=np.float32), width // groups, axis=0)
    offsets = np.ascontiguousarray(numbers.offsets.numpy().astype(np.float32).T)
    tensors = [
        numpy_helper.from_array(ones, f"groups.{width}.{groups}"),
        numpy_helper.from_array(offsets, f"{node.name}.offsets"),
    ]
    return [
        helper.make_node("MatMul", [node.input[0], tensors[0].name], [sums], sums),
        helper.make_node("MatMul", [sums, tensors[1].name], [f"{node.name}.offset"], f"{node.name}.offset"),
    ], tensors


def _packed(node: onnx.NodeProto, numbers: LayerNumbers) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    if numbers.values is None or numbers.scales is None:
        raise Infeasible(f"{node.name}: {numbers.bits} bits without integer values")
    values, scales = numbers.values.numpy(), numbers.scales.numpy().astype(np.float32)
    block, scales = _blocks(node.name, values.shape[1], scales)
    tensors = [
        numpy_helper.from_array(_pack(values, numbers.bits, block), f"{node.name}.values"),
        numpy_helper.from_array(scales.reshape(-1), f"{node.name}.scales"),
    ]
    multiply = helper.make_node(
        "MatMulNBits",
        [node.input[0], *(tensor.name for tensor in tensors)],
        node.output,
        node.name,
        domain=MICROSOFT,
        K=values.shape[1],
        N=values.shape[0],
        bits=numbers.bits,
        block_size=block,
        # Activations are rounded to 8 bits per block inside the kernel; without that it is up to ten times slower.
        accuracy_level=4,
    )
    return multiply, tensors


def _blocks(name: str, width: int, scales: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
    """The block size that the operator understands (a power of two), and the scales repeated for it."""
    groups = scales.shape[1]
    if groups == 1:  # the last block of a row may be incomplete
        block = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, 1 << (width - 1).bit_length()))
        return block, np.repeat(scales, -(-width // block), axis=1)
    size = width // groups
    block = min(LARGEST_BLOCK, size & -size)
    if block < SMALLEST_BLOCK:
        raise Infeasible(f"{name}: ONNX Runtime has no groups of {size} weights; take a multiple of {SMALLEST_BLOCK}")
    return block, np.repeat(scales, size // block, axis=1)


def _pack(values: NDArray[np.int8], bits: int, block: int) -> NDArray[np.uint8]:
    """`(out, blocks, bytes)` with the middle of the range for zero; of two nibbles in a byte, the first one is low."""
    rows, width = values.shape
    padded = np.pad(values, ((0, 0), (0, -width % block))).astype(np.int16)
    codes: NDArray[np.uint8] = (padded + 2 ** (bits - 1)).astype(np.uint8).reshape(rows, -1, block)
    if bits == 8:
        return codes
    packed: NDArray[np.uint8] = codes[..., 0::2] + codes[..., 1::2] * np.uint8(16)
    return packed


def _kernels(path: Path) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as scratch:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
        )
        optimized = onnx.load(options.optimized_model_filepath)
    return {node.name: node.op_type for node in optimized.graph.node if re.search(r"Conv|Gemm|MatMul", node.op_type)}
