import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from compressors.errors import ConfigError, Infeasible
from search import loop as module
from search.conclude import conclude
from search.ladder import Ladder
from search.liveness import this_process
from search.loop import run
from search.sampler import REMAINING
from search.select import Bound
from search.storage import at_work, spent_s
from search.study import Budget, Progress, Search
from tests.studies import Gradually, digests, make_search, optuna_trials, quiet, refuse


def test_the_budget_is_met_exactly_and_the_uncompressed_model_comes_first(store: Path) -> None:
    outcome = run(make_search(store, 5), quiet)
    assert [record.number for record in outcome.records][:2] == [0, 1]
    assert len(outcome.records) == 5
    assert not outcome.records[0].plan.steps
    assert len(outcome.records[1].plan.steps[0].per_layer) == 6
    assert outcome.ended == "budget spent: 5 of 5 trials"
    assert (outcome.records[0].number, len(outcome.front) >= 2) == (0, True)


def test_a_finished_study_is_taken_up_with_a_larger_budget_and_nothing_runs_twice(store: Path) -> None:
    deployed: list[int] = []
    run(make_search(store, 4), quiet)
    outcome = run(make_search(store, 7, deployed.append), quiet)
    assert len(outcome.records) == 7
    assert len(set(digests(store))) == len(digests(store)) == 7
    # One for the reference, three for the trials that were missing.
    assert len(deployed) == 4


def test_a_study_that_was_begun_with_something_else_is_refused(store: Path) -> None:
    run(make_search(store, 2), quiet)
    with pytest.raises(ConfigError, match="model was a, is b") as caught:
        run(make_search(store, 3, fingerprint={"model": "b", "space": make_search(store, 1).space.digest}), quiet)
    assert "study=NAME" in str(caught.value)


def test_a_plan_proposed_again_is_answered_without_work(store: Path) -> None:
    class Stuck(optuna.samplers.RandomSampler):
        def sample_independent(self, *_: Any) -> Any:
            return 8

    deployed: list[int] = []
    search = make_search(store, 5, deployed.append, sampler=lambda _seed: Stuck())
    outcome = run(search, quiet)
    assert "space exhausted" in outcome.ended
    again = [t for t in optuna_trials(store) if "duplicate_of" in t.user_attrs]
    assert {t.user_attrs["duplicate_of"] for t in again} == {1}
    assert all(t.values == optuna_trials(store)[1].values for t in again)
    assert len(outcome.records) == 2
    assert len(deployed) == 3


def test_an_infeasible_plan_is_recorded_with_its_reason_and_counts(store: Path) -> None:
    outcome = run(make_search(store, 3, refuse("no kernel on Mondays", 6)), quiet)
    assert outcome.records[1].infeasible == "no kernel on Mondays"
    assert optuna_trials(store)[1].state is TrialState.PRUNED
    assert len(outcome.records) == 3
    assert all(record.number != 1 for record in outcome.front)


def test_a_trial_that_breaks_is_recorded_where_and_why_and_the_search_goes_on(store: Path) -> None:
    def broken(count: int) -> None:
        if count == 6:
            raise RuntimeError("kernel panic")

    outcome = run(make_search(store, 4, broken), quiet)
    failed = optuna_trials(store)[1]
    assert failed.state is TrialState.FAIL
    assert failed.user_attrs["error"] == "deploy: RuntimeError: kernel panic"
    assert [record.number for record in outcome.records] == [0, 2, 3]


def test_bounds_become_constraints_and_keep_points_off_the_front(store: Path) -> None:
    outcome = run(make_search(store, 6, bounds=(Bound("latency_ratio", 0.5),)), quiet)
    first = optuna_trials(store)[0]
    assert first.constraints == {"latency_ratio": 0.5}
    assert all(record.value("latency_ratio").value <= 0.5 for record in outcome.front)


def test_ctrl_c_puts_the_trial_back_and_the_same_command_goes_on(store: Path) -> None:
    def interrupted(count: int) -> None:
        if count == 6:
            raise KeyboardInterrupt

    search = make_search(store, 3, interrupted)
    outcome = run(search, quiet)
    assert outcome.ended.startswith("interrupted")
    assert len(outcome.records) == 1
    assert search.tracker.open_trials(outcome.study) == []
    assert [t.state for t in optuna_trials(store)][:2] == [TrialState.COMPLETE, TrialState.FAIL]

    resumed = run(make_search(store, 3), quiet)
    assert len(resumed.records) == 3
    assert len(set(digests(store))) == 3
    # The plan that was interrupted is among those that were finished.
    assert any(len(r.plan.steps[0].per_layer) == 6 for r in resumed.records if r.plan.steps)


