"""One run of the comparison: a search or a rival tool within a budget, and what came of it as JSON; compares nothing.

The process is started pinned to one core, with one thread: so its CPU time cannot exceed the wall time.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optuna
import safetensors.torch
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FixedTrial, FrozenTrial
from rich.console import Console

from compressors.errors import Infeasible
from compressors.plan import CompressionPlan, Step, Target
from evaluators.machine import machine, versions
from evaluators.measurement import Measurement
from evaluators.runtime import Deployed
from scripts.rivals.environment import PACKAGES as RIVALS
from scripts.rivals.environment import Environment, environment, script
from scripts.rivals.exchange import Entry, handed_in
from scripts.summary import save, with_hypervolumes
from search import build
from search.loop import run
from search.pareto import front
from search.progress import ProgressView
from search.study import Budget, Search, Watcher
from search.trial import Clock, TrialRecord
from search.view import View, describe
from search.workload import tensors_digest

ROOT = Path(__file__).parents[1]
OBJECTIVES = ("accuracy", "latency_ratio")
WORTHLESS = 0.95
FOREVER_S = 1e6


@dataclass(frozen=True)
class Task:
    """A workload's options; `relative`: quality counts as a share of the uncompressed network's on the same split."""

    options: tuple[str, ...]
    relative: bool


WORKLOADS = {
    "digits": Task(("model=resnet20", "data=digits"), relative=False),
    # The network itself has 92 %: against an absolute 95 % every version of it would be worthless.
    "fashion_mnist": Task(("model=resnet18", "data=fashion_mnist"), relative=True),
}


@dataclass(frozen=True)
class Job:
    """One run. `results` takes the JSON file and the log, `work` what is big: models for timing again, environments."""

    workload: str
    batch: int
    method: str
    seed: int
    budget_s: float | None
    trials: int | None
    options: tuple[str, ...]
    results: str
    work: str

    @property
    def name(self) -> str:
        """Unique among the jobs of one comparison."""
        return f"{self.workload}-b{self.batch}/{self.method}-{self.seed}"

    @property
    def file(self) -> Path:
        """Where the result goes."""
        return Path(self.results) / f"{self.name}.json"

    @property
    def models(self) -> Path:
        """Where the files of the front stay until they were timed again."""
        return Path(self.work) / "models" / self.name

    @property
    def command(self) -> str:
        """How to do it again; where the data lies does not matter."""
        limits = {"--budget": self.budget_s, "--trials": self.trials}
        words = [f"scripts/bench.py compare {self.workload} --methods {self.method} --seeds {self.seed}"]
        words += [f"--batch {self.batch}", *(f"{k} {v:g}" for k, v in limits.items() if v is not None)]
        return " ".join([*words, *(o for o in self.options if not o.startswith("data.folder="))])

    def seeded(self) -> list[str]:
        """What decides data and network: splits, weights and search all follow the seed."""
        seeds = (f"data.seed={self.seed}", f"model.training.seed={self.seed}", f"seed={self.seed}")
        return [*WORKLOADS[self.workload].options, *seeds, *self.options]

    def overrides(self, scratch: Path) -> list[str]:
        """The whole configuration of the search."""
        sampler = self.method if self.method not in (*RIVALS, "uniform") else "random"
        return [
            *self.seeded(),
            *("study=compare", f"sampler={sampler}", f"evaluator.latency.batch={self.batch}"),
            f"objectives=[{','.join(OBJECTIVES)}]",
            f"budget.trials={self.trials or 'null'}",
            f"budget.minutes={self.budget_s / 60 if self.budget_s else 'null'}",
            *(f"folder={scratch}/runs", f"cache={scratch}/cache"),
        ]


@dataclass(frozen=True)
class Finished:
    """A candidate in the order of its end: a record with files, or the reason why it does not count."""

    number: int
    digest: str
    elapsed_s: float
    record: TrialRecord | None
    reason: str | None = None

    @property
    def counts(self) -> bool:
        """Measured to the end."""
        return self.record is not None and self.reason is None

    def values(self) -> tuple[Measurement, ...]:
        """The objectives of one that counts."""
        assert self.record is not None  # noqa: S101  see `counts`
        return self.record.values(OBJECTIVES)


@dataclass(frozen=True)
class Outcome:
    """What the budget bought; `folders` has the deployed files by candidate number."""

    finished: Sequence[Finished]
    folders: Mapping[int, Path]
    seconds: Mapping[str, float]
    duplicates: int = 0
    error: str | None = None
    environment: Environment | None = None


def train(job: Job) -> None:
    """The network of this seed, kept in the usual cache, from where every method takes it."""
    config = build.compose(job.seeded())
    with ProgressView(Console(width=130), View()) as view:
        build.build_workload(config, Path(config.cache).expanduser(), view.training)


def perform(job: Job, began: float) -> None:
    """The whole run; `began` is the Unix time at which its process was started."""
    with TemporaryDirectory() as scratch, ProgressView(Console(width=130), View()) as view:
        search = build.build(_configured(job, Path(scratch)), view.training)
        rival = job.method in RIVALS
        outcome = _rival(job, search, Path(scratch)) if rival else searched(job, search, began, view)
        result = with_hypervolumes(written(job, search, outcome))
        search.workbench.close()
    save(result, job.file)


def _configured(job: Job, scratch: Path) -> DictConfig:
    """A cache with nothing in it but the trained networks: training of candidates is part of the budget."""
    config = build.compose(job.overrides(scratch))
    trained = Path(build.compose(job.seeded()).cache).expanduser().absolute() / "trained"
    (scratch / "cache").mkdir()
    (scratch / "cache" / "trained").symlink_to(trained)
    return config


# -- A search of our own


def searched(job: Job, search: Search, began: float, watch: Watcher) -> Outcome:
    """Run it until its budget is spent or its trials are done; a trial that ends after the budget does not count."""
    left = None if job.budget_s is None else max(0.01, began + job.budget_s - time.time()) / 60
    trials = _uniform_plans(search) if job.method == "uniform" else job.trials
    found = run(replace(search, budget=Budget(trials, left)), watch)
    seconds = {"wall": time.time() - began, "cpu": _cpu_s()}
    study = optuna.load_study(study_name=search.name, storage=search.storage)
    records = {record.number: record for record in found.records}
    known = [t for t in study.trials if t.number in records or {"error", "missed"} & set(t.user_attrs)]
    finished = sorted((_finished(t, records.get(t.number), began, job) for t in known), key=lambda f: f.elapsed_s)
    duplicates = sum("duplicate_of" in t.user_attrs for t in study.trials)
    folders = {f.number: search.tracker.model_folder(records[f.number]) for f in finished if f.counts}
    return Outcome(finished, folders, seconds, duplicates)


def _uniform_plans(search: Search) -> int:
    """How many different plans come before any sampler's own."""
    answers = (*search.space.baselines(), *search.space.uniform())
    return len({search.space.sample(FixedTrial(a)).digest for a in answers})


