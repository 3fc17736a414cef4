import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray

from compressors.errors import ConfigError
from compressors.pipeline import Artifact, Context
from compressors.plan import CompressionPlan, Step, Target
from evaluators.measurement import Measurement, Metric, exact
from evaluators.runtime import Array, Deployed, Loader, Session, Support, TensorSpec
from search import tracking
from search.pyfunc import save_pyfunc
from search.records import record_from_json, record_to_json
from search.tracking import StudyRun, Tracker, plan_params
from search.trial import Stop, TrialRecord


def load_matrix(folder: str, precision: str, batch: int | None, threads: int) -> Session:
    import json
    from pathlib import Path

    import numpy as np

    weight = np.load(Path(folder, "weight.npy"), allow_pickle=False)
    scale = json.loads(Path(folder, "scale.json").read_text())["scale"]

    def run(*inputs: Array) -> NDArray[np.float32]:
        return np.asarray(sum(x.astype(np.float32) @ weight for x in inputs) * scale, np.float32)

    return run


@dataclass(frozen=True)
class FakeRuntime:
    name: str = "numpy"

    def precisions(self) -> tuple[str, ...]:
        return ("fp32",)

    def support(self, kind: str, bits: int) -> Support:
        return Support.KERNEL

    def deploy(self, artifact: Artifact, context: Context, folder: Path, cache: Path) -> Deployed:
        raise NotImplementedError

    def loader(self) -> Loader:
        return load_matrix

    def requirements(self) -> tuple[str, ...]:
        return ("numpy",)

    def kernels(self, deployed: Deployed) -> Mapping[str, str]:
        return {}


WEIGHT = np.arange(6, dtype=np.float32).reshape(3, 2)


def deployed(folder: Path, inputs: int = 1) -> Deployed:
    folder.mkdir(parents=True)
    np.save(folder / "weight.npy", WEIGHT)
    (folder / "scale.json").write_text(json.dumps({"scale": 2.0}))
    return Deployed(FakeRuntime(), folder, "fp32", tuple(TensorSpec(f"x{i}", (2, 3), "float32") for i in range(inputs)))


def plan(bits: int = 8) -> CompressionPlan:
    return CompressionPlan(Target("numpy", "fp32"), (Step("quantize", {"a.0": {"bits": bits}}, {"scheme": "max"}),))


def record(number: int = 3, bits: int = 8, infeasible: str | None = None) -> TrialRecord:
    accuracy = Measurement(Metric("accuracy", "share", "maximize"), 0.9, (0.88, 0.92), 500, {"split": "validation"})
    return TrialRecord(
        number=number,
        plan=plan(bits),
        measurements=() if infeasible else (accuracy, exact(Metric("size_bytes", "bytes", "minimize"), 1000)),
        infeasible=infeasible,
        seconds={"compress": 1.5},
        achieved={"quantize": {"a.0": {"bits": bits}}},
        environment={"host": "here"},
    )


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Making the database takes seconds: made once, copied for each test."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    Tracker(f"sqlite:///{path}").check()
    return path


@pytest.fixture
def tracker(empty_store: Path, tmp_path: Path) -> Tracker:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return Tracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "files"))


@pytest.fixture
def study(tracker: Tracker) -> StudyRun:
    return tracker.open_study("digits-1", "digits", "seed: 0\n", {"model": "abc"})


def test_a_study_whose_first_worker_died_halfway_through_opening_it_is_completed(tracker: Tracker) -> None:
    half = tracker._create_parent(tracker._experiment("digits"), "digits-1")
    study = tracker.open_study("digits-1", "digits", "seed: 0\n", {"model": "abc"})
    assert study == half
    with pytest.raises(ConfigError, match="model was abc, is xyz"):
        tracker.open_study("digits-1", "digits", "seed: 0\n", {"model": "xyz"})


def finish(tracker: Tracker, study: StudyRun, made: TrialRecord, folder: Path) -> TrialRecord:
    run_id = tracker.start_trial(study, made.number, made.plan)
    made_files = deployed(folder)
    tracker.finish_trial(run_id, made, made_files.folder, made_files.inputs)
    found = tracker.find(study, made.plan.digest)
    assert found is not None
    return found


def test_a_record_survives_the_round_trip() -> None:
    for made in (record(), record(infeasible="no kernel for 3 bits")):
        assert record_from_json(record_to_json(made)) == made


STOP = Stop("preview 25 %", "accuracy", (0.5, 0.7), "trial 1 dominates its best case")


def test_a_stopped_record_survives_it_too_and_one_from_before_can_be_read() -> None:
    made = replace(record(), stopped=STOP)
    assert record_from_json(record_to_json(made)) == made
    old = json.loads(record_to_json(record()))
    del old["stopped"]
    assert record_from_json(json.dumps(old)) == record()