def test_a_killed_process_loses_nothing_but_its_running_trial(store: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"from tests.studies import main; main({str(store)!r}, {str(marker)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    for _ in range(600):
        if marker.exists() and marker.read_text() == "1":
            break
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert len(optuna_trials(store, TrialState.RUNNING)) == 1
    before = digests(store)

    search = make_search(store, 8)
    outcome = run(search, quiet)
    assert optuna_trials(store, TrialState.RUNNING) == []
    assert search.tracker.open_trials(outcome.study) == []
    assert len(outcome.records) == 8
    assert digests(store)[: len(before)] == before
    assert len(set(digests(store))) == 8


def test_work_recorded_by_a_process_that_died_before_telling_is_not_done_again(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from search import storage

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Loop, "_tell", dies)
        run(make_search(store, 2), quiet)
    assert optuna_trials(store)[0].state is TrialState.RUNNING
    monkeypatch.setattr(storage, "is_gone", lambda *_: True)
    deployed: list[int] = []
    outcome = run(make_search(store, 2, deployed.append), quiet)
    assert len(outcome.records) == 2
    # The reference and the second trial; the first was read back.
    assert deployed == [0, 6]


def test_the_watcher_sees_the_study_grow(store: Path) -> None:
    seen: list[Progress] = []
    run(make_search(store, 3), seen.append)
    assert [p.done for p in seen if not p.phase] == [1, 2, 3]
    assert {"compress", "deploy", "counting"} <= {p.phase for p in seen}


@pytest.mark.parametrize(("trials", "minutes"), [(None, None), (0, None), (None, -1.0)])
def test_a_budget_without_an_end_or_below_zero_is_refused(trials: int | None, minutes: float | None) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Budget(trials, minutes)


def test_a_storage_that_cannot_be_opened_is_one_line(store: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage\.url") as caught:
        run(make_search(store, 2, storage="postgresql+nodriver://nobody@127.0.0.1:1/none"), quiet)
    assert "\n" not in str(caught.value)


def test_minutes_end_a_search_too(store: Path) -> None:
    outcome = run(make_search(store, 1, budget=Budget(minutes=1e-9)), quiet)
    assert "minutes" in outcome.ended
    assert outcome.records == ()


def test_a_study_without_a_measured_trial_has_no_champion(store: Path) -> None:
    search = make_search(store, 1, budget=Budget(minutes=1e-9))
    with pytest.raises(ConfigError, match="no measured trial"):
        conclude(search, run(search, quiet))


def test_two_workers_share_the_budget_and_never_a_plan(store: Path) -> None:
    code = f"from pathlib import Path; from tests.studies import *; run_slowly(Path({str(store)!r}), 8)"
    workers = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1]) for _ in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert len(digests(store)) == len(set(digests(store))) == 8
    assert len({t.user_attrs["owner"] for t in optuna_trials(store)}) == 2


def test_a_busy_moment_is_not_held_against_the_plan(store: Path) -> None:
    moments = [Infeasible("too busy", transient=True)]

    def busy(count: int) -> None:
        if count == 6 and moments:
            raise moments.pop()

    outcome = run(make_search(store, 4, busy), quiet)
    assert optuna_trials(store)[1].user_attrs["missed"] == "too busy"
    assert next(len(r.plan.steps[0].per_layer) for r in outcome.records if r.plan.steps) == 6
    assert len(outcome.records) == 3


def test_interruptions_never_cost_the_baseline(store: Path) -> None:
    calls: list[int] = []

    def after_the_reference(count: int) -> None:
        calls.append(count)
        if len(calls) > 1:
            raise KeyboardInterrupt

    for _ in range(4):
        calls.clear()
        assert run(make_search(store, 3, after_the_reference), quiet).ended.startswith("interrupted")
    outcome = run(make_search(store, 2), quiet)
    assert not outcome.records[0].plan.steps
    assert conclude(make_search(store, 2), outcome).choice.record in outcome.records


LADDER = Ladder(("accuracy", "latency_ratio"), "accuracy", "latency_ratio")


def gradual(
    folder: Path, trials: int, ladder: Ladder | None, before: Callable[[int], None] = lambda _n: None
) -> Search:
    search = make_search(folder, trials, before, ladder=ladder)
    return replace(search, workbench=replace(search.workbench, evaluators={"counting": Gradually()}))


def test_a_stopped_candidate_is_told_to_optuna_and_to_mlflow(store: Path) -> None:
    search = gradual(store, 20, LADDER)
    outcome = run(search, quiet)
    stopped = [r for r in outcome.records if r.stopped]
    assert len(outcome.records) == 20
    assert len(stopped) >= 3
    told = {t.number: t for t in optuna_trials(store)}
    assert all(t.user_attrs["loss"] >= 0 for t in told.values())
    client = search.tracker._client
    runs = client.search_runs([outcome.study.experiment_id], "tags.`compareto.role` = 'trial'")
    tags = {int(r.data.tags["compareto.number"]): r.data.tags for r in runs}
    for record in stopped:
        trial, stop = told[record.number], record.stopped
        assert stop is not None
        assert trial.state is TrialState.PRUNED
        assert trial.user_attrs["stopped"] == {"rung": stop.rung, "reason": stop.reason}
        assert trial.user_attrs["preview"] == {m: record.value(m).value for m in ("accuracy", "latency_ratio")}
        assert tags[record.number]["compareto.stopped"] == f"{stop.rung}: {stop.reason}"
        assert stop.reason.startswith("trial ")
        assert record.artifact_uri is None
    finished = set(told) - {r.number for r in stopped}
    assert not any({"stopped", "preview"} & set(told[n].user_attrs) for n in finished)
    assert not any("compareto.stopped" in tags[n] for n in finished)
    assert conclude(search, outcome).choice.record.stopped is None