def _finished(trial: FrozenTrial, record: TrialRecord | None, began: float, job: Job) -> Finished:
    ended = trial.datetime_complete.timestamp() if trial.datetime_complete else time.time()
    told = trial.user_attrs
    stopped = told.get("stopped")
    reason = told.get("infeasible") or (f"stopped: {stopped}" if stopped else told.get("error") or told.get("missed"))
    if reason is None and job.budget_s is not None and ended - began > job.budget_s:
        reason = "ended after the budget"
    return Finished(trial.number, str(told.get("digest")), ended - began, record, reason)


def _cpu_s() -> float:
    """Of this process and of those it waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


# -- A rival tool


def _rival(job: Job, search: Search, scratch: Path) -> Outcome:
    """Run the tool on the same core for the same time; what it handed in by then is measured as ours is."""
    made = environment(job.method, Path(job.work) / "environments")
    inputs, output = scratch / "inputs", scratch / "output"
    output.mkdir()
    error, seconds = made.error, {"wall": 0.0, "cpu": 0.0}
    began = time.time()
    if error is None:
        _export(job, search, inputs)
        before, began = _cpu_s(), time.time()
        deadline = began + (job.budget_s or FOREVER_S)
        words = (made.python, script(job.method), inputs, output, deadline)
        error = run_tool(list(map(str, words)), job.budget_s)
        seconds = {"wall": time.time() - began, "cpu": _cpu_s() - before}
    entries = list(enumerate(handed_in(output)))
    reference = search.workbench.reference(search.reference, Clock())
    finished = [_measured(search, reference, number, entry, output, began) for number, entry in entries]
    folders = {number: output / entry.folder for number, entry in entries}
    return Outcome(finished, folders, seconds, error=error, environment=made)


def run_tool(command: Sequence[str], budget_s: float | None) -> str | None:
    """Run it in a session of its own, so that all it starts ends with it; its error, and being cut off is none."""
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    try:
        code = process.wait(timeout=budget_s)
    except subprocess.TimeoutExpired:
        code = 0
    finally:
        _end(process)
    return f"ended with exit code {code}, see the log" if code else None


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _export(job: Job, search: Search, inputs: Path) -> None:
    """The network and all splits but the test split, as `exchange.py` describes them."""
    inputs.mkdir()
    bench = search.workbench
    splits = bench.workload.splits
    shutil.copy(bench.reference(search.reference, Clock()).folder / "model.onnx", inputs)
    safetensors.torch.save_model(bench.workload.model, str(inputs / "weights.safetensors"))
    network = dict(OmegaConf.create(search.config).model.network)
    about = {
        "network": str(network.pop("_target_")).rpartition(".")[2],
        "arguments": {**network, "classes": len(splits.classes), "channels": bench.workload.example[0].shape[1]},
        "batch": job.batch,
        "augment": getattr(splits.augment, "keywords", {}),
    }
    (inputs / "about.json").write_text(json.dumps(about))
    for name, split in splits.named().items():
        if name != "test" and split.targets is not None:
            np.savez(inputs / f"{name}.npz", inputs=split.inputs[0].numpy(), targets=split.targets.numpy())


def _measured(search: Search, reference: Deployed, number: int, entry: Entry, output: Path, began: float) -> Finished:
    """By the evaluators that judge our own candidates."""
    bench = search.workbench
    plan = CompressionPlan(Target(entry.runtime, entry.precision), (Step(entry.what),))
    examples = bench.examples("validation")
    deployed = Deployed(bench.runtimes[entry.runtime], output / entry.folder, entry.precision, ())
    try:
        measurements = [m for e in bench.evaluators.values() for m in e.measure(deployed, reference, examples)]
    except Infeasible as infeasible:
        if infeasible.transient:
            raise  # a busy machine must not count against the tool: there will be no result, and it is run again
        return Finished(number, plan.digest, entry.at - began, None, infeasible.reason)
    record = TrialRecord(number, plan, tuple(measurements), None, {}, {}, bench.environment)
    return Finished(number, plan.digest, entry.at - began, record)


# -- What is written down


def written(job: Job, search: Search, outcome: Outcome) -> dict[str, Any]:
    """All of the result but the hypervolumes, which follow from it; the front's files go to `job.models`."""
    measured = [f for f in outcome.finished if f.counts]
    rows = [f.values() for f in measured]
    best = set(front([[replace(m, interval=(m.value, m.value)) for m in row] for row in rows]))
    job.models.mkdir(parents=True, exist_ok=True)
    reference = search.workbench.reference(search.reference, Clock())
    _keep(reference.folder, job.models / "reference")
    np.save(job.models / "inputs.npy", search.workbench.examples("validation").inputs[0][: job.batch])
    made = outcome.environment
    return {
        **{name: getattr(job, name) for name in ("workload", "batch", "method", "seed", "budget_s", "command")},
        "trials_wanted": job.trials,
        "machine": {**machine(), **versions()},
        "network": tensors_digest(search.workbench.workload.model.state_dict().values()),
        "installed": None if made is None else {"seconds": made.seconds, "versions": list(made.versions)},
        "error": outcome.error,
        "seconds": outcome.seconds,
        "scale": {split: _scale(job, search, reference, split) for split in ("validation", "test")},
        "trials": [_row(f) for f in outcome.finished],
        "duplicates": outcome.duplicates,
        "front": [_member(job, search, measured[i], outcome.folders, chosen=i in best) for i in front(rows)],
    }


