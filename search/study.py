"""The study: asks Optuna for plans, has them carried out, tells it what came of them; resumes whatever was begun."""

import fcntl
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import optuna
from optuna.storages import fail_stale_trials
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState

from compressors.errors import ConfigError, Infeasible
from compressors.plan import CompressionPlan, LayerSpec, Scalar, Target
from evaluators.divergence import LOSS
from evaluators.measurement import Metric
from search.ladder import Ladder
from search.liveness import this_process
from search.runner import Broken, Carrier, Here, Limits, Runner
from search.sampler import EXPECTED, MEASURED_LOSS, PREVIEW, REMAINING
from search.select import Bound, Rule, front_of
from search.space import SearchSpace
from search.storage import (
    BUDGET,
    HEARTBEAT_S,
    STOP,
    answered,
    at_work,
    counted,
    heartbeat,
    is_dead,
    open_storage,
    per_hour,
    quiet,
    requeue,
    spent_s,
)
from search.tracking import StudyRun, Tracker, refuse_another
from search.trial import Clock, TrialRecord, Workbench

# So many repeated proposals in a row mean that the sampler has nothing new to say.
DUPLICATES_IN_A_ROW = 100
FRONT_FILE = "front.json"
# User attributes that hold for the plan, whichever trial it was measured in.
TOLD = {MEASURED_LOSS, PREVIEW, "infeasible", "stopped"}


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop: so many finished trials, or so many minutes of trials; None is no limit."""

    trials: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        """Refuses a search without an end."""
        if self.trials is None and self.minutes is None:
            raise ConfigError("budget", "has neither trials nor minutes", "set budget.trials=N or budget.minutes=M")
        for name, value in (("trials", self.trials), ("minutes", self.minutes)):
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"budget.{name}", f"is {value}", "give a finite number above 0")


@dataclass(frozen=True)
class Search:
    """Everything one search needs, built from its configuration.

    `sparing` leaves all but a few of the uniform plans to a sampler that knows better. With `limits`, trials run in a
    process of their own.
    """

    name: str
    workbench: Workbench
    layers: tuple[LayerSpec, ...]
    space: SearchSpace
    objectives: tuple[Metric, ...]
    bounds: tuple[Bound, ...]
    budget: Budget
    sampler: Callable[[int], optuna.samplers.BaseSampler]
    storage: str
    tracker: Tracker
    rule: Rule
    folder: Path
    fingerprint: Mapping[str, Scalar]
    config: str
    quality: str
    seed: int = 0
    sparing: bool = False
    ladder: Ladder | None = None
    limits: Limits | None = None

    @property
    def reference(self) -> Target:
        """The uncompressed model's place in the first runtime of the configuration: what latency is a ratio to."""
        runtime, precisions = next(iter(self.space.targets.items()))
        return Target(runtime, precisions[0])

    def front(self, records: Sequence[TrialRecord]) -> list[TrialRecord]:
        """The finished records within all bounds that nothing dominates."""
        return front_of(records, [metric.name for metric in self.objectives], self.bounds)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running study stands; `phase` is what the current trial does."""

    done: int
    records: Sequence[TrialRecord]
    front: Sequence[TrialRecord]
    phase: str
    elapsed_s: float
    duplicates: int
    budget: Budget


Watcher = Callable[[Progress], None]
"""Told of every change, from the searching thread; draws or prints it, and must be quick."""


@dataclass(frozen=True)
class Outcome:
    """What a study has so far, read back from the tracker, and why it ended; `others` are still at so many trials."""

    study: StudyRun
    records: tuple[TrialRecord, ...]
    front: tuple[TrialRecord, ...]
    ended: str
    others: int = 0


INTERRUPTED = "interrupted: the same command goes on from here"
STOPPED = "stopped on demand: the same command goes on from here"


def run(search: Search, watch: Watcher) -> Outcome:
    """Begin the study, or take it up where it was left, and carry it to its budget.

    Ctrl-C puts the running trial back into the queue and returns what there is; `ended` then says so.
    """
    loop = _Loop(search, watch)
    try:
        ended = loop.until_spent()
    except KeyboardInterrupt:
        ended = INTERRUPTED
    finally:
        loop.carrier.close()
    records = tuple(search.tracker.records(loop.run))
    return Outcome(loop.run, records, tuple(search.front(records)), ended, len(at_work(loop.study, search.storage)))


class _Loop:
    """One worker's run through the study."""

    def __init__(self, search: Search, watch: Watcher) -> None:
        self.search, self.watch = search, watch
        search.tracker.check(search.name)
        with _host_lock(search):
            self.study = _open_study(search)
        bench = search.workbench
        self.run = search.tracker.open_study(search.name, bench.workload.name, search.config, search.fingerprint)
        self._take(search.tracker.records(self.run))
        self.spent_before = spent_s(self.study)
        self.began = time.perf_counter()
        self.looked_after = -math.inf
        self.duplicates = 0
        self.stop = self.study.user_attrs.get(STOP)
        self.study.set_user_attr(BUDGET, asdict(search.budget))
        clock = Clock(watch=self._show)
        try:
            self.carrier: Carrier = (
                Runner(bench, search.reference, clock, search.limits)
                if search.limits
                else Here(bench, search.reference, clock)
            )
        except Infeasible as infeasible:
            remedy = "choose another runtime=[...] or another model"
            raise ConfigError("model", f"cannot be deployed as it is: {infeasible.reason}", remedy) from infeasible
        except Broken as broken:
            said = (broken.details.strip() or broken.reason).splitlines()[-1]
            problem = f"cannot be kept: the trials' process did not get ready ({said})"
            raise ConfigError("limits", problem, "mend that, or set limits=null") from broken

    def until_spent(self) -> str:
        """Trial after trial; says why it stopped."""
        in_a_row = 0
        while in_a_row < DUPLICATES_IN_A_ROW:
            # Counting, asking and signing are one act among the workers of a host: none overshoots the budget, and
            # none takes up a plan that another one is at.
            with _host_lock(self.search):
                if time.perf_counter() - self.looked_after > HEARTBEAT_S:
                    self._take_up_the_dead()
                ended = self._budget_spent()
                if ended:
                    return ended
                trial, plan, twin = self._ask()
            in_a_row = in_a_row + 1 if twin else 0
            if twin is None:
                self._one(trial, plan)
            else:
                self._tell_again(trial, twin)
        return f"space exhausted: {in_a_row} proposals in a row were plans already measured"

    def _budget_spent(self) -> str:
        if self.study.user_attrs.get(STOP) != self.stop:
            return STOPPED
        budget = self.search.budget
        done, elapsed = len(counted(self.study)), self._elapsed()
        running = len(self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        if budget.trials is not None and done + running >= budget.trials:
            elsewhere = f", {running} of them still running elsewhere" if running else ""
            return f"budget spent: {done + running} of {budget.trials} trials{elsewhere}"
        if budget.minutes is not None and elapsed >= 60 * budget.minutes:
            return f"budget spent: {elapsed / 60:.1f} of {budget.minutes:g} minutes, {done} trials"
        return ""

    def _ask(self) -> tuple[Trial, CompressionPlan, FrozenTrial | None]:
        """The next trial, signed; baselines and uniform plans that are still missing come before the sampler's own."""
        known = {t.user_attrs.get("digest") for t in answered(self.study)}
        space = self.search.space
        for answers in (*space.baselines(), *space.uniform(self.search.sparing)):
            if space.sample(FixedTrial(answers)).digest not in known:
                self.study.enqueue_trial(answers)
                break
        minutes = self.search.budget.minutes
        self.study.set_user_attr(REMAINING, None if minutes is None else 60 * minutes - self._elapsed())
        with quiet():
            trial = self.study.ask()
        trial.set_user_attr("owner", this_process())
        plan = space.sample(trial)
        twin = next((t for t in answered(self.study) if t.user_attrs.get("digest") == plan.digest), None)
        trial.set_user_attr("digest", plan.digest)
        return trial, plan, twin

    def _one(self, trial: Trial, plan: CompressionPlan) -> None:
        """Carry out and tell, unless a worker that died before it could tell Optuna had measured and recorded it."""
        record = self.search.tracker.find(self.run, plan.digest) or self._carry_out(trial, plan)
        if record is not None:
            self._tell(trial, record)

    def _carry_out(self, trial: Trial, plan: CompressionPlan) -> TrialRecord | None:
        """Run the plan with its tracker run open; the one place where any failure of a candidate is caught."""
        tracker, clock = self.search.tracker, Clock(watch=self._show)
        judge = self.search.ladder.judge(plan, self.records) if self.search.ladder else None
        run_id = tracker.start_trial(self.run, trial.number, plan)
        with tempfile.TemporaryDirectory() as folder, heartbeat(self.study, trial.number):
            try:
                record, deployed = self.carrier.run(trial.number, plan, Path(folder), clock, judge)
                record = tracker.finish_trial(run_id, replace(record, expected=self._expected(trial)), deployed)
            except KeyboardInterrupt:
                tracker.kill_trial(run_id)
                self.study.tell(trial, state=TrialState.FAIL)
                self.study.enqueue_trial(trial.params)
                raise
            except Infeasible as infeasible:
                # Of the moment, not of the plan: it may be tried again.
                tracker.fail_trial(run_id, clock.phase, infeasible.reason)
                trial.set_user_attr("missed", infeasible.reason)
                self.study.tell(trial, state=TrialState.FAIL)
                return None
            except Exception as error:  # noqa: BLE001  recording may fail too, on a full disk; the study goes on
                broken = error if isinstance(error, Broken) else Broken.of(error, "record")
                tracker.fail_trial(run_id, broken.stage, f"{broken.details.rstrip()}\n{broken.reason}")
                trial.set_user_attr("error", f"{broken.stage}: {broken.reason}")
                self.study.tell(trial, state=TrialState.FAIL)
                return None
        return record

    def _take(self, records: Sequence[TrialRecord]) -> None:
        """The front is asked for at every phase of a trial, and changes at its end only."""
        self.records = tuple(records)
        self.front = self.search.front(self.records)

    def _others(self) -> Sequence[TrialRecord]:
        """The records so far, read again when another worker has told of some that are not among them."""
        told = {t.number for t in counted(self.study) if t.state is not TrialState.FAIL}
        if told - {record.number for record in self.records}:
            return self.search.tracker.records(self.run)
        return self.records

    def _expected(self, trial: Trial) -> dict[str, float]:
        """Asked of the storage: the live trial does not see what the sampler wrote."""
        stored = self.study.get_trials(deepcopy=False)[trial.number]
        names = (metric.name for metric in self.search.objectives)
        return dict(zip(names, stored.user_attrs.get(EXPECTED, ()), strict=False))

    def _tell(self, trial: Trial, record: TrialRecord) -> None:
        """Values and constraints to Optuna, the standing of the study to the tracker and the watcher."""
        self._take([*(r for r in self._others() if r.number != record.number), record])
        for name, told in _told(record, [metric.name for metric in self.search.objectives]).items():
            trial.set_user_attr(name, told)
        measured = {m.name for m in record.measurements}
        for bound in self.search.bounds:
            if bound.metric in measured:
                trial.set_constraint(bound.metric, bound.violation(record))
        if not record.measured:
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self.study.tell(trial, [record.value(metric.name).value for metric in self.search.objectives])
        self._show("")
        self._log_progress()
        self._save_front()

    def _tell_again(self, trial: Trial, twin: FrozenTrial) -> None:
        """The same plan gets the same answer, without any work."""
        self.duplicates += 1
        trial.set_user_attr("duplicate_of", twin.number)
        for name in TOLD & set(twin.user_attrs):
            trial.set_user_attr(name, twin.user_attrs[name])
        for name, violation in twin.constraints.items():
            trial.set_constraint(name, violation)
        if twin.state is TrialState.COMPLETE:
            self.study.tell(trial, twin.values)
        else:
            # Infeasible, failed, or still being measured by another worker, who will tell.
            self.study.tell(trial, state=TrialState.PRUNED if twin.state is TrialState.PRUNED else TrialState.FAIL)

    def _take_up_the_dead(self) -> None:
        """Put trials of workers that are gone back into the queue, and close the runs they left open."""
        self.looked_after = time.perf_counter()
        with quiet():
            fail_stale_trials(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_dead(trial, self.search.storage):
                requeue(self.study, trial.number)
        running = {t.number for t in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}
        for left in self.search.tracker.open_trials(self.run):
            if left.number not in running:
                self.search.tracker.kill_trial(left.run_id)

    def _elapsed(self) -> float:
        return self.spent_before + time.perf_counter() - self.began

    def _show(self, phase: str) -> None:
        done = len(counted(self.study)) if not phase else len(self.records)
        self.watch(
            Progress(done, self.records, self.front, phase, self._elapsed(), self.duplicates, self.search.budget)
        )

    def _log_progress(self) -> None:
        on_front = self.front
        best = {
            f"best.{m.name}": (min if m.direction == "minimize" else max)(r.value(m.name).value for r in on_front)
            for m in self.search.objectives
            if on_front
        }
        left = self.study.user_attrs.get(REMAINING)
        standing = {
            "trials": len(self.records),
            "front": len(on_front),
            "workers": 1 + len(at_work(self.study, self.search.storage)),
            "trials_per_hour": per_hour(counted(self.study)) or 0.0,
            **({} if left is None else {"left_s": left}),
        }
        self.search.tracker.progress(self.run, len(self.records), {**standing, **best})

    def _save_front(self) -> None:
        """The best so far, on disk and in the tracker: whatever happens next, this is there."""
        text = json.dumps([_row(r, self.search.objectives) for r in self.front], indent=1)
        path = self.search.folder / self.search.name / FRONT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(text)
        fresh.replace(path)
        self.search.tracker.log_study_text(self.run, text, FRONT_FILE)


def _row(record: TrialRecord, objectives: Sequence[Metric]) -> dict[str, object]:
    values = {m.name: record.value(m.name) for m in objectives}
    measured = {name: {"value": m.value, "interval": m.interval} for name, m in values.items()}
    return {"trial": record.number, "digest": record.plan.digest, "files": record.artifact_uri, **measured}


def _told(record: TrialRecord, objectives: Sequence[str]) -> dict[str, object]:
    """What a sampler may learn beside values: the proxy's loss, and how far a trial without values came."""
    known = {m.name: m.value for m in record.measurements}
    told: dict[str, object] = {}
    if LOSS.name in known:
        told[MEASURED_LOSS] = known[LOSS.name]
    if record.infeasible is not None:
        told["infeasible"] = record.infeasible
    if record.stopped is not None:
        told["stopped"] = {"rung": record.stopped.rung, "reason": record.stopped.reason}
        told[PREVIEW] = {name: known[name] for name in objectives if name in known}
    return told


def _open_study(search: Search) -> optuna.Study:
    """Create or load; refuses a study that was begun with anything else than what is at hand now."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = open_storage(search.storage)
    study = optuna.create_study(
        storage=storage,
        study_name=search.name,
        directions=[metric.direction for metric in search.objectives],
        load_if_exists=True,
    )
    known = study.user_attrs.get("fingerprint")
    if known is None:
        study.set_user_attr("fingerprint", dict(search.fingerprint))
        with quiet():
            study.set_metric_names([metric.name for metric in search.objectives])
    else:
        refuse_another(search.name, known, search.fingerprint)
    study.sampler = search.sampler(len(study.get_trials(deepcopy=False)))
    return study


@contextmanager
def _host_lock(search: Search) -> Iterator[None]:
    """Asking and signing a trial is one act among the workers of a host."""
    search.folder.mkdir(parents=True, exist_ok=True)
    with (search.folder / f"{search.name}.lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
