"""The command line: what the user got wrong is one line with a remedy and exit code 2, before any work."""

import contextlib
import errno
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import safetensors.torch
import torch
from optuna.trial import TrialState
from PIL import Image
from rich.console import Console

import compareto
from search.__main__ import guarded
from search.models import resnet20
from search.study import Search
from search.tracking import Tracker
from tests.test_models import Trap

ROOT = Path(__file__).parents[1]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Path:
    """A results folder with weights that fit the default network, others that do not, and an empty database."""
    folder = tmp_path_factory.mktemp("cli")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    save(folder / "fits.safetensors", 10)
    save(folder / "seven.safetensors", 7)
    save(folder / "nan.safetensors", 10, torch.nan)
    (folder / "junk.safetensors").write_bytes(b"junk")
    torch.save(Trap(folder / "executed"), folder / "trap.pt")
    for name in ("cat", "dog"):
        (folder / "few" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "few" / name / "one.png")
    return folder


def save(path: Path, classes: int, bias: float = 0.0) -> None:
    model = resnet20(classes, 1)
    torch.nn.init.constant_(model.get_submodule("head").get_parameter("bias"), bias)
    safetensors.torch.save_model(model, path)


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `compareto` in the folder, with weights that need no training; no trial is ever begun."""

    def begin(search: Search, _view: object) -> None:
        raise AssertionError("a trial was begun")

    def call(*words: str) -> int:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["compareto", *words])
        with pytest.raises(SystemExit) as ended:
            compareto.main()
        return int(str(ended.value.code or 0))

    monkeypatch.setattr("search.workers.run", begin)
    return call


@pytest.fixture
def refused(place: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line on stderr."""

    def call(*words: str, verb: str = "search") -> str:
        assert (
            command(verb, f"folder={place}", f"cache={place}/cache", "model.checkpoint=fits.safetensors", *words) == 2
        )
        said = capsys.readouterr()
        (line,) = said.err.splitlines()
        assert line.startswith("compareto: ")
        assert line.count("; ") >= 1
        assert "Traceback" not in said.out
        return line

    return call


OPTIONS = {
    "an unknown option": ("budget.minuts=3", "did you mean budget.minutes?"),
    "an unknown group": ("compresor.quantize=1", "did you mean compressor.quantize?"),
    "an unknown option of a group": (
        "model=resnet21",
        "use causal_lm, clip, efficientnet_lite0, image_classifier, resnet18, resnet20, sentence_encoder, text_cl",
    ),
    "an unknown member of a list": (
        "compressor=[quantise]",
        "use adapt, cluster, depth, distill, heads, lowrank, prune, qat, quantize, separable, slim, smooth, sparsify",
    ),
    "an entry without a plus": ("bounds={sise:3}", "+bounds.NAME=VALUE"),
    "brackets left open": ("budget.trials=[1", "brackets closed"),
    "no equals sign": ("quick", "OPTION=VALUE"),
    "no name": ("=3", "write OPTION=VALUE"),
    "no trials": ("budget.trials=0", "budget.trials: is 0; give a finite number above 0"),
    "negative minutes": ("budget.minutes=-1", "is -1; give a finite number above 0"),
    "no budget": ("budget.minutes=null", "set budget.trials=N or budget.minutes=M"),
    "a word for a number": ("budget.trials=many", "is 'many'; give a whole number"),
    "no worker": ("workers=0", "workers: is 0; give 1 to"),
    "more workers than cores": ("workers=9999", "one process for each core"),
    "half a trial": ("budget.trials=1.5", "is 1.5; give a whole number"),
    "a seed that is no number": ("seed=abc", "seed: is 'abc'"),
    "an error of the ladder that is no rate": ("ladder.error=1", "ladder.error: is 1; give a rate above 0"),
    "shares of the ladder that shrink": ("ladder.shares=[0.5,0.25]", "ladder.shares: is [0.5, 0.25]; give growing"),
    "a ladder neither on nor off": ("ladder.enabled=maybe", "ladder.enabled: is 'maybe'; give true or false"),
    "no recovery batch": ("recovery_batch=0", "recovery_batch: is 0; give 1 or more"),
    "no name for the study": ("study=null", "study: is not set"),
    "nobody measures an objective": ("objectives=[accuracy,latency]", "use accuracy, latency_ratio"),
    "one objective": ("objectives=[accuracy]", "give at least two of"),
    "an objective, not a list": ("objectives=accuracy", "give a list of metrics"),
    "nobody measures the quality": ("quality=fidelity", "no evaluator measures it"),
    "nobody measures a bound": ("+bounds.size=3", "bounds.size: no evaluator measures it"),
    "a bound that is no number": ("bounds.size_bytes=big", "bounds.size_bytes: is 'big'; give a number"),
    "bounds that are no mapping": ("bounds=3", "bounds.METRIC=NUMBER"),
    "no runtime": ("runtime=[]", "runtime=[...]"),
    "no compressor": ("compressor=[]", "compressor=[...]"),
    "no evaluator": ("evaluator=[]", "evaluator=[...]"),
    "a negative drop": ("rule.drop=-1", "rule.drop: is -1"),
    "an unknown argument of the rule": ("+rule.fall=1", "unexpected keyword argument 'fall'"),
    "an unknown argument of the sampler": ("+sampler.fall=1", "unexpected keyword argument 'fall'"),
    "a tolerance that the sampler refuses": ("sampler.tolerance=0", "sampler.tolerance: is 0; give"),
    "an unknown argument of an evaluator": ("+evaluator.latency.fall=1", "evaluator.latency: "),
    "a sampler that does not exist": ("sampler._target_=optuna.samplers.Nothing", "sampler: Error loading"),
    "an address that the environment lacks": ("storage=postgresql", "COMPARETO_STORAGE"),
    "a password on the command line": (
        "storage.url=postgresql+psycopg://me:secret@127.0.0.1/x",
        "storage.url: has a password in it",
    ),
    "a storage that forgets the dead": ("storage.url=grpc://127.0.0.1:1", "never take up the trial of a worker"),
    "a measure that is none": ("measure=sometimes", "measure: is 'sometimes'"),
    "a folder left open": ("data=image_folder", "data.folder: is not set"),
    "a folder of results below a file": ("folder=/dev/null/x", "/dev/null/x cannot be written"),
    "a cache below a file": ("cache=/dev/null/x", "set cache=DIRECTORY"),
    "a tracker's folder below a file": ("tracking.artifacts=/dev/null/x", "choose another folder"),
    "a server that does not answer": ("tracking.uri=http://127.0.0.1:9", "start the server"),
}


