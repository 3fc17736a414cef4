"""Keeps what came of trials on disk until the tracker has it; so neither a dead worker nor a dead server loses any."""

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO

from compressors.plan import CompressionPlan
from evaluators.runtime import Deployed, TensorSpec
from search.liveness import this_process
from search.locks import is_at, locked
from search.records import record_from_json, record_to_json
from search.remote import Away, ServerError, reason
from search.tracking import StudyRun, Tracker
from search.trial import TrialRecord

FILES, LETTER, REASON = "model", "letter.json", "reason.txt"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draft:
    """A trial under way. Its deployed files belong into `files`; `run_id` is None while the server is away.

    `tried` says that somebody was at its plan before; `resumed`, that its run is of another process, too.
    """

    folder: Path
    number: int
    plan: CompressionPlan
    run_id: str | None
    tried: bool = False
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
    """What one process has to tell the tracker of a study, in `folder`, which other processes use too.

    A letter is written whole or not at all, and goes once the tracker has all of it. What a process leaves behind
    that has ended, on whatever host that shares the folder, the next one that comes by sends: it finds it unlocked.
    A letter that the tracker refuses, or fails at twice while it is well otherwise, is put aside in `refused`.
    """

    tracker: Tracker
    study: StudyRun
    folder: Path
    _own: Path = field(init=False)
    _lock: IO[str] | None = field(default=None, init=False)
    _failed: set[Path] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        """Nothing is made before there is something to keep."""
        self._own = self.folder / this_process().replace(":", "~")

    def begin(self, number: int, plan: CompressionPlan, tried: bool = False) -> Draft:
        """Open a trial, in the tracker too unless that is away; `tried`, if somebody may have told of its plan."""
        folder = self._opened(number, plan.digest)
        (folder / FILES).mkdir()
        try:
            run_id = self.tracker.start_trial(self.study, number, plan)
        except Away:
            run_id = None
        return Draft(folder, number, plan, run_id, tried)

    def resume(self, number: int, digest: str, run_id: str) -> tuple[Draft, TrialRecord, tuple[TensorSpec, ...]]:
        """A trial that another process left to be measured: its files, what is known, and inputs; raises `Away`."""
        folder = self._opened(number, digest)
        try:
            record, inputs = self.tracker.unmeasured(run_id, folder)
        except BaseException:
            # It may be tried again.
            shutil.rmtree(folder)
            raise
        return Draft(folder, number, record.plan, run_id, tried=True, resumed=True), record, inputs

    def hand_over(self, draft: Draft, record: TrialRecord, deployed: Deployed) -> str:
        """Leave the rest of a trial to another process: the run that has the files; raises `Away`."""
        run_id = draft.run_id or self.tracker.open_run(self.study, draft.number, draft.plan)
        self.tracker.finish_trial(run_id, record, draft.files, deployed.inputs, ended=False)
        shutil.rmtree(draft.folder)
        return run_id

    def finish(self, draft: Draft, record: TrialRecord, deployed: Deployed | None) -> TrialRecord:
        """Keep the record and its files, and send them; where the files are, the record says once they are there.

        Raises what a tracker on this machine raises; what a server refuses is put aside, as the record is good.
        """
        inputs = deployed.inputs if deployed else ()
        if deployed is None:
            shutil.rmtree(draft.files)
        self._write(draft, replace(_blank(draft), record=record_to_json(record), inputs=inputs))
        send = self._try if self.tracker.is_server else self._send
        try:
            return send(draft.folder, first=not draft.tried) or record
        except Away:
            return record

    def fail(self, draft: Draft, stage: str, error: str) -> None:
        """Keep where and how the trial broke, and send it."""
        # On a full disk, this makes the room that the letter needs.
        shutil.rmtree(draft.files, ignore_errors=True)
        self._write(draft, replace(_blank(draft), stage=stage, error=error))
        self._try(draft.folder)

    def drop(self, draft: Draft) -> None:
        """End a trial that was interrupted, or whose outcome another worker has told."""
        if draft.resumed or not draft.folder.exists():
            # Its run stays open for the next one who measures.
            shutil.rmtree(draft.folder, ignore_errors=True)
            return
        self._write(draft, _blank(draft))
        self._try(draft.folder)

    def find(self, digest: str) -> TrialRecord | None:
        """The record of that plan which is still here, of this process or of one that has ended."""
        with self._reachable() as folders:
            for folder in folders:
                letter = _letter(folder)
                if letter and letter.record and folder.name.endswith(f"-{digest}"):
                    return record_from_json(letter.record)
        return None

    def deliver(self) -> list[TrialRecord]:
        """Send what is still here, also of processes that have ended; the records as they are stored now."""
        sent: list[TrialRecord] = []
        with self._reachable() as folders:
            for folder in folders:
                try:
                    stored = self._try(folder, late=True)
                except Away:
                    break
                sent += [stored] if stored else []
        return sent

    def close(self) -> None:
        """Say that nobody is at what is still here."""
        if self._lock is not None:
            with suppress(OSError):
                self._own.rmdir()  # unless something is still in it
                Path(self._lock.name).unlink()
            self._lock.close()
            self._lock = None

    @property
    def waiting(self) -> int:
        """How many trials the tracker does not know the outcome of yet."""
        with self._reachable() as folders:
            return sum((folder / LETTER).exists() for folder in folders)

    def _opened(self, number: int, digest: str) -> Path:
        """A new folder for a trial; the lock says for as long as this process lives that it is not left behind.

        Raises ValueError for a digest that would lead elsewhere: it may come from a storage that others write to.
        """
        if not re.fullmatch("[0-9a-f]+", digest):
            raise ValueError(f"digest {digest!r} of trial {number} is none")
        if self._lock is None:
            self._lock = locked(self.folder / f"{self._own.name}.lock", fcntl.LOCK_EX)
        folder = self._own / f"{number}-{digest}"
        folder.mkdir(parents=True)
        return folder

    def _write(self, draft: Draft, letter: _Letter) -> None:
        fresh = draft.folder / f"{LETTER}.new"
        with fresh.open("w") as out:
            out.write(json.dumps(asdict(letter)))
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(draft.folder / LETTER)

    def _try(self, folder: Path, late: bool = False, first: bool = False) -> TrialRecord | None:
        """Send; what the tracker refuses for good is put aside. While it is away, `late` raises that."""
        try:
            return self._send(folder, first)
        except Away as away:
            if isinstance(away, ServerError) and self._is_poison(folder):
                self._put_aside(folder, away)
            elif late:
                raise
        except Exception as error:  # noqa: BLE001  a server may refuse in any way, and the study goes on
            self._put_aside(folder, error)
        return None

    def _is_poison(self, folder: Path) -> bool:
        """Whether the server failed at this letter before too, and answers when it is asked something else."""
        if folder not in self._failed:
            self._failed.add(folder)
            return False
        with suppress(Away):
            self.tracker.open_trials(self.study)
            return True
        return False

    def _put_aside(self, folder: Path, error: Exception) -> None:
        refused = self.folder / "refused"
        log.warning("the tracker refuses %s, put aside in %s: %s", folder.name, refused, reason(error))
        with suppress(OSError):
            (folder / REASON).write_text(f"{error}\n")
            refused.mkdir(exist_ok=True)
            folder.rename(refused / f"{folder.parent.name}-{folder.name}")

    def _send(self, folder: Path, first: bool = False) -> TrialRecord | None:
        """What of a trial is no letter goes, as its process died in the midst; `first`: nobody told of its plan."""
        letter = _letter(folder)
        stored = self._told(letter, folder / FILES, first) if letter else None
        shutil.rmtree(folder)
        return stored

    def _told(self, letter: _Letter, files: Path, first: bool) -> TrialRecord | None:
        plan = CompressionPlan.from_json(letter.plan)
        # Sent by a process that died before it could cross it off, or measured once more by somebody meanwhile. To look
        # takes a tracker of thousands of runs as long as all the rest.
        known = self.tracker.find(self.study, plan.digest) if letter.record and not first else None
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

    @contextmanager
    def _reachable(self) -> Iterator[list[Path]]:
        """The trials of this process that have a letter, and all of those that have ended, which nobody else sees."""
        with ExitStack() as held:
            found = [folder for folder in _trials(self._own) if (folder / LETTER).exists()]
            left = []
            for lock in sorted(self.folder.glob("*~*~*.lock")):
                process = lock.with_suffix("")
                if process == self._own:
                    continue
                handle = held.enter_context(lock.open("a"))
                with suppress(BlockingIOError):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_at(handle, lock):
                        left.append(process)
                        found += _trials(process)
            yield found
            for process in left:
                with suppress(OSError):
                    if process.exists():
                        process.rmdir()  # unless something is still in it
                    self.folder.joinpath(f"{process.name}.lock").unlink()


def _trials(process: Path) -> list[Path]:
    return sorted(process.iterdir()) if process.exists() else []


def _blank(draft: Draft) -> _Letter:
    return _Letter(draft.number, draft.plan.to_json(), draft.run_id, time.time())


def _letter(folder: Path) -> _Letter | None:
    path = folder / LETTER
    return _Letter.read(path.read_text()) if path.exists() else None
