"""Writes every trial to MLflow and reads studies back from it; no judge of results.

Runs are addressed by id through the client: no active run and no global tracking URI, so several workers and threads
may record at once.
"""

import fcntl
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Param, RunTag
from mlflow.entities import Metric as LoggedMetric
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.exc import SQLAlchemyError

from compressors.errors import ConfigError
from compressors.plan import CompressionPlan, Scalar
from evaluators.runtime import Runtime, TensorSpec
from search import address
from search.liveness import this_process
from search.pyfunc import save_pyfunc
from search.records import record_from_json, record_to_json, refuse_another
from search.remote import Away, Remote, impatient, reason
from search.select import shown
from search.trial import TrialRecord

SQLITE = "sqlite:///"
CONFIG_FILE = "config.yaml"
FINGERPRINT_FILE = "fingerprint.json"
RECORD_FILE = "measurements.json"
MODEL_FOLDER = "model"
CHAMPION = "champion"
PARAMS_PER_CALL = 100
VALUE_LENGTH = 6000
TAG_LENGTH = 1000


@dataclass(frozen=True, slots=True)
class StudyRun:
    """Where a study is recorded: its parent run, and the experiment of its workload."""

    name: str
    experiment_id: str
    run_id: str


@dataclass(frozen=True, slots=True)
class OpenTrial:
    """A trial whose run has not ended; `owner` names the process that opened it."""

    run_id: str
    number: int
    digest: str
    owner: str


