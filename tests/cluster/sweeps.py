"""One real sweep, as a user would start it, whatever engine carries its workers; and what must be true afterwards."""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from search.storage import counted, open_storage
from search.tracking import Tracker
from tests.cluster.services import wait_until

ROOT = Path(__file__).parents[2]
STUDY = "resnet20-digits"
PREPARED = 4
# Connections of Optuna's storages, which have no way to be closed.
LEAKS = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
# Small enough that starting a worker takes longer than a trial; with training in the trials all the same.
QUICK = (
    "model.training.epochs=2",
    "compressor.distill.space.epochs.choices=[0,1]",
    "compressor.distill.parent=null",
    "evaluator.latency.sessions=2",
    "evaluator.latency.rounds=3",
    "sampler=random",
    "budget.minutes=null",
)


def words(folder: Path, trials: int, server: str) -> list[str]:
    """The options that all workers have in common."""
    places = [f"folder={folder}/runs", "storage=postgresql", "tracking=server", f"tracking.uri={server}"]
    return [*QUICK, *places, f"budget.trials={trials}"]


def environment(folder: Path, storage: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """For every command of the sweep."""
    return {
        **os.environ,
        **(more or {}),
        "COMPARETO_STORAGE": storage,
        "COMPARETO_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def prepare(folder: Path, server: str, env: Mapping[str, str]) -> None:
    """Train the network and measure the baselines before the sweep, so that the workers have something to share."""
    command = [sys.executable, "-m", "compareto", "search", *words(folder, PREPARED, server)]
    subprocess.run(command, env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=600)


def start(folder: Path, arguments: Sequence[str], env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """`compareto search`, with its output in a file."""
    command = [sys.executable, "-m", "compareto", "search", *arguments]
    with (folder / "search.log").open("ab") as log:
        return subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


@functools.cache
def _study(storage: str) -> optuna.Study:
    return optuna.load_study(study_name=STUDY, storage=open_storage(storage))


def wait_for_workers(storage: str, count: int, seconds: float) -> None:
    """Until so many have finished a trial: if one more has at the end, it was started later."""
    wait_until(lambda: len(workers(_study(storage).trials)) >= count, seconds, f"{count} workers with a trial each")


def workers(trials: Sequence[FrozenTrial]) -> set[str]:
    """The processes that finished a trial of the sweep; the one that prepared it had the first trials to itself."""
    done = [t for t in counted(trials) if t.state is not TrialState.FAIL]
    preparing = {t.user_attrs["owner"] for t in done if t.number < PREPARED}
    return {t.user_attrs["owner"] for t in done} - preparing


def check(storage: str, server: str, trials: int) -> dict[str, int]:
    """The budget was met exactly, nothing was lost, doubled or left open; what there is, as numbers."""
    study = _study(storage)
    everything = study.get_trials(deepcopy=False)
    done = counted(everything)
    assert len(done) == trials, f"{len(done)} trials count"
    assert not [t.number for t in everything if t.state is TrialState.RUNNING]
    tracker = Tracker(server)
    run = tracker.study(STUDY)
    assert not tracker.open_trials(run)
    told = {t.user_attrs["digest"] for t in done if t.state is not TrialState.FAIL}
    recorded = [r.plan.digest for r in tracker.records(run)]
    assert len(recorded) == len(set(recorded))
    assert set(recorded) == told
    again = [t for t in everything if t.system_attrs.get("retry_history")]
    return {"trials": len(done), "workers": len(workers(everything)), "taken up again": len(again)}


def wait_for_exit(process: "subprocess.Popen[bytes]", seconds: float, log: Path) -> None:
    """With its exit code 0."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < end, f"the sweep has not ended: {log.read_text()[-3000:]}"
        time.sleep(0.5)
    assert process.returncode == 0, log.read_text()[-3000:]
