"""In which arithmetic a network is trained: float, or convolutions and matrix products in bfloat16; trains nothing."""

import torch
from torch import nn

from compressors.errors import ConfigError

PRECISIONS = ("auto", "fp32", "bf16")


def check_precision(path: str, precision: str) -> None:
    """Raises `ConfigError` for the option at `path` unless it is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ConfigError(path, f"is {precision!r}", f"use one of {', '.join(PRECISIONS)}")


def in_bf16(precision: str, model: nn.Module) -> bool:
    """Whether to train in bfloat16; `auto` does where that is faster.

    Without AMX's tile registers bfloat16 is emulated, and slower than float. Depthwise convolutions have no kernels for
    tiles, and are so much slower that a network built on them loses more than its other layers gain.
    """
    if precision == "auto":
        return torch.cpu._is_amx_tile_supported() and not _is_depthwise(model)
    return precision == "bf16"


def _is_depthwise(model: nn.Module) -> bool:
    """Whether most of the convolutions that see more than one pixel see one channel only."""
    wide = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    return 2 * sum(1 < m.groups == m.in_channels for m in wide) > len(wide)
