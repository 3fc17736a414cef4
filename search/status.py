"""What the workers of a study are doing, read from its storage; it changes nothing but the wish to stop."""

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.table import Table

from compressors.errors import ConfigError
from search.address import shown
from search.sampler import REMAINING
from search.storage import (
    BUDGET,
    OWNER,
    SQLITE,
    STOP,
    at_work,
    counted,
    is_dead,
    open_storage,
    per_hour,
    running,
    snapshot,
    spent_s,
    state,
)


@dataclass(frozen=True)
class Worker:
    """A process that works on a trial; one that is not `alive` died at it. Another host's counts as alive."""

    process: str
    trial: int
    seconds: float
    alive: bool


@dataclass(frozen=True)
class Status:
    """Where a study stands.

    `states` counts trials, `front` are the numbers of those whose values nothing beats; `left` are trials and seconds
    of the budget, None for no limit; without a limit in time, the seconds are those of the trials that are left.
    """

    study: str
    workers: tuple[Worker, ...]
    states: dict[str, int]
    front: tuple[int, ...]
    per_hour: float | None
    left_trials: int | None
    left_s: float | None


def status(storage: str, name: str) -> Status:
    """Read it, against the budget of the worker that came last; `ConfigError` when there is no study of that name."""
    study = _study(storage, name)
    trials = snapshot(study)
    done = counted(trials)
    budget = study.user_attrs.get(BUDGET, {})
    left = None if budget.get("trials") is None else max(0, budget["trials"] - len(done))
    return Status(
        study=name,
        workers=tuple(_worker(trial) for trial in running(trials) if trial.user_attrs.get(OWNER)),
        states=dict(Counter(map(state, trials))),
        front=tuple(t.number for t in study.best_trials if "duplicate_of" not in t.user_attrs),
        per_hour=per_hour(done),
        left_trials=left,
        left_s=_left_s(study, trials, budget.get("minutes"), left),
    )


def stop(storage: str, name: str) -> int:
    """Have every worker end after its running trial; how many are at work."""
    study = _study(storage, name)
    study.set_user_attr(STOP, uuid.uuid4().hex)
    return len(at_work(snapshot(study)))


def show(found: Status, console: Console) -> None:
    """One table of workers, and lines of figures."""
    if found.workers:
        table = Table(title=f"workers of {found.study}", title_justify="left")
        for column in ("process", "trial", "for", "state"):
            table.add_column(column)
        for worker in found.workers:
            doing = "at work" if worker.alive else "gone: its trial will be taken up again"
            table.add_row(worker.process, str(worker.trial), _clock(worker.seconds), doing)
        console.print(table)
    else:
        console.print(f"{found.study}: no worker is at a trial")
    console.print("trials: " + (", ".join(f"{n} {name}" for name, n in sorted(found.states.items())) or "none yet"))
    front = ", ".join(map(str, found.front)) or "none yet"
    console.print(f"front, by values: trial {front}", highlight=False)
    pace = "unknown" if found.per_hour is None else f"{found.per_hour:.0f} an hour"
    left = [f"{found.left_trials} trials" if found.left_trials is not None else ""]
    left.append(_clock(found.left_s) if found.left_s is not None else "")
    console.print(f"pace: {pace}; left of the budget: {', '.join(filter(None, left)) or 'no limit'}", highlight=False)


def _study(storage: str, name: str) -> optuna.Study:
    problem = f"{name!r} is not in {shown(storage)}"
    remedy = "run its search first, or give another name"
    # Looking at a study makes no file.
    if storage.startswith(SQLITE) and not Path(storage.removeprefix(SQLITE)).exists():
        raise ConfigError("study", problem, remedy)
    try:
        return optuna.load_study(study_name=name, storage=open_storage(storage))
    except KeyError:
        raise ConfigError("study", problem, remedy) from None


def _left_s(
    study: optuna.Study, trials: Sequence[FrozenTrial], minutes: float | None, left: int | None
) -> float | None:
    """While workers are at it, what there was at the newest start less the time since; of trials, at their pace."""
    if minutes is None:
        pace = per_hour(counted(trials))
        return None if left is None or not pace else 3600 * left / pace
    whole_s = 60 * minutes
    active = at_work(trials)
    if not active or study.user_attrs.get(REMAINING) is None:
        return max(0.0, whole_s - spent_s(trials))
    since = time.time() - max(t.datetime_start.timestamp() for t in active if t.datetime_start)
    return max(0.0, float(study.user_attrs[REMAINING]) - since)


def _worker(trial: FrozenTrial) -> Worker:
    owner = str(trial.user_attrs[OWNER])
    began = trial.datetime_start.timestamp() if trial.datetime_start else time.time()
    return Worker(owner, trial.number, time.time() - began, alive=not is_dead(trial))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