def _scale(job: Job, search: Search, reference: Deployed, split: str) -> tuple[float, float]:
    """The quality that is worth nothing, and the ideal."""
    ideal = _quality(search, reference, split).value if WORKLOADS[job.workload].relative else 1.0
    return WORTHLESS * ideal, ideal


def _row(finished: Finished) -> dict[str, Any]:
    record = finished.record
    row = {"number": finished.number, "digest": finished.digest, "elapsed_s": round(finished.elapsed_s, 2)}
    row |= {"what": None if record is None else describe(record), "reason": finished.reason}
    if finished.counts:
        row |= dict(zip(("quality", "latency_ratio"), map(_numbers, finished.values()), strict=True))
    return row


def _member(job: Job, search: Search, finished: Finished, folders: Mapping[int, Path], chosen: bool) -> dict[str, Any]:
    """One member of the validation front; `chosen`: not even its bare values are beaten there."""
    record, folder = finished.record, folders[finished.number]
    assert record is not None  # noqa: S101  it counts
    target = record.plan.target
    deployed = Deployed(search.workbench.runtimes[target.runtime], folder, target.precision, ())
    _keep(folder, job.models / str(finished.number))
    return {
        **{k: v for k, v in _row(finished).items() if k not in ("elapsed_s", "reason")},
        **asdict(target),
        "bytes": deployed.bytes,
        "chosen": chosen,
        "test": _numbers(_quality(search, deployed, "test")),
        "again": None,
    }


def _quality(search: Search, deployed: Deployed, split: str) -> Measurement:
    (judge,) = (e for e in search.workbench.evaluators.values() if search.quality in {m.name for m in e.metrics()})
    measured = judge.measure(deployed, deployed, search.workbench.examples(split))
    return next(m for m in measured if m.name == search.quality)


def _numbers(measurement: Measurement) -> list[float]:
    return [round(x, 6) for x in (measurement.value, *measurement.interval)]


def _keep(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
