"""A study's storage: opened, locked, its trials counted; it asks for no plan and tells no result."""

import copy
import fcntl
import functools
import hashlib
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from compressors.errors import ConfigError
from search.address import masked, shown
from search.database import PatientStorage, patient
from search.liveness import is_alive_here, is_gone

HEARTBEAT_S = 20
RETRIES = 2
WINDOW_S = 3600.0
SQLITE, POSTGRESQL = "sqlite:///", "postgresql"
BUDGET = "budget"
"""User attribute of a study: trials and minutes, as the worker that came last has them."""
STOP = "stop"
"""User attribute of a study: whoever sees it change ends after the trial at hand."""
CONCLUDED = "concluded"
"""User attribute of a study: at how many trials its champion was chosen last."""
JOINED = "joined"
"""User attribute of a study: how many workers ever joined it."""
OWNER = "owner"
"""User attribute of a running trial: the process that is at it; empty when it is nobody's turn."""
PUT_BACK = "put_back"
"""User attribute of a failed trial: its worker was interrupted and queued its parameters again itself."""
RECORD = "record"
"""User attribute of a finished trial: all that is known of it, for the other workers."""
TRIES = "tries"
"""User attribute of a trial that waits: how many processes died measuring it."""
WAITS = "waits"
"""User attribute of a running trial that is all but measured: the tracker's run that has its files."""


