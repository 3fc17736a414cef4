"""A small task that small nets can learn: noisy pictures of five fixed patterns."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from compressors.pipeline import Batch, Context
from tests.zoo import CLASSES, build, images


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures of five fixed patterns, in turn."""
    labels = torch.arange(count) % CLASSES
    return images(CLASSES, seed=9)[labels] + images(count, seed), labels


def pass_over_patterns() -> Iterator[Batch]:
    """320 of them, shuffled, in batches of 32."""
    inputs, labels = patterns(320, seed=1)
    for rows in torch.split(torch.randperm(len(inputs)), 32):
        yield (inputs[rows],), labels[rows]


def accuracy(model: nn.Module) -> float:
    """On 500 that no pass shows."""
    inputs, labels = patterns(500, seed=2)
    return float((model(inputs).argmax(1) == labels).float().mean())


def taught(net: str) -> nn.Module:
    """A net after eight passes."""
    model = build(net).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for (inputs,), labels in (batch for _ in range(8) for batch in pass_over_patterns()):
            assert labels is not None
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]  # torch's gap
            optimizer.step()
    return model.eval()


def patterns_context(teacher: nn.Module) -> Context:
    """What a compressor may look at; calibration always shows the same 256."""
    inputs, labels = patterns(256, seed=3)
    batches = [((inputs[i : i + 32],), labels[i : i + 32]) for i in range(0, 256, 32)]
    return Context(teacher, (images(),), pass_over_patterns, lambda: batches, F.cross_entropy)
