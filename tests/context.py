"""What a compressor may look at, made for the small nets: a few random images with the net's own answers as labels."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.pipeline import Batch, Context
from compressors.rounding import closest_scales, nearest
from tests.zoo import images


def make_context(model: nn.Module, count: int = 32, size: int = 16) -> Context:
    """`count` images in batches of `size`; one training pass is `count / size` steps."""
    inputs = images(count, seed=1)
    with torch.no_grad():
        labels = model(inputs).argmax(1)

    def batches(order: torch.Tensor) -> Iterator[Batch]:
        for rows in torch.split(order, size):
            yield (inputs[rows],), labels[rows]

    return Context(
        teacher=model,
        example=(inputs[:2],),
        train=lambda: batches(torch.randperm(count)),
        calibration=lambda: batches(torch.arange(count)),
        loss=F.cross_entropy,
    )


def quantize_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Values and scales, each group clipped where its squared error is least."""
    scales = closest_scales(weight, bits, group_size)
    return nearest(weight, scales, bits), scales
