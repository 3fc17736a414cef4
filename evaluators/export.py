"""One ONNX file of the float model, which torch layer each of its nodes came from, and what a plan asks of them.

Every runtime starts here; nothing in this file knows a runtime.
"""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.layers import KINDS, first_output
from compressors.pipeline import Artifact, Batch, LayerNumbers
from evaluators.packed import Floats, Packed, packed
from evaluators.runtime import CODEBOOK, Array, Session, Support, TensorSpec

OPSET = 17
WEIGHT_INPUT = {"Conv": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
PAST = "past_"
"""What the names of inputs begin with that a call may leave out, and which then are empty."""
PARITY = 1e-3
"""Largest error of the float graph, relative to the largest output, that still counts as the same model."""
CLIPPED = 1e-4
"""Share of an activation's values, at each end, that percentile calibration leaves outside of its range."""
FOLDED = 1e-5
"""Largest error of a weight, relative to its largest entry, that still counts as multiplied channel by channel."""


@runtime_checkable
class Continuing(Protocol):
    """A model of words `(n, t)` that can go on behind those it has seen: `forward(words, *past)`.

    With a past it gives what it has become too, as further outputs: tensors of floats `(n, heads, p + t, width)`, of
    which `empty_past` makes those with p = 0.
    """

    def empty_past(self, count: int) -> tuple[Tensor, ...]:
        """For `count` examples."""


def export(artifact: Artifact, example: tuple[Tensor, ...], cache: Path) -> Path:
    """The artifact's float model as `float.onnx`, made once per prefix; inputs `input_0`.. and first output `output_0`.

    A `Continuing` model has inputs `past_0`.. and outputs `present_0`.. beside them, and any number of words.
    Raises `Infeasible` naming the operator that ONNX does not have, and for a `Continuing` model without a past.
    """
    return once(cache / artifact.prefix / "float.onnx", lambda path: _export(artifact.model, example, path))


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, written by `make` if it is not there yet; several processes may ask for the same one at once."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        make(made)
        _settle(made)
        try:
            made.replace(target)
        except OSError:
            # A folder cannot replace one that another process finished first; that one is just as good.
            if not target.exists():
                raise
    return target


def _settle(made: Path) -> None:
    # A name can reach the disk before the bytes: without this, a machine that loses power keeps torn files for good.
    for path in filter(Path.is_file, (made, *made.rglob("*"))):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def _export(model: nn.Module, example: tuple[Tensor, ...], path: Path) -> None:
    signature = _Signature.of(model, example)
    try:
        with warnings.catch_warnings():
            # The exporter warns that it is old; the new one takes ten times as long (3 s against 0.3 s) for the same
            # graph. Its tracer warns of sizes that become constants; `check_parity` runs another batch size instead.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                signature.example,
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=signature.inputs,
                output_names=signature.outputs,
                dynamic_axes=signature.axes,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise Infeasible(f"the model cannot be written as ONNX: {str(error).splitlines()[0]}") from error
    graph = onnx.load(path)
    _keep_inputs(graph.graph, signature)
    _share_initializers(graph.graph)
    onnx.save(graph, path)


@dataclass(frozen=True)
class _Signature:
    """What the exporter is told of inputs and outputs; `axes` are those that may have any length."""

    example: tuple[Tensor, ...]
    inputs: list[str]
    outputs: list[str]
    axes: Mapping[str, Mapping[int, str]]

    @classmethod
    def of(cls, model: nn.Module, example: tuple[Tensor, ...]) -> "_Signature":
        inputs, outputs = [f"input_{i}" for i in range(len(example))], ["output_0"]
        if not isinstance(model, Continuing):
            return cls(example, inputs, outputs, {name: {0: "batch"} for name in (*inputs, *outputs)})
        # Of some words, because nothing may follow from there being none.
        past = tuple(torch.zeros(x.shape[0], x.shape[1], 2, x.shape[3]) for x in model.empty_past(len(example[0])))
        if not past:
            raise Infeasible("no attention is left, so that nothing tells a word what was before it")
        before, after = [f"{PAST}{i}" for i in range(len(past))], [f"present_{i}" for i in range(len(past))]
        axes = {name: {0: "batch", 1: "words"} for name in (*inputs, *outputs)}
        axes |= {name: {0: "batch", 2: "past"} for name in before} | {name: {0: "batch", 2: "all"} for name in after}
        return cls((*example, *past), inputs + before, outputs + after, axes)


def _keep_inputs(graph: onnx.GraphProto, signature: _Signature) -> None:
    # The exporter drops inputs that nothing reads, such as the mask of a text whose attentions were all taken out.
    known = {value.name: value for value in graph.input}
    sizes = [
        [signature.axes[name].get(axis, length) for axis, length in enumerate(x.shape)]
        for name, x in zip(signature.inputs, signature.example, strict=True)
    ]
    every = [
        known.get(name) or helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.numpy().dtype), size)
        for name, x, size in zip(signature.inputs, signature.example, sizes, strict=True)
    ]
    del graph.input[:]
    graph.input.extend(every)


