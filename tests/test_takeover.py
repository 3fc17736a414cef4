"""Workers that leave, wait for each other, and take over."""

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
from optuna.trial import TrialState

from compressors.errors import ConfigError, Infeasible
from evaluators.measurement import Measurement, Metric
from search import loop as module
from search import succession
from search.liveness import _started, this_process
from search.loop import run
from search.remote import Away
from search.storage import RETRIES, dead, failed, open_storage, requeue, state
from search.storage import quiet as quietly
from search.study import Budget, Outcome, Progress, Search
from search.tracking import Tracker
from search.trial import TrialRecord
from tests.studies import ACCURACY, RATIO, Counting, digests, make_search, optuna_trials, quiet


def timed(store: Path, trials: int, **changes: Any) -> Search:
    """Its latency only counts on the study's machine."""
    search = make_search(store, trials, **changes)
    bench = replace(search.workbench, evaluators={"judging": Judging(), "timing": Timing()})
    return replace(search, workbench=bench)


@dataclass(frozen=True)
class Judging(Counting):
    """Half of what counting measures, anywhere."""

    def metrics(self) -> tuple[Metric, ...]:
        return (ACCURACY,)

    def measure(self, *given: Any) -> tuple[Measurement, ...]:
        return tuple(super().measure(*given))[:1]


@dataclass(frozen=True)
class Timing(Counting):
    """The other half."""

    of_machine: ClassVar[bool] = True

    def metrics(self) -> tuple[Metric, ...]:
        return (RATIO,)

    def measure(self, *given: Any) -> tuple[Measurement, ...]:
        return tuple(super().measure(*given))[1:]


def test_a_worker_elsewhere_leaves_latency_to_one_on_the_studys_machine(store: Path) -> None:
    run(timed(store, 1), quiet)
    elsewhere = timed(store, 4, measure="never", fingerprint={**make_search(store, 1).fingerprint, "cpu": "another"})
    ended = run(elsewhere, quiet)
    assert ended.ended == "budget spent: 1 of 4 trials"
    assert ended.others == 3, "nobody may conclude yet"
    assert len(ended.records) == 1
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
    waits = [t for t in study.trials if t.state is TrialState.RUNNING]
    assert [state(t) for t in waits] == 3 * ["waiting to be measured"]
    assert len({r.plan.digest for r in waiting_records(elsewhere, ended)}) == 3

    deployed: list[int] = []
    time.sleep(0.5)
    outcome = run(timed(store, 4, before=deployed.append, measure="only"), quiet)
    assert deployed == [0], "only the reference is deployed: the files came with the trials"
    assert len(outcome.records) == 4
    assert all({"accuracy", "latency_ratio"} <= {m.name for m in r.measurements} for r in outcome.records)
    assert {t.state for t in optuna_trials(store)} == {TrialState.COMPLETE}
    assert elsewhere.tracker.open_trials(outcome.study) == []
    for trial in [optuna_trials(store)[t.number] for t in waits]:
        assert trial.duration is not None
        assert 0.5 <= trial.user_attrs["waited_s"] <= trial.duration.total_seconds()


def waiting_records(search: Search, outcome: Outcome) -> list[TrialRecord]:
    open_trials = search.tracker.open_trials(outcome.study)
    read = [search.tracker.unmeasured(t.run_id, empty(search.folder / t.run_id))[0] for t in open_trials]
    return sorted(read, key=lambda r: r.number)


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_worker_that_does_both_takes_what_waits_first(store: Path) -> None:
    run(timed(store, 1), quiet)
    run(timed(store, 3, measure="never"), quiet)
    outcome = run(timed(store, 4), quiet)
    assert len(outcome.records) == 4
    assert {t.state for t in optuna_trials(store)} == {TrialState.COMPLETE}


