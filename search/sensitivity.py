"""What every setting of every sensitive method is predicted to do to this network, as a guide for the sampler."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from compressors.fisher import Effect, Fisher, Sensitive, diagonal_fisher
from compressors.pipeline import Compressor, Growing, Stage
from compressors.plan import LayerSpec, Scalar, Settings, digest
from evaluators.export import once
from evaluators.machine import versions
from search.solver import Answers, Guide, Variant
from search.space import NONE, RUNTIME_KNOB, Knob, Method, SearchSpace
from search.workload import Workload

EXAMPLES = 32
# Every combination of a method's settings without a layer of their own is a table. Where there are more than these,
# settings without an influence on predictions are left out, and what is left is thinned out.
MOST_VARIANTS = 12
RANGE_LEVELS = 6
# Raised whenever predictions are made in another way.
FORMAT = 3


def guide(
    workload: Workload,
    layers: Sequence[LayerSpec],
    compressors: Mapping[str, Compressor],
    space: SearchSpace,
    cache: Path,
) -> Guide | None:
    """Predict every effect, or read what was predicted for this workload and space before; None if nothing can be."""
    sensitive = {name: c for name, c in compressors.items() if isinstance(c, Sensitive)}
    methods = [method for method in space.methods if method.name in sensitive]
    if not methods:
        return None
    made_by = {name: repr(compressor) for name, compressor in sensitive.items()}
    key = digest([FORMAT, versions(), space.digest, workload.fingerprint(), made_by])
    path = cache / "sensitivity" / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    once(path, lambda made: _store(made, tuple(_variants(workload, sensitive, methods))))
    return Guide(
        layers=tuple(layers),
        variants=_stored(path),
        off={knob.name: method.off[1] for method in methods for knob in method.deciding},
        targets=tuple(_targets(space)),
        growth=_growth(space, compressors),
        structural=frozenset(
            knob.name for m in space.methods if m.stage < Stage.NUMERIC for knob in (*m.deciding, *m.others)
        ),
        asked=partial(_asked, space),
        hidden_by=dict(_hidden_by(space)),
    )


def _variants(workload: Workload, compressors: Mapping[str, Sensitive], methods: Sequence[Method]) -> Iterator[Variant]:
    calibration = workload.splits.calibration.batches(EXAMPLES)
    fisher = diagonal_fisher(workload.model, calibration, EXAMPLES, loss=workload.task.loss)
    tables = [_tables(workload, compressors[method.name], method, fisher) for method in methods]
    for parts in itertools.product(*tables):
        answers = {name: value for part in parts for name, value in part.answers.items()}
        yield Variant(answers, {name: found for part in parts for name, found in part.effects.items()})


def _tables(workload: Workload, compressor: Sensitive, method: Method, fisher: Fisher) -> list[Variant]:
    """One method's effects, for every way to answer those of its knobs that no layer owns."""
    shared = [knob for knob in method.others if not knob.owners]
    if math.prod(len(_levels(knob)) for knob in shared) > MOST_VARIANTS:
        shared = [knob for knob in shared if _is_foreseen(knob, workload, compressor, method, fisher)]
    rows = list(itertools.product(*(_levels(knob) for knob in shared)))
    # By chance: every so many of them would leave whole values of a knob out.
    rows = [rows[i] for i in sorted(np.random.default_rng(0).permutation(len(rows))[:MOST_VARIANTS])]
    settings = [{k.key: v for k, v in zip(shared, row, strict=True)} for row in rows]
    asked = [question for row in settings for question in _asked_of(method, row)]
    questions = [(owner, told) for _, _, owner, told in asked]
    answered = iter(zip(asked, compressor.effects(workload.model, workload.example, questions, fisher), strict=True))
    variants = []
    for row in rows:
        parts: dict[str, dict[Scalar, list[Effect]]] = {}
        for (knob, value, _, _), effect in itertools.islice(answered, len(asked) // len(rows)):
            parts.setdefault(knob.name, {}).setdefault(value, []).append(effect)
        answers = {knob.name: value for knob, value in zip(shared, row, strict=True)}
        variants.append(Variant(answers, {n: {v: _sum(e) for v, e in found.items()} for n, found in parts.items()}))
    for knob in shared:
        variants = _without(knob.name, variants)
    return variants


def _without(knob: str, variants: list[Variant]) -> list[Variant]:
    """The same without a knob that changes nothing; trials learn about it, and not the tables."""
    found: dict[frozenset[tuple[str, Scalar]], Variant] = {}
    for variant in variants:
        others = {name: value for name, value in variant.answers.items() if name != knob}
        first = found.setdefault(frozenset(others.items()), Variant(others, variant.effects))
        if first.effects != variant.effects:
            return variants
    return list(found.values()) if len(found) < len(variants) else variants


def _asked_of(method: Method, shared: Settings) -> list[tuple[Knob, Scalar, str, Settings]]:
    """Every value of every deciding knob for each owner, with the settings that the effect is asked for."""
    others = [(knob, shared.get(knob.key, knob.middle())) for knob in method.others if not knob.owners]
    told = [(knob, value) for knob, value in others if value != NONE]
    return [
        (knob, value, owner, {knob.key: value, **{k.key: v for k, v in told if k.applies([value])}})
        for knob in method.deciding
        for value in _levels(knob)
        for owner in knob.owners
    ]


def _is_foreseen(knob: Knob, workload: Workload, compressor: Sensitive, method: Method, fisher: Fisher) -> bool:
    """Whether the predictions tell its values apart; what the others do, the sampler learns from trials."""
    found = []
    for value in _levels(knob):
        asked = _asked_of(method, {knob.key: value})
        questions = [(owner, told) for _, _, owner, told in asked]
        found.append(compressor.effects(workload.model, workload.example, questions, fisher))
    return any(effects != found[0] for effects in found)


def _sum(effects: Sequence[Effect]) -> Effect:
    """The effects of several layers that share a knob."""
    outputs: dict[str, float] = {}
    inputs: dict[str, float] = {}
    for total, shares in ((outputs, "outputs"), (inputs, "inputs")):
        for effect in effects:
            for layer, share in getattr(effect, shares).items():
                total[layer] = total.get(layer, 1.0) * share
    bits = {layer: width for effect in effects for layer, width in effect.bits.items()}
    stored = {layer: width for effect in effects for layer, width in effect.stored.items()}
    return Effect(sum(effect.loss for effect in effects), outputs, inputs, bits, stored)


def _levels(knob: Knob) -> tuple[Scalar, ...]:
    """The choices; of a range, some values evenly apart that lie on its grid."""
    if knob.choices or knob.low == knob.high:
        return knob.choices or (knob.low,)
    whole = isinstance(knob.low, int) and isinstance(knob.high, int)
    step = knob.step or (1 if whole else (knob.high - knob.low) / (RANGE_LEVELS - 1))
    count = int((knob.high - knob.low) / step + 1e-9) + 1
    rows = sorted({round(i * (count - 1) / (RANGE_LEVELS - 1)) for i in range(RANGE_LEVELS)})
    return tuple(int(knob.low + i * step) if whole else knob.low + i * step for i in rows)


def _targets(space: SearchSpace) -> Iterator[Answers]:
    """Only what is asked: a knob with one choice is none."""
    for runtime, precisions in space.targets.items():
        for precision in precisions:
            answers: dict[str, Scalar] = {RUNTIME_KNOB: runtime} if len(space.targets) > 1 else {}
            yield answers | ({f"deploy.precision@{runtime}": precision} if len(precisions) > 1 else {})


def _growth(space: SearchSpace, compressors: Mapping[str, Compressor]) -> tuple[str, tuple[Scalar, ...]] | None:
    """The knob by which a method that grows is turned on, if its values say how much of it there is."""
    for method in space.methods:
        knob = method.deciding[0]
        if isinstance(compressors[method.name], Growing) and len(method.deciding) == 1 and not knob.owners:
            levels = [value for value in _levels(knob) if value != method.off[1] and isinstance(value, int | float)]
            return (knob.name, tuple(sorted(levels))) if levels else None
    return None


def _hidden_by(space: SearchSpace) -> Iterator[tuple[str, list[str]]]:
    """Knobs all of whose layers are replaced, and not left to them, when one of these is on."""
    before: list[Knob] = []
    for method in space.methods:
        if method.stage is Stage.REPLACE:
            for knob in method.deciding:
                yield knob.name, [other.name for other in before if {*knob.owners} <= {*other.owners}]
            before += method.deciding


def _asked(space: SearchSpace, answers: Answers) -> dict[str, Scalar]:
    """The answers that a plan with them asks for; knobs without one count as asked and unknown."""
    asked: dict[str, Scalar] = {}

    def pick(knob: Knob) -> Scalar:
        if knob.name in answers:
            asked[knob.name] = answers[knob.name]
        return answers.get(knob.name, knob.middle())

    space.plan(pick)
    return asked


def _stored(path: Path) -> tuple[Variant, ...]:
    return tuple(_from_json(row) for row in json.loads(path.read_text()))


def _store(path: Path, variants: Sequence[Variant]) -> None:
    path.write_text(json.dumps([_to_json(variant) for variant in variants]))


def _to_json(variant: Variant) -> object:
    """JSON has no other keys than texts: effects become pairs."""
    effects = {name: [[value, asdict(e)] for value, e in found.items()] for name, found in variant.effects.items()}
    return {"answers": variant.answers, "effects": effects}


def _from_json(raw: Mapping[str, object]) -> Variant:
    effects: dict[str, dict[Scalar, Effect]] = {
        name: {value: Effect(**e) for value, e in pairs}
        for name, pairs in raw["effects"].items()  # type: ignore[attr-defined]
    }
    return Variant(raw["answers"], effects)  # type: ignore[arg-type]