def _share_initializers(graph: onnx.GraphProto) -> None:
    # The exporter gives a tensor that is used twice a second name through an Identity, which hides that it is a weight.
    names = {tensor.name for tensor in graph.initializer}
    copies = {node.output[0]: node for node in graph.node if node.op_type == "Identity" and node.input[0] in names}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in copies:
                node.input[i] = copies[name].input[0]
    for node in copies.values():
        graph.node.remove(node)


@lru_cache(maxsize=2)
def load_graph(path: Path) -> onnx.ModelProto:
    """The ONNX file, kept in memory because the next candidate usually starts from the same one; do not change it."""
    return onnx.load(path)


def layer_nodes(graph: onnx.ModelProto, model: nn.Module) -> dict[str, list[str]]:
    """Layer name -> its Conv, Gemm, MatMul or Gather nodes; a module that is called twice has two.

    A node belongs to a layer when its name carries the layer's scope and its weight has the layer's shape.
    """
    first_names = {id(module): name for name, module in reversed([*model.named_modules(remove_duplicate=False)])}
    modules = dict(model.named_modules(remove_duplicate=False))
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        name = _owner(node.name, modules) if node.op_type in WEIGHT_INPUT else None
        if name is None or type(modules[name]) not in KINDS:
            continue
        expected = tuple(modules[name].get_parameter("weight").shape)
        if shapes.get(weight_name(node)) == (expected[::-1] if node.op_type == "MatMul" else expected):
            found.setdefault(first_names[id(modules[name])], []).append(node)
    # Nodes of one layer read one weight; two weights mean that a name can be read as two layers (`conv_1` is also the
    # second call of `conv`), and then neither reading is safe.
    return {name: [n.name for n in nodes] for name, nodes in found.items() if len(set(map(weight_name, nodes))) == 1}


def weight_name(node: onnx.NodeProto) -> str:
    """The tensor that a layer's node multiplies with or looks up in."""
    return str(node.input[WEIGHT_INPUT[node.op_type]])


def _owner(node_name: str, modules: Mapping[str, nn.Module]) -> str | None:
    path = ""
    for segment in node_name.split("/")[1:-1]:
        child = _child(path, segment, modules)
        if child is None:
            return None
        path = child
    return path


def _child(path: str, segment: str, modules: Mapping[str, nn.Module]) -> str | None:
    # A segment is a child's name, with its container's name before it (`layer1.0`) and, from the second call on, the
    # number of the call behind it (`layer1.0_1`).
    parent = f"{path}." if path else ""
    for name in (segment, re.sub(r"_\d+$", "", segment)):
        for candidate in (parent + name, parent + name.rpartition(".")[2]):
            if candidate in modules:
                return candidate
        # Containers that are never called (a list in a dict) leave no trace in the scope.
        inner = [known for known in modules if known.startswith(parent) and known.endswith(f".{name}")]
        if len(inner) == 1:
            return inner[0]
    return None


@dataclass(frozen=True)
class Recipe:
    """How a runtime's own quantizer makes the 8-bit graph from which candidates are cut; see `LayerNumbers`."""

    calibration: str = "minmax"
    per_channel: bool = True
    symmetric: bool = False

    def __str__(self) -> str:
        """Part of a folder's name."""
        scales = "channel" if self.per_channel else "tensor"
        return f"{self.calibration}-{scales}{'-symmetric' if self.symmetric else ''}"


@dataclass(frozen=True)
class Wanted:
    """What a plan asks of the graph, per node: weights and activations in 8 bits, weights alone, weights just stored.

    `grouped` are weights alone in 4 or 8 bits, with scales for groups. `given` holds those of the 8-bit nodes whose
    weights are not the quantizer's own, `recipe` is that of all of them. `shifts` `(out, 1, ..)` are added to what
    nodes give, instead of those in the numbers: what a folded batch norm did to a weight is done to all of these. A
    runtime that declares neither a kernel nor storage for something is never asked for it.
    """

    int8: frozenset[str]
    grouped: Mapping[str, LayerNumbers]
    packed: Mapping[str, Packed]
    given: Mapping[str, LayerNumbers]
    shifts: Mapping[str, Floats]
    recipe: Recipe