def test_trials_that_wait_do_not_go_stale(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(timed(store, 1), quiet)
    run(timed(store, 2, measure="never"), quiet)
    storage = open_storage(f"sqlite:///{store}/optuna.db")
    study = optuna.load_study(study_name="test", storage=storage)
    waits = next(t for t in study.trials if t.state is TrialState.RUNNING)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
    assert waits._trial_id in storage._get_stale_trial_ids(study._study_id)
    silent: dict[int, float] = {waits._trial_id: -1e6}
    assert dead(study, study.trials, silent) == []
    run(timed(store, 2, measure="never"), quiet)
    assert study.trials[waits.number].state is TrialState.RUNNING
    assert len(run(timed(store, 2), quiet).records) == 2


def test_a_worker_elsewhere_begins_no_study(store: Path) -> None:
    with pytest.raises(ConfigError, match="nobody has begun 'test'"):
        run(timed(store, 2, measure="never"), quiet)


def test_a_worker_elsewhere_still_needs_the_same_model(store: Path) -> None:
    run(timed(store, 1), quiet)
    other = {**make_search(store, 1).fingerprint, "model": "b"}
    with pytest.raises(ConfigError, match="model was a, is b"):
        run(timed(store, 2, measure="never", fingerprint=other), quiet)


def test_the_last_worker_stays_until_the_budget_is_met(store: Path) -> None:
    """Another one is at the last trial, and dies."""
    run(make_search(store, 2), quiet)
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
    trial = study.ask(fixed_distributions=study.trials[1].distributions)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    host, *_ = this_process().rsplit(":", 2)
    trial.set_user_attr("owner", f"{host}:{sleeper.pid}:{_started(sleeper.pid)}")
    phases: list[str] = []

    def watch(progress: Progress) -> None:
        phases.append(progress.phase)
        if progress.phase == "waiting for other workers" and sleeper.poll() is None:
            sleeper.kill()
            sleeper.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(succession, "HEARTBEAT_S", 0.1)
        patch.setattr(module, "IDLE_S", 0.2)
        outcome = run(make_search(store, 3), watch)
    assert "waiting for other workers" in phases
    assert len(outcome.records) == 3
    assert study.trials[trial.number].state is TrialState.FAIL


def test_a_trial_whose_processes_keep_dying_is_given_up_and_counts(store: Path) -> None:
    run(make_search(store, 2), quiet)
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
    distributions = study.trials[1].distributions
    study.enqueue_trial(study.trials[1].params | {next(iter(distributions)): 32})
    for life in range(1 + RETRIES):
        trial = study.ask(fixed_distributions=distributions)
        trial.set_user_attr("digest", "always the same")
        assert not failed(study.trials[trial.number])
        requeue(study, trial.number)
        assert failed(study.trials[trial.number]) == (life == RETRIES)
    assert not [t for t in study.trials if t.state is TrialState.WAITING]
    assert len(run(make_search(store, 4), quiet).records) == 3


def test_where_everything_breaks_the_worker_ends_and_says_why(store: Path) -> None:
    def broken(count: int) -> None:
        if count:
            raise OSError(28, "No space left on device")

    outcome = run(make_search(store, 50, broken), quiet)
    assert (
        outcome.ended == "10 trials in a row broke, the last one in deploy: OSError: [Errno 28] No space left on device"
    )
    assert len(outcome.records) == 1


def test_a_server_that_is_away_stops_nobody(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone after the second trial, back after the fifth."""
    search = make_search(store, 6)
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    gone: list[bool] = []
    names = (
        "start_trial",
        "finish_trial",
        "kill_trial",
        "find",
        "open_trials",
        "progress",
        "log_study_text",
        "records",
    )
    for name in names:
        monkeypatch.setattr(Tracker, name, _unless(gone, getattr(Tracker, name)))

    def watch(progress: Progress) -> None:
        if not progress.phase:
            gone[:] = [True] if 2 <= progress.done < 5 else []

    outcome = run(search, watch)
    assert len(outcome.records) == len({r.plan.digest for r in outcome.records}) == 6
    assert all(record.artifact_uri for record in outcome.records)
    assert search.tracker.open_trials(outcome.study) == []
    assert not list((store / "test" / "outbox").rglob("letter.json"))


def test_no_server_is_asked_while_other_workers_wait_for_their_turn(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs would stop them all; not even to join a study, or to take up the trial of a dead worker."""
    run(make_search(store, 2), quiet)
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
    host, pid, started = this_process().rsplit(":", 2)
    lost = study.ask(fixed_distributions=study.trials[1].distributions)
    lost.set_user_attr("owner", f"{host}:{pid}:{int(started) + 1}")
    lost.set_user_attr("digest", "abc")
    called: list[str] = []
    for name in ("open_study", "find", "open_trials", "start_trial", "finish_trial", "progress", "log_study_text"):
        monkeypatch.setattr(Tracker, name, _while_free(store / "optuna.db.test.lock", called, getattr(Tracker, name)))
    run(make_search(store, 4), quiet)
    assert study.trials[lost.number].state is TrialState.FAIL
    assert called[0] == "open_study"
    assert "find" in called[: called.index("start_trial")], "what the dead worker recorded"


def _while_free(lock: Path, called: list[str], method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        called.append(method.__name__)
        with lock.open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return method(*args, **kwargs)

    return call


def _unless(gone: list[bool], method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if gone:
            raise Away("gone")
        return method(*args, **kwargs)

    return call


def waits_with(store: Path, owner: str) -> tuple[optuna.Study, int]:
    """A study with one trial that waits, taken by a process of this name."""
    run(timed(store, 1), quiet)
    run(timed(store, 2, measure="never"), quiet)
    study = optuna.load_study(study_name="test", storage=open_storage(f"sqlite:///{store}/optuna.db"))
    waits = next(t for t in study.trials if t.state is TrialState.RUNNING)
    optuna.trial.Trial(study, waits._trial_id).set_user_attr("owner", owner)
    return study, waits.number


def test_a_trial_whose_measuring_process_died_waits_again_and_not_for_ever(store: Path) -> None:
    host, pid, started = this_process().rsplit(":", 2)
    gone = f"{host}:{pid}:{int(started) + 1}"
    study, number = waits_with(store, gone)
    for tries in range(1, 1 + RETRIES):
        run(timed(store, 2, measure="never"), quiet)
        trial = study.trials[number]
        assert (trial.state, trial.user_attrs["owner"], trial.user_attrs["tries"]) == (TrialState.RUNNING, "", tries)
        optuna.trial.Trial(study, trial._trial_id).set_user_attr("owner", gone)
    run(timed(store, 2, measure="never"), quiet)
    assert study.trials[number].state is TrialState.FAIL
    assert "died 3 times" in study.trials[number].user_attrs["error"]


def test_silence_counts_only_when_it_lasts_and_never_of_a_process_that_is_seen_to_live(store: Path) -> None:
    run(make_search(store, 1), quiet)
    storage = open_storage(f"sqlite:///{store}/optuna.db")
    study = optuna.load_study(study_name="test", storage=storage)
    with quietly():
        here, elsewhere = study.ask(), study.ask()
    here.set_user_attr("owner", this_process())
    elsewhere.set_user_attr("owner", "elsewhere:1:1")
    for trial in (here, elsewhere):
        storage.record_heartbeat(trial._trial_id)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
    silent: dict[int, float] = {}
    assert dead(study, study.trials, silent) == []
    silent[elsewhere._trial_id] -= 1000
    assert [t.number for t in dead(study, study.trials, silent)] == [elsewhere.number]
    storage.record_heartbeat(elsewhere._trial_id)
    assert dead(study, study.trials, silent) == []
    assert silent == {}


def test_stop_comes_before_what_waits(store: Path) -> None:
    study, number = waits_with(store, "")

    def watch(progress: Progress) -> None:
        if progress.phase:
            study.set_user_attr("stop", "now")

    outcome = run(timed(store, 4), watch)
    assert outcome.ended.startswith("stopped on demand")
    assert study.trials[number].state is TrialState.RUNNING


def test_what_was_taken_over_is_recorded_by_one_only(store: Path) -> None:
    """This worker was taken for dead, and another one has its trial again, when it comes to its end."""
    search = make_search(store, 3)
    run(replace(search, budget=Budget(trials=1)), quiet)

    def taken_over(count: int) -> None:
        study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
        running = [t for t in study.trials if t.state is TrialState.RUNNING]
        if count and len(study.trials) < 3:
            requeue(study, running[0].number)

    outcome = run(make_search(store, 3, taken_over), quiet)
    recorded = [record.plan.digest for record in outcome.records]
    assert len(recorded) == len(set(recorded)) == 3
    assert len(set(digests(store))) == len(digests(store)) == 3
    assert search.tracker.open_trials(outcome.study) == []


def test_a_run_that_still_waits_for_its_files_is_left_open(store: Path) -> None:
    """Its worker told Optuna while the tracker was away, and delivers when that is back."""
    search = make_search(store, 3)
    outcome = run(search, quiet)
    plans = {record.number: record.plan for record in outcome.records}
    late = search.tracker.start_trial(outcome.study, 1, replace(plans[1], seed=99))
    again = search.tracker.start_trial(outcome.study, 2, plans[2])
    run(search, quiet)
    assert [left.run_id for left in search.tracker.open_trials(outcome.study)] == [late], "the other one is a copy"
    assert again not in {record.artifact_uri for record in search.tracker.records(outcome.study)}
    search.tracker.kill_trial(late)


def test_a_record_whose_files_never_arrive_is_left_out(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ARRIVE_S", 0.1)
    monkeypatch.setattr(module, "IDLE_S", 0.05)
    search = make_search(store, 3)
    outcome = run(search, quiet)
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
    lost = outcome.records[1]
    told = json.loads(study.trials[1].user_attrs["record"])
    with open_storage(f"sqlite:///{store}/optuna.db").engine.begin() as connection:
        text = json.dumps(json.dumps({**told, "artifact_uri": None}))
        statement = "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'record' AND trial_id = ?"
        connection.exec_driver_sql(statement, (text, study.trials[1]._trial_id))
    assert lost.artifact_uri is not None
    search.tracker._client.delete_run(lost.artifact_uri.split("/")[1])
    again = run(search, quiet)
    assert [record.number for record in again.records] == [0, 2]


def test_a_trial_has_a_sign_of_life_before_anything_is_done_for_it(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without would count as alive for ever, if its host went away in this moment."""

    def dies(*_: Any, **__: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(module._Loop, "_one", dies)
    with pytest.raises(SystemExit):
        run(make_search(store, 2), quiet)
    (trial,) = optuna_trials(store, TrialState.RUNNING)
    with open_storage(f"sqlite:///{store}/optuna.db").engine.begin() as connection:
        found = connection.exec_driver_sql("SELECT trial_id FROM trial_heartbeats").scalars().all()
    assert found == [trial._trial_id]


def test_what_cannot_be_timed_is_recorded_and_not_measured_again(store: Path) -> None:
    run(timed(store, 1), quiet)
    run(timed(store, 3, measure="never"), quiet)
    search = timed(store, 3)
    evaluators = {"judging": Judging(), "timing": Untimeable()}
    outcome = run(replace(search, workbench=replace(search.workbench, evaluators=evaluators)), quiet)
    assert [record.infeasible for record in outcome.records] == [None, "no clock", "no clock"]
    assert len(digests(store)) == 3


@dataclass(frozen=True)
class Untimeable(Timing):
    """No candidate survives it."""

    def measure(self, *given: Any) -> tuple[Measurement, ...]:
        raise Infeasible("no clock")


def test_a_trial_that_was_lost_while_it_was_asked_ends_no_worker(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database was away, and another worker took the trial, which nobody had signed, for a dead one's."""
    ask, calls = module._Loop._ask, []

    def taken(self: Any, *given: Any) -> Any:
        asked = ask(self, *given)
        calls.append(asked)
        if len(calls) == 2:
            requeue(self.study, asked[0].number)
            asked[0].set_user_attr("owner", this_process())
        return asked

    monkeypatch.setattr(module._Loop, "_ask", taken)
    outcome = run(make_search(store, 4), quiet)
    assert outcome.ended == "budget spent: 4 of 4 trials"
    assert len(set(digests(store))) == 4
