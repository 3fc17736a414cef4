"""Decides bit-widths and computes low-bit weights; it never touches the model, each runtime places the numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.inputs import layer_inputs
from compressors.layers import read_layers
from compressors.pipeline import CALIBRATIONS, KERNELS, Applied, Context, LayerNumbers, Stage
from compressors.plan import LayerSpec, Scalar, Settings, Step
from compressors.replace import one_thread, owners, worst
from compressors.rounding import (
    closest_grid,
    closest_scales,
    dequantize,
    descended,
    gptq,
    less_offsets,
    nearest,
    output_error,
    widest_grid,
    widest_scales,
)

BITS: Mapping[str, tuple[int, ...]] = dict.fromkeys(("conv", "linear", "embedding"), (2, 3, 4, 6, 8, 32))
"""What can be asked of each kind of layer."""

ROUNDINGS = ("nearest", "mse", "gptq", "descent")

SMALLEST_GROUP = 16
USUAL_GROUP = 64
"""Of weights alone in 8 bits, where none is asked for."""


@dataclass(frozen=True)
class Quantize:
    """Post-training quantization: 8 bits for weights and activations, or fewer for the weights alone.

    The 8-bit ranges are calibrated by the runtime that will use them, which also rounds 8-bit weights to the nearest
    step. Every other `rounding` is done here. `mse` clips where the weights' squared error is least; that makes the
    layer's output a little smaller, which at few bits can cost more than clipping saves. `gptq` (Frantar 2022, arXiv
    2210.17323) and `descent` (Behdin 2023, arXiv 2309.01885) use the same scales and make the error of the output
    small, on what the float model gives the layer: errors of layers before it are not made good, so that a layer's
    numbers do not depend on other layers' settings. `bias_correction` takes the mean error of the output out of it
    (Nagel 2019, arXiv 1906.04721, with measured means).

    Fewer bits, 8 of an embedding, and with `weights_alone` 8 of linear layers have a scale for each group of weights,
    which adds `32 / group_size` bits a weight. For linear layers of 4 bits, and of 8 `weights_alone`, there are kernels
    that need no calibration, because they round what they are given to 8 bits as it comes: they pay where reading the
    weights is what takes the time, as for one word of a language model. All else is only stored smaller. The rows of an
    embedding are looked up one at a time, so that there is no output to see to beside them: `gptq` and `descent` are
    `mse` there, and no bias is corrected. None of it helps a layer that is already narrow: the conversions around it
    can cost more than they save.

    With `asymmetric`, groups of fewer than 8 bits have an offset too, which takes as many bits again: all integers are
    used then, though few groups reach as far below zero as above it. Zeros among the weights are only nearly zero then.
    ONNX Runtime's kernel takes whole offsets alone; what others add is computed beside it from the sums of what the
    groups multiply, so that one word of a language model took some 15 % longer.
    """

    method: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.NUMERIC
    off: ClassVar[tuple[str, Scalar]] = ("bits", 32)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers that hold one weight tensor, or stand in the place of one layer."""
        return owners(model, (layer for layer in read_layers(model, example) if layer.kind in BITS))

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`bits` per layer; `group_size`, without it whole rows; `rounding` and `bias_correction` for every width.

        `weights_alone` says what 8 bits of linear layers are. `calibration`, `per_channel` and `symmetric` are for the
        runtimes and concern 8 bits, see `LayerNumbers`. Without them a plan means what all runtimes do by themselves,
        and all other weights are rounded as by `mse`. What is told of several layers in the place of one is what it
        came to the worst.
        """
        layers = {layer.name: layer for layer in read_layers(model, context.example)}
        groups = self.groups(model, context.example)
        recipe = _Recipe.read(step.shared)
        asked: dict[str, list[_Weight]] = {}
        for owner, settings in step.per_layer.items():
            if owner not in groups:
                raise Infeasible(f"quantize has no layer {owner}: possible are {', '.join(groups)}")
            parts = [layers[name] for name in groups[owner]]
            asked[owner] = list(_weights(parts, owner, settings["bits"], recipe.weights_alone))
        weights = [weight for several in asked.values() for weight in several]
        told: dict[str, Settings] = {weight.name: {"bits": weight.bits} for weight in weights}
        numbers: dict[str, LayerNumbers] = {}
        grids: list[_Grid] = []
        for weight in weights:
            if recipe.is_the_runtimes(weight):
                numbers.update(dict.fromkeys(weight.layers, recipe.numbers(weight)))
            elif weight.bits != 32:
                grids.append(_Grid.of(model, weight, recipe, step.shared))
        with one_thread():
            for grid, inputs in _with_inputs(model, grids, recipe, context, seed):
                made, told[grid.weight.name] = _made(grid, recipe, inputs)
                numbers.update(dict.fromkeys(grid.weight.layers, made))
        return Applied({o: worst([told[weight.name] for weight in several]) for o, several in asked.items()}, numbers)

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """Rounding errors of the weights alone: what the activations lose is left to the measurements."""
        layers = {layer.name: layer for layer in read_layers(model, example)}
        groups = self.groups(model, example)
        members = {owner: [layers[name] for name in names] for owner, names in groups.items()}
        return [_effect(model, members[owner], owner, settings, fisher) for owner, settings in questions]


@dataclass(frozen=True)
class _Weight:
    """A weight tensor: the layers that hold it, its owner first, and the width it gets."""

    layers: tuple[str, ...]
    kinds: frozenset[str]
    bits: int
    asked_alone: bool

    @property
    def name(self) -> str:
        return self.layers[0]

    @property
    def stored(self) -> bool:
        """Whether its layers only store it: all do as soon as one of them does."""
        return self.bits != 32 and any((kind, self.bits) not in KERNELS for kind in self.kinds)

    @property
    def rounds_inputs(self) -> bool:
        """Whether what it is multiplied with goes to 8 bits by calibrated ranges."""
        return self.bits == 8 and not self.stored and not (self.asked_alone and self.kinds == {"linear"})

    @property
    def looked_up(self) -> bool:
        return "embedding" in self.kinds


def _weights(parts: Sequence[LayerSpec], owner: str, bits: Scalar, alone: bool) -> Iterator[_Weight]:
    """Those of the layers that share a setting."""
    for layer in parts:
        if layer.tied_to is None:
            if bits not in BITS[layer.kind] or not isinstance(bits, int):
                raise Infeasible(
                    f"quantize.bits of {layer.name} is {bits}: a {layer.kind} layer can have {BITS[layer.kind]}"
                )
            holding = [part for part in parts if layer.name in (part.name, part.tied_to)]
            names, kinds = tuple(part.name for part in holding), frozenset(part.kind for part in holding)
            yield _Weight(names, kinds, _fitting(layer, owner, bits), alone)


def _fitting(layer: LayerSpec, owner: str, bits: int) -> int:
    """Of the layers in the place of `owner`, one that is too narrow for groups of 4 bits gets 8."""
    width = layer.weight_shape[1]
    narrow = layer.kind == "linear" and width & -width < SMALLEST_GROUP
    return 8 if bits == 4 and narrow and layer.name != owner else bits


@dataclass(frozen=True)
class _Recipe:
    """The settings that all layers share; `rounding` None is what a plan means that does not name it."""

    calibration: str
    per_channel: bool
    symmetric: bool
    rounding: str | None
    bias_correction: bool
    weights_alone: bool
    asymmetric: bool

    @classmethod
    def read(cls, shared: Settings) -> "_Recipe":
        return cls(
            calibration=_one_of(shared, "calibration", CALIBRATIONS) or CALIBRATIONS[0],
            per_channel=_flag(shared, "per_channel", True),
            symmetric=_flag(shared, "symmetric", False),
            rounding=_one_of(shared, "rounding", ROUNDINGS),
            bias_correction=_flag(shared, "bias_correction", False),
            weights_alone=_flag(shared, "weights_alone", False),
            asymmetric=_flag(shared, "asymmetric", False),
        )

    def rounding_of(self, weight: _Weight) -> str:
        return self.rounding or ("nearest" if weight.rounds_inputs else "mse")

    def is_the_runtimes(self, weight: _Weight) -> bool:
        """Whether the runtime does all of it by itself."""
        return weight.rounds_inputs and self.rounding_of(weight) == "nearest" and not self.bias_correction

    def needs_inputs(self, weight: _Weight) -> bool:
        return not weight.looked_up and (self.bias_correction or self.rounding in ("gptq", "descent"))

    def numbers(self, weight: _Weight) -> LayerNumbers:
        if not weight.rounds_inputs:
            return LayerNumbers(weight.bits)
        return LayerNumbers(
            weight.bits, calibration=self.calibration, per_channel=self.per_channel, symmetric=self.symmetric
        )


def _one_of(shared: Settings, key: str, known: Sequence[str]) -> str | None:
    value = shared.get(key)
    if key in shared and value not in known:
        raise Infeasible(f"quantize.{key} is {value}: expected one of {', '.join(known)}")
    return None if value is None else str(value)


def _flag(shared: Settings, key: str, otherwise: bool) -> bool:
    value = shared.get(key, otherwise)
    if not isinstance(value, bool):
        raise Infeasible(f"quantize.{key} is {value}: expected true or false")
    return value


@dataclass(frozen=True)
class _Grid:
    """Where the numbers of one weight can go: its rows `(out, in)`, their scales and offsets `(out, groups)`."""

    weight: _Weight
    tensor: Tensor
    parts: int
    group_size: int | None
    scales: Tensor
    offsets: Tensor | None = None

    @classmethod
    def of(cls, model: nn.Module, weight: _Weight, recipe: _Recipe, shared: Settings) -> "_Grid":
        module = model.get_submodule(weight.name)
        tensor, parts = module.get_parameter("weight").detach(), getattr(module, "groups", 1)
        rows = tensor.flatten(1)
        if weight.rounds_inputs and not recipe.per_channel:
            return cls(weight, tensor, parts, None, _one_scale(rows, weight, recipe))
        group_size = None if weight.rounds_inputs else _group_size(weight, rows.shape[1], shared)
        near, size = recipe.rounding_of(weight) == "nearest", group_size or rows.shape[1]
        offsets: Tensor | None = None
        if recipe.asymmetric and weight.bits < 8:
            scales, offsets = (widest_grid if near else closest_grid)(rows, weight.bits, size)
        else:
            scales = (widest_scales if near else closest_scales)(rows, weight.bits, size)
        return cls(weight, tensor, parts, group_size, scales, offsets)

    @property
    def rows(self) -> Tensor:
        return self.tensor.flatten(1)

    @property
    def scaled(self) -> Tensor:
        """The part of the rows that values and scales are to hold."""
        return self.rows if self.offsets is None else less_offsets(self.rows, self.offsets)

    def by_part(self, rows: Tensor) -> Tensor:
        """`(parts, out, ...)`."""
        return rows.reshape(self.parts, -1, rows.shape[1])

    def nearest(self) -> Tensor:
        return nearest(self.scaled, self.scales, self.weight.bits)

    def rounded(self, values: Tensor) -> Tensor:
        return dequantize(values, self.scales, self.offsets)


def _one_scale(rows: Tensor, weight: _Weight, recipe: _Recipe) -> Tensor:
    if not recipe.is_the_runtimes(weight):
        raise Infeasible(
            "quantize.per_channel is False, which the runtimes can do with rounding nearest and without bias_correction"
            " only: a batch norm folded into a layer gives every channel a factor of its own"
        )
    return widest_scales(rows.reshape(1, -1), weight.bits, rows.numel()).expand(len(rows), 1)


def _group_size(weight: _Weight, width: int, shared: Settings) -> int:
    """The size asked for, or the largest power of two that divides the row; or the row, if no kernel has a say."""
    asked = shared.get("group_size", USUAL_GROUP if weight.bits == 8 and not weight.stored else None)
    if weight.stored and asked is None:
        return width
    if not isinstance(asked, int) or asked < SMALLEST_GROUP:
        raise Infeasible(f"quantize.group_size is {asked}: expected a whole number, {SMALLEST_GROUP} or more")
    if width % asked == 0:
        return asked
    divisor = width & -width
    if divisor < SMALLEST_GROUP and weight.stored:
        return width
    if divisor < SMALLEST_GROUP:
        raise Infeasible(
            f"quantize.bits of {weight.name} is {weight.bits}, but no power of two from {SMALLEST_GROUP} up divides "
            f"its {width} inputs: possible {'is' if weight.asked_alone else 'are 8 and'} 32"
        )
    return divisor


def _with_inputs(
    model: nn.Module, grids: Sequence[_Grid], recipe: _Recipe, context: Context, seed: int
) -> Iterator[tuple[_Grid, Tensor | None]]:
    heard = {grid.weight.name: grid for grid in grids if recipe.needs_inputs(grid.weight)}
    yield from ((grid, None) for grid in grids if grid.weight.name not in heard)
    if heard:
        groups = {name: grid.weight.layers for name, grid in heard.items()}
        for name, inputs in layer_inputs(model, groups, context.calibration, seed):
            yield heard[name], inputs


def _made(grid: _Grid, recipe: _Recipe, inputs: Tensor | None) -> tuple[LayerNumbers, Settings]:
    values = _values(grid, recipe.rounding_of(grid.weight), inputs)
    rounded = grid.rounded(values)
    lost = grid.rows - rounded
    smallest = torch.finfo(torch.float32).tiny
    achieved: dict[str, Scalar] = {"bits": grid.weight.bits}
    if grid.group_size is not None:
        achieved["group_size"] = grid.group_size
    achieved["relative_error"] = float(lost.norm() / grid.rows.norm().clamp_min(smallest))
    shift = None
    if inputs is not None:
        achieved["output_error"] = output_error(grid.by_part(grid.rows), grid.by_part(rounded), inputs)
    if inputs is not None and recipe.bias_correction:
        shift = torch.einsum("pi,poi->po", inputs.mean(0), grid.by_part(lost)).flatten()
    numbers = replace(
        recipe.numbers(grid.weight),
        values=values.reshape(grid.tensor.shape),
        scales=grid.scales,
        offsets=grid.offsets,
        group_size=grid.group_size,
        shift=shift,
    )
    return numbers, achieved


def _values(grid: _Grid, rounding: str, inputs: Tensor | None) -> Tensor:
    if inputs is None or rounding in ("nearest", "mse"):
        return grid.nearest()
    fit = gptq if rounding == "gptq" else descended
    return fit(grid.by_part(grid.scaled), grid.by_part(grid.scales), grid.weight.bits, inputs).reshape(grid.rows.shape)


def _effect(model: nn.Module, parts: Sequence[LayerSpec], owner: str, settings: Settings, fisher: Fisher) -> Effect:
    try:
        weights = list(_weights(parts, owner, settings["bits"], _Recipe.read(settings).weights_alone))
        loss = sum(_loss(model, weight, settings, fisher) for weight in weights)
    except Infeasible:
        return Effect(math.inf, bits={part.name: int(settings["bits"]) for part in parts})
    stored = {name: weight.bits for weight in weights if weight.stored for name in weight.layers}
    bits = {name: weight.bits for weight in weights if not weight.stored for name in weight.layers}
    return Effect(loss, bits=bits, stored=stored)


def _loss(model: nn.Module, weight: _Weight, settings: Settings, fisher: Fisher) -> float:
    """There is no data here to fit `gptq` and `descent` to: the nearest values on their grid are an upper estimate."""
    recipe = _Recipe.read(settings)
    if weight.bits == 32:
        return 0.0
    grid = _Grid.of(model, weight, recipe, settings)
    change = grid.rounded(grid.nearest()) - grid.rows
    return fisher.rounding(f"{weight.name}.weight", change.reshape(grid.tensor.shape))
