"""What a compressor may look at, for the small nets and for workloads, and the methods that all kinds of model take."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.cluster import Cluster
from compressors.depth import Depth
from compressors.distill import Distill
from compressors.heads import Heads
from compressors.lowrank import LowRank
from compressors.pipeline import Batch, Compressor, Context
from compressors.prune import Prune
from compressors.quantize import Quantize
from compressors.rounding import closest_scales, nearest
from search.workload import Splits, Task
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


METHODS: dict[str, Compressor] = {
    "depth": Depth(),
    "heads": Heads(),
    "prune": Prune(),
    "lowrank": LowRank(),
    "distill": Distill(
        weight_decay=0.0, warmup=0.1, clip_norm=1.0, epoch_examples=256, first_round=2, precision="fp32", parent=None
    ),
    "quantize": Quantize(),
    "cluster": Cluster(examples=8),
}


def workload_context(model: nn.Module, data: Splits, task: Task) -> Context:
    """What a trial would be given of this data, in batches of 32."""
    return Context(
        teacher=model,
        example=tuple(x[:2] for x in data.calibration.inputs),
        train=lambda: data.train.batches(32, shuffle=True),
        calibration=lambda: data.calibration.batches(32),
        loss=task.loss,
        imitation=task.imitation,
    )


def quantize_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Values and scales, each group clipped where its squared error is least."""
    scales = closest_scales(weight, bits, group_size)
    return nearest(weight, scales, bits), scales
