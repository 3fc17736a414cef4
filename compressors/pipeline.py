"""Turns a plan into an artifact by running its steps in stage order; knows no method by name and writes no file."""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compressors.assistant import assistant_plan
from compressors.errors import Infeasible
from compressors.plan import CompressionPlan, Scalar, Settings, Step, digest

Batch = tuple[tuple[Tensor, ...], Tensor | None]
"""Model inputs and, where there are labels, the target; the first axis of every tensor is the batch."""

CALIBRATIONS = ("minmax", "percentile", "entropy", "mse")
"""How the range of an activation follows from the values that calibration showed."""

KERNELS = {("conv", 8), ("linear", 4), ("linear", 8)}
"""What runtimes have kernels for, by kind and bits; at other widths weights are only stored, and nothing is faster."""

Achieved = Mapping[str, Settings]
"""What one method really did, per layer; a method without layers reports under the empty name."""


class Stage(IntEnum):
    """The order in which methods run: prepare, take parts out, replace layers, hold weights, recover, change numbers.

    What prepares trains the whole model and leaves its shape: all plans that prepare it alike begin with the same
    weights. What takes parts out goes by the layers of the uncompressed model, and so comes before what replaces them.
    """

    PREPARE = -1
    STRUCTURE = 0
    REPLACE = 1
    MASK = 2
    RECOVER = 3
    NUMERIC = 4


CHANGES = (Stage.STRUCTURE, Stage.REPLACE, Stage.MASK)
"""What is done to a model before it trains; it is quick, and done anew where only the trained weights are stored."""


@dataclass(frozen=True)
class Context:
    """What a compressor may look at besides the model: never the validation or test split.

    `loss` takes `(output, target)` and gives a scalar; it is None where the data has no labels. `train` yields freshly
    shuffled (and augmented) batches, one pass a call; `calibration` always yields the same batches. `answers` gives the
    teacher's output, perhaps from memory; without it the teacher is asked. `imitation` takes the student's output, the
    teacher's and a temperature, and gives a scalar; None is for logits, `distillation_loss` in compressors/recovery.py.
    `between_rounds` hears, before every round of a `Growing` method but the first, where this leads and what was
    achieved by then; it may raise to end it. `shared` is entered around work that other plans will find done:
    assistants, parents and what prepares. `prepared` is there once a model was trained before anything is taken out of
    it.
    """

    teacher: nn.Module
    example: tuple[Tensor, ...]
    train: Callable[[], Iterable[Batch]]
    calibration: Callable[[], Iterable[Batch]]
    loss: Callable[[Tensor, Tensor], Tensor] | None
    progress: Callable[[str], None] = lambda _text: None
    answers: Callable[..., Tensor] | None = None
    imitation: Callable[[Tensor, Tensor, float], Tensor] | None = None
    between_rounds: "Callable[[Step, Achieved], None]" = lambda _step, _achieved: None
    shared: Callable[[], AbstractContextManager[None]] = nullcontext
    prepared: nn.Module | None = None

    @property
    def whole(self) -> nn.Module:
        """The model of which parts are taken out, with all of its parts and as it was before the first one went."""
        return self.teacher if self.prepared is None else self.prepared


@dataclass(frozen=True)
class LayerNumbers:
    """What a numeric compressor decided for one layer, to be placed by each runtime in its own graph.

    With `values` (int8 tensor in the weight's shape) and `scales` (`(out, groups)`; weight = value * scale, where group
    g covers `group_size` consecutive inputs of a row, or None all of them) the weights are stored as given; `offsets`
    (`(out, groups)`, where no activation is rounded by calibrated ranges) are added to them. At 8 bits
    without a `group_size`, where the runtime has a kernel, the activations are rounded too, by its own calibrated
    quantizer, and without `values` the weights as well; all else is computed in the rest precision, but that kernels
    for weights alone round their inputs to 8 bits as they come. With a `codebook`
    (float, at most `2 ** bits` entries) `values` are uint8 indices: weight = codebook[value]. `shift` `(out,)` is added
    to the layer's output.

    The last three tell the runtime's quantizer what to do at 8 bits: how ranges follow from calibration data (one of
    `CALIBRATIONS`), whether each output channel has a scale of its own, and whether the grid of an activation with
    values on both sides of zero has its middle there.
    """

    bits: int
    values: Tensor | None = None
    scales: Tensor | None = None
    group_size: int | None = None
    offsets: Tensor | None = None
    codebook: Tensor | None = None
    shift: Tensor | None = None
    calibration: str = "minmax"
    per_channel: bool = True
    symmetric: bool = False

    @property
    def weights_alone(self) -> bool:
        """Whether a kernel reads these weights as they are, and rounds what it multiplies them with as it comes."""
        return self.bits == 4 or self.group_size is not None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that take time to compute and space to keep."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Applied:
    """What one step really did: per requested layer, and the numbers to place if the step was numeric."""

    achieved: Achieved
    numbers: Mapping[str, LayerNumbers] = field(default_factory=dict)