def wanted(artifact: Artifact, graph: onnx.ModelProto, runtime: str, support: Callable[[str, int], Support]) -> Wanted:
    """The artifact's numbers by node name; raises `Infeasible` for what the runtime refuses or the graph lost."""
    nodes = layer_nodes(graph, artifact.model)
    grouped: dict[str, LayerNumbers] = {}
    given: dict[str, LayerNumbers] = {}
    stored: dict[str, Packed] = {}
    shifts: dict[str, Floats] = {}
    asked = {layer: numbers for layer, numbers in artifact.numbers.items() if numbers.bits != 32}
    owners = _stored_owners(artifact.model, asked, support)
    calibrated = {layer: n for layer, n in asked.items() if layer not in owners and n.bits == 8 and not n.weights_alone}
    for layer, numbers in asked.items():
        module = artifact.model.get_submodule(layer)
        _check_numbers(module, layer, numbers, runtime, support, layer in owners)
        if layer not in nodes:
            raise Infeasible(
                f"{layer}: the exporter merged it with its neighbours, so it cannot get {numbers.bits} bits"
            )
        if numbers.values is None:
            continue
        factors = _factors(graph, nodes[layer][0], module, layer)
        if layer in owners:
            owner = owners[layer] if factors is None else layer
            stored.update(dict.fromkeys(nodes[layer], packed(owner, numbers, factors)))
        else:
            placed = given if layer in calibrated else grouped
            placed.update(dict.fromkeys(nodes[layer], _scaled(numbers, factors, layer)))
        if numbers.shift is not None:
            shifts.update(dict.fromkeys(nodes[layer], _shift(numbers.shift, factors, places=numbers.values.dim() - 2)))
    int8 = frozenset(node for layer in calibrated for node in nodes[layer])
    return Wanted(int8, grouped, stored, given, shifts, _recipe(calibrated))


def _stored_owners(
    model: nn.Module, asked: Mapping[str, LayerNumbers], support: Callable[[str, int], Support]
) -> dict[str, str]:
    """The layers whose weight is only stored smaller -> the first with that weight; all do as soon as one of them does.

    A kernel would need a second copy of what the others store.
    """
    weights = {layer: id(model.get_submodule(layer).get_parameter("weight")) for layer in asked}
    first = {weight: layer for layer, weight in reversed(weights.items())}
    stored = {
        weights[layer]
        for layer, numbers in asked.items()
        if support(_form(model.get_submodule(layer), numbers), numbers.bits) is Support.STORAGE
    }
    return {layer: first[weight] for layer, weight in weights.items() if weight in stored}


def _form(module: nn.Module, numbers: LayerNumbers) -> str:
    return KINDS[type(module)] if numbers.codebook is None else CODEBOOK


def _recipe(calibrated: Mapping[str, LayerNumbers]) -> Recipe:
    recipes = {Recipe(n.calibration, n.per_channel, n.symmetric): layer for layer, n in calibrated.items()}
    if len(recipes) > 1:
        told = ", ".join(f"{recipe} for {layer}" for recipe, layer in recipes.items())
        raise Infeasible(f"8-bit layers disagree on calibration ({told}): one graph is made by one recipe")
    return next(iter(recipes), Recipe())


def _check_numbers(
    module: nn.Module,
    layer: str,
    numbers: LayerNumbers,
    runtime: str,
    support: Callable[[str, int], Support],
    stored: bool,
) -> None:
    form, bits = _form(module, numbers), numbers.bits
    if support(form, bits) is Support.REFUSED:
        raise Infeasible(f"{layer}: {runtime} has no {bits}-bit {form}")
    if stored:
        if numbers.values is None:
            raise Infeasible(f"{layer}: {bits} bits without values; {runtime} only stores them and chooses none")
        return
    if bits == 4 and numbers.values is None:
        raise Infeasible(f"{layer}: 4 bits with no integer values; {runtime} does not round to 4 bits by itself")
    if numbers.values is not None and (numbers.scales is None or bits not in (4, 8)):
        raise Infeasible(f"{layer}: {runtime} places integer values with scales, at 4 and at 8 bits")
    if numbers.weights_alone and form != "linear":
        raise Infeasible(f"{layer}: {runtime} has kernels for weights alone of linear layers only, not of a {form}")
    if bits == 8 and not numbers.weights_alone and numbers.scales is not None and numbers.scales.shape[1] != 1:
        raise Infeasible(f"{layer}: 8 bits with {numbers.scales.shape[1]} scales a row; {runtime} multiplies with one")


