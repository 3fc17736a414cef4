"""Unpacks stored weights inside an ONNX graph, with operators that opset 13 has; knows no runtime."""

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from evaluators.export import WEIGHT_INPUT
from evaluators.packed import Packed, pack, word


def with_packed(
    graph: onnx.GraphProto, stored: Mapping[str, Packed]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """The graph's nodes and tensors with those that unpack what is `stored`, by the name of the node that reads it."""
    writer = _Writer()
    unpacked: dict[tuple[str, bool], str] = {}
    readers = []
    for node in graph.node:
        reader = onnx.NodeProto()
        reader.CopyFrom(node)
        if node.name in stored:
            weight, transposed = stored[node.name], node.op_type == "MatMul"
            for turned in (False, transposed):
                if (weight.name, turned) not in unpacked:
                    source = unpacked[weight.name, False] if turned else None
                    made = writer.node("Transpose", source) if source else _unpack(writer, weight)
                    unpacked[weight.name, turned] = made
            reader.input[WEIGHT_INPUT[node.op_type]] = unpacked[weight.name, transposed]
        readers.append(reader)
    return [*writer.nodes, *readers], [*graph.initializer, *writer.tensors.values()]


def _unpack(writer: "_Writer", weight: Packed) -> str:
    values = writer.node("Gather", writer.constant(weight.table), _codes(writer, weight))
    if weight.scales is not None:
        grouped = writer.node("Reshape", values, writer.constant(np.array([*weight.scales.shape, -1])))
        values = writer.node("Mul", grouped, writer.constant(weight.scales[..., None]))
        if weight.offsets is not None:
            values = writer.node("Add", values, writer.constant(weight.offsets[..., None]))
    return writer.node("Reshape", values, writer.constant(np.array(weight.shape)))


def _codes(writer: "_Writer", weight: Packed) -> str:
    """Words are shifted to have each of their codes in front once, and what lies above it is cut off."""
    data, (size, count) = pack(weight.codes, weight.bits), word(weight.bits)
    if count == 1:
        return writer.node("Cast", writer.constant(data), to=onnx.TensorProto.INT32)
    # The unsigned types that a processor's shifts come in.
    kind = np.dtype(np.uint8 if size == 1 else np.uint32 if size <= 4 else np.uint64)
    words = writer.constant(data.reshape(-1, size))
    if size > 1:
        places = kind.type(256) ** np.arange(size, dtype=kind)
        wide = writer.node("Cast", words, to=helper.np_dtype_to_tensor_dtype(kind))
        words = writer.node("MatMul", wide, writer.constant(places[:, None]))
    shifts = np.arange(count, dtype=kind) * kind.type(weight.bits)
    shifted = writer.node("BitShift", words, writer.constant(shifts), direction="RIGHT")
    every = writer.node("Mod", shifted, writer.constant(np.array(2**weight.bits, kind)))
    codes = writer.node("Reshape", every, writer.constant(np.array([-1])))
    codes = writer.node("Cast", codes, to=onnx.TensorProto.INT32)
    if data.size // size * count == weight.codes.size:
        return codes
    return writer.node("Slice", codes, writer.constant(np.array([0])), writer.constant(np.array([weight.codes.size])))


class _Writer:
    """Collects nodes and tensors; equal tensors are one."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}

    def node(self, operator: str, *inputs: str, **attributes: object) -> str:
        name = f"unpack.{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, array: NDArray[np.generic]) -> str:
        told = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        name = f"packed.{hashlib.sha256(told).hexdigest()[:16]}"
        self.tensors.setdefault(name, numpy_helper.from_array(array, name))
        return name
