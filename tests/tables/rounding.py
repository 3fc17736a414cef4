"""Measures every point of a small space on a real network, so that its front is known.

ResNet-20 on the digits; the weights of six parts of it are rounded to 2, 3, 4 or 8 bits, the float graph stays. The
loss is the mean KL divergence from the uncompressed network's answers on 128 validation images. Ten minutes with
`python -m tests.tables.rounding`.
"""

import copy
import itertools
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.fisher import diagonal_fisher
from compressors.layers import read_layers
from compressors.rounding import closest_scales, dequantize, nearest
from search import build

BITS = (2, 3, 4, 8)
PARTS = (
    ("stem", "layer1"),
    ("layer2.0",),
    ("layer2.1", "layer2.2"),
    ("layer3.0",),
    ("layer3.1",),
    ("layer3.2", "head"),
)
FILE = Path(__file__).with_suffix(".json")


def main() -> None:
    """Write the table beside this file."""
    torch.set_grad_enabled(False)
    config = build.compose([])
    workload = build.build_workload(config, Path(config.cache), lambda _progress: None)
    layers = read_layers(workload.model, workload.example)
    parts = [[layer for layer in layers if layer.name.startswith(part)] for part in PARTS]
    with torch.enable_grad():
        fisher = diagonal_fisher(workload.model, workload.splits.calibration.batches(32), 32)
    names = [layer.name for layer in layers]
    rounded = {(name, bits): _rounded(workload.model, name, bits) for name in names for bits in BITS}
    effects = [
        {
            b: sum(
                fisher.rounding(f"{layer.name}.weight", rounded[layer.name, b] - _weight(workload.model, layer.name))
                for layer in part
            )
            for b in BITS
        }
        for part in parts
    ]
    inputs = next(workload.splits.validation.batches(128))[0]
    wanted = F.log_softmax(workload.model(*inputs), -1)
    model, points = copy.deepcopy(workload.model), {}
    for row in itertools.product(BITS, repeat=len(parts)):
        for part, bits in zip(parts, row, strict=True):
            for layer in part:
                _weight(model, layer.name).copy_(rounded[layer.name, bits])
        answers = F.log_softmax(model(*inputs), -1)
        points["".join(map(str, row))] = float(
            f"{F.kl_div(answers, wanted, log_target=True, reduction='batchmean'):.6g}"
        )
    table = {"params": [sum(layer.params for layer in part) for part in parts], "effects": effects, "loss": points}
    FILE.write_text(json.dumps(table, indent=0))


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_parameter(f"{name}.weight").data


def _rounded(model: nn.Module, name: str, bits: int) -> torch.Tensor:
    weight = _weight(model, name)
    rows = weight.flatten(1)
    scales = closest_scales(rows, bits, rows.shape[1])
    return dequantize(nearest(rows, scales, bits), scales).reshape(weight.shape)


if __name__ == "__main__":
    main()
