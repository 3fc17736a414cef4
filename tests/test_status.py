"""What `status` reads of a study, and that `stop` ends workers after their trial."""

import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from compressors.errors import ConfigError
from search.liveness import this_process
from search.loop import STOPPED, run
from search.sampler import REMAINING
from search.status import show, status, stop
from search.storage import BUDGET
from search.study import Budget
from tests.studies import make_search, quiet, refuse


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/optuna.db"


def test_a_finished_study_has_no_worker_and_nothing_left(store: Path) -> None:
    run(make_search(store, 5, refuse("no kernel", 2)), quiet)
    found = status(url(store), "test")
    assert found.workers == ()
    assert sum(n for state, n in found.states.items() if state != "repeated") == 5
    assert found.left_trials == 0
    assert found.left_s == 0
    assert found.front
    assert found.per_hour is not None
    assert found.per_hour > 5


def test_a_running_trial_shows_its_process_and_a_dead_one_that_it_is_gone(store: Path) -> None:
    run(make_search(store, 2), quiet)
    study = optuna.load_study(study_name="test", storage=url(store))
    study.set_user_attr(BUDGET, {"trials": 9, "minutes": 1})
    host, pid, started = this_process().rsplit(":", 2)
    for owner in (this_process(), f"{host}:{pid}:{int(started) + 1}"):
        study.ask().set_user_attr("owner", owner)
    found = status(url(store), "test")
    assert [worker.alive for worker in found.workers] == [True, False]
    assert found.workers[0].process == this_process()
    assert found.states["running"] == 2
    assert found.left_trials == 7
    console = Console(width=130, record=True)
    show(found, console)
    text = console.export_text()
    assert "gone: its trial will be taken up again" in text
    assert "7 trials" in text
    assert f"front, by values: trial {', '.join(map(str, found.front))}" in text


def test_a_repeated_plan_is_no_work(store: Path) -> None:
    run(make_search(store, 3), quiet)
    study = optuna.load_study(study_name="test", storage=url(store))
    study.set_user_attr(BUDGET, {"trials": 9, "minutes": None})
    before = status(url(store), "test").left_trials
    trial = study.ask()
    trial.set_user_attr("duplicate_of", 0)
    study.tell(trial, state=TrialState.FAIL)
    found = status(url(store), "test")
    assert found.states["repeated"] >= 1
    assert found.left_trials == before


def test_stop_ends_a_worker_after_its_trial_and_a_later_one_goes_on(store: Path) -> None:
    begun, deployed = threading.Event(), list[int]()

    def slowly(count: int) -> None:
        deployed.append(count)
        if len(deployed) > 2:  # the reference comes first
            begun.set()
        time.sleep(0.2)

    def ask() -> None:
        begun.wait(30)
        assert stop(url(store), "test") <= 1

    thread = threading.Thread(target=ask)
    thread.start()
    outcome = run(make_search(store, 12, slowly), quiet)
    thread.join()
    assert outcome.ended == STOPPED
    done = len(outcome.records)
    assert 1 <= done < 12
    assert status(url(store), "test").workers == ()
    assert len(run(make_search(store, done + 2), quiet).records) == done + 2


def test_what_is_left_of_the_minutes_does_not_run_out_while_nobody_works(store: Path) -> None:
    run(make_search(store, 2, budget=Budget(trials=2, minutes=10)), quiet)
    left = status(url(store), "test").left_s
    assert left is not None
    assert 500 < left <= 600
    study = optuna.load_study(study_name="test", storage=url(store))
    study.set_user_attr(REMAINING, 30.0)
    assert status(url(store), "test").left_s == pytest.approx(left), "what the last worker was told counts no more"
    study.ask().set_user_attr("owner", this_process())
    running = status(url(store), "test").left_s
    assert running is not None
    assert 20 < running <= 30


@pytest.mark.parametrize("made", [False, True])
def test_an_unknown_study_is_one_line_and_makes_no_file(tmp_path: Path, made: bool) -> None:
    if made:
        run(make_search(tmp_path, 1), quiet)
    with pytest.raises(ConfigError, match="'other' is not in sqlite"):
        status(url(tmp_path), "other")
    assert (tmp_path / "optuna.db").exists() == made