def test_the_front_is_the_same_with_and_without_the_ladder(store: Path, tmp_path: Path) -> None:
    other = shutil.copytree(store, tmp_path / "other")
    fronts = []
    for folder, ladder in ((store, LADDER), (other, None)):
        outcome = run(gradual(folder, 20, ladder), quiet)
        assert any(r.stopped for r in outcome.records) == (ladder is not None)
        fronts.append({r.plan.digest: r.values(LADDER.objectives) for r in outcome.front})
    assert fronts[0] == fronts[1]


def test_what_was_stopped_is_not_tried_again(store: Path) -> None:
    before = run(gradual(store, 20, LADDER), quiet)
    deployed: list[int] = []
    after = run(gradual(store, 22, LADDER, deployed.append), quiet)
    assert after.records[:20] == before.records
    assert len(deployed) == 3  # the reference and two trials
    assert len(set(digests(store))) == 22


def test_a_plan_that_was_stopped_is_answered_as_stopped_when_proposed_again(store: Path) -> None:
    search = gradual(store, 20, LADDER)
    stopped = next(r for r in run(search, quiet).records if r.stopped)
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
    study.enqueue_trial(study.trials[stopped.number].params)
    run(replace(search, budget=Budget(trials=21)), quiet)
    (again,) = (t for t in optuna_trials(store) if t.user_attrs.get("duplicate_of") == stopped.number)
    assert again.state is TrialState.PRUNED
    first = study.trials[stopped.number].user_attrs
    assert {n: again.user_attrs[n] for n in ("stopped", "preview", "loss")} == {
        n: first[n] for n in ("stopped", "preview", "loss")
    }


def test_the_proxy_is_measured_without_a_ladder_too(store: Path) -> None:
    outcome = run(gradual(store, 3, None), quiet)
    losses = [record.value("calibration_loss").value for record in outcome.records]
    assert losses == [t.user_attrs["loss"] for t in optuna_trials(store)]
    assert losses[1] != losses[0]


def test_the_front_so_far_is_on_disk_and_in_the_tracker_after_every_trial(tmp_path: Path) -> None:
    seen: list[list[int]] = []
    search = make_search(tmp_path, 5)

    def watch(progress: Progress) -> None:
        file = tmp_path / "test" / "front.json"
        if file.exists():
            seen.append([row["trial"] for row in json.loads(file.read_text())])

    outcome = run(search, watch)
    text = search.tracker.read_study_file(outcome.study, "front.json")
    assert text is not None
    rows = json.loads(text)
    assert [row["trial"] for row in rows] == [record.number for record in outcome.front]
    assert rows == json.loads((tmp_path / "test" / "front.json").read_text())
    assert all(row["files"].startswith("runs:/") for row in rows)
    assert len({tuple(numbers) for numbers in seen}) > 1, "it changes while the search runs"


def test_a_sampler_is_told_how_much_time_is_left(tmp_path: Path) -> None:
    left: list[float] = []

    class Listening(optuna.samplers.RandomSampler):
        def before_trial(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            left.append(study.user_attrs[REMAINING])

    search = make_search(tmp_path, 4, sampler=lambda _seed: Listening(), budget=Budget(trials=4, minutes=1))
    run(search, quiet)
    assert left == sorted(left, reverse=True)
    assert 0 < left[-1] < left[0] <= 60


def test_a_trial_of_another_live_process_is_at_work_and_one_of_a_dead_process_is_not(store: Path) -> None:
    assert run(make_search(store, 2), quiet).others == 0
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
    host, pid, started = this_process().rsplit(":", 2)
    study.ask().set_user_attr("owner", f"{host}:{pid}:{int(started) + 1}")
    assert at_work(study.trials) == []
    study.ask().set_user_attr("owner", this_process())
    assert run(make_search(store, 2), quiet).others == 1


def test_time_in_which_several_workers_were_at_it_counts_once(store: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{store}/spent.db")
    began = datetime(2026, 1, 1)
    for first, last in ((0, 10), (5, 12), (6, 8), (20, 21)):
        moments = {"datetime_start": timedelta(seconds=first), "datetime_complete": timedelta(seconds=last)}
        trial = optuna.trial.create_trial(value=0.0)
        for name, since in moments.items():
            setattr(trial, name, began + since)
        study.add_trial(trial)
    assert spent_s(study.trials) == pytest.approx(13)