class Compressor(Protocol):
    """One method. It changes `model` in place, or attaches numbers, and says what it achieved."""

    method: ClassVar[str]
    stage: ClassVar[Stage]
    off: ClassVar[tuple[str, Scalar]]
    """The deciding key and the value with which the method does nothing; its other keys then do not apply."""

    def groups(self, model: nn.Module, example: tuple[Tensor, ...]) -> Mapping[str, tuple[str, ...]]:
        """Owner -> the layers that must share its setting, itself first; empty for methods without per-layer keys."""

    def apply(self, model: nn.Module, step: Step, context: Context, seed: int) -> Applied:
        """Carry out one step; raises `Infeasible` when a setting cannot be realised on this model.

        In the numeric stage the model stays as it is, and what an owner gets depends on its own and the shared settings
        only: the pipeline keeps it and asks for the other owners alone.
        """


@runtime_checkable
class Growing(Compressor, Protocol):
    """A method of the RECOVER stage that gets to a step by way of smaller ones, so that more of it goes on from less.

    `apply` is the same as `advance` through all rounds from the start. A round that reaches so much of the deciding
    key reports that, and under `loss_after` it the training loss with which it ended.
    """

    def rounds(self, step: Step) -> tuple[Step, ...]:
        """The steps that are reached on the way, each holding all that came before it; the last one is `step`."""

    def advance(self, model: nn.Module, step: Step, since: Step | None, context: Context, seed: int) -> Applied:
        """Carry a model that has had the round `since` (None: nothing) on to the next one, `step`.

        What comes of it depends on the model's state and the arguments alone. What this round achieved replaces, key
        by key, what those before it did.
        """

    def between(self) -> Step | None:
        """What a model is given after whole modules were taken out and before more is cut; None is nothing.

        It is the same for every plan, so that many of them begin with the weights of one parent.
        """


def loss_after(amount: Scalar) -> str:
    """Under which key a round reports its loss, so that it is still known after the next one."""
    return f"loss_after_{amount}"


@runtime_checkable
class Removing(Compressor, Protocol):
    """A method of the STRUCTURE stage that takes whole modules out; it runs before the others of its stage."""

    def removed(self, step: Step) -> Collection[str]:
        """The names of the modules that are out, with all that was in them: no plan asks anything else of these."""


@runtime_checkable
class Holding(Compressor, Protocol):
    """A method of an earlier stage than RECOVER that holds weights while the model trains, and lets go afterwards."""

    def release(self, model: nn.Module) -> None:
        """Give the weights for good what they were held to: they are plain parameters again."""


@runtime_checkable
class Inserting(Compressor, Protocol):
    """A method of the RECOVER stage that puts modules in, without which weights stored behind it would not fit."""

    def insert(self, model: nn.Module, step: Step, example: tuple[Tensor, ...]) -> None:
        """Put in what `apply` would, which changes nothing as long as nothing is loaded into it."""


@dataclass(frozen=True)
class FloatModel:
    """A model in eval mode before its numbers are touched, and what each method so far achieved."""

    model: nn.Module
    achieved: Mapping[str, Achieved]


@dataclass(frozen=True)
class Artifact:
    """A compressed model that is not yet deployed.

    `model` holds the float weights after structure and recovery; `numbers` what each runtime must place in its graph.
    `prefix` is the digest of everything before the numeric stage: equal prefixes have equal float models.
    """

    model: nn.Module
    plan: CompressionPlan
    prefix: str
    achieved: Mapping[str, Achieved]
    numbers: Mapping[str, LayerNumbers]
    seconds: Mapping[str, float]


