"""Scales channels so that linear layers are easier to round; it rounds nothing, and the model answers as before."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import torch
from torch import Tensor, nn

from compressors.errors import Infeasible, at_least
from compressors.inputs import layer_inputs
from compressors.masks import finish
from compressors.pipeline import Applied, Context, Stage
from compressors.plan import Scalar, Settings, Step
from compressors.replace import one_thread
from compressors.rounding import closest_scales, dequantize, limits, nearest
from compressors.scaling import Place, fronts, insert, places, rescale

FORMS = ("smoothquant", "awq")
LEAST = 1e-3
"""Of the largest channel: what counts as less may show more of itself later, and would then have been blown up."""
TRIED = 10
"""Steps in which awq goes from no migration to the one that is asked for."""
ROWS = 1024
"""Of what calibration showed, on which awq compares them."""
SMALLEST_GROUP = 16
GRID = limits(8)[1]


@dataclass(frozen=True)
class Smooth:
    """What feeds linear layers is divided by a factor for each channel, and their columns are multiplied by it.

    Few channels of a transformer are far larger than the rest, and a grid that reaches them is too coarse for the
    others. With m the `migration`, the factor of channel j is, but for one that all channels share:

    - `smoothquant`, for 8 bits of weights and activations: max|x_j|^m / max|w_j|^(1 - m) (Xiao 2022, arXiv 2211.10438).
    - `awq`, for few bits of the weights alone: mean|x_j|^e, so that weights which meet large inputs are rounded more
      finely (Lin 2023, arXiv 2306.00978). The exponent e, up to m, is the one with the least error of the layers'
      output on calibration data, their weights being rounded to `bits` with a scale for every `group_size` of them.

    Without `everywhere` it only goes where `compressors.scaling` finds that nothing else changes: between a norm or a
    linear layer and the linear layers that alone read it. So it does not help a network that adds the norm's output to
    something else, as the blocks of BERT do (there, only values and what they are projected by have a place). With
    `everywhere` a multiplication goes before every linear layer, which takes a little time; layers that are given the
    same share one. Neither helps a network of convolutions, nor one in which no channel stands out; there `smoothquant`
    only makes few bits of weights lose more.

    It changes weights without training them, and so comes behind all that trains, but for qat: that chooses the grid on
    which the weights will lie, and scaling would take them off it. No prediction tells what it gains; the sampler
    learns that from trials.
    """

    bits: int = 4
    group_size: int = 64
    everywhere: bool = False

    method: ClassVar[str] = "smooth"
    stage: ClassVar[Stage] = Stage.RECOVER
    off: ClassVar[tuple[str, Scalar]] = ("migration", 0.0)

    def __post_init__(self) -> None:
        """Refuses grids that there are not."""
        at_least(2, **{"compressor.smooth.bits": self.bits})
        at_least(1, **{"compressor.smooth.group_size": self.group_size})

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """What feeds -> itself and the layers that read it; with `everywhere`, layers given the same, by the first."""
        if self.everywhere:
            return fronts(model, example)
        return {name: (name, *place.readers) for name, place in places(model, example).items()}

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """`migration` per place, `form` for all; `spread` is how far apart the factors lie."""
        form = _form(step.shared)
        # Factors are for the weights that stay, and scaled ones would be chosen otherwise.
        finish(model)
        known = self._known(model, step, context.example)
        asked = {name: _migration(known, name, settings) for name, settings in step.per_layer.items()}
        scaled = {known[name].readers[0]: name for name, migration in asked.items() if migration > 0}
        weights = {name: _weight(model, name, known[name]) for name in scaled.values()}
        achieved: dict[str, Settings] = {name: {"migration": 0.0} for name in asked}
        factors: dict[str, Tensor] = {}
        with one_thread():
            for reader, rows in layer_inputs(model, {r: (r,) for r in scaled}, context.calibration, seed):
                name = scaled[reader]
                exponent, factors[name] = self._factors(form, rows.flatten(1), weights[name], asked[name])
                spread = float(factors[name].max() / factors[name].min())
                achieved[name] = {"migration": exponent, "spread": spread}
        # Only now, so that no place sees what was done to another.
        for name, found in factors.items():
            rescale(model, known[name], found)
        return Applied(achieved)

    def insert(self, model: nn.Module, step: Step, example: tuple[Tensor, ...]) -> None:
        """With `everywhere`, put in the factors that the step is about; all are 1."""
        self._known(model, step, example)

    def _known(self, model: nn.Module, step: Step, example: tuple[Tensor, ...]) -> dict[str, Place]:
        """The places that there are; with `everywhere`, those of the step are made."""
        if not self.everywhere:
            return places(model, example)
        asked = {name for name, settings in step.per_layer.items() if settings["migration"]}
        return {
            name: insert(model, alike) if name in asked else Place(name, alike)
            for name, alike in fronts(model, example).items()
        }

    def _factors(self, form: str, rows: Tensor, weight: Tensor, migration: float) -> tuple[float, Tensor]:
        """The exponent that was taken, and the factors."""
        if form == "smoothquant":
            return migration, balanced(rows, weight, migration)
        return searched(rows, weight, migration, self.bits, self.group_size)


def balanced(rows: Tensor, weight: Tensor, migration: float) -> Tensor:
    """SmoothQuant's factors `(in,)` of inputs `(rows, in)` and all weights `(out, in)` that they meet."""
    inputs, columns = (_shares(values.abs().amax(0)) for values in (rows, weight))
    return inputs**migration / columns ** (1 - migration)


