"""One trial from plan to record: compress, deploy, measure; reads the workload, writes nothing but deployed files."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from compressors.errors import Infeasible
from compressors.pipeline import Achieved, Artifact, Batch, Compressor, Context, compress, loss_after, prefix_of
from compressors.plan import CompressionPlan, Scalar, Settings, Step, Target
from compressors.teacher import Remembered
from evaluators.divergence import Divergence
from evaluators.evaluation import Evaluator, Examples, Feeding, Gradual, OfMachine
from evaluators.measurement import Measurement
from evaluators.runtime import Deployed, Runtime
from search.cache import Cache
from search.workload import Workload


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a candidate was given up before everything was measured: `metric`, on this `rung`, was within `interval`.

    The interval holds with the confidence that the ladder's stated error asks for, not with 95 %.
    """

    rung: str
    metric: str
    interval: tuple[float, float]
    reason: str


@dataclass(frozen=True)
class TrialRecord:
    """What is known of one trial after it ended: measurements, or the reason why there are none.

    A `stopped` one has measurements of what was known by then, some of them from a part of the examples or sessions.
    `achieved` is method -> layer -> what was really done; `kernels` is operation -> the kernel that the runtime chose
    for it, where it tells. `artifact_uri` is where the deployed files lie, filled in by
    the tracker. `expected` is what the sampler predicted of each objective when it proposed the plan, if it did.
    `shared_s` is how many of its seconds went into what other plans will find done.
    Whether it is on the front is computed, never stored.
    """

    number: int
    plan: CompressionPlan
    measurements: tuple[Measurement, ...]
    infeasible: str | None
    seconds: Mapping[str, float]
    achieved: Mapping[str, Mapping[str, Settings]]
    environment: Mapping[str, Scalar]
    kernels: Mapping[str, str] = field(default_factory=dict)
    artifact_uri: str | None = None
    stopped: Stop | None = None
    expected: Mapping[str, float] = field(default_factory=dict)
    shared_s: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether every evaluator had its full say; only such a trial can be on a front, a baseline or a champion."""
        return self.infeasible is None and self.stopped is None

    def value(self, metric: str) -> Measurement:
        """The measurement of that name; KeyError when it was not measured."""
        for measurement in self.measurements:
            if measurement.name == metric:
                return measurement
        raise KeyError(metric)

    def values(self, metrics: Sequence[str]) -> tuple[Measurement, ...]:
        """The measurements of these names, in this order."""
        return tuple(map(self.value, metrics))


@dataclass
class Clock:
    """Seconds per phase, and the name of the phase that runs now; and those of any phase that other plans share."""

    seconds: dict[str, float] = field(default_factory=dict)
    phase: str = ""
    watch: Callable[[str], None] = lambda _phase: None
    shared_s: float = 0.0

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Account for one phase; it stays named in `phase` if it raises."""
        self.phase = phase
        self.watch(phase)
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Account for work within a phase that other plans will find done."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.shared_s += time.perf_counter() - began


@dataclass(frozen=True)
class Look:
    """What is known of a candidate at one rung: measured for good, and previewed with `share` of the work."""

    rung: str
    final: Mapping[str, Measurement]
    previews: Mapping[str, Measurement] = field(default_factory=dict)
    share: float = 0.0

    @property
    def known(self) -> tuple[Measurement, ...]:
        """One measurement per metric, the better one where there are two."""
        return tuple({**self.previews, **self.final}.values())


@dataclass(frozen=True)
class Midway:
    """A candidate whose training has got to `done` of `wanted`, values of the method's deciding `key`, at this loss."""

    method: str
    key: str
    done: Scalar
    wanted: Scalar
    loss: float