class PrefixStore(Protocol):
    """Keeps what plans have in common: float models by prefix, and numbers by prefix and key."""

    def recall(self, prefix: str) -> FloatModel | None:
        """The float model itself, if it is still in memory; nobody may change it."""

    def remember(self, prefix: str, made: FloatModel) -> None:
        """Keep the float model in memory, for the next plan that differs only in numbers."""

    def load(self, prefix: str, model: nn.Module) -> Mapping[str, Achieved] | None:
        """Put the stored weights into `model` and return what each recovery method achieved, or None if not stored."""

    def save(self, prefix: str, model: nn.Module, achieved: Mapping[str, Achieved]) -> None:
        """Keep the weights of `model` and what each recovery method achieved."""

    def keep(self, prefix: str) -> None:
        """Let go of nothing that is stored under this prefix while the store is open."""

    def load_numbers(self, prefix: str, key: str) -> Applied | None:
        """What was made of one owner, or None if not stored."""

    def save_numbers(self, prefix: str, key: str, applied: Applied) -> None:
        """Keep what was made of one owner."""


def compress(
    model: nn.Module,
    plan: CompressionPlan,
    compressors: Mapping[str, Compressor],
    context: Context,
    store: PrefixStore | None = None,
) -> Artifact:
    """Run the plan's steps on a copy of `model` in stage order; the given model is left untouched."""
    run = _Run(model, plan, compressors, context, store or _Nothing())
    made = run.float_model()
    numeric = {step.method: run.numbers(made.model, step) for step in run.of_stages(Stage.NUMERIC)}
    achieved = {**made.achieved, **{method: applied.achieved for method, applied in numeric.items()}}
    # Sorted, because files must not tell which of them were stored.
    return Artifact(made.model, plan, run.prefix, achieved, dict(sorted(_numbers(numeric).items())), run.seconds)


def prefix_of(plan: CompressionPlan, compressors: Mapping[str, Compressor]) -> str:
    """The prefix that an artifact of this plan has."""
    return prefix_digest(_of_stages(plan, compressors, Stage.PREPARE, *CHANGES, Stage.RECOVER), plan.seed)


def trained_structure(plan: CompressionPlan, compressors: Mapping[str, Compressor]) -> str | None:
    """The structure that this plan recovers, whatever it makes of it afterwards; None where it trains nothing."""
    if not _of_stages(plan, compressors, Stage.RECOVER):
        return None
    return prefix_digest(_of_stages(plan, compressors, Stage.PREPARE, *CHANGES), plan.seed)


def prefix_digest(steps: Sequence[Step], seed: int) -> str:
    """The name of a float model: what was done to it before its numbers are touched; no steps means the original."""
    return digest([seed, *map(asdict, steps)]) if steps else ORIGINAL


ORIGINAL = "original"


def _of_stages(plan: CompressionPlan, compressors: Mapping[str, Compressor], *stages: Stage) -> list[Step]:
    return [step for stage in stages for step in plan.steps if compressors[step.method].stage == stage]


@dataclass(frozen=True)
class _Leg:
    """Recovery from `since` (None: the start of the method) to `step`, where the float model is called `prefix`."""

    prefix: str
    step: Step
    since: Step | None


