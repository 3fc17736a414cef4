"""Finds the best plans for many trade-offs at once from tables of what each setting does; knows no study."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from compressors.fisher import Effect
from compressors.plan import LayerSpec, Scalar

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]
Bools = NDArray[np.bool_]
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
    output channels; `sets` says where the knob decides about their numbers `(choices, layers)`, `on` for which choices
    at all; there `classes` are the precisions in which they compute and `sizes` the shares of their bytes that are
    stored. `inner` and `outer` are the pairs of touched and untouched neighbours in model order.
    """

    layers: Ints
    shares: Floats
    outputs: Floats
    on: Bools
    sets: Bools
    classes: Ints
    sizes: Floats
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
        self._rivals = [self._rivals_of(k) for k in range(len(self.names))]
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
        named = {layer for e in every for layer in (*e.outputs, *e.inputs, *e.bits, *e.stored)}
        touched = sorted(named & set(index), key=index.__getitem__)
        most = self.loss.shape[2]
        shares, outputs = (np.zeros((len(variants), most, len(touched))) for _ in range(2))
        computed, stored = (np.full((most, len(touched)), FULL_BITS) for _ in range(2))
        for v, row in enumerate(effects):
            for c, effect in enumerate(row):
                outputs[v, c] = [_log(effect.outputs.get(layer, 1.0)) for layer in touched]
                shares[v, c] = outputs[v, c] + [_log(effect.inputs.get(layer, 1.0)) for layer in touched]
                computed[c] = [effect.bits.get(layer, FULL_BITS) for layer in touched]
                stored[c] = [effect.stored.get(layer, bits) for layer, bits in zip(touched, computed[c], strict=True)]
        layers = np.array([index[layer] for layer in touched], dtype=np.intp)
        pairs = [(i, n) for i, at in enumerate(layers) for n in (at - 1, at + 1) if 0 <= n < len(index)]
        pairs = [(i, n) for i, n in pairs if n not in layers]
        inner, outer = (np.array(side, dtype=np.intp) for side in (zip(*pairs, strict=True) if pairs else ((), ())))
        classes: Ints = np.searchsorted(self.widths, computed)
        sets = stored < FULL_BITS
        on: Bools = np.array([row.any() for row in sets])
        return _Knob(layers, shares, outputs, on, sets, classes, stored / FULL_BITS, inner, outer)

    def _rivals_of(self, k: int) -> Ints:
        """The knobs of other methods that decide about the numbers of the same layers: a plan can have one of them."""
        mine = self._knobs[k]
        rivals = [
            i
            for i, other in enumerate(self._knobs)
            if i != k and mine.on.any() and other.on.any() and np.isin(mine.layers, other.layers).any()
        ]
        return np.array(rivals, dtype=np.intp)

    def hidden(self, pick: Ints, k: int) -> NDArray[np.bool_]:
        """`(rows,)`: whether knob `k` is not asked, because of one that is on."""
        others = self._hidden_by[k]
        found: NDArray[np.bool_] = (pick[:, others] != self.off[others]).any(1)
        return found

    def outrun(self, pick: Ints, k: int) -> Bools:
        """`(rows,)`: whether a rival before knob `k` is on, which then decides about the layers' numbers."""
        before = self._rivals[k][self._rivals[k] < k]
        found: Bools = (pick[:, before] != self.off[before]).any(1)
        return found

    def log_shares(self, pick: Ints, variant: Ints) -> Floats:
        """`(rows, layers)`: logarithm of the share of its MACs and weights that each layer keeps."""
        total = np.zeros((len(pick), len(self.macs)))
        for k, knob in enumerate(self._knobs):
            total[:, knob.layers] += knob.shares[variant, pick[:, k]]
        return total

    def numbers(self, pick: Ints) -> tuple[Ints, Floats]:
        """`(rows, layers)` both: the precision of each layer as an index into `widths`; which share of it is stored."""
        classes = np.full((len(pick), len(self.macs)), self._full, dtype=np.intp)
        sizes = np.ones(classes.shape)
        for k, knob in enumerate(self._knobs):
            if knob.on.any():
                at, sets = knob.layers, knob.sets[pick[:, k]]
                classes[:, at] = np.where(sets, knob.classes[pick[:, k]], classes[:, at])
                sizes[:, at] = np.where(sets, knob.sizes[pick[:, k]], sizes[:, at])
        return classes, sizes

    def describe(self, pick: Ints, variant: Ints) -> Floats:
        """`(rows, features)`: 1; bytes of the weights; MACs and layers per precision, switches, odd widths; as shares.

        The regressors of a latency surrogate: summing what layers save each by itself misses what a mixture costs.
        Widths are odd that are no multiple of what kernels take at once. Layers that are left out count nowhere.
        """
        shares, (classes, sizes) = np.exp(self.log_shares(pick, variant)), self.numbers(pick)
        left = shares > GONE
        columns = [np.ones(len(pick)), (shares * self.params * sizes).sum(1)]
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
    def _full(self) -> int:
        return self.widths.index(FULL_BITS)

    def solve(self, pick: Ints, variant: Ints, free: Bools, losses: Floats, rates: Rates, sweeps: int = 2) -> Ints:
        """Least sum of `losses` `(rows, knobs, choices)` and costs, knob by knob, for every row at once.

        Coordinate descent on the Lagrangian: it is not convex, because the shares of a layer's two sides multiply, so
        the result depends on the start `pick`. Knobs that are not `free` `(rows, knobs)` keep their choice. What a knob
        decides about numbers turns its rivals off.
        """
        pick, rows = pick.copy(), np.arange(len(pick))
        shares, (classes, sizes) = self.log_shares(pick, variant), self.numbers(pick)
        for _ in range(sweeps):
            for k, knob in enumerate(self._knobs):
                at, table = knob.layers, knob.shares[variant]
                others = shares[:, at] - table[rows, pick[:, k]]
                kept = others[:, None, :] + table
                own, stored = self._choices(k, pick, classes, sizes)
                total = losses[:, k] + self._cost(knob, np.exp(kept), own, stored, classes, rates)
                if len(self._rivals[k]):
                    total = total + self._rivalry(k, pick, free, losses)
                # Of layers that another knob leaves out nothing is asked.
                asked = (np.exp(others) > GONE).any(1) & ~self.hidden(pick, k)
                wanted = np.where(asked, total.argmin(1), self.off[k])
                best = np.where(free[:, k], wanted, pick[:, k])
                pick[:, k] = best
                shares[:, at] = kept[rows, best]
                for rival in self._rivals[k]:
                    self._turn_off(rival, knob.on[best] & free[:, rival], pick, classes, sizes)
                if knob.on.any():
                    every = (len(pick), *own.shape[1:])
                    classes[:, at] = np.broadcast_to(own, every)[rows, best]
                    sizes[:, at] = np.broadcast_to(stored, every)[rows, best]
        return pick

    def _turn_off(self, rival: int, where: Bools, pick: Ints, classes: Ints, sizes: Floats) -> None:
        """In the rows `where` another knob decides; what the rival set goes, of other layers too."""
        turned = np.flatnonzero(where & (pick[:, rival] != self.off[rival]))
        pick[turned, rival] = self.off[rival]
        both = np.ix_(turned, self._knobs[rival].layers)
        classes[both], sizes[both] = self._full, 1.0

    def _choices(self, k: int, pick: Ints, classes: Ints, sizes: Floats) -> tuple[Ints, Floats]:
        """Precisions and stored shares of the knob's layers for each choice: `(rows or 1, choices or 1, layers)`.

        Where a choice does not decide about them, they are what a rival makes of them.
        """
        knob = self._knobs[k]
        if not knob.on.any():
            return classes[:, None, knob.layers], sizes[:, None, knob.layers]
        if not len(self._rivals[k]):
            return knob.classes[None], knob.sizes[None]
        mine = knob.sets[pick[:, k]]
        others = np.where(mine, self._full, classes[:, knob.layers]), np.where(mine, 1.0, sizes[:, knob.layers])
        return (
            np.where(knob.sets, knob.classes, others[0][:, None, :]),
            np.where(knob.sets, knob.sizes, others[1][:, None, :]),
        )

    def _cost(self, knob: _Knob, kept: Floats, own: Ints, stored: Floats, classes: Ints, rates: Rates) -> Floats:
        """`(rows, choices)`: what the knob's layers cost for each of its choices, the other knobs as they are."""
        rows, layers = np.arange(len(kept))[:, None, None], len(self.macs)
        rate = rates.macs[rows, own] * self.macs[knob.layers]
        rate = rate + rates.bytes[:, None, None] * self.params[knob.layers] * stored
        cost: Floats = (kept * rate + (kept > GONE) * (rates.layers[rows, own] / layers)).sum(2)
        if knob.on.any():
            apart = classes[:, None, knob.outer] != own[:, :, knob.inner]
            cost = cost + rates.switches[:, None] * apart.sum(2) / max(1, layers - 1)
        return cost

    def _rivalry(self, k: int, pick: Ints, free: Bools, losses: Floats) -> Floats:
        """`(rows, choices)`: what rivals lose where the knob leaves them alone; not to be paid where they must stay."""
        rivals, rows = self._rivals[k], np.arange(len(pick))[:, None]
        spent = (losses[rows, rivals, pick[:, rivals]] - losses[rows, rivals, self.off[rivals]]).sum(1)
        stay = ((pick[:, rivals] != self.off[rivals]) & ~free[:, rivals]).any(1)
        spared: Floats = np.where(self._knobs[k].on, np.where(stay, np.inf, 0.0)[:, None], spent[:, None])
        return spared


def _widths(variants: Sequence[Variant]) -> tuple[int, ...]:
    effects = (effect for variant in variants for choices in variant.effects.values() for effect in choices.values())
    return tuple(sorted({FULL_BITS, *(bits for effect in effects for bits in effect.bits.values())}))


def _normalised(counts: Sequence[int]) -> Floats:
    total: Floats = np.array(counts, dtype=np.float64)
    return total / max(float(total.sum()), 1.0)


def _log(share: float) -> float:
    return float(np.log(max(share, LEAST_SHARE)))