def open_storage(url: str) -> RDBStorage:
    """The storage, its tables made if need be; raises `ConfigError` at once where that does not work."""
    _check(url)
    try:
        if url.startswith(SQLITE):
            _prepare(Path(url.removeprefix(SQLITE)))
        # Two that make the tables of an empty database at once would collide.
        if url.startswith(POSTGRESQL):
            # From here on one is patient with it.
            _engine(url).connect().close()
        with quiet(), exclusively(url, "tables"):
            return PatientStorage(
                url,
                engine_kwargs={"pool_pre_ping": True, **_connecting(url)},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=6 * HEARTBEAT_S,
            )
    except (SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        problem = f"{shown(url)} cannot be opened ({masked(str(error).splitlines()[0], url)})"
        raise ConfigError("storage.url", problem, "check that it is reachable and writable") from error


def _check(url: str) -> None:
    """Only what a sweep survives on is taken."""
    if url.startswith((SQLITE, POSTGRESQL)):
        return
    remedy = "use sqlite:///FILE on one machine, postgresql+psycopg://USER@HOST/NAME on several"
    problem = f"{shown(url)} is neither SQLite nor PostgreSQL"
    if "grpc" in url or "journal" in url or url.endswith(".log"):
        problem = f"{shown(url)}: Optuna's journal and gRPC storages never take up the trial of a worker that died"
    raise ConfigError("storage.url", problem, remedy)


def _prepare(path: Path) -> None:
    """Write-ahead mode: readers never wait for a writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path, timeout=30) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    connection.close()


def _connecting(url: str) -> dict[str, Any]:
    """A server that lost its power says nothing: it is noticed after a minute."""
    alive = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
    return {"connect_args": alive} if url.startswith(POSTGRESQL) else {}


@contextmanager
def exclusively(url: str, what: str) -> Iterator[Callable[[], bool]]:
    """One at a time among all processes that use this storage, on any host; freed when its holder dies.

    Gives a function that says whether the lock is still held: a server that was restarted has freed it.
    """
    if url.startswith(SQLITE):
        path = Path(url.removeprefix(SQLITE))
        with path.with_name(f"{path.name}.{what}.lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield lambda: True
        return
    key = int.from_bytes(hashlib.sha256(f"compareto {what}".encode()).digest()[:8], "big", signed=True)
    connection = _locked(_engine(url), key)

    def held() -> bool:
        with suppress(SQLAlchemyError):
            connection.execute(sqlalchemy.text("SELECT 1"))
            return True
        return False

    try:
        yield held
    finally:
        # Closed, not kept for later: whatever happens here, the server frees it.
        with suppress(SQLAlchemyError):
            connection.close()


@functools.cache
def _engine(url: str) -> sqlalchemy.Engine:
    return sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool, **_connecting(url))


@patient
def _locked(engine: sqlalchemy.Engine, key: int) -> sqlalchemy.Connection:
    """A connection that holds the lock."""
    connection = engine.connect()
    # A holder that lost its power must not keep it for hours: the server looks after it too.
    looks = {"idle": "30", "interval": "10", "count": "3"}
    settings = ", ".join(f"set_config('tcp_keepalives_{name}', '{value}', false)" for name, value in looks.items())
    connection.execute(sqlalchemy.text(f"SELECT {settings}"))
    connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": key})
    return connection


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna calls heartbeats and metric names experimental, and wonders that we beat ourselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage is supposed", UserWarning)
        yield


@contextmanager
def concluding(url: str, name: str, trials: int) -> Iterator[bool]:
    """Whether nobody has concluded the study at so many trials yet; alone until that is done."""
    with exclusively(url, f"{name} conclusion"):
        study = optuna.load_study(study_name=name, storage=open_storage(url))
        mine = study.user_attrs.get(CONCLUDED) != trials
        yield mine
        if mine:
            study.set_user_attr(CONCLUDED, trials)


def snapshot(study: optuna.Study) -> list[FrozenTrial]:
    """All trials at this moment, nobody's to change. It reads those that run anew, so one serves a whole decision."""
    return study.get_trials(deepcopy=False)


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that used up budget: finished, not answered from an earlier one, not queued again for another worker."""
    done = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED) or failed(t)]
    return [t for t in done if "duplicate_of" not in t.user_attrs]


def failed(trial: FrozenTrial) -> bool:
    """Whether a trial is done with for good: it broke, or its process died for the last time allowed."""
    lives = len(trial.system_attrs.get("retry_history", ())) + 1
    died = lives > RETRIES and PUT_BACK not in trial.user_attrs
    return trial.state is TrialState.FAIL and (died or bool({"error", "missed"} & set(trial.user_attrs)))


def answered(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those whose plan need not be tried again: finished for a reason of the plan's own, or being measured now."""
    return [t for t in (*counted(trials), *running(trials)) if "missed" not in t.user_attrs]


def running(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that somebody is at, was at when it died, or that wait to be measured."""
    return [t for t in trials if t.state is TrialState.RUNNING]


def spent_s(trials: Sequence[FrozenTrial]) -> float:
    """Seconds in which at least one of the trials that count was under way."""
    spent, until = 0.0, 0.0
    for begin, end in sorted((_seconds(t.datetime_start), _seconds(t.datetime_complete)) for t in counted(trials)):
        spent += max(0.0, end - max(begin, until))
        until = max(until, end)
    return spent


def requeue(study: optuna.Study, number: int) -> None:
    """Give up a trial whose process died and queue its parameters again, at most `RETRIES` times over all its lives."""
    lost = snapshot(study)[number]
    # The callback adds to the trial's history in place, which is not ours; and what was known of it no longer holds.
    again = copy.deepcopy(lost)
    again.user_attrs = {}
    # In this order: whoever dies in between leaves one too many, which is answered as a repeated one.
    with quiet():
        RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, again)
    study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def dead(study: optuna.Study, trials: Sequence[FrozenTrial], silent: dict[int, float]) -> list[FrozenTrial]:
    """The running ones whose process has ended, or which had no heartbeat for long; those that only wait never do.

    `silent` remembers from one call to the next since when a trial has been without: after the storage was away, or
    this machine asleep, all are at first, and get the time to beat again.
    """
    stale = set(cast(RDBStorage, study._storage)._get_stale_trial_ids(study._study_id))
    now = time.monotonic()
    found = []
    for trial in running(trials):
        owner = trial.user_attrs.get(OWNER)
        if trial._trial_id not in stale or owner == "" or (owner and is_alive_here(owner)):
            silent.pop(trial._trial_id, None)
        elif now - silent.setdefault(trial._trial_id, now) > 2 * HEARTBEAT_S:
            found.append(trial)
            continue
        if is_dead(trial):
            found.append(trial)
    return found


def is_dead(trial: FrozenTrial) -> bool:
    """Whether the process that signed a running trial has ended; one of another host counts as alive."""
    owner = trial.user_attrs.get(OWNER)
    # Asked and signed under one lock: whoever holds it knows that nobody is still about to sign.
    return owner is None or (owner != "" and is_gone(owner))


def at_work(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that processes, none of them known to be gone, are carrying out now."""
    return [t for t in running(trials) if t.user_attrs.get(OWNER) and not is_dead(t)]


def waiting(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that are all but measured, and that nobody is measuring now."""
    return [t for t in running(trials) if WAITS in t.user_attrs and not t.user_attrs.get(OWNER)]


def unfinished(trials: Sequence[FrozenTrial]) -> int:
    """How many are being carried out, or wait to be measured."""
    return len(at_work(trials)) + len(waiting(trials))


def busy(url: str, name: str) -> int:
    """`unfinished` of a study that is not open here."""
    return unfinished(snapshot(optuna.load_study(study_name=name, storage=open_storage(url))))


def state(trial: FrozenTrial) -> str:
    """In the words of the documents."""
    told = trial.user_attrs
    if "duplicate_of" in told:
        return "repeated"
    if trial.state is TrialState.PRUNED:
        return "infeasible" if "infeasible" in told else "stopped early"
    if trial.state is TrialState.FAIL:
        return "failed" if failed(trial) else "given up and queued again"
    if trial.state is TrialState.RUNNING and WAITS in told and not told.get(OWNER):
        return "waiting to be measured"
    return {TrialState.COMPLETE: "measured", TrialState.RUNNING: "running"}.get(trial.state, "waiting")


def per_hour(done: Sequence[FrozenTrial]) -> float | None:
    """The pace of the last `WINDOW_S` in which any of them ended."""
    # Moments are compared as they are, and turned into seconds only of those that count: of thousands, that takes long.
    ended = [(t.datetime_complete, t.datetime_start) for t in done if t.datetime_complete]
    if not ended:
        return None
    last = max(end for end, _ in ended)
    since = last - timedelta(seconds=WINDOW_S)
    recent = [begin or since for end, begin in ended if end > since]
    first = max(min(recent), since)
    return 3600 * len(recent) / max((last - first).total_seconds(), 1e-3)


def _seconds(moment: datetime | None) -> float:
    return moment.timestamp() if moment else 0.0


def beat(study: optuna.Study, trial_id: int) -> None:
    """A sign of life for a trial."""
    cast(RDBStorage, study._storage).record_heartbeat(trial_id)  # there is no public way from a study to its storage


@contextmanager
def heartbeat(study: optuna.Study, trial_id: int) -> Iterator[None]:
    """Optuna beats only inside `study.optimize`; an ask-and-tell loop has to do it itself."""
    done = threading.Event()

    def go_on() -> None:
        while not done.wait(HEARTBEAT_S):
            # One that is missed, the next one makes good.
            with suppress(SQLAlchemyError, StorageInternalError):
                beat(study, trial_id)

    beat(study, trial_id)
    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