@dataclass(frozen=True)
class Tracker:
    """One MLflow store: a database URI with a folder for files, or a server's address, which has its own."""

    uri: str
    artifacts: str | None = None

    @cached_property
    def address(self) -> str:
        """The URI with an absolute path, valid in any working folder."""
        if not self.uri.startswith(SQLITE):
            return self.uri
        return SQLITE + str(Path(self.uri.removeprefix(SQLITE)).expanduser().absolute())

    @cached_property
    def _folder(self) -> Path | None:
        return Path(self.artifacts).expanduser().absolute() if self.artifacts else None

    @cached_property
    def _client(self) -> Any:
        client = MlflowClient(tracking_uri=self.address, registry_uri=self.address)
        return Remote(client, self.address) if self.is_server else client

    # -- Before any work

    def check(self, study: str | None = None) -> None:
        """Raises `ConfigError` within seconds: the store cannot be reached, its folder not be written, a bad name."""
        if study is not None:
            _check_name(study)
        for folder in self._local_folders():
            _check_writable(folder)
        remedy = "start the server, correct the address, or use tracking=local"
        try:
            with impatient(), self._alone():
                self._client.search_experiments(max_results=1)
        except (Away, MlflowException, SQLAlchemyError) as error:
            problem = f"{address.shown(self.uri)} does not answer ({reason(error)})"
            raise ConfigError("tracking.uri", problem, remedy) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two processes that make the same database file at once would get in each other's way."""
        if not self.address.startswith(SQLITE):
            yield
            return
        with Path(f"{self.address.removeprefix(SQLITE)}.lock").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _local_folders(self) -> Iterator[Path]:
        if self.address.startswith(SQLITE):
            yield Path(self.address.removeprefix(SQLITE)).parent
        if self._folder:
            yield self._folder

    # -- The study

    def open_study(self, name: str, workload: str, config_yaml: str, fingerprint: Mapping[str, Scalar]) -> StudyRun:
        """The study's parent run, found or created, and set running; its fingerprint becomes its params.

        One worker at a time: what another one left half made, because it died, is completed.
        """
        _check_name(name)
        experiment = self._experiment(workload)
        parents = self._parents([experiment], name)
        study = parents[0] if parents else self._create_parent(experiment, name)
        if self.read_study_file(study, FINGERPRINT_FILE) is None:
            self._log(study.run_id, {f"fingerprint.{key}": value for key, value in fingerprint.items()}, [], {})
            self._client.log_text(study.run_id, json.dumps(dict(fingerprint), indent=1), FINGERPRINT_FILE)
        self.recognise(study, fingerprint, sorted(fingerprint))
        self._client.update_run(study.run_id, status="RUNNING")
        self._client.log_text(study.run_id, config_yaml, CONFIG_FILE)
        return study

    def study(self, name: str) -> StudyRun:
        """A study that was opened before, whatever its workload; `ConfigError` when there is none of that name."""
        _check_name(name)
        experiments = [experiment.experiment_id for experiment in self._client.search_experiments()]
        parents = self._parents(experiments, name)
        if not parents:
            problem = f"{name!r} is not in {address.shown(self.uri)}"
            raise ConfigError("study", problem, "run its search first, or give another name")
        return parents[0]

    def recognise(self, study: StudyRun, fingerprint: Mapping[str, Scalar], entries: Sequence[str]) -> None:
        """Raises `ConfigError` when one of these entries is not what the study was begun with."""
        known = json.loads(self.read_study_file(study, FINGERPRINT_FILE) or "{}")
        refuse_another(study.name, {k: known.get(k) for k in entries}, {k: fingerprint.get(k) for k in entries})

    def close_study(self, study: StudyRun) -> None:
        """Mark the parent run as finished; opening it again sets it running."""
        self._client.set_terminated(study.run_id)

    def progress(self, study: StudyRun, step: int, metrics: Mapping[str, float]) -> None:
        """Summary metrics on the parent run, so that its charts show how the search goes."""
        self._client.log_batch(study.run_id, metrics=_logged(metrics, step))

    def log_study_files(self, study: StudyRun, paths: Iterable[Path]) -> None:
        """Put pictures and tables on the parent run; a file of the same name is replaced."""
        for path in paths:
            self._client.log_artifact(study.run_id, str(path))

    def log_study_text(self, study: StudyRun, text: str, name: str) -> None:
        """Put one text file on the parent run."""
        self._client.log_text(study.run_id, text, name)

    def read_study_file(self, study: StudyRun, name: str) -> str | None:
        """A file of the parent run, or None if it has none of that name."""
        if name not in {found.path for found in self._client.list_artifacts(study.run_id)}:
            return None
        return self._text(study.run_id, name)

    def link(self, study: StudyRun, port: int = 5000) -> str:
        """The page of the parent run, on the server or on a local one started with `ui_command`.

        Without the query MLflow opens its pages for language-model applications.
        """
        base = address.shown(self.uri).rstrip("/") if self.is_server else f"http://127.0.0.1:{port}"
        query = urlencode({"workflowType": "machine_learning"})
        return f"{base}/#/experiments/{study.experiment_id}/runs/{study.run_id}?{query}"

    def ui_command(self, port: int = 5000) -> list[str]:
        """The command that serves a local store's pages on 127.0.0.1."""
        if self.is_server:
            problem = f"{address.shown(self.uri)} is a server with pages of its own"
            raise ConfigError("tracking.uri", problem, "open it in a browser")
        options = {"--backend-store-uri": self.address, "--host": "127.0.0.1", "--port": str(port), "--workers": "1"}
        if self._folder:
            options["--default-artifact-root"] = self._folder.as_uri()
        return [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)]

    @property
    def is_server(self) -> bool:
        """Whether it is reached over a network, and may be away."""
        return self.uri.startswith(("http://", "https://"))

    def _experiment(self, workload: str) -> str:
        found = self._client.get_experiment_by_name(workload)
        if found is None:
            location = self._folder.as_uri() if self._folder else None
            # The tag keeps MLflow from offering its pages for language-model applications.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return str(self._client.create_experiment(workload, artifact_location=location, tags=tags))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(workload)
        if found.lifecycle_stage != "active":
            raise ConfigError("workload", f"experiment {workload!r} is deleted in MLflow", "restore it or rename yours")
        return str(found.experiment_id)

    def _create_parent(self, experiment: str, name: str) -> StudyRun:
        tags = {"compareto.study": name, "compareto.role": "study"}
        run = self._client.create_run(experiment, run_name=name, tags=tags)
        return StudyRun(name, experiment, str(run.info.run_id))

    def _parents(self, experiments: list[str], name: str) -> list[StudyRun]:
        query = f"tags.`compareto.role` = 'study' and tags.`compareto.study` = '{name}'"
        runs = sorted(self._search(experiments, query), key=lambda run: (run.info.start_time, run.info.run_id))
        return [StudyRun(name, run.info.experiment_id, run.info.run_id) for run in runs]

    # -- One trial

    def start_trial(self, study: StudyRun, number: int, plan: CompressionPlan) -> str:
        """Open a child run, with the plan as a file, before any work on it; returns the run's id."""
        tags = {
            "mlflow.parentRunId": study.run_id,
            "compareto.study": study.name,
            "compareto.role": "trial",
            "compareto.number": str(number),
            "compareto.digest": plan.digest,
            "compareto.owner": this_process(),
        }
        run = self._client.create_run(study.experiment_id, run_name=f"trial {number}", tags=tags)
        run_id = str(run.info.run_id)
        self._client.log_text(run_id, plan.to_json(), "plan.json")
        return run_id

    def open_run(self, study: StudyRun, number: int, plan: CompressionPlan) -> str:
        """The open run of a trial whose answer got lost on the way, or a new one."""
        known = (
            trial.run_id for trial in self.open_trials(study) if (trial.number, trial.digest) == (number, plan.digest)
        )
        return next(known, None) or self.start_trial(study, number, plan)

    def finish_trial(
        self,
        run_id: str,
        record: TrialRecord,
        files: Path | None,
        inputs: Sequence[TensorSpec] = (),
        at: float | None = None,
        ended: bool = True,
    ) -> TrialRecord:
        """Record what came out, with the deployed files unless it was stopped early, and end the run.

        Gives the record as it is stored, with where the files are. Doing it again changes nothing, if `at`, the Unix
        time of the measurements, is the same. With `ended` false the run stays open: something is still to be measured.
        """
        tags = {}
        if record.stopped is not None:
            tags["compareto.stopped"] = f"{record.stopped.rung}: {record.stopped.reason}"[:TAG_LENGTH]
        if record.infeasible is not None:
            tags["compareto.infeasible"] = record.infeasible[:TAG_LENGTH]
        if files is not None and record.stopped is None:
            self._client.log_artifacts(run_id, str(files), MODEL_FOLDER)
            record = replace(record, artifact_uri=f"runs:/{run_id}/{MODEL_FOLDER}")
            counts = Counter(record.kernels.values()).most_common()
            tags["compareto.kernels"] = ", ".join(f"{count} {kernel}" for kernel, count in counts)[:TAG_LENGTH]
            tags["compareto.inputs"] = json.dumps([asdict(spec) for spec in inputs])
        self._client.log_text(run_id, record_to_json(record), RECORD_FILE)
        self._log(run_id, plan_params(record.plan), _logged(_numbers(record), 0, at), tags)
        if ended:
            self._client.set_terminated(run_id)
        return record

    def unmeasured(self, run_id: str, folder: Path) -> tuple[TrialRecord, tuple[TensorSpec, ...]]:
        """Of a run that `finish_trial` left open: what is known, and its inputs; its files go to `folder`/model."""
        run = self._client.get_run(run_id)
        record = self._read(run)
        self._client.download_artifacts(run_id, MODEL_FOLDER, str(folder))
        return record, _inputs(run)

    def fail_trial(self, run_id: str, plan: CompressionPlan, stage: str, traceback_text: str) -> None:
        """Record where and how a trial broke, and end its run as failed."""
        last = traceback_text.strip().rsplit("\n", 1)[-1]
        tags = {"compareto.failed_stage": stage, "compareto.error": last[:TAG_LENGTH]}
        self._log(run_id, plan_params(plan), [], tags)
        self._client.log_text(run_id, traceback_text, "error.txt")
        self._client.set_terminated(run_id, status="FAILED")

    def kill_trial(self, run_id: str) -> None:
        """End the run of a trial whose process was stopped."""
        self._client.set_terminated(run_id, status="KILLED")

    def open_trials(self, study: StudyRun) -> list[OpenTrial]:
        """The trials still marked running: of live workers, and left over from killed ones."""
        return [
            OpenTrial(run.info.run_id, int(tags["compareto.number"]), tags["compareto.digest"], tags["compareto.owner"])
            for run in self._children(study, "RUNNING")
            for tags in [run.data.tags]
        ]

    def find(self, study: StudyRun, digest: str) -> TrialRecord | None:
        """The finished trial of that plan, infeasible and stopped ones included."""
        runs = self._children(study, "FINISHED", f" and tags.`compareto.digest` = '{digest}'")
        return next(map(self._read, runs), None)

    def records(self, study: StudyRun) -> list[TrialRecord]:
        """Every finished trial, infeasible and stopped ones included, by number, and each plan once."""
        found = sorted(map(self._read, self._children(study, "FINISHED")), key=lambda record: record.number)
        return list({record.plan.digest: record for record in reversed(found)}.values())[::-1]

    def trial(self, study: StudyRun, number: int) -> TrialRecord:
        """The finished trial of that number; `ConfigError` when there is none."""
        for record in self.records(study):
            if record.number == number:
                return record
        raise ConfigError("trial", f"{number} is no finished trial of {study.name!r}", "take a number from its table")

    def champion(self, study: StudyRun) -> TrialRecord:
        """The trial that carries the alias; `ConfigError` when none was chosen yet."""
        try:
            version = self._client.get_model_version_by_alias(study.name, CHAMPION)
        except MlflowException as error:
            raise ConfigError("study", f"{study.name!r} has no champion yet", "run its search to an end") from error
        return self.trial(study, int(version.tags["compareto.number"]))

    def model_folder(self, record: TrialRecord) -> Path:
        """The deployed files: in place where the store is local, else a copy that lasts as long as the process."""
        run_id = _run_id(record)
        uri = self._client.get_run(run_id).info.artifact_uri
        if urlsplit(uri).scheme in ("", "file"):
            return Path(local_file_uri_to_path(uri), MODEL_FOLDER)
        # MLflow's own temporary copies stay for ever, and it makes them of local files too (3.17).
        copy = Path(_copies().name, run_id)
        copy.mkdir(exist_ok=True)
        return Path(self._client.download_artifacts(run_id, MODEL_FOLDER, str(copy)))

    def _log(self, run_id: str, params: Mapping[str, Scalar], metrics: Sequence[Any], tags: Mapping[str, str]) -> None:
        """In one call, unless there are more params than one takes."""
        entries = [Param(key, str(value)[:VALUE_LENGTH]) for key, value in params.items()]
        first, rest = entries[:PARAMS_PER_CALL], entries[PARAMS_PER_CALL:]
        self._client.log_batch(run_id, metrics=metrics, params=first, tags=_tags(tags))
        for start in range(0, len(rest), PARAMS_PER_CALL):
            self._client.log_batch(run_id, params=rest[start : start + PARAMS_PER_CALL])

    def _children(self, study: StudyRun, status: str, more: str = "") -> Iterator[Any]:
        query = f"tags.`mlflow.parentRunId` = '{study.run_id}' and attributes.status = '{status}'{more}"
        return self._search([study.experiment_id], query)

    def _search(self, experiments: list[str], query: str) -> Iterator[Any]:
        page = self._client.search_runs(experiments, query, max_results=1000)
        yield from page
        while page.token:
            page = self._client.search_runs(experiments, query, max_results=1000, page_token=page.token)
            yield from page

    def _read(self, run: Any) -> TrialRecord:
        return record_from_json(self._text(run.info.run_id, RECORD_FILE))

    def _text(self, run_id: str, name: str) -> str:
        # A folder of its own: without one, files of a remote store would pile up in the temporary folder.
        with tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run_id, name, folder)).read_text()

    # -- The registry

    def register(
        self, study: StudyRun, records: Iterable[TrialRecord], champion: TrialRecord, runtimes: Mapping[str, Runtime]
    ) -> None:
        """Make each record a version of the registered model `study.name`, once, and set the alias on the champion.

        The versions load with `mlflow.pyfunc.load_model` where only mlflow and the runtime are installed.
        """
        versions = self._versions(study.name)
        for record in (*records, champion):
            digest = record.plan.digest
            if digest not in versions:
                runtime = runtimes[record.plan.target.runtime]
                versions[digest] = self._new_version(study, record, runtime)
        self._client.set_registered_model_alias(study.name, CHAMPION, versions[champion.plan.digest])
        note = (
            f"Champion: `models:/{study.name}@{CHAMPION}`, {_summary(champion)}. The front: `pareto.html` in Artifacts."
        )
        self._client.set_tag(study.run_id, "mlflow.note.content", note)

    def _versions(self, name: str) -> dict[str, str]:
        """Digest -> version of everything registered under the name, which is created if new."""
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = self._client.search_model_versions(f"name = '{name}'", max_results=1000)
        return {v.tags["compareto.digest"]: v.version for v in found if "compareto.digest" in v.tags}

    def _new_version(self, study: StudyRun, record: TrialRecord, runtime: Runtime) -> str:
        run_id = _run_id(record)
        inputs = _inputs(self._client.get_run(run_id))
        tags = {"compareto.digest": record.plan.digest, "compareto.number": str(record.number)}
        logged = self._client.create_logged_model(
            study.experiment_id, name=f"{study.name}-trial-{record.number}", source_run_id=run_id, tags=tags
        )
        with tempfile.TemporaryDirectory() as folder:
            packed = Path(folder, "packed")
            model = Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id)
            save_pyfunc(packed, self.model_folder(record), runtime, record.plan.target.precision, inputs, model)
            self._client.log_model_artifacts(logged.model_id, str(packed))
        self._client.finalize_logged_model(logged.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        # Not `models:/ID`: a database store looks that up through MLflow's global tracking URI (3.17).
        source = logged.artifact_location
        version = self._client.create_model_version(
            study.name, source, run_id, tags, description=_summary(record), model_id=logged.model_id
        )
        return str(version.version)


def plan_params(plan: CompressionPlan) -> dict[str, Scalar]:
    """The plan as flat names `method.key` and `method.key/layer`: MLflow refuses an `@` in a name."""
    params: dict[str, Scalar] = {"runtime": plan.target.runtime, "precision": plan.target.precision, "seed": plan.seed}
    for step in plan.steps:
        params |= {f"{step.method}.{key}": value for key, value in step.shared.items()}
        for layer, settings in step.per_layer.items():
            params |= {f"{step.method}.{key}/{layer}": value for key, value in settings.items()}
    return params


def _numbers(record: TrialRecord) -> dict[str, float]:
    numbers = {f"seconds.{phase}": seconds for phase, seconds in record.seconds.items()}
    for m in record.measurements:
        numbers |= {m.name: m.value, f"{m.name}.low": m.interval[0], f"{m.name}.high": m.interval[1]}
    return numbers


def _summary(record: TrialRecord) -> str:
    values = ", ".join(f"{m.name} {shown(m)}" for m in record.measurements)
    return f"trial {record.number} on {record.plan.target.runtime} {record.plan.target.precision}: {values}"


def _inputs(run: Any) -> tuple[TensorSpec, ...]:
    specs = json.loads(run.data.tags["compareto.inputs"])
    return tuple(TensorSpec(s["name"], tuple(s["shape"]), s["dtype"]) for s in specs)


def _logged(metrics: Mapping[str, float], step: int, at: float | None = None) -> list[Any]:
    now = int((at or time.time()) * 1000)
    return [LoggedMetric(name, float(value), now, step) for name, value in metrics.items()]


def _tags(tags: Mapping[str, str]) -> list[Any]:
    return [RunTag(key, value) for key, value in tags.items()]


@cache
def _copies() -> "tempfile.TemporaryDirectory[str]":
    """Where files from elsewhere are put, until the process ends."""
    return tempfile.TemporaryDirectory()


def _run_id(record: TrialRecord) -> str:
    """From `runs:/ID/model`."""
    if record.artifact_uri is None:
        stopped = record.stopped and f"stopped early: {record.stopped.reason}"
        why = record.infeasible or stopped or "they were not recorded"
        raise ConfigError("trial", f"{record.number} has no deployed files ({why})", "choose a trial with measurements")
    return record.artifact_uri.split("/")[1]


def _check_name(name: str) -> None:
    if not name.strip(".") or not name.isprintable() or any(c in name for c in "/:'\"`%"):
        raise ConfigError("study", f"name {name!r} is empty or has one of / : ' \" ` %", "use letters, digits, . - _")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            "tracking", f"{folder} cannot be written ({error.strerror})", "choose another folder"
        ) from error
