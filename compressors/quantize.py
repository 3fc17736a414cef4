"""Decides bit-widths and computes low-bit weights; it never touches the model, each runtime places the numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.layers import read_layers
from compressors.pipeline import Applied, Context, LayerNumbers, Stage
from compressors.plan import LayerSpec, Scalar, Settings, Step
from compressors.replace import owners, worst

BITS: Mapping[str, tuple[int, ...]] = dict.fromkeys(("conv", "linear", "embedding"), (2, 3, 4, 6, 8, 32))
"""What can be asked of each kind of layer."""

COMPUTED = {("conv", 8), ("linear", 4), ("linear", 8)}
"""What runtimes have kernels for. At other widths weights are only stored: the file shrinks, and nothing is faster."""

SMALLEST_GROUP = 16

CLIPS = torch.linspace(0.5, 1.0, 26)
"""Shares of a group's largest weight at which clipping is tried."""


@dataclass(frozen=True)
class Quantize:
    """Post-training quantization: 8 bits for weights and activations, or fewer for the weights alone.

    The 8-bit ranges are calibrated by the runtime that will use them. Fewer bits, and 8 of an embedding, are rounded to
    the nearest step group by group; the scales add `32 / group_size` bits a weight. 4 bits of linear layers have a
    kernel, all else is only stored smaller. It does not help a layer that is already narrow: the conversions around it
    can cost more than they save.
    """

    method: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.NUMERIC
    off: ClassVar[tuple[str, Scalar]] = ("bits", 32)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers that hold one weight tensor, or stand in the place of one layer."""
        return owners(model, (layer for layer in read_layers(model, example) if layer.kind in BITS))

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`bits` per layer, and `group_size` for those whose weights alone are rounded; without it, whole rows."""
        layers = {layer.name: layer for layer in read_layers(model, context.example)}
        groups = self.groups(model, context.example)
        achieved: dict[str, Settings] = {}
        numbers: dict[str, LayerNumbers] = {}
        for owner, settings in step.per_layer.items():
            if owner not in groups:
                raise Infeasible(f"quantize has no layer {owner}: possible are {', '.join(groups)}")
            parts = [layers[name] for name in groups[owner]]
            made, achieved[owner] = _together(model, parts, owner, settings["bits"], step.shared)
            numbers.update(made)
        return Applied(achieved, numbers)

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """Rounding errors of the weights alone: what the activations lose is left to the measurements."""
        groups = self.groups(model, example)
        kinds = {layer.name: layer.kind for layer in read_layers(model, example)}
        return [self._effect(model, groups[owner], kinds, settings, fisher) for owner, settings in questions]

    def _effect(
        self, model: nn.Module, members: Sequence[str], kinds: Mapping[str, str], settings: Settings, fisher: Fisher
    ) -> Effect:
        name, bits = f"{members[0]}.weight", int(settings["bits"])
        weight = model.get_parameter(name).detach()
        stored = _is_stored([kinds[member] for member in members], bits)
        try:
            loss = fisher.rounding(name, _rounded(weight, members[0], bits, stored, settings) - weight)
        except Infeasible:
            loss = math.inf
        widths = dict.fromkeys(members, bits)
        return Effect(loss, stored=widths) if stored else Effect(loss, bits=widths)


def _is_stored(kinds: Iterable[str], bits: Scalar) -> bool:
    """Whether the layers of these kinds, which hold one weight, only store it: all do as soon as one of them does."""
    return bits != 32 and any((kind, bits) not in COMPUTED for kind in kinds)


def _rounded(weight: Tensor, name: str, bits: int, stored: bool, settings: Settings) -> Tensor:
    """The float weights that `bits` stand for; 8-bit kernels as the runtimes do it, one scale an output channel."""
    if bits == 32:
        return weight
    rows = weight.flatten(1)
    if bits == 8 and not stored:
        step = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return ((rows / step).round() * step).reshape(weight.shape)
    size = _group_size(name, rows.shape[1], stored, settings)
    return dequantize(*quantize_groups(rows, bits, size)).reshape(weight.shape)


