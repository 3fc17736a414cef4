"""Puts weights on a grid of few integers: which scale, and which way to round; it knows no model."""

import math

import torch
from torch import Tensor

CLIPS = torch.linspace(0.5, 1.0, 26)
"""Shares of a group's largest weight at which clipping is tried."""
DAMPING = 0.01
"""Added to the diagonal of the inputs' second moments, as a share of its mean: there are never enough inputs."""
BLOCK = 128
"""Columns that are rounded before the columns behind them hear of it: one large product instead of many small ones."""
SWEEPS = 4
"""How often coordinate descent comes by every weight; hardly any moves after that."""


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest integer; both sides alike at 8 bits, so that a channel's sign can be turned."""
    top = 2 ** (bits - 1) - 1
    return (-top if bits == 8 else -top - 1), top


def widest_scales(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """One scale `(out, in / group_size)` a group, at which its largest weight is the largest integer."""
    largest = _groups(weight, group_size).abs().amax(-1)
    return torch.where(largest > 0, largest / limits(bits)[1], 1.0)


def closest_scales(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """One scale `(out, in / group_size)` a group, clipped where the squared error of its weights is least."""
    groups, widest = _groups(weight, group_size), widest_scales(weight, bits, group_size)
    best, chosen = torch.full_like(widest, math.inf), widest
    for clip in CLIPS:
        scales = (widest * clip)[..., None]
        error = (_nearest(groups, scales, bits) * scales - groups).square().sum(-1)
        chosen = torch.where(error < best, widest * clip, chosen)
        best = torch.minimum(best, error)
    return chosen


def widest_grid(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets `(out, in / group_size)`: a group's weights lie between the least and the largest integer."""
    groups = _groups(weight, group_size)
    return _between(groups.amin(-1), groups.amax(-1), bits)


def closest_grid(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """As `widest_grid`, clipped alike at both ends where the squared error of a group's weights is least."""
    groups = _groups(weight, group_size)
    middle, half = (groups.amax(-1) + groups.amin(-1)) / 2, (groups.amax(-1) - groups.amin(-1)) / 2
    scales, offsets = widest_grid(weight, bits, group_size)
    best = _lost(groups, scales, offsets, bits)
    for clip in CLIPS[:-1]:
        clipped = _between(middle - clip * half, middle + clip * half, bits)
        lost = _lost(groups, *clipped, bits)
        # What was rounded before loses nothing unclipped, and only rounding errors could find it better clipped.
        better = lost < 0.999 * best
        scales, offsets = (torch.where(better, new, old) for new, old in zip(clipped, (scales, offsets), strict=True))
        best = torch.where(better, lost, best)
    return scales, offsets


def _lost(groups: Tensor, scales: Tensor, offsets: Tensor, bits: int) -> Tensor:
    steps, zeros = scales[..., None], offsets[..., None]
    return (_nearest(groups - zeros, steps, bits) * steps + zeros - groups).square().sum(-1)


def _between(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    least, most = limits(bits)
    scales = torch.where(high > low, (high - low) / (most - least), 1.0)
    return scales, low - least * scales


def nearest(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Int8 values `(out, in)` next to a weight `(out, in)`, given scales `(out, groups)`."""
    groups = _groups(weight, weight.shape[1] // scales.shape[1])
    return _nearest(groups, scales[..., None], bits).flatten(1).to(torch.int8)


def dequantize(values: Tensor, scales: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The float weight `(out, in)` that `values` `(out, in)`, `scales` and `offsets` `(out, groups)` stand for."""
    groups = values.float().reshape(*scales.shape, -1) * scales[..., None]
    return (groups if offsets is None else groups + offsets[..., None]).flatten(1)


def less_offsets(weight: Tensor, offsets: Tensor) -> Tensor:
    """What scales are to hold of a weight `(out, in)`, given offsets `(out, groups)`."""
    return (weight.detach().float().reshape(*offsets.shape, -1) - offsets[..., None]).flatten(1)


def gptq(weight: Tensor, scales: Tensor, bits: int, inputs: Tensor) -> Tensor:
    """Int8 values `(parts, out, in)` with a small error of the layer's output (Frantar 2022, arXiv 2210.17323).

    `weight` is `(parts, out, in)`, `scales` `(parts, out, groups)` and `inputs` `(rows, parts, in)`: a grouped
    convolution has a part for each of its groups. Input by input weights are rounded, and those not yet rounded take
    up the error. Inputs come in the order of their energy; the scales stay where they are, unlike in the paper, so
    that neither the order nor the errors move them. Weights that are zero stay zero, as something may have held them
    there. No better than rounding to the nearest where inputs are not correlated.
    """
    moments = _moments(inputs)
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    left = _columns(weight.double(), order)
    steps = _columns(_spread(scales, weight.shape[2]), order)
    free = left != 0
    factor = _inverse_factor(moments, order)
    values = torch.empty_like(left)
    for start in range(0, weight.shape[2], BLOCK):
        end = min(start + BLOCK, weight.shape[2])
        errors = []
        for i in range(start, end):
            values[..., i] = _nearest(left[..., i], steps[..., i], bits) * free[..., i]
            error = (left[..., i] - values[..., i] * steps[..., i]) / factor[:, i, i, None]
            left[..., i:end] -= error[..., None] * factor[:, None, i, i:end]
            errors.append(error)
        left[..., end:] -= torch.stack(errors, -1) @ factor[:, start:end, end:]
    return _columns(values, order.argsort(dim=1)).to(torch.int8)


def descended(weight: Tensor, scales: Tensor, bits: int, inputs: Tensor) -> Tensor:
    """Int8 values as `gptq` gives them, improved one input at a time (Behdin 2023, arXiv 2309.01885).

    The error of the layer's output is the one that AdaRound learns to round for (Nagel 2020, arXiv 2004.10568); here
    each weight goes where that error is least while the others stay, so that it never rises, and nothing needs a
    learning rate. It takes `SWEEPS` times as long as `gptq`.
    """
    moments, steps = _moments(inputs), _spread(scales, weight.shape[2])
    values = gptq(weight, scales, bits, inputs).double()
    pull = (weight.double() - values * steps) @ moments
    curvature = moments.diagonal(dim1=1, dim2=2)
    for start in list(range(0, weight.shape[2], BLOCK)) * SWEEPS:
        block = slice(start, min(start + BLOCK, weight.shape[2]))
        before = values[..., block].clone()
        for i in range(block.start, block.stop):
            wanted = values[..., i] * steps[..., i] + pull[..., i] / curvature[:, i, None]
            moved = _nearest(wanted, steps[..., i], bits) * (weight[..., i] != 0)
            change = (moved - values[..., i]) * steps[..., i]
            pull[..., block] -= change[..., None] * moments[:, None, i, block]
            values[..., i] = moved
        changes = (values[..., block] - before) * steps[..., block]
        pull[..., : block.start] -= changes @ moments[:, block, : block.start]
        pull[..., block.stop :] -= changes @ moments[:, block, block.stop :]
    return values.to(torch.int8)


def output_error(weight: Tensor, rounded: Tensor, inputs: Tensor) -> float:
    """The norm of what the output is off by, as a share of the output's; shapes as for `gptq`."""
    expected = torch.einsum("npi,poi->npo", inputs, weight)
    error = torch.einsum("npi,poi->npo", inputs, rounded - weight)
    return float(error.norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _groups(weight: Tensor, group_size: int) -> Tensor:
    return weight.detach().float().reshape(len(weight), -1, group_size)


def _nearest(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    return (weight / scales).round().clamp(*limits(bits))


def _spread(scales: Tensor, width: int) -> Tensor:
    """One scale an input."""
    return scales.double().repeat_interleave(width // scales.shape[-1], -1)


def _columns(weight: Tensor, order: Tensor) -> Tensor:
    return weight.gather(2, order[:, None].expand_as(weight))


def _moments(inputs: Tensor) -> Tensor:
    """`(parts, in, in)`, positive definite."""
    rows = inputs.double().transpose(0, 1)
    moments = rows.transpose(1, 2) @ rows / max(1, rows.shape[1])
    damping = DAMPING * moments.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(moments.shape[1], dtype=torch.float64)
    # Where no input was ever anything but zero, any rounding will do.
    return moments + torch.where(damping > 0, damping, 1.0)[:, None, None] * eye


def _inverse_factor(moments: Tensor, order: Tensor) -> Tensor:
    """The upper factor of the inverse, rows and columns in `order`."""
    moments = _columns(moments, order).transpose(1, 2)
    moments = _columns(moments, order)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
