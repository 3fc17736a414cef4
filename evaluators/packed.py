"""Weights that are only stored smaller: what a file holds of them, and their codes as bytes; knows no runtime.

No kernel computes with them. A runtime puts them into its graph with the operators that unpack them, and when it loads
the file it folds these into an ordinary float weight: latency and memory are those of the rest precision. Loading takes
longer, and in ONNX Runtime up to three times the memory that float weights take.
"""

from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from compressors.pipeline import LayerNumbers

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

WIDTHS = range(1, 9)
"""Bits that a code can have."""


@dataclass(frozen=True)
class Packed:
    """The weight `table[codes]`, of which groups within rows are multiplied with `scales` and moved by `offsets`.

    Both are `(out, groups)`. `codes` has an entry for each of the weight, below `2 ** bits`; `shape` is torch's. Layers
    that share a weight have the `name` of its owner in common, so that it is stored once.
    """

    name: str
    bits: int
    codes: Bytes
    table: Floats
    scales: Floats | None
    shape: tuple[int, ...]
    offsets: Floats | None = None


def packed(name: str, numbers: LayerNumbers, factors: Floats | None = None) -> Packed:
    """What a compressor decided, in the form in which it is stored; output channels are multiplied with `factors`."""
    if numbers.values is None:
        raise ValueError(f"{name}: there is nothing to store without values")
    values, bits = numbers.values.numpy(), numbers.bits
    scales = None if numbers.scales is None else numbers.scales.numpy().astype(np.float32)
    offsets = None if numbers.offsets is None else numbers.offsets.numpy().astype(np.float32)
    if numbers.codebook is None:
        least = -(2 ** (bits - 1))
        table = np.arange(least, -least, dtype=np.float32)
        codes = (values.astype(np.int16) - least).astype(np.uint8)
    else:
        table, codes = numbers.codebook.numpy().astype(np.float32), values.astype(np.uint8)
    if factors is not None:
        scales = factors[:, None] * (np.float32(1) if scales is None else scales)
        offsets = None if offsets is None else factors[:, None] * offsets
    return Packed(name, bits, codes.reshape(-1), table, scales, values.shape, offsets)


def word(bits: int) -> tuple[int, int]:
    """The fewest bytes that hold a whole number of codes, and that number."""
    common = gcd(bits, 8)
    return bits // common, 8 // common


def pack(codes: Bytes, bits: int) -> Bytes:
    """One code behind the other, the first in the lowest bits of the first byte, filled up with 0 to whole words."""
    filled = np.pad(codes.reshape(-1), (0, -codes.size % word(bits)[1]))
    return np.packbits(np.unpackbits(filled[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(data: Bytes, bits: int, count: int) -> Bytes:
    """The first `count` codes."""
    every = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(every, axis=1, bitorder="little")[:, 0]