class _Run:
    """The stages of one `compress` call."""

    def __init__(
        self,
        original: nn.Module,
        plan: CompressionPlan,
        compressors: Mapping[str, Compressor],
        context: Context,
        store: PrefixStore,
    ) -> None:
        self.original, self.plan, self.compressors = original, plan, compressors
        self.context, self.store = context, store
        self.whole = FloatModel(original, {})
        self.prefix = prefix_of(plan, compressors)
        self.seconds: dict[str, float] = {}
        self.assistants: dict[str, FloatModel] = {}

    def of_stages(self, *stages: Stage) -> list[Step]:
        return _of_stages(self.plan, self.compressors, *stages)

    def float_model(self) -> FloatModel:
        recalled = self.store.recall(self.prefix)
        if recalled is not None:
            return recalled
        structure, recovery = self.of_stages(*CHANGES), self.of_stages(Stage.RECOVER)
        self._prepare()
        model, achieved = self._cut(structure, ())
        way = list(self._way([*self.of_stages(Stage.PREPARE), *structure], recovery))
        passed, recovered, model = self._furthest(way, model)
        between = self._between(structure, recovery)
        if between and not passed:
            model, achieved = self._cut(structure, between)
        achieved.update(self._train(model, way[passed:], recovered, self.context.between_rounds))
        self._release(model, structure)
        made = FloatModel(model.eval().requires_grad_(False), achieved)
        self.store.remember(self.prefix, made)
        return made

    def _prepare(self) -> None:
        """The whole model becomes what the plan makes of it before anything is taken out."""
        steps = self.of_stages(Stage.PREPARE)
        if steps:
            # Trained anew elsewhere it might differ, and what other plans store of it would no longer fit.
            self.store.keep(prefix_digest(steps, self.plan.seed))
            model = copy.deepcopy(self.original).eval()
            with self.context.shared():
                self.whole = self._recover(model, (), steps)
            self.context = replace(self.context, prepared=model)

    def _cut(self, structure: Sequence[Step], between: Sequence[Step]) -> tuple[nn.Module, dict[str, Achieved]]:
        """A copy of another structure, trained `between` taking modules out and cutting what is left of them."""
        model, achieved = copy.deepcopy(self.whole.model).eval(), dict(self.whole.achieved)
        before = self.of_stages(Stage.PREPARE)
        for position, step in enumerate(structure, start=1):
            achieved[step.method] = self._apply(model, step).achieved
            before.append(step)
            if self._removes(step) and position < len(structure):
                with self.context.shared():
                    model = self._recover(model, before, between).model
        return model, achieved

    def _recover(self, model: nn.Module, before: Sequence[Step], steps: Sequence[Step]) -> FloatModel:
        """Train a model that has had the steps `before`, from where the store has it, or one that fits what it has."""
        way = list(self._way(before, steps))
        passed, recovered, model = self._furthest(way, model)
        return FloatModel(model, self._train(model, way[passed:], recovered))

    def _between(self, structure: Sequence[Step], recovery: Sequence[Step]) -> tuple[Step, ...]:
        """Nothing where there is no parent: no module is out, nothing else is cut, or nothing trains."""
        growing = [m for m in (self.compressors[step.method] for step in recovery) if isinstance(m, Growing)]
        step = growing[0].between() if growing and any(map(self._removes, structure[:-1])) else None
        return (step,) if step else ()

    def _release(self, model: nn.Module, structure: Sequence[Step]) -> None:
        for method in (self.compressors[step.method] for step in structure):
            if isinstance(method, Holding):
                method.release(model)

    def _removes(self, step: Step) -> bool:
        return isinstance(self.compressors[step.method], Removing)

    def numbers(self, model: nn.Module, step: Step) -> Applied:
        """What one numeric method gives; it is asked for what is not stored."""
        keys = {o: digest([step.method, o, s, step.shared, self.plan.seed]) for o, s in step.per_layer.items()}
        stored = [self.store.load_numbers(self.prefix, key) for key in keys.values()]
        known = {owner: found for owner, found in zip(keys, stored, strict=True) if found is not None}
        missing = replace(step, per_layer={o: s for o, s in step.per_layer.items() if o not in known})
        fresh = Applied({}) if known and not missing.per_layer else self._apply(model, missing)
        for owner, applied in self._with_tensors(model, missing, fresh):
            self.store.save_numbers(self.prefix, keys[owner], applied)
        return _merged(step, [fresh, *known.values()])

    def _with_tensors(self, model: nn.Module, step: Step, applied: Applied) -> Iterator[tuple[str, Applied]]:
        """By owner, what is worth storing."""
        if not any(numbers.tensors() for numbers in applied.numbers.values()):
            return
        groups = self.compressors[step.method].groups(model, self.context.example)
        for owner in step.per_layer:
            numbers = {layer: applied.numbers[layer] for layer in groups[owner] if layer in applied.numbers}
            if any(given.tensors() for given in numbers.values()):
                yield owner, Applied({owner: applied.achieved[owner]}, numbers)

    def _train(
        self,
        model: nn.Module,
        legs: Sequence[_Leg],
        achieved: dict[str, Achieved],
        between_rounds: Callable[[Step, Achieved], None] = lambda _step, _achieved: None,
    ) -> dict[str, Achieved]:
        """Leg by leg, each stored as it ends; what each method achieved, those of earlier legs included."""
        goals = {leg.step.method: leg.step for leg in legs}
        for leg in legs:
            method = leg.step.method
            before = achieved.get(method, {})
            if leg.since is not None:
                between_rounds(goals[method], before)
            made = self._advance(model, leg).achieved
            achieved[method] = {layer: {**before.get(layer, {}), **settings} for layer, settings in made.items()}
            self.store.save(leg.prefix, model, achieved)
        return achieved

    def _way(self, before: Sequence[Step], steps: Sequence[Step]) -> Iterator[_Leg]:
        done = list(before)
        for step in steps:
            method = self.compressors[step.method]
            rounds = method.rounds(step) if isinstance(method, Growing) else (step,)
            since: Step | None = None
            for end in rounds:
                yield _Leg(prefix_digest([*done, end], self.plan.seed), end, since)
                since = end
            done.append(step)

    def _furthest(self, way: Sequence[_Leg], model: nn.Module) -> tuple[int, dict[str, Achieved], nn.Module]:
        """How many legs are behind the stored weights of the model that is returned, `model` itself where that fits."""
        for passed in range(len(way), 0, -1):
            fitting = self._fitting(way[:passed], model)
            known = self.store.load(way[passed - 1].prefix, fitting)
            if known is not None:
                return passed, dict(known), fitting
        return 0, {}, model

    def _fitting(self, legs: Sequence[_Leg], model: nn.Module) -> nn.Module:
        """What weights that were stored behind these legs can be loaded into."""
        methods = ((self.compressors[leg.step.method], leg.step) for leg in legs)
        inserting = [(method, step) for method, step in methods if isinstance(method, Inserting)]
        fitting = copy.deepcopy(model) if inserting else model
        for method, step in inserting:
            method.insert(fitting, step, self.context.example)
        return fitting

    def _advance(self, model: nn.Module, leg: _Leg) -> Applied:
        method = self.compressors[leg.step.method]
        if not isinstance(method, Growing):
            return self._apply(model, leg.step)
        context = self._taught(leg.step)
        with self._working(leg.step):
            return method.advance(model, leg.step, leg.since, context, self.plan.seed)

    def _apply(self, model: nn.Module, step: Step) -> Applied:
        context = self._taught(step)
        with self._working(step):
            return self.compressors[step.method].apply(model, step, context, self.plan.seed)

    def _taught(self, step: Step) -> Context:
        """The context; where the step asks for an assistant, that is the teacher: another plan's float model."""
        plan = assistant_plan(self.plan, step, self.compressors)
        if plan is None:
            return self.context
        plan = replace(plan, steps=(*self.of_stages(Stage.PREPARE), *plan.steps))
        if plan.digest not in self.assistants:
            context = replace(self.context, between_rounds=lambda _step, _achieved: None, shared=nullcontext)
            run = _Run(self.original, plan, self.compressors, context, self.store)
            run.seconds = self.seconds
            with self.context.shared():
                self.assistants[plan.digest] = run.float_model()
        return replace(self.context, teacher=self.assistants[plan.digest].model, answers=None)

    @contextmanager
    def _working(self, step: Step) -> Iterator[None]:
        began = time.perf_counter()
        # The global generator is what dropout and data shuffling draw from; a fork keeps the caller's state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)
            yield
        self.seconds[step.method] = self.seconds.get(step.method, 0.0) + time.perf_counter() - began


