"""One network that the literature names: a search by its experiment, and a table of what came of it and was there."""

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from optuna.trial import FixedTrial

from compressors.errors import ConfigError
from compressors.plan import CompressionPlan, Target
from evaluators.evaluation import Examples
from evaluators.measurement import Measurement
from evaluators.parameters import Parameters
from evaluators.runtime import Deployed, Runtime
from evaluators.stopwatch import own_environment
from scripts.eager import Eager
from search import build
from search.conclude import TEST_FILE, quality_of
from search.select import Smallest, baselines, choose
from search.study import Search
from search.trial import Clock, TrialRecord
from search.view import describe, quality_text

ROOT = Path(__file__).parents[1]
CASES = ("resnet50", "mobilenet_v3", "gpt", "smollm2")
UNCOMPRESSED, UNIFORM, CHAMPION, SMALLEST = (*("uncompressed", "uniform int8", "champion", "smallest within 1 point"),)
HEADINGS = (
    *("version", "quality on validation", "quality on test", "latency, of ONNX Runtime fp32", "faster than torch"),
    *("faster than uncompressed in its runtime", "size", "parameters"),
)


@dataclass(frozen=True)
class Version:
    """One row: what it is, what was measured on validation, the quality on test, and the weights of its network.

    `speed` names the latency that the search was about.
    """

    roles: tuple[str, ...]
    record: TrialRecord
    test: Measurement
    parameters: int
    speed: str = "latency_ratio"

    @property
    def latency(self) -> Measurement:
        """Against ONNX Runtime in fp32."""
        return self.record.value(self.speed)

    @property
    def runtime(self) -> str:
        """The name of what runs it."""
        return self.record.plan.target.runtime


def main(arguments: Sequence[str]) -> None:
    """`case NAME [option=value ...]`: search, or go on with it, then write `NAME.md` beside `NAME.log`."""
    parser = argparse.ArgumentParser("scripts/bench.py case", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("options", nargs="*", help="option=value of the search, such as data.folder=...")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/cases")
    wanted = parser.parse_intermixed_args(arguments)
    wanted.out.mkdir(parents=True, exist_ok=True)
    options = [f"experiment={wanted.case}", *wanted.options]
    with (wanted.out / f"{wanted.case}.log").open("a") as log:
        words = [sys.executable, "-m", "compareto", "search", *options]
        ended = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False, env=own_environment())
    if ended.returncode:
        raise ConfigError("case", f"its search ended with exit code {ended.returncode}", f"see the end of {log.name}")
    # Where things lie does not matter.
    told = [o for o in wanted.options if not o.startswith(("data.folder=", "folder=", "cache="))]
    command = " ".join(["scripts/bench.py case", wanted.case, *told])
    (wanted.out / f"{wanted.case}.md").write_text("\n".join(table(command, read(options))) + "\n")


def read(options: Sequence[str]) -> list[Version]:
    """The rows of a study that has ended; what it did not measure itself is measured now, and all of it on test."""
    search = build.build(build.compose(options), lambda _progress: None)
    study = search.tracker.study(search.name)
    if search.tracker.read_study_file(study, TEST_FILE) is None:
        raise ConfigError("study", f"{search.name} has not ended: it was stopped", "give the same command again")
    runtimes: dict[str, Runtime] = {**search.workbench.runtimes, "torch": _eager(search)}
    search = replace(search, workbench=replace(search.workbench, runtimes=runtimes))
    records = search.tracker.records(study)
    known = {record.plan.digest: record for record in records if record.measured}
    try:
        reference = search.workbench.reference(search.reference, Clock())
        examples = {split: search.workbench.examples(split) for split in ("validation", "test")}
        return [
            _version(search, tuple(roles), plan, known.get(plan.digest), reference, examples)
            for plan, roles in _wanted(search, records, search.tracker.champion(study))
        ]
    finally:
        search.workbench.close()


def _eager(search: Search) -> Eager:
    workload = search.workbench.workload
    shape = {"classes": len(workload.splits.classes), "channels": workload.example[0].shape[1]}
    network = OmegaConf.to_container(build.from_yaml(search.config).model.network, resolve=True)
    return Eager({**cast(dict[str, Any], network), **shape})


