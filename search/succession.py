"""What becomes of the trial of a worker that is gone: told if it was recorded, else queued again; runs nothing."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from search.database import DIGEST
from search.remote import Away
from search.storage import HEARTBEAT_S, OWNER, RETRIES, TRIES, WAITS, counted, dead, requeue, snapshot
from search.tracking import OpenTrial, StudyRun, Tracker
from search.trial import TrialRecord


class Succession:
    """One worker's eye on the trials of all others.

    `known` gives the record of a plan, if there is one anywhere; `answer` tells it.
    """

    def __init__(
        self,
        study: optuna.Study,
        tracker: Tracker,
        run: StudyRun,
        known: Callable[[str], TrialRecord | None],
        answer: Callable[[Trial, TrialRecord], None],
    ) -> None:
        self.study, self.tracker, self.run, self.known, self.answer = study, tracker, run, known, answer
        self.looked = -math.inf
        self.silent: dict[int, float] = {}
        # Trials of workers that seem to be gone, with what they recorded.
        self.lost: dict[int, TrialRecord | None] = {}
        # Whether a worker that died may have left runs open; at the beginning, one that was here before.
        self.succeeded = True

    def look(self) -> None:
        """Every heartbeat, see whose workers are gone, and what these had recorded; a tracker may take long to say."""
        self.lost = {}
        if time.perf_counter() - self.looked <= HEARTBEAT_S:
            return
        self.looked = time.perf_counter()
        trials = snapshot(self.study)
        told = _told(trials)
        for trial in dead(self.study, trials, self.silent):
            digest = _digest(trial)
            self.lost[trial.number] = self.known(digest) if digest and digest not in told else None

    def take_up_the_dead(self, trials: Sequence[FrozenTrial]) -> bool:
        """While nobody asks, put what `look` saw back into the queue if it still is so; whether there was any."""
        found = [t for t in dead(self.study, trials, self.silent) if t.number in self.lost] if self.lost else []
        told = _told(trials)
        for trial in found:
            self.succeeded = True
            # It may tell in this moment.
            with suppress(UpdateFinishedTrialError):
                told.add(self._take_up(trial, told))
        return bool(found)

    def _take_up(self, lost: FrozenTrial, told: Collection[str]) -> str:
        """Tell what its process had recorded before it could tell, or queue it again; its plan's digest."""
        trial, digest = Trial(self.study, lost._trial_id), _digest(lost)
        record = None if digest in told else self.lost[lost.number]
        tries = int(lost.user_attrs.get(TRIES, 0)) + 1
        if record:
            self.answer(trial, record)
        elif WAITS not in lost.user_attrs:
            requeue(self.study, lost.number)
        elif tries > RETRIES:
            trial.set_user_attr("error", f"measure: the process that measured it died {tries} times")
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        else:
            trial.set_user_attr(TRIES, tries)
            trial.set_user_attr(OWNER, "")
        return digest

    def tidy(self) -> None:
        """End the runs of those that were succeeded; while the tracker is away they stay for later."""
        if self.succeeded:
            with suppress(Away):
                self.close_what_is_left_open()
                self.succeeded = False

    def close_what_is_left_open(self) -> None:
        """End the runs that nobody is at; that of a trial which has an answer may yet end with the files of another."""
        left_open = self.tracker.open_trials(self.run)
        # Read after them, and for good: a trial that was given up never becomes anything else.
        trials = snapshot(self.study)
        for left in left_open:
            trial = trials[left.number]
            if trial.state is TrialState.FAIL or (trial.state.is_finished() and self._has_files_elsewhere(left)):
                self.tracker.kill_trial(left.run_id)

    def _has_files_elsewhere(self, left: OpenTrial) -> bool:
        found = self.tracker.find(self.run, left.digest)
        return bool(found and found.artifact_uri and left.run_id not in found.artifact_uri)


def _told(trials: Sequence[FrozenTrial]) -> set[str]:
    return {_digest(t) for t in counted(trials)}


def _digest(trial: FrozenTrial) -> str:
    """Of its plan; empty for a trial that was never signed."""
    return str(trial.user_attrs.get(DIGEST, ""))
