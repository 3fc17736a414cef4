"""Trials on their way to the tracker: kept through a server that is away and a process that dies."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import requests
from mlflow.exceptions import MlflowException, RestException

from compressors.plan import CompressionPlan, Step, Target
from evaluators.measurement import exact
from evaluators.runtime import Deployed, TensorSpec
from search.outbox import Draft, Outbox
from search.remote import Away, Remote, ServerError
from search.tracking import StudyRun, Tracker
from search.trial import TrialRecord
from tests.studies import ACCURACY, CountingRuntime

ROOT = Path(__file__).parents[1]


def plan(bits: int) -> CompressionPlan:
    return CompressionPlan(Target("fake", "fp32"), (Step("quantize", {"head": {"bits": bits}}),))


def record(number: int, bits: int = 8) -> TrialRecord:
    return TrialRecord(number, plan(bits), (exact(ACCURACY, 0.9),), None, {"deploy": 1.0}, {}, {"cpu": "x"})


class Flaky(Tracker):
    """Away for the calls whose names it is given."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        object.__setattr__(self, "broken", set())


def _breakable(name: str) -> Callable[..., Any]:
    def call(self: Flaky, *args: Any, **kwargs: Any) -> Any:
        if name in self.broken:  # type: ignore[attr-defined]
            raise Away("gone")
        return getattr(Tracker, name)(self, *args, **kwargs)

    return call


ALL = {"start_trial", "finish_trial", "fail_trial", "kill_trial", "find", "open_trials", "unmeasured"}
for _name in ALL:
    setattr(Flaky, _name, _breakable(_name))


@pytest.fixture
def tracker(store: Path) -> Flaky:
    return Flaky(f"sqlite:///{store}/mlflow.db", str(store / "files"))


@pytest.fixture
def study(tracker: Flaky) -> StudyRun:
    return tracker.open_study("test", "noise", "seed: 0\n", {"model": "abc"})


@pytest.fixture
def outbox(tracker: Flaky, study: StudyRun, store: Path) -> Iterator[Outbox]:
    made = Outbox(tracker, study, store / "outbox")
    yield made
    made.close()


def left_in(outbox: Outbox) -> list[Path]:
    """All but what says that this process lives."""
    return [path for path in outbox.folder.rglob("*") if not path.name.endswith(".lock") and path != outbox._own]


def away(tracker: Flaky, *names: str) -> None:
    tracker.broken.clear()  # type: ignore[attr-defined]
    tracker.broken.update(names)  # type: ignore[attr-defined]


def deployed(draft: Draft) -> Deployed:
    (draft.files / "model.json").write_text('{"int8": []}')
    return Deployed(CountingRuntime(), draft.files, "fp32", (TensorSpec("x", (1, 3), "float32"),))


def test_a_finished_trial_goes_at_once_and_leaves_nothing_behind(
    outbox: Outbox, tracker: Flaky, study: StudyRun
) -> None:
    draft = outbox.begin(3, plan(8))
    assert list(draft.files.iterdir()) == []
    stored = outbox.finish(draft, record(3), deployed(draft))
    assert tracker.records(study) == [stored]
    assert (tracker.model_folder(stored) / "model.json").exists()
    assert outbox.waiting == 0
    assert left_in(outbox) == []


@pytest.mark.parametrize("when", ["from the beginning", "at the end"])
def test_what_a_server_was_away_for_is_sent_once_when_it_is_back(
    when: str, outbox: Outbox, tracker: Flaky, study: StudyRun
) -> None:
    if when == "from the beginning":
        away(tracker, *ALL)
    draft = outbox.begin(3, plan(8))
    away(tracker, *ALL)
    assert outbox.finish(draft, record(3), deployed(draft)) == record(3)
    broken = outbox.begin(4, plan(4))
    outbox.fail(broken, "deploy", "ValueError: no")
    assert outbox.waiting == 2
    assert outbox.find(plan(8).digest) == record(3)
    assert outbox.find(plan(4).digest) is None
    assert outbox.deliver() == []
    assert outbox.waiting == 2
    away(tracker)
    (sent,) = outbox.deliver()
    assert replace(sent, artifact_uri=None) == record(3)
    assert tracker.records(study) == [sent]
    assert tracker.open_trials(study) == []
    assert outbox.waiting == 0
    assert outbox.deliver() == []
    runs = tracker._client.search_runs([study.experiment_id], "tags.`compareto.role` = 'trial'")
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_a_run_whose_answer_got_lost_is_not_opened_twice(outbox: Outbox, tracker: Flaky, study: StudyRun) -> None:
    tracker.start_trial(study, 3, plan(8))
    away(tracker, "start_trial")
    draft = outbox.begin(3, plan(8))
    assert draft.run_id is None
    outbox.finish(draft, record(3), deployed(draft))
    assert len(tracker.records(study)) == 1
    assert tracker.open_trials(study) == []


