"""Decides bit-widths and computes low-bit weights; it never touches the model, each runtime places the numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import Infeasible
from compressors.fisher import Effect, Fisher, Question
from compressors.inputs import layer_inputs
from compressors.layers import read_layers
from compressors.pipeline import CALIBRATIONS, Applied, Context, LayerNumbers, Stage
from compressors.plan import LayerSpec, Scalar, Settings, Step
from compressors.rounding import closest_scales, dequantize, descended, gptq, nearest, output_error, widest_scales

BITS: Mapping[str, tuple[int, ...]] = {"conv": (8, 32), "linear": (4, 8, 32)}
"""What can be asked of each kind of layer."""

ROUNDINGS = ("nearest", "mse", "gptq", "descent")

SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Quantize:
    """Post-training quantization: 8 bits for weights and activations, or 4 bits for the weights of linear layers.

    The 8-bit ranges are calibrated by the runtime that will use them, which also rounds 8-bit weights to the nearest
    step. Every other `rounding` is done here. `mse` clips where the weights' squared error is least; that makes the
    layer's output a little smaller, which at few bits can cost more than clipping saves. `gptq` (Frantar 2022, arXiv
    2210.17323) and `descent` (Behdin 2023, arXiv 2309.01885) use the same scales and make the error of the output
    small, on what the float model gives the layer: errors of layers before it are not made good, so that a layer's
    numbers do not depend on other layers' settings. `bias_correction` takes the mean error of the output out of it
    (Nagel 2019, arXiv 1906.04721, with measured means). The 4-bit scales add `32 / group_size` bits a weight. None of
    it helps a layer that is already narrow: the conversions around it can cost more than they save.
    """

    method: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = Stage.NUMERIC
    off: ClassVar[tuple[str, Scalar]] = ("bits", 32)

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the conv and linear layers that hold one weight tensor, which is stored once."""
        layers = [layer for layer in read_layers(model, example) if layer.kind in BITS]
        owners = [layer.name for layer in layers if layer.tied_to is None]
        return {o: (o, *(layer.name for layer in layers if layer.tied_to == o)) for o in owners}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`bits` per layer, and `group_size` for those with 4; `rounding` and `bias_correction` for both widths.

        `calibration`, `per_channel` and `symmetric` are for the runtimes and concern 8 bits, see `LayerNumbers`.
        Without them a plan means what all runtimes do by themselves, and 4 bits are rounded as by `mse`.
        """
        layers = {layer.name: layer for layer in read_layers(model, context.example)}
        groups = self.groups(model, context.example)
        recipe = _Recipe.read(step.shared)
        achieved: dict[str, Settings] = {}
        numbers: dict[str, LayerNumbers] = {}
        grids: dict[str, _Grid] = {}
        for owner, settings in step.per_layer.items():
            if owner not in groups:
                raise Infeasible(f"quantize has no layer {owner}: possible are {', '.join(groups)}")
            bits = _bits(layers[owner], settings["bits"])
            achieved[owner] = {"bits": bits}
            if bits != 32:
                grid = _Grid.of(model, owner, bits, recipe, step.shared)
                if recipe.is_the_runtimes(bits):
                    numbers.update(dict.fromkeys(groups[owner], recipe.numbers(bits)))
                else:
                    grids[owner] = grid
        given: Iterable[tuple[str, Tensor | None]] = ((owner, None) for owner in grids)
        if any(recipe.needs_inputs(grid.bits) for grid in grids.values()):
            given = layer_inputs(model, {owner: groups[owner] for owner in grids}, context.calibration, seed)
        for owner, inputs in given:
            made, achieved[owner] = _made(grids[owner], recipe, inputs)
            numbers.update(dict.fromkeys(groups[owner], made))
        return Applied(achieved, numbers)

    def effects(
        self, model: nn.Module, example: tuple[Tensor, ...], questions: Sequence[Question], fisher: Fisher
    ) -> list[Effect]:
        """Rounding errors of the weights alone: what the activations lose is left to the measurements."""
        groups = self.groups(model, example)
        return [self._effect(model, groups[owner], owner, settings, fisher) for owner, settings in questions]

    def _effect(
        self, model: nn.Module, members: Sequence[str], owner: str, settings: Settings, fisher: Fisher
    ) -> Effect:
        bits = int(settings["bits"])
        if bits == 32:
            return Effect(0.0, bits=dict.fromkeys(members, bits))
        try:
            grid = _Grid.of(model, owner, bits, _Recipe.read(settings), settings)
        except Infeasible:
            return Effect(math.inf, bits=dict.fromkeys(members, bits))
        # There is no data here to fit `gptq` and `descent` to: the nearest values on their grid are an upper estimate.
        rounded = dequantize(nearest(grid.rows, grid.scales, bits), grid.scales)
        loss = fisher.rounding(f"{owner}.weight", (rounded - grid.rows).reshape(grid.weight.shape))
        return Effect(loss, bits=dict.fromkeys(members, bits))


@dataclass(frozen=True)
class _Recipe:
    """The settings that all layers share; `rounding` None is what a plan means that does not name it."""

    calibration: str
    per_channel: bool
    symmetric: bool
    rounding: str | None
    bias_correction: bool

    @classmethod
    def read(cls, shared: Settings) -> "_Recipe":
        return cls(
            calibration=_one_of(shared, "calibration", CALIBRATIONS) or CALIBRATIONS[0],
            per_channel=_flag(shared, "per_channel", True),
            symmetric=_flag(shared, "symmetric", False),
            rounding=_one_of(shared, "rounding", ROUNDINGS),
            bias_correction=_flag(shared, "bias_correction", False),
        )

    def rounding_at(self, bits: int) -> str:
        return self.rounding or ("nearest" if bits == 8 else "mse")

    def is_the_runtimes(self, bits: int) -> bool:
        """Whether the runtime does all of it by itself."""
        return bits == 8 and self.rounding_at(bits) == "nearest" and not self.bias_correction

    def needs_inputs(self, bits: int) -> bool:
        return self.bias_correction or self.rounding_at(bits) in ("gptq", "descent")

    def numbers(self, bits: int) -> LayerNumbers:
        if bits != 8:
            return LayerNumbers(bits)
        return LayerNumbers(bits, calibration=self.calibration, per_channel=self.per_channel, symmetric=self.symmetric)


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


def _bits(layer: LayerSpec, bits: Scalar) -> int:
    if bits not in BITS[layer.kind] or not isinstance(bits, int):
        raise Infeasible(f"quantize.bits of {layer.name} is {bits}: a {layer.kind} layer can have {BITS[layer.kind]}")
    return bits


@dataclass(frozen=True)
class _Grid:
    """Where the weights of one layer can go: its rows `(out, in)` and their scales `(out, groups)`."""

    weight: Tensor
    parts: int
    bits: int
    group_size: int | None
    scales: Tensor

    @classmethod
    def of(cls, model: nn.Module, name: str, bits: int, recipe: _Recipe, shared: Settings) -> "_Grid":
        module = model.get_submodule(name)
        weight = module.get_parameter("weight").detach()
        rows = weight.flatten(1)
        scales = widest_scales if recipe.rounding_at(bits) == "nearest" else closest_scales
        group_size = _group_size(name, rows.shape[1], shared) if bits == 4 else None
        if bits == 8 and not recipe.per_channel:
            return cls(weight, 1, bits, None, _one_scale(rows, recipe))
        found = scales(rows, bits, group_size or rows.shape[1])
        return cls(weight, getattr(module, "groups", 1), bits, group_size, found)

    @property
    def rows(self) -> Tensor:
        return self.weight.flatten(1)

    def by_part(self, rows: Tensor) -> Tensor:
        """`(parts, out, ...)`."""
        return rows.reshape(self.parts, -1, rows.shape[1])


def _one_scale(rows: Tensor, recipe: _Recipe) -> Tensor:
    if not recipe.is_the_runtimes(8):
        raise Infeasible(
            "quantize.per_channel is False, which the runtimes can do with rounding nearest and without bias_correction"
            " only: a batch norm folded into a layer gives every channel a factor of its own"
        )
    return widest_scales(rows.reshape(1, -1), 8, rows.numel()).expand(len(rows), 1)


def _made(grid: _Grid, recipe: _Recipe, inputs: Tensor | None) -> tuple[LayerNumbers, Settings]:
    values = _values(grid, recipe.rounding_at(grid.bits), inputs)
    rounded = dequantize(values, grid.scales)
    lost = grid.rows - rounded
    smallest = torch.finfo(torch.float32).tiny
    achieved: dict[str, Scalar] = {"bits": grid.bits}
    if grid.group_size is not None:
        achieved["group_size"] = grid.group_size
    achieved["relative_error"] = float(lost.norm() / grid.rows.norm().clamp_min(smallest))
    shift = None
    if inputs is not None:
        achieved["output_error"] = output_error(grid.by_part(grid.rows), grid.by_part(rounded), inputs)
    if inputs is not None and recipe.bias_correction:
        shift = torch.einsum("pi,poi->po", inputs.mean(0), grid.by_part(lost)).flatten()
    numbers = replace(
        recipe.numbers(grid.bits),
        values=values.reshape(grid.weight.shape),
        scales=grid.scales,
        group_size=grid.group_size,
        shift=shift,
    )
    return numbers, achieved


def _values(grid: _Grid, rounding: str, inputs: Tensor | None) -> Tensor:
    if inputs is None or rounding in ("nearest", "mse"):
        return nearest(grid.rows, grid.scales, grid.bits)
    fit = gptq if rounding == "gptq" else descended
    return fit(grid.by_part(grid.rows), grid.by_part(grid.scales), grid.bits, inputs).reshape(grid.rows.shape)


def _group_size(name: str, width: int, shared: Settings) -> int:
    """The size asked for, or the largest power of two that divides the row."""
    asked = shared.get("group_size")
    if not isinstance(asked, int) or asked < SMALLEST_GROUP:
        raise Infeasible(f"quantize.group_size is {asked}: expected a whole number, {SMALLEST_GROUP} or more")
    if width % asked == 0:
        return asked
    divisor = width & -width
    if divisor < SMALLEST_GROUP:
        raise Infeasible(
            f"quantize.bits of {name} is 4, but no power of two from {SMALLEST_GROUP} up divides its {width} inputs: "
            "possible are 8 and 32"
        )
    return divisor