def _wanted(
    search: Search, records: Sequence[TrialRecord], champion: TrialRecord
) -> Iterator[tuple[CompressionPlan, Sequence[str]]]:
    """Every plan of the table once, with all that it is."""
    smallest = choose(records, Smallest(search.quality), [m.name for m in search.objectives], search.bounds).record
    named = [
        (UNCOMPRESSED, CompressionPlan(Target("torch", "fp32"))),
        *((UNCOMPRESSED, record.plan) for record in baselines(records)),
        *((UNIFORM, plan) for plan in uniform_int8(search)),
        (CHAMPION, champion.plan),
        (SMALLEST, smallest.plan),
    ]
    for plan in {plan.digest: plan for _, plan in named}.values():
        yield plan, [role for role, other in named if other.digest == plan.digest]


def uniform_int8(search: Search) -> Iterator[CompressionPlan]:
    """Every layer in 8 bits and nothing else, in each runtime at its fastest rest precision."""
    for answers in search.space.uniform():
        plan = search.space.sample(FixedTrial(answers))
        if [step.method for step in plan.steps] == ["quantize"]:
            (step,) = plan.steps
            if {settings["bits"] for settings in step.per_layer.values()} == {8}:
                yield plan


def _version(
    search: Search,
    roles: tuple[str, ...],
    plan: CompressionPlan,
    record: TrialRecord | None,
    reference: Deployed,
    examples: Mapping[str, Examples],
) -> Version:
    bench = search.workbench
    with tempfile.TemporaryDirectory() as folder:
        artifact, deployed = bench.realise(plan, Path(folder), Clock())
        if record is None:
            measured = bench.measure(deployed, reference, examples["validation"], Clock())
            record = TrialRecord(-1, plan, measured, None, {}, artifact.achieved, bench.environment)
        else:
            deployed = replace(deployed, folder=search.tracker.model_folder(record))
        (parameters,) = Parameters().measure(deployed, reference, examples["test"])
        quality = quality_of(search, deployed, examples["test"])
        return Version(roles, record, quality, int(parameters.value), search.rule.speed)


def table(command: str, versions: Sequence[Version]) -> Iterator[str]:
    """The lines of the page."""
    yield f"# `{command}`"
    yield ""
    yield f"| {' | '.join(HEADINGS)} |"
    yield "| " + " | ".join("---" for _ in HEADINGS) + " |"
    uncompressed = [version for version in versions if UNCOMPRESSED in version.roles]
    for version in versions:
        yield f"| {' | '.join(_cells(version, uncompressed))} |"
    yield ""
    yield (
        "Brackets are 95 % intervals of quality and 95 % bands of latency. Torch runs the network eagerly, and was "
        "timed in turns with ONNX Runtime fp32, as every version was. The last comparison is with the fastest "
        "precision of the same runtime. All choices were made on validation."
    )


def _cells(version: Version, uncompressed: Sequence[Version]) -> Iterator[str]:
    record, latency = version.record, version.latency
    best = " (the fastest uncompressed)" if version is min(uncompressed, key=_latency) else ""
    # Of an uncompressed one, the description says so.
    roles = [role for role in version.roles if role != UNCOMPRESSED]
    yield ": ".join([*filter(None, [", ".join(roles)]), describe(record) + best])
    yield quality_text(record.value(version.test.name))
    yield quality_text(version.test)
    yield f"{latency.value:.3f} [{latency.interval[0]:.3f}, {latency.interval[1]:.3f}]"
    yield faster(latency, next(other for other in uncompressed if other.runtime == "torch").latency)
    yield faster(latency, min((o for o in uncompressed if o.runtime == version.runtime), key=_latency).latency)
    yield f"{record.value('size_bytes').value / 1e6:.2f} MB"
    yield f"{version.parameters / 1e6:.2f} M"


def _latency(version: Version) -> float:
    return version.latency.value


def faster(one: Measurement, other: Measurement) -> str:
    """How many times as fast as the other, with the band of two readings that know nothing of each other."""
    if one is other:
        return "1x"
    value = other.value / one.value
    half = math.hypot(*(math.log(m.interval[1] / m.value) for m in (one, other)))
    return f"{value:.2f}x [{value * math.exp(-half):.2f}, {value * math.exp(half):.2f}]"
