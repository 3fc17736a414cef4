"""Many workers on trials that only take time: how much of it goes into asking, telling and waiting for each other.

    .venv/bin/python -m tests.cluster.scale --folder DIR --servers --workers 64 --trials 640 --seconds 30 --before 4400

A worker is the real loop with a real storage and tracker; a trial sleeps instead of compressing and measuring, so that
one machine can stand in for many. `--before` trials are there already, as in the last part of a long study.
"""

import argparse
import contextlib
import importlib
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial

from compressors.plan import CompressionPlan, LayerSpec
from evaluators.divergence import LOSS
from evaluators.measurement import exact
from evaluators.runtime import Deployed, Runtime
from search.loop import run
from search.records import record_to_json
from search.sampler import MEASURED_LOSS
from search.space import build_space
from search.storage import RECORD, counted, open_storage
from search.study import Budget, Search
from search.tracking import Tracker
from search.trial import Clock, Judge, TrialRecord
from tests.cluster.kills import start_worker
from tests.cluster.services import servers
from tests.studies import ACCURACY, RATIO, CountingRuntime, make_search, quiet

ASKS = "asks"


class Sleeper:
    """Carries out a plan by waiting; what it measures follows from the plan."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(
        self, number: int, plan: CompressionPlan, folder: Path, clock: Clock, judge: Judge | None
    ) -> tuple[TrialRecord, Deployed | None]:
        time.sleep(self.seconds)
        return record_of(number, plan), None

    def complete(self, record: TrialRecord, deployed: Deployed, clock: Clock) -> TrialRecord:
        return record

    def close(self) -> None: ...


def record_of(number: int, plan: CompressionPlan) -> TrialRecord:
    """The more layers in 8 bits, the faster and the worse; a little of both hangs on which."""
    int8 = [layer for step in plan.steps for layer, settings in step.per_layer.items() if settings["bits"] == 8]
    wobble = int(plan.digest, 16) % 1000 / 1e5
    loss = 0.01 * len(int8) + wobble
    measured = (exact(ACCURACY, 0.99 - loss), exact(RATIO, 1 / (1 + len(int8)) + wobble), exact(LOSS, loss))
    return TrialRecord(number, plan, measured, None, {"sleep": 1.0}, {}, {"cpu": "x"})


def knobs(count: int) -> tuple[LayerSpec, ...]:
    """So many layers that could be in 8 bits."""
    return tuple(LayerSpec(f"layer{n}", "conv", (16, 16, 3, 3), 2304, 100_000) for n in range(count))


def made(wanted: argparse.Namespace, folder: Path) -> Search:
    plain = make_search(folder, 1)
    layers = knobs(wanted.knobs)
    compressors = plain.workbench.compressors
    runtimes: dict[str, Runtime] = {"fake": CountingRuntime()}
    groups = {"quantize": {layer.name: (layer.name,) for layer in layers}}
    bits = {"choices": [8, 32], "granularity": "layer"}
    space = build_space({"quantize": {"bits": bits}}, compressors, groups, layers, runtimes)
    changes: dict[str, Any] = {"space": space, "layers": layers, "sparing": True}
    changes["fingerprint"] = {"model": "a", "space": space.digest}
    changes["budget"] = Budget(trials=wanted.before + wanted.trials)
    changes["sampler"] = lambda joined: optuna.samplers.RandomSampler(seed=joined)
    if wanted.storage:
        changes["storage"] = wanted.storage
    if wanted.tracking:
        changes["tracker"] = Tracker(wanted.tracking)
    return replace(plain, name=wanted.study, **changes)


def fill(search: Search, count: int) -> None:
    """Finished trials from before, as workers leave them in the storage; the tracker is not asked for them."""
    run(replace(search, budget=Budget(trials=1)), quiet)
    study = optuna.load_study(study_name=search.name, storage=open_storage(search.storage))
    template = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=10**6), directions=study.directions)
    for number in range(len(study.trials), count):
        trial = template.ask()
        record = record_of(number, search.space.sample(trial))
        values = [record.value(o.name).value for o in search.objectives]
        told = {
            "digest": record.plan.digest,
            MEASURED_LOSS: record.value(LOSS.name).value,
            RECORD: record_to_json(record),
        }
        study.add_trial(
            create_trial(values=values, params=trial.params, distributions=trial.distributions, user_attrs=told)
        )


def worker(search: Search, folder: Path, seconds: float, began: float) -> None:
    """The real loop with a sleeper; how long each ask took, waiting for its turn included, goes to a file."""
    loop: Any = importlib.import_module("search.loop")
    loop.Here = lambda *_: Sleeper(seconds)
    # What slept has no files that anybody could wait for at the end.
    loop._Loop.conclude = lambda _: None
    ask = loop._Loop._ask
    exclusively = loop.exclusively
    spent: list[tuple[float, float]] = []
    entered = [0.0]

    @contextlib.contextmanager
    def timed(url: str, what: str) -> Iterator[Any]:
        entered[0] = time.perf_counter()
        with exclusively(url, what) as held:
            yield held

    def asked(self: Any, *given: Any) -> Any:
        turn = time.perf_counter()
        found = ask(self, *given)
        spent.append((time.perf_counter() - turn, time.perf_counter() - entered[0]))
        return found

    loop._Loop._ask = asked
    loop.exclusively = timed
    run(search, quiet)
    with (folder / ASKS).open("a") as out:
        out.write(json.dumps({"pid": os.getpid(), "asks": spent, "wall": time.monotonic() - began}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--servers", action="store_true", help="start PostgreSQL and an MLflow server for it")
    parser.add_argument("--storage", help="default: SQLite in the folder")
    parser.add_argument("--tracking", help="default: SQLite in the folder")
    parser.add_argument("--study", default="scale")
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=640)
    parser.add_argument("--before", type=int, default=4400)
    parser.add_argument("--knobs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=30.0)
    wanted = parser.parse_args()
    wanted.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if wanted.servers:
        with servers() as (_, _, wanted.storage, _, wanted.tracking):
            simulate(wanted)
    else:
        simulate(wanted)


def simulate(wanted: argparse.Namespace) -> None:
    """Print what came of it."""
    search = made(wanted, wanted.folder)
    if not wanted.tracking:
        search.tracker.check()
    fill(search, wanted.before)
    began = time.monotonic()

    def work() -> None:
        worker(made(wanted, wanted.folder), wanted.folder, wanted.seconds, began)

    children = [start_worker(work, wanted.folder) for _ in range(wanted.workers)]
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    rows = [json.loads(line) for line in (wanted.folder / ASKS).read_text().splitlines()]
    study = optuna.load_study(study_name=search.name, storage=open_storage(search.storage))
    done = [t for t in counted(study.trials) if t.number >= wanted.before]
    asks, waits = zip(*(pair for row in rows for pair in row["asks"]), strict=True)
    print(json.dumps({**report(done, wanted), "ask_ms": spread(asks), "ask_with_waiting_ms": spread(waits)}))


def report(done: list[FrozenTrial], wanted: argparse.Namespace) -> dict[str, Any]:
    """Efficiency: of the workers' time between their first and last trials, the share spent in trials."""
    assert all(t.state is TrialState.COMPLETE for t in done)
    by_worker: dict[str, list[FrozenTrial]] = {}
    for trial in done:
        by_worker.setdefault(trial.user_attrs["owner"], []).append(trial)
    shares = []
    for own in by_worker.values():
        if len(own) > 1:
            starts = sorted(t.datetime_start.timestamp() for t in own if t.datetime_start)
            shares.append(wanted.seconds * (len(starts) - 1) / (starts[-1] - starts[0]))
    return {
        "workers": len(by_worker),
        "trials": len(done),
        "before": wanted.before,
        "trial_s": wanted.seconds,
        "knobs": wanted.knobs,
        "efficiency": round(statistics.mean(shares), 4),
        "worst_worker": round(min(shares), 4),
    }


def spread(seconds: tuple[float, ...]) -> dict[str, float]:
    """Median, 95th percentile and maximum, in milliseconds."""
    return {
        name: round(1000 * float(np.quantile(seconds, q)), 1) for name, q in (("p50", 0.5), ("p95", 0.95), ("max", 1))
    }


if __name__ == "__main__":
    main()