@pytest.mark.parametrize("word", OPTIONS)
def test_a_wrong_option_is_one_line_with_what_to_do(word: str, refused: Refused) -> None:
    option, expected = OPTIONS[word]
    assert expected in refused(option)


WORK = {
    "patterns that match no layer": ("compressor.quantize.space.bits.include=[no*]", "'no*' matches no layer"),
    "bits without a kernel": ("compressor.quantize.space.bits.choices.conv=[16,32]", "16 bits for conv layers (stem)"),
    "a missing checkpoint": ("model.checkpoint=none.pt", "none.pt is no file"),
    "a torn checkpoint": ("model.checkpoint=junk.safetensors", "cannot be read as plain weights"),
    "a checkpoint of another shape": ("model.checkpoint=seven.safetensors", "head.weight is (7, 64), not (10, 64)"),
    "code in a checkpoint": ("model.checkpoint=trap.pt", "cannot be read as plain weights"),
    "NaN in the weights": ("model.checkpoint=nan.safetensors", "its output holds NaN"),
    "images without pixels": ("data.size=0", "data: Input and output sizes should be greater than 0"),
    "an unknown network": ("model.network.name=mobilnet_v2", "did you mean mobilenet_v2"),
}


@pytest.mark.parametrize("word", WORK)
def test_a_search_that_could_only_fail_is_refused_first(word: str, place: Path, refused: Refused) -> None:
    option, expected = WORK[word]
    network = ["model=torchvision"] if "network" in option else []
    assert expected in refused("compressor=[quantize]", *network, option)
    assert not (place / "executed").exists()
    assert optuna.get_all_study_names(f"sqlite:///{place}/optuna.db") == []


def test_an_input_that_the_network_cannot_take_names_both_shapes(refused: Refused) -> None:
    narrow = ["model=torchvision", "model.network.name=alexnet", "model.checkpoint=null", "data.size=8"]
    recipe = ["model.training={_target_:search.training.Recipe}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.build.trained", lambda model, *_: model)
        line = refused(*narrow, *recipe)
    assert "the data has (2, 1, 8, 8)" in line
    assert "choose data.size" in line


