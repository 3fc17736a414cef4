"""Kills workers of one study at random moments and checks what is left; the seed decides the moments.

    .venv/bin/python -m tests.cluster.kills --folder /tmp/kills --kills 200 --seed 0

Workers run the real loop over a real storage and tracker, on a network and a runtime that take no time.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from evaluators.runtime import Runtime
from search.loop import run
from search.pareto import front
from search.space import build_space
from search.storage import RETRIES, counted, failed, open_storage
from search.study import Progress, Search
from search.tracking import Tracker
from tests.studies import CountingRuntime, make_search
from tests.zoo import images

LEDGER = "ledger"
RUNTIMES = [f"fake{number}" for number in range(8)]


def roomy_search(folder: Path, trials: int, storage: str | None, tracking: str | None, pause_s: float) -> Search:
    """Of 512 plans, more than any test tries, each of which takes about `pause_s`."""

    def before(_count: int) -> None:
        time.sleep(random.uniform(0.5, 1.5) * pause_s)  # noqa: S311  nothing secret about a pause

    plain = make_search(folder, trials)
    runtimes: dict[str, Runtime] = {name: CountingRuntime(name, before) for name in RUNTIMES}
    model, compressors = plain.workbench.workload.model, plain.workbench.compressors
    groups = {"quantize": compressors["quantize"].groups(model, (images(),))}
    bits = {"choices": [8, 32], "granularity": "layer"}
    space = build_space({"quantize": {"bits": bits}}, compressors, groups, plain.layers, runtimes)
    changes: dict[str, Any] = {"space": space, "workbench": replace(plain.workbench, runtimes=runtimes)}
    changes["fingerprint"] = {"model": "a", "space": space.digest}
    if storage:
        changes["storage"] = storage
    if tracking:
        changes["tracker"] = Tracker(tracking)
    return replace(plain, **changes)


def kill_at_random(
    make: Callable[[], Search], folder: Path, kills: int, seed: int, workers: int, longest_s: float
) -> int:
    """Start workers, kill each within `longest_s`, replace it, until so many died or the budget is spent; how many."""
    rng = random.Random(seed)  # noqa: S311  moments, not secrets

    def work() -> None:
        random.seed(os.getpid())
        run(make(), lambda progress: _note(folder, progress))

    alive: dict[int, float] = {}
    done = 0
    while done < kills:
        while len(alive) < workers:
            alive[start_worker(work, folder)] = time.monotonic() + rng.uniform(0, longest_s)
        pid = min(alive, key=lambda p: alive[p])
        time.sleep(max(0.0, alive.pop(pid) - time.monotonic()))
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, "a worker failed, see its log"
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
    while len(alive) < workers:
        alive[start_worker(work, folder)] = 0.0
    for pid in alive:
        assert os.waitpid(pid, 0)[1] == 0, "a worker that was left alone failed, see its log"
    return done


def start_worker(work: Callable[[], None], folder: Path) -> int:
    """A forked process, so that nothing has to be imported again, with a log in the folder; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(folder / "workers.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work()
        code = 0
    except BaseException:  # noqa: BLE001  whatever it is, it ends here and goes into the log
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _note(folder: Path, progress: Progress) -> None:
    """In the ledger: plans that Optuna was told of, written by whoever told, after it did."""
    if not progress.phase and progress.records:
        with (folder / LEDGER).open("a") as ledger:
            ledger.write(f"{progress.records[-1].plan.digest}\n")


def check(search: Search, folder: Path, trials: int) -> dict[str, int]:
    """Raises AssertionError where anything was lost, doubled or left; what there is, as numbers."""
    study = optuna.load_study(study_name=search.name, storage=open_storage(search.storage))
    everything = study.get_trials(deepcopy=False)
    done = counted(everything)
    assert len(done) == trials, f"the budget of {trials} trials was not met exactly: {len(done)}"
    assert not [t.number for t in everything if t.state is TrialState.RUNNING], "a trial was left running"
    complete = [t for t in done if t.state is TrialState.COMPLETE]
    digests = [digest_of(t) for t in complete]
    assert len(set(digests)) == len(digests), "a plan was counted twice"
    run_ = search.tracker.study(search.name)
    assert not search.tracker.open_trials(run_), "a run was left open in MLflow"
    records = search.tracker.records(run_)
    assert Counter(r.plan.digest for r in records) == Counter(digests), "Optuna and MLflow have other trials"
    ledger = set((folder / LEDGER).read_text().split())
    assert ledger <= set(digests), f"{len(ledger - set(digests))} completed trials were lost"
    values = {r.plan.digest: [m.value for m in r.values([o.name for o in search.objectives])] for r in records}
    assert all(values[digest_of(t)] == list(t.values) for t in complete), "a value differs"
    names = [o.name for o in search.objectives]
    best = {r.plan.digest for r in search.front(records)}
    assert best == {records[i].plan.digest for i in front([r.values(names) for r in records])}
    stored = json.loads((search.folder / search.name / "front.json").read_text())
    assert {row["digest"] for row in stored} == best, "front.json is not the front of the records"
    ended = [t for t in everything if t.state is TrialState.FAIL and "duplicate_of" not in t.user_attrs]
    gone = [t for t in ended if not failed(t)]
    assert all(len(t.system_attrs.get("retry_history", ())) <= RETRIES for t in everything)
    return {
        "counted": len(done),
        "complete": len(complete),
        "died too often": len(done) - len(complete),
        "taken up again": len(gone),
        "front": len(best),
    }


def digest_of(trial: FrozenTrial) -> str:
    """Of the plan that was tried."""
    return str(trial.user_attrs["digest"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the study, its ledger and the workers' log")
    parser.add_argument("--storage", help="default: SQLite in the folder")
    parser.add_argument("--tracking", help="default: SQLite in the folder")
    parser.add_argument("--study", default="kills")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds that a worker lives at most")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds that a trial takes, about")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    wanted.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    def make() -> Search:
        made = roomy_search(wanted.folder, wanted.trials, wanted.storage, wanted.tracking, wanted.pause)
        return replace(made, name=wanted.study)

    began = time.monotonic()
    if wanted.tracking is None:
        make().tracker.check()
    done = kill_at_random(make, wanted.folder, wanted.kills, wanted.seed, wanted.workers, wanted.longest)
    found = {"kills": done, "seed": wanted.seed, **check(make(), wanted.folder, wanted.trials)}
    print(json.dumps({**found, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
