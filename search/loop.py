"""A worker's way through a study: asks for plans, has them carried out, tells what came of it."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TypeVar

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from compressors.errors import ConfigError, Infeasible
from compressors.plan import CompressionPlan
from evaluators.measurement import Metric
from evaluators.runtime import Deployed, TensorSpec
from search.answers import answer, answer_as
from search.database import DIGEST, PATIENCE_S, together
from search.liveness import this_process
from search.opening import Opening
from search.outbox import Draft, Outbox
from search.records import record_from_json
from search.remote import Away
from search.runner import Broken, Carrier, Here, Runner
from search.sampler import EXPECTED, REMAINING, WAITED
from search.storage import (
    BUDGET,
    OWNER,
    PUT_BACK,
    RECORD,
    STOP,
    WAITS,
    answered,
    at_work,
    beat,
    counted,
    exclusively,
    heartbeat,
    per_hour,
    quiet,
    running,
    snapshot,
    spent_s,
    state,
    unfinished,
    waiting,
)
from search.study import Outcome, Progress, Search, Watcher, open_study
from search.succession import Succession
from search.trial import Clock, TrialRecord

INTERRUPTED = "interrupted: the same command goes on from here"
STOPPED = "stopped on demand: the same command goes on from here"
# So many repeated proposals in a row mean that the sampler has nothing new to say.
DUPLICATES_IN_A_ROW = 100
FRONT_FILE = "front.json"
OUTBOX = "outbox"
# While nothing can be begun, how often to look whether something can.
IDLE_S = 2.0
# How long another worker may take to send what it kept while the tracker was away.
ARRIVE_S = 120.0
# So many trials in a row that broke here mean that it is not the candidates' fault.
BROKEN_IN_A_ROW = 10
Returned = TypeVar("Returned")
log = logging.getLogger(__name__)


def run(search: Search, watch: Watcher) -> Outcome:
    """Begin the study, or take it up where it was left, and carry it to its budget.

    Ctrl-C puts the running trial back into the queue and returns what there is; `ended` then says so.
    """
    loop = _patiently(lambda: _Loop(search, watch))
    try:
        ended = _carried(loop)
        loop.conclude()
    finally:
        loop.outbox.close()
    return Outcome(loop.run, loop.records, tuple(loop.front), ended, unfinished(snapshot(loop.study)))


def _carried(loop: "_Loop") -> str:
    try:
        return loop.until_spent()
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        loop.carrier.close()


class _Loop:
    """One worker's run through the study."""

    def __init__(self, search: Search, watch: Watcher) -> None:
        self.search, self.watch = search, watch
        search.tracker.check(search.name)
        self.study = open_study(search)
        bench = search.workbench if search.measure != "never" else search.workbench.elsewhere()
        fingerprint = self.study.user_attrs["fingerprint"]
        # Not the lock that all others ask under: the server may take its time.
        with exclusively(search.storage, f"{search.name} tracking"):
            self.run = search.tracker.open_study(search.name, bench.workload.name, search.config, fingerprint)
        self.outbox = Outbox(search.tracker, self.run, search.folder / search.name / OUTBOX)
        self.outbox.deliver()
        self.records: tuple[TrialRecord, ...] = ()
        trials = snapshot(self.study)
        told = self._others(trials)
        # A study from before workers told each other their records has these in the tracker alone.
        done = [t for t in counted(trials) if t.state is not TrialState.FAIL]
        self._take(told if len(told) >= len(done) else search.tracker.records(self.run))
        self.spent_before = spent_s(trials)
        self.opening = Opening(search)
        self.began = time.perf_counter()
        self.succession = Succession(self.study, search.tracker, self.run, self._known, self._answer)
        self.saved = ""
        self.duplicates = 0
        self.broken: list[str] = []
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
            remedy = "choose another runtime=[...], evaluator=[...] or model"
            raise ConfigError("model", f"cannot be used as it is: {infeasible.reason}", remedy) from infeasible
        except Broken as broken:
            said = (broken.details.strip() or broken.reason).splitlines()[-1]
            problem = f"cannot be kept: the trials' process did not get ready ({said})"
            raise ConfigError("limits", problem, "mend that, or set limits=null") from broken

    def until_spent(self) -> str:
        """Trial after trial; says why it stopped."""
        in_a_row = 0
        while in_a_row < DUPLICATES_IN_A_ROW:
            if len(self.broken) >= BROKEN_IN_A_ROW:
                return f"{len(self.broken)} trials in a row broke, the last one in {self.broken[-1]}"
            self._deliver()
            self.succession.tidy()
            self.succession.look()
            try:
                # Counting, asking and signing are one act among all workers: none overshoots the budget, and none takes
                # up a plan that another one is at.
                with exclusively(self.search.storage, self.search.name) as held:
                    if self.study.user_attrs.get(STOP) != self.stop:
                        return STOPPED
                    trials = snapshot(self.study)
                    if self.succession.take_up_the_dead(trials):
                        trials = snapshot(self.study)
                    left = self._take_waiting(trials) if self.search.measure != "never" else None
                    ended, idle = ("", False) if left else self._budget_spent(trials)
                    if ended and not idle:
                        return ended
                    asked = None if left or idle else self._ask(trials)
                    if asked and not held():
                        # Somebody else may have counted and asked meanwhile: it is as if this one had not.
                        self._put_back(asked[0])
                        continue
            except UpdateFinishedTrialError:
                # The storage was away, and the lock with it: another worker took what was asked for a dead one's.
                continue
            if left:
                self._complete(left)
            elif asked is None:
                self._show("waiting for other workers")
                time.sleep(IDLE_S)
            else:
                trial, plan, twin = asked
                in_a_row = in_a_row + 1 if twin else 0
                if twin is None:
                    self._one(trial, plan, tried=any(t.user_attrs.get(DIGEST) == plan.digest for t in trials))
                else:
                    self._tell_again(trial, twin)
        return f"space exhausted: {in_a_row} proposals in a row were plans already measured"

    def conclude(self) -> None:
        """Take stock of what all workers did, once the tracker knows all; `ConfigError` where that takes too long."""
        self._deliver_all()
        _patiently(self.succession.close_what_is_left_open)
        until = time.monotonic() + ARRIVE_S
        located = [self._located(record, until) for record in self._others(snapshot(self.study))]
        self._take([record for record in located if record])
        self._save_front()

    def _located(self, record: TrialRecord, until: float) -> TrialRecord | None:
        """With where its files are, which was not known yet while the tracker was away; None if they never arrive."""
        if not record.measured or record.artifact_uri is not None:
            return record
        while True:
            found = _patiently(lambda: self.search.tracker.find(self.run, record.plan.digest))
            if found:
                return found
            if time.monotonic() > until:
                log.warning("trial %s is left out: its files are still with the worker that measured it", record.number)
                return None
            self._show("waiting for the files of another worker")
            time.sleep(IDLE_S)

    def _deliver_all(self) -> None:
        began = time.monotonic()
        self._deliver()
        while kept := self.outbox.waiting:
            if time.monotonic() - began > PATIENCE_S:
                problem = f"does not answer; {kept} finished trials wait in {self.outbox.folder}"
                raise ConfigError("tracking.uri", problem, "start the server: the same command sends them")
            self._show("waiting for the MLflow server")
            time.sleep(IDLE_S)
            self._deliver()

    def _budget_spent(self, trials: Sequence[FrozenTrial]) -> tuple[str, bool]:
        """Why to end, if so; and whether to stay around, as others may yet leave something to do."""
        budget = self.search.budget
        done, now, elapsed = len(counted(trials)), running(trials), self._elapsed()
        # A worker that dies leaves its trial; and those who cannot measure leave theirs to the others.
        others = [t for t in now if self.search.measure != "never" or WAITS not in t.user_attrs]
        if budget.trials is not None and done + len(now) >= budget.trials:
            return f"budget spent: {done} of {budget.trials} trials", done < budget.trials and bool(others)
        if budget.minutes is not None and elapsed >= 60 * budget.minutes:
            trained = self.search.measure == "all" and any(WAITS in t.user_attrs for t in now)
            spent = f"budget spent: {elapsed / 60:.1f} of {budget.minutes:g} minutes, {done} trials"
            return spent, trained or (self.search.measure == "only" and bool(now))
        return "", self.search.measure == "only"

    def _take_waiting(self, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
        """A trial that lacks nothing but what is measured here, signed."""
        for trial in waiting(trials)[:1]:
            beat(self.study, trial._trial_id)
            Trial(self.study, trial._trial_id).set_user_attr(OWNER, this_process())
            return trial
        return None

    def _complete(self, waits: FrozenTrial) -> None:
        """Measure what another machine's worker could not, and tell."""
        clock, trial = Clock(watch=self._show), Trial(self.study, waits._trial_id)
        digest, run_id = str(waits.user_attrs[DIGEST]), str(waits.user_attrs[WAITS])
        known: list[tuple[TrialRecord, tuple[TensorSpec, ...]]] = []

        def begin() -> Draft:
            draft, record, inputs = _patiently(lambda: self.outbox.resume(waits.number, digest, run_id))
            known.append((record, inputs))
            trial.set_user_attr(WAITED, _waited_s(waits, record))
            return draft

        def work(draft: Draft) -> TrialRecord:
            (record, inputs), target = known[0], draft.plan.target
            deployed = Deployed(self.search.workbench.runtimes[target.runtime], draft.files, target.precision, inputs)
            completed = self.carrier.complete(record, deployed, clock)
            self._refuse_if_lost(trial)
            return self.outbox.finish(draft, completed, deployed)

        told = self._carefully(trial, clock, begin, work, lambda: trial.set_user_attr(OWNER, ""))
        if told is not None:
            self._tell(trial, told)

    def _ask(self, trials: Sequence[FrozenTrial]) -> tuple[Trial, CompressionPlan, FrozenTrial | None]:
        """The next trial, signed, and an earlier one of the same plan; the opening comes before the sampler."""
        known = {str(t.user_attrs.get(DIGEST)): t for t in reversed(answered(trials))}
        first = self.opening.next(known, trials)
        if first is not None:
            self.study.enqueue_trial(first)
        minutes = self.search.budget.minutes
        self.study.set_user_attr(REMAINING, None if minutes is None else 60 * minutes - self._elapsed())
        with quiet(), together(self.study):
            trial = self.study.ask()
            # From the first moment: a trial without any is never missed.
            beat(self.study, trial._trial_id)
            trial.set_user_attr(OWNER, this_process())
            plan = self.search.space.sample(trial)
            trial.set_user_attr(DIGEST, plan.digest)
        return trial, plan, known.get(plan.digest)

    def _one(self, trial: Trial, plan: CompressionPlan, tried: bool) -> None:
        """Carry out and tell; of a plan that was `tried`, a worker that died may have left all but the telling."""
        record = (self._known(plan.digest) if tried else None) or self._carry_out(trial, plan, tried)
        if record is not None:
            self._tell(trial, record)

    def _known(self, digest: str) -> TrialRecord | None:
        with suppress(Away):
            return self.search.tracker.find(self.run, digest)
        return self.outbox.find(digest)

    def _carry_out(self, trial: Trial, plan: CompressionPlan, tried: bool) -> TrialRecord | None:
        """Run the plan; None where it failed, or where its latency is left to others."""
        clock, expected = Clock(watch=self._show), self._expected(trial)
        judge = self.search.ladder.judge(plan, self.records, expected) if self.search.ladder else None

        def work(draft: Draft) -> TrialRecord | None:
            record, deployed = self.carrier.run(trial.number, plan, draft.files, clock, judge)
            record = replace(record, expected=expected)
            self._refuse_if_lost(trial)
            if deployed and record.measured and not self._wanted <= {m.name for m in record.measurements}:
                # The rest only counts on the study's machine.
                run_id = _patiently(lambda: self.outbox.hand_over(draft, record, deployed))
                trial.set_user_attr(WAITS, run_id)
                trial.set_user_attr(OWNER, "")
                return None
            return self.outbox.finish(draft, record, deployed)

        def begin() -> Draft:
            return self.outbox.begin(trial.number, plan, tried)

        return self._carefully(trial, clock, begin, work, lambda: self._put_back(trial))

    def _put_back(self, trial: Trial) -> None:
        """Queue its parameters for whoever asks next."""
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr(PUT_BACK, True)
            # In this order: whoever dies in between leaves one too many, which is answered as a repeated one.
            self.study.enqueue_trial(trial.params)
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def _refuse_if_lost(self, trial: Trial) -> None:
        """Raises where another worker took this one for dead, and does its trial again."""
        stored = trial.storage.get_trial(trial._trial_id)
        if stored.state is not TrialState.RUNNING or stored.user_attrs.get(OWNER) != this_process():
            raise UpdateFinishedTrialError(f"trial {trial.number} was taken over")

    def _carefully(
        self,
        trial: Trial,
        clock: Clock,
        begin: Callable[[], Draft],
        work: Callable[[Draft], TrialRecord | None],
        put_back: Callable[[], None],
    ) -> TrialRecord | None:
        """What came of the work; the one place where any failure of a candidate is caught."""
        draft = None
        with heartbeat(self.study, trial._trial_id):
            try:
                draft = begin()
                record = work(draft)
            except (KeyboardInterrupt, SystemExit, Away):
                # A scheduler whose time limit is near ends a worker by the second.
                if draft:
                    self.outbox.drop(draft)
                put_back()
                raise
            except UpdateFinishedTrialError:
                # Another worker took this one for dead, and does it again.
                if draft:
                    self.outbox.drop(draft)
            except Infeasible as infeasible:
                # Of the moment, not of the plan: it may be tried again.
                self._give_up(trial, draft, "missed", Broken(clock.phase, infeasible.reason, ""))
            except Exception as error:  # noqa: BLE001  recording may fail too, on a full disk; the study goes on
                broken = error if isinstance(error, Broken) else Broken.of(error, "record")
                self.broken.append(f"{broken.stage}: {broken.reason}")
                self._give_up(trial, draft, "error", broken)
            else:
                self.broken.clear()
                return record
        return None

    def _give_up(self, trial: Trial, draft: Draft | None, attribute: str, broken: Broken) -> None:
        missed = attribute == "missed"
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr(attribute, broken.reason if missed else f"{broken.stage}: {broken.reason}")
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        if draft:
            # Where the disk is full, the reason is at least in the study.
            with suppress(OSError):
                self.outbox.fail(draft, broken.stage, f"{broken.details.rstrip()}\n{broken.reason}".lstrip())

    @property
    def _wanted(self) -> set[str]:
        """Names of all metrics of the study."""
        return {m.name for e in self.search.workbench.evaluators.values() for m in e.metrics()}

    def _take(self, records: Sequence[TrialRecord]) -> None:
        """The front is asked for at every phase of a trial, and changes at its end only."""
        self.records = tuple(records)
        self.front = self.search.front(self.records)

    def _others(self, trials: Sequence[FrozenTrial]) -> Sequence[TrialRecord]:
        """The records so far, with those that other workers have told of; the tracker is for people to read."""
        known = {record.plan.digest for record in self.records}
        told = (t.user_attrs for t in counted(trials) if RECORD in t.user_attrs)
        new = [record_from_json(user[RECORD]) for user in told if user[DIGEST] not in known]
        return sorted([*self.records, *new], key=lambda record: record.number)

    def _expected(self, trial: Trial) -> dict[str, float]:
        """Asked of the storage: the live trial does not see what the sampler wrote."""
        stored = trial.storage.get_trial(trial._trial_id)
        names = (metric.name for metric in self.search.objectives)
        return dict(zip(names, stored.user_attrs.get(EXPECTED, ()), strict=False))

    def _tell(self, trial: Trial, record: TrialRecord) -> None:
        """Values and constraints to Optuna, the standing of the study to the tracker and the watcher."""
        with suppress(UpdateFinishedTrialError):
            # Where another worker took this one for dead, that one tells, with the record that is here.
            self._answer(trial, record)
        trials = snapshot(self.study)
        self._take([*(r for r in self._others(trials) if r.plan.digest != record.plan.digest), record])
        self._show("", len(counted(trials)))
        self._log_progress(trials)
        self._save_front()

    def _answer(self, trial: Trial, record: TrialRecord) -> None:
        answer(trial, record, [metric.name for metric in self.search.objectives], self.search.bounds)

    def _tell_again(self, trial: Trial, twin: FrozenTrial) -> None:
        """The same plan gets the same answer, without any work."""
        self.duplicates += 1
        with suppress(UpdateFinishedTrialError):
            answer_as(trial, twin)

    def _deliver(self) -> None:
        """Send what the tracker was not there for."""
        if self.outbox.waiting:
            sent = {record.plan.digest: record for record in self.outbox.deliver()}
            self._take([sent.get(record.plan.digest, record) for record in self.records])

    def _elapsed(self) -> float:
        return self.spent_before + time.perf_counter() - self.began

    def _show(self, phase: str, done: int | None = None) -> None:
        done, elapsed = len(self.records) if done is None else done, self._elapsed()
        self.watch(Progress(done, self.records, self.front, phase, elapsed, self.duplicates, self.search.budget))

    def _log_progress(self, trials: Sequence[FrozenTrial]) -> None:
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
            "workers": 1 + len(at_work(trials)),
            "trials_per_hour": per_hour(counted(trials)) or 0.0,
            **{f"trials.{name}": count for name, count in Counter(map(state, trials)).items()},
            **({} if left is None else {"left_s": left}),
        }
        with suppress(Away):
            self.search.tracker.progress(self.run, len(self.records), {**standing, **best})

    def _save_front(self) -> None:
        """The best so far, on disk and in the tracker: whatever happens next, this is there."""
        text = json.dumps([_row(r, self.search.objectives) for r in self.front], indent=1)
        path = self.search.folder / self.search.name / FRONT_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{this_process()}")
        fresh.write_text(text)
        fresh.replace(path)
        if text != self.saved:
            with suppress(Away):
                self.search.tracker.log_study_text(self.run, text, FRONT_FILE)
                self.saved = text


def _row(record: TrialRecord, objectives: Sequence[Metric]) -> dict[str, object]:
    values = {m.name: record.value(m.name) for m in objectives}
    measured = {name: {"value": m.value, "interval": m.interval} for name, m in values.items()}
    return {"trial": record.number, "digest": record.plan.digest, "files": record.artifact_uri, **measured}


def _waited_s(trial: FrozenTrial, record: TrialRecord) -> float:
    """For how long nobody was at a trial that has come this far."""
    since = time.time() - trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return max(since - sum(record.seconds.values()), 0.0)


def _patiently(action: Callable[[], Returned]) -> Returned:
    """Wait for a server that is away, as nothing can be done without it."""
    began = time.monotonic()
    while True:
        try:
            return action()
        except Away:
            if time.monotonic() - began > PATIENCE_S:
                raise
            time.sleep(IDLE_S)
