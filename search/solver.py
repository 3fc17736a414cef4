"""Finds the best plans for many trade-offs at once from tables of what each setting does; knows no study."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from compressors.fisher import Effect
from compressors.plan import LayerSpec, Scalar

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Answers = Mapping[str, Scalar]

FULL_BITS = 32
# Channels that vector and tile kernels take at once.
LANES = (8, 16)
# A share of nothing has no logarithm. Where no more than GONE is left of a layer, it was left out.
LEAST_SHARE, GONE = 1e-6, 1e-5


@dataclass(frozen=True)
class Variant:
    """What every choice of every knob does while the knobs in `answers`, which no layer owns, have these values."""

    answers: Answers
    effects: Mapping[str, Mapping[Scalar, Effect]]


@dataclass(frozen=True)
class Guide:
    """What is known of a search space before its first trial.

    `variants` all speak of the same knobs and choices. `targets` are the places where a plan can run, each with the
    answers that choose it. `growth` is a knob that buys back loss, with its values in rising order. A change of one of
    the `structural` knobs means training. `off` is what leaves a knob's layers alone, if that is not its choice of the
    least loss. `asked` leaves out what a plan with these answers never asks; `hidden_by` has, for knobs that are asked
    only while others are off, those others.
    """

    layers: tuple[LayerSpec, ...]
    variants: tuple[Variant, ...]
    targets: tuple[Answers, ...] = ({},)
    growth: tuple[str, tuple[Scalar, ...]] | None = None
    structural: frozenset[str] = frozenset()
    asked: Callable[[Answers], Answers] = field(default=lambda answers: answers)
    off: Answers = field(default_factory=dict)
    hidden_by: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """How much a row minds each thing, all `(rows, ...)`: MACs and layers per precision, switches, bytes."""

    macs: Floats
    layers: Floats
    switches: Floats
    bytes: Floats


@dataclass(frozen=True)
class _Knob:
    """The layers that a knob touches.

    `shares` are logarithms of what they keep `(variants, choices, layers)`, and `outputs` the part of that which is
    output channels; `classes` their precisions `(choices, layers)` if the knob sets them, `inner` and `outer` the pairs
    of touched and untouched neighbours in model order.
    """

    layers: Ints
    shares: Floats
    outputs: Floats
    classes: Ints | None
    inner: Ints
    outer: Ints


class Tables:
    """A guide as arrays. Picks are `(rows, knobs)` indices of choices; variants `(rows,)` indices."""

    def __init__(self, guide: Guide) -> None:
        first = guide.variants[0].effects
        self.names = tuple(first)
        self.choices = tuple(tuple(effects) for effects in first.values())
        self.widths = _widths(guide.variants)
        self.macs = _normalised([layer.macs for layer in guide.layers])
        self.channels = np.array([layer.weight_shape[0] for layer in guide.layers], dtype=np.float64)
        self.params = _normalised([0 if layer.tied_to else layer.params for layer in guide.layers])
        self.loss = self._losses(guide.variants)
        least = self.loss[0].argmin(1)
        self.off: Ints = np.array(
            [
                choices.index(guide.off[name]) if guide.off.get(name) in choices else least[k]
                for k, (name, choices) in enumerate(zip(self.names, self.choices, strict=True))
            ],
            dtype=np.intp,
        )
        index = {layer.name: i for i, layer in enumerate(guide.layers)}
        self._knobs = [self._knob(name, guide.variants, index) for name in self.names]
        self._hidden_by = [
            [k for k, other in enumerate(self.names) if other in guide.hidden_by.get(name, ())] for name in self.names
        ]
        self.same = self._same(guide.variants)
        twins = self.same != np.arange(self.loss.shape[2])
        # Two names of one thing: only one of them is ever proposed.
        self.loss[twins] = np.inf

    @property
    def features(self) -> int:
        """How many columns `describe` gives."""
        return 2 * len(self.widths) + 3 + len(LANES)

    def _losses(self, variants: Sequence[Variant]) -> Floats:
        """`(variants, knobs, choices)`; infinite where a knob has fewer choices than others, or one is impossible."""
        most = max(map(len, self.choices))
        table = np.full((len(variants), len(self.names), most), np.inf)
        for v, variant in enumerate(variants):
            for k, name in enumerate(self.names):
                table[v, k, : len(self.choices[k])] = [effect.loss for effect in variant.effects[name].values()]
        return table

    def _same(self, variants: Sequence[Variant]) -> Ints:
        """`(variants, knobs, choices)`: the choice that does exactly the same, `off` or else the first; itself if none.

        Where channels are cut to multiples of 8, removing a half or three quarters of 16 is one and the same.
        """
        same = np.tile(np.arange(self.loss.shape[2]), (len(variants), len(self.names), 1))
        for v, variant in enumerate(variants):
            for k, name in enumerate(self.names):
                effects = list(variant.effects[name].values())
                order = [int(self.off[k]), *range(len(effects))]
                for c, effect in enumerate(effects):
                    same[v, k, c] = next(i for i in order if effects[i] == effect)
        return same

    def _knob(self, name: str, variants: Sequence[Variant], index: Mapping[str, int]) -> _Knob:
        effects = [list(variant.effects[name].values()) for variant in variants]
        every = [effect for row in effects for effect in row]
        # Norms shrink too, but cost next to nothing.
        named = {layer for e in every for layer in (*e.outputs, *e.inputs, *e.bits)}
        touched = sorted(named & set(index), key=index.__getitem__)
        most = self.loss.shape[2]
        shares, outputs = (np.zeros((len(variants), most, len(touched))) for _ in range(2))
        classes = np.full((most, len(touched)), self.widths.index(FULL_BITS))
        for v, row in enumerate(effects):
            for c, effect in enumerate(row):
                outputs[v, c] = [_log(effect.outputs.get(layer, 1.0)) for layer in touched]
                shares[v, c] = outputs[v, c] + [_log(effect.inputs.get(layer, 1.0)) for layer in touched]
                classes[c] = [self.widths.index(effect.bits.get(layer, FULL_BITS)) for layer in touched]
        layers = np.array([index[layer] for layer in touched], dtype=np.intp)
        pairs = [(i, n) for i, at in enumerate(layers) for n in (at - 1, at + 1) if 0 <= n < len(index)]
        pairs = [(i, n) for i, n in pairs if n not in layers]
        sets_bits = any(effect.bits for effect in every)
        inner, outer = (np.array(side, dtype=np.intp) for side in (zip(*pairs, strict=True) if pairs else ((), ())))
        return _Knob(layers, shares, outputs, classes if sets_bits else None, inner, outer)

    def hidden(self, pick: Ints, k: int) -> NDArray[np.bool_]:
        """`(rows,)`: whether knob `k` is not asked, because of one that is on."""
        others = self._hidden_by[k]
        found: NDArray[np.bool_] = (pick[:, others] != self.off[others]).any(1)
        return found

    def log_shares(self, pick: Ints, variant: Ints) -> Floats:
        """`(rows, layers)`: logarithm of the share of its MACs and weights that each layer keeps."""
        total = np.zeros((len(pick), len(self.macs)))
        for k, knob in enumerate(self._knobs):
            total[:, knob.layers] += knob.shares[variant, pick[:, k]]
        return total

    def classes(self, pick: Ints) -> Ints:
        """`(rows, layers)`: index into `widths`."""
        found = np.full((len(pick), len(self.macs)), self.widths.index(FULL_BITS), dtype=np.intp)
        for k, knob in enumerate(self._knobs):
            if knob.classes is not None:
                found[:, knob.layers] = knob.classes[pick[:, k]]
        return found

    def describe(self, pick: Ints, variant: Ints) -> Floats:
        """`(rows, features)`: 1; bytes of the weights; MACs and layers per precision, switches, odd widths; as shares.

        The regressors of a latency surrogate: summing what layers save each by itself misses what a mixture costs.
        Widths are odd that are no multiple of what kernels take at once. Layers that are left out count nowhere.
        """
        shares, classes = np.exp(self.log_shares(pick, variant)), self.classes(pick)
        left = shares > GONE
        columns = [np.ones(len(pick)), (shares * self.params * self._byte_share[classes]).sum(1)]
        columns += [(shares * self.macs * (classes == c)).sum(1) for c in range(len(self.widths))]
        columns += [((classes == c) & left).mean(1) for c in range(len(self.widths))]
        switched = (classes[:, 1:] != classes[:, :-1]) & left[:, 1:] & left[:, :-1]
        columns.append(switched.mean(1) if classes.shape[1] > 1 else np.zeros(len(pick)))
        channels = np.rint(self.channels * np.exp(self._log_outputs(pick, variant)))
        columns += [((channels % lanes != 0) & left).mean(1) for lanes in LANES]
        return np.stack(columns, 1)

    def _log_outputs(self, pick: Ints, variant: Ints) -> Floats:
        total = np.zeros((len(pick), len(self.macs)))
        for k, knob in enumerate(self._knobs):
            total[:, knob.layers] += knob.outputs[variant, pick[:, k]]
        return total

    @property
    def _byte_share(self) -> Floats:
        return np.array(self.widths) / FULL_BITS

    def solve(
        self, pick: Ints, variant: Ints, free: NDArray[np.bool_], losses: Floats, rates: Rates, sweeps: int = 2
    ) -> Ints:
        """Least sum of `losses` `(rows, knobs, choices)` and costs, knob by knob, for every row at once.

        Coordinate descent on the Lagrangian: it is not convex, because the shares of a layer's two sides multiply, so
        the result depends on the start `pick`. Knobs that are not `free` `(rows, knobs)` keep their choice.
        """
        pick, rows = pick.copy(), np.arange(len(pick))
        shares, classes = self.log_shares(pick, variant), self.classes(pick)
        rate = rates.macs[:, None, :] * self.macs[None, :, None]
        rate = rate + rates.bytes[:, None, None] * self.params[None, :, None] * self._byte_share
        for _ in range(sweeps):
            for k, knob in enumerate(self._knobs):
                table = knob.shares[variant]
                others = shares[:, knob.layers] - table[rows, pick[:, k]]
                kept = others[:, None, :] + table
                total = losses[:, k] + self._cost(knob, np.exp(kept), rate, rates, classes)
                # Of layers that another knob leaves out nothing is asked.
                asked = (np.exp(others) > GONE).any(1) & ~self.hidden(pick, k)
                wanted = np.where(asked, total.argmin(1), self.off[k])
                best = np.where(free[:, k], wanted, pick[:, k])
                pick[:, k] = best
                shares[:, knob.layers] = kept[rows, best]
                if knob.classes is not None:
                    classes[:, knob.layers] = knob.classes[best]
        return pick

    def _cost(self, knob: _Knob, kept: Floats, rate: Floats, rates: Rates, classes: Ints) -> Floats:
        """`(rows, choices)`: what the knob's layers cost for each of its choices, the other knobs as they are."""
        left, per_layer = kept > GONE, rates.layers / len(self.macs)
        if knob.classes is None:
            own = np.take_along_axis(rate[:, knob.layers], classes[:, knob.layers, None], 2)[..., 0]
            fixed = np.take_along_axis(per_layer, classes[:, knob.layers], 1)
            cost: Floats = (kept * own[:, None, :] + left * fixed[:, None, :]).sum(2)
            return cost
        own = rate[:, knob.layers][:, np.arange(len(knob.layers)), knob.classes]
        cost = (kept * own + left * per_layer[:, knob.classes]).sum(2)
        apart = classes[:, None, knob.outer] != knob.classes[None, :, knob.inner]
        switches: Floats = rates.switches[:, None] * apart.sum(2) / max(1, len(self.macs) - 1)
        return cost + switches


def _widths(variants: Sequence[Variant]) -> tuple[int, ...]:
    effects = (effect for variant in variants for choices in variant.effects.values() for effect in choices.values())
    return tuple(sorted({FULL_BITS, *(bits for effect in effects for bits in effect.bits.values())}))


def _normalised(counts: Sequence[int]) -> Floats:
    total: Floats = np.array(counts, dtype=np.float64)
    return total / max(float(total.sum()), 1.0)


def _log(share: float) -> float:
    return float(np.log(max(share, LEAST_SHARE)))
