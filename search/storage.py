"""A study's storage: opened, its trials counted, its workers' pulse kept; it asks for no plan, tells no result."""

import sqlite3
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import cast

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from compressors.errors import ConfigError
from search.liveness import is_gone

HEARTBEAT_S = 20
RETRIES = 2
WINDOW_S = 3600.0
SQLITE = "sqlite:///"
BUDGET = "budget"
"""User attribute of a study: trials and minutes, as the worker that came last has them."""
STOP = "stop"
"""User attribute of a study: whoever sees it change ends after the trial at hand."""


def open_storage(url: str) -> RDBStorage:
    """SQLite is put into write-ahead mode, so that readers never wait for a writer."""
    try:
        if url.startswith(SQLITE):
            path = Path(url.removeprefix(SQLITE))
            path.parent.mkdir(parents=True, exist_ok=True)
            with sqlite3.connect(path, timeout=30) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            connection.close()
        with quiet():
            return RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=6 * HEARTBEAT_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
    except (SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "storage.url", f"{url} cannot be opened ({reason})", "check that it is reachable and writable"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna calls heartbeats and metric names experimental, and wonders that we beat ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed", UserWarning)
        yield


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that used up budget: finished, not answered from an earlier one, not given up by a dead worker."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [
        t
        for t in finished
        if "duplicate_of" not in t.user_attrs
        and (t.state is not TrialState.FAIL or {"error", "missed"} & set(t.user_attrs))
    ]


def answered(study: optuna.Study) -> list[FrozenTrial]:
    """Trials whose plan need not be tried again: finished for a reason of the plan's own, or being measured now."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [t for t in (*counted(study), *running) if "missed" not in t.user_attrs]


def spent_s(study: optuna.Study) -> float:
    """Seconds in which at least one of the trials that count was under way."""
    spent, until = 0.0, 0.0
    for begin, end in sorted((_seconds(t.datetime_start), _seconds(t.datetime_complete)) for t in counted(study)):
        spent += max(0.0, end - max(begin, until))
        until = max(until, end)
    return spent


def requeue(study: optuna.Study, number: int) -> None:
    """Give up a trial whose process died and queue its parameters again, at most `RETRIES` times over all its lives."""
    lost = next(t for t in study.get_trials(deepcopy=False) if t.number == number)
    lives = len(lost.system_attrs.get("retry_history", [])) + 1
    if lives > RETRIES:
        Trial(study, lost._trial_id).set_user_attr("error", f"its process died {lives} times")
    study.tell(number, state=TrialState.FAIL)
    with quiet():
        RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, lost)


def is_dead(trial: FrozenTrial, storage: str) -> bool:
    """Whether the process that signed a running trial has ended; one of another host counts as alive."""
    owner = trial.user_attrs.get("owner")
    # Asked and signed under one lock: in a file that one host owns, nobody can still be about to sign.
    return storage.startswith("sqlite") if owner is None else is_gone(owner)


def at_work(study: optuna.Study, storage: str) -> list[FrozenTrial]:
    """The trials that processes, none of them known to be gone, are carrying out now."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial for trial in running if not is_dead(trial, storage)]


def state(trial: FrozenTrial) -> str:
    """In the words of the documents."""
    told = trial.user_attrs
    if "duplicate_of" in told:
        return "repeated"
    if trial.state is TrialState.PRUNED:
        return "infeasible" if "infeasible" in told else "stopped early"
    if trial.state is TrialState.FAIL:
        return "failed" if {"error", "missed"} & set(told) else "given up and queued again"
    return {TrialState.COMPLETE: "measured", TrialState.RUNNING: "running"}.get(trial.state, "waiting")


def per_hour(done: Sequence[FrozenTrial]) -> float | None:
    """The pace of the last `WINDOW_S` in which any of them ended."""
    spans = [(_seconds(t.datetime_start), _seconds(t.datetime_complete)) for t in done]
    if not spans:
        return None
    last = max(end for _, end in spans)
    recent = [(begin, end) for begin, end in spans if end > last - WINDOW_S]
    first = max(min(begin for begin, _ in recent), last - WINDOW_S)
    return 3600 * len(recent) / max(last - first, 1e-3)


def _seconds(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0


@contextmanager
def heartbeat(study: optuna.Study, number: int) -> Iterator[None]:
    """Optuna beats only inside `study.optimize`; an ask-and-tell loop has to do it itself."""
    storage = cast(RDBStorage, study._storage)  # there is no public way from a study to its storage
    study_id = storage.get_study_id_from_name(study.study_name)
    trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            storage.record_heartbeat(trial_id)

    storage.record_heartbeat(trial_id)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