def test_a_stopped_trial_is_tagged_and_leaves_no_files(tracker: Tracker, study: StudyRun, tmp_path: Path) -> None:
    found = finish(tracker, study, replace(record(), stopped=STOP), tmp_path / "deployed")
    assert found.stopped == STOP
    (run,) = tracker._children(study, "FINISHED")
    assert run.data.tags["compareto.stopped"] == "preview 25 %: trial 1 dominates its best case"
    assert run.data.metrics["accuracy"] == 0.9
    with pytest.raises(ConfigError, match="stopped early: trial 1 dominates"):
        tracker.model_folder(found)


def test_a_plan_is_flattened_into_readable_params() -> None:
    assert plan_params(plan()) == {
        "runtime": "numpy",
        "precision": "fp32",
        "seed": 0,
        "quantize.scheme": "max",
        "quantize.bits/a.0": 8,
    }


def test_opening_a_study_again_finds_it(tracker: Tracker, study: StudyRun) -> None:
    assert tracker.open_study("digits-1", "digits", "seed: 1\n", {"model": "abc"}) == study
    assert tracker.study("digits-1") == study
    assert tracker.open_study("digits-2", "digits", "", {}) != study


def test_a_study_recorded_with_something_else_is_refused(tracker: Tracker, study: StudyRun) -> None:
    with pytest.raises(ConfigError, match="model was abc, is xyz"):
        tracker.open_study("digits-1", "digits", "seed: 1\n", {"model": "xyz"})


def test_an_unknown_study_is_refused_with_its_name(tracker: Tracker, study: StudyRun) -> None:
    with pytest.raises(ConfigError, match="'other' is not in"):
        tracker.study("other")


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "it's"])
def test_a_name_the_registry_would_refuse_is_refused_first(tracker: Tracker, name: str) -> None:
    with pytest.raises(ConfigError, match="letters"):
        tracker.open_study(name, "digits", "", {})


def test_a_finished_trial_is_read_back_whole(tracker: Tracker, study: StudyRun, tmp_path: Path) -> None:
    made = record()
    found = finish(tracker, study, made, tmp_path / "deployed")
    assert replace(found, artifact_uri=None) == made
    assert tracker.records(study) == [found]
    assert tracker.find(study, plan(4).digest) is None
    assert np.array_equal(np.load(tracker.model_folder(found) / "weight.npy"), WEIGHT)


def test_files_of_a_local_store_are_used_where_they_are(tracker: Tracker, study: StudyRun, tmp_path: Path) -> None:
    found = finish(tracker, study, record(), tmp_path / "deployed")
    assert tracker.model_folder(found).is_relative_to(str(tracker.artifacts))


