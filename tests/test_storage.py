"""Storages that are taken or refused, waited for, and locked; the trials in them are in test_loop.py."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from compressors.errors import ConfigError
from search import database as module
from search.database import DIGEST, patient, together
from search.storage import exclusively, open_storage, quiet, snapshot

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("grpc://127.0.0.1:13000", "never take up the trial of a worker that died"),
        ("journal.log", "never take up the trial of a worker that died"),
        ("mysql+pymysql://me@127.0.0.1/x", "neither SQLite nor PostgreSQL"),
        ("postgresql+psycopg://me:hunter2@127.0.0.1:1/x", "cannot be opened"),
    ],
)
def test_a_storage_that_does_not_do_is_refused_with_the_reason(url: str, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=reason) as refused:
        open_storage(url)
    assert "hunter2" not in str(refused.value)
    assert time.monotonic() - began < 10, "nobody waits for a database that was never there"


def away(kind: str = "psycopg") -> OperationalError:
    broken = type("OperationalError", (Exception,), {"__module__": kind})("the server closed the connection")
    return OperationalError("SELECT 1", {}, broken)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_database_that_goes_away_is_waited_for(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    calls: list[int] = []

    @patient
    def ask() -> str:
        calls.append(1)
        if len(calls) < 4:
            if wrapped:
                raise StorageInternalError("wrapped") from away()
            raise away()
        return "answer"

    assert ask() == "answer"
    assert len(calls) == 4


def test_a_file_that_cannot_be_written_is_not_waited_for() -> None:
    @patient
    def ask() -> None:
        raise away("sqlite3")

    with pytest.raises(OperationalError):
        ask()


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)

    @patient
    def ask() -> None:
        raise away()

    with pytest.raises(OperationalError):
        ask()


HOLDER = """
import sys, time
from search.storage import exclusively
with exclusively(sys.argv[1], "study"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_and_a_dead_one_frees_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, url], cwd=ROOT, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with exclusively(url, "another study"):
        pass
    waiter = subprocess.Popen([sys.executable, "-c", HOLDER, url], cwd=ROOT, stdout=subprocess.PIPE)
    assert waiter.stdout is not None
    time.sleep(1)
    holder.kill()
    holder.communicate()
    assert waiter.stdout.readline() == b"held\n"
    waiter.kill()
    waiter.communicate()


def test_a_study_outlasts_a_database_that_goes_away_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way in that matters is Optuna's, through its cache."""
    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    study = optuna.create_study(storage=storage, directions=["minimize", "maximize"])
    connect = storage.scoped_session
    calls = {"": 0}

    def flaky() -> object:
        calls[""] += 1
        if calls[""] % 3 == 1:
            raise away()
        return connect()

    monkeypatch.setattr(storage, "scoped_session", flaky)
    for _ in range(3):
        with quiet():
            trial = study.ask()
        trial.set_user_attr("owner", "me")
        trial.suggest_categorical("bits", [4, 8])
        trial.set_constraint("size", -1.0)
        storage.record_heartbeat(trial._trial_id)
        study.set_user_attr("left", 1.0)
        study.tell(trial, [1.0, 2.0])
    study.enqueue_trial({"bits": 4})
    with quiet():
        assert study.ask().suggest_categorical("bits", [4, 8]) == 4
    assert len(study.get_trials()) == 4
    assert storage._get_stale_trial_ids(study._study_id) == []
    assert study.user_attrs == {"left": 1.0}
    assert calls[""] > 30


def test_an_ask_writes_attributes_and_parameters_in_one_transaction(tmp_path: Path) -> None:
    """Each is a commit on its own otherwise, while all other workers wait."""
    url = f"sqlite:///{tmp_path}/a.db"
    storage = open_storage(url)
    study = optuna.create_study(storage=storage, study_name="a", sampler=optuna.samplers.RandomSampler())
    with quiet():
        trial = study.ask()
    begun, written = list[str](), list[int]()
    sqlalchemy.event.listen(storage.engine, "before_cursor_execute", lambda *given: begun.append(given[2]))

    def commit(_: object) -> None:
        written.append(sum(not statement.startswith("SELECT") for statement in begun))
        begun.clear()

    sqlalchemy.event.listen(storage.engine, "commit", commit)
    with together(study):
        trial.set_user_attr("owner", "me")
        trial.suggest_float("a", 0, 1)
        trial.suggest_float("b", 0, 1)
        trial.set_user_attr("digest", "abc")
    assert [count for count in written if count] == [4]
    (stored,) = optuna.load_study(study_name="a", storage=url).trials
    assert stored.user_attrs == trial.user_attrs == {"owner": "me", "digest": "abc"}
    assert stored.params == trial.params


