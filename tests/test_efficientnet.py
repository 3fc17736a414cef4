"""EfficientNet-Lite0 as published: its size, and where its convolutions look."""

from typing import cast

import torch
from torch import nn

from compressors.prune import Prune
from search.efficientnet import efficientnet_lite0


def test_it_has_as_many_parameters_as_published() -> None:
    assert sum(x.numel() for x in efficientnet_lite0(classes=0, channels=3).parameters()) == 4_652_008


def test_any_number_of_classes_and_channels() -> None:
    network = efficientnet_lite0(classes=7, channels=1).eval()
    assert network(torch.zeros(2, 1, 64, 96)).shape == (2, 7)


def test_a_stride_of_two_begins_at_the_first_pixel() -> None:
    """As the published weights were trained: what is missing of even sides is added at the right and below."""
    stem = cast(nn.Sequential, efficientnet_lite0(classes=0, channels=1).eval().stem)
    with torch.no_grad():
        at_start, at_end = torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
        at_start[..., 0, 0], at_end[..., 31, 31] = 1.0, 1.0
        touched = [int((stem[:2](x).abs().sum(1) > 0).sum()) for x in (at_start, at_end)]
    # The first pixel is seen by one window; the last one by the one that begins before it, which overhangs.
    assert touched == [1, 1]


def test_what_is_wide_inside_can_be_pruned() -> None:
    network = efficientnet_lite0(classes=5, channels=3).eval()
    groups = Prune().groups(network, (torch.zeros(1, 3, 64, 64),))
    assert {f"blocks.{i}.expand.0" for i in range(2, 5) if i % 2 == 0} & {name for g in groups.values() for name in g}
