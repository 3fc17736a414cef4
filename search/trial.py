"""One trial from plan to record: compress, deploy, measure; reads the workload, writes nothing but deployed files."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from compressors.errors import Infeasible
from compressors.pipeline import Artifact, Batch, Compressor, Context, compress, prefix_of
from compressors.plan import CompressionPlan, Scalar, Settings, Target
from evaluators.evaluation import Evaluator, Examples
from evaluators.measurement import Measurement
from evaluators.runtime import Deployed, Runtime
from search.cache import Cache
from search.workload import Workload


@dataclass(frozen=True)
class TrialRecord:
    """What is known of one trial after it ended: measurements, or the reason why there are none.

    `achieved` is method -> layer -> what was really done; `kernels` is operation -> the kernel that the runtime chose
    for it, where it tells. `artifact_uri` is where the deployed files lie, filled in by
    the tracker. Whether it is on the front is computed, never stored.
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
    """Seconds per phase, and the name of the phase that runs now."""

    seconds: dict[str, float] = field(default_factory=dict)
    phase: str = ""
    watch: Callable[[str], None] = lambda _phase: None

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
        self, number: int, plan: CompressionPlan, reference: Deployed, examples: Examples, folder: Path, clock: Clock
    ) -> tuple[TrialRecord, Deployed | None]:
        """Carry out one plan and leave its deployed files in `folder`; an infeasible one becomes a record too.

        Only what is of the moment and not of the plan, such as a machine too busy to time anything, is raised.
        """
        artifact = deployed = reason = None
        measurements: tuple[Measurement, ...] = ()
        kernels: Mapping[str, str] = {}
        try:
            artifact, deployed = self.realise(plan, folder, clock)
            measurements = self.measure(deployed, reference, examples, clock)
            with clock.timed("kernels"):
                kernels = deployed.runtime.kernels(deployed)
        except Infeasible as infeasible:
            if infeasible.transient:
                raise
            reason = infeasible.reason
        achieved = artifact.achieved if artifact else {}
        record = TrialRecord(number, plan, measurements, reason, clock.seconds, achieved, self.environment, kernels)
        return record, deployed

    def realise(self, plan: CompressionPlan, folder: Path, clock: Clock) -> tuple[Artifact, Deployed]:
        """Compress and deploy; `folder` must be empty."""
        context = self._context(clock)
        with self.store.in_use(prefix_of(plan, self.compressors)) if self.store else nullcontext():
            with clock.timed("compress"):
                artifact = compress(self.workload.model, plan, self.compressors, context, self.store)
            with clock.timed("deploy"):
                deployed = self.runtimes[plan.target.runtime].deploy(artifact, context, folder, self.cache)
        return artifact, deployed

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
        return Deployed(deployed.runtime, folder, deployed.precision, deployed.inputs)

    def measure(
        self, deployed: Deployed, reference: Deployed, examples: Examples, clock: Clock
    ) -> tuple[Measurement, ...]:
        """What every evaluator says of the deployed files."""
        measurements: list[Measurement] = []
        for name, evaluator in self.evaluators.items():
            with clock.timed(name):
                measurements.extend(evaluator.measure(deployed, reference, examples))
        return tuple(measurements)

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

    def close(self) -> None:
        """Let every evaluator give back what it holds, and the reference go."""
        if self.store:
            self.store.close()
        for evaluator in self.evaluators.values():
            evaluator.close()

    def _context(self, clock: Clock) -> Context:
        splits = self.workload.splits

        def train() -> Iterator[Batch]:
            for inputs, target in splits.train.batches(self.batch, shuffle=True):
                yield (tuple(map(splits.augment, inputs)) if splits.augment else inputs), target

        return Context(
            teacher=self.workload.model,
            example=self.workload.example,
            train=train,
            calibration=lambda: splits.calibration.batches(self.batch),
            loss=self.workload.task.loss,
            progress=lambda text: clock.watch(f"{clock.phase}: {text}"),
        )