def test_files_from_elsewhere_are_copied_to_one_place(
    tracker: Tracker, study: StudyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = finish(tracker, study, record(), tmp_path / "deployed")
    monkeypatch.setattr(tracking, "urlsplit", lambda _uri: urlsplit("mlflow-artifacts:/1/2"))
    for _ in range(2):
        folder = tracker.model_folder(found)
        assert folder.is_relative_to(tracking._copies().name)
        assert np.array_equal(np.load(folder / "weight.npy"), WEIGHT)


def test_an_infeasible_trial_keeps_its_reason(tracker: Tracker, study: StudyRun) -> None:
    made = record(infeasible="no kernel for 3 bits")
    tracker.finish_trial(tracker.start_trial(study, 3, made.plan), made, None)
    assert tracker.records(study) == [made]
    with pytest.raises(ConfigError, match="no deployed files"):
        tracker.model_folder(made)


def test_more_params_than_one_call_takes(tracker: Tracker, study: StudyRun) -> None:
    wide = CompressionPlan(
        Target("numpy", "fp32"), (Step("quantize", {f"layer.{i}": {"bits": 8} for i in range(250)}),)
    )
    run_id = tracker.start_trial(study, 0, wide)
    tracker.finish_trial(run_id, replace(record(0, infeasible="too wide"), plan=wide), None)
    assert len(tracker._client.get_run(run_id).data.params) == 253


def test_recording_the_same_again_changes_nothing(tracker: Tracker, study: StudyRun, tmp_path: Path) -> None:
    made, files = record(), deployed(tmp_path / "deployed")
    run_id = tracker.start_trial(study, made.number, made.plan)
    stored = [tracker.finish_trial(run_id, made, files.folder, files.inputs, at=1000.0) for _ in range(2)]
    assert stored[0] == stored[1]
    assert tracker.records(study) == [stored[0]]
    name = made.measurements[0].name
    assert len(tracker._client.get_metric_history(run_id, name)) == 1


def test_leftovers_of_a_crash_are_found_and_closed(tracker: Tracker, study: StudyRun) -> None:
    left = [tracker.start_trial(study, number, plan()) for number in (0, 1)]
    tracker.fail_trial(left[0], plan(), "deploy", "Traceback\n  ...\nValueError: broken")
    (open_trial,) = tracker.open_trials(study)
    assert (open_trial.run_id, open_trial.number, open_trial.digest) == (left[1], 1, plan().digest)
    assert open_trial.owner.startswith(socket.gethostname())
    tracker.kill_trial(left[1])
    assert tracker.open_trials(study) == []
    assert tracker.records(study) == []


def test_a_failed_trial_says_where_and_why(tracker: Tracker, study: StudyRun) -> None:
    run_id = tracker.start_trial(study, 0, plan())
    tracker.fail_trial(run_id, plan(), "deploy", "Traceback\n  ...\nValueError: broken")
    run = tracker._client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["compareto.failed_stage"] == "deploy"
    assert run.data.tags["compareto.error"] == "ValueError: broken"


def test_progress_and_files_lie_on_the_parent(tracker: Tracker, study: StudyRun, tmp_path: Path) -> None:
    (tmp_path / "front.json").write_text("[]")
    for step in (1, 2):
        tracker.progress(study, step, {"trials": step, "front": 1})
    tracker.log_study_files(study, [tmp_path / "front.json"])
    assert tracker.read_study_file(study, "front.json") == "[]"
    assert tracker.read_study_file(study, "test.json") is None
    tracker.close_study(study)
    run = tracker._client.get_run(study.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"trials": 2, "front": 1}
    assert {f.path for f in tracker._client.list_artifacts(study.run_id)} == {
        "config.yaml",
        "fingerprint.json",
        "front.json",
    }


def test_links_lead_to_the_parent_run(tracker: Tracker, study: StudyRun) -> None:
    page = f"/#/experiments/{study.experiment_id}/runs/{study.run_id}?workflowType=machine_learning"
    assert tracker.link(study, port=5001) == "http://127.0.0.1:5001" + page
    assert Tracker("http://box:80/").link(study) == "http://box:80" + page
    assert tracker.ui_command(5001)[1:4] == ["-m", "mlflow", "server"]
    with pytest.raises(ConfigError, match="browser"):
        Tracker("http://box:80/").ui_command()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        Tracker(f"sqlite:///{tmp_path}/file/mlflow.db").check()


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to be taken for one" * 100)
    with pytest.raises(ConfigError, match="does not answer"):
        Tracker(f"sqlite:///{tmp_path}/mlflow.db").check()


def test_a_server_that_is_not_there_is_refused_within_seconds() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        with pytest.raises(ConfigError, match="does not answer"):
            Tracker(f"http://127.0.0.1:{taken.getsockname()[1]}").check()


def test_registering_again_adds_nothing_and_moves_the_alias(tracker: Tracker, study: StudyRun, tmp_path: Path) -> None:
    first, second = (finish(tracker, study, record(n, n), tmp_path / str(n)) for n in (4, 8))
    runtimes = {"numpy": FakeRuntime()}
    for champion in (first, second):
        tracker.register(study, [first, second], champion, runtimes)
        version = tracker._client.get_model_version_by_alias("digits-1", "champion")
        assert version.tags["compareto.digest"] == champion.plan.digest
    assert len(tracker._client.search_model_versions("name = 'digits-1'")) == 2


LOADING = """
import logging, sys
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/digits-1@champion")
print(model.predict(np.ones((5, 3), np.float32)).tolist())
assert "search" not in sys.modules and "compressors" not in sys.modules
"""


def test_several_inputs_are_given_as_a_dict(tmp_path: Path) -> None:
    model = deployed(tmp_path / "deployed", inputs=2)
    save_pyfunc(tmp_path / "packed", model.folder, model.runtime, "fp32", model.inputs)
    ones = np.ones((5, 3), np.float32)
    import mlflow.pyfunc  # not before search.tracking, which tells it to be quiet

    found = mlflow.pyfunc.load_model(str(tmp_path / "packed")).predict({"x0": ones, "x1": ones})
    assert np.array_equal(found, model.run(ones, ones))


def test_the_champion_loads_where_this_code_is_unknown(tracker: Tracker, study: StudyRun, tmp_path: Path) -> None:
    champion = finish(tracker, study, record(), tmp_path / "deployed")
    tracker.register(study, [], champion, {"numpy": FakeRuntime()})
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOADING, tracker.uri], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[12.0, 18.0]] * 5
