"""Runs the comparison: one pinned process per method and seed, resumable; times fronts again; judges nothing."""

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from compressors.errors import ConfigError
from evaluators.evaluation import Examples
from evaluators.latency import Latency
from evaluators.runtime import Deployed, Runtime
from scripts.contestant import WORKLOADS, Job
from scripts.rivals.environment import PACKAGES as RIVALS
from scripts.summary import SEARCHES, save, with_hypervolumes
from search import build

ROOT = Path(__file__).parents[1]
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
# A load above this, before anything is timed, is somebody else's.
QUIET_LOAD = 0.5


def main(arguments: Sequence[str]) -> None:
    """`compare WORKLOAD --methods ... --seeds 0-4 ...`; what is there already is not run again."""
    wanted = _parsed(arguments)
    jobs = list(_jobs(wanted))
    if wanted.retime:
        retime(jobs)
        return
    pending = [job for job in jobs if not _is_done(job)]
    for job in {job.seed: job for job in pending}.values():
        _start("train", job)
    run_all(pending, wanted.jobs)


def run_all(jobs: Sequence[Job], at_once: int) -> None:
    """Each in a process pinned to a core of its own."""
    allowed = sorted(os.sched_getaffinity(0))
    if not 1 <= at_once <= len(allowed):
        raise ConfigError("--jobs", f"is {at_once}", f"give 1 to {len(allowed)}, one for each core")
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in allowed[-at_once:]:
        cores.put(core)

    def run(job: Job) -> None:
        core = cores.get()
        # Of this thread alone, and inherited by the process that it starts.
        os.sched_setaffinity(0, {core})
        job.file.parent.mkdir(parents=True, exist_ok=True)
        print(f"{time.strftime('%H:%M:%S')} {job.name} on core {core}", flush=True)
        with job.file.with_suffix(".log").open("w") as log:
            ended = _start("run", job, str(time.time()), stdout=log, stderr=subprocess.STDOUT, env=ONE_THREAD)
        cores.put(core)
        _forget_places(job.file.with_suffix(".log"), job.work)
        if ended:
            print(f"{job.name} ended with exit code {ended}, see {log.name}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, jobs))


def _forget_places(log: Path, work: str) -> None:
    """A log that is kept must not tell where things lay on one machine: tools print whole paths."""
    text = log.read_text().replace(work, "WORK")
    log.write_text(re.sub(rf"{re.escape(tempfile.gettempdir())}/{tempfile.gettempprefix()}\w+", "SCRATCH", text))


def retime(jobs: Sequence[Job]) -> None:
    """Read the latency of every front member again, each in a fresh process against ONNX Runtime fp32.

    Nothing else may run on the machine meanwhile. Members that were read again before are left alone.
    """
    if os.getloadavg()[0] > QUIET_LOAD:
        print(f"the load is {os.getloadavg()[0]:.1f}: something else is running, the readings will suffer", flush=True)
    for job in (job for job in jobs if job.file.exists()):
        result = json.loads(job.file.read_text())
        for member in result["front"]:
            member["again"] = member["again"] or _read_again(job, member)
        result = with_hypervolumes(result)
        save(result, job.file)
        print(f"{job.name}: test hypervolume {result['test_hypervolume']:.3f}", flush=True)


def _read_again(job: Job, member: dict[str, Any]) -> list[float]:
    inputs = np.load(job.models / "inputs.npy", allow_pickle=False)
    examples = Examples("validation", (inputs,), None, np.zeros((len(inputs), 1), np.float32))
    candidate = Deployed(_runtime(member["runtime"]), job.models / str(member["number"]), member["precision"], ())
    reference = Deployed(_runtime("onnxruntime"), job.models / "reference", "fp32", ())
    timer = Latency(batch=job.batch)
    try:
        ratio, _ = timer.measure(candidate, reference, examples)
    finally:
        timer.close()
    return [round(x, 6) for x in (ratio.value, *ratio.interval)]


def _runtime(name: str) -> Runtime:
    made: Runtime = build.make(f"runtime.{name}", build.compose([]).runtime[name])
    return made


def _start(command: str, job: Job, *more: str, env: dict[str, str] | None = None, **streams: Any) -> int:
    """`bench.py COMMAND JOB ...` in a process of its own; its exit code."""
    words = [sys.executable, str(ROOT / "scripts/bench.py"), command, json.dumps(asdict(job)), *more]
    return subprocess.run(words, env={**os.environ, **(env or {})}, check=False, **streams).returncode


def _is_done(job: Job) -> bool:
    """Refuses a result of another budget, which would be compared with the others as if it were one of them."""
    if not job.file.exists():
        return False
    known = json.loads(job.file.read_text())
    if (known["budget_s"], known["trials_wanted"]) != (job.budget_s, job.trials):
        problem = f"{job.file} has a budget of {known['budget_s']} s and {known['trials_wanted']} trials"
        raise ConfigError("--out", problem, "give another folder, or the same --budget and --trials")
    return True


def _jobs(wanted: argparse.Namespace) -> Iterator[Job]:
    """Seed by seed, so that a machine that changes during the day does so for every method."""
    methods = wanted.methods.split(",")
    for unknown in set(methods) - {*SEARCHES, *RIVALS}:
        raise ConfigError("--methods", f"{unknown!r} is none", f"use {', '.join((*SEARCHES, *RIVALS))}")
    for seed in _seeds(wanted.seeds):
        for method in methods:
            limits = (wanted.budget, wanted.trials, tuple(wanted.options))
            yield Job(wanted.workload, wanted.batch, method, seed, *limits, str(wanted.out), str(wanted.work))


def _seeds(text: str) -> list[int]:
    """`0-4` or `0,3`."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(word) for word in text.split(",")]


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts/bench.py compare", description=__doc__)
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("options", nargs="*", help="option=value of the search, such as data.folder=...")
    parser.add_argument("--methods", help=f"of {','.join((*SEARCHES, *RIVALS))}; default: the first {len(SEARCHES)}")
    parser.add_argument("--seeds", default="0-4", help="0-4 or 0,3: of splits, training and search")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=float, help="seconds of one core for each run, from its start")
    parser.add_argument("--trials", type=int, help="end after so many trials")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on a core of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/compare")
    parser.add_argument("--work", type=Path, default=Path("~/.cache/compareto/compare").expanduser())
    parser.add_argument("--retime", action="store_true", help="read the latencies of all methods' fronts again")
    wanted = parser.parse_intermixed_args(arguments)
    wanted.methods = wanted.methods or ",".join((*SEARCHES, *(RIVALS if wanted.retime else ())))
    if wanted.budget is None and wanted.trials is None:
        wanted.budget = 300.0
    return wanted
