"""One ONNX file of the float model, which torch layer each of its nodes came from, and what a plan asks of them.

Every runtime starts here; nothing in this file knows a runtime.
"""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.layers import KINDS
from compressors.pipeline import Artifact, Batch, LayerNumbers
from evaluators.runtime import Array, Session, Support, TensorSpec

OPSET = 17
WEIGHT_INPUT = {"Conv": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}
PARITY = 1e-3
"""Largest error of the float graph, relative to the largest output, that still counts as the same model."""


def export(artifact: Artifact, example: tuple[Tensor, ...], cache: Path) -> Path:
    """The artifact's float model as `float.onnx`, made once per prefix; inputs `input_0`.. and first output `output_0`.

    Raises `Infeasible` naming the operator that ONNX does not have.
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
    inputs = [f"input_{i}" for i in range(len(example))]
    try:
        with warnings.catch_warnings():
            # The exporter warns that it is old; the new one takes ten times as long (3 s against 0.3 s) for the same
            # graph. Its tracer warns of sizes that become constants; `check_parity` runs another batch size instead.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                example,
                str(path),
                dynamo=False,
                opset_version=OPSET,
                input_names=inputs,
                output_names=["output_0"],
                dynamic_axes={name: {0: "batch"} for name in (*inputs, "output_0")},
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise Infeasible(f"the model cannot be written as ONNX: {str(error).splitlines()[0]}") from error
    graph = onnx.load(path)
    _share_initializers(graph.graph)
    onnx.save(graph, path)


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
class Wanted:
    """What a plan asks of the graph, per node: whose weights and activations go to 8 bits, and whose weights to 4."""

    int8: frozenset[str]
    int4: Mapping[str, LayerNumbers]


def wanted(artifact: Artifact, graph: onnx.ModelProto, runtime: str, support: Callable[[str, int], Support]) -> Wanted:
    """The artifact's numbers by node name; raises `Infeasible` for what the runtime refuses or the graph lost."""
    nodes = layer_nodes(graph, artifact.model)
    int8: set[str] = set()
    int4: dict[str, LayerNumbers] = {}
    for layer, numbers in artifact.numbers.items():
        if numbers.bits == 32:
            continue
        _check_numbers(artifact.model.get_submodule(layer), layer, numbers, runtime, support)
        if layer not in nodes:
            raise Infeasible(
                f"{layer}: the exporter merged it with its neighbours, so it cannot get {numbers.bits} bits"
            )
        if numbers.values is None:
            int8.update(nodes[layer])
        else:
            _check_weight(graph, nodes[layer][0], artifact.model.get_submodule(layer), layer)
            int4.update(dict.fromkeys(nodes[layer], numbers))
    return Wanted(frozenset(int8), int4)


def _check_numbers(
    module: nn.Module, layer: str, numbers: LayerNumbers, runtime: str, support: Callable[[str, int], Support]
) -> None:
    kind = KINDS[type(module)]
    if support(kind, numbers.bits) is Support.REFUSED:
        raise Infeasible(f"{layer}: {runtime} has no {numbers.bits}-bit {kind}")
    if (numbers.bits == 4) != (numbers.values is not None):
        given = "no integer values" if numbers.values is None else "integer values"
        raise Infeasible(f"{layer}: {numbers.bits} bits with {given}; {runtime} places values at 4 bits and only there")


def _check_weight(graph: onnx.ModelProto, node_name: str, module: nn.Module, layer: str) -> None:
    # Integer values stand for the layer's own weight; a weight the exporter folded something into would be replaced.
    node = next(node for node in graph.graph.node if node.name == node_name)
    tensor = next(t for t in graph.graph.initializer if t.name == weight_name(node))
    weight = numpy_helper.to_array(tensor)
    expected = module.get_parameter("weight").detach().numpy()
    if not np.array_equal(weight.T if node.op_type == "MatMul" else weight, expected):
        raise Infeasible(f"{layer}: the exporter changed its weight, so its integer values cannot be placed")


def input_specs(example: tuple[Tensor, ...]) -> tuple[TensorSpec, ...]:
    """The signature of the exported file."""
    return tuple(TensorSpec(f"input_{i}", x.shape, str(x.dtype)) for i, x in enumerate(to_arrays(example)))


def to_arrays(tensors: tuple[Tensor, ...]) -> tuple[Array, ...]:
    """The same values for a runtime that does not know torch."""
    return tuple(x.detach().cpu().numpy() for x in tensors)


def calibration_arrays(batches: Callable[[], Iterable[Batch]], limit: int) -> list[dict[str, Array]]:
    """The first `limit` calibration examples by input name, in the batches in which they come."""
    fed: list[dict[str, Array]] = []
    left = limit
    for batch in batches():
        if left <= 0:
            break
        arrays = to_arrays(tuple(x[:left] for x in batch[0]))
        fed.append({f"input_{i}": x for i, x in enumerate(arrays)})
        left -= len(arrays[0])
    return fed


def check_parity(artifact: Artifact, example: tuple[Tensor, ...], session: Session) -> None:
    """Raises `Infeasible` unless the float graph agrees with the torch model, also at another batch size."""
    inputs = tuple(torch.cat([x, x[:1]]) for x in example)
    with torch.no_grad():
        output = artifact.model(*inputs)
    expected = (output if isinstance(output, Tensor) else output[0]).float().numpy()
    got = session(*to_arrays(inputs))
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        raise Infeasible("the float model's output holds NaN or infinity")
    if got.shape != expected.shape:
        raise Infeasible(f"the exported float graph gives shape {got.shape} where torch gives {expected.shape}")
    error = float(np.abs(got - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if error > PARITY:
        raise Infeasible(
            f"the exported float graph is off by {error:.2g} of the largest output; at most {PARITY:g} counts"
        )
