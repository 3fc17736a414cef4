"""The search space: knobs with real values and readable names, and how an Optuna trial becomes a plan."""

import fnmatch
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from optuna.trial import BaseTrial

from compressors.errors import ConfigError
from compressors.layers import inside
from compressors.pipeline import CHANGES, Compressor, Removing, Stage
from compressors.plan import CompressionPlan, LayerSpec, Scalar, Step, Target, digest
from evaluators.runtime import CODEBOOK, Runtime, Support

GRANULARITIES = ("layer", "block", "model")
RUNTIME_KNOB = "deploy.runtime"
NEEDED = {"structure": Stage.STRUCTURE, "numbers": Stage.NUMERIC}
"""What a method can be made to depend on: that one of this stage does something, or for the first any of `CHANGES`."""
NONE = "none"
"""The answer with which a plan leaves a key out, as if it had never been asked for."""


@dataclass(frozen=True, slots=True)
class Knob:
    """One question to the sampler: either `choices`, or a range from `low` to `high` (whole numbers if both are).

    `owners` are the layers or tied groups that take its answer; none for a setting shared by the whole step. With
    `when`, it is asked only if one of the method's deciding knobs, or of those before it, answered just that, or one
    of these.
    """

    name: str
    method: str
    key: str
    owners: tuple[str, ...] = ()
    choices: tuple[Scalar, ...] = ()
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    when: Scalar | tuple[Scalar, ...] | None = None

    def applies(self, given: Collection[Scalar]) -> bool:
        """Whether it is asked once these answers were given."""
        wanted = self.when if isinstance(self.when, tuple) else (self.when,)
        return self.when is None or any(value in wanted for value in given)

    def suggest(self, trial: BaseTrial) -> Scalar:
        """Ask a live, frozen or fixed trial."""
        if self.choices:
            return cast(Scalar, trial.suggest_categorical(self.name, self.choices))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def middle(self) -> Scalar:
        """The value to take when nothing is known: the middle choice, or the middle of the range."""
        if self.choices:
            return NONE if NONE in self.choices else self.choices[len(self.choices) // 2]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        if self.step:
            middle = self.low + round((middle - self.low) / self.step) * self.step
        return round(middle) if isinstance(self.low, int) and isinstance(self.high, int) else middle

    def first(self, but: Scalar) -> Scalar:
        """The weakest value that is not `but`."""
        return next((value for value in self.choices if value != but), self.last())

    def last(self) -> Scalar:
        """The strongest value, by the convention that choices are listed from weak to strong."""
        return self.choices[-1] if self.choices else self.high


@dataclass(frozen=True)
class Method:
    """The knobs of one compressor; it drops out of the plan when all its `deciding` knobs are at `off`.

    One that `needs` a stage is asked only where a method of that stage does something.
    """

    name: str
    stage: Stage
    deciding: tuple[Knob, ...]
    others: tuple[Knob, ...]
    off: tuple[str, Scalar]
    needs: Stage | None = None
    removes: bool = False

    def step(self, pick: Callable[[Knob], Scalar], gone: Collection[str] = ()) -> Step | None:
        """Ask the deciding knobs, then the others only if anything is on; nothing of the modules that are `gone`."""
        answers = [(knob, pick(knob)) for knob in _left(self.deciding, gone)]
        answers = [(knob, value) for knob, value in answers if value != self.off[1]]
        if not answers:
            return None
        for knob in _left(self.others, gone):
            if knob.applies([value for _, value in answers]):
                answers.append((knob, pick(knob)))
        return self._assemble((knob, value) for knob, value in answers if value != NONE)

    def _assemble(self, answers: Iterable[tuple[Knob, Scalar]]) -> Step:
        per_layer: dict[str, dict[str, Scalar]] = {}
        shared: dict[str, Scalar] = {}
        for knob, value in answers:
            if not knob.owners:
                shared[knob.key] = value
            for owner in knob.owners:
                per_layer.setdefault(owner, {})[knob.key] = value
        return Step(self.name, per_layer, shared)


def _left(knobs: Iterable[Knob], gone: Collection[str]) -> Iterator[Knob]:
    """Knobs without the owners that lie in modules which are gone, and without those that had no other owners."""
    for knob in knobs:
        owners = tuple(o for o in knob.owners if not any(inside(o, out) for out in gone))
        if owners == knob.owners:
            yield knob
        elif owners:
            yield replace(knob, owners=owners)


@dataclass(frozen=True)
class SearchSpace:
    """Every plan the search may propose: methods in the order in which they run, runtimes with rest precisions."""

    methods: tuple[Method, ...]
    targets: Mapping[str, tuple[str, ...]]
    seed: int = 0

    def sample(self, trial: BaseTrial) -> CompressionPlan:
        """The plan a trial stands for; knobs that do not apply are never asked."""
        return self.plan(lambda knob: knob.suggest(trial))

    def plan(self, pick: Callable[[Knob], Scalar]) -> CompressionPlan:
        """The plan that follows from any way of answering knobs.

        A layer is replaced once, and its numbers are decided about once: of the methods of such a stage, those behind
        the first one that does something with a layer are not asked about it.
        """
        steps: dict[str, Step] = {}
        gone: set[str] = set()
        taken: dict[Stage, set[str]] = {Stage.REPLACE: set(), Stage.NUMERIC: set()}
        done: set[Stage | None] = {None}
        # What makes up for numbers, or prepares for structure, runs before it, but whether there is any is only known
        # afterwards.
        for method in sorted(self.methods, key=lambda m: m.needs is Stage.NUMERIC or m.stage is Stage.PREPARE):
            step = method.step(pick, gone | taken.get(method.stage, set())) if method.needs in done else None
            if step is not None:
                steps[method.name] = step
                done.add(Stage.STRUCTURE if method.stage in CHANGES else method.stage)
                gone |= set(step.per_layer) if method.removes else set()
                taken.get(method.stage, set()).update(step.per_layer)
        ordered = tuple(steps[method.name] for method in self.methods if method.name in steps)
        return CompressionPlan(self._target(pick), ordered, self.seed)

    def _target(self, pick: Callable[[Knob], Scalar]) -> Target:
        runtime = str(_only_or_pick(RUNTIME_KNOB, tuple(self.targets), pick))
        precision = _only_or_pick(f"deploy.precision@{runtime}", self.targets[runtime], pick)
        return Target(runtime, str(precision))

    def baselines(self) -> Iterator[dict[str, Scalar]]:
        """Answers for the uncompressed model, on every runtime at every rest precision."""
        for runtime, precisions in self.targets.items():
            for precision in precisions:
                yield self._answers(Target(runtime, precision), {})

    def uniform(self, sparing: bool = False, trained: bool = False) -> Iterator[dict[str, Scalar]]:
        """Answers for each method alone, each of its values on all layers alike, on every runtime.

        Methods that need a structural one and recover from it come along at full strength wherever the structure
        changes; everything else is off. With `sparing` there is one value a method, from its middle, and, unless all
        are to be `trained`, as little recovery as there can be.
        """
        # Numeric methods first: they need no training, so that a short search has something of everything.
        for method in reversed(self.methods):
            if method.needs is not None:
                continue
            levels = _levels(method)
            for value in [levels[(len(levels) - 1) // 2]] if sparing else levels:
                for runtime, precisions in self.targets.items():
                    yield self._answers(
                        Target(runtime, precisions[-1]), {method.name: value}, hurried=sparing and not trained
                    )

    def _answers(self, target: Target, wanted: Mapping[str, Scalar], hurried: bool = False) -> dict[str, Scalar]:
        answers: dict[str, Scalar] = {}
        methods = {method.name: method for method in self.methods}

        def pick(knob: Knob) -> Scalar:
            answers[knob.name] = value = choose(knob)
            return value

        def choose(knob: Knob) -> Scalar:
            if knob.method == "deploy":
                return target.runtime if knob.name == RUNTIME_KNOB else target.precision
            method = methods[knob.method]
            if knob.key != method.off[0]:
                return knob.middle()
            if method.needs is Stage.STRUCTURE and method.stage is not Stage.PREPARE:
                return knob.first(but=method.off[1]) if hurried else knob.last()
            value = wanted.get(knob.method, method.off[1])
            return value if not knob.choices or value in knob.choices else method.off[1]

        self.plan(pick)
        return answers

    @property
    def digest(self) -> str:
        """Changes whenever a knob, a choice or a runtime does: a study belongs to one space."""
        return digest([[asdict(m) for m in self.methods], {k: list(v) for k, v in self.targets.items()}, self.seed])


def _only_or_pick(name: str, choices: tuple[str, ...], pick: Callable[[Knob], Scalar]) -> Scalar:
    return choices[0] if len(choices) == 1 else pick(Knob(name, "deploy", name.split(".")[1], choices=choices))


def _levels(method: Method) -> list[Scalar]:
    """Every value but `off` that a deciding knob can take, in the order of their first mention."""
    levels: dict[Scalar, None] = {}
    for knob in method.deciding:
        for value in knob.choices or (knob.low, knob.middle(), knob.high):
            levels[value] = None
    levels.pop(method.off[1], None)
    return list(levels)


def build_space(
    spaces: Mapping[str, Mapping[str, Any]],
    compressors: Mapping[str, Compressor],
    groups: Mapping[str, Mapping[str, tuple[str, ...]]],
    layers: Sequence[LayerSpec],
    runtimes: Mapping[str, Runtime],
    seed: int = 0,
) -> SearchSpace:
    """Turn the `space:` blocks into knobs and check them against the model's layers and the runtimes' kernels.

    `groups` is method -> what its `groups()` said; one that has no group in this model, and nothing else to decide, is
    left out. Raises `ConfigError` for anything that could only fail later.
    """
    kinds = {layer.name: layer.kind for layer in layers}
    methods = []
    for name, compressor in compressors.items():
        if groups[name] or not _needs_groups(spaces[name]):
            methods.append(_method(name, compressor, dict(spaces[name]), groups[name], kinds))
    if not methods:
        raise ConfigError("compressor", f"{', '.join(compressors)} find nothing to do here", "choose other compressors")
    methods.sort(key=lambda method: (method.stage, not method.removes))
    for method in methods:
        _check_kernels(method, kinds, runtimes)
    return SearchSpace(tuple(methods), {name: runtime.precisions() for name, runtime in runtimes.items()}, seed)


def _needs_groups(space: Mapping[str, Any]) -> bool:
    entries = [entry for key, entry in space.items() if key != "when"]
    return any(isinstance(entry, Mapping) and "granularity" in entry for entry in entries)


def _method(
    name: str,
    compressor: Compressor,
    space: dict[str, Any],
    groups: Mapping[str, tuple[str, ...]],
    kinds: Mapping[str, str],
) -> Method:
    when = space.pop("when", None)
    if when is not None and when not in NEEDED:
        remedy = f"use one of {', '.join(NEEDED)}, or leave it out"
        raise ConfigError(f"compressor.{name}.space.when", f"{when!r} is no condition", remedy)
    knobs = [k for key, entry in space.items() for k in _knobs(name, key, entry, groups, kinds)]
    deciding = tuple(k for k in knobs if k.key == compressor.off[0])
    if not deciding:
        raise ConfigError(
            f"compressor.{name}.space",
            f"says nothing about {compressor.off[0]!r}, which turns the method on"
            + ("" if groups or compressor.off[0] not in space else ", for any layer of this model"),
            f"give it choices, or leave {name} out of compressor=[...]",
        )
    for knob in deciding:
        if knob.choices and compressor.off[1] not in knob.choices:
            problem = f"has no {compressor.off[1]}, at which the method does nothing"
            raise ConfigError(f"compressor.{name}.space.{knob.key}.choices", problem, f"add {compressor.off[1]}")
    others = tuple(k for k in knobs if k.key != compressor.off[0])
    removes = isinstance(compressor, Removing)
    return Method(name, compressor.stage, deciding, others, compressor.off, NEEDED.get(when), removes)


def _knobs(
    method: str, key: str, entry: Any, groups: Mapping[str, tuple[str, ...]], kinds: Mapping[str, str]
) -> Iterator[Knob]:
    path = f"compressor.{method}.space.{key}"
    if not isinstance(entry, Mapping):
        raise ConfigError(path, f"is {entry!r}", "write {choices: [...]} or {low: .., high: ..}")
    if entry.get("choices") == [NONE]:
        return
    entry = {**entry, "when": tuple(entry["when"])} if isinstance(entry.get("when"), list) else dict(entry)
    granularity, include, exclude = (
        entry.pop("granularity", None),
        entry.pop("include", ["*"]),
        entry.pop("exclude", []),
    )
    if granularity is None:
        yield Knob(f"{method}.{key}", method, key, **_values(path, entry, kind=None))
        return
    if granularity not in GRANULARITIES:
        raise ConfigError(f"{path}.granularity", f"is {granularity!r}", f"use one of {', '.join(GRANULARITIES)}")
    owners = _matching(path, groups, include, exclude)
    for label, members in _by_granularity(granularity, owners).items():
        by_kind: dict[str, list[str]] = {}
        for owner in members:
            by_kind.setdefault(
                _kind(path, owner, kinds) if isinstance(entry.get("choices"), Mapping) else "", []
            ).append(owner)
        for kind, same in by_kind.items():
            name = f"{method}.{key}@{label}" + (f":{kind}" if len(by_kind) > 1 else "")
            yield Knob(name, method, key, tuple(same), **_values(path, entry, kind))


def _values(path: str, entry: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    unknown = set(entry) - {"choices", "low", "high", "step", "log", "when"}
    if unknown:
        raise ConfigError(
            path, f"has the unknown field {min(unknown)!r}", "use choices, or low, high, step, log; and when"
        )
    if "choices" in entry:
        choices = entry["choices"]
        if isinstance(choices, Mapping):
            if kind not in choices:
                raise ConfigError(
                    f"{path}.choices", f"has no entry for {kind} layers", f"add {kind}: [...] or exclude these layers"
                )
            choices = choices[kind]
        if not choices:
            raise ConfigError(f"{path}.choices", "is empty", "give at least one value")
        return {"choices": tuple(choices), "when": entry.get("when")}
    if "low" not in entry or "high" not in entry or entry["low"] > entry["high"]:
        raise ConfigError(path, f"is {dict(entry)}", "give choices, or low and high with low <= high")
    return {k: entry[k] for k in ("low", "high", "step", "log", "when") if k in entry}


def _matching(
    path: str, groups: Mapping[str, tuple[str, ...]], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Owners of which any member layer is included and none excluded; every pattern must match something."""
    names = [layer for members in groups.values() for layer in members]
    for field, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                shown = ", ".join(names[:4]) or "none"
                raise ConfigError(
                    f"{path}.{field}", f"{pattern!r} matches no layer", f"layers it could match: {shown}, ..."
                )

    def hit(members: tuple[str, ...], patterns: Sequence[str]) -> bool:
        return any(fnmatch.filter(members, pattern) for pattern in patterns)

    return [owner for owner, members in groups.items() if hit(members, include) and not hit(members, exclude)]


def _by_granularity(granularity: str, owners: Sequence[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for owner in owners:
        label = {"layer": owner, "block": block_of(owner), "model": "model"}[granularity]
        grouped.setdefault(label, []).append(owner)
    return grouped


def block_of(name: str) -> str:
    """The repeated block a layer belongs to: its name up to the first number, or else its parent module."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return ".".join(parts[:-1]) or name


def _kind(path: str, owner: str, kinds: Mapping[str, str]) -> str:
    if owner not in kinds:
        raise ConfigError(
            f"{path}.choices", f"are given by kind, and {owner} is no layer of one", "give one list for all"
        )
    return kinds[owner]


def _check_kernels(method: Method, kinds: Mapping[str, str], runtimes: Mapping[str, Runtime]) -> None:
    """Keys named `bits` and `clusters` are a layer's widths, whatever the method: every runtime must take them."""
    for knob in method.deciding + method.others:
        if knob.key == "clusters":
            counts = [n for n in knob.choices if isinstance(n, int) and n > 0]
            for bits in sorted({(n - 1).bit_length() for n in counts}):
                _check_width(method, knob, CODEBOOK, bits, runtimes)
        for kind in sorted({kinds[owner] for owner in knob.owners}) if knob.key == "bits" else ():
            for width in knob.choices:
                if not isinstance(width, int):
                    raise ConfigError(f"compressor.{method.name}.space.bits", f"{width!r} is no width", "give 8 or 32")
                _check_width(method, knob, kind, width, runtimes)


def _check_width(method: Method, knob: Knob, kind: str, bits: int, runtimes: Mapping[str, Runtime]) -> None:
    for runtime in runtimes.values():
        if runtime.support(kind, bits) is Support.REFUSED:
            possible = [b for b in (2, 3, 4, 6, 8, 16, 32) if runtime.support(kind, b) is not Support.REFUSED]
            raise ConfigError(
                f"compressor.{method.name}.space.{knob.key}",
                f"{bits} bits for {kind} layers ({knob.owners[0]}) has no kernel in {runtime.name}",
                f"{runtime.name} takes {possible} for {kind}; or leave {runtime.name} out of runtime=[...]",
            )
