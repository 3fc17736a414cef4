"""Keeps what came of trials on disk until the tracker has it; so neither a dead worker nor a dead server loses any."""

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from compressors.plan import CompressionPlan
from evaluators.runtime import Deployed, TensorSpec
from search.liveness import is_gone, this_process
from search.tracking import Away, StudyRun, Tracker, record_from_json, record_to_json
from search.trial import TrialRecord

FILES, LETTER = "model", "letter.json"


@dataclass(frozen=True)
class Draft:
    """A trial under way. Its deployed files belong into `files`; `run_id` is None while the server is away."""

    folder: Path
    number: int
    plan: CompressionPlan
    run_id: str | None
    resumed: bool = False

    @property
    def files(self) -> Path:
        """An empty folder at first."""
        return self.folder / FILES


@dataclass(frozen=True)
class _Letter:
    """How a trial ended: with a record, with an error at a stage, or with neither if it was interrupted."""

    number: int
    plan: str
    run_id: str | None
    at: float
    record: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    stage: str = ""
    error: str | None = None

    @classmethod
    def read(cls, text: str) -> "_Letter":
        raw = json.loads(text)
        specs = (TensorSpec(s["name"], tuple(s["shape"]), s["dtype"]) for s in raw.pop("inputs"))
        return cls(**raw, inputs=tuple(specs))


@dataclass
class Outbox:
    """What one process has to tell the tracker of a study, in `folder`, which other processes of the host use too.

    A letter is written whole or not at all, and goes once the tracker has all of it. What a process leaves behind
    that has ended, the next one that comes by sends.
    """

    tracker: Tracker
    study: StudyRun
    folder: Path
    _own: Path = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is made before there is something to keep."""
        self._own = self.folder / this_process().replace(":", "~")

    def begin(self, number: int, plan: CompressionPlan) -> Draft:
        """Open a trial, in the tracker too unless that is away."""
        folder = self._own / f"{number}-{plan.digest}"
        (folder / FILES).mkdir(parents=True)
        try:
            run_id = self.tracker.start_trial(self.study, number, plan)
        except Away:
            run_id = None
        return Draft(folder, number, plan, run_id)

    def resume(self, number: int, plan: CompressionPlan, run_id: str, files: Path) -> Draft:
        """The same for a trial that another process left to be measured, with a copy of its files."""
        folder = self._own / f"{number}-{plan.digest}"
        shutil.copytree(files, folder / FILES)
        return Draft(folder, number, plan, run_id, resumed=True)

    def hand_over(self, draft: Draft, record: TrialRecord, deployed: Deployed) -> str:
        """Leave the rest of a trial to another process: the run that has the files; raises `Away`."""
        run_id = draft.run_id or self.tracker.open_run(self.study, draft.number, draft.plan)
        self.tracker.finish_trial(run_id, record, draft.files, deployed.inputs, ended=False)
        shutil.rmtree(draft.folder)
        return run_id

    def finish(self, draft: Draft, record: TrialRecord, deployed: Deployed | None) -> TrialRecord:
        """Keep the record and its files, and send them; where the files are, the record says once they are there."""
        inputs = deployed.inputs if deployed else ()
        self._write(draft, replace(_blank(draft), record=record_to_json(record), inputs=inputs))
        if deployed is None:
            shutil.rmtree(draft.files)
        return self._send_one(draft.folder, late=False) or record

    def fail(self, draft: Draft, stage: str, error: str) -> None:
        """Keep where and how the trial broke, and send it."""
        # On a full disk, this makes the room that the letter needs.
        shutil.rmtree(draft.files, ignore_errors=True)
        self._write(draft, replace(_blank(draft), stage=stage, error=error))
        self._send_one(draft.folder, late=False)

    def drop(self, draft: Draft) -> None:
        """End a trial that was interrupted, or whose outcome another worker has told."""
        if draft.resumed:
            # Its run stays open for the next one who measures.
            shutil.rmtree(draft.folder)
            return
        self._write(draft, _blank(draft))
        self._send_one(draft.folder, late=False)

    def find(self, digest: str) -> TrialRecord | None:
        """The record of that plan which is still here, of this process or of one that has ended."""
        for folder in self._folders():
            letter = _letter(folder)
            if letter and letter.record and folder.name.endswith(f"-{digest}"):
                return record_from_json(letter.record)
        return None

    def deliver(self) -> list[TrialRecord]:
        """Send what is still here, also of processes that have ended; the records as they are stored now."""
        with self._alone() as alone:
            # What of one's own has no letter is still under way; with a dead process it never gets one.
            found = [f for f in self._folders() if f.parent != self._own or (f / LETTER).exists()] if alone else []
            return [record for folder in found if (record := self._send_one(folder, late=True)) is not None]

    @property
    def waiting(self) -> int:
        """How many trials the tracker does not know the outcome of yet."""
        return sum((folder / LETTER).exists() for folder in self._folders())

    def _write(self, draft: Draft, letter: _Letter) -> None:
        fresh = draft.folder / f"{LETTER}.new"
        fresh.write_text(json.dumps(asdict(letter)))
        fresh.replace(draft.folder / LETTER)

    def _send_one(self, folder: Path, late: bool) -> TrialRecord | None:
        """None too while the server is away; what of a trial is no letter goes, as its process died in the midst."""
        letter = _letter(folder)
        stored = None
        if letter is not None:
            try:
                stored = self._send(letter, folder / FILES, late)
            except Away:
                return None
        shutil.rmtree(folder)
        with suppress(OSError):
            folder.parent.rmdir()  # the last one of its process
        return stored

    def _send(self, letter: _Letter, files: Path, late: bool) -> TrialRecord | None:
        plan = CompressionPlan.from_json(letter.plan)
        # Sent by a process that died before it could cross it off, or measured once more by somebody meanwhile.
        known = self.tracker.find(self.study, plan.digest) if late and letter.record else None
        if known is not None:
            for left in self.tracker.open_trials(self.study):
                if left.run_id == letter.run_id:
                    self.tracker.kill_trial(left.run_id)
            return known
        run_id = letter.run_id or self.tracker.open_run(self.study, letter.number, plan)
        if letter.record is not None:
            kept = files if files.exists() else None
            return self.tracker.finish_trial(run_id, record_from_json(letter.record), kept, letter.inputs, letter.at)
        if letter.error is not None:
            self.tracker.fail_trial(run_id, plan, letter.stage, letter.error)
        else:
            self.tracker.kill_trial(run_id)
        return None

    def _folders(self) -> Iterator[Path]:
        """Of trials, of this process and of those that have ended."""
        for process in sorted(self.folder.glob("*~*~*")):
            if process == self._own or is_gone(process.name.replace("~", ":")):
                yield from sorted(process.iterdir())

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Whether nobody else is at what the dead left; whoever is, does it all."""
        if not self.folder.exists():
            yield False
            return
        with self.folder.with_suffix(".lock").open("a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def _blank(draft: Draft) -> _Letter:
    return _Letter(draft.number, draft.plan.to_json(), draft.run_id, time.time())


def _letter(folder: Path) -> _Letter | None:
    path = folder / LETTER
    return _Letter.read(path.read_text()) if path.exists() else None