def _numbers(numeric: Mapping[str, Applied]) -> dict[str, LayerNumbers]:
    """Of all methods, by layer; raises `Infeasible` where two of them decide about one layer."""
    numbers: dict[str, LayerNumbers] = {}
    decided: dict[str, str] = {}
    for method, applied in numeric.items():
        for layer, given in applied.numbers.items():
            if layer in decided:
                raise Infeasible(
                    f"{layer}: both {decided[layer]} and {method} decide about its weight; turn one of them off there"
                )
            decided[layer], numbers[layer] = method, given
    return numbers


def _merged(step: Step, parts: Sequence[Applied]) -> Applied:
    achieved = {name: settings for part in parts for name, settings in part.achieved.items()}
    numbers = {layer: given for part in parts for layer, given in part.numbers.items()}
    return Applied({owner: achieved[owner] for owner in step.per_layer} or achieved, numbers)


class _Nothing:
    """A store that keeps nothing."""

    def recall(self, prefix: str) -> None: ...

    def remember(self, prefix: str, made: FloatModel) -> None: ...

    def load(self, prefix: str, model: nn.Module) -> None: ...

    def save(self, prefix: str, model: nn.Module, achieved: Mapping[str, Achieved]) -> None: ...

    def keep(self, prefix: str) -> None: ...

    def load_numbers(self, prefix: str, key: str) -> None: ...

    def save_numbers(self, prefix: str, key: str, applied: Applied) -> None: ...