class GivenUp(Exception):
    """Ends a candidate between two rounds of its training."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.reason)
        self.stop = stop


class Judge(Protocol):
    """Decides after every rung whether a candidate is worth more work."""

    @property
    def wanted(self) -> frozenset[str]:
        """The metrics that decide."""

    @property
    def shares(self) -> Sequence[float]:
        """How much of its work an evaluator does at each preview, growing."""

    def verdict(self, look: Look) -> Stop | None:
        """Why to stop here, or None to go on."""

    def midway(self, at: Midway) -> Stop | None:
        """The same of a candidate that is still being trained."""


@dataclass(frozen=True)
class Workbench:
    """What every trial of a study has in common.

    Runtimes keep what belongs to a prefix below `cache`, in the entries of `store`; without a store nothing is trained
    only once and nothing ever removed.
    """

    workload: Workload
    compressors: Mapping[str, Compressor]
    runtimes: Mapping[str, Runtime]
    evaluators: Mapping[str, Evaluator]
    environment: Mapping[str, Scalar]
    cache: Path
    store: Cache | None = None
    batch: int = 64

    def run(
        self,
        number: int,
        plan: CompressionPlan,
        reference: Deployed,
        examples: Examples,
        folder: Path,
        clock: Clock,
        judge: Judge | None = None,
    ) -> tuple[TrialRecord, Deployed | None]:
        """Carry out one plan and leave its deployed files in `folder`; an infeasible one becomes a record too.

        A `judge` may stop it early. Only what is of the moment and not of the plan, such as a machine too busy to time
        anything, is raised.
        """
        artifact = deployed = reason = stopped = None
        measurements: tuple[Measurement, ...] = ()
        kernels: Mapping[str, str] = {}
        try:
            artifact, deployed = self.realise(plan, folder, clock, judge)
            measurements, stopped = self._climb(deployed, reference, examples, clock, judge)
            if stopped is None:
                with clock.timed("kernels"):
                    kernels = deployed.runtime.kernels(deployed)
        except GivenUp as given_up:
            stopped = given_up.stop
        except Infeasible as infeasible:
            if infeasible.transient:
                raise
            reason = infeasible.reason
        achieved = artifact.achieved if artifact else {}
        record = TrialRecord(
            number,
            plan,
            measurements,
            reason,
            clock.seconds,
            achieved,
            self.environment,
            kernels,
            stopped=stopped,
            shared_s=clock.shared_s,
        )
        return record, deployed

    def realise(
        self, plan: CompressionPlan, folder: Path, clock: Clock, judge: Judge | None = None
    ) -> tuple[Artifact, Deployed]:
        """Compress and deploy; `folder` must be empty. Raises `GivenUp` when a `judge` stops the training."""
        context = self._context(clock, judge)
        with self.store.in_use(prefix_of(plan, self.compressors)) if self.store else nullcontext():
            with clock.timed("compress"):
                artifact = compress(self.workload.model, plan, self.compressors, context, self.store)
            with clock.timed("deploy"):
                deployed = self.runtimes[plan.target.runtime].deploy(artifact, context, folder, self.cache)
        return artifact, replace(deployed, parameters=sum(p.numel() for p in artifact.model.parameters()))

    def complete(
        self, record: TrialRecord, deployed: Deployed, reference: Deployed, examples: Examples, clock: Clock
    ) -> TrialRecord:
        """Measure what a record from another machine lacks, which is what only counts where the study measures."""
        known, kernels, reason = {m.name: m for m in record.measurements}, record.kernels, None
        try:
            for name, evaluator in self.evaluators.items():
                if not {metric.name for metric in evaluator.metrics()} <= known.keys():
                    with clock.timed(name):
                        known |= {m.name: m for m in evaluator.measure(deployed, reference, examples)}
            with clock.timed("kernels"):
                kernels = deployed.runtime.kernels(deployed)
        except Infeasible as infeasible:
            if infeasible.transient:
                raise
            reason = infeasible.reason
        return replace(
            record,
            measurements=self._in_order(known),
            seconds={**record.seconds, **clock.seconds},
            environment=self.environment,
            kernels=kernels,
            infeasible=reason,
        )

    def elsewhere(self) -> "Workbench":
        """The same on another machine than the study's: without what only counts there."""
        evaluators = {name: e for name, e in self.evaluators.items() if not isinstance(e, OfMachine)}
        return replace(self, evaluators=evaluators)

    def reference(self, target: Target, clock: Clock) -> Deployed:
        """The uncompressed model at `target`, kept in the cache: what latencies are ratios to."""
        if self.store:
            self.store.keep("reference")
        folder = self.cache / "reference" / target.runtime
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
            (Path(fresh) / "made").mkdir()
            _, deployed = self.realise(CompressionPlan(target), Path(fresh) / "made", clock)
            # Another process may be timing against the files that are there: equal ones stay in place.
            with suppress(OSError):
                (Path(fresh) / "made").rename(folder)
        return replace(deployed, folder=folder)

    def try_out(self, reference: Deployed, examples: Examples) -> None:
        """Call the uncompressed model as evaluators are going to; raises `Infeasible` where that fails.

        Otherwise each trial would be trained first and fail then, such as behind more words than the model has places.
        """
        for name, evaluator in self.evaluators.items():
            if isinstance(evaluator, Feeding):
                fed = evaluator.fed(reference, examples)
                try:
                    # Not kept loaded: it may be large.
                    reference.session(batch=None, threads=0)(*fed)
                except Exception as error:
                    shapes = ", ".join(str(x.shape) for x in fed)
                    problem = f"evaluator.{name} calls it with inputs of shape {shapes}, and it fails"
                    raise Infeasible(
                        f"{problem} ({(str(error).strip() or type(error).__name__).splitlines()[-1]})"
                    ) from error

    def measure(
        self, deployed: Deployed, reference: Deployed, examples: Examples, clock: Clock
    ) -> tuple[Measurement, ...]:
        """What every evaluator says of the deployed files."""
        measurements: list[Measurement] = []
        for name, evaluator in self.evaluators.items():
            with clock.timed(name):
                measurements.extend(evaluator.measure(deployed, reference, examples))
        return tuple(measurements)

    def _climb(
        self, deployed: Deployed, reference: Deployed, examples: Examples, clock: Clock, judge: Judge | None
    ) -> tuple[tuple[Measurement, ...], Stop | None]:
        """Rung by rung to the top, or to where the judge says stop; what was measured by then, in a fixed order."""
        stop = None
        for look in self._looks(deployed, reference, examples, clock, judge):
            stop = judge.verdict(look) if judge else None
            if stop:
                break
        return self._in_order({m.name: m for m in look.known}), stop

    def _in_order(self, known: Mapping[str, Measurement]) -> tuple[Measurement, ...]:
        order = [
            metric.name for evaluator in (*self.evaluators.values(), Divergence()) for metric in evaluator.metrics()
        ]
        return tuple(known[name] for name in order if name in known)

    def _looks(
        self, deployed: Deployed, reference: Deployed, examples: Examples, clock: Clock, judge: Judge | None
    ) -> Iterator[Look]:
        """What cannot be done in part and decides, then the proxy, previews, and all the rest; each look knows more."""
        wanted, shares = (judge.wanted, judge.shares) if judge else (frozenset(), ())
        deciding = {n: e for n, e in self.evaluators.items() if wanted & {metric.name for metric in e.metrics()}}
        gradual = {n: e for n, e in deciding.items() if isinstance(e, Gradual)}
        whole = {n: e for n, e in deciding.items() if n not in gradual}
        final: dict[str, Measurement] = {}

        def measure(name: str, evaluator: Evaluator, on: Examples) -> None:
            with clock.timed(name):
                final.update({m.name: m for m in evaluator.measure(deployed, reference, on)})

        for name, evaluator in whole.items():
            measure(name, evaluator, examples)
        yield Look("exact", final)
        measure("divergence", Divergence(), self._calibration)
        yield Look("proxy", final)
        for share in shares:
            previews: dict[str, Measurement] = {}
            for name, evaluator in gradual.items():
                with clock.timed(name):
                    previews |= {m.name: m for m in evaluator.preview(deployed, reference, examples, share)}
            yield Look(f"preview {100 * share:g} %", final, previews, share)
        for name, evaluator in self.evaluators.items():
            if name not in whole:
                measure(name, evaluator, examples)
        yield Look("full", final)

    def examples(self, split: str) -> Examples:
        """One split as arrays, with the uncompressed torch model's answers."""
        chosen = getattr(self.workload.splits, split)
        with torch.no_grad():
            original = torch.cat([self.workload.model(*inputs) for inputs, _ in chosen.batches(self.batch)])
        return Examples(
            split=split,
            inputs=tuple(x.numpy() for x in chosen.inputs),
            targets=None if chosen.targets is None else chosen.targets.numpy(),
            original=original.float().numpy(),
        )

    @cached_property
    def _teacher(self) -> Remembered:
        return Remembered(self.workload.model)

    @cached_property
    def _calibration(self) -> Examples:
        return self.examples("calibration")

    def close(self) -> None:
        """Let every evaluator give back what it holds, and the reference go."""
        if self.store:
            self.store.close()
        for evaluator in self.evaluators.values():
            evaluator.close()

    def _context(self, clock: Clock, judge: Judge | None) -> Context:
        splits = self.workload.splits

        def train() -> Iterator[Batch]:
            for inputs, target in splits.train.batches(self.batch, shuffle=True):
                yield splits.varied(inputs), target

        def between_rounds(step: Step, achieved: Achieved) -> None:
            at = self._midway(step, achieved)
            stop = judge.midway(at) if judge and at else None
            if stop:
                raise GivenUp(stop)

        return Context(
            teacher=self.workload.model,
            example=self.workload.example,
            train=train,
            calibration=lambda: splits.calibration.batches(self.batch),
            loss=self.workload.task.loss,
            progress=lambda text: clock.watch(f"{clock.phase}: {text}"),
            answers=self._teacher,
            imitation=self.workload.task.imitation,
            between_rounds=between_rounds,
            shared=clock.shared,
        )

    def _midway(self, step: Step, achieved: Achieved) -> Midway | None:
        key, reported = self.compressors[step.method].off[0], achieved[""]
        # A cache may hold the weights of a round from before losses were reported.
        if loss_after(reported[key]) not in reported:
            return None
        return Midway(step.method, key, reported[key], step.shared[key], float(reported[loss_after(reported[key])]))