def test_parameters_that_are_kept_together_are_all_there_afterwards(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    study = optuna.create_study(storage=open_storage(url), study_name="a", sampler=optuna.samplers.RandomSampler())
    with quiet():
        first, second = study.ask(), study.ask()
    with together(study):
        asked = {name: first.suggest_float(name, 0, 1) for name in "abc"}
        assert optuna.load_study(study_name="a", storage=url).trials[0].params == {}
    second.suggest_float("a", 0, 1)
    with pytest.raises(ValueError, match="different distribution"), together(study):
        second.suggest_int("b", 0, 7)
    stored = optuna.load_study(study_name="a", storage=url).trials
    assert stored[0].params == asked
    assert set(stored[1].params) == {"a"}
    second.suggest_float("c", 0, 1)
    assert set(optuna.load_study(study_name="a", storage=url).trials[1].params) == {"a", "c"}


def test_whatever_happens_to_trials_is_seen_as_if_all_were_read_anew(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    quiet_sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(storage=open_storage(url), study_name="a", sampler=quiet_sampler)
    other = optuna.load_study(study_name="a", storage=open_storage(url))
    chance = np.random.default_rng(0)
    at_work: list[optuna.Trial] = []
    states = set[TrialState]()

    def begin() -> None:
        with quiet():
            trial = study.ask()
        at_work.append(trial)
        if chance.random() < 0.8:
            with together(study):
                trial.suggest_float("a", 0, 1)
                trial.suggest_categorical("b", ["x", 8, None])
                trial.suggest_int("c", 2, 64, log=True)
                trial.set_user_attr(DIGEST, str(trial.number))

    def sign() -> None:
        if at_work:
            at_work[chance.integers(len(at_work))].set_user_attr("owner", ["", "me", "you"][chance.integers(3)])

    def end() -> None:
        if at_work:
            trial = at_work.pop(chance.integers(len(at_work)))
            trial.report([0.5, float("inf"), -float("inf")][chance.integers(3)], 1)
            study.tell(trial, *[(1.0, None), (None, TrialState.FAIL), (None, TrialState.PRUNED)][chance.integers(3)])

    def queue() -> None:
        study.enqueue_trial({"a": 0.5})

    for _ in range(150):
        [begin, begin, sign, end, end, queue][chance.integers(6)]()
        if chance.random() < 0.7:
            seen = snapshot(other)
            assert seen == optuna.load_study(study_name="a", storage=url).trials
            states |= {t.state for t in seen}
    assert states == set(TrialState)


def test_the_parameters_of_a_running_trial_are_read_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    study = optuna.create_study(storage=open_storage(url), study_name="a", sampler=optuna.samplers.RandomSampler())
    with quiet():
        study.tell(study.ask(), 1.0)
        runs = study.ask()
    with together(study):
        asked = runs.suggest_float("a", 0, 1)
        runs.set_user_attr(DIGEST, "abc")
    storage = open_storage(url)
    other = optuna.load_study(study_name="a", storage=storage)
    before = snapshot(other)[1]
    begun = list[str]()
    sqlalchemy.event.listen(storage.engine, "before_cursor_execute", lambda *given: begun.append(given[2]))
    runs.set_user_attr("owner", "me")
    after = snapshot(other)[1]
    assert begun
    assert not [statement for statement in begun if "trial_params" in statement]
    assert after.params == {"a": asked}
    assert after.user_attrs == {DIGEST: "abc", "owner": "me"}
    assert before.user_attrs == {DIGEST: "abc"}
