"""What layers were given when the model saw the calibration data, as rows that their weights are multiplied with."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses
from torch.utils.hooks import RemovableHandle

from compressors.errors import Infeasible
from compressors.layers import hooked, weight_path
from compressors.pipeline import Batch
from compressors.plan import digest

EXAMPLES = 256
"""Calibration examples that are looked at."""
ROWS = 4096
"""Of one call of one layer; a convolution multiplies thousands of rows an example."""
LIMIT_BYTES = 512 << 20
"""Of rows that are held at once: for larger models the data is passed through more than once."""


def layer_inputs(
    model: nn.Module, groups: Mapping[str, Sequence[str]], batches: Callable[[], Iterable[Batch]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Owner by owner, `(rows, parts, in)`: what the layers of its group were given, patch by patch.

    `in` is the width of a row of the weight, and a grouped convolution has a part for each of its groups. Which rows
    are taken depends on the owner and the seed, and on no other owner. Raises `Infeasible` where there are none.
    """
    for owners in _portions(model, groups):
        rows: dict[str, list[Tensor]] = {owner: [] for owner in owners}
        with _listening(model, {owner: groups[owner] for owner in owners}, rows, seed):
            _show(model, batches())
        for owner in owners:
            if not rows[owner]:
                raise Infeasible(f"{owner}: no calibration example reaches it")
            yield owner, torch.cat(rows.pop(owner))


def _portions(model: nn.Module, groups: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    portion: list[str] = []
    room = LIMIT_BYTES
    for owner, members in groups.items():
        weight = model.get_parameter(weight_path(model, owner))
        size = 4 * ROWS * len(members) * weight[0].numel() * getattr(model.get_submodule(owner), "groups", 1)
        if portion and size > room:
            yield portion
            portion, room = [], LIMIT_BYTES
        portion.append(owner)
        room -= size
    if portion:
        yield portion


@contextmanager
def _listening(
    model: nn.Module, groups: Mapping[str, Sequence[str]], rows: Mapping[str, list[Tensor]], seed: int
) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    for owner, members in groups.items():
        generator = torch.Generator().manual_seed(int(digest([owner, seed]), 16) % 2**63)
        take = partial(_take, rows[owner], generator)
        handles += [model.get_submodule(name).register_forward_pre_hook(take, with_kwargs=True) for name in members]
    with hooked(handles):
        yield


@torch.no_grad()
def _show(model: nn.Module, batches: Iterable[Batch]) -> None:
    left = EXAMPLES
    for inputs, _ in batches:
        if left <= 0:
            break
        model(*(x[:left] for x in inputs))
        left -= len(inputs[0])


def _take(
    rows: list[Tensor],
    generator: torch.Generator,
    module: nn.Module,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any],
) -> None:
    x = next(iter((*inputs, *named.values()))).detach()
    windows, inner = _windows(module, x) if isinstance(module, nn.Conv1d | nn.Conv2d) else (x, 1)
    places = windows.shape[:-inner]
    quota = min(ROWS, max(1, ROWS * len(x) // EXAMPLES))
    chosen = torch.arange(places.numel())
    if len(chosen) > quota:
        chosen = torch.randperm(len(chosen), generator=generator)[:quota].sort().values
    picked = windows[torch.unravel_index(chosen, places)]
    rows.append(picked.reshape(len(chosen), getattr(module, "groups", 1), -1))


def _windows(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    """A view `(batch, *places, channels, *kernel)`, and how many of its last axes make a row."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode)
    dims = len(module.kernel_size)
    for axis, size, stride, dilation in zip(
        range(2, 2 + dims), module.kernel_size, module.stride, module.dilation, strict=True
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, int(stride))[..., ::dilation]
    return x.movedim(1, 1 + dims), 1 + dims