def quantize_groups(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric integers and one scale per `group_size` consecutive inputs of a row.

    `weight` is `(out, in)` and `group_size` divides `in`. Gives int8 values `(out, in)`, from -2^(bits-1) up to
    2^(bits-1) - 1, and scales `(out, in / group_size)`. Each group is clipped where its squared error is least.
    """
    groups = weight.detach().float().reshape(len(weight), -1, group_size)
    top = 2 ** (bits - 1) - 1
    largest = groups.abs().amax(-1)
    scales = torch.where(largest > 0, largest / top, 1.0)
    best = torch.full_like(scales, math.inf)
    chosen = scales
    for clip in CLIPS:
        error = (_round(groups, scales * clip, top) * (scales * clip)[..., None] - groups).square().sum(-1)
        chosen = torch.where(error < best, scales * clip, chosen)
        best = torch.minimum(best, error)
    return _round(groups, chosen, top).flatten(1).to(torch.int8), chosen


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """The float weight `(out, in)` that `values` `(out, in)` and `scales` `(out, groups)` stand for."""
    groups = values.float().reshape(*scales.shape, -1)
    return (groups * scales[..., None]).flatten(1)


def _round(groups: Tensor, scales: Tensor, top: int) -> Tensor:
    return (groups / scales[..., None]).round().clamp(-top - 1, top)


def _together(
    model: nn.Module, parts: Sequence[LayerSpec], owner: str, bits: Scalar, shared: Settings
) -> tuple[dict[str, LayerNumbers], Settings]:
    """What the layers get that share a setting, and of what it came to the worst."""
    made: dict[str, LayerNumbers | None] = {}
    told: list[Settings] = []
    for layer in parts:
        if layer.tied_to is None:
            kinds = [part.kind for part in parts if layer.name in (part.name, part.tied_to)]
            width = _fitting(layer, owner, bits)
            made[layer.name], settings = _layer(model, layer, width, _is_stored(kinds, width), shared)
            told.append(settings)
        else:
            made[layer.name] = made[layer.tied_to]
    return {name: given for name, given in made.items() if given is not None}, worst(told)


def _fitting(layer: LayerSpec, owner: str, bits: Scalar) -> Scalar:
    """Of the layers in the place of `owner`, one that is too narrow for groups of 4 bits gets 8."""
    width = layer.weight_shape[1]
    narrow = layer.kind == "linear" and width & -width < SMALLEST_GROUP
    return 8 if bits == 4 and narrow and layer.name != owner else bits


def _layer(
    model: nn.Module, layer: LayerSpec, bits: Scalar, stored: bool, shared: Settings
) -> tuple[LayerNumbers | None, Settings]:
    if bits not in BITS[layer.kind] or not isinstance(bits, int):
        raise Infeasible(f"quantize.bits of {layer.name} is {bits}: a {layer.kind} layer can have {BITS[layer.kind]}")
    if bits == 32:
        return None, {"bits": bits}
    if bits == 8 and not stored:
        return LayerNumbers(bits=bits), {"bits": bits}
    weight = model.get_parameter(f"{layer.name}.weight").detach()
    return _low_bit(weight, bits, _group_size(layer.name, weight[0].numel(), stored, shared))


def _low_bit(weight: Tensor, bits: int, group_size: int) -> tuple[LayerNumbers, Settings]:
    rows = weight.flatten(1)
    values, scales = quantize_groups(rows, bits, group_size)
    error = float((dequantize(values, scales) - rows).norm() / rows.norm().clamp_min(torch.finfo(torch.float32).tiny))
    return LayerNumbers(bits, values.reshape(weight.shape), scales, group_size), {
        "bits": bits,
        "group_size": group_size,
        "relative_error": error,
    }


def _group_size(name: str, width: int, stored: bool, shared: Settings) -> int:
    """The size asked for, or the largest power of two that divides the row; or the row, if no kernel has a say."""
    asked = shared.get("group_size")
    if stored and asked is None:
        return width
    if not isinstance(asked, int) or asked < SMALLEST_GROUP:
        raise Infeasible(f"quantize.group_size is {asked}: expected a whole number, {SMALLEST_GROUP} or more")
    if width % asked == 0:
        return asked
    divisor = width & -width
    if divisor < SMALLEST_GROUP and stored:
        return width
    if divisor < SMALLEST_GROUP:
        raise Infeasible(
            f"quantize.bits of {name} is 4, but no power of two from {SMALLEST_GROUP} up divides its {width} inputs: "
            "possible are 8 and 32"
        )
    return divisor
