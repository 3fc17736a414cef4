"""Unpacks stored weights inside an OpenVINO graph; it edits nothing that is already there."""

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13

from evaluators.packed import Bytes, Packed, pack

# OpenVINO has no constants of 5 and 7 bits.
WIDTH = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8}
TYPES = {1: ov.Type.u1, 2: ov.Type.u2, 3: ov.Type.u3, 4: ov.Type.u4, 6: ov.Type.u6, 8: ov.Type.u8}


def unpacked(weight: Packed) -> Any:
    """An operation that gives the weight in torch's shape."""
    codes = opset13.convert(_constant(weight.codes, WIDTH[weight.bits]), "i32")
    values = opset13.gather(opset13.constant(weight.table), codes, opset13.constant(np.int32(0)))
    if weight.scales is not None:
        grouped = reshaped(values, (*weight.scales.shape, -1))
        values = opset13.multiply(grouped, opset13.constant(weight.scales[..., None]))
        if weight.offsets is not None:
            values = opset13.add(values, opset13.constant(weight.offsets[..., None]))
    return reshaped(values, weight.shape)


def reshaped(op: Any, shape: tuple[int, ...]) -> Any:
    """The same in another shape; the operation itself, if that is its own."""
    if tuple(op.get_output_shape(0)) == shape:
        return op
    return opset13.reshape(op, opset13.constant(np.array(shape, np.int64)), special_zero=False)


def _constant(codes: Bytes, bits: int) -> Any:
    tensor = ov.Tensor(TYPES[bits], ov.Shape([codes.size]))  # owns its memory: one made from an array would borrow it
    tensor.data[:] = _bytes(codes, bits).view(tensor.data.dtype)
    return opset13.constant(tensor)


def _bytes(codes: Bytes, bits: int) -> Bytes:
    """As OpenVINO's types have them: 3 and 6 bits are in two parts, and single bits fill a byte from its top."""
    if bits == 3:
        return _in_parts(codes, low=2, count=8)
    if bits == 6:
        return _in_parts(codes, low=4, count=4)
    return _from_the_top(codes, bits) if bits == 1 else pack(codes, bits)


def _in_parts(codes: Bytes, low: int, count: int) -> Bytes:
    """Of every `count` codes two bytes with their `low` lowest bits, and one with the others."""
    filled = np.pad(codes, (0, -codes.size % count))
    lowest = _from_the_top(filled % np.uint8(1 << low), low).reshape(-1, 2)
    highest = _from_the_top(filled >> np.uint8(low), 8 // count).reshape(-1, 1)
    return np.concatenate([lowest, highest], axis=1).reshape(-1)


def _from_the_top(codes: Bytes, bits: int) -> Bytes:
    filled = np.pad(codes, (0, -codes.size % (8 // bits)))
    return np.packbits(np.unpackbits(filled[:, None], axis=1)[:, -bits:])