def test_a_split_without_examples_is_refused(place: Path, refused: Refused) -> None:
    line = refused("data=image_folder", f"data.folder={place}/few")
    assert "every split needs at least one example" in line


def test_nan_in_the_data_is_found(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = raw.images.copy()
    images[:, 3, 3] = np.nan
    monkeypatch.setattr("search.data.load_digits", lambda: SimpleNamespace(images=images, target=raw.target))
    assert "example 0 holds NaN or infinity" in refused()


@pytest.mark.parametrize("url", ["sqlite:////dev/null/x/o.db", "postgresql+nodriver://nobody@127.0.0.1:1/x"])
def test_a_storage_that_cannot_be_opened_is_named(url: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from search import loop

    monkeypatch.setattr("search.workers.run", loop.run)
    line = refused("compressor=[quantize]", f"storage.url={url}")
    assert f"storage.url: {url} cannot be opened" in line


@pytest.mark.parametrize("verb", ["select", "reproduce"])
def test_a_study_that_was_never_begun_cannot_be_used(verb: str, refused: Refused) -> None:
    assert "'never' is not in" in refused("study=never", verb=verb)


@pytest.mark.parametrize("verb", ["select", "reproduce"])
@pytest.mark.parametrize("option", ["folder=/dev/null/x", "tracking.uri=http://127.0.0.1:9"])
def test_reading_a_store_that_is_not_there_is_refused_too(verb: str, option: str, refused: Refused) -> None:
    assert "cannot be written" in (line := refused(option, verb=verb)) or "does not answer" in line


def test_a_server_has_pages_of_its_own(refused: Refused) -> None:
    assert "open it in a browser" in refused("tracking=server", verb="ui")


def test_ui_starts_mlflow_on_this_machine_only(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("compareto.subprocess.run", lambda words, check: started.append(words))
    assert command("ui", "port=5555") == 0
    (words,) = started
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--port") + 1] == "5555"
    assert "http://127.0.0.1:5555" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "code"), [(("nonsense",), 2), (("--help",), 0), ((), 0)])
def test_the_usage_names_every_command(
    words: tuple[str, ...], code: int, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == code
    said = capsys.readouterr().out
    assert all(
        f"\n  {verb} " in said for verb in ("search", "worker", "select", "reproduce", "status", "stop", "ui", "doctor")
    )


@pytest.mark.parametrize("others", [0, 2])
def test_of_a_sweep_the_last_worker_concludes(
    others: int, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    concluded: list[object] = []
    words = ("search", "model.checkpoint=fits.safetensors")
    ended = SimpleNamespace(others=others, records=(1, 2, 3), ended="budget spent")

    def begun(job: Search, _watch: object) -> SimpleNamespace:
        study = optuna.create_study(study_name=job.name, storage=job.storage, load_if_exists=True)
        assert study.study_name == "resnet20-digits"
        return ended

    monkeypatch.setattr("search.workers.run", begun)
    for module in ("search.__main__", "search.conclude"):
        monkeypatch.setattr(f"{module}.conclude", lambda *_: concluded.append(1) or concluded)  # type: ignore[func-returns-value]
    monkeypatch.setattr("search.__main__.show", lambda _conclusion, console: console.print("the front"))
    assert command(*words, "worker=1") == 0
    assert len(concluded) == (0 if others else 1)
    assert ("another worker chooses and draws" in capsys.readouterr().out) == bool(others)
    assert command(*words, "worker=2") == 0
    assert len(concluded) == (0 if others else 1), "the same trials are concluded once"
    ended.records = (1, 2, 3, 4)
    assert command(*words, "worker=1") == 0
    assert len(concluded) == (0 if others else 2)
    concluded.clear()
    assert command(*words) == 0
    assert concluded, "a search that is no worker of a sweep draws whatever there is"


def test_the_configuration_can_be_looked_at(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("search", "rule=knee", "--cfg", "job") == 0
    assert "_target_: search.select.Knee" in capsys.readouterr().out


# -- The whole program, on real parts


QUICK = (
    "model.training.epochs=2",
    "compressor.distill.space.epochs.choices=[0,1]",
    "evaluator.latency.sessions=2",
    "evaluator.latency.rounds=3",
    "budget.minutes=null",
)
LOAD = """
import sys
import mlflow
import numpy
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/resnet20-digits@champion")
print(model.predict(numpy.zeros((3, 1, 32, 32), numpy.float32)).shape)
"""


def start(folder: Path, trials: int, *more: str) -> "subprocess.Popen[str]":
    words = [f"folder={folder}/runs", *QUICK, f"budget.trials={trials}", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "search", *words],
        cwd=ROOT,
        env={**os.environ, "COMPARETO_CACHE": f"{folder}/cache"},
        stdout=subprocess.PIPE,
        text=True,
    )


def left_running(folder: Path) -> list[str]:
    """Command lines of processes that were started with this folder's cache."""
    mark = f"COMPARETO_CACHE={folder}/cache".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        # A process may end while it is looked at.
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
    return found


def finished(folder: Path) -> list[str]:
    """Digests of the plans that were carried out, in order."""
    return [t.user_attrs["digest"] for t in trials(folder, TrialState.COMPLETE) if "duplicate_of" not in t.user_attrs]


def trials(folder: Path, state: TrialState) -> list[optuna.trial.FrozenTrial]:
    study = optuna.load_study(study_name="resnet20-digits", storage=f"sqlite:///{folder}/runs/optuna.db")
    return study.get_trials(deepcopy=False, states=(state,))


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    for _ in range(int(5 * seconds)):
        if condition():
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing happened in {seconds} s")


@pytest.mark.slow
def test_a_search_from_nothing_to_a_champion_that_loads_anywhere_and_survives_a_kill(tmp_path: Path) -> None:
    first = start(tmp_path, 8)
    said, _ = first.communicate()
    assert first.returncode == 0
    assert "the front (★ champion, ○ uncompressed)" in said
    assert "champion: trial" in said
    assert "on the test split, champion: accuracy" in said
    assert "budget spent: 8 of 8 trials" in said
    assert (tmp_path / "runs" / "resnet20-digits" / "pareto.png").stat().st_size > 10_000

    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, uri], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.splitlines()[-1] == "(3, 10)"

    before = finished(tmp_path)
    assert len(before) == 8
    second = start(tmp_path, 14)
    wait_for(lambda: len(finished(tmp_path)) > 8 and bool(trials(tmp_path, TrialState.RUNNING)), 120)
    second.kill()
    second.communicate()
    killed = finished(tmp_path)
    wait_for(lambda: not left_running(tmp_path), 10)

    third = start(tmp_path, 14)
    said, _ = third.communicate()
    assert third.returncode == 0
    assert "budget spent: 14 of 14 trials" in said
    after = finished(tmp_path)
    assert after[: len(killed)] == killed
    assert len(set(after)) == len(after)
    assert trials(tmp_path, TrialState.RUNNING) == []
    assert left_running(tmp_path) == []
    tracker = Tracker(uri, f"{tmp_path}/runs/mlartifacts")
    study = tracker.study("resnet20-digits")
    assert tracker.open_trials(study) == []
    assert {record.plan.digest for record in tracker.records(study)} >= set(after)
    assert len(tracker.records(study)) == 14


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_two_workers_share_a_search_and_one_of_them_concludes(tmp_path: Path) -> None:
    process = start(tmp_path, 10, "workers=2")
    said, _ = process.communicate()
    assert process.returncode == 0
    assert "the front (★ champion, ○ uncompressed)" in said
    done = finished(tmp_path)
    assert len(done) == len(set(done)) == 10, "the budget is met exactly, and no plan done twice"
    complete = [t for t in trials(tmp_path, TrialState.COMPLETE) if "duplicate_of" not in t.user_attrs]
    owners = [t.user_attrs["owner"] for t in complete]
    assert min(owners.count(owner) for owner in set(owners)) >= 2
    assert len(set(owners)) == 2
    assert "the front (" not in (tmp_path / "runs/resnet20-digits/worker-2.log").read_text()
    assert not left_running(tmp_path)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), "[Errno 28] No space left on device: 'a.bin'"),
        (RuntimeError("failures:\n##### File a.bin #####\n[Errno 28] No space left on device: 'a.bin'"), "[Errno 28]"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full\nmore"), "(sqlite3.OperationalError)"),
    ],
)
def test_a_full_disk_is_one_line(raised: Exception, told: str) -> None:
    def action() -> None:
        raise RuntimeError("while it was written") from raised

    console = Console(width=200, file=io.StringIO())
    assert guarded(action, console) == 2
    assert isinstance(console.file, io.StringIO)
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith(f"compareto: {told}")
    assert line.endswith("; make room or choose another folder=DIRECTORY: the same command goes on")