def test_what_somebody_else_measured_meanwhile_is_not_recorded_again(
    outbox: Outbox, tracker: Flaky, study: StudyRun
) -> None:
    draft = outbox.begin(3, plan(8))
    away(tracker, *ALL)
    outbox.finish(draft, record(3), deployed(draft))
    away(tracker)
    other = outbox.begin(5, plan(8))
    theirs = outbox.finish(other, record(5), deployed(other))
    assert outbox.deliver() == [theirs]
    assert tracker.records(study) == [theirs]
    assert tracker.open_trials(study) == []


@pytest.mark.parametrize("tried", [False, True])
def test_only_for_a_plan_that_somebody_was_at_before_the_tracker_is_searched(
    tried: bool, outbox: Outbox, tracker: Flaky, study: StudyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search takes a server as long as all the rest of a trial."""
    searched = []
    find = Flaky.find

    def watched(self: Flaky, study: StudyRun, digest: str) -> TrialRecord | None:
        searched.append(digest)
        return find(self, study, digest)

    monkeypatch.setattr(Flaky, "find", watched)
    first, again = outbox.begin(3, plan(8)), outbox.begin(5, plan(8), tried=True)
    theirs = outbox.finish(first, record(3), deployed(first))
    assert searched == []
    if tried:
        assert outbox.finish(again, record(5), deployed(again)) == theirs
        assert searched == [plan(8).digest]
        assert tracker.records(study) == [theirs]
    else:
        away(tracker, *ALL)
        late = outbox.begin(6, plan(4))
        outbox.finish(late, record(6, 4), deployed(late))
        away(tracker)
        assert len(outbox.deliver()) == 1
        assert searched == [plan(4).digest], "what is sent again may have arrived before"


def test_an_interrupted_trial_leaves_no_open_run(outbox: Outbox, tracker: Flaky, study: StudyRun) -> None:
    outbox.drop(outbox.begin(3, plan(8)))
    assert tracker.open_trials(study) == []
    assert tracker.records(study) == []
    assert left_in(outbox) == []


DYING = """
import os, sys
from pathlib import Path
from search.outbox import Outbox
from tests.test_outbox import *
store = Path(sys.argv[1])
tracker = Flaky(f"sqlite:///{store}/mlflow.db", str(store / "files"))
outbox = Outbox(tracker, tracker.study("test"), store / "outbox")
drafts = [outbox.begin(number, plan(bits)) for number, bits in ((1, 8), (2, 4))]
away(tracker, *ALL)
outbox.finish(drafts[0], record(1), deployed(drafts[0]))
os.kill(os.getpid(), 9)
"""


def test_what_a_dead_process_left_is_sent_by_the_next_and_its_half_done_work_removed(
    outbox: Outbox, tracker: Flaky, study: StudyRun, store: Path
) -> None:
    mine = outbox.begin(9, plan(32))
    ended = subprocess.run([sys.executable, "-c", DYING, str(store)], cwd=ROOT, check=False)
    assert ended.returncode == -9
    assert outbox.find(plan(8).digest) == record(1)
    (sent,) = outbox.deliver()
    assert sent.number == 1
    assert mine.files.exists(), "what is under way stays"
    assert [trial.number for trial in tracker.open_trials(study)] == [2, 9], "whose trial it was, the study tells"
    outbox.drop(mine)
    assert left_in(outbox) == []


def test_a_lock_that_another_worker_removes_before_it_is_held_is_made_again(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others find letters by these files: without one, those of a worker that dies would stay unseen."""
    flock, removed = fcntl.flock, list[Path]()

    def late(handle: IO[str], how: int) -> None:
        if not removed:
            removed.append(Path(handle.name))
            removed[0].unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    outbox.begin(3, plan(8))
    (lock,) = removed
    with lock.open() as other, pytest.raises(BlockingIOError):
        flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_trial_is_handed_over_with_its_files_and_measured_by_another(
    outbox: Outbox, tracker: Flaky, study: StudyRun
) -> None:
    draft = outbox.begin(3, plan(8))
    run_id = outbox.hand_over(draft, record(3), deployed(draft))
    assert tracker.records(study) == []
    again, found, inputs = outbox.resume(3, plan(8).digest, run_id)
    assert replace(found, artifact_uri=None) == record(3)
    assert inputs == (TensorSpec("x", (1, 3), "float32"),)
    outbox.drop(again)
    assert [trial.run_id for trial in tracker.open_trials(study)] == [run_id], "given up, it waits for the next one"
    again, found, inputs = outbox.resume(3, plan(8).digest, run_id)
    assert (again.files / "model.json").exists()
    stored = outbox.finish(again, found, Deployed(CountingRuntime(), again.files, "fp32", inputs))
    assert tracker.records(study) == [stored]
    assert os.listdir(tracker.model_folder(stored)) == ["model.json"]  # noqa: PTH208  names alone


def test_what_cannot_be_fetched_now_can_be_fetched_later(outbox: Outbox, tracker: Flaky) -> None:
    draft = outbox.begin(3, plan(8))
    run_id = outbox.hand_over(draft, record(3), deployed(draft))
    away(tracker, *ALL)
    for _ in range(2):
        with pytest.raises(Away):
            outbox.resume(3, plan(8).digest, run_id)
    away(tracker)
    again, _, _ = outbox.resume(3, plan(8).digest, run_id)
    assert (again.files / "model.json").exists()


def test_a_digest_that_leads_elsewhere_is_refused(outbox: Outbox, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is none"):
        outbox.resume(3, "x/../../../elsewhere", "run")
    assert not list(tmp_path.rglob("elsewhere"))


def test_what_a_server_refuses_is_kept_and_the_record_stands(
    outbox: Outbox, tracker: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = outbox.begin(3, plan(8))
    tracker._client.delete_run(draft.run_id)
    monkeypatch.setattr(Flaky, "is_server", True)
    assert outbox.finish(draft, record(3), deployed(draft)) == record(3)
    (refused,) = (outbox.folder / "refused").iterdir()
    assert list(refused.rglob("model.json"))


def test_a_full_disk_is_no_reason_to_keep_the_files_of_what_broke(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = outbox.begin(3, plan(8))
    (draft.files / "big").write_bytes(bytes(1000))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        outbox.fail(draft, "record", "OSError: No space left on device")
    assert not draft.files.exists()


def test_a_letter_that_the_tracker_refuses_is_put_aside_and_the_others_go(
    outbox: Outbox, tracker: Flaky, study: StudyRun
) -> None:
    drafts = [outbox.begin(number, plan(bits)) for number, bits in ((1, 8), (2, 4))]
    away(tracker, *ALL)
    for number, draft in enumerate(drafts, start=1):
        outbox.finish(draft, record(number, draft.plan.steps[0].per_layer["head"]["bits"]), deployed(draft))  # type: ignore[arg-type]
    away(tracker)
    tracker._client.delete_run(drafts[0].run_id)
    assert [sent.number for sent in outbox.deliver()] == [2]
    assert outbox.waiting == 0
    (refused,) = (outbox.folder / "refused").iterdir()
    assert (refused / "letter.json").exists()
    assert "deleted" in (refused / "reason.txt").read_text()


@pytest.mark.parametrize("ill", [{"finish_trial"}, ALL], ids=["at one letter", "at everything"])
def test_a_letter_that_the_server_fails_at_again_is_put_aside_unless_all_fails(
    ill: set[str], outbox: Outbox, tracker: Flaky, study: StudyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its database may be away, as it says of much else; what fails again on its own would block all behind it."""
    drafts = [outbox.begin(number, plan(bits)) for number, bits in ((1, 8), (2, 4), (3, 32))]
    away(tracker, *ALL)
    for draft, bits in zip(drafts, (8, 4, 32), strict=True):
        outbox.finish(draft, record(draft.number, bits), deployed(draft))
    away(tracker)
    for name in ill:
        monkeypatch.setattr(Flaky, name, _failing_at(drafts[0].run_id, name))
    assert outbox.deliver() == []
    assert outbox.waiting == 3
    if ill == ALL:
        assert outbox.deliver() == []
        assert outbox.waiting == 3
        return
    assert [sent.number for sent in outbox.deliver()] == [2, 3]
    assert outbox.waiting == 0
    (refused,) = (outbox.folder / "refused").iterdir()
    assert "the server failed" in (refused / "reason.txt").read_text()


def _failing_at(run_id: str | None, name: str) -> Callable[..., Any]:
    def call(self: Flaky, *args: Any, **kwargs: Any) -> Any:
        if name != "finish_trial" or args[0] == run_id:
            raise ServerError("the server failed")
        return Tracker.finish_trial(self, *args, **kwargs)

    return call


def test_what_a_server_fails_at_is_told_from_a_server_that_is_away() -> None:
    def gateway(status: int) -> requests.HTTPError:
        answer = requests.Response()
        answer.status_code = status
        return requests.HTTPError("no", response=answer)

    def said(error: Exception) -> type[Exception]:
        def call() -> None:
            raise error

        with pytest.raises((Away, MlflowException, requests.RequestException)) as raised:
            Remote(SimpleNamespace(call=call), "http://server").call()
        return raised.type

    gone = "API request to x failed with"
    assert said(requests.ConnectionError("refused")) is Away
    assert said(MlflowException(f"{gone} exception timeout")) is Away
    assert said(MlflowException(f"{gone} error code 503 != 200")) is Away
    assert said(RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "database"})) is Away
    assert said(gateway(502)) is Away
    assert said(RestException({"error_code": "INTERNAL_ERROR", "message": "constraint"})) is ServerError
    assert said(MlflowException(f"{gone} error code 500 != 200")) is ServerError
    assert said(gateway(500)) is ServerError
    assert said(RestException({"error_code": "BAD_REQUEST", "message": "too long"})) is RestException
    assert said(gateway(403)) is requests.HTTPError