def _factors(graph: onnx.ModelProto, node_name: str, module: nn.Module, layer: str) -> Floats | None:
    """By what the exporter multiplied each output channel, to fold a batch norm into it; None if it changed nothing.

    Values stand for the layer's own weight, and one that was changed in any other way would be replaced.
    """
    node = next(node for node in graph.graph.node if node.name == node_name)
    tensor = next(t for t in graph.graph.initializer if t.name == weight_name(node))
    found = numpy_helper.to_array(tensor)
    found = found.T if node.op_type == "MatMul" else found
    expected = module.get_parameter("weight").detach().numpy()
    if np.array_equal(found, expected):
        return None
    rows, wanted_rows = (x.reshape(len(x), -1).astype(np.float64) for x in (found, expected))
    factors = (rows * wanted_rows).sum(1) / np.maximum((wanted_rows**2).sum(1), np.finfo(np.float32).tiny)
    if np.abs(factors[:, None] * wanted_rows - rows).max() > FOLDED * np.abs(rows).max():
        raise Infeasible(f"{layer}: the exporter changed its weight, so its integer values cannot be placed")
    narrow: Floats = factors.astype(np.float32)
    return narrow


def _scaled(numbers: LayerNumbers, factors: Floats | None, layer: str) -> LayerNumbers:
    """The same integers for the weight that the graph has: scales take the factors, and values a channel's sign.

    Scales stay above zero: a channel without any weight left keeps its own, and gets zeros.
    """
    if factors is None or numbers.values is None or numbers.scales is None:
        return numbers
    if numbers.bits == 4 and (factors < 0).any():
        raise Infeasible(f"{layer}: the exporter turned the sign of a channel, which 4-bit values cannot take")
    given = torch.from_numpy(factors)
    signs = given.sign().to(torch.int8).reshape(-1, *[1] * (numbers.values.dim() - 1))
    scales = numbers.scales * given.abs()[:, None]
    scales = torch.where(scales > 0, scales, numbers.scales)
    offsets = None if numbers.offsets is None else numbers.offsets * given[:, None]
    return replace(numbers, values=numbers.values * signs, scales=scales, offsets=offsets)


def _shift(shift: Tensor, factors: Floats | None, places: int) -> Floats:
    """What is added to an output that has so many axes behind its channels."""
    found: Floats = shift.numpy() if factors is None else shift.numpy() * factors
    return found.reshape(-1, *[1] * places)


def input_specs(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[TensorSpec, ...]:
    """The signature of the exported file."""
    named = {**{f"input_{i}": x for i, x in enumerate(to_arrays(example))}, **empty_arrays(model, len(example[0]))}
    return tuple(TensorSpec(name, x.shape, str(x.dtype)) for name, x in named.items())


def empty_arrays(model: nn.Module, count: int) -> dict[str, Array]:
    """The past that a call begins with, by input name; nothing for a model without."""
    past = to_arrays(model.empty_past(count)) if isinstance(model, Continuing) else ()
    return {f"{PAST}{i}": x for i, x in enumerate(past)}


def to_arrays(tensors: tuple[Tensor, ...]) -> tuple[Array, ...]:
    """The same values for a runtime that does not know torch."""
    return tuple(x.detach().cpu().numpy() for x in tensors)


def calibration_arrays(model: nn.Module, batches: Callable[[], Iterable[Batch]], limit: int) -> list[dict[str, Array]]:
    """The first `limit` calibration examples by input name, in the batches in which they come."""
    fed: list[dict[str, Array]] = []
    left = limit
    for batch in batches():
        if left <= 0:
            break
        arrays = to_arrays(tuple(x[:left] for x in batch[0]))
        fed.append({**{f"input_{i}": x for i, x in enumerate(arrays)}, **empty_arrays(model, len(arrays[0]))})
        left -= len(arrays[0])
    return fed


def check_parity(artifact: Artifact, example: tuple[Tensor, ...], session: Session) -> None:
    """Raises `Infeasible` unless the float graph agrees with the torch model, also at another batch size."""
    inputs = tuple(torch.cat([x, x[:1]]) for x in example)
    with torch.no_grad():
        expected = first_output(artifact.model(*inputs)).float().numpy()
        _check_same(expected, session(*to_arrays(inputs)))
        if isinstance(artifact.model, Continuing):
            seen = inputs[0].shape[1] // 2
            _, *past = artifact.model(inputs[0][:, :seen], *artifact.model.empty_past(len(inputs[0])))
            _check_same(expected[:, seen:], session(*to_arrays((inputs[0][:, seen:], *past))))


def _check_same(expected: NDArray[np.float32], got: NDArray[np.float32]) -> None:
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        raise Infeasible("the float model's output holds NaN or infinity")
    if got.shape != expected.shape:
        raise Infeasible(f"the exported float graph gives shape {got.shape} where torch gives {expected.shape}")
    error = float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if error > PARITY:
        raise Infeasible(
            f"the exported float graph is off by {error:.2g} of the largest output; at most {PARITY:g} counts"
        )
