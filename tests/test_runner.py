"""What happens in a trial's process stays there: crashes, hangs and greed cost one trial, and the next one runs."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from compressors.errors import ConfigError, Infeasible
from compressors.plan import CompressionPlan, Step, Target
from search.loop import run
from search.runner import Broken, Here, Limits, Runner
from search.torchvision_compat import torchvision
from search.trial import Clock, Workbench
from tests.studies import make_search, quiet

FAKE = Target("fake", "fp32")
LAYERS = ("stem.0", "block.a.0", "block.b.0", "down.0", "shortcut", "head")


def plan(count: int) -> CompressionPlan:
    """So many layers in 8 bits; the stand-in for a runtime calls `misbehave` with their number."""
    return CompressionPlan(FAKE, (Step("quantize", {name: {"bits": 8} for name in LAYERS[:count]}),) if count else ())


def misbehave(count: int) -> None:
    if count == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if count == 2:
        time.sleep(600)
    if count == 3:
        raise RuntimeError("kernel panic")
    if count == 4:
        raise Infeasible("busy", transient=True)
    if count == 5:
        raise Infeasible("no such kernel")


def bench(folder: Path, before: Callable[[int], None] = misbehave) -> Workbench:
    return make_search(folder, 1, before).workbench


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    made = Runner(bench(tmp_path_factory.mktemp("runner")), FAKE, Clock(), Limits())
    yield made
    made.close()


def carried(runner: Runner, count: int, folder: Path, clock: Clock | None = None) -> tuple[str, str, str]:
    with pytest.raises(Broken) as caught:
        runner.run(count, plan(count), folder, clock or Clock(), None)
    return caught.value.stage, caught.value.reason, caught.value.details


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_trial_in_a_process_is_the_trial_itself(runner: Runner, tmp_path: Path) -> None:
    here = Here(bench(tmp_path), FAKE, Clock())
    expected, _ = here.run(7, plan(6), empty(tmp_path / "here"), Clock(), None)
    phases: list[str] = []
    record, deployed = runner.run(7, plan(6), empty(tmp_path / "there"), Clock(watch=phases.append), None)
    assert record.measurements == expected.measurements
    assert record.plan == expected.plan
    assert record.achieved == expected.achieved
    assert deployed is not None
    assert deployed.folder == tmp_path / "there"
    assert (deployed.folder / "model.json").exists()
    assert {"compress", "deploy", "counting"} <= set(phases)


def test_what_a_process_is_sent_may_come_from_torchvision(tmp_path: Path) -> None:
    flips = torchvision().transforms.RandomHorizontalFlip(p=1.0)
    runner = Runner(bench(tmp_path, partial(_expect_mirrored, flips)), FAKE, Clock(), Limits())
    record, _ = runner.run(0, plan(0), empty(tmp_path / "files"), Clock(), None)
    runner.close()
    assert record.measured


def _expect_mirrored(flips: Callable[[Tensor], Tensor], _count: int) -> None:
    assert flips(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0, 1.0]]


def test_a_crash_is_told_with_its_signal_and_the_next_trial_runs(runner: Runner, tmp_path: Path) -> None:
    stage, reason, details = carried(runner, 1, tmp_path)
    assert (stage, reason) == ("deploy", "its process died: SIGSEGV")
    assert "misbehave" in details, "where, as far as the interpreter knows"
    record, _ = runner.run(2, plan(0), empty(tmp_path / "next"), Clock(), None)
    assert record.measured


def test_an_exception_keeps_its_traceback_and_the_process(runner: Runner, tmp_path: Path) -> None:
    child = runner._ready(Clock())
    stage, reason, details = carried(runner, 3, tmp_path)
    assert runner._child is child
    assert (stage, reason) == ("deploy", "RuntimeError: kernel panic")
    assert 'raise RuntimeError("kernel panic")' in details


def test_what_is_infeasible_is_so_here_too(runner: Runner, tmp_path: Path) -> None:
    record, _ = runner.run(5, plan(5), tmp_path, Clock(), None)
    assert record.infeasible == "no such kernel"
    with pytest.raises(Infeasible, match="busy") as caught:
        runner.run(4, plan(4), tmp_path, Clock(), None)
    assert caught.value.transient


def test_a_hang_ends_at_the_limit(tmp_path: Path) -> None:
    runner = Runner(bench(tmp_path), FAKE, Clock(), Limits(minutes=0.02))
    began = time.monotonic()
    stage, reason, _ = carried(runner, 2, tmp_path)
    assert time.monotonic() - began < 30
    assert (stage, reason) == ("deploy", "it took more than limits.minutes=0.02")
    runner.close()


def test_too_much_memory_ends_it(tmp_path: Path) -> None:
    runner = Runner(bench(tmp_path), FAKE, Clock(), Limits(memory_gb=0.02))
    _, reason, _ = carried(runner, 2, tmp_path)
    assert "GB of memory, more than limits.memory_gb=0.02" in reason
    runner.close()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Whatever is started in the background inherits that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_takes_the_process_along(tmp_path: Path) -> None:
    runner = Runner(bench(tmp_path), FAKE, Clock(), Limits(minutes=0.5))
    child = runner._child
    assert child is not None
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        runner.run(2, plan(2), tmp_path, Clock(), None)
    assert child._process.poll() is not None


def test_a_model_that_cannot_be_deployed_at_all_is_known_at_once(tmp_path: Path) -> None:
    def never(_count: int) -> None:
        raise Infeasible("no operator for it")

    with pytest.raises(Infeasible, match="no operator for it"):
        Runner(bench(tmp_path, never), FAKE, Clock(), Limits())


def test_a_process_that_dies_before_the_first_trial_is_told_of(tmp_path: Path) -> None:
    def die(_count: int) -> None:
        os._exit(7)

    with pytest.raises(ConfigError, match=r"limits: cannot be kept: .* did not get ready .*exit code 7"):
        run(make_search(tmp_path, 1, die, limits=Limits()), quiet)


def test_what_cannot_be_sent_is_one_line(tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(ConfigError, match=r"limits: cannot be kept: .* set limits=null"):
        Runner(bench(tmp_path, lambda _count: lock.release()), FAKE, Clock(), Limits())


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"memory_gb": -1}])
def test_limits_that_nothing_keeps_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"limits.{next(iter(wrong))}: is"):
        Limits(**wrong)


def test_a_study_goes_on_after_a_crash_and_says_where_it_was(store: Path) -> None:
    def crash_once(count: int) -> None:
        if count == 6:
            os.kill(os.getpid(), signal.SIGSEGV)

    outcome = run(make_search(store, 4, crash_once, limits=Limits()), quiet)
    assert [record.number for record in outcome.records] == [0, 2, 3]
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{store}/optuna.db")
    assert study.trials[1].user_attrs["error"] == "deploy: its process died: SIGSEGV"
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    (failed,) = client.search_runs([outcome.study.experiment_id], "attributes.status = 'FAILED'")
    assert failed.data.tags["compareto.failed_stage"] == "deploy"
    assert failed.data.tags["compareto.error"] == "its process died: SIGSEGV"
