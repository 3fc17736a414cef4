"""One ONNX file of the float model, which torch layer each of its nodes came from, and what a plan asks of them.

Every runtime starts here; nothing in this file knows a runtime.
"""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
CLIPPED = 1e-4
"""Share of an activation's values, at each end, that percentile calibration leaves outside of its range."""
FOLDED = 1e-5
"""Largest error of a weight, relative to the layer's largest, that still counts as a factor of each channel."""


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
    """What a plan asks of the graph, per node: whose weights and activations go to 8 bits, and whose weights to 4.

    `given` holds those of the 8-bit nodes whose weights are not the quantizer's own, `recipe` is that of all of them.
    """

    int8: frozenset[str]
    int4: Mapping[str, LayerNumbers]
    given: Mapping[str, LayerNumbers] = field(default_factory=dict)
    recipe: Recipe = Recipe()


def wanted(artifact: Artifact, graph: onnx.ModelProto, runtime: str, support: Callable[[str, int], Support]) -> Wanted:
    """The artifact's numbers by node name; raises `Infeasible` for what the runtime refuses or the graph lost."""
    nodes = layer_nodes(graph, artifact.model)
    int8: set[str] = set()
    placed: dict[str, LayerNumbers] = {}
    for layer, numbers in artifact.numbers.items():
        if numbers.bits == 32:
            continue
        module = artifact.model.get_submodule(layer)
        _check_numbers(module, layer, numbers, runtime, support)
        if layer not in nodes:
            raise Infeasible(
                f"{layer}: the exporter merged it with its neighbours, so it cannot get {numbers.bits} bits"
            )
        if numbers.bits == 8:
            int8.update(nodes[layer])
        if numbers.values is not None:
            fitting = _as_folded(graph, nodes[layer][0], module, layer, numbers)
            placed.update(dict.fromkeys(nodes[layer], fitting))
    int4 = {node: numbers for node, numbers in placed.items() if node not in int8}
    given = {node: numbers for node, numbers in placed.items() if node in int8}
    return Wanted(frozenset(int8), int4, given, _recipe(artifact.numbers))


def _recipe(numbers: Mapping[str, LayerNumbers]) -> Recipe:
    recipes = {Recipe(n.calibration, n.per_channel, n.symmetric): layer for layer, n in numbers.items() if n.bits == 8}
    if len(recipes) > 1:
        told = ", ".join(f"{recipe} for {layer}" for recipe, layer in recipes.items())
        raise Infeasible(f"8-bit layers disagree on calibration ({told}): one graph is made by one recipe")
    return next(iter(recipes), Recipe())


def _check_numbers(
    module: nn.Module, layer: str, numbers: LayerNumbers, runtime: str, support: Callable[[str, int], Support]
) -> None:
    kind = KINDS[type(module)]
    if support(kind, numbers.bits) is Support.REFUSED:
        raise Infeasible(f"{layer}: {runtime} has no {numbers.bits}-bit {kind}")
    if numbers.bits == 4 and numbers.values is None:
        raise Infeasible(f"{layer}: 4 bits with no integer values; {runtime} does not round to 4 bits by itself")
    if numbers.values is not None and (numbers.scales is None or numbers.bits not in (4, 8)):
        raise Infeasible(f"{layer}: {runtime} places integer values with scales, at 4 and at 8 bits")
    if numbers.bits == 8 and numbers.scales is not None and numbers.scales.shape[1] != 1:
        raise Infeasible(f"{layer}: 8 bits with {numbers.scales.shape[1]} scales a row; {runtime} multiplies with one")


def _as_folded(
    graph: onnx.ModelProto, node_name: str, module: nn.Module, layer: str, numbers: LayerNumbers
) -> LayerNumbers:
    """The same numbers for the weight that the graph has.

    The exporter folds a batch norm into the layer before it, which multiplies each output channel with a factor: the
    integers stay, and the scales take it. Values of other weights are refused.
    """
    node = next(node for node in graph.graph.node if node.name == node_name)
    tensor = next(t for t in graph.graph.initializer if t.name == weight_name(node))
    stored = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    weight = module.get_parameter("weight").detach()
    found = (stored.T if node.op_type == "MatMul" else stored).reshape(len(weight), -1)
    rows = weight.flatten(1)
    if torch.equal(found, rows):
        return numbers
    factors = _factors(found, rows)
    unlike = (found - factors[:, None] * rows).abs().amax() > FOLDED * found.abs().amax()
    if unlike or (numbers.bits == 4 and (factors < 0).any()):
        raise Infeasible(f"{layer}: the exporter changed its weight, so its integer values cannot be placed")
    return _scaled(numbers, factors)


def _factors(found: Tensor, rows: Tensor) -> Tensor:
    """By which each row was multiplied."""
    energy = rows.double().square().sum(1)
    factors = torch.where(energy > 0, (found.double() * rows.double()).sum(1) / energy, 1.0)
    return factors.float()


def _scaled(numbers: LayerNumbers, factors: Tensor) -> LayerNumbers:
    """Scales stay above zero: a channel without any weight left is given zeros, and a channel's sign its values."""
    if numbers.values is None or numbers.scales is None:
        return numbers
    scales = numbers.scales * factors.abs()[:, None]
    signs = factors.sign().to(torch.int8).reshape(-1, *[1] * (numbers.values.dim() - 1))
    return replace(
        numbers,
        values=numbers.values * signs,
        scales=torch.where(scales > 0, scales, scales.amax()),
        shift=None if numbers.shift is None else numbers.shift * factors,
    )


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