def searched(rows: Tensor, weight: Tensor, most: float, bits: int, group_size: int) -> tuple[float, Tensor]:
    """AWQ's exponent, from 0 to `most`, and its factors `(in,)`; shapes as for `balanced`."""
    shares = _shares(rows.abs().mean(0))
    shown = rows[:: max(1, len(rows) // ROWS)]
    # What does not divide a row is brought down to what does; or is the row, before it comes to a few weights.
    fitting = gcd(group_size, weight.shape[1])
    size = fitting if fitting >= SMALLEST_GROUP else weight.shape[1]
    exponents = [most * i / TRIED for i in range(TRIED + 1)]
    best = min(exponents, key=lambda exponent: _lost(shown, weight, shares**exponent, bits, size))
    return best, shares**best


def _lost(rows: Tensor, weight: Tensor, factors: Tensor, bits: int, group_size: int) -> float:
    """The squared error of the output when the weight is rounded under these factors."""
    scaled = weight * factors
    scales = closest_scales(scaled, bits, group_size)
    lost = dequantize(nearest(scaled, scales, bits), scales) / factors - weight
    return float((rows @ lost.T).square().sum())


def _shares(sizes: Tensor) -> Tensor:
    largest = sizes.max()
    return (sizes / largest).clamp_min(LEAST) if largest > 0 else torch.ones_like(sizes)


def _weight(model: nn.Module, name: str, place: Place) -> Tensor:
    """All that the place's inputs are multiplied with `(out, in)`."""
    weights: dict[str, Tensor] = {}
    for reader in place.readers:
        # Not the parameter: something may be held at zero.
        weights[reader] = torch.as_tensor(model.get_submodule(reader).weight).detach()
        if _is_on_grid(weights[reader]):
            raise Infeasible(
                f"smooth.migration of {name}: the weight of {reader} lies on an 8-bit grid, as qat leaves it, and "
                "would be taken off it; name smooth before qat, or turn one of them off"
            )
    return torch.cat(list(weights.values()))


def _is_on_grid(weight: Tensor) -> bool:
    """Whether all weights are whole numbers of steps, of which the largest of a row has 127.

    Those that are by any step, zeros and the largest themselves, say nothing.
    """
    steps = GRID * weight / weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    between = steps[(steps != 0) & (steps.abs() < GRID - 0.5)]
    return len(between) > 0 and bool((between - between.round()).abs().max() < 1e-3)


def _form(shared: Settings) -> str:
    form = shared.get("form")
    if form not in FORMS:
        raise Infeasible(f"smooth.form is {form}: expected one of {', '.join(FORMS)}")
    return str(form)


def _migration(known: Mapping[str, Place], name: str, settings: Settings) -> float:
    if name not in known:
        raise Infeasible(f"smooth has no place {name}: possible are {', '.join(known) or 'none'}")
    migration = settings["migration"]
    if not isinstance(migration, int | float) or not 0 <= migration <= 1:
        raise Infeasible(f"smooth.migration of {name} is {migration}: expected a share from 0 to 1")
    return float(migration)
